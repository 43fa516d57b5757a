"""The scores of many cases: means with intervals, and the CSV and JSON files that keep them."""

from __future__ import annotations

import csv
import io as text_io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy

from autosam3d.axes import Size
from autosam3d.errors import UsageError, VolumeError
from autosam3d.evaluation.metrics import ABSENT_RULE, HD95_RULE, OrganScore
from autosam3d.evaluation.statistics import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, Estimate, estimate
from autosam3d.io.files import decoded, write_text_atomic
from autosam3d.version import __version__

MEAN_RULE = (
    "A headline mean is taken over the organs of each case first and over the cases then, as in the paper; an organ's "
    "mean is taken over the cases that have it. Intervals are 95 % percentile bootstrap intervals of the mean over "
    "cases. Cases without a prediction are in no mean; they are counted and listed."
)
FORMAT, FORMAT_VERSION = "autosam3d-evaluation", 1
_MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case: its scores and where it came from."""

    name: str
    scores: tuple[OrganScore, ...]
    shape: Size
    """(z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x)."""
    prediction_path: Path
    truth_path: Path
    ct_path: Path | None = None
    not_annotated: tuple[str, ...] = ()
    """Organs whose truth is unknown in this case: left out."""
    warnings: tuple[str, ...] = ()

    @property
    def dice(self) -> float:
        """Mean over the organs of the truth, missed ones with 0; NaN if there is none."""
        return _mean([s.dice for s in self.scores if s.dice is not None])

    def nsd(self, tolerance: int = 0) -> float:
        """As `dice`, at the tolerance of that position."""
        return _mean([s.nsd[tolerance] for s in self.scores if s.nsd])

    @property
    def hd95_mm(self) -> float:
        """Mean over the organs that truth and prediction have; NaN if there is none."""
        return _mean([s.hd95_mm for s in self.scores if s.hd95_mm is not None and math.isfinite(s.hd95_mm)])

    def with_status(self, status: str) -> list[OrganScore]:
        """The scores of organs that are "scored", "missed" or "false_positive"."""
        return [s for s in self.scores if s.status == status]


@dataclass(frozen=True, kw_only=True)
class OrganSummary:
    """One organ over the cases. None where no case has a value."""

    label: int
    organ: str
    dice: Estimate | None
    nsd: tuple[Estimate | None, ...]
    hd95_mm: Estimate | None
    volume_error_ml: Estimate | None
    """Mean of prediction minus truth over the cases whose truth has the organ, with sign."""
    num_in_truth: int
    num_missed: int
    num_false_positive: int
    false_positive_ml: float
    """Sum over the cases."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The means of an evaluation; `MEAN_RULE` and `ABSENT_RULE` say over what."""

    dice: Estimate | None
    nsd: tuple[Estimate | None, ...]
    hd95_mm: Estimate | None
    dice_missing_as_zero: float | None
    """Mean Dice if each case without a prediction counts as 0."""
    organs: tuple[OrganSummary, ...]
    tolerances_mm: tuple[float, ...]
    num_cases: int
    num_missing: int
    num_missed_organs: int
    num_false_positives: int
    false_positive_ml: float

    def __str__(self) -> str:
        parts = [f"Dice {self.dice:.4f}" if self.dice else "Dice not defined: no organ in any truth"]
        parts += [f"NSD at {t:g} mm {e:.4f}" for t, e in zip(self.tolerances_mm, self.nsd, strict=True) if e]
        parts += [f"HD95 in mm {self.hd95_mm:.2f}"] if self.hd95_mm else []
        lines = [f"{counted(self.num_cases, 'case')}: " + ", ".join(parts)]
        if self.num_missed_organs:
            lines.append(f"{counted(self.num_missed_organs, 'organ')} missed (Dice 0, not in the mean of HD95)")
        if self.num_false_positives:
            lines.append(f"{counted(self.num_false_positives, 'organ')} predicted that the truth lacks, "
                         f"{self.false_positive_ml:.1f} ml in all (in no mean)")
        if self.num_missing and self.dice_missing_as_zero is not None:
            lines.append(f"{counted(self.num_missing, 'case')} without a prediction (in no mean; Dice "
                         f"{self.dice_missing_as_zero:.4f} if counted as 0)")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluation.evaluate.evaluate_folder` found.

    Attributes:
        cases: sorted by name.
        organs: label to name, all that were looked for.
        tolerances_mm: of the NSD; the first one is the headline.
        predictions: the folder or file that was scored.
        truth: the folder or file that it was scored against.
        missing: cases of the truth without a prediction, by name.
        extra: predictions without a truth, by name.
        warnings: what was odd about the two folders, one sentence each.
    """

    cases: tuple[CaseResult, ...]
    organs: dict[int, str]
    tolerances_mm: tuple[float, ...]
    predictions: Path
    truth: Path
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> Summary:
        """Means with 95 % intervals, over the organs of each case and over the cases; see `MEAN_RULE`."""
        return self._summary

    @cached_property
    def _summary(self) -> Summary:
        false_positives = [s for case in self.cases for s in case.with_status("false_positive")]
        dices = [case.dice for case in self.cases if not math.isnan(case.dice)]
        return Summary(
            dice=estimate(dices),
            nsd=tuple(estimate([case.nsd(i) for case in self.cases]) for i in range(len(self.tolerances_mm))),
            hd95_mm=estimate([case.hd95_mm for case in self.cases]),
            dice_missing_as_zero=_mean([*dices, *[0.0] * len(self.missing)]) if dices else None,
            organs=tuple(self._of_organ(label, organ) for label, organ in self.organs.items()),
            tolerances_mm=self.tolerances_mm, num_cases=len(self.cases), num_missing=len(self.missing),
            num_missed_organs=sum(len(case.with_status("missed")) for case in self.cases),
            num_false_positives=len(false_positives),
            false_positive_ml=sum(s.prediction_ml for s in false_positives),
        )

    def scores_of(self, label: int) -> list[OrganScore]:
        """The scores of one organ in the order of the cases."""
        return [score for case in self.cases for score in case.scores if score.label == label]

    def _of_organ(self, label: int, organ: str) -> OrganSummary:
        scores = self.scores_of(label)
        there = [s for s in scores if s.status != "false_positive"]
        false = [s for s in scores if s.status == "false_positive"]
        return OrganSummary(
            label=label, organ=organ,
            dice=estimate([s.dice for s in there if s.dice is not None]),
            nsd=tuple(estimate([s.nsd[i] for s in there]) for i in range(len(self.tolerances_mm))),
            hd95_mm=estimate([s.hd95_mm for s in there if s.hd95_mm is not None]),
            volume_error_ml=estimate([s.volume_error_ml for s in there]),
            num_in_truth=len(there), num_missed=sum(s.status == "missed" for s in there),
            num_false_positive=len(false), false_positive_ml=sum(s.prediction_ml for s in false),
        )


def organ_scores(evaluation: Evaluation, measure: Literal["dice", "nsd"], tolerance_mm: float = 1.0
                 ) -> dict[tuple[str, str], float]:
    """One measure by (case, organ), for the paired tests of `statistics`: the organs of the truth, missed ones with 0.

    Raises:
        UsageError: TOLERANCE, where the evaluation has no NSD at `tolerance_mm`.
    """
    there = {(case.name, s.organ): s for case in evaluation.cases for s in case.scores if s.dice is not None}
    if measure == "dice":
        return {key: s.dice for key, s in there.items() if s.dice is not None}
    if tolerance_mm not in evaluation.tolerances_mm:
        known = ", ".join(f"{t:g}" for t in evaluation.tolerances_mm) or "none"
        raise UsageError("TOLERANCE", evaluation.predictions, f"expected an evaluation with NSD at {tolerance_mm:g} "
                         f"mm, got one at {known}", f"evaluate again with --tolerance {tolerance_mm:g}")
    at = evaluation.tolerances_mm.index(tolerance_mm)
    return {key: s.nsd[at] for key, s in there.items()}


def counted(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_csv(evaluation: Evaluation, path: str | Path) -> None:
    """`csv_text` into a file, atomically."""
    write_text_atomic(path, csv_text(evaluation))


def csv_text(evaluation: Evaluation) -> str:
    """One row for each organ of each case; a value that is not defined is empty, a missed HD95 ``inf``."""
    buffer = text_io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    tolerances = [f"nsd_{t:g}mm" for t in evaluation.tolerances_mm]
    writer.writerow(["case", "organ", "label", "status", "dice", *tolerances, "hd95_mm", "truth_ml", "prediction_ml",
                     "volume_error_ml", "volume_error_percent"])
    for case in evaluation.cases:
        for s in case.scores:
            nsd = s.nsd or (None,) * len(tolerances)
            volumes = s.truth_ml, s.prediction_ml, s.volume_error_ml, s.volume_error_percent
            numbers = ["" if v is None else f"{v:.6f}" for v in (s.dice, *nsd, s.hd95_mm, *volumes)]
            writer.writerow([case.name, s.organ, s.label, s.status, *numbers])
    return buffer.getvalue()


def write_json(evaluation: Evaluation, path: str | Path) -> None:
    """`json_text` into a file, atomically."""
    write_text_atomic(path, json_text(evaluation))


def json_text(evaluation: Evaluation) -> str:
    """Everything, with settings, rules and versions; for `read_json`. An infinite HD95 is null."""
    summary = evaluation.summary()
    tree = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"autosam3d": __version__, "python": platform.python_version(), "numpy": np.__version__,
                     "scipy": scipy.__version__},
        "settings": {
            "predictions": str(evaluation.predictions), "truth": str(evaluation.truth),
            "tolerances_mm": list(evaluation.tolerances_mm), "organs": evaluation.organs,
            "bootstrap": {"level": 0.95, "resamples": BOOTSTRAP_RESAMPLES, "seed": BOOTSTRAP_SEED},
        },
        "rules": {"absent_organs": ABSENT_RULE, "means": MEAN_RULE, "hd95": HD95_RULE},
        "summary": asdict(summary),
        "missing": evaluation.missing,
        "extra": evaluation.extra,
        "warnings": evaluation.warnings,
        "cases": [_case_dict(case) for case in evaluation.cases],
    }
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Evaluation:
    """The evaluation that `write_json` wrote.

    Raises:
        VolumeError: EVALUATION, where the file is not one.
    """
    path = Path(path)
    try:
        tree = json.loads(read_text_capped(path))
        if (tree["format"], tree["version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is {tree['format']!r} version {tree['version']!r}")
        settings = tree["settings"]
        return Evaluation(
            cases=tuple(_case_from(case) for case in tree["cases"]),
            organs={int(label): str(organ) for label, organ in settings["organs"].items()},
            tolerances_mm=tuple(settings["tolerances_mm"]), predictions=Path(settings["predictions"]),
            truth=Path(settings["truth"]), missing=tuple(tree["missing"]), extra=tuple(tree["extra"]),
            warnings=tuple(tree["warnings"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VolumeError("EVALUATION", path, f"expected scores in the format {FORMAT} {FORMAT_VERSION}, got something "
                          f"else ({error})", "name a scores.json that autosam3d evaluate wrote") from None


def read_text_capped(path: Path) -> str:
    """Text of a file that is small enough to be read whole.

    Raises:
        VolumeError: UNREADABLE or TOO_LARGE.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise VolumeError("EVALUATION", path, "expected at most 256 MiB of JSON, got more", "check the file")
        return decoded(path.read_bytes())
    except OSError as error:
        raise VolumeError("UNREADABLE", path, f"cannot be read ({error.strerror})", "check the path") from None


def _case_dict(case: CaseResult) -> dict[str, Any]:
    mean = {"dice": case.dice, "nsd": [case.nsd(i) for i in range(_num_tolerances(case))], "hd95_mm": case.hd95_mm}
    tree: dict[str, Any] = asdict(case) | {"mean": mean}
    for key in ("prediction_path", "truth_path", "ct_path"):
        tree[key] = str(tree[key]) if tree[key] is not None else None
    for score, row in zip(case.scores, tree["scores"], strict=True):
        row |= {"volume_error_ml": score.volume_error_ml, "volume_error_percent": score.volume_error_percent}
    return _finite(tree)


def _num_tolerances(case: CaseResult) -> int:
    return max((len(s.nsd) for s in case.scores), default=0)


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _case_from(tree: Mapping[str, Any]) -> CaseResult:
    scores = []
    for row in tree["scores"]:
        fields = {key: row[key] for key in OrganScore.__dataclass_fields__}
        fields["nsd"] = tuple(fields["nsd"])
        if fields["status"] == "missed":
            fields["hd95_mm"] = math.inf
        scores.append(OrganScore(**fields))
    z, y, x = tree["shape"]
    mm_z, mm_y, mm_x = tree["spacing_mm"]
    return CaseResult(
        name=tree["name"], scores=tuple(scores), shape=(z, y, x), spacing_mm=(mm_z, mm_y, mm_x),
        prediction_path=Path(tree["prediction_path"]), truth_path=Path(tree["truth_path"]),
        ct_path=Path(tree["ct_path"]) if tree["ct_path"] is not None else None,
        not_annotated=tuple(tree["not_annotated"]), warnings=tuple(tree["warnings"]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
