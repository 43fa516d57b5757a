"""Dice, normalised surface Dice (NSD), 95 % Hausdorff distance (HD95) and volume error, per organ of one case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from autosam3d.evaluation.surfaces import surface_distances
from autosam3d.labels import LabelMap

ABSENT_RULE = (
    "An organ absent from truth and prediction is left out. An organ absent from the truth but predicted is a false "
    "positive: counted with its volume in ml, outside the means of Dice, NSD and HD95. An organ in the truth but not "
    "predicted is missed: Dice 0, NSD 0, HD95 infinite, counted as missed and left out of the HD95 mean."
)
HD95_RULE = (
    "HD95 is the larger of the two directed 95th percentiles of surface distance, each weighted by surface area "
    "(as in the surface-distance package; MONAI weights all border voxels alike and measures between voxel centres)."
)

Status = Literal["scored", "missed", "false_positive"]


@dataclass(frozen=True, kw_only=True)
class OrganScore:
    """The scores of one organ in one case; see `ABSENT_RULE` for organs that one side lacks."""

    label: int
    organ: str
    status: Status
    dice: float | None
    """0 to 1; None for a false positive."""
    nsd: tuple[float, ...]
    """0 to 1, one for each of the case's tolerances, in their order; empty for a false positive."""
    hd95_mm: float | None
    """``inf`` for a missed organ, None for a false positive."""
    truth_ml: float
    prediction_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Prediction minus truth."""
        return self.prediction_ml - self.truth_ml

    @property
    def volume_error_percent(self) -> float | None:
        """Prediction minus truth, in percent of the truth; None where the truth is empty."""
        return 100 * self.volume_error_ml / self.truth_ml if self.truth_ml else None


def evaluate_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    labels: LabelMap | Mapping[int, str],
    tolerances_mm: Sequence[float] = (1.0,),
) -> list[OrganScore]:
    """Scores of every organ of `labels` that the truth or the prediction holds, in the order of `labels`.

    Organs absent from both are left out of the list; `ABSENT_RULE` says how the others are treated.

    Args:
        prediction: unsigned integer labels [z, y, x]; 0 is background. Values that `labels` lacks are ignored.
        truth: the same, on the same grid.
        spacing_mm: (z, y, x).
        tolerances_mm: of the NSD, any number of them, each 0 or more.

    Raises:
        ValueError: arrays of different shapes or without integers, a spacing or a tolerance that cannot be.
    """
    _check_pair(prediction, truth, spacing_mm, tolerances_mm)
    organs = labels.by_index if isinstance(labels, LabelMap) else labels
    truth_boxes, prediction_boxes = _boxes(truth), _boxes(prediction)
    scores = []
    for label, organ in organs.items():
        box = _union(truth_boxes.get(label), prediction_boxes.get(label))
        if box is not None:
            masks = prediction[box] == label, truth[box] == label
            scores.append(_score(label, organ, *masks, spacing_mm, tolerances_mm))
    return scores


def dice_per_label(prediction: np.ndarray, truth: np.ndarray, num_outputs: int) -> np.ndarray:
    """float64 [num_outputs - 1]: Dice of labels 1, 2, ...; NaN where the truth lacks the label (`ABSENT_RULE`).

    Quick and without surfaces, for validation while training. Both arrays hold integers below `num_outputs`.

    *Source*: Dice 1945, 2 |A and B| / (|A| + |B|).
    """
    sizes = np.bincount(prediction.ravel(), minlength=num_outputs)
    truth_sizes = np.bincount(truth.ravel(), minlength=num_outputs)
    both = np.bincount(truth[prediction == truth], minlength=num_outputs)
    with np.errstate(invalid="ignore"):
        table = 2 * both / (sizes + truth_sizes)
    return np.where(truth_sizes > 0, table, np.nan)[1:]


def _check_pair(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], tolerances_mm: Sequence[float]
) -> None:
    if prediction.ndim != 3 or prediction.shape != truth.shape:
        raise ValueError(f"prediction: expected [z, y, x] of the truth's shape {truth.shape}, got {prediction.shape}")
    for name, array in (("prediction", prediction), ("truth", truth)):
        if array.dtype.kind != "u" and array.dtype.kind != "i":
            raise ValueError(f"{name}: expected integer labels, got {array.dtype}")
    if len(spacing_mm) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise ValueError(f"spacing_mm: expected three positive numbers (z, y, x), got {spacing_mm}")
    if not all(math.isfinite(t) and t >= 0 for t in tolerances_mm):
        raise ValueError(f"tolerances_mm: expected numbers of 0 or more, got {tolerances_mm}")


def _score(
    label: int, organ: str, prediction: np.ndarray, truth: np.ndarray,
    spacing_mm: Sequence[float], tolerances_mm: Sequence[float],
) -> OrganScore:
    voxel_ml = math.prod(spacing_mm) / 1000
    sizes = int(np.count_nonzero(truth)), int(np.count_nonzero(prediction))
    truth_ml, prediction_ml = sizes[0] * voxel_ml, sizes[1] * voxel_ml
    status: Status = "scored"
    overlap: float | None
    nsd: tuple[float, ...]
    hd95_mm: float | None
    if not sizes[0]:
        status, overlap, nsd, hd95_mm = "false_positive", None, (), None
    elif not sizes[1]:
        status, overlap, nsd, hd95_mm = "missed", 0.0, (0.0,) * len(tolerances_mm), math.inf
    else:
        overlap = 2 * int(np.count_nonzero(prediction & truth)) / sum(sizes)
        if overlap == 1:
            nsd, hd95_mm = (1.0,) * len(tolerances_mm), 0.0
        else:
            surfaces = surface_distances(prediction, truth, spacing_mm)
            nsd, hd95_mm = tuple(surfaces.nsd(t) for t in tolerances_mm), surfaces.hausdorff_mm(95)
    return OrganScore(
        label=label, organ=organ, status=status, dice=overlap, nsd=nsd, hd95_mm=hd95_mm,
        truth_ml=truth_ml, prediction_ml=prediction_ml,
    )


def _boxes(labels: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Bounding box of every label present, in one pass over the part of the array that is not background."""
    whole = _foreground_box(labels)
    if whole is None:
        return {}
    found = ndimage.find_objects(labels[whole])
    return {
        label: tuple(slice(b.start + w.start, b.stop + w.start) for b, w in zip(box, whole, strict=True))
        for label, box in enumerate(found, start=1) if box is not None
    }


def _foreground_box(labels: np.ndarray) -> tuple[slice, ...] | None:
    rows = labels.any(axis=2)
    spans = [np.flatnonzero(line) for line in (np.any(rows, axis=1), np.any(rows, axis=0))]
    if not len(spans[0]):
        return None
    z, y = (slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    across = np.flatnonzero(labels[z, y].any(axis=(0, 1)))
    return z, y, slice(int(across[0]), int(across[-1]) + 1)


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    if a is None or b is None:
        return a or b
    return tuple(slice(min(p.start, q.start), max(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
