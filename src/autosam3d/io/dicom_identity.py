"""What one DICOM file is, by its header alone: which object, of which series and study, of what kind."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import VolumeError
from autosam3d.io.dicom_files import dicom_bytes
from autosam3d.io.dicom_tags import DAMAGE, quiet_pydicom, tag_text

# isort: split
# Below the tags, which say what to install where pydicom is absent.
import pydicom

_TAGS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "BodyPartExamined",
         "SeriesDescription", "ImageType", "SliceThickness"]
_REMEDY = "send or export it again"


@dataclass(frozen=True, kw_only=True)
class DicomIdentity:
    """UIDs and what a rule asks for; texts are the file's own and may name a patient."""

    study: str
    series: str
    instance: str
    sop_class: str
    modality: str
    body_part: str
    description: str
    image_type: str
    thickness_mm: float | None


def identify(path: Path, where: str) -> DicomIdentity:
    """Read the header of one file.

    Args:
        path: of the file.
        where: what messages call it.

    Raises:
        VolumeError: NOT_DICOM, SLICE_CORRUPT, NESTING, LENGTH, CODEC, UNREADABLE; TAG_INVALID where a UID is absent or
            no UID.
    """
    with quiet_pydicom():
        content = dicom_bytes(path, where)
        if content is None:
            raise VolumeError("NOT_DICOM", where, "expected a DICOM file", _REMEDY)
        try:
            tags = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True, specific_tags=_TAGS)
            texts = {keyword: tag_text(tags, keyword) for keyword in _TAGS}
        except RecursionError:
            raise VolumeError("NESTING", where, "its sequences are nested too deeply", _REMEDY) from None
        except DAMAGE:
            raise VolumeError("SLICE_CORRUPT", where, "it is cut or damaged", _REMEDY) from None
    uids = [texts[keyword] for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    if not all(0 < len(uid) <= 64 and all(c in "0123456789." for c in uid) for uid in uids):
        raise VolumeError("TAG_INVALID", where, "expected valid UIDs of study, series and object", _REMEDY)
    return DicomIdentity(
        study=uids[0], series=uids[1], instance=uids[2], sop_class=texts["SOPClassUID"],
        modality=texts["Modality"].upper(), body_part=texts["BodyPartExamined"],
        description=texts["SeriesDescription"], image_type="\\".join(_image_type(texts["ImageType"])),
        thickness_mm=_number(texts["SliceThickness"]),
    )


def _image_type(text: str) -> list[str]:
    """pydicom shows several values as a list in Python's writing."""
    return [word.strip(" '\"") for word in text.strip("[]").split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
