"""What users of this field have reported: series with more in them, or beside them, than one scan.

The same tables as `make_dicom`, which takes them in; and makers that tests call with values of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from make_series import (
    COLUMNS,
    NUM_SLICES,
    ROWS,
    SERIES_UID,
    SPACING,
    Change,
    Maker,
    hu_array,
    make_slice,
    save,
    series,
    set_tags,
)
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, RawDataStorage

OTHER_SERIES = "1.2.826.0.1.3680043.8.498.2"
PRIVATE_SYNTAX = "1.2.840.113619.5.2"


def second_pass(shift_mm: float, *, num_slices: int = NUM_SLICES, first: Change | None = None, **tags: object) -> Maker:
    """A series and a second pass in it over the same patient, who moved meanwhile; `tags` are the second pass's, and
    `first` acts on the slices of the first."""

    def after(folder: Path) -> None:
        for index in range(num_slices):
            moved = np.roll(hu_array(num_slices)[index], 3, axis=1)
            ds = make_slice(index, moved, -100 + SPACING[0] * index + shift_mm)
            ds.SOPInstanceUID = f"{SERIES_UID}.5.{index + 1}"
            for name, value in tags.items():
                setattr(ds, name, value)
            save(ds, folder / f"z{index:03d}.dcm")

    return series(first, num_slices=num_slices, after=after)


def beside(change: Change, *, num: int = 3, series_uid: str | None = OTHER_SERIES) -> Callable[[Path], None]:
    """Objects of CT beside a scan, in a series of their own or, with None, in its series."""

    def after(folder: Path) -> None:
        for index in range(num):
            ds = make_slice(index, hu_array()[index], SPACING[0] * index)
            ds.SOPInstanceUID = f"{SERIES_UID}.6.{index + 1}"
            if series_uid is not None:
                ds.SeriesInstanceUID = series_uid
            change(ds, index)
            save(ds, folder / f"a{index:03d}.dcm")

    return after


def colours(ds: FileDataset, index: int) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = bytes(ROWS * COLUMNS * 3)


def page(ds: FileDataset, index: int) -> None:
    """A dose report as a picture."""
    ds.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    ds.Rows, ds.Columns, ds.PixelData = 16, 18, bytes(16 * 18 * 2)


def projection(ds: FileDataset, index: int) -> None:
    ds.ImageType = ["DERIVED", "SECONDARY", "MIP"]
    del ds.RescaleSlope, ds.RescaleIntercept


def enhanced(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.NumberOfFrames = 2


def raw_data(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = RawDataStorage
    del ds.PixelData, ds.Rows, ds.Columns, ds.ImagePositionPatient


def vendor_object(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.3.12.2.1107.5.9.1"
    del ds.PixelData, ds.ImagePositionPatient


def deflate(path: Path) -> None:
    """The same object with its data set deflated."""
    content = path.read_bytes()
    at = content.index(b"\x08\x00", 132 + 12)  # the first tag behind group 2
    meta = content[132:at].replace(b"1.2.840.10008.1.2.1\0", DeflatedExplicitVRLittleEndian.encode())
    meta = meta.replace(b"\x02\0\x10\0UI\x14\0", b"\x02\0\x10\0UI\x16\0")
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(content[:132] + meta + squeezer.compress(content[at:]) + squeezer.flush())


def deflated(change: Change, **where: object) -> Callable[[Path], None]:
    write = beside(change, **where)  # type: ignore[arg-type]

    def after(folder: Path) -> None:
        write(folder)
        for path in folder.glob("a*.dcm"):
            deflate(path)

    return after


def without_preamble(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])


def padded(value: int, *, signed: bool = False, bits: int = 16, vr: str = "US", limit: int | None = None,
           pixels: int | None = None, intercept: int = -1024) -> Maker:
    """Padding around the patient, in the two outermost rows and columns: the numbers `pixels` (or `value`), whatever
    form the tags have."""

    def change(ds: FileDataset, index: int) -> None:
        hu = hu_array()[index].astype(np.int64)
        stored = hu - intercept
        edge = np.ones(hu.shape, bool)
        edge[2:-2, 2:-2] = False
        stored[edge] = value if pixels is None else pixels
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits, bits - 1, int(signed), intercept
        ds.PixelData = (stored & 0xFFFF).astype("<u2").tobytes()
        ds.add_new(0x00280120, vr, value)
        if limit is not None:
            ds.add_new(0x00280121, vr, limit)

    return series(change)


def at_heights(heights: Sequence[float], numbers: Sequence[int] | None = None) -> Maker:
    """Slices at these millimetres above the first, with InstanceNumbers of their own or none."""

    def change(ds: FileDataset, index: int) -> None:
        if numbers is None:
            del ds.InstanceNumber
        else:
            ds.InstanceNumber = int(numbers[index])

    return series(change, num_slices=len(heights), height=lambda index: round(-100 + float(heights[index]), 6))


def _sixth_digit(ds: FileDataset, index: int) -> None:
    ds.PixelSpacing = ["2.5" if index % 2 == 0 else "2.500002", "2"]


_EVERY_FOURTH = tuple(range(3, 23, 4))
BROKEN: dict[str, tuple[Maker, str, int]] = {
    "47_every_fourth_missing": (series(num_slices=24, skip=_EVERY_FOURTH), "MISSING_SLICES", 3),
    "48_all_in_one_place": (series(height=lambda i: 0.0), "SAME_PLACE", 3),
    "50_two_acquisitions": (second_pass(1.5, first=set_tags(AcquisitionNumber=1), AcquisitionNumber=2),
                            "ACQUISITION_CHOICE", 2),
    "50_two_passes_by_time": (second_pass(1.5, first=set_tags(AcquisitionTime="101010.25"), AcquisitionTime="101200"),
                              "ACQUISITION_CHOICE", 2),
    "50_two_kernels_in_one_place": (second_pass(0, first=set_tags(ConvolutionKernel="Doe soft"),
                                                ConvolutionKernel="Doe bone"), "ACQUISITION_CHOICE", 2),
    "50_series_of_one_slice": (series(lambda ds, i: setattr(ds, "SeriesInstanceUID", f"{SERIES_UID}.{i}")),
                               "SERIES_CHOICE", 2),
    "59_private_syntax": (series(lambda ds, i: setattr(ds.file_meta, "TransferSyntaxUID", PRIVATE_SYNTAX)), "CODEC", 3),
    "61_deflated_slices_of_the_series": (series(after=deflated(lambda ds, i: None, series_uid=None)), "CODEC", 3),
    "65_raw_data": (series(raw_data), "MODALITY", 3),
}
ODD: dict[str, tuple[Maker, str | None]] = {
    "46_group_two_first": (series(after=without_preamble), None),
    "50_acquisitions_in_blocks": (series(lambda ds, i: setattr(ds, "AcquisitionNumber", i // 4 + 1)), None),
    "58_spacing_in_the_sixth_digit": (series(_sixth_digit), None),
    "61_deflated_beside": (series(after=deflated(lambda ds, i: None)), "cannot be read (CODEC)"),
    "61_uid_in_a_text": (series(set_tags(ImageComments=f"Doe {DeflatedExplicitVRLittleEndian}")), None),
    "65_colours_beside": (series(after=beside(colours)), "3 images of other series that cannot be read (DTYPE)"),
    "65_page_in_the_series": (series(after=beside(page, series_uid=None)), "3 pictures or pages that are no slices"),
    "65_projection_beside": (series(after=beside(projection)), "cannot be read (NOT_HU)"),
    "65_enhanced_beside": (series(after=beside(enhanced, num=1)), "1 multi-frame CT image"),
    "65_raw_data_beside": (series(after=beside(raw_data)), "3 DICOM files of other kinds"),
}
