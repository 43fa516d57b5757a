"""Which scans lie in a folder and in the folders below it; files that are none, such as lists and licences, are not
counted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.sniff import may_be_slice
from autosam3d.io.endings import image_stem, is_image
from autosam3d.scans.outputs import stem_of

_log = logging.getLogger(__name__)

# What datasets call the folders of their label maps, which are no scans.
_LABEL_FOLDERS = frozenset(("labels", "labelstr", "labelsts", "masks", "segmentation", "segmentations"))
_MAX_FOLDER_LEVELS = 8


def scans_in(folder: Path, output: Path | None = None) -> list[Path]:
    """NIfTI, NRRD and MetaImage files in `folder` and below it, and folders with DICOM files: files before folders, by
    their names.

    A folder that holds slices is one series with all that lies below it, and so is a folder below `folder` that holds
    DICOM files alone, however deep. Label maps (.seg.nrrd, and files in folders that are called so), DICOM files beside
    such files and such files below a series are passed over with a warning.

    Args:
        folder: that exists.
        output: in it, passed over.

    Raises:
        VolumeError: UNREADABLE or NO_SCANS.
    """
    kept = None if output is None else os.path.realpath(output)
    try:
        scans = _scans_below(folder, kept, 0)
        if not scans and any(path.is_file() for path in _entries(folder, kept)):
            return [folder]  # its reader will say what it holds
    except OSError as error:
        raise VolumeError("UNREADABLE", folder, f"cannot be listed ({error.strerror})", "check the path") from None
    if not scans:
        raise VolumeError("NO_SCANS", folder, "expected NIfTI, NRRD or MetaImage files or DICOM series, got none",
                          "check the path")
    return scans


def case_names(scans: Sequence[Path], source: Path) -> list[str]:
    """Of each scan that was found in `source`: its own name, or that of the folders that lead to it; the only file of
    its folder is called as that, so that CASE/ct.nii.gz becomes CASE."""
    siblings = Counter(scan.parent for scan in scans)
    names = []
    for scan in scans:
        folders = scan.parent.relative_to(source).parts if scan != source and scan.is_relative_to(source) else ()
        is_only_file = folders and siblings[scan.parent] == 1 and not scan.is_dir()
        own = scan if scan.name not in ("", "..") else Path(os.path.realpath(scan))
        stem = image_stem(own) if is_image(own) else stem_of(own)
        names.append("_".join(folders if is_only_file else (*folders, stem.removesuffix("_0000"))))
    return names


def _entries(folder: Path, kept: str | None) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and os.path.realpath(p) != kept)


def _scans_below(folder: Path, kept: str | None, level: int) -> list[Path]:
    entries = _entries(folder, kept)
    folders = [p for p in entries if p.is_dir()]
    images = [p for p in entries if p not in folders and _is_image(p)]
    if any(_is_segmentation(p) for p in entries if p not in folders):
        _log.warning("%s: .seg.nrrd files are label maps; they are passed over", folder)
    # Slices are named after patients often, so none is named here.
    if any(may_be_slice(p) for p in entries if p not in folders and p not in images):
        if not images:
            if any(_is_image(p) for sub in folders for p in _files_below(sub, kept)):
                _log.warning("%s: it holds a DICOM series; image files in folders below it are passed over", folder)
            return [folder]
        _log.warning("%s: it holds NIfTI files or their like; its DICOM files are passed over", folder)
    scans = list(images)
    for sub in folders:
        if level and sub.is_symlink():
            continue  # which may lead in a circle
        has_images = any(map(_is_image, _files_below(sub, kept)))
        if has_images and sub.name.lower() in _LABEL_FOLDERS:
            _log.warning("%s: a folder of label maps, by its name; it is passed over", sub)
        elif has_images and level < _MAX_FOLDER_LEVELS:
            scans += _scans_below(sub, kept, level + 1)
        elif has_images:
            _log.warning("%s: it lies too deep below %s; it is passed over", sub.name, folder)
        elif any(map(may_be_slice, _files_below(sub, kept))):
            scans.append(sub)
    return scans


def _files_below(folder: Path, kept: str | None) -> list[Path]:
    """Without hidden ones; links to folders are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and os.path.realpath(Path(parent, name)) != kept)
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _is_image(path: Path) -> bool:
    return is_image(path) and not _is_segmentation(path)


def _is_segmentation(path: Path) -> bool:
    """Of 3D Slicer, which saves it beside the scan."""
    return path.name.lower().endswith(".seg.nrrd")
