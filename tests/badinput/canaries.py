"""T17: sixty places in which a scan names its patient, each with a text of its own that must turn up nowhere.

DICOM objects are filed with their scan, so they carry the patient and study tags of `CARRIED` and none besides.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import make_dicom
import make_field
import make_series
import numpy as np
from make_nifti import ct_array, nifti_bytes

# What `io.dicom.source` takes over, documented in docs/bad-input.md.
CARRIED = {"PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
           "AccessionNumber", "ReferringPhysicianName", "StudyID", "PositionReferenceIndicator"}
_TEXTS = (
    "PatientName", "PatientID", "IssuerOfPatientID", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName",
    "PatientAddress", "PatientTelephoneNumbers", "PatientComments", "AdditionalPatientHistory", "EthnicGroup",
    "Occupation", "MilitaryRank", "RegionOfResidence", "InstitutionName", "InstitutionAddress",
    "InstitutionalDepartmentName", "StationName", "ReferringPhysicianName", "PhysiciansOfRecord",
    "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName", "StudyDescription",
    "SeriesDescription", "ProtocolName", "RequestedProcedureDescription", "AccessionNumber", "StudyID",
    "ImageComments", "DeviceSerialNumber", "BodyPartExamined", "PositionReferenceIndicator",
)
_DATES = {"PatientBirthDate": "19310917", "StudyDate": "19470823", "SeriesDate": "19470829",
          "AcquisitionDate": "19471103", "StudyTime": "031415.926535"}
_ELSEWHERE = ("private", "private in a sequence", "sequence", "other numbers", "trailing padding", "overlay",
              "preamble", "application", "private header", "slice", "folder", "comment", "member")


def canary(place: str) -> str:
    """At most 12 letters and figures, of that place alone."""
    return f"KANARIE{zlib.crc32(place.encode()) % 100_000:05d}"


DICOM = {place: canary(place) for place in (*_TEXTS, *_ELSEWHERE)} | _DATES
NIFTI = {place: canary(f"nifti {place}") for place in ("descrip", "db_name", "aux_file", "intent_name", "comment",
                                                       "dicom extension", "gzip name", "gzip comment", "gzip extra")}
ALL = {*DICOM.values(), *NIFTI.values()}
assert len(ALL) == len(DICOM) + len(NIFTI) == 60


def mark(ds: Any, index: int = 0) -> None:
    """Put the canaries into one slice."""
    from pydicom.dataset import Dataset

    for place in _TEXTS:
        setattr(ds, place, DICOM[place])
    for place, value in _DATES.items():
        setattr(ds, place, value)
    inner = Dataset()
    inner.private_block(0x0013, "AUTOSAM3D TEST", create=True).add_new(1, "LO", DICOM["private in a sequence"])
    ds.private_block(0x0011, "AUTOSAM3D TEST", create=True).add_new(1, "LT", DICOM["private"])
    ds.private_block(0x0011, "AUTOSAM3D TEST").add_new(2, "SQ", [inner])
    step, number = Dataset(), Dataset()
    step.ScheduledProcedureStepDescription = DICOM["sequence"]
    number.PatientID = DICOM["other numbers"]
    ds.RequestAttributesSequence, ds.OtherPatientIDsSequence = [step], [number]
    ds.add_new(0x60004000, "LT", DICOM["overlay"])
    ds.add_new(0xFFFCFFFC, "OB", DICOM["trailing padding"].encode())
    ds.preamble = make_dicom.PROGRAMS[index % 2][:32] + DICOM["preamble"].encode().ljust(96, b"\x90")
    ds.file_meta.SourceApplicationEntityTitle = DICOM["application"]
    ds.file_meta.PrivateInformationCreatorUID = "1.2.3.4"
    ds.file_meta.PrivateInformation = DICOM["private header"].encode()


def marked_slices(monkeypatch: Any) -> None:
    """From here on the makers of series put the canaries into every slice that they make."""
    plain = make_series.make_slice

    def make_slice(index: int, hu: np.ndarray, height_mm: float) -> Any:
        ds = plain(index, hu, height_mm)
        mark(ds, index)
        return ds

    for makers in (make_series, make_dicom, make_field):
        if hasattr(makers, "make_slice"):
            monkeypatch.setattr(makers, "make_slice", make_slice)


def renamed(folder: Path) -> Path:
    """The series of `folder`, one folder deeper and under other names, in the order that it had."""
    inner = folder / DICOM["folder"]
    inner.mkdir()
    for path in sorted(p for p in folder.iterdir() if p != inner):
        path.rename(inner / f"{path.stem}-{DICOM['slice']}{path.suffix}")
    return folder


def zipped(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, f"{DICOM['member']}/{path.name}")
        archive.comment = DICOM["comment"].encode()
    return packed.getvalue()


def nifti() -> bytes:
    """A sound CT as .nii.gz, with canaries in the header, behind it and in the wrapping."""

    def extension(code: int, text: str) -> bytes:
        content = text.encode().ljust(24, b"\0")
        return struct.pack("<ii", 8 + len(content), code) + content

    raw = nifti_bytes(
        ct_array(), descrip=NIFTI["descrip"].encode(), db_name=NIFTI["db_name"].encode(),
        aux_file=NIFTI["aux_file"].encode(), intent_name=NIFTI["intent_name"].encode(),
        extension=b"\1\0\0\0" + extension(6, NIFTI["comment"]) + extension(2, NIFTI["dicom extension"]))
    body = gzip.compress(raw, 6, mtime=0)[10:]
    extra = NIFTI["gzip extra"].encode()
    # FEXTRA, FNAME and FCOMMENT. *Source*: RFC 1952 section 2.3.
    head = b"\x1f\x8b\x08\x1c\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    return head + NIFTI["gzip name"].encode() + b"\0" + NIFTI["gzip comment"].encode() + b"\0" + body


def found_in(content: bytes | str) -> set[str]:
    """Places whose canaries are in there, whatever the letter case; gzip is opened."""
    raw = content.encode(errors="replace") if isinstance(content, str) else content
    if raw.startswith(b"\x1f\x8b"):
        raw += gzip.decompress(raw)
    raw = raw.upper()
    return {place for place, text in [*DICOM.items(), *NIFTI.items()] if text.upper().encode() in raw}


def found_below(*folders: Path) -> dict[str, set[str]]:
    """File to the places whose canaries it holds, in its content or its name."""
    hits = {str(p): found_in(p.name) | (found_in(p.read_bytes()) if p.is_file() else set())
            for folder in folders for p in folder.rglob("*")}
    return {name: places for name, places in hits.items() if places}


def demand_carried_alone(content: bytes) -> None:
    """A DICOM object: canaries stand in the tags of the list, once each, and nowhere else; no program before it."""
    import pydicom

    ds = pydicom.dcmread(io.BytesIO(content))
    elements = [e for e in ds.iterall() if e.VR != "SQ" and found_in(str(e.value))]
    assert {e.keyword for e in elements} == CARRIED - {"PatientSex"}
    assert content[:132] == bytes(128) + b"DICM"
    assert not [e for e in ds.iterall() if e.tag.is_private]
    counted = sum(content.upper().count(text.upper().encode()) for text in ALL)
    assert counted == len(elements) == len(CARRIED) - 1
