"""What a DICOM object takes over from its source series: patient, study, and references to its images.

Only a fixed list of tags is copied, each checked; no message repeats a patient's text.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.acquired import slice_affines, slice_heights, slice_shape
from autosam3d.io.dicom.files import dicom_bytes
from autosam3d.io.dicom.header import CtSlice
from autosam3d.io.dicom.meta import parse
from autosam3d.io.dicom.series import series_slices
from autosam3d.io.dicom.stack import place_tolerance_vox
from autosam3d.io.dicom.tags import DAMAGE, quiet_pydicom, tag_text
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.volume import SourceGrid

# isort: split
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import DA, TM, DSfloat

# Patient and General Study modules: what an archive needs to file the result with its scan, and no more.
# *Source*: DICOM PS3.3 tables C.7-1 and C.7-3, types 1 and 2.
_CARRIED = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
            "ReferringPhysicianName", "StudyID")
_OPTIONAL = ("IssuerOfPatientID",)
_SEXES = ("M", "F", "O")
_UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_MAX_UID = 64
_UTF8 = "ISO_IR 192"
# Gaps that differ from the grid's by no more than this share are one distance.
_MAX_UNEVEN_VOX = 0.06
_MAX_SERIES_NUMBER = 10**9


@dataclass(frozen=True)
class Algorithm:
    """The program and model that made a segmentation, as a DICOM object names them."""

    name: str
    version: str
    """Of the program."""
    sha256: str
    """Of the model: equal models, labels and scans give objects with equal UIDs."""
    settings: str | None = None
    """Of the run. Where given, UIDs are derived from scan, model and settings instead of the labels: segmenting a scan
    twice gives one object, even where another machine's rounding changes the label of a voxel."""


@dataclass(frozen=True)
class SourceSeries:
    """The series that a DICOM object is made for."""

    where: str
    """The folder, for messages."""
    identity: Dataset
    """Patient and study, from the list of tags; invalid values are empty."""
    images: tuple[Dataset, ...]
    """One for each slice, along the normal: UIDs and geometry. Where the slices lie unevenly, SliceThickness is each
    one's own and there is no SpacingBetweenSlices."""
    warnings: tuple[str, ...]

    @property
    def frame_of_reference(self) -> str:
        return str(self.images[0].FrameOfReferenceUID)


def read_source_series(folder: str | Path, grid: SourceGrid | None, options: ReadOptions = DEFAULTS) -> SourceSeries:
    """The series that `read_dicom_series` read with these `options`, with what an object made from it needs.

    Args:
        folder: the same that was read.
        grid: `source` of the volume or segmentation.

    Raises:
        VolumeError: as `read_dicom_series`; NOT_DICOM, where `grid` is not of a DICOM series; SERIES_CHANGED;
            TAG_MISSING and TAG_INVALID for UIDs.
    """
    if grid is None or grid.kind != "dicom":
        raise VolumeError("NOT_DICOM", folder, "expected a DICOM series, got a scan of another kind",
                          "write NIfTI, or segment the series itself")
    slices = series_slices(folder, options)
    _demand_grid(slices, grid, folder)
    is_even, thicknesses_mm = _thicknesses_mm(grid)
    with quiet_pydicom():
        first = _tags(slices[0], folder)
        warnings: list[str] = []
        identity = _identity(first, warnings)
        identity.StudyInstanceUID = _uid(first, "StudyInstanceUID", f"{folder}: file {slices[0].number}")
        images = tuple(_image(ct_slice, folder, mm) for ct_slice, mm in zip(slices, thicknesses_mm, strict=True))
    if is_even:  # one distance for all is stated only where there is one
        for image in images:
            image.SpacingBetweenSlices = image.SliceThickness
    if len({image.SOPInstanceUID for image in images}) != len(images):
        raise VolumeError("TAG_INVALID", folder, "several slices have one SOPInstanceUID, so none can be referred to",
                          "export the series again")
    if len({(image.StudyInstanceUID, image.SeriesInstanceUID) for image in images}) > 1:
        raise VolumeError("TAG_INVALID", folder, "its slices name different studies, so the result belongs to none",
                          "export the series again")
    return SourceSeries(str(folder), identity, images, tuple(warnings))


def carry_identity(target: Dataset, source: SourceSeries) -> None:
    """Put patient and study into `target`, in UTF-8."""
    target.SpecificCharacterSet = _UTF8
    for element in source.identity:
        setattr(target, element.keyword, element.value)


def derived_uid(kind: str, source: SourceSeries, algorithm: Algorithm, content: bytes) -> str:
    """A UID that is the same for the same scan, model, program and labels, so that an archive that gets a result twice
    keeps one. *Source* of the form: DICOM PS3.5 annex B.2, with a hash in the place of the UUID."""
    parts = [kind, *(str(image.SOPInstanceUID) for image in source.images), algorithm.name, algorithm.version,
            algorithm.sha256, content.hex() if algorithm.settings is None else f"settings {algorithm.settings}"]
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def series_description(algorithm: Algorithm) -> str:
    """The description of a result's series; at most 64 characters, the limit of value representation LO."""
    return f"{algorithm.name}, not reviewed"[:64]


def centroid_mm(sums: np.ndarray, count: int) -> np.ndarray:
    """The centre of `count` voxels from the sums of their coordinates."""
    return sums / max(count, 1)


def demand_centroids(meant: dict[int, np.ndarray], found: dict[int, np.ndarray], limit_mm: float,
                     path: Path) -> None:
    """Refuse an object whose organs lie elsewhere: where every voxel is right an axis may still be flipped.

    Args:
        meant, found: label to its centre in RAS+ mm, each computed in its own way.
        limit_mm: half the shortest edge of a voxel.

    Raises:
        VolumeError: READ_BACK.
    """
    if meant.keys() != found.keys():
        raise read_back_error(path, f"expected {len(meant)} organs, read {len(found)} back")
    for label, centre in meant.items():
        apart = float(np.linalg.norm(found[label] - centre))
        if not apart <= limit_mm:
            raise read_back_error(path, f"organ {label} lies {apart:.2f} mm from its place")


def read_back_error(path: Path, fault: str) -> VolumeError:
    """The error for a file that differs from the segmentation when it is read back; the file is not kept."""
    return VolumeError("READ_BACK", path, f"what was written differs from the segmentation: {fault}",
                       "write NIfTI, and report this as a bug")


def written_bytes(dataset: Dataset) -> int:
    """The size of the file that a DICOM object becomes; made for it, so asked only where the file has failed."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return len(buffer.getbuffer())


def label_centres(labels: np.ndarray, affine: np.ndarray, values: Iterable[int]) -> dict[int, np.ndarray]:
    """Label to its centre in RAS+ mm, of an array [z, y, x]; labels without a voxel are left out."""
    centres = {}
    for value in values:
        mask = labels == value
        count = int(np.count_nonzero(mask))
        if count:
            sums = [float(np.arange(n) @ mask.sum(axis=tuple(a for a in range(3) if a != axis)))
                    for axis, n in enumerate(mask.shape)]
            centres[int(value)] = (affine @ [*(centroid_mm(np.array(sums[::-1]), count)), 1.0])[:3]
    return centres


def _demand_grid(slices: list[CtSlice], grid: SourceGrid, folder: str | Path) -> None:
    """Refuse slices that lie elsewhere than on the grid."""
    expected = slice_shape(grid)
    if (len(slices), *slices[0].shape) != expected:
        raise VolumeError("SERIES_CHANGED", folder, f"expected {expected[0]} slices of {expected[1]} x {expected[2]} "
                          f"pixels, got {len(slices)} of {slices[0].shape[0]} x {slices[0].shape[1]}",
                          "name the series that was segmented")
    corners = np.array([[*s.position_lps * (-1, -1, 1), 1.0] for s in slices])
    places = np.einsum("sij,sj->si", np.linalg.inv(slice_affines(grid)), corners)
    even_vox = place_tolerance_vox(float(np.linalg.norm(grid.affine[:3, 2])))
    if np.abs(places[:, 2]).max() > even_vox or np.abs(places[:, :2]).max() > 0.5:
        raise VolumeError("SERIES_CHANGED", folder, "its slices lie elsewhere than those that were segmented",
                          "name the series that was segmented")


def _thicknesses_mm(grid: SourceGrid) -> tuple[bool, list[float]]:
    """(whether all slices lie one distance apart, how much of the normal each stands for): that distance, or half the
    way to either neighbour, at the ends as much outwards as inwards."""
    step_mm, heights = float(np.linalg.norm(grid.affine[:3, 2])), slice_heights(grid)
    gaps = np.diff(heights)
    if len(gaps) == 0 or np.abs(gaps - 1).max() <= _MAX_UNEVEN_VOX:
        return True, [step_mm] * len(heights)
    gaps = np.concatenate([gaps[:1], gaps, gaps[-1:]]) * step_mm
    return False, ((gaps[:-1] + gaps[1:]) / 2).tolist()


def _tags(ct_slice: CtSlice, folder: str | Path) -> Any:
    where = f"{folder}: file {ct_slice.number}"
    content = dicom_bytes(ct_slice.path, where)
    tags = [*_CARRIED, *_OPTIONAL, "StudyInstanceUID", "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID",
            "FrameOfReferenceUID", "PositionReferenceIndicator", "SeriesNumber", "Modality"]
    try:
        if content is not None:
            return parse(content, tags, where)[0]
    except VolumeError:
        pass
    raise VolumeError("SLICE_CORRUPT", where, "it cannot be read any more", "copy or export the series again")


def _identity(tags: Any, warnings: list[str]) -> Dataset:
    """The tags of patient and study; type 2 tags are always there, empty where the source's value is invalid."""
    identity = Dataset()
    dropped = []
    for keyword in (*_CARRIED, *_OPTIONAL):
        text = tag_text(tags, keyword)
        kept = text if _is_valid(keyword, text) else ""
        if kept != text:
            dropped.append(keyword)
        if kept or keyword in _CARRIED:
            setattr(identity, keyword, kept)
    if dropped:
        warnings.append(f"not carried over, because the series has no valid value: {', '.join(dropped)}")
    return identity


def _is_valid(keyword: str, text: str) -> bool:
    """*Source*: DICOM PS3.5 table 6.2-1."""
    if text == "":
        return True
    if "\\" in text or any(not c.isprintable() and not _is_written(c) for c in text):
        return False
    try:
        if keyword.endswith("Date"):
            return DA(text) is not None
        if keyword.endswith("Time"):
            return TM(text) is not None
    except DAMAGE:
        return False
    if keyword == "PatientSex":
        return text in _SEXES
    if keyword.endswith("Name"):
        return all(len(group) <= 64 for group in text.split("="))
    return len(text) <= (16 if keyword in ("AccessionNumber", "StudyID") else 64)


def _is_written(character: str) -> bool:
    """Of those that Python does not print: spaces of every script, such as the ideographic one of Japanese names, what
    joins and parts letters, and private letters, which GB 18030 has for rare family names."""
    return unicodedata.category(character) in ("Zs", "Co") or character in "\u200c\u200d"


def _uid(tags: Any, keyword: str, where: str) -> UID:
    text = tag_text(tags, keyword)
    if text == "":
        raise VolumeError("TAG_MISSING", where, f"expected {keyword}, to which the result must refer, got none",
                          "export the series again, or write NIfTI")
    if len(text) > _MAX_UID or not _UID.fullmatch(text):
        raise VolumeError("TAG_INVALID", where, f"expected a valid {keyword}", "export the series again, or write "
                          "NIfTI")
    return UID(text)


def _image(ct_slice: CtSlice, folder: str | Path, thickness_mm: float) -> Dataset:
    where = f"{folder}: file {ct_slice.number}"
    tags = _tags(ct_slice, folder)
    image = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(image, keyword, _uid(tags, keyword, where))
    reference = tag_text(tags, "PositionReferenceIndicator")
    image.PositionReferenceIndicator = reference if _is_valid("", reference) else ""
    number = tag_text(tags, "SeriesNumber")
    image.SeriesNumber = int(number) if number.isdecimal() and int(number) < _MAX_SERIES_NUMBER else 1
    image.Modality = "CT" if ct_slice.is_ct else tag_text(tags, "Modality")[:16]
    image.Rows, image.Columns = ct_slice.shape
    image.PixelSpacing = _decimals(ct_slice.spacing_mm)
    image.SliceThickness = _decimals([thickness_mm])[0]
    image.ImagePositionPatient = _decimals(ct_slice.position_lps)
    image.ImageOrientationPatient = _decimals(ct_slice.orientation.ravel())
    for keyword in _CARRIED:  # highdicom gets no patient's data; `carry_identity` adds it afterwards
        setattr(image, keyword, "")
    return image


def _decimals(values: Iterable[float]) -> list[str]:
    """Decimal strings of at most 16 characters, nearest to the values. *Source*: DICOM PS3.5 table 6.2-1, DS."""
    return [str(DSfloat(float(value), auto_format=True)) for value in values]
