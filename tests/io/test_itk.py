"""NRRD and MetaImage: voxels and places are those that ITK has; what is broken or ambiguous is refused as in NIfTI."""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from autosam3d.errors import AutoSam3dError
from autosam3d.io import ReadOptions, read_ct, read_segmentation, write_segmentation
from autosam3d.io.itk.read import files_of
from autosam3d.labels import LabelMap
from autosam3d.volume import same_grid

SHAPE = (12, 20, 24)  # z, y, x of the file
SPACING = (1.5, 1.25, 3.0)
ENDINGS = (".nrrd", ".mha", ".mhd")
NRRD = """NRRD0004
# made by hand
type: int16
dimension: 3
space: left-posterior-superior
sizes: 24 20 12
space directions: (1.5,0,0) (0,1.25,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (-10,20,5)
"""
MHA = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = -10 20 5
CenterOfRotation = 0 0 0
ElementSpacing = 1.5 1.25 3
DimSize = 24 20 12
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


def _hu() -> np.ndarray:
    """int16 [z, y, x] of the file, no axis like another."""
    hu = np.random.default_rng(0).normal(0, 200, SHAPE).astype(np.int16)
    hu[:, :5] = -1000
    return hu


def _image(array: np.ndarray, direction: np.ndarray | None = None) -> Any:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin((-10.0, 20.0, 5.0))
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    return image


def _directions() -> list[np.ndarray]:
    """The 48 axis orders and an oblique one."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            found.append(np.eye(3)[:, order] * signs)
    c, s = np.cos(0.3), np.sin(0.3)
    return [*found, np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])]


def _demand_places(volume: Any, image: Any) -> None:
    """Every voxel has the value and the place that ITK says, found anew by its coordinates."""
    array = sitk.GetArrayFromImage(image)
    for index in [(0, 0, 0), (23, 0, 0), (0, 19, 0), (0, 0, 11), (7, 3, 9)]:
        ras = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        x, y, z = np.rint(np.linalg.inv(volume.affine) @ [*ras, 1.0])[:3].astype(int)
        np.testing.assert_allclose(volume.affine[:3] @ [x, y, z, 1.0], ras, atol=1e-3)
        assert volume.voxels_hu[z, y, x] == array[index[::-1]]
    assert (volume.affine[:3, :3].argmax(axis=0) == (0, 1, 2)).all()  # to the right, the front and the head


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_every_orientation_lies_where_itk_has_it(ending: str, tmp_path: Path) -> None:
    for direction in _directions():
        image = _image(_hu(), direction)
        sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
        volume = read_ct(tmp_path / f"a{ending}")
        assert volume.warnings == ()
        _demand_places(volume, image)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_scan_as_nifti(ending: str, compressed: bool, tmp_path: Path) -> None:
    image = _image(_hu())
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"), useCompression=compressed)
    expected, found = read_ct(tmp_path / "a.nii.gz"), read_ct(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(found.voxels_hu, expected.voxels_hu)
    assert same_grid(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_every_type_gives_exact_labels(ending: str, dtype: Any, tmp_path: Path) -> None:
    labels = (np.indices(SHAPE).sum(axis=0) % 5).astype(dtype)
    sitk.WriteImage(_image(labels), str(tmp_path / f"a{ending}"))
    found = read_segmentation(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(found.labels, labels[:, ::-1, ::-1])  # LPS in the file, RAS in memory


def _nrrd(text: str = NRRD, voxels: bytes | None = None) -> bytes:
    return text.encode() + b"\n" + (_hu().tobytes() if voxels is None else voxels)


def _mha(text: str = MHA, voxels: bytes | None = None) -> bytes:
    return text.encode() + (_hu().tobytes() if voxels is None else voxels)


def _read(tmp_path: Path, content: bytes, name: str = "a.img3d", options: ReadOptions | None = None) -> Any:
    (tmp_path / name).write_bytes(content)
    return read_ct(tmp_path / name, options or ReadOptions())


def test_both_by_hand_and_in_either_byte_order(tmp_path: Path) -> None:
    """Told by content, not by name: a service knows no names."""
    expected = _hu()[:, ::-1, ::-1]
    swapped = _hu().astype(">i2").tobytes()
    for content in (_nrrd(), _mha(), _nrrd(NRRD.replace("little", "big"), swapped),
                    _mha(MHA.replace("MSB = False", "MSB = True"), swapped),
                    NRRD.replace("\n", "\r\n").encode() + b"\r\n" + _hu().tobytes(),
                    _nrrd(NRRD.replace("raw", "gzip"), gzip.compress(_hu().tobytes())),
                    _mha(MHA.replace("Data = False", "Data = True"), zlib.compress(_hu().tobytes())),
                    _mha() + bytes(100)):
        np.testing.assert_array_equal(_read(tmp_path, content).voxels_hu, expected)
    ras = _read(tmp_path, _nrrd(NRRD.replace("left-posterior", "right-anterior")))
    np.testing.assert_array_equal(ras.voxels_hu, _hu())
    np.testing.assert_array_equal(ras.affine[:3, 3], (-10, 20, 5))


_REFUSED = {
    "cut": (lambda: _nrrd()[:-1], "SIZE"),
    "cut in the header": (lambda: NRRD.encode()[:80], "TRUNCATED"),
    "cut mha": (lambda: _mha()[:-1], "SIZE"),
    "cut in the mha header": (lambda: MHA.encode()[:80], "TRUNCATED"),
    "more voxels": (lambda: _nrrd() + b"\1", "TRAILING"),
    "more compressed voxels": (
        lambda: _nrrd(NRRD.replace("raw", "gz"), gzip.compress(_hu().tobytes() + b"\1")), "TRAILING"),
    "fewer compressed voxels": (lambda: _nrrd(NRRD.replace("raw", "gz"), gzip.compress(_hu().tobytes()[:-2])), "SIZE"),
    "terabytes": (lambda: _nrrd(NRRD.replace("24 20 12", "800 800 400")), "SIZE"),
    "no size": (lambda: _nrrd(NRRD.replace("24 20 12", "24 -20 12")), "DIMS"),
    "2D": (lambda: _mha(MHA.replace("NDims = 3", "NDims = 2").replace("24 20 12", "24 20")), "NDIM"),
    "dimension and sizes differ": (lambda: _nrrd(NRRD.replace("dimension: 3", "dimension: 2")), "NDIM"),
    "detached": (lambda: _nrrd(NRRD + "data file: a.raw\n"), "PAIR"),
    "a path": (lambda: _mha(MHA.replace("LOCAL", "../etc/passwd")), "PAIR"),
    "a list": (lambda: _mha(MHA.replace("LOCAL", "LIST")), "PAIR"),
    "text": (lambda: _nrrd(NRRD.replace("raw", "ascii")), "CODEC"),
    "text mha": (lambda: _mha(MHA.replace("BinaryData = True", "BinaryData = False")), "CODEC"),
    "colours": (lambda: _mha(MHA + "", None).replace(b"NDims", b"ElementNumberOfChannels = 3\nNDims", 1), "DTYPE"),
    "block": (lambda: _nrrd(NRRD.replace("int16", "block")), "DTYPE"),
    "no endian": (lambda: _nrrd(NRRD.replace("endian: little\n", "")), "HEADER"),
    "no byte order": (lambda: _mha(MHA.replace("BinaryDataByteOrderMSB = False\n", "")), "HEADER"),
    "no space": (lambda: _nrrd(NRRD.replace("space: left-posterior-superior", "space dimension: 3")), "NO_ORIENTATION"),
    "no directions": (lambda: _nrrd(re.sub("space directions.*", "spacings: 1.5 1.25 3", NRRD)), "NO_ORIENTATION"),
    "no matrix": (lambda: _mha(re.sub("TransformMatrix.*\n", "", MHA)), "NO_ORIENTATION"),
    "no origin": (lambda: _nrrd(NRRD.replace("space origin: (-10,20,5)\n", "")), "HEADER"),
    "a field twice": (lambda: _nrrd(NRRD + "endian: big\n"), "HEADER"),
    "no field": (lambda: _mha(MHA.replace("NDims", "Doe Jane\nNDims")), "HEADER"),
    "sheared": (lambda: _nrrd(NRRD.replace("(0,1.25,0)", "(0.3,1.25,0)")), "AFFINE_SHEAR"),
    "flat": (lambda: _nrrd(NRRD.replace("(0,1.25,0)", "(1.5,0,0)")), "AFFINE_SINGULAR"),
    "NaN": (lambda: _mha(MHA.replace("-10 20 5", "nan 20 5")), "AFFINE_NONFINITE"),
    "spacing 0": (lambda: _mha(MHA.replace("1.5 1.25 3", "1.5 0 3")), "SPACING"),
    "spacing of a microscope": (lambda: _nrrd(NRRD + 'space units: "um" "um" "um"\n'), "SPACING"),
    "unknown unit": (lambda: _nrrd(NRRD + 'space units: "px" "px" "px"\n'), "HEADER"),
    "scaled": (lambda: _mha("ElementToIntensityFunctionSlope = 2\n" + MHA).replace(
        b"ElementToIntensityFunctionSlope = 2\nObjectType = Image", b"ObjectType = Image\n"
        b"ElementToIntensityFunctionSlope = 2"), "SCALE"),
    "no CT": (lambda: _nrrd(voxels=(np.abs(_hu()) % 256).astype(np.int16).tobytes()), "NOT_HU"),
    "a long header": (lambda: _nrrd(NRRD + "# Doe\n" * 300_000), "TRUNCATED"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_is_broken_or_ambiguous_is_refused(name: str, tmp_path: Path) -> None:
    make, code = _REFUSED[name]
    with pytest.raises(AutoSam3dError) as caught:
        _read(tmp_path, make())
    assert caught.value.code == code and caught.value.exit_code == 3


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_no_flipped_bit_of_compressed_voxels_passes(ending: str, tmp_path: Path) -> None:
    """Of these, SimpleITK takes most in a MetaImage."""
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(_image(_hu()), str(path), useCompression=True)
    good, random = path.read_bytes(), np.random.default_rng(1)
    voxels = len(good) - 5000
    expected = read_ct(path).voxels_hu
    for _ in range(60):
        bad, place = bytearray(good), int(random.integers(voxels, len(good)))
        bad[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        with pytest.raises(AutoSam3dError) as caught:
            np.testing.assert_array_equal(read_ct(path).voxels_hu, expected)
        assert caught.value.code in ("CRC", "TRUNCATED", "TRAILING", "SIZE")


def test_what_a_file_leaves_open_is_answered_as_for_nifti(tmp_path: Path) -> None:
    for content in (_nrrd(NRRD.replace("space: left-posterior-superior", "space dimension: 3")),
                    _mha(re.sub("TransformMatrix.*\n", "", MHA))):
        volume = _read(tmp_path, content, options=ReadOptions(assume_ras=True))
        np.testing.assert_array_equal(volume.voxels_hu, _hu())
        assert volume.spacing_mm == (3.0, 1.25, 1.5) and "no orientation" in volume.warnings[0]
    two = np.stack([_hu(), _hu()[::-1]])
    fast = _nrrd(NRRD.replace("dimension: 3", "dimension: 4").replace("24 20 12", "2 24 20 12").replace(
        "directions: (", "directions: none ("), np.moveaxis(two, 0, 3).tobytes())
    slow = _nrrd(NRRD.replace("dimension: 3", "dimension: 4").replace("24 20 12", "24 20 12 2").replace(
        "(0,0,3)", "(0,0,3) none"), two.tobytes())
    mha = _mha(MHA.replace("NDims = 3", "NDims = 4").replace("24 20 12", "24 20 12 2").replace(
        "1 0 0 0 1 0 0 0 1", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1").replace("-10 20 5", "-10 20 5 0").replace(
        "1.5 1.25 3", "1.5 1.25 3 1"), two.tobytes())
    for content in (fast, slow, mha):
        with pytest.raises(AutoSam3dError, match="2 volumes") as caught:
            _read(tmp_path, content)
        assert caught.value.code == "NDIM"
        for index in (0, 1):
            volume = _read(tmp_path, content, options=ReadOptions(volume_index=index))
            np.testing.assert_array_equal(volume.voxels_hu, two[index][:, ::-1, ::-1])
        with pytest.raises(AutoSam3dError) as caught:
            _read(tmp_path, content, options=ReadOptions(volume_index=2))
        assert caught.value.code == "VOLUME_INDEX"


def test_segments_of_slicer_bring_their_names(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 3:9, 4:12], labels[6:9, 3:9, 4:12] = 3, 7
    keys = ("Segment0_ID:=a\nSegment0_Name:=liver\nSegment0_LabelValue:=3\nSegment0_Layer:=0\n"
            "Segment1_Name:=left kidney: upper\nSegment1_LabelValue:=7\nSegment1_Layer:=0\n")
    path = tmp_path / "a.seg.nrrd"
    path.write_bytes(_nrrd(NRRD.replace("int16", "unsigned char").replace("raw", "gzip") + keys,
                           gzip.compress(labels.tobytes())))
    found = read_segmentation(path)
    np.testing.assert_array_equal(found.labels, labels[:, ::-1, ::-1])
    assert found.organs == {3: "liver", 7: "left kidney: upper"}
    path.write_bytes(_nrrd(NRRD.replace("int16", "uint8").replace("dimension: 3", "dimension: 4").replace(
        "24 20 12", "2 24 20 12").replace("directions: (", "directions: none (") + keys, labels.tobytes() * 2))
    with pytest.raises(AutoSam3dError, match="overlap") as caught:
        read_segmentation(path)
    assert caught.value.code == "NDIM"


def test_labels_are_written_as_nifti_onto_the_grid_of_the_scan(tmp_path: Path) -> None:
    image = _image(_hu(), _directions()[-1])
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read_ct(tmp_path / "a.mha")
    sitk.WriteImage(_image((_hu() > 0).astype(np.uint8), _directions()[-1]), str(tmp_path / "l.nrrd"))
    labels = read_segmentation(tmp_path / "l.nrrd")
    assert same_grid(labels, volume, 1e-5)
    write_segmentation(tmp_path / "out.nii.gz", labels, LabelMap(organs=("liver",)))
    written = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), (_hu() > 0).astype(np.uint8))
    np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)


def test_both_files_of_a_mhd_are_the_scan(tmp_path: Path) -> None:
    sitk.WriteImage(_image(_hu()), str(tmp_path / "a.mhd"))
    assert files_of(tmp_path / "a.mhd") == [tmp_path / "a.mhd", tmp_path / "a.raw"]
    assert files_of(tmp_path / "a.nii") == [tmp_path / "a.nii"]
    (tmp_path / "a.raw").unlink()
    with pytest.raises(AutoSam3dError) as caught:
        read_ct(tmp_path / "a.mhd")
    assert caught.value.code == "UNREADABLE" and "a.raw" in caught.value.where
