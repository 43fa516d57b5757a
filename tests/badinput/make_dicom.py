"""Broken, odd and hostile DICOM folders; the companion of `make_nifti`, with the same tables.

``BROKEN[name] = (maker, code, exit_code)`` and ``ODD[name] = (maker, words)``. A maker writes slices into the folder
that it is given and returns the path to read. Every text tag carries ``Doe``: it must turn up in no message.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_field import BROKEN as FIELD_BROKEN
from make_field import ODD as FIELD_ODD
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
)
from make_series import delete_tag as _delete
from make_series import extra_slice as _extra
from make_series import set_tags as _set
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
)


def _cut(share: float) -> Callable[[Path], None]:
    def after(folder: Path) -> None:
        path = folder / "slice005.dcm"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return after


def _second_series(num_slices: int, patient: str = "Doe-4711") -> Callable[[Path], None]:
    def after(folder: Path) -> None:
        for index in range(num_slices):
            ds = make_slice(index, hu_array()[index], SPACING[0] * index)
            ds.SeriesInstanceUID, ds.PatientID = "1.2.826.0.1.3680043.8.498.2", patient
            save(ds, folder / f"other{index:03d}.dcm")

    return after


def _tilt(degrees: float) -> Change:
    """A gantry tilted about x: the slices lean, their positions still lie one above the other."""
    sine, cosine = float(np.sin(np.radians(degrees))), float(np.cos(np.radians(degrees)))

    def change(ds: FileDataset, index: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(cosine, 8), round(-sine, 8)]
        ds.GantryDetectorTilt = degrees

    return change


def _sideways(ds: FileDataset, index: int) -> None:
    ds.ImagePositionPatient = [-20.5 + 12 * (index == 6), -30.25, -100 + SPACING[0] * index]


def _syntax(uid: str) -> Change:
    def change(ds: FileDataset, index: int) -> None:
        ds.file_meta.TransferSyntaxUID = uid
        if uid == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
            ds["PixelData"].VR = "OW"

    return change


def _unknown_codec(ds: FileDataset, index: int) -> None:
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"  # MPEG-4: never a decoder for single frames
    ds.PixelData = encapsulate([b"\xff" * 64])
    ds["PixelData"].is_undefined_length = True


def _rle(ds: FileDataset, index: int) -> None:
    ds.compress(RLELossless, generate_instance_uid=False)


def _broken_rle(ds: FileDataset, index: int) -> None:
    ds.file_meta.TransferSyntaxUID = RLELossless
    ds.PixelData = encapsulate([b"\x02\0\0\0" + b"\xf0" * 200])
    ds["PixelData"].is_undefined_length = True


def _broken_jpeg(uid: str) -> Change:
    def change(ds: FileDataset, index: int) -> None:
        ds.file_meta.TransferSyntaxUID = uid
        ds.PixelData = encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 200])
        ds["PixelData"].is_undefined_length = True

    return change


def _deflated_bomb(folder: Path) -> None:
    path = folder / "slice005.dcm"
    content = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", DeflatedExplicitVRLittleEndian.encode()[:20], 1)
    head = content[:132] + _meta(DeflatedExplicitVRLittleEndian)
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(64)) + squeezer.flush()
    path.write_bytes(head + body)


def _meta(syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    element = b"\x02\0\x10\0UI" + struct.pack("<H", len(value)) + value
    return b"\x02\0\0\0UL" + struct.pack("<HI", 4, len(element)) + element


def _nested(folder: Path) -> None:
    """20,000 sequences, each inside the other: 400 kB that crash parsers which recurse in C++."""
    level = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    (folder / "slice005.dcm").write_bytes(bytes(128) + b"DICM" + _meta(ExplicitVRLittleEndian) + level * 20_000)


def _forged_length(folder: Path) -> None:
    path = folder / "slice005.dcm"
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\0OW") + 8
    path.write_bytes(content[:at] + struct.pack("<I", 0xFFFFFFF0) + content[at + 4 :][:300])


def _forged_tag_length(folder: Path) -> None:
    path = folder / "slice005.dcm"
    path.write_bytes(path.read_bytes().replace(b"\x10\0\x10\0PN\x08\0", b"\x10\0\x10\0UT\0\0\xf0\xff\xff\xff", 1))


def _empty(folder: Path) -> Path:
    return folder


def _no_dicom(folder: Path) -> Path:
    (folder / "readme.txt").write_text("x" * 1000)
    (folder / "scan.nii.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    return folder


def _bits_above(ds: FileDataset, index: int) -> None:
    """An old overlay in the four bits above the twelve of the image."""
    stored = np.frombuffer(ds.PixelData, "<u2") | (np.arange(ROWS * COLUMNS) % 16 << 12).astype("<u2")
    ds.PixelData = stored.astype("<u2").tobytes()


def _signed(bits: int) -> Change:
    def change(ds: FileDataset, index: int) -> None:
        stored = np.frombuffer(ds.PixelData, "<u2").astype(np.int32) - 1024
        ds.PixelData = (stored & ((1 << bits) - 1)).astype("<u2").tobytes()
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits, bits - 1, 1, 0

    return change


def _varying_rescale(ds: FileDataset, index: int) -> None:
    ds.RescaleIntercept = -1024 - index
    ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") + index).astype("<u2").tobytes()


def _wrong_texts(ds: FileDataset, index: int) -> None:
    ds.SpecificCharacterSet = "NO SUCH SET"
    ds.PatientBirthDate, ds.StudyDate, ds.AccessionNumber = "00000000", "Doe-date", "Doe" * 20
    ds.PatientName = "Doe^J\xf6rg"


def _links_and_directory(folder: Path) -> None:
    (folder / "DICOMDIR").write_bytes((folder / "slice000.dcm").read_bytes())
    (folder / "link.dcm").symlink_to("/etc/passwd")


def _shuffled(ds: FileDataset, index: int) -> None:
    """What order could be taken from, taken away: the number is gone, and names run the other way."""
    del ds.InstanceNumber


def _numbered_downwards(ds: FileDataset, index: int) -> None:
    ds.InstanceNumber = NUM_SLICES - index


def _rename_backwards(folder: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(folder / f"a{number:03d}.dcm")


def _another_modality(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    ds.Modality = "MR"


def _positron_emission(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
    ds.Modality = "PT"


def _secondary_capture(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    del ds.ImagePositionPatient


def _structure_set(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    ds.Modality, ds.StructureSetROISequence = "RTSTRUCT", Sequence([])
    del ds.PixelData, ds.Rows


def _multiframe(ds: FileDataset, index: int) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.NumberOfFrames = 4


def _across(ds: FileDataset, index: int) -> None:
    ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


# What an operating system would run where a DICOM file had these for its preamble (CVE-2019-11687).
PROGRAMS = (b"MZ\x90\0Doe".ljust(128, b"\x90"), b"\x7fELF\x02\x01\x01Doe".ljust(128, b"\x90"))
HEIGHTS_UNEVEN = [0, 3, 6.4, 9.1, 12, 15.3, 18, 21.5, 24, 27, 30.2, 33]
BROKEN: dict[str, tuple[Maker, str, int]] = {
    "45_empty_folder": (_empty, "NO_DICOM", 3),
    "45_no_dicom": (_no_dicom, "NO_DICOM", 3),
    "46_cut_in_pixels": (series(after=_cut(0.7)), "SLICE_CORRUPT", 3),
    "46_cut_in_header": (series(after=_cut(0.2)), "SLICE_CORRUPT", 3),
    "46_cut_to_nothing": (series(after=_cut(0)), "SLICE_CORRUPT", 3),
    "46_cut_last_bytes": (series(after=_cut(0.995)), "SLICE_CORRUPT", 3),
    "47_two_missing": (series(skip=(4, 5)), "MISSING_SLICES", 3),
    "47_one_missing": (series(skip=(7,)), "MISSING_SLICES", 3),
    "48_place_taken_twice": (series(after=_extra(3, -100 + 9, hu=hu_array()[5])), "DUPLICATE_SLICE", 3),
    "49_one_uid_two_places": (series(_set(only=5, SOPInstanceUID=f"{SERIES_UID}.4")), "DUPLICATE_SLICE", 3),
    "49_one_uid_other_pixels": (series(after=_extra(3, -100 + 9, _set(SOPInstanceUID=f"{SERIES_UID}.4"),
                                                    hu=hu_array()[5])), "DUPLICATE_SLICE", 3),
    "50_two_series": (series(after=_second_series(10)), "SERIES_CHOICE", 2),
    "50_two_patients": (series(after=_second_series(10, "Doe-2")), "PATIENTS", 3),
    "50_patients_in_one_series": (series(_set(only=4, PatientID="Doe-3")), "PATIENTS", 3),
    "50_frames_of_reference": (series(_set(only=4, FrameOfReferenceUID="1.9")), "MIXED_FRAME", 3),
    "51_half_across": (series(lambda ds, i: _across(ds, i) if i % 2 else None), "MIXED_ORIENTATION", 3),
    "51_only_localizers": (series(_set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])), "MODALITY", 3),
    "52_beyond_gantries": (series(_tilt(40)), "GANTRY_TILT", 3),
    "52_shifted_sideways": (series(_sideways), "MISALIGNED", 3),
    "53_very_uneven": (series(height=lambda i: 7.0 * (i // 2) + 2 * (i % 2)), "UNEVEN_SPACING", 3),
    "55_no_pixel_spacing": (series(_delete("PixelSpacing", 3)), "TAG_MISSING", 3),
    "55_zero_pixel_spacing": (series(_set(only=3, PixelSpacing=[0, 1])), "TAG_INVALID", 3),
    "56_no_position": (series(_delete("ImagePositionPatient", 3)), "TAG_MISSING", 3),
    "56_no_orientation": (series(_delete("ImageOrientationPatient", 3)), "TAG_MISSING", 3),
    "56_orientation_zero": (series(_set(only=3, ImageOrientationPatient=[0] * 6)), "TAG_INVALID", 3),
    "56_orientation_skewed": (series(_set(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])), "AFFINE_SHEAR", 3),
    "56_two_coordinates": (series(_set(only=3, ImagePositionPatient=[1, 2])), "TAG_INVALID", 3),
    "57_no_rescale": (series(_delete("RescaleSlope")), "NOT_HU", 3),
    "57_rescale_zero": (series(_set(RescaleSlope=0)), "TAG_INVALID", 3),
    "57_rescale_forgotten": (series(_set(RescaleIntercept=0)), "NOT_HU", 3),
    "57_iodine_map": (series(_set(RescaleType="MGML")), "NOT_HU", 3),
    "58_mixed_size": (series(_set(only=3, Rows=16, PixelData=bytes(16 * COLUMNS * 2))), "MIXED_SIZE", 3),
    "58_mixed_spacing": (series(_set(only=3, PixelSpacing=[2, 2])), "MIXED_SIZE", 3),
    "59_no_codec": (series(_unknown_codec), "CODEC", 3),
    "59_unknown_syntax": (series(_syntax("1.2.3.4")), "CODEC", 3),
    "60_broken_fragments": (series(_broken_rle), "SLICE_CORRUPT", 3),
    "60_broken_jpeg2000": (series(_broken_jpeg("1.2.840.10008.1.2.4.90")), "SLICE_CORRUPT", 3),
    "61_deflated_bomb": (series(after=_deflated_bomb), "CODEC", 3),
    "62_nested": (series(after=_nested), "NESTING", 3),
    "63_forged_length": (series(after=_forged_length), "SLICE_CORRUPT", 3),
    "63_forged_tag_length": (series(after=_forged_tag_length), "SLICE_CORRUPT", 3),
    "63_forged_rows": (series(_set(only=3, Rows=65535, Columns=65535)), "LENGTH", 3),
    "63_more_rows_than_bytes": (series(_set(only=3, Rows=8000, Columns=8000)), "LENGTH", 3),
    "64_enhanced": (series(_multiframe), "MULTIFRAME", 3),
    "64_frames_in_classic": (series(_set(NumberOfFrames=2)), "MULTIFRAME", 3),
    "65_mr": (series(_another_modality), "MODALITY", 3),
    "65_pet": (series(_positron_emission), "MODALITY", 3),
    "65_secondary_captures": (series(_secondary_capture), "MODALITY", 3),
    "66_colour": (series(_set(SamplesPerPixel=3, PhotometricInterpretation="RGB")), "DTYPE", 3),
    "66_one_bit": (series(_set(BitsAllocated=1)), "DTYPE", 3),
    "69_bad_number": (series(after=lambda folder: _spoil_number(folder)), "TAG_INVALID", 3),
    "41_seven_slices": (series(num_slices=7), "FEW_SLICES", 3),
    "35_constant": (series(_set(PixelData=bytes(ROWS * COLUMNS * 2))), "NO_CONTENT", 3),
} | FIELD_BROKEN


def _spoil_number(folder: Path) -> None:
    path = folder / "slice005.dcm"
    content = path.read_bytes()
    assert b"-20.5\\-30.25" in content
    path.write_bytes(content.replace(b"-20.5\\-30.25", b"Doe 5\\-30.25", 1))


ODD: dict[str, tuple[Maker, str | None]] = {
    "00_good": (series(), None),
    "48_twice_the_same": (series(after=_extra(3, -100 + 9)), "1 slices were there twice"),
    "49_same_file_twice": (series(after=_extra(3, -100 + 9, _set(SOPInstanceUID=f"{SERIES_UID}.4"))),
                           "1 slices were there twice"),
    "50_short_second_series": (series(after=_second_series(3)), "shorter ones are left out"),
    "51_localizer": (series(after=_extra(0, 50, _set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))), "1 localizer"),
    "51_unmarked_localizer": (series(after=_extra(0, 50, _across)), "lie across the stack"),
    "54_no_numbers_names_reversed": (series(_shuffled, after=_rename_backwards), None),
    "54_reversed": (series(height=lambda i: -100 + SPACING[0] * i, change=_numbered_downwards), None),
    "57_varying_rescale": (series(_varying_rescale), "vary from slice to slice"),
    "59_rle": (series(_rle), None),
    "65_structure_set_beside": (series(after=_extra(0, 0, _structure_set)), "1 RTSTRUCT"),
    "65_dose_report_beside": (series(after=_extra(0, 0, _secondary_capture)), "1 secondary capture"),
    "66_monochrome1": (series(_set(PhotometricInterpretation="MONOCHROME1")), "MONOCHROME1"),
    "66_bits_above": (series(_bits_above), "bits set above BitsStored"),
    "66_signed_16": (series(_signed(16)), None),
    "66_signed_12_of_16": (series(_signed(12)), None),
    "66_big_endian": (series(_syntax(ExplicitVRBigEndian)), None),
    "66_implicit": (series(_syntax(ImplicitVRLittleEndian)), None),
    "67_directory_and_links": (series(after=_links_and_directory), "1 link"),
    "68_program_in_preamble": (series(lambda ds, i: setattr(ds, "preamble", PROGRAMS[i % 2])), None),
    "69_wrong_texts": (series(_wrong_texts), None),
    "69_no_uids": (series(_set(SOPInstanceUID="", StudyInstanceUID="\u00e9.1")), None),
    "70_text_file_beside": (series(after=lambda folder: (folder / "readme.txt").write_text("x") and None), "not DICOM"),
} | FIELD_ODD
TILTED: Maker = series(_tilt(13.5))
UNEVEN: Maker = series(height=lambda i: HEIGHTS_UNEVEN[i])
HTJ2K: Maker = series(_broken_jpeg(HTJ2KLossless))
