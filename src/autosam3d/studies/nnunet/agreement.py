"""nnU-Net's own metrics file beside our evaluation of the same predictions: the same Dice in each organ of each case.

What differs is a rule, not a number. An organ that truth and prediction lack is NaN in nnU-Net's file and left out of
ours. An organ that only the prediction has is Dice 0 there, in the mean of the organ; here it is a false positive with
its volume, outside the mean of Dice. An organ that only the truth has is 0 in both. nnU-Net's mean is taken over the
cases of each organ and then over the organs, ours over the organs of each case and then over the cases.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosam3d.errors import VolumeError
from autosam3d.evaluation.evaluate import case_name
from autosam3d.evaluation.scores import Evaluation, read_text_capped

BOUND = 1e-6


@dataclass(frozen=True)
class Agreement:
    """What a comparison of the two found."""

    compared: int
    """Pairs of case and organ with a Dice on both sides."""
    largest: float
    """The largest difference of Dice among them; 0 if there is none."""
    false_positives: int
    """Pairs that nnU-Net counts as Dice 0 and we as a false positive."""
    absent: int
    """Pairs that nnU-Net has as NaN and we leave out."""
    faults: tuple[str, ...]
    """Pairs that differ by more than `BOUND`, or that one side has and no rule explains."""
    nnunet_mean: float
    """nnU-Net's foreground mean of Dice; NaN where an organ is in no case."""

    @property
    def agrees(self) -> bool:
        return not self.faults and self.compared > 0

    def __str__(self) -> str:
        words = [f"{self.compared} Dice values of nnU-Net's evaluator and ours differ by {self.largest:.1e} at most"]
        if self.false_positives:
            words.append(f"{self.false_positives} false positives are Dice 0 there and in no mean here")
        if self.absent:
            words.append(f"{self.absent} absent organs are NaN there and left out here")
        if self.faults:
            words.append(f"{len(self.faults)} do not agree: {'; '.join(self.faults[:3])}")
        return ", ".join(words)


def read_summary(path: str | Path) -> tuple[dict[tuple[str, int], float], float]:
    """((case, label) to Dice with NaN for absent organs, foreground mean) of nnU-Net's ``summary.json``.

    Raises:
        VolumeError: NNUNET_SUMMARY, where the file is not one.
    """
    path = Path(path)
    try:
        tree = json.loads(read_text_capped(path))
        table = {(case_name(row["prediction_file"]), int(label)): _number(metrics["Dice"])
                 for row in tree["metric_per_case"] for label, metrics in row["metrics"].items()}
        return table, _number(tree["foreground_mean"]["Dice"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VolumeError("NNUNET_SUMMARY", path, f"expected the metrics that nnUNetv2_evaluate_folder writes, got "
                          f"something else ({error})", "evaluate again") from None


def compare(summary: str | Path, evaluation: Evaluation) -> Agreement:
    """nnU-Net's file against ours of the same predictions."""
    theirs, mean = read_summary(summary)
    ours = {(case.name, score.label): score for case in evaluation.cases for score in case.scores}
    differences, faults, false_positives, absent = [], [], 0, 0
    for key in sorted(theirs.keys() | ours.keys()):
        their, score = theirs.get(key), ours.get(key)
        where = f"{key[0]}, {evaluation.organs.get(key[1], f'label {key[1]}')}"
        if their is None:
            faults.append(f"{where}: not in nnU-Net's file")
        elif score is None:
            absent += math.isnan(their)
            faults += [] if math.isnan(their) else [f"{where}: {their:.6f} there, not scored here"]
        elif score.dice is None:
            false_positives += their == 0
            faults += [] if their == 0 else [f"{where}: {their:.6f} there, a false positive here"]
        else:
            difference = abs(their - score.dice)
            differences.append(difference)
            if not difference <= BOUND:  # NaN is a fault, too
                faults.append(f"{where}: {their:.6f} there, {score.dice:.6f} here")
    return Agreement(len(differences), max(differences, default=0.0), false_positives, absent, tuple(faults), mean)


def _number(value: Any) -> float:
    """A Dice; nnU-Net's NaN is null in files of some versions."""
    return math.nan if value is None else float(value)
