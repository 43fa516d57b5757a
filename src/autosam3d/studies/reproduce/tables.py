"""The paper's tables from evaluations of this project's runs, each with the tests that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from autosam3d.errors import UsageError
from autosam3d.evaluation.scores import Evaluation, counted, organ_scores, read_json
from autosam3d.evaluation.statistics import (
    ORGAN_RULE,
    TEST_RULE,
    Comparison,
    Key,
    Unit,
    compare,
    estimate,
    over_organs,
    over_seeds,
    p_text,
    spread,
    with_holm,
)
from autosam3d.studies.reproduce.paper import ALPHA, DATASETS, PUBLISHED_STEPS, PaperTable, Row
from autosam3d.studies.reproduce.table import NOT_RUN, Cell, Column, Kind, Table

Measure = Literal["dice", "nsd"]
_NAMES: Mapping[Measure, str] = {"dice": "mDice", "nsd": "mNSD"}
_SCORE_RULE = (
    "Scores in percent: the mean over the organs of each case, then over the cases; in brackets the 95 % bootstrap "
    "interval over cases; ± is the standard deviation over seeds; bold is the highest of its column."
)


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """One finished run of one model on one dataset."""

    model: str
    """The key of its row."""
    dataset: str
    """Name of the dataset's recipe, as in `paper.DATASETS`."""
    seed: int
    evaluation: Path
    """What `autosam3d evaluate` wrote: a folder with scores.json."""
    tuned_parameters: int | None = None
    minutes: float | None = None
    """Trained."""
    steps: int | None = None
    """Of the optimiser."""
    machine: str | None = None
    """The machine that the run was made on."""
    without_sam: bool = False
    """Whether it is an AutoSAM that started without SAM's weights."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers of a table or figure come from."""

    command: str
    date: str
    machine: str
    budget_minutes: float | None = None
    """Of training, the same for every run; None where each recipe's own epochs decide."""
    small: bool = False
    """Small variants of all models."""

    def note(self) -> str:
        budget = "" if self.budget_minutes is None else f"; {self.budget_minutes:g} minutes of training for each run"
        return f"Made by {self.command} on {self.date}, {self.machine}{budget}."


@dataclass(frozen=True, kw_only=True)
class Built:
    """A table, the table of its tests (None where nothing could be tested) and the tests themselves."""

    table: Table
    tests: Table | None
    comparisons: Mapping[tuple[str, Measure], tuple[Comparison, ...]]
    """By dataset and measure: one family each."""

    @property
    def tables(self) -> list[Table]:
        return [self.table] if self.tests is None else [self.table, self.tests]


_Scores = Mapping[tuple[str, str, Measure], list[dict[Key, float]]]
"""(model, dataset, measure) to the scores of each run, in the order of the seeds."""


def build_table(
    spec: PaperTable,
    runs: Sequence[RunScores],
    about: Provenance,
    *,
    datasets: Sequence[str] | None = None,
    unit: Unit = "case x organ",
    tolerance_mm: float = 1.0,
) -> Built:
    """A table of the paper, with "not run" where there is no run; runs of models that it lacks get rows at its end.

    Args:
        datasets: to show; default those of the paper. The paper's figures stand beside those that it has.
        unit: what the tests pair (`evaluation.statistics.compare`).
        tolerance_mm: of the NSD; every evaluation must have it.

    Raises:
        VolumeError: an evaluation cannot be read.
        UsageError: TOLERANCE, OTHER_CASES or OTHER_ORGANS: evaluations of one dataset that cannot be compared.
        ValueError: two runs of one model, dataset and seed.
    """
    shown = tuple(spec.datasets if datasets is None else datasets)
    runs = sorted((run for run in runs if run.dataset in shown), key=lambda run: run.seed)
    places = [(run.model, run.dataset, run.seed) for run in runs]
    if len(set(places)) < len(places):
        raise ValueError(f"runs: expected one for each model, dataset and seed, got {places}")
    spec = replace(spec, rows=_rows(spec, {run.model for run in runs}))
    evaluations = [read_json(Path(run.evaluation) / "scores.json") for run in runs]
    for dataset in shown:
        _demand_alike([(run, e) for run, e in zip(runs, evaluations, strict=True) if run.dataset == dataset])
    scores: dict[tuple[str, str, Measure], list[dict[Key, float]]] = {}
    for run, evaluation in zip(runs, evaluations, strict=True):
        for measure in spec.measures:
            place = scores.setdefault((run.model, run.dataset, measure), [])
            place.append(organ_scores(evaluation, measure, tolerance_mm))
    families: dict[tuple[str, Measure], tuple[Comparison, ...]] = {
        (d, m): _family(spec, scores, d, m, unit) for d in shown for m in spec.measures
    }
    columns, cells = _fact_columns(spec, runs)
    for dataset in shown:
        for add in (_run_columns, _paper_columns):
            more, entries = add(spec, dataset, scores, families)
            columns += more
            cells = [[*row, *entry] for row, entry in zip(cells, entries, strict=True)]
    notes = [*spec.notices, _score_rule(spec, tolerance_mm), *_test_notes(spec, families, unit),
             *_run_notes(spec, runs, evaluations), about.note()]
    table = Table(key=spec.key, title=spec.title, columns=tuple(columns), rows=tuple(map(tuple, cells)),
                  notes=tuple(notes))
    return Built(table=table, tests=tests_table(f"{spec.key}_tests", families), comparisons=families)


def _rows(spec: PaperTable, models: set[str]) -> tuple[Row, ...]:
    """The paper's, then those that it lacks and `models` have."""
    more = [row for row in spec.more_rows if row.key in models]
    known = {row.key for row in (*spec.rows, *more)}
    others = (Row(key=model, name=model, facts=("",) * len(spec.facts)) for model in sorted(models - known))
    return (*spec.rows, *more, *others)


def tests_table(key: str, families: Mapping[tuple[str, Measure], Sequence[Comparison]]) -> Table | None:
    """A table with a line for each comparison and the numbers behind its p; None without comparisons."""
    columns = (Column("dataset"), Column("measure"), Column("compared"), Column("difference, points", kind="run"),
               Column("p"), Column("p after Holm"), Column("tests in family"), Column("effect"), Column("pairs"),
               Column("equal"), Column("left out"), Column("smallest p possible after Holm"), Column("method"))
    rows = []
    for (dataset, measure), family in families.items():
        for c in family:
            d = c.difference
            low, high = (None if end is None else 100 * end for end in (d.low, d.high))
            words = (p_text(c.test.p), p_text(c.p), str(c.num_family), f"{c.test.effect:+.2f}",
                     f"{c.test.num_pairs} ({c.unit})", str(c.test.num_equal), str(c.num_left_out),
                     p_text(c.smallest_p), c.test.method)
            rows.append((
                Cell(text=DATASETS.get(dataset, dataset)), Cell(text=_NAMES[measure]),
                Cell(text=f"{c.first} minus {c.second}"),
                Cell(kind="run", value=100 * d.mean, signed=True, low=low, high=high),
                *(Cell(text=word) for word in words),
            ))
    if not rows:
        return None
    return Table(key=key, title="Tests", columns=columns, rows=tuple(rows), notes=(
        TEST_RULE, "Effect: matched-pairs rank-biserial correlation, -1 to 1. The interval of a difference is a 95 % "
        "bootstrap interval over cases. Holm's families are the lines of one dataset and measure."))


def _demand_alike(found: Sequence[tuple[RunScores, Evaluation]]) -> None:
    """Refuse evaluations of one dataset over different cases or organs."""
    for run, evaluation in found[1:]:
        first_run, first = found[0]
        ours, theirs = set(evaluation.organs.values()), set(first.organs.values())
        if ours != theirs:
            raise UsageError("OTHER_ORGANS", run.evaluation, f"expected the organs of {first_run.evaluation}, got "
                             f"others ({_few(ours ^ theirs)})", "evaluate both with the same labels")
        ours, theirs = ({case.name for case in e.cases} | set(e.missing) for e in (evaluation, first))
        if ours != theirs:
            raise UsageError("OTHER_CASES", run.evaluation, f"expected the cases of {first_run.evaluation}, got others "
                             f"({_few(ours ^ theirs)})", "evaluate both on the same test cases")


def _family(spec: PaperTable, scores: _Scores, dataset: str, measure: Measure, unit: Unit) -> tuple[Comparison, ...]:
    names = {row.key: row.name for row in spec.rows}
    repeated = {name for name in names.values() if list(names.values()).count(name) > 1}
    facts = {row.key: ", ".join(row.facts) for row in spec.rows}
    names = {key: f"{name} ({facts[key]})" if name in repeated else name for key, name in names.items()}
    reference = scores.get((spec.reference, dataset, measure))
    if not reference:
        return ()
    found = []
    for row in spec.rows:
        other = scores.get((row.key, dataset, measure))
        if row.key == spec.reference or not other:
            continue
        pair = (names[spec.reference], reference), (names[row.key], other)
        first, second = pair if spec.question == "reference" else pair[::-1]
        found.append(compare(first, second, measure=_NAMES[measure], unit=unit))
    return tuple(with_holm([c for c in found if c is not None]))


def _fact_columns(spec: PaperTable, runs: Sequence[RunScores]) -> tuple[list[Column], list[list[Cell]]]:
    columns, cells = [Column("model")], [[Cell(text=row.name)] for row in spec.rows]
    columns += [Column(fact) for fact in spec.facts]
    cells = [[*own, *(Cell(text=fact) for fact in row.facts)] for own, row in zip(cells, spec.rows, strict=True)]
    if spec.shows_tuned:
        columns += [Column("tuned, M", numbers=True), Column("tuned, M", "paper", kind="paper")]
        for own, row in zip(cells, spec.rows, strict=True):
            tuned = next((r.tuned_parameters for r in runs if r.model == row.key and r.tuned_parameters), None)
            ours = Cell(text=NOT_RUN) if tuned is None else Cell(value=tuned / 1e6)
            own += [ours, Cell(kind="paper", value=row.tuned_millions)]
    return columns, cells


def _run_columns(
    spec: PaperTable, dataset: str, scores: _Scores, families: Mapping[tuple[str, Measure], tuple[Comparison, ...]]
) -> tuple[list[Column], list[list[Cell]]]:
    columns = [Column(_NAMES[m], DATASETS.get(dataset, dataset), kind="run") for m in spec.measures]
    entries: list[list[Cell]] = [[] for _ in spec.rows]
    for measure in spec.measures:
        marks = _marks(spec, dataset, measure, scores, families[dataset, measure])
        cells = [_score_cell(scores.get((row.key, dataset, measure), []), marks.get(row.key, "")) for row in spec.rows]
        there = [float(cell.shown) for cell in cells if cell.value is not None]
        for entry, cell in zip(entries, cells, strict=True):
            best = cell.value is not None and len(there) > 1 and float(cell.shown) == max(there)
            entry.append(replace(cell, best=best))
    return columns, entries


def _paper_columns(spec: PaperTable, dataset: str, *_: object) -> tuple[list[Column], list[list[Cell]]]:
    if not any(dataset in row.scores for row in spec.rows):
        return [], [[] for _ in spec.rows]
    kind: Kind = "paper"
    columns = [Column(_NAMES[m], f"{DATASETS.get(dataset, dataset)}, paper", kind=kind) for m in spec.measures]
    return columns, [[Cell(kind=kind, value=getattr(row.scores.get(dataset), m, None)) for m in spec.measures]
                     for row in spec.rows]


def _score_cell(runs: Sequence[Mapping[Key, float]], mark: str) -> Cell:
    if not runs:
        return Cell(kind="run")
    mean = estimate(list(over_organs(over_seeds(runs)).values()))
    if mean is None:
        return Cell(kind="run", text="no case in common")
    low, high = (None if end is None else 100 * end for end in (mean.low, mean.high))
    each = [estimate(list(over_organs(run).values())) for run in runs]
    sd = spread([100 * e.mean for e in each if e is not None]).sd
    return Cell(kind="run", value=100 * mean.mean, low=low, high=high, sd=sd, mark=mark)


def _marks(
    spec: PaperTable, dataset: str, measure: Measure, scores: _Scores, family: Sequence[Comparison]
) -> dict[str, str]:
    """Row key to its mark; `_test_notes` says in words what they mean."""
    others = [row.key for row in spec.rows if row.key != spec.reference and scores.get((row.key, dataset, measure))]
    if len(others) != len(family):  # a row without a case in common with the reference
        return {}
    if spec.question == "rows":
        return {key: "*" if c.better(ALPHA) else "†" if c.worse(ALPHA) else ""
                for key, c in zip(others, family, strict=True)}
    marks = {key: "†" for key, c in zip(others, family, strict=True) if c.worse(ALPHA)}
    if len(family) == len(spec.rows) - 1 and family and all(c.better(ALPHA) for c in family):
        marks[spec.reference] = "*"
    return marks


def _score_rule(spec: PaperTable, tolerance_mm: float) -> str:
    nsd = f" NSD at {tolerance_mm:g} mm (the paper does not say its tolerance)." if "nsd" in spec.measures else ""
    return _SCORE_RULE + nsd


def _test_notes(
    spec: PaperTable, families: Mapping[tuple[str, Measure], tuple[Comparison, ...]], unit: Unit
) -> list[str]:
    tested = {place: family for place, family in families.items() if family}
    if not tested:
        return ["No test: it needs runs of the row that is compared and of another."]
    name = next(row.name for row in spec.rows if row.key == spec.reference)
    below = f"p < {ALPHA:g} after Holm over the rows of a column"
    notes = [f"*: better than {name}, †: worse than {name}; {below}."]
    if spec.question == "reference":
        notes = [f"*: better than every other row, given only where every row is run; †: better than {name}; {below}."]
    for (dataset, measure), family in tested.items():
        least = max(c.smallest_p for c in family)
        pairs = [c.test.num_pairs for c in family]
        ends = " to ".join(map(str, sorted({min(pairs), max(pairs)})))
        cases = counted(max(c.difference.num_cases for c in family), "case")
        note = (f"{DATASETS.get(dataset, dataset)} {_NAMES[measure]}: {ends} pairs ({unit}) of {cases}, smallest p "
                f"possible after Holm {p_text(least)}")
        notes.append(f"{note}{'' if least < ALPHA else ': no mark can be reached'}.")
    return [*notes, *([ORGAN_RULE] if unit == "case x organ" else [])]


def _run_notes(spec: PaperTable, runs: Sequence[RunScores], evaluations: Sequence[Evaluation]) -> list[str]:
    """Seeds, minutes and steps of each row; rows and cases that are missing."""
    notes = []
    for row in spec.rows:
        own = [run for run in runs if run.model == row.key]
        if not own:
            continue
        minutes = [run.minutes for run in own if run.minutes is not None]
        trained = f", trained {_range(minutes, '.1f')} minutes" if minutes else ""
        steps = [run.steps for run in own if run.steps is not None]
        published = f" of {PUBLISHED_STEPS[row.key]:,} published" if row.key in PUBLISHED_STEPS else ""
        trained += f", {_range(steps, ',')} steps{published}" if steps else ""
        scratch = "" if not any(run.without_sam for run in own) else (
            ", without SAM's weights: all of it trained from scratch, which is not the paper's method")
        seeds = sorted({run.seed for run in own})
        said = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        notes.append(f"{row.name}{_in_brackets(row.facts)}: {said}{trained}{scratch}.")
    machines = dict.fromkeys(run.machine for run in runs if run.machine)
    notes += [f"Runs made on: {'; '.join(machines)}."] if machines else []
    absent = [row.name + _in_brackets(row.facts) for row in spec.rows if row.key not in {run.model for run in runs}]
    notes += [f"Not run: {', '.join(absent)}."] if absent else []
    for run, evaluation in zip(runs, evaluations, strict=True):
        if evaluation.missing:
            zero = evaluation.summary().dice_missing_as_zero
            all_cases = len(evaluation.missing) + len(evaluation.cases)
            notes.append(f"{run.model} on {DATASETS.get(run.dataset, run.dataset)}, seed {run.seed}: "
                         f"{len(evaluation.missing)} of {counted(all_cases, 'case')} without a prediction, in no mean"
                         f"{'' if zero is None else f' (mDice {100 * zero:.2f} if counted as 0)'}.")
    return notes


def _range(numbers: Sequence[float], form: str) -> str:
    """The smallest and the largest, or the one that both are."""
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(numbers), max(numbers))))


def _in_brackets(facts: Sequence[str]) -> str:
    said = [fact for fact in facts if fact]
    return f" ({', '.join(said)})" if said else ""


def _few(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
