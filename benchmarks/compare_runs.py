"""Evaluations of several models on the same cases as one table, and how they differ case by case.

    python benchmarks/compare_runs.py students "tiny, KD=eval/tiny_kd" "tiny=eval/tiny_own"

Each argument after the first is NAME=FOLDER of an `autosam3d evaluate`. Writes results/NAME.md and .csv (Dice per
case). Differences are to the model named next, paired by case, as `autosam3d.evaluation.statistics` tests them.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from autosam3d.errors import AutoSam3dError, UsageError
from autosam3d.evaluation.scores import Evaluation, organ_scores, read_json
from autosam3d.evaluation.statistics import Estimate, Key, compare, estimate, over_organs, p_text, with_holm

RESULTS = Path(__file__).parent / "results"


def main(name: str, *runs: str) -> None:
    evaluations = _evaluations(runs)
    scores = {run: organ_scores(evaluation, "dice") for run, evaluation in evaluations.items()}
    dice = {run: over_organs(values) for run, values in scores.items()}
    cases = sorted(set.intersection(*(set(d) for d in dice.values())))
    if not cases:
        raise UsageError("USAGE", name, "expected evaluations with a case in common, got none",
                         "evaluate the models on the same cases")
    common = {run: _only(values, cases) for run, values in scores.items()}
    organs = list(dict.fromkeys(organ for evaluation in evaluations.values() for organ in evaluation.organs.values()))
    lines = [f"| model | Dice (95 % CI), n = {len(cases)} | " + " | ".join(organs) + " |",
             "|---|---|" + "---|" * len(organs)]
    for run in evaluations:
        cells = [_mean([value for (_, of), value in common[run].items() if of == organ]) for organ in organs]
        lines.append(f"| {run} | {_interval(estimate([dice[run][case] for case in cases]), '.4f')} | "
                     + " | ".join(cells) + " |")
    left_out = {run: len(values) - len(cases) for run, values in dice.items() if len(values) > len(cases)}
    if left_out:
        told = ", ".join(f"{count} of {run}" for run, count in left_out.items())
        lines += ["", f"Cases that not all models have are left out: {told}."]
    lines += _differences(common)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *dice])
        writer.writerows([case, *(f"{dice[run][case]:.6f}" for run in dice)] for case in cases)
    print(text, end="")


def _evaluations(runs: Sequence[str]) -> dict[str, Evaluation]:
    """By name, in the order given.

    Raises:
        UsageError: USAGE, no NAME=FOLDER, or two of one name.
        VolumeError: UNREADABLE or EVALUATION.
    """
    found: dict[str, Evaluation] = {}
    for run in runs:
        label, equals, folder = run.rpartition("=")
        if not label or not equals or not folder:
            raise UsageError("USAGE", run, "expected NAME=FOLDER", "name each evaluation and its folder")
        if label in found:
            raise UsageError("USAGE", run, f"expected a name of its own for each evaluation, got {label} twice",
                             "rename one of them")
        found[label] = read_json(Path(folder) / "scores.json")
    if not found:
        raise UsageError("USAGE", "compare_runs", "expected NAME A=FOLDER B=FOLDER, got no folder", "name some")
    return found


def _only(scores: dict[Key, float], cases: list[str]) -> dict[Key, float]:
    return {key: value for key, value in scores.items() if key[0] in cases}


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _interval(value: Estimate | None, form: str) -> str:
    """A mean with its interval, which one case alone does not have."""
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:{form}} (one case)"
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def _differences(scores: dict[str, dict[Key, float]]) -> list[str]:
    found = [compare((a, [scores[a]]), (b, [scores[b]]), measure="Dice") for a, b in itertools.pairwise(scores)]
    family = with_holm([c for c in found if c is not None])
    if not family:
        return []
    lines = ["", f"| difference, paired by case (n = {family[0].test.num_pairs}) | Dice (95 % CI) | Wilcoxon p | "
             f"p after Holm over {len(family)} | effect |", "|---|---|---|---|---|"]
    for c in family:
        lines.append(f"| {c.first} minus {c.second} | {_interval(c.difference, '+.4f')} | "
                     f"{p_text(c.test.p)} | {p_text(c.p)} | {c.test.effect:+.2f} |")
    return [*lines, "", f"Exact two-sided signed-rank test; smallest p possible {p_text(family[0].test.smallest_p)}, "
            f"after Holm {p_text(family[0].smallest_p)}. Effect: matched-pairs rank-biserial correlation."]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or [""])
    except AutoSam3dError as error:
        print(f"error[{error.code}] {error}", file=sys.stderr)
        sys.exit(error.exit_code)
