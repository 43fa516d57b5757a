"""Label maps whose numbers went through a scale: nibabel saves an array of floats under a header of integers so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.errors import VolumeError
from autosam3d.io import read_segmentation

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def _saved(path: Path, labels: np.ndarray, dtype: Any) -> Path:
    image = nib.Nifti1Image(labels.astype(np.float64), AFFINE)
    image.header.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def _labels(num: int) -> np.ndarray:
    return (np.indices((20, 18, 16)).sum(axis=0) * 7 % (num + 1)).astype(np.uint8)  # [x, y, z]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("num", [2, 24, 117])
def test_scaled_labels_are_the_whole_numbers_again(dtype: Any, num: int, tmp_path: Path) -> None:
    labels = _labels(num)
    path = _saved(tmp_path / "l.nii.gz", labels, dtype)
    stored: Any = nib.load(path)
    assert 0 < stored.dataobj.slope < 1
    found = read_segmentation(path)
    np.testing.assert_array_equal(found.labels, labels.T)
    off = np.abs(np.asarray(stored.dataobj) - labels).max()
    assert any("within half a step" in w for w in found.warnings) == (off > 1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("value", [0.5, 0.98, 1.25])
def test_interpolated_labels_stay_refused(dtype: Any, value: float, tmp_path: Path) -> None:
    labels = _labels(2).astype(np.float64)
    labels[5, 5, 5] = value
    with pytest.raises(VolumeError, match="1 voxels between them") as caught:
        read_segmentation(_saved(tmp_path / "l.nii.gz", labels, dtype))
    assert caught.value.code == "LABEL_FLOAT"


def test_floats_that_are_stored_as_floats_have_no_step(tmp_path: Path) -> None:
    labels = _labels(2).astype(np.float64)
    labels[5, 5, 5] = 0.9961
    with pytest.raises(VolumeError) as caught:
        read_segmentation(_saved(tmp_path / "l.nii.gz", labels, np.float32))
    assert caught.value.code == "LABEL_FLOAT"
