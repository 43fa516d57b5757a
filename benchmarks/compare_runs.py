"""Evaluations of several models on the same cases as one table, and how they differ case by case.

    python benchmarks/compare_runs.py students "tiny, KD=eval/tiny_kd" "tiny=eval/tiny_own"

Each argument after the first is NAME=FOLDER of an `autosam3d evaluate`. Writes results/NAME.md and .csv (Dice per
case). Differences are to the model named next, paired by case: mean with 95 % bootstrap interval, and the exact
two-sided Wilcoxon signed-rank test, whose smallest p with n cases is 2 / 2^n.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

RESULTS = Path(__file__).parent / "results"


def case_dice(folder: Path) -> dict[str, float]:
    """Mean Dice over the organs of each case, from scores.csv."""
    values: dict[str, list[float]] = {}
    with (folder / "scores.csv").open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if row["dice"]:
                values.setdefault(row["case"], []).append(float(row["dice"]))
    return {case: float(np.mean(dice)) for case, dice in values.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def main(name: str, *runs: str) -> None:
    folders = {run.partition("=")[0]: Path(run.partition("=")[2]) for run in runs}
    dice = {run: case_dice(folder) for run, folder in folders.items()}
    cases = sorted(set.intersection(*(set(d) for d in dice.values())))
    summaries: dict[str, Any] = {run: json.loads((f / "scores.json").read_text())["summary"]
                                 for run, f in folders.items()}
    organs = [organ["organ"] for organ in next(iter(summaries.values()))["organs"]]
    lines = [f"| model | Dice (95 % CI), n = {len(cases)} | " + " | ".join(organs) + " |",
             "|---|---|" + "---|" * len(organs)]
    for run, values in dice.items():
        own = np.array([values[case] for case in cases])
        low, high = interval(own)
        cells = [f"{organ['dice']['mean']:.3f}" if organ["dice"] else "-" for organ in summaries[run]["organs"]]
        lines.append(f"| {run} | {own.mean():.4f} ({low:.4f} to {high:.4f}) | " + " | ".join(cells) + " |")
    lines += ["", "| difference, paired by case | Dice (95 % CI) | Wilcoxon p |", "|---|---|---|"]
    names = list(dice)
    for first, second in itertools.pairwise(names):
        apart = np.array([dice[first][case] - dice[second][case] for case in cases])
        low, high = interval(apart)
        p = float(wilcoxon(apart, method="exact").pvalue) if apart.any() else 1.0
        lines.append(f"| {first} minus {second} | {apart.mean():+.4f} ({low:+.4f} to {high:+.4f}) | {p:.4f} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *names])
        writer.writerows([case, *(f"{dice[run][case]:.6f}" for run in names)] for case in cases)
    print(text, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
