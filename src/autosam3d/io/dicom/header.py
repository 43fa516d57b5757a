"""What one file of a folder is, by its header: a slice of a CT scan, a CT image that cannot be one, or another object.

No name, number, date or text of a patient leaves this module: messages name a file by its place in the sorted
folder, and identifiers are kept as hashes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.acquisitions import ACQUISITION_TAGS, Acquired, read_acquired
from autosam3d.io.dicom.meta import PIXEL_TAGS, parse, read_meta
from autosam3d.io.dicom.tags import hashed, tag_integer, tag_numbers, tag_text
from autosam3d.io.options import ReadOptions

# isort: split
# Below the tags, which say what to install where pydicom is absent.
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from autosam3d.io.dicom.syntaxes import could_have_decoder, has_decoder

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTIFRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_REMEDY = "copy or export the series again"
_MAX_EDGE = 8192
# Cosines are written with few digits: up to this their length may be off 1, and the angle between them off a right one.
_MAX_OFF_UNIT = 0.01
# Modalities by their codes; what stands in the tag may be free text and is not repeated. *Source*: PS3.3 C.7.3.1.1.1.
_MODALITIES = frozenset(("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SR", "SEG", "RTSTRUCT",
                         "RTPLAN", "RTDOSE", "RTIMAGE", "REG", "PR", "KO", "DOC"))
HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SamplesPerPixel",
    "NumberOfFrames", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue",
    "PixelPaddingRangeLimit", *ACQUISITION_TAGS,
]


@dataclass(frozen=True)
class CtSlice:
    """The geometry and scaling of one image; hashes stand for identifiers."""

    path: Path
    number: int
    """Place in the sorted folder, from 1."""
    instance: str
    """Hash of the SOPInstanceUID, "" where there is none."""
    series: str
    patient: str
    frame_of_reference: str
    transfer_syntax: str
    is_ct: bool
    shape: tuple[int, int]
    """(rows, columns)."""
    position_lps: np.ndarray
    orientation: np.ndarray
    """2x3 unit vectors, the directions in which columns and rows are counted, in LPS."""
    spacing_mm: tuple[float, float]
    """(between rows, between columns)."""
    slope: float
    intercept: float
    rescale_type: str
    photometric: str
    acquired: Acquired
    cosine_rounding: float
    """Half a unit of the last digit that ImageOrientationPatient is written with; 0 where it is exact or lies along the
    patient's axes."""


@dataclass(frozen=True)
class UnfitImage:
    """A CT image that cannot be read as a slice. It stops the series that it belongs to, and no other."""

    error: VolumeError
    """Which says why."""
    series: str | None
    """Hash; None where the file does not say, so it may be of any series."""
    is_page: bool = False
    """Whether it is a picture or a text that was stored with the series, rather than a slice of it."""
    shape: tuple[int, int] | None = None
    """Of an image without a place in the patient; of another size than the slices it is a page."""


def parse_slice(content: bytes, num_bytes: int, path: Path, number: int, where: str, options: ReadOptions
                ) -> CtSlice | UnfitImage | str:
    """The slice; or why it is none; or in one word what else the file is.

    Args:
        content: the file, or the beginning of one that is too large.
        num_bytes: of the whole file.
        path, number: of the file.
        where: what messages call it.
        options: whether images of other modalities and images without rescale are taken, too.
    """
    try:
        dataset, parsed, at = parse(content, HEADER_TAGS, where)
    except VolumeError as error:
        return _unparsed(content, where, error)
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    has_pixels = parsed[at : at + 4] in PIXEL_TAGS
    series = hashed(tag_text(dataset, "SeriesInstanceUID")) if "SeriesInstanceUID" in dataset or has_pixels else None
    try:
        if syntax == DeflatedExplicitVRLittleEndian and "Modality" not in dataset and "SOPClassUID" not in dataset:
            return _unparsed(content, where, deflated_error(where))
        kind = _kind(dataset, has_pixels, where, options.force)
        if isinstance(kind, str):
            return kind
        if syntax == DeflatedExplicitVRLittleEndian:
            raise deflated_error(where)
        if num_bytes > len(content):
            raise VolumeError("LENGTH", where, "expected at most 512 MiB a slice", _REMEDY)
        if kind and tag_integer(dataset, "NumberOfFrames", where, 1) > 1:
            raise multiframe_error(where)
        if not has_pixels:
            raise _corrupt(where, "it ends before its pixels")
        _check_pixels(dataset, num_bytes, syntax, where)
        return _slice(dataset, kind, path, number, where, options)
    except VolumeError as error:
        return _unfit(dataset, error, series)


def deflated_error(where: str) -> VolumeError:
    """A deflated data set is not inflated: a small file may claim any size."""
    return VolumeError("CODEC", where, f"deflated DICOM ({DeflatedExplicitVRLittleEndian}) is not read",
                       "convert it to an uncompressed transfer syntax")


def _unparsed(content: bytes, where: str, error: VolumeError) -> UnfitImage | str:
    """Of a file whose data set is damaged, group 2 may still say that it is no CT image."""
    try:
        sop_class = read_meta(content, where).sop_class
    except VolumeError:
        sop_class = ""
    return UnfitImage(error, None) if sop_class in ("", CT_IMAGE) else "other"


def _kind(dataset: Any, has_pixels: bool, where: str, force: bool) -> bool | str:
    """Whether an image is marked as CT; or what else it is, in one word."""
    modality = tag_text(dataset, "Modality").upper()
    sop_class = tag_text(dataset, "SOPClassUID") or str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if not modality and not sop_class:
        raise _corrupt(where, "it says neither what it is nor how it was made")
    if sop_class in MULTIFRAME_CT:
        return "multi-frame CT"
    is_secondary = sop_class.startswith(_SECONDARY_CAPTURE)
    has_place = "Rows" in dataset and "ImagePositionPatient" in dataset
    is_ct = sop_class == CT_IMAGE
    if modality == "CT" and not is_ct and not is_secondary:
        # A vendor's own class may be that of a CT image; raw data and what else a CT scanner makes have no place.
        is_ct = sop_class == "" or (has_place and has_pixels)
    if not is_ct and not (force and has_place):
        kind = "secondary capture" if is_secondary else modality
        return kind if (kind in _MODALITIES and kind != "CT") or " " in kind else "other"
    if "LOCALIZER" in tag_text(dataset, "ImageType").upper():
        return "localizer"
    return is_ct


def _unfit(dataset: Any, error: VolumeError, series: str | None) -> UnfitImage:
    """Colours are no CT slice, nor is an image without any place that says that it was made afterwards."""
    try:
        shape = tag_integer(dataset, "Rows", ""), tag_integer(dataset, "Columns", "")
        has_colours = tag_integer(dataset, "SamplesPerPixel", "", 1) != 1
    except VolumeError:
        shape, has_colours = None, False
    has_place = "ImagePositionPatient" in dataset or "ImageOrientationPatient" in dataset
    kinds = tag_text(dataset, "ImageType").upper()
    is_page = has_colours or (not has_place and ("SECONDARY" in kinds or "SCREEN" in kinds))
    return UnfitImage(error, series, is_page, None if has_place else shape)


def _slice(dataset: Any, is_ct: bool, path: Path, number: int, where: str, options: ReadOptions) -> CtSlice:
    shape = (tag_integer(dataset, "Rows", where), tag_integer(dataset, "Columns", where))
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    slope, intercept = _rescale(dataset, where, options)
    orientation, rounding = _orientation(dataset, where)
    instance = tag_text(dataset, "SOPInstanceUID")
    return CtSlice(
        path, number, hashed(instance) if instance else "", hashed(tag_text(dataset, "SeriesInstanceUID")),
        hashed(tag_text(dataset, "PatientID")), hashed(tag_text(dataset, "FrameOfReferenceUID")), syntax, is_ct, shape,
        tag_numbers(dataset, "ImagePositionPatient", 3, where), orientation, _spacing(dataset, where), slope, intercept,
        tag_text(dataset, "RescaleType").upper(), tag_text(dataset, "PhotometricInterpretation"),
        read_acquired(dataset), rounding,
    )


def multiframe_error(where: str | Path) -> VolumeError:
    """Of a file, or of a folder that holds nothing else."""
    return VolumeError("MULTIFRAME", where, "enhanced multi-frame CT is not read",
                       "convert it to single-frame CT images, or to NIfTI")


def _orientation(dataset: Any, where: str) -> tuple[np.ndarray, float]:
    """(2x3 unit vectors at right angles as far as the digits go, half a unit of the last digit)."""
    cosines = tag_numbers(dataset, "ImageOrientationPatient", 6, where)
    rows, columns = cosines[:3], cosines[3:]
    if abs(_dot(rows, columns)) > 0.99:
        raise VolumeError("AFFINE_SINGULAR", where, "expected rows and columns across each other, got "
                          f"ImageOrientationPatient {cosines.tolist()}", _REMEDY)
    lengths = math.sqrt(_dot(rows, rows)), math.sqrt(_dot(columns, columns))
    if max(abs(length - 1) for length in lengths) > _MAX_OFF_UNIT:
        raise VolumeError("TAG_INVALID", where, "expected two directions of length 1 in ImageOrientationPatient",
                          _REMEDY)
    rows, columns = rows / lengths[0], columns / lengths[1]
    rounding = _rounding(cosines)
    off = _dot(rows, columns)
    if abs(off) > 2 * rounding:
        return np.array([rows, columns]), 0.0
    # Of directions that are written with two decimals the angle between is as uncertain as they are.
    if off != 0:
        columns = columns - off * rows
        columns = columns / math.sqrt(_dot(columns, columns))
    return np.array([rows, columns]), rounding


def _rounding(cosines: np.ndarray) -> float:
    """Half a unit of the second or third decimal, where no cosine has more; 0 along the patient's axes."""
    if np.isin(np.abs(cosines), (0, 1)).all():
        return 0.0
    unit = next((unit for unit in (100, 1000) if (np.rint(cosines * unit) / unit == cosines).all()), None)
    return 0.0 if unit is None else 0.5 / unit


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """In this order, which the browser's code has, too."""
    return float(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def _check_pixels(dataset: Any, num_bytes: int, syntax: str, where: str) -> None:
    shape = (tag_integer(dataset, "Rows", where), tag_integer(dataset, "Columns", where))
    if tag_integer(dataset, "SamplesPerPixel", where, 1) != 1:
        raise VolumeError("DTYPE", where, "expected one number a pixel, got colours", "give the CT series itself")
    bits = tag_integer(dataset, "BitsAllocated", where)
    if bits not in (8, 16, 32):
        raise VolumeError("DTYPE", where, f"expected 8, 16 or 32 bits a pixel, got {bits}", _REMEDY)
    if not all(1 <= n <= _MAX_EDGE for n in shape):
        raise VolumeError("LENGTH", where, f"expected 1 to {_MAX_EDGE} rows and columns, got {shape}", _REMEDY)
    uid = UID(syntax)
    if uid.is_transfer_syntax and not uid.is_compressed:
        if math.prod(shape) * bits // 8 > num_bytes:
            raise VolumeError("LENGTH", where, f"{shape[0]} x {shape[1]} pixels need more bytes than the file's "
                              f"{num_bytes}", "the slice is cut or its header is wrong; export it again")
        return
    if not has_decoder(uid):
        name = syntax if all(c in "0123456789." for c in syntax) else "unknown"
        remedy = "convert it to an uncompressed transfer syntax"
        if could_have_decoder(uid):
            remedy = f'pip install "autosam3d[dicom]", or {remedy}'
        elif uid.is_private or not uid.is_transfer_syntax:
            remedy = "export the series from the vendor's system or the archive as Explicit VR Little Endian"
        raise VolumeError("CODEC", where, f"no decoder for the transfer syntax {name}", remedy)


def _rescale(dataset: Any, where: str, options: ReadOptions) -> tuple[float, float]:
    if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset:
        if options.force or options.is_raw:
            return 1.0, 0.0
        raise VolumeError("NOT_HU", where, "expected RescaleSlope and RescaleIntercept, which turn stored numbers into "
                          "Hounsfield units", options.remedy("force", True, "export the series again",
                                                             "; {} takes the stored numbers"))
    slope = float(tag_numbers(dataset, "RescaleSlope", 1, where)[0])
    intercept = float(tag_numbers(dataset, "RescaleIntercept", 1, where)[0])
    if slope == 0 or max(abs(slope), abs(intercept)) > 1e6:
        raise VolumeError("TAG_INVALID", where, f"expected a plausible rescale, got slope {slope:g} and intercept "
                          f"{intercept:g}", _REMEDY)
    return slope, intercept


def _spacing(dataset: Any, where: str) -> tuple[float, float]:
    rows, columns = tag_numbers(dataset, "PixelSpacing", 2, where)
    if rows <= 0 or columns <= 0:
        raise VolumeError("TAG_INVALID", where, f"expected a positive PixelSpacing, got {rows:g} and {columns:g}",
                          _REMEDY)
    return float(rows), float(columns)


def _corrupt(where: str, fault: str) -> VolumeError:
    return VolumeError("SLICE_CORRUPT", where, fault, _REMEDY)

