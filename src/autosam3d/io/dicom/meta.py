"""Where a DICOM file's data set begins, and in which form: its file meta information, read without a library.

pydicom inflates a data set that is named deflated, without any cap. So the transfer syntax is read here first, from
group 2 alone, and pydicom is given the data set with its form.
"""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import dataclass
from typing import Any

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.tags import DAMAGE

# isort: split
# Below the tags, which say what to install where pydicom is absent.
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

# (7FE0,0010) in both byte orders.
PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
# Value representations with a length of 32 bits. *Source*: DICOM PS3.5 section 7.1.2.
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_UNDEFINED_LENGTH = 0xFFFFFFFF
_MAX_UID_BYTES = 64
# Of a deflated data set no more than this is inflated, to learn which series it is of.
_MAX_INFLATED_BYTES = 1 << 20
_PIXEL_ELEMENTS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_REMEDY = "copy or export the series again"


@dataclass(frozen=True)
class FileMeta:
    """Of one file: what follows group 2, and from which byte on."""

    syntax: str
    """Transfer syntax; "" where none is named."""
    sop_class: str
    """Media Storage SOP Class UID; "" where none is named."""
    begin: int

    @property
    def is_deflated(self) -> bool:
        return self.syntax == DeflatedExplicitVRLittleEndian


def read_meta(content: bytes, where: str) -> FileMeta:
    """Group 2, which is explicit and little-endian in every file. *Source*: DICOM PS3.10 section 7.1.

    Raises:
        VolumeError: SLICE_CORRUPT where an element of it has no end.
    """
    at = 132 if content[128:132] == b"DICM" else 0
    texts = {0x0002: "", 0x0010: ""}
    while content[at : at + 2] == b"\x02\x00" and at + 8 <= len(content):
        element = int.from_bytes(content[at + 2 : at + 4], "little")
        is_long = content[at + 4 : at + 6] in _LONG
        start = at + (12 if is_long else 8)
        length = int.from_bytes(content[at + (8 if is_long else 6) : start], "little")
        if length == _UNDEFINED_LENGTH or start + length > len(content):
            raise VolumeError("SLICE_CORRUPT", where, "it is cut or damaged", _REMEDY)
        if element in texts:
            value = content[start : start + min(length, _MAX_UID_BYTES)]
            texts[element] = value.decode("ascii", "replace").rstrip("\0 ").strip()
        at = start + length
    return FileMeta(texts[0x0010], texts[0x0002], at)


def parse(content: bytes, tags: list[str], where: str, *, with_pixels: bool = False) -> tuple[Any, bytes, int]:
    """(a data set with these tags and its `file_meta`; the bytes that it was parsed from; where parsing ended in them).

    Of a deflated file the first megabyte is inflated and parsed, without pixels.

    Args:
        content: a file, or its beginning.
        tags: keywords.
        where: what messages call the file.
        with_pixels: also the pixels; else parsing ends before them.

    Raises:
        VolumeError: NESTING, SLICE_CORRUPT.
    """
    meta = read_meta(content, where)
    begin, syntax = meta.begin, meta.syntax
    if meta.is_deflated:
        content, begin = _inflated(content[begin:]), 0
    buffer = io.BytesIO(content)  # from memory a forged length costs nothing: no more can be read than there is
    buffer.seek(begin)
    # Where no syntax is named, two capital letters behind the first tag are a value representation.
    is_implicit = syntax == ImplicitVRLittleEndian if syntax else not _is_vr(content[begin + 4 : begin + 6])
    wanted = [Tag(tag_for_keyword(keyword) or 0) for keyword in (*tags, *(["PixelData"] if with_pixels else ()))]
    try:
        dataset: Any = read_dataset(
            buffer, is_implicit, syntax != ExplicitVRBigEndian, specific_tags=list(wanted),
            stop_when=None if with_pixels else lambda tag, vr, length: tag in _PIXEL_ELEMENTS)
    except RecursionError:
        raise VolumeError("NESTING", where, "its sequences are nested too deeply", _REMEDY) from None
    except DAMAGE:
        raise VolumeError("SLICE_CORRUPT", where, "it is cut or damaged", _REMEDY) from None
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax or ImplicitVRLittleEndian)
    dataset.file_meta.MediaStorageSOPClassUID = UID(meta.sop_class)
    return dataset, content, buffer.tell()


def _is_vr(text: bytes) -> bool:
    return len(text) == 2 and text.isalpha() and text.isupper()


def _inflated(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(packed[:_MAX_INFLATED_BYTES], _MAX_INFLATED_BYTES)
    except zlib.error:
        return b""


def raw_number(dataset: Dataset, keyword: str) -> tuple[int, int] | None:
    """(the bits of a tag's first number, how many), whatever the file calls it: US, SS, neither, or text; None where
    there is none. Only of a tag that was not asked for before."""
    element: Any = dataset.get_item(keyword)
    if element is None:
        return None
    value: bytes = element.value or b""
    if element.VR in ("DS", "IS", "LO", "SH"):
        text = value.split(b"\\")[0].strip(b" \0")
        return (int(text) & 0xFFFF, 16) if re.fullmatch(rb"[+-]?\d{1,5}", text) else None
    size = 4 if element.VR in ("UL", "SL") else 2
    if len(value) < size:
        return None
    return int.from_bytes(value[:size], "little" if element.is_little_endian else "big"), 8 * size
