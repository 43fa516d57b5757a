"""One CT series, slice by slice: what the makers of broken, odd and reported DICOM folders begin with.

Every text tag carries ``Doe``: it must turn up in no message.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_nifti import ct_array
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

Maker = Callable[[Path], Path]
Change = Callable[[FileDataset, int], None]
NUM_SLICES, ROWS, COLUMNS = 12, 20, 24
SPACING = (3.0, 2.5, 2.0)  # z, y (between rows), x (between columns)
SERIES_UID = "1.2.826.0.1.3680043.8.498.1"


def hu_array(num_slices: int = NUM_SLICES) -> np.ndarray:
    """int16 [slice, row, column] HU that twelve bits above -1024 can hold."""
    return ct_array((COLUMNS, ROWS, num_slices)).T.clip(-1024, 3071)


def make_slice(index: int, hu: np.ndarray, height_mm: float) -> FileDataset:
    """One axial CT slice, head first, supine: rows run to the left, columns to the back."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"{SERIES_UID}.{index + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = SERIES_UID, "1.2.3", "1.2.4"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Doe^Jane", "Doe-4711", "19700101"
    ds.StudyDescription, ds.SeriesDescription, ds.InstitutionName = "Doe study", "Doe series", "Doe hospital"
    ds.Modality, ds.ImageType, ds.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], index + 1
    ds.ImagePositionPatient = [-20.5, -30.25, height_mm]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [SPACING[1], SPACING[2]]
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *hu.shape, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.PixelData = (hu + 1024).astype("<u2").tobytes()
    return ds


def save(ds: FileDataset, path: Path) -> None:
    syntax = ds.file_meta.TransferSyntaxUID
    dcmwrite(path, ds, enforce_file_format=False, force_encoding=True, implicit_vr=syntax == ImplicitVRLittleEndian,
             little_endian=syntax != ExplicitVRBigEndian)


def series(
    change: Change | None = None, *, num_slices: int = NUM_SLICES, skip: tuple[int, ...] = (),
    height: Callable[[int], float] = lambda i: -100 + SPACING[0] * i, after: Callable[[Path], None] | None = None,
) -> Maker:
    """A folder with one series; `change(dataset, index)` acts on every slice, `after(folder)` on the folder."""

    def maker(folder: Path) -> Path:
        folder = folder / "series"
        folder.mkdir()
        voxels = hu_array(num_slices)
        for index in range(num_slices):
            if index in skip:
                continue
            ds = make_slice(index, voxels[index], height(index))
            if change is not None:
                change(ds, index)
            save(ds, folder / f"slice{index:03d}.dcm")
        if after is not None:
            after(folder)
        return folder

    return maker


def set_tags(only: int | None = None, **tags: object) -> Change:
    def change(ds: FileDataset, index: int) -> None:
        if only is None or index == only:
            for name, value in tags.items():
                setattr(ds, name, value)

    return change


def delete_tag(name: str, only: int | None = None) -> Change:
    def change(ds: FileDataset, index: int) -> None:
        if only is None or index == only:
            delattr(ds, name)

    return change


def extra_slice(index: int, height_mm: float, change: Change | None = None, name: str = "zextra.dcm",
           hu: np.ndarray | None = None) -> Callable[[Path], None]:
    def after(folder: Path) -> None:
        ds = make_slice(index, hu_array()[min(index, NUM_SLICES - 1)] if hu is None else hu, height_mm)
        ds.SOPInstanceUID = f"{SERIES_UID}.99"
        if change is not None:
            change(ds, index)
        save(ds, folder / name)

    return after
