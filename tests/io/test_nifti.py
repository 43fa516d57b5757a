"""NIfTI reading: every row of the catalogue of bad inputs, agreement with an independent reader, real scans."""

from __future__ import annotations

import itertools
import json
import logging
import math
import struct
import zlib
from pathlib import Path

import make_nifti as bad
import nibabel as nib
import numpy as np
import pytest

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.io import ReadOptions, read_ct, read_segmentation
from autosam3d.volume import Volume

# --- the catalogue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bad.BROKEN)
def test_broken_is_refused_with_its_code(name: str, tmp_path: Path) -> None:
    maker, code, exit_code = bad.BROKEN[name]
    path = maker(tmp_path)
    with pytest.raises(AutoSam3dError) as caught:
        read_ct(path)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", bad.BROKEN_LABELS)
def test_broken_labels_are_refused_with_their_code(name: str, tmp_path: Path) -> None:
    maker, code, exit_code = bad.BROKEN_LABELS[name]
    with pytest.raises(AutoSam3dError) as caught:
        read_segmentation(maker(tmp_path))
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)


@pytest.mark.parametrize("name", bad.ODD)
def test_odd_is_read_and_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    maker, words = bad.ODD[name]
    with caplog.at_level(logging.DEBUG):
        volume = read_ct(path := maker(tmp_path))
    assert volume.name == str(path)
    assert volume.voxels_hu.dtype == np.float32 and volume.voxels_hu.flags.c_contiguous
    if words is None:
        assert volume.warnings == ()
    else:
        assert any(words in warning for warning in volume.warnings)
        assert [f"{path}: {warning}" for warning in volume.warnings] == [record.message for record in caplog.records]
    expected = bad.ct_array().astype(np.float32).T
    if name == "27_left_handed":
        expected = expected[:, :, ::-1]
    untouched = np.mean(volume.voxels_hu == expected)
    assert untouched == 1 or (name.startswith(("34", "40")) and untouched > 0.75)
    assert volume.spacing_mm == pytest.approx(bad.SPACING[::-1], rel=1e-6)


def test_manifest_names_every_broken_file() -> None:
    listed = json.loads((Path(bad.__file__).parent / "MANIFEST.json").read_text())["nifti"]
    made = {name: {"code": code, "exit": status}
            for name, (_, code, status) in (bad.BROKEN | bad.BROKEN_LABELS).items()}
    assert listed == made


@pytest.mark.parametrize(
    ("name", "options", "warning"),
    [
        ("19_sform_nan_qform_sound", ReadOptions(prefer="qform"), "the qform is taken"),
        ("19_qform_nan_sform_sound", ReadOptions(prefer="sform"), "the sform is taken"),
        ("25_forms_flipped", ReadOptions(prefer="sform"), "the sform is taken"),
        ("25_forms_flipped", ReadOptions(prefer="qform"), "the qform is taken"),
        ("26_no_orientation", ReadOptions(assume_ras=True), "no orientation"),
        ("29_field_small", ReadOptions(force=True), "accepted by force"),
        ("32_4d", ReadOptions(volume_index=1), "volume 1 of 2"),
        ("38_from_zero", ReadOptions(intensity_offset=-1024), "-1024 HU added"),
        ("41_seven_slices", ReadOptions(force=True), "accepted by force"),
    ],
)
def test_an_option_answers_the_question(name: str, options: ReadOptions, warning: str, tmp_path: Path) -> None:
    volume = read_ct(bad.BROKEN[name][0](tmp_path), options)
    assert any(warning in text for text in volume.warnings)


def test_preferring_a_form_decides_left_and_right(tmp_path: Path) -> None:
    path = bad.BROKEN["25_forms_flipped"][0](tmp_path)
    as_sform, as_qform = (read_ct(path, ReadOptions(prefer=form)) for form in ("sform", "qform"))
    np.testing.assert_array_equal(as_sform.voxels_hu, as_qform.voxels_hu[:, :, ::-1])


def test_volume_index_beyond_the_last_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from 0 to 1, got 2") as caught:
        read_ct(bad.BROKEN["32_4d"][0](tmp_path), ReadOptions(volume_index=2))
    assert caught.value.code == "VOLUME_INDEX"


def test_memory_budget_is_asked_before_inflating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosam3d.io.memory.resident_bytes", lambda: 0)
    path = bad.ODD["00_good"][0](tmp_path)
    needed = math.prod(bad.SHAPE) * (2 + 4)
    with pytest.raises(ResourceError, match="reading needs") as caught:
        read_ct(path, ReadOptions(max_ram_bytes=needed - 1))
    assert caught.value.code == "MEMORY"
    assert read_ct(path, ReadOptions(max_ram_bytes=needed)).shape == bad.SHAPE[::-1]


def test_not_hu_names_the_measured_percentiles(tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        read_ct(bad.BROKEN["38_from_zero"][0](tmp_path))
    values = np.percentile((bad.ct_array() + 1024).clip(0, 4095), 50)
    assert f"/{values:.4g}/" in caught.value.fault and "ReadOptions(intensity_offset=-1024)" in caught.value.remedy


def test_unit_scaling_reaches_the_affine(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    path.write_bytes(bad.nifti_bytes(xyzt_units=3, srow_x=(2000, 0, 0, -7000), srow_y=(0, 2500, 0, 0),
                                     srow_z=(0, 0, 3000, 0), pixdim=(1, 2000, 2500, 3000, 1, 1, 1, 1)))
    np.testing.assert_allclose(read_ct(path).affine, [[2, 0, 0, -7], [0, 2.5, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_data_type_and_byte_order_gives_exact_values(dtype: str, order: str, tmp_path: Path) -> None:
    narrow = dtype in ("u1", "i1")
    stored = (np.arange(24 * 20 * 16).reshape(24, 20, 16) % 100).astype(dtype)
    slope, inter = (16.5, -1000.25) if narrow else (0.75, 0.5)
    stored = stored if narrow else (stored.astype(int) * 10 + (0 if dtype[0] == "u" else -800)).astype(dtype)
    inter = inter if narrow or dtype[0] != "u" else -500.25
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(bad.pack(bad.nifti_bytes(stored, order=order, scl_slope=slope, scl_inter=inter)))
    expected = (stored.astype(np.float64) * slope + inter).astype(np.float32)
    np.testing.assert_array_equal(read_ct(path).voxels_hu, expected.T)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj).astype(np.float32), expected)  # type: ignore


# --- silent corruption (flips and cuts) ------------------------------------------------------------------------


def test_no_flipped_bit_and_no_cut_passes(tmp_path: Path) -> None:
    content = bad.pack(bad.nifti_bytes())
    good = read_ct(bad.ODD["00_good"][0](tmp_path)).voxels_hu
    path = tmp_path / "hurt.nii.gz"
    rng = np.random.default_rng(0)
    # Bytes 4 to 9 of gzip's own header (time, flags of the compressor, system) carry nothing about the content.
    places = np.concatenate([[0, 1, 2, 3], rng.integers(10, len(content), 196)])
    for place in places:
        hurt = bytearray(content)
        hurt[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(hurt)
        with pytest.raises(VolumeError) as caught:
            read_ct(path)
        assert caught.value.code in ("CRC", "TRUNCATED", "TRAILING", "NOT_NIFTI"), place
    for length in rng.integers(1, len(content) - 1, 100):
        path.write_bytes(content[:length])
        with pytest.raises(VolumeError) as caught:
            read_ct(path)
        assert caught.value.code in ("TRUNCATED", "NOT_NIFTI")
    path.write_bytes(content)
    np.testing.assert_array_equal(read_ct(path).voxels_hu, good)


def test_a_mutated_header_is_read_or_refused_but_never_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autosam3d.io.memory.resident_bytes", lambda: 0)
    rng = np.random.default_rng(1)
    path = tmp_path / "ct.nii"
    num_refused = 0
    for version in (1, 2):
        raw = bad.nifti_bytes(version=version, qform_code=1)
        for _ in range(400):
            hurt = bytearray(raw)
            for place in rng.integers(0, 348 if version == 1 else 540, rng.integers(1, 4)):
                hurt[place] = rng.integers(256)
            path.write_bytes(hurt)
            try:
                volume = read_ct(path, ReadOptions(max_ram_bytes=1 << 26))
                assert np.isfinite(volume.voxels_hu).all() and np.isfinite(volume.affine).all()
            except AutoSam3dError:
                num_refused += 1
    assert 200 < num_refused < 800


def test_chunks_and_members_of_any_size_inflate_alike(tmp_path: Path) -> None:
    raw = bad.nifti_bytes()
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(b"".join(bad.pack(raw[at : at + 997]) for at in range(0, len(raw), 997)) + bytes(300))
    np.testing.assert_array_equal(read_ct(path).voxels_hu, bad.ct_array().astype(np.float32).T)


# --- agreement with an independent reader --------------------------------------------------------------------------


class Reference:
    """NIfTI-1 by the letter of nifti1.h, with struct and plain loops; shares no code with the package."""

    def __init__(self, path: Path) -> None:
        raw = zlib.decompress(path.read_bytes(), 31)
        self.e = "<" if struct.unpack_from("<i", raw)[0] == 348 else ">"
        self.dim = struct.unpack_from(f"{self.e}8h", raw, 40)[1:4]
        kind = {2: "B", 4: "h", 8: "i", 16: "f", 512: "H"}[struct.unpack_from(f"{self.e}h", raw, 70)[0]]
        offset, slope, inter = struct.unpack_from(f"{self.e}3f", raw, 108)
        self.raw, self.offset, self.kind, self.scale = raw, int(offset), kind, (slope, inter) if slope else (1, 0)
        self.qform_code, self.sform_code = struct.unpack_from(f"{self.e}2h", raw, 252)

    def value(self, i: int, j: int, k: int) -> float:
        nx, ny, _ = self.dim
        at = self.offset + struct.calcsize(self.kind) * (i + nx * (j + ny * k))
        return struct.unpack_from(self.e + self.kind, self.raw, at)[0] * self.scale[0] + self.scale[1]

    def world(self, i: float, j: float, k: float) -> list[float]:
        if self.sform_code > 0:
            rows = struct.unpack_from(f"{self.e}12f", self.raw, 280)
            return [rows[r] * i + rows[r + 1] * j + rows[r + 2] * k + rows[r + 3] for r in (0, 4, 8)]
        assert self.qform_code > 0
        b, c, d, x, y, z = struct.unpack_from(f"{self.e}6f", self.raw, 256)
        qfac, dx, dy, dz = struct.unpack_from(f"{self.e}4f", self.raw, 76)
        rest = 1 - (b * b + c * c + d * d)
        a = math.sqrt(rest) if rest >= 1e-7 else 0.0
        i, j, k = i * dx, j * dy, k * dz * (-1 if qfac < 0 else 1)
        return [
            (a * a + b * b - c * c - d * d) * i + 2 * (b * c - a * d) * j + 2 * (b * d + a * c) * k + x,
            2 * (b * c + a * d) * i + (a * a + c * c - b * b - d * d) * j + 2 * (c * d - a * b) * k + y,
            2 * (b * d - a * c) * i + 2 * (c * d + a * b) * j + (a * a + d * d - c * c - b * b) * k + z,
        ]


ORIENTATIONS = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI"))
                for codes in itertools.product(*axes)]


def oriented_affine(codes: str, turn_deg: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """File axes that run to `codes`, anisotropic, with an odd origin, turned about x, y and z."""
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = next(w for w, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[:3, axis] = 0
        affine[world, axis] = (2.5, 3.0, 4.25)[axis] * (1 if code in "RAS" else -1)
    x, y, z = np.radians(turn_deg)
    rx = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
    ry = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
    rz = [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
    affine[:3, :3] = np.array(rz) @ ry @ rx @ affine[:3, :3]
    affine[:3, 3] = (-31.25, 12.5, -870.75)
    return affine


def write_oriented(path: Path, affine: np.ndarray, forms: str, dtype: type = np.int16) -> np.ndarray:
    """A scan with nibabel, placed by "sform", "qform" or "both"; returns the array [i, j, k]."""
    array = bad.ct_array((11, 9, 8), seed=3).astype(dtype)
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine if forms != "sform" else None, 1 if forms != "sform" else 0)
    image.set_sform(affine if forms != "qform" else None, 2 if forms != "qform" else 0)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return array


def assert_agrees(volume: Volume, reference: Reference) -> None:
    """8 corners and 20 voxels: same value at the same place in the body."""
    rng = np.random.default_rng(0)
    nx, ny, nz = reference.dim
    corners = list(itertools.product((0, nx - 1), (0, ny - 1), (0, nz - 1)))
    others = [tuple(int(rng.integers(n)) for n in reference.dim) for _ in range(20)]
    to_voxel = np.linalg.inv(volume.affine)
    for i, j, k in corners + others:
        world = np.array([*reference.world(i, j, k), 1.0])
        x, y, z = np.rint((to_voxel @ world)[:3]).astype(int)
        assert np.abs(volume.affine @ (x, y, z, 1) - world).max() <= 1e-3
        assert volume.voxels_hu[z, y, x] == np.float32(reference.value(i, j, k))
    # The array in memory runs right, anterior, superior, as near as the file's axes allow.
    assert (np.abs(volume.affine[:3, :3]).argmax(axis=0) == (0, 1, 2)).all()
    assert (np.diag(volume.affine[:3, :3]) > 0).all()


@pytest.mark.parametrize("forms", ["sform", "qform", "both"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_orientations_agree_with_the_reference_reader(codes: str, forms: str, tmp_path: Path) -> None:
    affine = oriented_affine(codes)
    write_oriented(tmp_path / "ct.nii.gz", affine, forms)
    volume = read_ct(tmp_path / "ct.nii.gz")
    assert_agrees(volume, Reference(tmp_path / "ct.nii.gz"))
    assert volume.warnings == ()
    assert volume.source is not None and nib.aff2axcodes(volume.source.affine) == tuple(codes)


@pytest.mark.parametrize("forms", ["sform", "qform", "both"])
@pytest.mark.parametrize("turn", [(10, 0, 0), (0, -20, 0), (0, 0, 35), (12, -7, 30), (-40, 3, 5)])
def test_oblique_scans_agree_with_the_reference_reader(
    turn: tuple[float, float, float], forms: str, tmp_path: Path
) -> None:
    for codes in ("RAS", "LPS", "ASR", "SLP"):
        write_oriented(tmp_path / "ct.nii.gz", oriented_affine(codes, turn), forms)
        assert_agrees(read_ct(tmp_path / "ct.nii.gz"), Reference(tmp_path / "ct.nii.gz"))


# --- labels ----------------------------------------------------------------------------------------------------


def test_whole_float_labels_are_cast_and_told(tmp_path: Path) -> None:
    path = bad._labels((1, 2, 5), np.float64)(tmp_path)
    segmentation = read_segmentation(path)
    assert segmentation.labels.dtype == np.uint8
    assert np.unique(segmentation.labels).tolist() == [0, 1, 2, 5]
    assert "floating-point" in segmentation.warnings[0]


def test_labels_beyond_255_are_uint16(tmp_path: Path) -> None:
    segmentation = read_segmentation(bad._labels((1, 1000, 65535), np.int32)(tmp_path))
    assert segmentation.labels.dtype == np.uint16 and segmentation.labels.max() == 65535


def test_scaled_whole_labels_are_applied(tmp_path: Path) -> None:
    segmentation = read_segmentation(bad._labels((1, 2), np.uint8, scl_slope=2, scl_inter=1)(tmp_path))
    assert np.unique(segmentation.labels).tolist() == [1, 3, 5]


def test_damaged_extension_and_side_car_are_no_names(tmp_path: Path) -> None:
    content = b'{"autosam3d_organs": [1, 2'
    for size in (0, 7, 48, 1 << 30):
        extension = b"\1\0\0\0" + struct.pack("<ii", size, 6) + content.ljust(40, b"\0")
        raw = bad.nifti_bytes(np.ones(bad.SHAPE, np.uint8), extension=extension)
        (tmp_path / "seg.nii").write_bytes(raw)
        (tmp_path / "seg.json").write_bytes(b"[" * 100_000)
        assert read_segmentation(tmp_path / "seg.nii").organs == {}


# --- privacy ---------------------------------------------------------------------------------------------------


def test_free_text_of_the_header_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    texts = {name: f"Doe^{name}".encode() for name in ("descrip", "db_name", "aux_file", "intent_name", "data_type")}
    path.write_bytes(bad.pack(bad.nifti_bytes(**texts)))
    volume = read_ct(path)
    assert volume.source is not None and volume.source.header is not None
    assert len(volume.source.header) == 348 and b"Doe" not in volume.source.header
    assert b"Doe" in zlib.decompress(path.read_bytes(), 31)


# --- real scans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Dataset501_OpenKBP/imagesTr/kbp_001_0000.nii.gz", "TotalSegmentatorExamples/example_ct.nii.gz"]
)
def test_real_ct_equals_nibabel(name: str, shared_data: Path) -> None:
    volume = read_ct(shared_data / name)
    theirs = nib.as_closest_canonical(nib.load(shared_data / name))  # type: ignore[arg-type]
    np.testing.assert_array_equal(volume.voxels_hu, np.asarray(theirs.dataobj, np.float32).T)  # type: ignore
    np.testing.assert_allclose(volume.affine, theirs.affine, atol=1e-5)  # type: ignore[attr-defined]


def test_real_labels_equal_nibabel(shared_data: Path) -> None:
    path = shared_data / "Dataset501_OpenKBP/labelsTr/kbp_001.nii.gz"
    theirs = nib.as_closest_canonical(nib.load(path))  # type: ignore[arg-type]
    segmentation = read_segmentation(path)
    np.testing.assert_array_equal(segmentation.labels, np.asarray(theirs.dataobj).T)  # type: ignore[attr-defined]
    assert segmentation.labels.dtype == np.uint8
