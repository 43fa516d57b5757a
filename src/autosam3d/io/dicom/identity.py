"""The identity of one DICOM file, from its header alone: its kind and the UIDs of object, series and study."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.files import dicom_bytes
from autosam3d.io.dicom.header import deflated_error
from autosam3d.io.dicom.meta import PIXEL_TAGS, parse
from autosam3d.io.dicom.tags import quiet_pydicom, tag_text
from autosam3d.io.files import open_regular, readable

# isort: split
# Below the tags, which say what to install where pydicom is absent.
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

_TAGS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "BodyPartExamined",
         "SeriesDescription", "ImageType", "SliceThickness", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
         "SamplesPerPixel"]
# Numbers separated by dots; leading zeros are invalid but common.
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
_REMEDY = "send or export it again"
# Headers of multi-frame images have a few kilobytes a frame.
_MAX_HEADER_BYTES = 16 << 20
# How much may follow the pixels, such as padding.
_MAX_TRAILER_BYTES = 1 << 16
_UNDEFINED_LENGTH = 0xFFFFFFFF
# Above any thickness in mm and any number of frames; also excludes NaN and infinity.
_MAX_NUMBER = 1e6
# (FFFE,E000) begins a fragment of compressed pixels, (FFFE,E0DD) with its length of zero ends them.
# *Source*: DICOM PS3.5 section A.4.
_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"


@dataclass(frozen=True, kw_only=True)
class DicomIdentity:
    """UIDs, and the tags that a rule tests; texts are the file's own and may name a patient."""

    study: str
    series: str
    instance: str
    sop_class: str
    modality: str
    body_part: str
    description: str
    image_type: str
    thickness_mm: float | None
    num_frames: int
    """As the header says; of `identify_image`, at most as many as its pixels can be."""


def identify(path: Path, where: str) -> DicomIdentity:
    """Read the header of one file.

    Args:
        path: of the file.
        where: its name in messages.

    Raises:
        VolumeError: NOT_DICOM, SLICE_CORRUPT, NESTING, LENGTH, CODEC, UNREADABLE; TAG_INVALID where a UID is missing or
            invalid.
    """
    with quiet_pydicom():
        content = dicom_bytes(path, where)
        if content is None:
            raise VolumeError("NOT_DICOM", where, "expected a DICOM file", _REMEDY)
        return _identity(_header(content, where)[0], where)


def identify_image(path: Path, where: str) -> DicomIdentity:
    """As `identify`, for an image of any size without reading all of it; it must be complete to the end of its pixels.

    Raises:
        VolumeError: as `identify`.
    """
    with quiet_pydicom(), open_regular(path) as file, readable(where):
        header, at = _header(file.read(_MAX_HEADER_BYTES), where)
        identity = _identity(header, where)
        most = _most_frames(file, header, _whole_pixels(file, header, at, where), identity.num_frames)
    return replace(identity, num_frames=max(1, min(identity.num_frames, most)))


def _header(content: bytes, where: str) -> tuple[Any, int]:
    """(the tags that are asked for, where the pixels begin)."""
    try:
        header, _, at = parse(content, _TAGS, where)
    except VolumeError as error:
        raise VolumeError(error.code, where, error.fault, _REMEDY) from None
    if header.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        raise deflated_error(where)
    return header, at


def _whole_pixels(file: BinaryIO, header: Any, at: int, where: str) -> tuple[int, int]:
    """(where the pixels' bytes begin, their number or `_UNDEFINED_LENGTH`); raises where they are not whole."""
    syntax = UID(str(getattr(header, "file_meta", {}).get("TransferSyntaxUID", "")))
    size = os.fstat(file.fileno()).st_size
    file.seek(at)
    element = file.read(12)
    is_whole = len(element) == 12 and element[:4] in PIXEL_TAGS
    begin = length = 0
    if is_whole:
        # Tag and length, with the VR and two reserved bytes between. *Source*: DICOM PS3.5 section 7.1.
        begin = 8 if syntax.is_transfer_syntax and syntax.is_implicit_VR else 12
        length = int.from_bytes(element[begin - 4 : begin], "big" if syntax == ExplicitVRBigEndian else "little")
        if length == _UNDEFINED_LENGTH:
            file.seek(max(at + begin, size - _MAX_TRAILER_BYTES))
            is_whole = _SEQUENCE_END in file.read(_MAX_TRAILER_BYTES)
        else:
            is_whole = 0 < length <= size - at - begin
    if not is_whole:
        raise VolumeError("SLICE_CORRUPT", where, "it ends before or inside its pixels", _REMEDY)
    return at + begin, length


def _most_frames(file: BinaryIO, header: Any, pixels: tuple[int, int], claimed: int) -> int:
    """How many frames the pixels can be: by their number of bytes, or where they are compressed by their fragments."""
    at, length = pixels
    if length != _UNDEFINED_LENGTH:
        sizes = [_number(tag_text(header, keyword)) or 0 for keyword in ("Rows", "Columns", "BitsAllocated")]
        frame_bits = math.prod(sizes) * (_number(tag_text(header, "SamplesPerPixel")) or 1)
        return int(8 * length // frame_bits) if frame_bits > 0 else 1
    num, is_table = 0, True
    while num < claimed:
        file.seek(at)
        item = file.read(8)
        if item[:4] != _ITEM or len(item) < 8:
            break
        size = int.from_bytes(item[4:], "little")
        # The first item is the table of offsets; an empty one is no part of a frame.
        num += size > 0 and not is_table
        is_table, at = False, at + 8 + size
    return num


def _identity(header: Any, where: str) -> DicomIdentity:
    texts = {keyword: tag_text(header, keyword) for keyword in _TAGS}
    uids = [texts[keyword] for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    if not all(_UID.fullmatch(uid) for uid in uids):
        raise VolumeError("TAG_INVALID", where, "expected valid UIDs of study, series and object", _REMEDY)
    return DicomIdentity(
        study=uids[0], series=uids[1], instance=uids[2], sop_class=texts["SOPClassUID"],
        modality=texts["Modality"].upper(), body_part=texts["BodyPartExamined"],
        description=texts["SeriesDescription"], image_type="\\".join(_image_type(texts["ImageType"])),
        thickness_mm=_number(texts["SliceThickness"]), num_frames=max(1, int(_number(texts["NumberOfFrames"]) or 1)),
    )


def _image_type(text: str) -> list[str]:
    """The words of an ImageType, whose values `tag_text` shows as a Python list."""
    return [word.strip(" '\"") for word in text.strip("[]").split(",")]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < _MAX_NUMBER else None
