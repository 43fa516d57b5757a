"""Which label maps lie in a folder and below it, by case: a file a case, or a folder with a mask an organ."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from autosam3d.data.folder import plain_name as plain
from autosam3d.errors import UsageError, VolumeError
from autosam3d.io.endings import image_stem, is_image

SCAN_NAMES = frozenset(("ct", "image", "imaging", "scan"))
"""What datasets call the scan of a case, which lies beside its labels and is none."""
_MASK_FOLDERS = frozenset(("labels", "masks", "segmentation", "segmentations"))
_WHOLE_NAMES = frozenset(("all", "combined", "label", "labels", "mask", "seg", "segmentation"))
_MAX_FOLDER_LEVELS = 8


@dataclass
class FoundLabels:
    """Of one side of an evaluation."""

    cases: dict[str, Path] = field(default_factory=dict)
    """Case name to a file, or to a folder with a mask an organ."""
    scans: dict[str, Path] = field(default_factory=dict)
    """Case name to the scan that lies beside its labels."""
    groups: list[tuple[tuple[str, ...], Path, list[Path]]] = field(default_factory=list)
    """Folders of several files that may be cases or masks of one case: names of the folders above, folder, files."""

    def add(self, name: str, path: Path) -> None:
        if name in self.cases:
            raise UsageError("DUP_CASE", path, f"expected one file for a case, got {self.cases[name].name} too",
                             "remove one")
        self.cases[name] = path

    @property
    def mask_names(self) -> set[str]:
        """Of the organs whose masks lie in the folders that are cases."""
        return {plain(image_stem(mask)) for path in self.cases.values() if path.is_dir() for mask in masks_in(path)}

    def settle(self, organs: Collection[str]) -> None:
        """Tell folders of cases from folders of masks: these are named after `organs`, or alike in several folders."""
        alike = Counter(plain(image_stem(f)) for parts, _, files in self.groups if parts for f in files)
        for parts, folder, files in self.groups:
            names = [plain(image_stem(f)) for f in files]
            shared = parts and len(files) > 1 and 2 * sum(alike[name] > 1 for name in names) > len(names)
            if len(files) > 1 and (set(names) <= set(organs) or shared):
                self.add("_".join(parts) or folder.resolve().name, folder)
                continue
            for file in files:
                self.add("_".join((*parts, case_name(file))), file)
        self.groups = []


def case_name(path: str | Path) -> str:
    """``CASE`` of ``CASE.nii.gz`` and of nnU-Net's ``CASE_0000.nii.gz``."""
    return image_stem(path).removesuffix("_0000")


def masks_in(folder: Path) -> list[Path]:
    """The files of a folder that are masks, by name."""
    return [p for p in _images(folder) if plain(image_stem(p)) not in SCAN_NAMES]


def found_pairs(
    predictions: Path, truth: Path, organs: Collection[str]
) -> tuple[dict[str, Path], dict[str, Path], dict[str, Path]]:
    """(predictions, truths, scans beside the truths) by case name; one single case on each side is one, whatever they
    are called.

    A case is ``CASE.nii.gz``; the only file of a folder, ``CASE/labels.nii.gz``; or a folder with a mask an organ,
    ``CASE/segmentations/liver.nii.gz`` or ``CASE/liver.nii.gz``. Folders above it are part of its name. Files that are
    called as scans are, ``CASE/ct.nii.gz``, are no labels.

    Args:
        organs: that are known to be looked for.

    Raises:
        VolumeError: UNREADABLE.
        UsageError: FILE_AND_FOLDER, DUP_CASE.
    """
    for path in (predictions, truth):
        if not path.exists():
            raise VolumeError("UNREADABLE", path, "expected a label map or a folder of them, got nothing",
                              "check the path")
    if predictions.is_dir() != truth.is_dir() and not _is_one_case(predictions if predictions.is_dir() else truth,
                                                                   organs):
        raise UsageError("FILE_AND_FOLDER", predictions, "expected two files or two folders, got one of "
                         f"each (truth: {truth})", "name the file of the case on both sides")
    if not (predictions.is_dir() and truth.is_dir()):
        name = case_name(predictions if truth.is_dir() else truth)
        return {name: predictions}, {name: truth}, {}
    sides = (_found(predictions), _found(truth))
    known = {plain(name) for name in organs}.union(*(side.mask_names for side in sides))
    for side in sides:
        side.settle(known)
    predicted, true = (side.cases for side in sides)
    if len(predicted) == len(true) == 1 and any(path.is_dir() for path in (*predicted.values(), *true.values())):
        predicted = dict(zip(true, predicted.values(), strict=True))
    return predicted, true, sides[1].scans


def labelled_scans(ct_folder: Path | None, truth_folder: Path) -> dict[str, Path]:
    """Case name to scan, for pictures: of `ct_folder`, else of the ``images*`` sibling of a ``labels*`` folder.

    Raises:
        VolumeError: UNREADABLE, `ct_folder` is none.
    """
    if ct_folder is None and truth_folder.name.startswith("labels"):
        ct_folder = truth_folder.with_name("images" + truth_folder.name.removeprefix("labels"))
    elif ct_folder is not None and not ct_folder.is_dir():
        raise VolumeError("UNREADABLE", ct_folder, "expected a folder of scans, got none", "check the path")
    found = FoundLabels()
    if ct_folder is not None and ct_folder.is_dir():
        for path in _images(ct_folder):
            found.add(case_name(path), path)
    return found.cases


def _is_one_case(folder: Path, organs: Collection[str]) -> bool:
    """Whether a folder beside which a file stands holds the masks of that one case."""
    names = {plain(image_stem(mask)) for mask in masks_in(folder)}
    return bool(names) and (folder.name.lower() in _MASK_FOLDERS or names <= {plain(organ) for organ in organs})


def _found(root: Path) -> FoundLabels:
    found = FoundLabels()
    try:
        _walk(root, (), found)
    except OSError as error:
        raise VolumeError("UNREADABLE", root, f"cannot be listed ({error.strerror})", "check the path") from None
    return found


def _walk(folder: Path, parts: tuple[str, ...], found: FoundLabels) -> None:
    images = _images(folder)
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    name = "_".join(parts)
    if parts:
        scans = [p for p in images if plain(image_stem(p)) in SCAN_NAMES]
        found.scans.update([(name, p) for p in scans[:1]])
        images = [p for p in images if p not in scans]
    masks = [p for p in folders if parts and p.name.lower() in _MASK_FOLDERS and masks_in(p)]
    if len(masks) == 1:
        files = masks_in(masks[0])
        whole = len(files) == 1 and plain(image_stem(files[0])) in _WHOLE_NAMES
        found.add(name, files[0] if whole else masks[0])
    elif parts and len(images) == 1:
        found.add(name, images[0])
    elif images:
        found.groups.append((parts, folder, images))
    for below in folders:
        if masks != [below] and not (parts and below.is_symlink()) and len(parts) < _MAX_FOLDER_LEVELS:
            _walk(below, (*parts, below.name), found)


def _images(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder)
                  if is_image(entry.name) and not entry.name.startswith(".") and not entry.is_dir())
