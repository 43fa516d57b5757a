"""The transfer syntaxes that can be read here."""

from __future__ import annotations

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

# Lossless ones first. *Source*: DICOM PS3.5 annex A.4, PS3.6 annex A.
_COMPRESSED = tuple(f"1.2.840.10008.1.2.{tail}" for tail in (
    "4.90", "4.70", "4.80", "5", "4.201", "4.202", "4.57", "4.91", "4.81", "4.203", "4.50", "4.51"))


def readable_syntaxes() -> list[str]:
    """UIDs of the transfer syntaxes that can be read; which compressed ones depends on the installed decoders."""
    plain = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
    return [*plain, *(syntax for syntax in _COMPRESSED if has_decoder(UID(syntax)))]


def has_decoder(syntax: UID) -> bool:
    """Whether compressed pixels can be decoded."""
    try:
        return get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        return False


def could_have_decoder(syntax: UID) -> bool:
    """Whether the extra `dicom` brings a decoder for it."""
    return str(syntax) in _COMPRESSED
