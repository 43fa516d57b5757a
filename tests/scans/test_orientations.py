"""An asymmetric phantom through every orientation that a NIfTI file can have: the right side stays the right side.

The files are written and read by nibabel alone, and what must come out is known from the phantom, not from this
package. The same for DICOM series, into SEG and RTSTRUCT, is in `tests/io/test_dicom_out.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from test_batch import Model
from test_inference import make_recipe

from autosam3d.scans.batch import segment_batch
from autosam3d.scans.jobs import check_inputs

CODES = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)]
SHAPE, SPACING_MM, ORIGIN_MM = (44, 40, 16), (4.0, 4.5, 5.5), (-83.0, -71.0, 412.0)  # x, y, z
BOXES = {1: (slice(28, 37), slice(22, 32), slice(9, 14)),  # right, front, high
         2: (slice(8, 13), slice(8, 15), slice(3, 7))}  # left, back, low


class BySide:
    """Of what is as bright as an organ, the right front upper part of the body is one organ, the left back lower part
    the other: it answers rightly only where x runs to the right, y to the front and z to the head."""

    patch_size = SHAPE[::-1]
    num_outputs = 3

    def predict(self, patches: np.ndarray) -> np.ndarray:
        bright = patches[:, 0] > 0.5
        far = [axis >= n // 2 for axis, n in zip(np.indices(self.patch_size), self.patch_size, strict=True)]
        high, low = np.logical_and.reduce(far), ~np.logical_or.reduce(far)
        return np.stack([~bright, bright & high, bright & low], axis=1).astype(np.float32)

    def activation_bytes(self, batch_size: int) -> int:
        return 0


@dataclass
class SideModel(Model):
    @property
    def predictor(self) -> Any:
        return BySide()


def truth() -> np.ndarray:
    """Labels [x, y, z], R A S; no axis and no pair of axes can be turned without a voxel that differs."""
    labels = np.zeros(SHAPE, np.uint8)
    for label, box in BOXES.items():
        labels[box] = label
    labels[34:37, 22:25, 9:11] = 0  # a notch, so that no box is like its own mirror image
    labels[8:10, 13:15, 5:7] = 0
    return labels


def phantom_hu() -> np.ndarray:
    hu = np.full(SHAPE, -1000, np.int16)
    hu[5:40, 6:34] = np.random.default_rng(0).integers(-20, 10, (35, 28, 16))
    return np.where(truth() > 0, 80, hu).astype(np.int16)


def placed(turn_deg: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """4x4, voxel (x, y, z) of the phantom to RAS+ mm, turned about x, y and z."""
    (a, b, c), affine = np.radians(turn_deg), np.diag([*SPACING_MM, 1.0])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine[:3, :3] = about_z @ about_y @ about_x @ affine[:3, :3]
    affine[:3, 3] = ORIGIN_MM
    return affine


@pytest.mark.parametrize(("codes", "turn_deg"), [*((codes, (0, 0, 0)) for codes in CODES), ("LPS", (12, -7, 30)),
                                                 ("SAL", (-25, 16, 9))])
def test_the_right_side_stays_right_from_nifti_to_nifti(
    codes: str, turn_deg: tuple[float, float, float], tmp_path: Path
) -> None:
    affine = placed(turn_deg)
    way = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(phantom_hu(), way)
    scan = nib.Nifti1Image(stored, affine @ inv_ornt_aff(way, SHAPE))
    assert nib.aff2axcodes(scan.affine) == tuple(codes)
    nib.save(scan, tmp_path / "ct.nii.gz")
    result = segment_batch(check_inputs(tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz"), SideModel(make_recipe()))
    assert [path.name for path in result.written] == ["seg.nii.gz"]

    written: Any = nib.load(tmp_path / "seg.nii.gz")
    read: Any = nib.load(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(written.affine, read.affine)
    assert written.shape == stored.shape
    np.testing.assert_array_equal(np.asarray(written.dataobj), nib.orientations.apply_orientation(truth(), way))
    canonical: Any = nib.as_closest_canonical(written)
    np.testing.assert_array_equal(io_orientation(canonical.affine), axcodes2ornt("RAS"))
    np.testing.assert_array_equal(np.asarray(canonical.dataobj), truth())
    np.testing.assert_allclose(canonical.affine, affine, atol=1e-4)
    # In millimetres of the patient, where the phantom has them; to the right x grows.
    for label in BOXES:
        found = nib.affines.apply_affine(written.affine, np.argwhere(np.asarray(written.dataobj) == label)).mean(0)
        np.testing.assert_allclose(found, (affine @ [*np.argwhere(truth() == label).mean(0), 1])[:3], atol=1e-3)
