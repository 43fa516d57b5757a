"""The pixels of one DICOM slice as Hounsfield units, and the padding around what was measured as air."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.files import dicom_bytes
from autosam3d.io.dicom.header import HEADER_TAGS, CtSlice, deflated_error
from autosam3d.io.dicom.meta import parse, raw_number
from autosam3d.io.dicom.tags import DAMAGE, quiet_pydicom

# isort: split
# Below the tags, which say what to install where pydicom is absent.
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

_REMEDY = "copy or export the series again"
# Numbers in this range may have been measured, so they are padding only where they reach the picture's edge; the
# extended CT scale of metal-artefact series ends at the upper one.
_MEASURED_HU = (-900.0, 30710.0)


def decode_hu(ct_slice: CtSlice, where: str, air_hu: float) -> tuple[np.ndarray, bool, int]:
    """(float32 [rows, columns] in HU, whether bits above BitsStored were dropped, number of pixels that were padding).

    Args:
        ct_slice: of `header.parse_slice`.
        where: what messages call its file.
        air_hu: what padding becomes (PixelPaddingValue and PixelPaddingRangeLimit; of CT images alone).

    Raises:
        VolumeError: SLICE_CORRUPT, LENGTH, UNREADABLE.
    """
    content = dicom_bytes(ct_slice.path, where)
    if content is None:
        raise _corrupt(where, "it is no DICOM file any more")
    if ct_slice.transfer_syntax == DeflatedExplicitVRLittleEndian:
        raise deflated_error(where)
    with quiet_pydicom():
        dataset, _, _ = parse(content, HEADER_TAGS, where, with_pixels=True)
        try:
            padding = _padding_bits(dataset)
            _demand_whole_pixels(dataset, ct_slice, where)
            whole = _native_pixels(dataset, ct_slice)
            if whole is None:
                stored = whole = dataset.pixel_array
                above = np.zeros(1, bool)
            else:
                stored, above = _stored_bits(whole, dataset)
            if stored.shape != ct_slice.shape:
                raise _corrupt(where, f"expected {ct_slice.shape} pixels, got {stored.shape}")
            padded = _padded(stored, whole, padding, dataset) if padding and ct_slice.is_ct else None
        except DAMAGE:
            raise _corrupt(where, "its pixels cannot be decoded") from None
        except MemoryError:
            raise VolumeError("LENGTH", where, "its pixels claim more memory than there is", _REMEDY) from None
    hu = (stored * np.float64(ct_slice.slope) + ct_slice.intercept).astype(np.float32)
    num_padded = 0 if padded is None else _pad_with_air(hu, padded, air_hu)
    return hu, bool((above if padded is None else above & ~padded).any()), num_padded


def _padding_bits(dataset: Any) -> list[tuple[int, int]]:
    """The bits of the padding's two ends, or of its one value; empty where there is none."""
    found = [raw_number(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    return [] if found[0] is None else [bits for bits in found if bits is not None]


def _padded(stored: np.ndarray, whole: np.ndarray, padding: list[tuple[int, int]], dataset: Any) -> np.ndarray:
    """bool [rows, columns]: pixels of a padding value, or between the two ends, before any rescale.

    *Source*: DICOM PS3.3 C.7.5.1.1.2: signed or unsigned as PixelRepresentation says, whatever the tag's own form is.
    A value that does not fit into BitsStored, as some scanners have it, stands in all the bits that are allocated.
    """
    is_signed = int(dataset.PixelRepresentation) == 1
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    ends = [_number(value, min(size, max(allocated, 16)), is_signed) for value, size in padding]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    if is_signed and all(0 <= value < 1 << bits for value, _ in padding):
        ends = [_number(value, bits, True) for value, _ in padding]
    pixels = stored if all(low <= end <= high for end in ends) else whole
    return (pixels >= min(ends)) & (pixels <= max(ends))


def _number(value: int, bits: int, is_signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if is_signed and value >> (bits - 1) else value


def _pad_with_air(hu: np.ndarray, padded: np.ndarray, air_hu: float) -> int:
    """Number of pixels that were changed, in place. Soft tissue and metal have the numbers of some paddings, too; so
    such ones count only where they hang together with the edge of the picture."""
    if not padded.any():
        return 0
    values = hu[padded]
    low, high = _MEASURED_HU
    if ((values > low) & (values <= high)).any():
        padded = _from_the_edge(padded)
    num_changed = int(np.count_nonzero(hu[padded] != np.float32(air_hu)))
    hu[padded] = air_hu
    return num_changed


def _from_the_edge(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage  # a tenth of a second, for few scans

    edge = np.ones(mask.shape, bool)
    edge[1:-1, 1:-1] = False
    return ndimage.binary_propagation(mask & edge, mask=mask)


def _demand_whole_pixels(dataset: Any, ct_slice: CtSlice, where: str) -> None:
    """Uncompressed pixels must all be there; compressed ones are parsed to their end marker."""
    if "PixelData" not in dataset:
        raise _corrupt(where, "it is cut inside its pixels")
    if not UID(ct_slice.transfer_syntax).is_compressed:
        expected = math.prod(ct_slice.shape) * int(dataset.BitsAllocated) // 8
        if len(dataset.PixelData) < expected:
            raise _corrupt(where, f"expected {expected} bytes of pixels, got {len(dataset.PixelData)}")


def _native_pixels(dataset: Any, ct_slice: CtSlice) -> np.ndarray | None:
    """Uncompressed pixels with all their allocated bits; None where a decoder has to be asked."""
    bits = int(dataset.BitsAllocated)
    is_big_endian = ct_slice.transfer_syntax == ExplicitVRBigEndian
    if UID(ct_slice.transfer_syntax).is_compressed or (is_big_endian and bits == 8):  # bytes swapped in words
        return None
    kind = "i" if int(dataset.PixelRepresentation) else "u"
    dtype = np.dtype(f"{'>' if is_big_endian else '<'}{kind}{bits // 8}")
    pixels = np.frombuffer(dataset.PixelData, dtype, math.prod(ct_slice.shape)).reshape(ct_slice.shape)
    return pixels.astype(dtype.newbyteorder("="))


def _stored_bits(whole: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """(the BitsStored bits below HighBit, sign-extended; of which pixels anything else stood above them).

    Older scanners keep overlays in the bits above. *Source*: DICOM PS3.5 section 8.1.1.
    """
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high = int(dataset.get("HighBit", bits - 1))
    if not (1 <= bits <= allocated and bits - 1 <= high < allocated):
        raise ValueError("BitsStored and HighBit do not fit BitsAllocated")
    if bits == allocated:
        return whole, np.zeros(1, bool)
    # Up to the top bit and down again: what lies above goes, and an arithmetic shift repeats the sign.
    stored = np.right_shift(np.left_shift(whole, allocated - 1 - high), allocated - bits)
    above = np.right_shift(whole, high + 1) if high + 1 < allocated else np.zeros_like(whole)
    return stored, (above != 0) & ((above != -1) | (stored >= 0))


def _corrupt(where: str, fault: str) -> VolumeError:
    return VolumeError("SLICE_CORRUPT", where, fault, _REMEDY)

