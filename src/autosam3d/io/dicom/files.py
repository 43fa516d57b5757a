"""One DICOM file at a time: found, parsed with distrust, its pixels decoded to Hounsfield units.

No name, number, date or text of a patient leaves this module: messages name a file by its place in the sorted
folder, and identifiers are kept as hashes only.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.io.dicom.tags import DAMAGE, hashed, quiet_pydicom, tag_integer, tag_numbers, tag_text
from autosam3d.io.files import open_regular, readable
from autosam3d.io.memory import size_text

# isort: split
# Below the tags, which say what to install where pydicom is absent.
import pydicom
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from autosam3d.io.dicom.syntaxes import has_decoder

MAX_FILE_BYTES = 512 << 20
_REMEDY = "copy or export the series again"
_MAX_FILES = 100_000
_MAX_FOLDER_LEVELS = 8
_MAX_EDGE = 8192
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTIFRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# pydicom inflates this syntax without any cap, so the bytes must not reach it.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
# Modalities by their codes; what stands in the tag may be free text and is not repeated. *Source*: PS3.3 C.7.3.1.1.1.
_MODALITIES = frozenset(("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SR", "SEG", "RTSTRUCT",
                         "RTPLAN", "RTDOSE", "RTIMAGE", "REG", "PR", "KO", "DOC"))
# What is left out, as one and as several; other kinds are modalities.
_KINDS = {
    "foreign": ("file that is not DICOM", "files that are not DICOM"),
    "link": ("link", "links"),
    "hidden": ("DICOMDIR or hidden file", "DICOMDIR or hidden files"),
    "localizer": ("localizer", "localizers"),
    "secondary capture": ("secondary capture", "secondary captures"),
    "other": ("DICOM file of another kind", "DICOM files of other kinds"),
}
# (7FE0,0010) in both byte orders.
PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SamplesPerPixel",
    "NumberOfFrames", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
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
    """2x3, the directions in which columns and rows are counted, in LPS."""
    spacing_mm: tuple[float, float]
    """(between rows, between columns)."""
    slope: float
    intercept: float
    rescale_type: str
    photometric: str


@dataclass(frozen=True)
class Folder:
    """What `scan_folder` found: images, and how much of what else."""

    slices: list[CtSlice]
    num_files: int
    others: Counter[str]


def count_text(count: int, kind: str) -> str:
    """``2 files that are not DICOM``, for a kind of `Folder.others`."""
    one, several = _KINDS.get(kind, (f"{kind} object", f"{kind} objects"))
    return f"{count} {one if count == 1 else several}"


def scan_folder(folder: Path, force: bool) -> Folder:
    """The headers of all CT images below `folder`; links are not followed and DICOMDIR is not believed.

    Args:
        force: take images of other modalities and images without rescale, too.

    Raises:
        VolumeError: NO_DICOM, SLICE_CORRUPT, LENGTH, NESTING, MULTIFRAME, TAG_MISSING, TAG_INVALID, DTYPE, NOT_HU,
            CODEC, MODALITY, TOO_MANY_FILES, UNREADABLE.
    """
    paths, others = _files_below(folder)
    slices: list[CtSlice] = []
    num_dicom = 0
    with quiet_pydicom():
        for number, path in enumerate(paths, start=1):
            where = f"{folder}: file {number} of {len(paths)}"
            content = dicom_bytes(path, where)
            if content is None:
                others["foreign"] += 1
                continue
            num_dicom += 1
            found = _parse_slice(content, path, number, where, force)
            if isinstance(found, str):
                others[found] += 1
            else:
                slices.append(found)
    found_text = ", ".join(count_text(count, kind) for kind, count in sorted(others.items())) or "no file at all"
    if num_dicom == 0:
        raise VolumeError("NO_DICOM", folder, f"expected a folder with DICOM files, found {found_text}",
                          "name the folder that holds the slices, or a .nii.gz file")
    if not slices:
        raise VolumeError("MODALITY", folder, f"expected CT images, found {found_text}",
                          "name a folder with a CT series; --force takes images of other modalities")
    return Folder(slices, len(paths), others)


def decode_hu(ct_slice: CtSlice, where: str) -> tuple[np.ndarray, bool]:
    """(float32 [rows, columns] in HU, whether bits above BitsStored were dropped).

    Raises:
        VolumeError: SLICE_CORRUPT, LENGTH, UNREADABLE.
    """
    content = dicom_bytes(ct_slice.path, where)
    if content is None:
        raise _corrupt(where, "it is no DICOM file any more")
    with quiet_pydicom():
        dataset, _ = _parse(content, where, stop_before_pixels=False)
        try:
            _demand_whole_pixels(dataset, ct_slice, where)
            whole = _native_pixels(dataset, ct_slice)
            stored, dropped = (dataset.pixel_array, False) if whole is None else _stored_bits(whole, dataset)
        except DAMAGE:
            raise _corrupt(where, "its pixels cannot be decoded") from None
        except MemoryError:
            raise VolumeError("LENGTH", where, "its pixels claim more memory than there is", _REMEDY) from None
    if stored.shape != ct_slice.shape:
        raise _corrupt(where, f"expected {ct_slice.shape} pixels, got {stored.shape}")
    return (stored * np.float64(ct_slice.slope) + ct_slice.intercept).astype(np.float32), dropped


def _files_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    others: Counter[str] = Counter()
    paths: list[Path] = []
    with readable(folder):
        root_level = len(folder.parts)
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders.sort()
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
    return paths, others


def _raise(error: OSError) -> None:
    raise error


def dicom_bytes(path: Path, where: str) -> bytes | None:
    """The whole file, or None where it is not DICOM."""
    try:
        with open_regular(path) as file, readable(where):
            start = file.read(132)
            # Old files lack the preamble and begin with group 0008 at once.
            old = len(start) == 132 and start[:2] == b"\x08\x00" and start[3:4] == b"\x00"
            if start[128:] != b"DICM" and not old:
                if len(start) < 132 and path.suffix.lower() in (".dcm", ".ima"):
                    raise _corrupt(where, f"it has {len(start)} bytes only")
                return None
            content = start + file.read(MAX_FILE_BYTES + 1 - len(start))
    except (VolumeError, ResourceError) as error:  # whose place would be the file's own name
        raise type(error)(error.code, where, error.fault, error.remedy) from None
    if len(content) > MAX_FILE_BYTES:
        raise VolumeError("LENGTH", where, f"expected at most {size_text(MAX_FILE_BYTES)} a slice", _REMEDY)
    if _DEFLATED in content:
        raise VolumeError("CODEC", where, f"deflated DICOM ({_DEFLATED.decode()}) is not read",
                          "convert it to an uncompressed transfer syntax")
    return content


def _parse(content: bytes, where: str, stop_before_pixels: bool) -> tuple[Any, bool]:
    """(dataset, whether parsing came as far as the pixels)."""
    # From memory a forged length costs nothing: no more can be read than there is.
    buffer = io.BytesIO(content)
    tags = _HEADER_TAGS if stop_before_pixels else [*_HEADER_TAGS, "PixelData"]
    try:
        dataset = pydicom.dcmread(buffer, stop_before_pixels=stop_before_pixels, force=True, specific_tags=tags)
    except RecursionError:
        raise VolumeError("NESTING", where, "its sequences are nested too deeply", _REMEDY) from None
    except DAMAGE:
        raise _corrupt(where, "it is cut or damaged") from None
    at = buffer.tell()
    return dataset, content[at : at + 4] in PIXEL_TAGS


def _parse_slice(content: bytes, path: Path, number: int, where: str, force: bool) -> CtSlice | str:
    """The slice, or in one word what else the file is."""
    dataset, has_pixels = _parse(content, where, stop_before_pixels=True)
    modality = tag_text(dataset, "Modality").upper()
    meta = getattr(dataset, "file_meta", {})
    sop_class = tag_text(dataset, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", ""))
    if not modality and not sop_class:
        raise _corrupt(where, "it says neither what it is nor how it was made")
    is_ct = sop_class == CT_IMAGE or (modality == "CT" and not sop_class.startswith(_SECONDARY_CAPTURE))
    if sop_class in MULTIFRAME_CT or (is_ct and tag_integer(dataset, "NumberOfFrames", where, 1) > 1):
        raise VolumeError("MULTIFRAME", where, "enhanced multi-frame CT is not read",
                          "convert it to single-frame CT images, or to NIfTI")
    if not is_ct and not (force and "Rows" in dataset and "ImagePositionPatient" in dataset):
        kind = "secondary capture" if sop_class.startswith(_SECONDARY_CAPTURE) else modality
        return kind if kind in _MODALITIES or " " in kind else "other"
    if "LOCALIZER" in tag_text(dataset, "ImageType").upper():
        return "localizer"
    if not has_pixels:
        raise _corrupt(where, "it ends before its pixels")
    shape = (tag_integer(dataset, "Rows", where), tag_integer(dataset, "Columns", where))
    syntax = str(meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    _check_pixels(dataset, shape, len(content), syntax, where)
    slope, intercept = _rescale(dataset, where, force)
    orientation = tag_numbers(dataset, "ImageOrientationPatient", 6, where).reshape(2, 3)
    if abs(float(orientation[0] @ orientation[1])) > 0.99:
        raise VolumeError("AFFINE_SINGULAR", where, "expected rows and columns across each other, got "
                          f"ImageOrientationPatient {orientation.ravel().tolist()}", _REMEDY)
    if np.abs(np.linalg.norm(orientation, axis=1) - 1).max() > 0.01:
        raise VolumeError("TAG_INVALID", where, "expected two directions of length 1 in ImageOrientationPatient",
                          _REMEDY)
    instance = tag_text(dataset, "SOPInstanceUID")
    return CtSlice(
        path, number, hashed(instance) if instance else "", hashed(tag_text(dataset, "SeriesInstanceUID")),
        hashed(tag_text(dataset, "PatientID")), hashed(tag_text(dataset, "FrameOfReferenceUID")), syntax, is_ct, shape,
        tag_numbers(dataset, "ImagePositionPatient", 3, where), orientation, _spacing(dataset, where), slope, intercept,
        tag_text(dataset, "RescaleType").upper(), tag_text(dataset, "PhotometricInterpretation"),
    )


def _check_pixels(dataset: Any, shape: tuple[int, int], num_bytes: int, syntax: str, where: str) -> None:
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
        raise VolumeError("CODEC", where, f"no decoder for the transfer syntax {name}",
                          'pip install "autosam3d[dicom]", or convert it to an uncompressed transfer syntax')


def _rescale(dataset: Any, where: str, optional: bool) -> tuple[float, float]:
    if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset:
        if optional:
            return 1.0, 0.0
        raise VolumeError("NOT_HU", where, "expected RescaleSlope and RescaleIntercept, which turn stored numbers into "
                          "Hounsfield units", "export the series again; --force takes the stored numbers")
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


def _demand_whole_pixels(dataset: Any, ct_slice: CtSlice, where: str) -> None:
    """Uncompressed pixels must all be there; compressed ones are parsed to their end marker."""
    if "PixelData" not in dataset:
        raise _corrupt(where, "it is cut inside its pixels")
    if not UID(ct_slice.transfer_syntax).is_compressed:
        expected = math.prod(ct_slice.shape) * int(dataset.BitsAllocated) // 8
        if len(dataset.PixelData) < expected:
            raise _corrupt(where, f"expected {expected} bytes of pixels, got {len(dataset.PixelData)}")


def _native_pixels(dataset: Any, ct_slice: CtSlice) -> np.ndarray | None:
    """Uncompressed pixels with all their allocated bits; None where a decoder has to be asked."""
    bits = int(dataset.BitsAllocated)
    is_big_endian = ct_slice.transfer_syntax == ExplicitVRBigEndian
    if UID(ct_slice.transfer_syntax).is_compressed or (is_big_endian and bits == 8):  # bytes swapped in words
        return None
    kind = "i" if int(dataset.PixelRepresentation) else "u"
    dtype = np.dtype(f"{'>' if is_big_endian else '<'}{kind}{bits // 8}")
    pixels = np.frombuffer(dataset.PixelData, dtype, math.prod(ct_slice.shape)).reshape(ct_slice.shape)
    return pixels.astype(dtype.newbyteorder("="))


def _stored_bits(whole: np.ndarray, dataset: Any) -> tuple[np.ndarray, bool]:
    """(the BitsStored bits below HighBit, sign-extended; whether anything else stood above them).

    Older scanners keep overlays in the bits above. *Source*: DICOM PS3.5 section 8.1.1.
    """
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high = int(dataset.get("HighBit", bits - 1))
    if not (1 <= bits <= allocated and bits - 1 <= high < allocated):
        raise ValueError("BitsStored and HighBit do not fit BitsAllocated")
    if bits == allocated:
        return whole, False
    # Up to the top bit and down again: what lies above goes, and an arithmetic shift repeats the sign.
    stored = np.right_shift(np.left_shift(whole, allocated - 1 - high), allocated - bits)
    above = np.right_shift(whole, high + 1) if high + 1 < allocated else np.zeros_like(whole)
    return stored, bool(((above != 0) & ((above != -1) | (stored >= 0))).any())


def _corrupt(where: str, fault: str) -> VolumeError:
    return VolumeError("SLICE_CORRUPT", where, fault, _REMEDY)

