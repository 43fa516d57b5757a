"""DICOM series: every row of the catalogue, agreement with SimpleITK, a real series, no patient in any message."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("pydicom", reason="the dicom extra is not installed")

import make_dicom as bad

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.io import ReadOptions, read_ct, read_segmentation, write_segmentation
from autosam3d.io.dicom import files as dicom_files
from autosam3d.io.dicom.tags import hashed
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation

# Rows run to the left and columns to the back, so both are turned round in memory.
EXPECTED = bad.hu_array().astype(np.float32)[:, ::-1, ::-1]


@pytest.mark.parametrize("name", bad.BROKEN)
def test_broken_is_refused_with_its_code(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    maker, code, exit_code = bad.BROKEN[name]
    path = maker(tmp_path)
    with caplog.at_level(logging.DEBUG), pytest.raises(AutoSam3dError) as caught:
        read_ct(path)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.where.startswith(str(path)) and "\n" not in str(caught.value)
    told = str(caught.value).removeprefix(str(path)) + caplog.text
    assert "Doe" not in told and "4711" not in told and bad.SERIES_UID not in told


@pytest.mark.parametrize("name", bad.ODD)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
def test_odd_is_read_exactly_and_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    maker, words = bad.ODD[name]
    path = maker(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = read_ct(path)
    np.testing.assert_array_equal(volume.voxels_hu, EXPECTED)
    assert volume.spacing_mm == pytest.approx(bad.SPACING)
    corner = volume.affine @ (volume.shape[2] - 1, volume.shape[1] - 1, 0, 1)
    np.testing.assert_allclose(corner[:3], (20.5, 30.25, -100), atol=1e-9)
    assert volume.warnings == () if words is None else any(words in warning for warning in volume.warnings)
    assert "Doe" not in caplog.text + "".join(volume.warnings)


def test_manifest_names_every_broken_folder() -> None:
    listed = json.loads((Path(bad.__file__).parent / "MANIFEST.json").read_text())["dicom"]
    assert listed == {name: {"code": code, "exit": status} for name, (_, code, status) in bad.BROKEN.items()}


def test_missing_slices_are_listed(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"every 3 mm, missing are 2 after slice 4 at 9\.0 mm") as caught:
        read_ct(bad.series(skip=(4, 5))(tmp_path))
    assert caught.value.code == "MISSING_SLICES"


def test_series_are_listed_by_hash_and_chosen_by_hash_or_uid(tmp_path: Path) -> None:
    path = bad.BROKEN["50_two_series"][0](tmp_path)
    with pytest.raises(UsageError) as caught:
        read_ct(path)
    key = hashed(bad.SERIES_UID)
    assert f"{key}: 12 slices of 20 x 24" in caught.value.fault
    for series in (key, bad.SERIES_UID):
        np.testing.assert_array_equal(read_ct(path, ReadOptions(series=series)).voxels_hu, EXPECTED)
    with pytest.raises(UsageError, match="no such series"):
        read_ct(path, ReadOptions(series="1.2"))


def test_uneven_slices_are_resampled_by_position(tmp_path: Path) -> None:
    volume = read_ct(bad.UNEVEN(tmp_path))
    assert "resampled to 3 mm" in volume.warnings[0] and volume.shape == EXPECTED.shape
    # Slice 2 of the even grid (6 mm) lies between the given ones at 3 and 6.4 mm.
    share = (6 - 3) / (6.4 - 3)
    expected = EXPECTED[1] + share * (EXPECTED[2] - EXPECTED[1])
    np.testing.assert_allclose(volume.voxels_hu[2], expected, atol=1e-3)
    np.testing.assert_array_equal(volume.voxels_hu[-1], EXPECTED[-1])


def test_rounded_positions_are_not_resampled(tmp_path: Path) -> None:
    volume = read_ct(bad.series(height=lambda i: round(0.62 * i * 5, 1))(tmp_path))
    assert volume.warnings == () and volume.spacing_mm[0] == pytest.approx(3.1, abs=0.01)
    np.testing.assert_array_equal(volume.voxels_hu, EXPECTED)


def test_force_takes_other_modalities_but_not_other_units(tmp_path: Path) -> None:
    path = bad.BROKEN["65_mr"][0](tmp_path)
    volume = read_ct(path, ReadOptions(force=True))
    assert any("not marked as CT" in warning for warning in volume.warnings)
    (tmp_path / "b").mkdir()
    with pytest.raises(VolumeError) as caught:
        read_ct(bad.BROKEN["57_no_rescale"][0](tmp_path / "b"), ReadOptions(force=True))
    assert caught.value.code == "NOT_HU"
    options = ReadOptions(force=True, intensity_offset=-1024)
    np.testing.assert_array_equal(read_ct(tmp_path / "b/series", options).voxels_hu, EXPECTED)


def test_budget_is_asked_before_decoding(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        read_ct(bad.series()(tmp_path), ReadOptions(max_ram_bytes=10_000))
    assert caught.value.code == "MEMORY"


@pytest.mark.parametrize("orientation", [
    [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [-1, 0, 0, 0, -1, 0],
    [0.9396926, 0.3420201, 0, -0.3420201, 0.9396926, 0], [0.9659258, 0, -0.2588190, 0, 1, 0],
])
def test_any_orientation_agrees_with_simpleitk_and_comes_back(orientation: list[float], tmp_path: Path) -> None:
    normal = np.cross(orientation[:3], orientation[3:])

    def place(ds, index: int) -> None:
        ds.ImageOrientationPatient = orientation
        ds.ImagePositionPatient = [round(float(v), 6) for v in np.array([-20, 30, -100]) + 3.0 * index * normal]

    path = bad.series(place)(tmp_path)
    volume = read_ct(path)
    image = _read_with_simpleitk(path)
    stored = sitk.GetArrayFromImage(image)
    for (z, y, x), value in list(np.ndenumerate(stored))[:: stored.size // 40]:
        left, back, up = image.TransformIndexToPhysicalPoint((x, y, z))
        place_vox = np.linalg.inv(volume.affine) @ (-left, -back, up, 1)
        i, j, k = np.rint(place_vox[:3]).astype(int)
        assert np.abs(place_vox[:3] - (i, j, k)).max() < 1e-3
        assert volume.voxels_hu[k, j, i] == value
    labels = (volume.voxels_hu > 500).astype(np.uint8)
    write_segmentation(tmp_path / "seg.nii.gz", Segmentation(labels, volume.affine, volume.source),
                       LabelMap(organs=("bone",)))
    mask = nib.load(tmp_path / "seg.nii.gz")
    assert mask.shape == (24, 20, 12)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, (stored > 500).astype(np.uint8))  # type: ignore
    np.testing.assert_array_equal(read_segmentation(tmp_path / "seg.nii.gz").labels, labels)
    again = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
    np.testing.assert_allclose(again.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(again.GetDirection(), image.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(again.GetSpacing(), image.GetSpacing(), atol=1e-5)


def test_real_jpeg2000_series_equals_simpleitk(shared_data: Path) -> None:
    path = shared_data / "TotalSegmentatorExamples/example_ct_dicom"
    volume = read_ct(path)
    image = _read_with_simpleitk(path)
    assert volume.shape == (20, 512, 512) and volume.warnings == () and volume.source is not None
    np.testing.assert_array_equal(volume.voxels_hu, sitk.GetArrayFromImage(image).astype(np.float32)[:, ::-1, ::-1])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_array_equal(volume.source.affine, np.diag([-1, -1, 1, 1]) @ affine)


def test_real_segmentation_lies_on_the_real_series(shared_data: Path) -> None:
    """The series and the segmentation that came with it, stored in another orientation, meet voxel by voxel."""
    volume = read_ct(shared_data / "TotalSegmentatorExamples/example_ct_dicom")
    segmentation = read_segmentation(shared_data / "TotalSegmentatorExamples/example_seg_dicom.nii.gz")
    np.testing.assert_allclose(segmentation.affine, volume.affine, atol=1e-4)
    spleen, liver, vertebrae = (np.isin(segmentation.labels, values) for values in ([1], [5], range(26, 51)))
    assert 20 < np.median(volume.voxels_hu[liver]) < 180 and np.median(volume.voxels_hu[vertebrae]) > 100
    # x grows to the right, where the liver is.
    assert np.argwhere(spleen)[:, 2].mean() < np.argwhere(vertebrae)[:, 2].mean() < np.argwhere(liver)[:, 2].mean()


def _read_with_simpleitk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_a_mutated_slice_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    path = bad.series()(tmp_path)
    hurt_path = path / "slice005.dcm"
    good = hurt_path.read_bytes()
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(60):
        hurt = bytearray(good)
        for place in rng.integers(132, len(good) - 2 * bad.ROWS * bad.COLUMNS, 2):
            hurt[place] = rng.integers(256)
        hurt_path.write_bytes(hurt)
        try:
            assert np.isfinite(read_ct(path).voxels_hu).all()
        except AutoSam3dError:
            num_refused += 1
    assert num_refused > 20


def test_a_failing_disk_names_a_slice_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bad.series()(tmp_path)
    (path / "slice003.dcm").rename(path / "slice003-Doe.dcm")
    opened = dicom_files.open_regular

    def failing(name: Path) -> Any:
        if "Doe" in name.name:
            raise ResourceError("IO", name, "reading failed (input/output error)", "try again")
        return opened(name)

    monkeypatch.setattr(dicom_files, "open_regular", failing)
    with pytest.raises(ResourceError) as caught:
        read_ct(path)
    assert caught.value.where == f"{path}: file 4 of 12" and caught.value.exit_code == 5


def test_without_pydicom_the_extra_is_named(tmp_path: Path) -> None:
    program = ("import sys; sys.modules['pydicom'] = None\n"
               "from autosam3d.io import read_ct\nfrom autosam3d.errors import MissingExtraError\n"
               "try:\n    read_ct(sys.argv[1])\nexcept MissingExtraError as error:\n    print(error.exit_code, error)")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("2 ") and "autosam3d[dicom]" in run.stdout


def test_what_is_left_out_is_said_as_a_sentence(tmp_path: Path) -> None:
    folder = bad.ODD["70_text_file_beside"][0](tmp_path)
    assert "left out: 1 file that is not DICOM" in read_ct(folder).warnings
    (folder / "notes.txt").write_text("x")
    assert "left out: 2 files that are not DICOM" in read_ct(folder).warnings


def test_a_folder_without_any_slice_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", ".hidden"):
        (tmp_path / name).write_text("x")
    with pytest.raises(VolumeError, match="found 2 files that are not DICOM, 1 DICOMDIR or hidden file"):
        read_ct(tmp_path)
