"""Evaluations of several models on the same cases as one table, and how they differ case by case.

    python benchmarks/compare_runs.py students "tiny, KD=eval/tiny_kd" "tiny=eval/tiny_own"

Each argument after the first is NAME=FOLDER of an `autosam3d evaluate`. Writes results/NAME.md and .csv (Dice per
case). Differences are to the model named next, paired by case, as `autosam3d.evaluation.statistics` tests them.
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

from autosam3d.evaluation.scores import organ_scores, read_json
from autosam3d.evaluation.statistics import Estimate, Key, compare, estimate, over_organs, p_text, with_holm

RESULTS = Path(__file__).parent / "results"


def main(name: str, *runs: str) -> None:
    folders = {run.partition("=")[0]: Path(run.partition("=")[2]) for run in runs}
    evaluations = {run: read_json(folder / "scores.json") for run, folder in folders.items()}
    scores = {run: organ_scores(evaluation, "dice") for run, evaluation in evaluations.items()}
    dice = {run: over_organs(values) for run, values in scores.items()}
    cases = sorted(set.intersection(*(set(d) for d in dice.values())))
    organs = [organ.organ for organ in next(iter(evaluations.values())).summary().organs]
    lines = [f"| model | Dice (95 % CI), n = {len(cases)} | " + " | ".join(organs) + " |",
             "|---|---|" + "---|" * len(organs)]
    for run, evaluation in evaluations.items():
        mean = estimate([dice[run][case] for case in cases])
        means = {organ.organ: organ.dice for organ in evaluation.summary().organs}
        cells = [_mean(means.get(organ)) for organ in organs]
        lines.append(f"| {run} | {mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f}) | " + " | ".join(cells) + " |")
    lines += _differences({run: _only(values, cases) for run, values in scores.items()})
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *dice])
        writer.writerows([case, *(f"{dice[run][case]:.6f}" for run in dice)] for case in cases)
    print(text, end="")


def _only(scores: dict[Key, float], cases: list[str]) -> dict[Key, float]:
    return {key: value for key, value in scores.items() if key[0] in cases}


def _mean(value: Estimate | None) -> str:
    return f"{value.mean:.3f}" if value else "-"


def _differences(scores: dict[str, dict[Key, float]]) -> list[str]:
    found = [compare((a, [scores[a]]), (b, [scores[b]]), measure="Dice") for a, b in itertools.pairwise(scores)]
    family = with_holm([c for c in found if c is not None])
    if not family:
        return []
    lines = ["", f"| difference, paired by case (n = {family[0].test.num_pairs}) | Dice (95 % CI) | Wilcoxon p | "
             f"p after Holm over {len(family)} | effect |", "|---|---|---|---|---|"]
    for c in family:
        d = c.difference
        lines.append(f"| {c.first} minus {c.second} | {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}) | "
                     f"{p_text(c.test.p)} | {p_text(c.p)} | {c.test.effect:+.2f} |")
    return [*lines, "", f"Exact two-sided signed-rank test; smallest p possible {p_text(family[0].test.smallest_p)}, "
            f"after Holm {p_text(family[0].smallest_p)}. Effect: matched-pairs rank-biserial correlation."]


if __name__ == "__main__":
    main(*sys.argv[1:])
