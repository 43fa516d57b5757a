"""The files of a folder, opened without believing them: which of them are DICOM, and what each of these is.

No name, number, date or text of a patient leaves this module: messages name a file by its place in the sorted
folder.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.io.dicom.header import CtSlice, UnfitImage, multiframe_error, parse_slice
from autosam3d.io.dicom.sniff import DICOM_ENDINGS, START_BYTES, begins_as_dicom
from autosam3d.io.dicom.tags import quiet_pydicom
from autosam3d.io.files import open_regular, readable
from autosam3d.io.memory import size_text
from autosam3d.io.options import ReadOptions

MAX_FILE_BYTES = 512 << 20
# Headers of multi-frame images have a few kilobytes a frame; of what is larger than a slice no more than this is read.
MAX_HEADER_BYTES = 16 << 20
_REMEDY = "copy or export the series again"
_MAX_FILES = 100_000
_MAX_FOLDER_LEVELS = 8
# What is left out, as one and as several; other kinds are modalities.
_KINDS = {
    "foreign": ("file that is not DICOM", "files that are not DICOM"),
    "link": ("link", "links"),
    "hidden": ("DICOMDIR or hidden file", "DICOMDIR or hidden files"),
    "localizer": ("localizer", "localizers"),
    "secondary capture": ("secondary capture", "secondary captures"),
    "multi-frame CT": ("multi-frame CT image", "multi-frame CT images"),
    "page": ("picture or page that is no slice", "pictures or pages that are no slices"),
    "other": ("DICOM file of another kind", "DICOM files of other kinds"),
}


@dataclass(frozen=True)
class Folder:
    """What `scan_folder` found: images, and the number of other files by kind."""

    slices: list[CtSlice]
    unfit: list[UnfitImage]
    """CT images that cannot be read as slices, of any series."""
    num_files: int
    others: Counter[str]


def count_text(count: int, kind: str) -> str:
    """``2 files that are not DICOM``, for a kind of `Folder.others`."""
    one, several = _KINDS.get(kind, (f"{kind} object", f"{kind} objects"))
    return f"{count} {one if count == 1 else several}"


def scan_folder(folder: Path, options: ReadOptions) -> Folder:
    """The headers of all CT images below `folder`; links are not followed and DICOMDIR is not read.

    Args:
        folder: that exists.
        options: whether images of other modalities and images without rescale are taken, too.

    Raises:
        VolumeError: NO_DICOM, MODALITY, MULTIFRAME where nothing else is there, TOO_MANY_FILES, UNREADABLE; of images
            none of which is a slice, the first one's: SLICE_CORRUPT, LENGTH, NESTING, TAG_MISSING, TAG_INVALID, DTYPE,
            NOT_HU, CODEC.
    """
    paths, others = _files_below(folder)
    slices: list[CtSlice] = []
    unfit: list[UnfitImage] = []
    with quiet_pydicom():
        for number, path in enumerate(paths, start=1):
            found = _look_at(path, number, f"{folder}: file {number} of {len(paths)}", options)
            if isinstance(found, CtSlice):
                slices.append(found)
            elif isinstance(found, UnfitImage):
                unfit.append(found)
            else:
                others[found] += 1
    _demand_slices(slices, unfit, others, len(paths), folder, options)
    return Folder(slices, unfit, len(paths), others)


def _look_at(path: Path, number: int, where: str, options: ReadOptions) -> CtSlice | UnfitImage | str:
    try:
        start = _beginning(path, where)
    except VolumeError as error:
        if error.code != "SLICE_CORRUPT":
            raise
        return UnfitImage(error, None)
    return "foreign" if start is None else parse_slice(*start, path, number, where, options)


def _demand_slices(slices: list[CtSlice], unfit: list[UnfitImage], others: Counter[str], num_files: int, folder: Path,
                   options: ReadOptions) -> None:
    if slices:
        return
    if unfit:
        raise next((image.error for image in unfit if not image.is_page), unfit[0].error)
    found_text = ", ".join(count_text(count, kind) for kind, count in sorted(others.items())) or "no file at all"
    if others["foreign"] == num_files:
        remedy = "name the folder that holds the slices, or a .nii.gz file"
        if others["link"]:
            remedy = "links are not followed: name the folder that they lead to, or copy the files themselves"
        raise VolumeError("NO_DICOM", folder, f"expected a folder with DICOM files, found {found_text}", remedy)
    if others["multi-frame CT"]:
        raise multiframe_error(folder)
    raise VolumeError("MODALITY", folder, f"expected CT images, found {found_text}",
                      options.remedy("force", True, "name a folder with a CT series",
                                     "; {} takes images of other modalities"))


def _files_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    others: Counter[str] = Counter()
    paths: list[Path] = []
    with readable(folder):
        root_level = len(folder.parts)
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders.sort()
            others["link"] += sum(Path(parent, name).is_symlink() for name in folders)
            if len(Path(parent).parts) - root_level >= _MAX_FOLDER_LEVELS:
                folders.clear()
            for name in sorted(names):
                path = Path(parent, name)
                if path.is_symlink():
                    others["link"] += 1
                elif name.upper() == "DICOMDIR" or name.startswith("."):
                    others["hidden"] += 1
                else:
                    paths.append(path)
            if len(paths) > _MAX_FILES:
                raise VolumeError("TOO_MANY_FILES", folder, f"expected one series, found more than {_MAX_FILES} files",
                                  "name the folder of the series")
    return paths, +others  # without those of which there are none


def _raise(error: OSError) -> None:
    raise error


def dicom_bytes(path: Path, where: str) -> bytes | None:
    """The whole file, or None where it is not DICOM.

    Raises:
        VolumeError: LENGTH of a file that is larger than any slice, SLICE_CORRUPT, UNREADABLE; ResourceError IO.
    """
    start = _beginning(path, where)
    if start is None:
        return None
    content, num_bytes = start
    if num_bytes > len(content):
        raise VolumeError("LENGTH", where, f"expected at most {size_text(MAX_FILE_BYTES)} a slice", _REMEDY)
    return content


def _beginning(path: Path, where: str) -> tuple[bytes, int] | None:
    """(a DICOM file, or as much of one that is larger than any slice as holds its header; its size)."""
    try:
        with open_regular(path) as file, readable(where):
            start = file.read(START_BYTES)
            if not begins_as_dicom(start):
                if len(start) < START_BYTES and path.suffix.lower() in DICOM_ENDINGS:
                    raise VolumeError("SLICE_CORRUPT", where, f"it has {len(start)} bytes only", _REMEDY)
                return None
            num_bytes = os.fstat(file.fileno()).st_size
            content = start + file.read((MAX_HEADER_BYTES if num_bytes > MAX_FILE_BYTES else num_bytes) - len(start))
    except (VolumeError, ResourceError) as error:  # its `where` is the file name, which may name a patient
        raise type(error)(error.code, where, error.fault, error.remedy) from None
    return content, num_bytes
