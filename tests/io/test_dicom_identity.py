"""How many frames one file is counted as: what its header claims, as far as its pixels reach."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")

import sys

sys.path.insert(0, str(Path(__file__).parents[1] / "badinput"))

import make_dicom as bad
from pydicom.encaps import encapsulate
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.identity import identify_image


def _frames(path: Path, claimed: object, content: bytes, *, rows: int = 4, bits: int = 16, syntax: str = "") -> int:
    ds = bad.make_slice(0, np.zeros((20, 20), np.int16), 0.0)
    ds.Rows, ds.Columns, ds.BitsAllocated = rows, 4, bits
    if claimed is not None:
        ds.NumberOfFrames = claimed
    ds.PixelData = content
    if syntax:
        ds.file_meta.TransferSyntaxUID = syntax
        ds["PixelData"].is_undefined_length = syntax == RLELossless
    bad.save(ds, path)
    return identify_image(path, "x").num_frames


@pytest.mark.parametrize(("claimed", "num_bytes", "num"), [
    (None, 32, 1), (1, 32, 1), (3, 96, 3), (999_999, 32, 1), (999_999, 96, 3), (999_999, 126, 3), (2, 320, 2),
    (0, 32, 1), (-5, 32, 1), (999_999, 4, 1),
])
def test_frames_of_plain_pixels(claimed: int | None, num_bytes: int, num: int, tmp_path: Path) -> None:
    assert _frames(tmp_path / "x.dcm", claimed, bytes(num_bytes)) == num
    assert _frames(tmp_path / "x.dcm", claimed, bytes(num_bytes), syntax=ImplicitVRLittleEndian) == num


def test_frames_without_a_size(tmp_path: Path) -> None:
    assert _frames(tmp_path / "x.dcm", 999_999, bytes(320), rows=0) == 1
    assert _frames(tmp_path / "x.dcm", 999_999, bytes(320), bits=0) == 1
    assert _frames(tmp_path / "x.dcm", 8, bytes(16), bits=1) == 8  # sixteen bits a frame


@pytest.mark.parametrize(("claimed", "parts", "num"), [
    (999_999, 1, 1), (999_999, 3, 3), (2, 3, 2), (999_999, 5000, 5000),
])
def test_frames_of_compressed_pixels(claimed: int, parts: int, num: int, tmp_path: Path) -> None:
    content = encapsulate([b"ab"] * parts, has_bot=parts < 10)
    assert _frames(tmp_path / "x.dcm", claimed, content, syntax=RLELossless) == num


def test_empty_fragments_are_no_frames(tmp_path: Path) -> None:
    empty = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    content = empty * 1000 + struct.pack("<HHI", 0xFFFE, 0xE000, 2) + b"ab"
    assert _frames(tmp_path / "x.dcm", 999_999, content, syntax=RLELossless) == 1
    broken = empty + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFF0) + b"ab"
    try:
        assert _frames(tmp_path / "x.dcm", 999_999, broken, syntax=RLELossless) == 1
    except VolumeError as error:
        assert error.code == "SLICE_CORRUPT"
