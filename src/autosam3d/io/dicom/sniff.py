"""Whether a file is DICOM, by its first bytes or its name; needs no package."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

# A first tag of group 2, which always has a value representation, or of group 8, which may have none.
_FIRST_ELEMENT = re.compile(rb"\x02\x00.\x00[A-Z]{2}|\x08\x00.\x00", re.S)
START_BYTES = 132
DICOM_ENDINGS = (".dcm", ".ima")


def begins_as_dicom(start: bytes) -> bool:
    """Whether 132 bytes are those of a DICOM file: with a preamble, or as old files do with group 2 or 8 at once."""
    return len(start) >= START_BYTES and (start[128:132] == b"DICM" or _FIRST_ELEMENT.match(start) is not None)


def may_be_slice(path: Path) -> bool:
    """Whether a file says that it is DICOM, also where it is cut; a DICOMDIR and hidden files are no slices."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return begins_as_dicom(file.read(START_BYTES))
    return False
