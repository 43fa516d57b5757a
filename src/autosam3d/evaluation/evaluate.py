"""A folder of predicted segmentations against a folder of true ones: pairs, grids and organ names, then scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from autosam3d.data.folder import plain_name as plain
from autosam3d.errors import VolumeError
from autosam3d.evaluation.found import case_name, found_pairs, labelled_scans, masks_in
from autosam3d.evaluation.metrics import evaluate_case
from autosam3d.evaluation.organ_masks import read_labels
from autosam3d.evaluation.scores import CaseResult, Evaluation, counted, read_text_capped, write_csv, write_json
from autosam3d.io import ReadOptions
from autosam3d.io.endings import image_stem
from autosam3d.io.grid import demand_same_grid
from autosam3d.io.options import DEFAULTS
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation

__all__ = ["Evaluation", "case_name", "evaluate_folder", "read_pair", "write_csv", "write_json"]

log = logging.getLogger(__name__)

# TotalSegmentator has 117; a CT or a picture has thousands.
_MAX_UNNAMED = 256
_EMPTY_TRUTH = "truth: all background"


def evaluate_folder(
    predictions: str | Path,
    truth: str | Path,
    *,
    labels: LabelMap | Mapping[int, str] | None = None,
    tolerances_mm: Sequence[float] = (1.0,),
    ct_folder: str | Path | None = None,
    read_options: ReadOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a folder of predictions, or one file, against the truth.

    Cases pair by name, at any depth and in the layouts of `found.found_pairs`: ``CASE.nii.gz``, ``CASE/labels.nii.gz``,
    or a mask an organ, ``CASE/segmentations/liver.nii.gz``. Organs are `labels`; else those that the
    predictions name; else those of the ``dataset.json`` beside the truth folder; else bare numbers. Where a side
    names its organs, it is matched by name and may number them differently; organs that the truth's names lack are
    not scored, and neither are, case by case, those that an ``annotated.json`` beside the truth folder lacks.

    Args:
        predictions: a folder of label maps, or one file.
        truth: the same for the truth.
        labels: the organs that are scored; None as described above.
        tolerances_mm: of the NSD; the first one is the headline.
        ct_folder: scans for pictures; default the ``images*`` sibling of a ``labels*`` truth folder, if it exists.
        read_options: for reading both sides.
        progress: called with (done, total) before the first and after each case.

    Returns:
        The scores of every pair, and which cases had no partner.

    Raises:
        UsageError: FILE_AND_FOLDER (a file against a folder), DUP_CASE (two files of one case).
        VolumeError: NO_PAIRS; SHAPE or AFFINE_MISMATCH (more than 0.05 voxel) between the two grids of a case;
            LABELS, a side whose names share none with the organs; LABEL_RANGE for values that no organ has; and what
            the reader raises. A missing prediction is no exception, see `Evaluation.missing`.
    """
    predictions, truth = Path(predictions), Path(truth)
    tolerances_mm = tuple({f"{t:g}": float(t) for t in reversed(tolerances_mm)}.values())[::-1]
    truth_folder = truth if truth.is_dir() else truth.parent
    naming = _Naming(labels, truth_folder)
    predicted, true, scans = found_pairs(predictions, truth, naming.known())
    names = sorted(predicted.keys() & true.keys())
    if not names:
        raise VolumeError("NO_PAIRS", predictions, f"expected files named as in {truth} ({_few(sorted(true))}), got "
                          f"{_few(sorted(predicted))}", "give both files of a case the same name")
    missing, extra = sorted(true.keys() - predicted.keys()), sorted(predicted.keys() - true.keys())
    warnings = _without_partner(missing, extra, predictions)
    naming.predicted_masks = _mask_names(predicted.values())
    scans |= labelled_scans(Path(ct_folder) if ct_folder is not None else None, truth_folder)
    report, cases = progress or (lambda done, total: None), []
    for done, name in enumerate(names):
        report(done, len(names))
        cases.append(_evaluate_pair(name, predicted[name], true[name], naming, tolerances_mm, scans.get(name),
                                    read_options))
    report(len(names), len(names))
    warnings += naming.warnings + _without_organs(cases) + _below_voxel_edges(tolerances_mm, cases)
    return Evaluation(
        cases=tuple(cases), organs=naming.used(), tolerances_mm=tolerances_mm,
        predictions=predictions, truth=truth, missing=tuple(missing), extra=tuple(extra), warnings=tuple(warnings),
    )


def read_pair(
    case: CaseResult, organs: Mapping[int, str], read_options: ReadOptions = DEFAULTS, truth_folder: Path | None = None
) -> tuple[Segmentation, Segmentation]:
    """(prediction, truth) of a case that was evaluated, in the numbers of `organs`; other labels become 0.

    `truth_folder` is the one that was evaluated; None takes that of the truth's file.
    """
    prediction, truth = (read_labels(path, read_options) for path in (case.prediction_path, case.truth_path))
    naming = _Naming(organs, truth_folder or case.truth_path.parent, drop_unknown=True)
    pair = naming.resolve(case.name, prediction, truth, (case.prediction_path, case.truth_path))[:2]
    return replace(prediction, labels=pair[0], organs=dict(organs)), replace(truth, labels=pair[1], organs=dict(organs))


class _Naming:
    """Which number is which organ, on each side of each case."""

    def __init__(
        self, labels: LabelMap | Mapping[int, str] | None, truth_folder: Path, drop_unknown: bool = False
    ) -> None:
        self.warnings: list[str] = []
        self._drop_unknown = drop_unknown
        self._given = dict(labels.by_index if isinstance(labels, LabelMap) else labels) if labels is not None else None
        self._of_dataset = self._named_beside(truth_folder.parent / "dataset.json")
        self._annotated = _annotated(truth_folder.parent / "annotated.json")
        self._used: dict[int, str] = {}
        self.predicted_masks: list[str] = []
        """Organs that a mask of some prediction is named after, of whatever case."""

    def _named_beside(self, path: Path) -> dict[int, str]:
        """What ``dataset.json`` calls the truth's labels; one that cannot be used is, where the organs are given."""
        try:
            return _dataset_organs(path)
        except VolumeError as error:
            if self._given is None:
                raise
            self._warn(f"dataset.json is not used ({error.fault}): the truth has the numbers of the organs given")
            return {}

    def known(self) -> list[str]:
        """Organs that are named before any label map is read."""
        return [*(self._given or {}).values(), *self._of_dataset.values()]

    def with_all_masks(self, prediction: Segmentation, path: Path) -> Segmentation:
        """A prediction of masks with the organs of which it has none and others have: these were not found."""
        own = {plain(name) for name in prediction.organs.values()}
        lacking = [name for name in self.predicted_masks if path.is_dir() and plain(name) not in own]
        first = max(prediction.organs, default=0) + 1
        return replace(prediction, organs={**prediction.organs, **dict(enumerate(lacking, start=first))})

    def resolve(
        self, case: str, prediction: Segmentation, truth: Segmentation, paths: tuple[Path, Path]
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str], tuple[str, ...]]:
        """(prediction, truth, organs to score, organs not annotated), both arrays in the numbers of the organs."""
        truth_names = truth.organs or {k: n for k, n in self._of_dataset.items() if n != "ignore"}
        organs = self._given or prediction.organs or truth_names
        if not organs:
            values = np.union1d(_values(prediction.labels), _values(truth.labels))
            if len(values) > _MAX_UNNAMED:
                raise VolumeError("NOT_LABELS", paths[0], f"expected a label map, got {len(values)} different values "
                                  "in it and in the truth", "give label maps, or name the organs with --recipe")
            organs = {int(v): f"label {v}" for v in values if v}
        if not self._drop_unknown:
            self._demand_shared(organs, prediction.organs, paths[0])
            self._demand_shared(organs, truth_names, paths[1])
        predicted, true = self._without_ignored(prediction.labels, truth.labels)
        predicted = self._renumber(predicted, prediction.organs, organs, paths[0])
        true = self._renumber(true, truth_names, organs, paths[1])
        drawn = {plain(name) for name in truth_names.values()}
        scored = {k: name for k, name in organs.items() if not drawn or plain(name) in drawn}
        if len(scored) < len(organs) and not self._drop_unknown:
            lacking = [name for k, name in organs.items() if k not in scored]
            self._warn(f"organs that the truth does not have are not scored: {_few(lacking)}")
        known = self._annotated.get(case) if self._annotated is not None else None
        unknown = tuple(name for name in scored.values() if known is not None and plain(name) not in known)
        scored = {k: name for k, name in scored.items() if name not in unknown}
        self._used |= scored
        return predicted, true, scored, unknown

    def _demand_shared(self, organs: Mapping[int, str], names: Mapping[int, str], path: Path) -> None:
        """Refuse a side whose own names share none with the organs that are looked for: all scores would be empty."""
        there = {plain(name) for name in names.values()}
        if there and not any(plain(name) in there for name in organs.values()):
            whose = "of the recipe" if self._given is not None else "of the prediction"
            expected, got = (_few(list(some.values())) for some in (organs, names))
            raise VolumeError("LABELS", path, f"expected some of the organs {whose} ({expected}), got {got}",
                              "name the recipe whose organs they are with --recipe, or give both sides the same names")

    def used(self) -> dict[int, str]:
        """Label to name of all organs that were scored in some case, sorted."""
        return dict(sorted(self._used.items()))

    def _without_ignored(self, prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both as background where the truth has the label that ``dataset.json`` declares as "ignore"."""
        ignore = next((number for number, name in self._of_dataset.items() if name == "ignore"), None)
        if ignore is None:
            return prediction, truth
        keep = truth != ignore
        return prediction * keep, truth * keep

    def _renumber(
        self, labels: np.ndarray, names: Mapping[int, str], organs: Mapping[int, str], path: Path
    ) -> np.ndarray:
        present = [int(v) for v in _values(labels) if v]
        numbers = {plain(name): number for number, name in organs.items()}
        table = {v: numbers.get(plain(names[v]), 0) for v in present if v in names}
        table |= {v: v for v in present if v not in names and not names and v in organs}
        unknown = [v for v in present if v not in table]
        if unknown and not self._drop_unknown:
            expected, got = (_few([str(k) for k in some]) for some in (names or organs, unknown))
            raise VolumeError("LABEL_RANGE", path, f"expected labels {expected} and 0, got {got}",
                              "name the organs of these labels, or remap them to 0")
        dropped = [names[v] for v, number in table.items() if number == 0]
        if dropped and not self._drop_unknown:
            self._warn(f"organs that are not looked for count as background: {_few(dropped)}")
        if all(v == number for v, number in table.items()):
            return labels
        lookup = np.zeros(max(present) + 1, np.uint16)
        lookup[list(table)] = list(table.values())
        return lookup[labels]

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)
            log.warning("%s", warning)


def _evaluate_pair(
    name: str, prediction_path: Path, truth_path: Path, naming: _Naming, tolerances_mm: tuple[float, ...],
    ct_path: Path | None, read_options: ReadOptions,
) -> CaseResult:
    prediction, truth = (read_labels(path, read_options) for path in (prediction_path, truth_path))
    prediction = naming.with_all_masks(prediction, prediction_path)
    apart = demand_same_grid(prediction, prediction_path, truth, "the truth")
    predicted, true, organs, unknown = naming.resolve(name, prediction, truth, (prediction_path, truth_path))
    warnings = [f"prediction: {w}" for w in (*prediction.warnings, *apart)] + [f"truth: {w}" for w in truth.warnings]
    if not true.any():
        warnings.append(_EMPTY_TRUTH)
    scores = evaluate_case(predicted, true, truth.spacing_mm, organs, tolerances_mm)
    return CaseResult(
        name=name, scores=tuple(scores), shape=truth.shape, spacing_mm=truth.spacing_mm, ct_path=ct_path,
        prediction_path=prediction_path, truth_path=truth_path, not_annotated=unknown, warnings=tuple(warnings),
    )


def _mask_names(places: Iterable[Path]) -> list[str]:
    """Organs of which there is a mask file in one of `places`, sorted."""
    return sorted({image_stem(mask) for path in places if path.is_dir() for mask in masks_in(path)})


def _without_partner(missing: list[str], extra: list[str], predictions: Path) -> list[str]:
    """Warnings, which are logged as well."""
    warnings = []
    if missing:
        warnings.append(f"the truth has {counted(len(missing), 'case')} without a prediction: {_few(missing)}")
    if extra:
        warnings.append(f"{counted(len(extra), 'prediction')} without a truth left out: {_few(extra)}")
    for warning in warnings:
        log.warning("%s: %s", predictions, warning)
    return warnings


def _without_organs(cases: Sequence[CaseResult]) -> list[str]:
    empty = [case.name for case in cases if _EMPTY_TRUTH in case.warnings]
    if not empty:
        return []
    warning = f"the truth of {counted(len(empty), 'case')} shows none of the organs: {_few(empty)}"
    log.warning("%s", warning)
    return [warning]


def _below_voxel_edges(tolerances_mm: Sequence[float], cases: Sequence[CaseResult]) -> list[str]:
    finest_mm = min((min(case.spacing_mm) for case in cases), default=0.0)
    return [f"NSD at {t:g} mm is below the voxel edges ({finest_mm:.2f} mm or more): only surface that coincides "
            "exactly counts" for t in tolerances_mm if t < finest_mm]


def _dataset_organs(path: Path) -> dict[int, str]:
    """Label to organ of an nnU-Net ``dataset.json`` (version 2: name to number; version 1: number to name)."""
    if not path.is_file():
        return {}
    try:
        labels = json.loads(read_text_capped(path))["labels"]
        pairs = [(v, k) if isinstance(v, int) else (int(k), str(v)) for k, v in labels.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise VolumeError("DATASET", path, "expected labels with one number for each organ, got something else",
                          "correct the file, or give the organs of a recipe") from None
    return {number: name for number, name in pairs if number > 0}


def _annotated(path: Path) -> dict[str, set[str]] | None:
    """Case to the organs that were drawn there; the truth of the others is unknown. None without such a file."""
    if not path.is_file():
        return None
    try:
        tree = json.loads(read_text_capped(path))
        return {str(case): {plain(organ) for organ in organs} for case, organs in tree.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise VolumeError("DATASET", path, "expected each case with the list of its drawn organs, got something else",
                          "correct or remove the file") from None


def _values(labels: np.ndarray) -> np.ndarray:
    seen = np.zeros(int(labels.max(initial=0)) + 1, bool)
    for plane in labels:  # a slice at a time: indexes of eight bytes are made of its voxels
        seen[plane] = True
    return np.flatnonzero(seen)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"
