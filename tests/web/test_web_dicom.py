"""DICOM objects that the browser's code wrote, read by highdicom and by this package: same voxels, same codes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

import highdicom
import pydicom

from autosam3d.io import read_ct, read_segmentation
from autosam3d.io.dicom.seg import write_dicom_seg
from autosam3d.io.dicom.source import Algorithm, read_source_series
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume
from seg_frames import demand_equal_frames

WEB = Path(__file__).resolve().parents[2] / "web"
ORGANS = {1: ("Liver", "10200004", "SCT"), 2: ("Parotid left", "45289007", "SCT"),
          3: ("My own organ", "MY_OWN_ORGAN", "99AUTOSAM3D"), 4: ("Aorta", "15825003", "SCT")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a series, with the slices, seg.dcm and seg.nii as the page's code wrote them."""
    if not (shutil.which("node") and (WEB / "node_modules/vitest").is_dir()):
        pytest.skip("needs node, and npm ci in web/")
    out = tmp_path_factory.mktemp("web_dicom")
    done = subprocess.run([WEB / "node_modules/.bin/vitest", "run", "test/dicom.test.ts"], cwd=WEB, text=True,
                          capture_output=True, timeout=240, env={**os.environ, "AUTOSAM3D_WEB_OUT": str(out)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def _labels(hu: np.ndarray) -> np.ndarray:
    """As in web/test/dicom.test.ts."""
    return np.select([hu > 900, hu > 100, hu > 0], [3, 2, 1]).astype(np.uint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.soak)])
def test_others_read_the_same_labels_in_every_orientation(written: Path, every: int) -> None:
    folders = [folder for folder in sorted(written.iterdir()) if folder.name not in _resampled(written)]
    assert len([f for f in folders if f.name.startswith("orientation")]) == 50
    for folder in folders[::every]:
        volume = read_ct(folder / "ct")
        expected = _labels(volume.voxels_hu)
        seg = highdicom.seg.segread(folder / "seg.dcm")
        found = np.zeros_like(expected)
        for number in seg.segment_numbers:
            segment = seg.get_segment_description(number)
            value = next(v for v, (text, *_) in ORGANS.items() if text == segment.segment_label)
            stack = seg.get_volume(segment_numbers=[number])
            indexes = np.argwhere(np.squeeze(stack.array) != 0)
            lps = stack.map_indices_to_reference(indexes)
            places = np.c_[lps * (-1, -1, 1), np.ones(len(lps))] @ np.linalg.inv(volume.affine).T
            assert np.abs(places - np.rint(places)).max() < 0.02, folder.name
            x, y, z = np.rint(places[:, :3]).astype(int).T
            assert not found[z, y, x].any()
            found[z, y, x] = value
        np.testing.assert_array_equal(found, expected, folder.name)
        _demand_nifti(folder, volume)


def _resampled(written: Path) -> list[str]:
    """Of a tilted gantry or with uneven slices; see web/test/make_dicom_vectors.py."""
    return sorted(folder.name for folder in written.iterdir() if folder.name.startswith(("52", "53")))


def _demand_nifti(folder: Path, volume: Volume) -> None:
    nifti = read_segmentation(folder / "seg.nii")
    np.testing.assert_array_equal(nifti.labels, _labels(volume.voxels_hu), folder.name)
    np.testing.assert_allclose(nifti.affine, volume.affine, atol=1e-4)


def test_resampled_scans_get_their_labels_where_this_package_puts_them(written: Path, tmp_path: Path) -> None:
    """NIfTI on the straight grid; SEG on the slices as they were made, frame by frame beside ours."""
    assert len(_resampled(written)) == 12
    for name in _resampled(written):
        folder = written / name
        volume = read_ct(folder / "ct")
        _demand_nifti(folder, volume)
        segmentation = Segmentation(_labels(volume.voxels_hu), volume.affine, volume.source)
        series = read_source_series(folder / "ct", volume.source)
        write_dicom_seg(tmp_path / f"{name}.dcm", segmentation, series, LabelMap(organs=("liver", "parotid", "own")),
                        Algorithm("autosam3d test", "1.2.3", "ab" * 32))
        assert demand_equal_frames(folder / "seg.dcm", tmp_path / f"{name}.dcm") >= 12


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_codes_identity_and_references(written: Path) -> None:
    folder = written / "00_good"
    ds = pydicom.dcmread(folder / "seg.dcm")
    assert (ds.PatientName, ds.PatientID, ds.StudyInstanceUID) == ("Doe^Jane", "Doe-4711", "1.2.3")
    assert (ds.SegmentationType, ds.Modality, ds.SpecificCharacterSet) == ("BINARY", "SEG", "ISO_IR 192")
    assert "InstitutionName" not in ds and "StudyDescription" not in ds
    for segment in ds.SegmentSequence:
        text, code, scheme = next(o for o in ORGANS.values() if o[0] == segment.SegmentLabel)
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == (code, scheme, text)
        if text == "Parotid left":
            assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    volume = read_ct(folder / "ct")
    images = read_source_series(folder / "ct", volume.source).images
    assert [i.ReferencedSOPInstanceUID for i in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence] == [
        image.SOPInstanceUID for image in images]
    place = {tuple(float(v) for v in image.ImagePositionPatient): image.SOPInstanceUID for image in images}
    for group in ds.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        position = tuple(float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)
        assert source.ReferencedSOPInstanceUID == place[position]


def test_damaged_texts_are_not_carried(written: Path) -> None:
    ds = pydicom.dcmread(written / "69_wrong_texts/seg.dcm")
    assert (ds.PatientID, ds.PatientBirthDate, ds.AccessionNumber) == ("Doe-4711", "", "")


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(written: Path) -> None:
    said = subprocess.run(["dciodvfy", str(written / "00_good/seg.dcm")], capture_output=True, text=True).stderr
    assert said and not [line for line in said.splitlines() if line.startswith("Error")]
