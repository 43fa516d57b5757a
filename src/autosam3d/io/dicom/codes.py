"""Organs in DICOM objects: coded concepts, labels, colours."""

from __future__ import annotations

import base64
import hashlib
import re

from pydicom.dataset import Dataset

from autosam3d.labels import LabelMap

# (code, scheme, meaning). *Source*: DICOM PS3.16, CID 7150 and CID 244.
ANATOMICAL_STRUCTURE = ("91723000", "SCT", "Anatomical structure")
_SIDES = {"right": ("24028007", "SCT", "Right"), "left": ("7771000", "SCT", "Left")}
# Concepts of the label table that name an organ of either side.
_EITHER_SIDE = frozenset(("45289007",))
_PRIVATE_SCHEME = "99AUTOSAM3D"
_MAX_CODE = 16
_MAX_TEXT = 64
# DICOM's CIELab: L* of 0 to 100 and a*, b* of -128 to 127, each over 0 to 65535. *Source*: PS3.3 C.10.7.1.1.
_LAB_SCALE = (65535 / 100, 65535 / 255, 65535 / 255)
_LAB_OFFSET = (0.0, 128.0, 128.0)
# sRGB to XYZ, and the white of both. *Source*: IEC 61966-2-1, and CIE 15 for L*a*b*; D50 as PS3.3 C.10.7.1.1 asks,
# adapted by Bradford's matrix.
_RGB_TO_XYZ_D50 = ((0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169),
                   (0.0139322, 0.0971045, 0.7141733))
_WHITE_D50 = (0.96422, 1.0, 0.82521)


def organ_text(name: str) -> str:
    """An organ's name for people, at most 64 characters, without characters that DICOM texts may not have."""
    words = "".join(c if c.isprintable() and c not in "\\^=" else " " for c in name.replace("_", " ")).split()
    text = " ".join(words)[:_MAX_TEXT].strip()
    return text[:1].upper() + text[1:] or "Organ"


def organ_code(labels: LabelMap, value: int) -> tuple[str, str, str]:
    """(code, scheme, meaning): SNOMED CT where the label table has the organ, else a code of our own scheme."""
    text = organ_text(labels.by_index[value])
    snomed = labels.snomed(value)
    return (snomed, "SCT", text) if snomed else (_own_code(labels.by_index[value]), _PRIVATE_SCHEME, text)


def _own_code(name: str) -> str:
    """A code for a name, the same in every object and another one for every other name: its own letters where they fit,
    else as many as fit before 40 bits of its SHA-256 (RFC 4648, base 32)."""
    if re.fullmatch(rf"[a-z0-9_]{{1,{_MAX_CODE}}}", name):
        return name.upper()
    digest = base64.b32encode(hashlib.sha256(name.encode()).digest()[:5]).decode()
    letters = organ_text(name).upper().replace(" ", "_")[: _MAX_CODE - 1 - len(digest)]
    return f"{letters}_{digest}"


def organ_side(labels: LabelMap, value: int) -> tuple[str, str, str] | None:
    """The code of the side, where the organ's own code does not say it."""
    words = labels.by_index[value].lower().split("_")
    if labels.snomed(value) not in _EITHER_SIDE:
        return None
    return next((code for side, code in _SIDES.items() if side in words), None)


def code_item(code: tuple[str, str, str], modifier: tuple[str, str, str] | None = None) -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    if modifier is not None:
        item.SegmentedPropertyTypeModifierCodeSequence = [code_item(modifier)]
    return item


def cielab(rgb: tuple[int, int, int]) -> list[int]:
    """A colour as DICOM's RecommendedDisplayCIELabValue: three numbers of 16 bits."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    xyz = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in _RGB_TO_XYZ_D50]
    x, y, z = (_lab_curve(value / white) for value, white in zip(xyz, _WHITE_D50, strict=True))
    lab = (116 * y - 16, 500 * (x - y), 200 * (y - z))
    return [min(65535, max(0, round((value + offset) * scale)))
            for value, offset, scale in zip(lab, _LAB_OFFSET, _LAB_SCALE, strict=True)]


def _lab_curve(t: float) -> float:
    """*Source*: CIE 15, L*a*b*."""
    return t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29
