"""Image files in and out: the only package that opens them, and the only one that knows a file's own axis order."""

from __future__ import annotations

from pathlib import Path

from autosam3d.io.itk.read import is_itk, read_itk_ct, read_itk_labels
from autosam3d.io.nifti.read import read_nifti_ct, read_nifti_labels
from autosam3d.io.nifti.write import write_array, write_ct, write_segmentation
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.volume import Segmentation, Volume

__all__ = ["ReadOptions", "read_ct", "read_segmentation", "write_array", "write_ct", "write_segmentation"]


def read_ct(path: str | Path, options: ReadOptions = DEFAULTS) -> Volume:
    """A CT in Hounsfield units from a NIfTI, NRRD or MetaImage file, or from a folder with one DICOM series.

    Args:
        path: the file or the folder.
        options: answers to what a scan may leave open.

    Returns:
        float32 voxels in HU as [z, y, x], as near to S, A, R as the file's axes allow, with their affine.

    Raises:
        VolumeError: the scan is broken, ambiguous, or not CT in Hounsfield units.
        ResourceError: MEMORY.
        UsageError: SERIES_CHOICE, ACQUISITION_CHOICE, VOLUME_INDEX; MissingExtraError where DICOM support is not
            installed.
    """
    if Path(path).is_dir() and not str(path).lower().endswith((".nii", ".nii.gz")):
        from autosam3d.io.dicom.series import read_dicom_series  # pydicom is optional and slow to import

        return read_dicom_series(path, options)
    return (read_itk_ct if is_itk(path) else read_nifti_ct)(path, options)


def read_segmentation(path: str | Path, options: ReadOptions = DEFAULTS) -> Segmentation:
    """A label map from a NIfTI, NRRD (`.seg.nrrd`, too) or MetaImage file.

    Args:
        path: the file.
        options: answers to what a file may leave open.

    Returns:
        uint8 or uint16 labels as [z, y, x], with their affine and, where the file names them, the organs.

    Raises:
        VolumeError: the file is broken, ambiguous, or no label map.
        ResourceError: MEMORY.
        UsageError: VOLUME_INDEX.
    """
    return (read_itk_labels if is_itk(path) else read_nifti_labels)(path, options)
