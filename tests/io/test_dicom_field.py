"""What users of this field have reported of DICOM series, each with its right value."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")

import make_dicom as bad
import make_field as field

from autosam3d.errors import AutoSam3dError, UsageError, VolumeError
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.dicom.identity import identify
from autosam3d.io.dicom.source import read_source_series

EXPECTED = bad.hu_array().astype(np.float32)[:, ::-1, ::-1]


def _refused(folder: Path, options: ReadOptions | None = None) -> AutoSam3dError:
    with pytest.raises(AutoSam3dError) as caught:
        read_ct(folder, options or ReadOptions())
    return caught.value


@pytest.mark.parametrize("shift_mm", [0, 0.6, 9])
def test_two_acquisitions_are_listed_and_each_can_be_chosen(shift_mm: float, tmp_path: Path) -> None:
    path = field.second_pass(shift_mm, first=bad._set(AcquisitionNumber=4, AcquisitionTime="235955"),
                             AcquisitionNumber=7, AcquisitionTime="235958.5")(tmp_path)
    error = _refused(path)
    assert (error.code, error.exit_code) == ("ACQUISITION_CHOICE", 2)
    assert "by AcquisitionNumber): 4: 12 slices, 0 s after the first, -100.0 to -67.0 mm; 7: 12 slices" in error.fault
    assert error.fault.endswith(f"4 s after the first, {-100 + shift_mm:.1f} to {-67 + shift_mm:.1f} mm")
    first = read_ct(path, ReadOptions(acquisition=4))
    np.testing.assert_array_equal(first.voxels_hu, EXPECTED)
    assert first.warnings == ("acquisition 4 is taken; 12 slices of others are left out",)
    second = read_ct(path, ReadOptions(acquisition=7))
    np.testing.assert_array_equal(second.voxels_hu, np.roll(EXPECTED, -3, axis=2))
    assert second.affine[2, 3] - first.affine[2, 3] == pytest.approx(shift_mm)
    assert len(read_source_series(path, second.source, ReadOptions(acquisition=7)).images) == 12
    assert "no acquisition 2; the series has 2: 4:" in _refused(path, ReadOptions(acquisition=2)).args[0]


@pytest.mark.parametrize(("first", "second", "by"), [
    ({}, {"TemporalPositionIdentifier": 2}, "TemporalPositionIdentifier"),
    ({"KVP": "80"}, {"KVP": "140.0"}, "KVP"),
    ({}, {"ContrastBolusAgent": "Doe agent"}, "ContrastBolusAgent"),
    ({"SliceThickness": 3}, {"SliceThickness": 6}, "SliceThickness"),
    ({"AcquisitionDateTime": "20200101235959"}, {"AcquisitionDateTime": "20200102000015.5+0100"}, "AcquisitionTime"),
])
def test_acquisitions_that_have_no_number_are_counted_by_time(first: dict, second: dict, by: str, tmp_path: Path
                                                              ) -> None:
    path = field.second_pass(1.5, first=bad._set(**first), **second)(tmp_path)
    error = _refused(path)
    assert error.code == "ACQUISITION_CHOICE" and f"(by {by}): 1: 12 slices" in error.fault and "Doe" not in str(error)
    np.testing.assert_array_equal(read_ct(path, ReadOptions(acquisition=1)).voxels_hu, EXPECTED)


def test_passes_that_only_their_numbers_tell_apart_are_refused(tmp_path: Path) -> None:
    assert _refused(field.second_pass(1.5)(tmp_path)).code == "ACQUISITION_CHOICE"


def test_one_scan_is_one_acquisition_however_its_tags_vary(tmp_path: Path) -> None:
    """A helix whose slices have times of their own, step and shoot with pauses, a slice or two with another tag."""

    def times(ds: bad.FileDataset, index: int) -> None:
        ds.AcquisitionTime = f"1010{10 + 4 * index}.{index}"
        ds.AcquisitionNumber = "" if index == 5 else 1
        ds.ConvolutionKernel = "B30" if index % 6 else "B30f"

    def blocks(ds: bad.FileDataset, index: int) -> None:
        ds.AcquisitionNumber, ds.AcquisitionTime = 9 - index // 3, f"10{30 - index // 3}00"
        ds.SliceThickness = 3 if index < 6 else 5

    for name, change in (("times", times), ("blocks", blocks)):
        (tmp_path / name).mkdir()
        volume = read_ct(bad.series(change)(tmp_path / name))
        np.testing.assert_array_equal(volume.voxels_hu, EXPECTED)
        assert volume.warnings == ()
    chosen = bad.series(blocks, num_slices=24)(tmp_path)
    assert "the series has 8" in _refused(chosen, ReadOptions(acquisition=10)).args[0]


@pytest.mark.parametrize(("name", "maker"), {
    "high": field.padded(4095, bits=12),
    "0 HU": field.padded(1024),
    "two's complement, unsigned": field.padded(63536),
    "beyond BitsStored": field.padded(63536, bits=12),
    "signed, told as unsigned": field.padded(63536, signed=True, intercept=0),
    "signed, told as signed": field.padded(-2000, signed=True, intercept=0, vr="SS"),
    "unsigned, told as signed": field.padded(-2000, vr="SS"),
    "12 bits, signed": field.padded(2096, signed=True, bits=12, intercept=0),
    "range": field.padded(60000, limit=65535, pixels=63000),
    "range downwards": field.padded(4095, bits=12, limit=3800, pixels=3900),
}.items())
def test_padding_is_air(name: str, maker: bad.Maker, tmp_path: Path) -> None:
    volume = read_ct(maker(tmp_path))
    expected = EXPECTED.copy()
    expected[:, :, [0, 1, -2, -1]] = expected[:, [0, 1, -2, -1]] = -1024
    np.testing.assert_array_equal(volume.voxels_hu, expected, err_msg=name)
    num = 12 * (20 * 24 - 16 * 20)
    assert volume.warnings == (f"{num} voxels of padding (PixelPaddingValue) are taken as air, -1024 HU",)


def test_padding_has_no_numbers_of_the_patient(tmp_path: Path) -> None:
    """A value that organs and metal have, too, is padding only where it hangs together with the picture's edge."""
    hu = bad.hu_array()
    inside = np.zeros(hu.shape, bool)
    inside[:, 6:14, 8:16] = True
    value = int(np.bincount(hu[inside & (hu > 0)]).argmax())
    assert (hu[inside] == value).sum() > 10
    volume = read_ct(bad.series(bad._set(PixelPaddingValue=value + 1024))(tmp_path))
    kept = volume.voxels_hu[:, ::-1, ::-1]
    np.testing.assert_array_equal(kept[inside], hu[inside])
    assert volume.warnings == ()
    # Other modalities have no air.
    (tmp_path / "mr").mkdir()
    padding = bad._set(PixelPaddingValue=24)
    mr = bad.series(lambda ds, i: bad._another_modality(padding(ds, i) or ds, i))(tmp_path / "mr")
    np.testing.assert_array_equal(read_ct(mr, ReadOptions(force=True)).voxels_hu, EXPECTED)


def _blocks(*blocks: tuple[int, float]) -> np.ndarray:
    return np.cumsum([0, *(gap for count, gap in blocks for _ in range(count))])


def _without(heights: np.ndarray, lost: list[int]) -> bad.Maker:
    """A series of which slices were lost on the way; the others keep their numbers."""
    kept = [i for i in range(len(heights)) if i not in lost]
    return field.at_heights(heights[kept], [i + 1 for i in kept])


@pytest.mark.parametrize(("maker", "code", "words"), [
    (_without(_blocks((23, 2.5)), list(range(3, 22, 4))), "MISSING_SLICES", "1 after slice 3 at 5.0 mm"),
    (field.at_heights(_blocks(*[(1, 2.5), (1, 5)] * 8)), "MISSING_SLICES", "every 2.5 mm"),
    (field.at_heights(_blocks(*[(2, 0.6), (1, 1.8)] * 8).round(1)), "MISSING_SLICES", "2 after slice 3"),
    (_without(_blocks((12, 2.5), (24, 2.5)), list(range(13, 36, 2))), "MISSING_SLICES", "InstanceNumber has holes"),
    (_without(_blocks((10, 2.5), (10, 5.0)), [14]), "MISSING_SLICES", "after slice 14 at 40.0 mm"),
    (field.at_heights(_blocks((1, 6), (14, 3))), "MISSING_SLICES", "1 after slice 1"),
    (field.at_heights(_blocks((12, 2.5), (1, 0.25), (12, 7.5))), "UNEVEN_SPACING", "0.25 to 7.5"),
    (field.at_heights(_blocks((10, 2.5), (10, 6))), "UNEVEN_SPACING", "2.5 to 6 mm"),
])
def test_lost_slices_are_not_made_up(maker: bad.Maker, code: str, words: str, tmp_path: Path) -> None:
    error = _refused(maker(tmp_path))
    assert (error.code, error.exit_code) == (code, 3) and words in error.fault


@pytest.mark.parametrize(("heights", "step_mm", "num_slices"), [
    (_blocks((12, 2.5), (11, 5)), 2.5, 35), (_blocks((11, 5), (12, 2.5)), 2.5, 35),
    (_blocks((12, 4.8), (11, 9.6)), 4.8, 35), (_blocks((8, 3), (8, 1.5), (8, 3)), 1.5, 41),
    ((_blocks((12, 2.5), (11, 5)) + 0.33).round(1), 2.5, 35), (_blocks((9, 2), (9, 3)), 2.0, 23),
])
def test_the_thin_block_keeps_its_resolution(heights: np.ndarray, step_mm: float, num_slices: int, tmp_path: Path
                                             ) -> None:
    for numbers in (None, range(len(heights))):
        (folder := tmp_path / str(numbers is None)).mkdir()
        volume = read_ct(field.at_heights(heights, numbers)(folder))
        assert volume.shape[0] == num_slices and volume.spacing_mm[0] == pytest.approx(step_mm, abs=0.02)
        assert volume.warnings[0].endswith(f"resampled to {step_mm:g} mm")


@pytest.mark.parametrize("step_mm", [0.33, 0.625, 1.25])
def test_positions_of_one_decimal_keep_their_slices(step_mm: float, tmp_path: Path) -> None:
    heights = np.round(step_mm * np.arange(64) + 0.017, 1)
    path = field.at_heights(heights)(tmp_path)
    volume = read_ct(path)
    assert volume.warnings == () and volume.spacing_mm[0] == pytest.approx(step_mm, abs=5e-4)
    np.testing.assert_array_equal(volume.voxels_hu, bad.hu_array(64)[:, ::-1, ::-1])
    assert len(read_source_series(path, volume.source).images) == 64
    # A lost slice is a lost slice, however thin.
    (path / "slice040.dcm").unlink()
    assert _refused(path).code == "MISSING_SLICES"


def _oblique(degrees: float, digits: int) -> bad.Maker:
    """Turned about two axes, with exact positions and directions of few decimals."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])

    def change(ds: bad.FileDataset, index: int) -> None:
        ds.ImageOrientationPatient = [f"{v:.{digits}f}" for v in (*turn[:, 0], *turn[:, 1])]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in np.array([-20.5, -30.25, 11.0]) + 3.0 * index * turn[:, 2]]

    return bad.series(change, num_slices=20)


@pytest.mark.parametrize("degrees", [5.0, 17.3])
def test_directions_of_two_decimals_are_no_tilt(degrees: float, tmp_path: Path) -> None:
    (tmp_path / "exact").mkdir()
    exact = read_ct(_oblique(degrees, 10)(tmp_path / "exact"))
    volume = read_ct(_oblique(degrees, 2)(tmp_path))
    assert volume.warnings == () and volume.shape == (20, 20, 24)
    np.testing.assert_array_equal(volume.voxels_hu, exact.voxels_hu)
    assert volume.spacing_mm == pytest.approx(bad.SPACING, abs=1e-5)
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    # Everywhere in the stack within the rounding of the directions.
    corners = np.array([[x, y, z, 1] for x in (0, 23) for y in (0, 19) for z in (0, 19)]).T
    assert np.linalg.norm(((volume.affine - exact.affine) @ corners)[:3], axis=0).max() < 0.5


def test_slices_that_are_shifted_to_and_fro_are_not_called_tilted(tmp_path: Path) -> None:
    def shake(ds: bad.FileDataset, index: int) -> None:
        ds.ImagePositionPatient = [-20.5 + 0.4 * (index == 5), -30.25, -100 + 3.0 * index]

    volume = read_ct(bad.series(shake)(tmp_path))
    assert volume.warnings == ()
    np.testing.assert_array_equal(volume.voxels_hu, EXPECTED)


def test_an_error_counts_in_its_own_series_alone(tmp_path: Path) -> None:
    path = bad.series(after=field.beside(field.colours))(tmp_path)
    error = _refused(path, ReadOptions(series=field.OTHER_SERIES))
    assert error.code == "DTYPE" and error.where.endswith("file 1 of 15")
    with pytest.raises(UsageError, match="no such series"):
        read_ct(path, ReadOptions(series="1.2"))
    # A cut slice of another series is left out, one that does not say what it is of is not.
    (tmp_path / "cut").mkdir()
    cut = bad.series(after=field.beside(lambda ds, i: None, num=1))(tmp_path / "cut") / "a000.dcm"
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"\x28\0\x02\0")])
    assert "left out: 1 image of other series that cannot be read (SLICE_CORRUPT)" in read_ct(cut.parent).warnings
    cut.write_bytes(content[: content.index(b"\x20\0\x0e\0")])
    assert _refused(cut.parent).code == "SLICE_CORRUPT"


def test_a_slice_without_its_place_is_missed_and_a_page_is_not(tmp_path: Path) -> None:
    def without_place(ds: bad.FileDataset, index: int) -> None:
        del ds.ImagePositionPatient, ds.ImageOrientationPatient

    path = bad.series(after=field.beside(without_place, num=1, series_uid=None))(tmp_path)
    assert _refused(path).code == "TAG_MISSING"


def test_a_huge_object_beside_the_scan_is_left_out(tmp_path: Path) -> None:
    """Sparse, so that it takes no room; its pixels are never read."""
    path = bad.series(after=field.beside(lambda ds, i: None, num=1))(tmp_path)
    os.truncate(path / "a000.dcm", (512 << 20) + 1)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.voxels_hu, EXPECTED)
    assert "left out: 1 image of other series that cannot be read (LENGTH)" in volume.warnings
    assert _refused(path, ReadOptions(series=field.OTHER_SERIES)).code == "LENGTH"
    field.beside(field.enhanced, num=1)(path)
    os.truncate(path / "a000.dcm", (512 << 20) + 1)
    assert read_ct(path).warnings == ("left out: 1 multi-frame CT image",)


def test_messages_are_short_and_their_remedies_help(tmp_path: Path) -> None:
    def places(name: str, maker: bad.Maker) -> Path:
        (tmp_path / name).mkdir()
        return maker(tmp_path / name)

    def own_series(size: int) -> bad.Change:
        return lambda ds, index: setattr(ds, "SeriesInstanceUID", f"{bad.SERIES_UID}.{index // size}")

    one = _refused(places("one", bad.series(own_series(1), num_slices=16)))
    assert "found 16 of one slice each" in one.fault and len(str(one)) < 300
    two = _refused(places("two", bad.series(own_series(2), num_slices=16)))
    assert "found 8 of at most 2 slices each" in two.fault
    many = _refused(places("many", bad.series(own_series(8), num_slices=80)))
    assert many.fault.count("8 slices of 20 x 24") == 8 and many.fault.endswith("; and 2 more")
    assert "12 that lie in one place" in _refused(places("place", bad.BROKEN["48_all_in_one_place"][0])).fault
    private = _refused(places("private", bad.BROKEN["59_private_syntax"][0]))
    assert field.PRIVATE_SYNTAX in private.fault and "pip" not in private.remedy and "vendor" in private.remedy
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in places("good", bad.series()).iterdir():
        (linked / file.name).symlink_to(file)
    (linked / "below").symlink_to(tmp_path / "good")
    with pytest.raises(VolumeError, match=r"found 13 links; links are not followed: name the folder that they lead to"):
        read_ct(linked)


def test_only_the_transfer_syntax_says_that_a_file_is_deflated(tmp_path: Path) -> None:
    path = bad.series(bad._set(ImageComments="1.2.840.10008.1.2.1.99"))(tmp_path) / "slice003.dcm"
    assert identify(path, "a file").modality == "CT"
    field.deflate(path)
    with pytest.raises(VolumeError) as caught:
        identify(path, "a file")
    assert caught.value.code == "CODEC"
    assert _refused(path.parent).code == "CODEC"


def test_raw_numbers_of_a_series_are_those_that_are_stored(tmp_path: Path) -> None:
    """No rescale is asked for, and padding becomes the lowest number that is no padding."""
    for name in ("a", "b", "c", "hu"):
        (tmp_path / name).mkdir()
    from_zero = bad._set(RescaleIntercept=0, RescaleSlope=1)
    plain = read_ct(bad.series(from_zero)(tmp_path / "a"), ReadOptions(intensity="raw"))
    assert plain.intensity == "raw"
    with pytest.raises(VolumeError) as caught:
        read_ct(bad.series()(tmp_path / "hu"), ReadOptions(intensity="raw"))
    assert caught.value.code == "IS_HU"

    def without_rescale(ds: bad.FileDataset, index: int) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept

    bare = read_ct(bad.series(without_rescale)(tmp_path / "b"), ReadOptions(intensity="raw"))
    np.testing.assert_array_equal(bare.voxels_hu, plain.voxels_hu)

    def padded(ds: bad.FileDataset, index: int) -> None:
        from_zero(ds, index)
        pixels = ds.pixel_array.copy()
        pixels[0, :] = 4000
        ds.PixelData = pixels.tobytes()
        ds.PixelPaddingValue = 4000

    volume = read_ct(bad.series(padded)(tmp_path / "c"), ReadOptions(intensity="raw"))
    changed = volume.voxels_hu != plain.voxels_hu
    assert float(volume.voxels_hu.max()) < 4000 and any("the lowest number" in text for text in volume.warnings)
    assert set(np.unique(volume.voxels_hu[changed])) <= {volume.voxels_hu.min()}
