"""Rows 52 and 53: slices of a tilted gantry and uneven slices become a straight, even grid in the right place, and the
labels come back onto the slices that the scanner made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

import make_dicom as bad
import pydicom

from autosam3d.errors import VolumeError
from autosam3d.io import read_ct, read_segmentation, write_segmentation
from autosam3d.io.dicom import rtstruct as dicom_rtstruct
from autosam3d.io.dicom import seg as dicom_seg
from autosam3d.io.dicom.outlines import filled
from autosam3d.io.dicom.source import Algorithm, read_source_series
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation

LABELS = LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
ALGORITHM = Algorithm("autosam3d test", "1.2.3", "ab" * 32)
FIRST = np.array([-20.5, -30.25, 11.0])
EVEN = np.arange(12) * 3.0
UNEVEN = np.array([0, 3, 6.4, 9.1, 12, 15.3, 18, 21.5, 24, 27, 30.2, 33])
# Right and front; left and back: LPS mm from the middle of the first slice, and half axes.
ORGANS = {1: ((-9.0, -8.0, 15.0), (8.0, 9.0, 11.0)), 2: ((11.0, 9.0, 19.0), (6.0, 7.0, 8.0))}
# Both organs border on the background only in value, so a blurred border never looks like the other organ.
HU = np.array([20, 400, -360], np.int16)


def _axes(tilt_deg: float, turned: bool) -> np.ndarray:
    """Directions of columns, rows and slices of a patient who lies in a gantry that is tilted about x."""
    sine, cosine = np.sin(np.radians(tilt_deg)), np.cos(np.radians(tilt_deg))
    axes = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return axes * [[-1], [-1], [1]] if turned else axes


def _series(folder: Path, tilt_deg: float, heights: np.ndarray, turned: bool = False, spacing_mm: float = 1.5
            ) -> np.ndarray:
    """Slices every `heights` along the table, whatever the gantry does; labels [slice, row, column] on them."""
    folder.mkdir()
    rows, columns, _ = _axes(tilt_deg, turned)[[1, 0, 2]]
    y, x = np.mgrid[:32, :36]
    labels = np.zeros((len(heights), 32, 36), np.uint8)
    for index, height in enumerate(heights):
        position = FIRST + np.array([0, 0, height]) - 15.5 * spacing_mm * rows - 17.5 * spacing_mm * columns
        places = position + spacing_mm * (y[..., None] * rows + x[..., None] * columns) - FIRST
        for label, (middle, axes) in ORGANS.items():
            labels[index][(((places - middle) / axes) ** 2).sum(axis=-1) < 1] = label
        hu = HU[labels[index]]
        hu[:, :2] = -1000  # air
        ds = bad.make_slice(index, hu, 0.0)
        ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in position]
        ds.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in (*columns, *rows)]
        ds.PixelSpacing = [spacing_mm, spacing_mm]
        bad.save(ds, folder / f"{index:03d}.dcm")
    return labels


def _segmented(folder: Path) -> Segmentation:
    volume = read_ct(folder)
    hu = volume.voxels_hu
    labels = np.select([hu > 210, (hu < -170) & (hu > -700)], [1, 2]).astype(np.uint8)
    return Segmentation(labels, volume.affine, volume.source, warnings=volume.warnings)


def _from_seg(path: Path, folder: Path) -> np.ndarray:
    """By the slices that the frames refer to, and their pixels alone."""
    number_of = {pydicom.dcmread(p).SOPInstanceUID: int(p.stem) for p in folder.iterdir()}
    ds = pydicom.dcmread(path)
    found = np.zeros((len(number_of), ds.Rows, ds.Columns), np.uint8)
    for frame, group in zip(ds.pixel_array, ds.PerFrameFunctionalGroupsSequence, strict=True):
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        image: Any = pydicom.dcmread(folder / f"{number_of[source]:03d}.dcm")
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        np.testing.assert_allclose(position, np.array(image.ImagePositionPatient, float), atol=1e-5)
        found[number_of[source]][frame == 1] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return found


def _from_rtstruct(path: Path, folder: Path) -> np.ndarray:
    """Contours in the plane of the slice that they refer to."""
    images: dict[str, Any] = {str(ds.SOPInstanceUID): ds for ds in map(pydicom.dcmread, sorted(folder.iterdir()))}
    found = np.zeros((len(images), 32, 36), np.uint8)
    for item in pydicom.dcmread(path).ROIContourSequence:
        for contour in item.ContourSequence:
            uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
            axes = np.array(images[uid].ImageOrientationPatient, float).reshape(2, 3)
            points = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(images[uid].ImagePositionPatient,
                                                                                    float)
            assert np.abs(points @ np.cross(*axes)).max() < 1e-3
            inside = filled(points @ axes.T / float(images[uid].PixelSpacing[0]), (32, 36))
            found[int(images[uid].InstanceNumber) - 1][inside] = item.ReferencedROINumber
    return found


CASES = {"tilt": (17.0, EVEN, False), "tilt_back": (-13.5, EVEN, False), "turned": (24.0, EVEN, True),
         "whole_pixels": (float(np.degrees(np.arcsin(0.5))), EVEN, False), "uneven": (0.0, UNEVEN, False),
         "uneven_tilt": (11.0, UNEVEN, True)}


@pytest.mark.parametrize("name", CASES)
def test_labels_come_back_onto_the_slices_as_they_were_made(name: str, tmp_path: Path) -> None:
    tilt, heights, turned = CASES[name]
    folder = tmp_path / "ct"
    truth = _series(folder, tilt, heights, turned)
    found = _segmented(folder)
    assert any("resampled" in warning for warning in found.warnings)
    assert (f"tilted by {abs(tilt):.1f} degrees" in " ".join(found.warnings)) == (tilt != 0)
    series = read_source_series(folder, found.source)
    dicom_seg.write_dicom_seg(tmp_path / "seg.dcm", found, series, LABELS, ALGORITHM)
    dicom_rtstruct.write_rtstruct(tmp_path / "rt.dcm", found, series, LABELS, ALGORITHM)
    back = _from_seg(tmp_path / "seg.dcm", folder)
    np.testing.assert_array_equal(_from_rtstruct(tmp_path / "rt.dcm", folder), back)
    for label in ORGANS:
        meant, got = truth == label, back == label
        assert 2 * (meant & got).sum() / (meant.sum() + got.sum()) > (0.999 if name == "whole_pixels" else 0.93)
        apart = np.argwhere(meant).mean(0) - np.argwhere(got).mean(0)
        assert np.abs(apart).max() < 0.25


@pytest.mark.parametrize("name", CASES)
def test_the_straight_grid_lies_where_the_patient_lay(name: str, tmp_path: Path) -> None:
    """Organs in millimetres of the patient, from the grid's affine and from a NIfTI file, on their own sides."""
    tilt, heights, turned = CASES[name]
    _series(tmp_path / "ct", tilt, heights, turned)
    found = _segmented(tmp_path / "ct")
    axes = found.affine[:3, :3] / np.linalg.norm(found.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    write_segmentation(tmp_path / "seg.nii.gz", found, LABELS)
    again = read_segmentation(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(again.labels, found.labels)
    for label, (middle, half_axes) in ORGANS.items():
        z, y, x = np.nonzero(again.labels == label)
        places = np.stack([x, y, z, np.ones(len(x))]).T @ again.affine.T
        expected = (FIRST + middle) * (-1, -1, 1)
        assert np.abs(places[:, :3].mean(axis=0) - expected).max() < 0.6
        assert again.volume_ml(label) == pytest.approx(4 / 3 * np.pi * np.prod(half_axes) / 1000, rel=0.08)


def test_beyond_what_gantries_do_a_lean_is_refused(tmp_path: Path) -> None:
    _series(tmp_path / "ct", 40.0, EVEN)
    with pytest.raises(VolumeError) as caught:
        read_ct(tmp_path / "ct")
    assert (caught.value.code, caught.value.exit_code) == ("GANTRY_TILT", 3) and "got 40.0" in caught.value.fault


def test_another_series_than_was_resampled_is_found_out(tmp_path: Path) -> None:
    _series(tmp_path / "a", 17.0, EVEN)
    _series(tmp_path / "b", -17.0, EVEN)
    with pytest.raises(VolumeError) as caught:
        read_source_series(tmp_path / "b", read_ct(tmp_path / "a").source)
    assert caught.value.code == "SERIES_CHANGED"
