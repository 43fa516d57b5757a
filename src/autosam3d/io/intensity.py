"""Are these numbers Hounsfield units? The checks that every CT passes before anything is computed from it, and those
of a scan whose numbers are of another scale: exactly what one takes the other refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.options import ReadOptions

AIR_HU = -1024.0
# Scanners fill what lies outside their field with -2000 to -3024; no tissue and no noise reaches so low.
_PADDING_BELOW_HU = -1500.0
# The extended CT scale of metal-artefact series ends at 30710; beyond it, numbers are overflow.
_MAX_HU = 30710.0
_MAX_NONFINITE_SHARE = 0.01
_MAX_OVERFLOW_SHARE = 1e-4
# A body in HU reaches from fat (-100) or air (-1000) to muscle (50). Stored as 0..4095, windowed to 0..255,
# scaled to 0..1 or standardised, it does not.
_LOW_MUST_BE_BELOW_HU = -50.0
_HIGH_MUST_BE_ABOVE_HU = -50.0
_MIN_CONTRAST_HU = 100.0
_MAX_SAMPLES = 2_000_000


def settle_intensity(
    voxels: np.ndarray, where: str | Path, options: ReadOptions, may_be_nonfinite: bool = True
) -> list[str]:
    """Bring float32 [z, y, x] to the scale that `options` ask for, in place, and check that it is that.

    Args:
        may_be_nonfinite: False spares a pass where the voxels come from integers.

    Returns:
        What was changed, one sentence each.

    Raises:
        VolumeError: as `check_hounsfield`; of numbers that are to be raw NO_CONTENT, VOXELS_NONFINITE or IS_HU.
    """
    if options.is_raw:
        return _check_raw(voxels, where, options, may_be_nonfinite)
    warnings = []
    if options.offset:
        voxels += np.float32(options.offset)
        warnings.append(f"{options.offset:g} HU added to every voxel, as asked")
    return warnings + check_hounsfield(voxels, where, options, may_be_nonfinite)


def check_hounsfield(
    voxels: np.ndarray, where: str | Path, options: ReadOptions, may_be_nonfinite: bool = True
) -> list[str]:
    """Check float32 [z, y, x] and put right, in place, what has one meaning only.

    Not finite (at most 1 %) and padding below -1500 become -1024; a few voxels beyond the CT scale are clipped.

    Returns:
        What was put right, one sentence each.

    Raises:
        VolumeError: NO_CONTENT, VOXELS_NONFINITE, WRAPAROUND or NOT_HU (with the measured percentiles).
    """
    warnings = _fill_nonfinite(voxels, where, AIR_HU) if may_be_nonfinite else []
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise VolumeError("NO_CONTENT", where, f"every voxel is {low:g}", "check what was exported")
    if max(high, -low) > _MAX_HU:
        warnings += _clip_overflow(voxels, where)
    _demand_hounsfield(voxels, where, options)
    if low < _PADDING_BELOW_HU:
        num_padding = 0
        for slab in voxels:
            padding = slab < _PADDING_BELOW_HU
            slab[padding] = AIR_HU
            num_padding += int(np.count_nonzero(padding))
        warnings.append(f"{num_padding} voxels below {_PADDING_BELOW_HU:g} HU (padding, down to {low:g}) are taken "
                        f"as air, {AIR_HU:g} HU")
    return warnings


def percentiles_text(voxels: np.ndarray) -> str:
    """The measured percentiles, for messages."""
    p = np.percentile(_sample(voxels), (0.5, 5, 50, 95, 99.5))
    return "percentiles 0.5/5/50/95/99.5 = " + "/".join(f"{v:.4g}" for v in p)


def _check_raw(voxels: np.ndarray, where: str | Path, options: ReadOptions, may_be_nonfinite: bool) -> list[str]:
    warnings: list[str] = []
    if may_be_nonfinite:
        finite = (slab[np.isfinite(slab)] for slab in voxels)
        lowest = min((float(slab.min()) for slab in finite if slab.size), default=0.0)
        warnings = _fill_nonfinite(voxels, where, lowest)
    if voxels.min() == voxels.max():
        raise VolumeError("NO_CONTENT", where, f"every voxel is {float(voxels.min()):g}", "check what was exported")
    if _is_hounsfield(voxels):
        raise VolumeError("IS_HU", where, "expected numbers of another scale than Hounsfield units (reading.intensity: "
                          f"raw), got {percentiles_text(voxels)}",
                          options.remedy("intensity", "hu", "take a model for Hounsfield units", ", or read it as {}"))
    return warnings


def _fill_nonfinite(voxels: np.ndarray, where: str | Path, fill: float) -> list[str]:
    as_what = f"air, {AIR_HU:g} HU" if fill == AIR_HU else f"the lowest number, {fill:g}"
    num_bad = sum(slab.size - int(np.count_nonzero(np.isfinite(slab))) for slab in voxels)
    if num_bad == 0:
        return []
    if num_bad == voxels.size:
        raise VolumeError("NO_CONTENT", where, "every voxel is NaN or infinite", "check what was exported")
    share = num_bad / voxels.size
    if share > _MAX_NONFINITE_SHARE:
        raise VolumeError("VOXELS_NONFINITE", where, f"expected numbers, got {num_bad} NaN or infinite voxels "
                          f"({100 * share:.1f} %)", f"repair the scan; up to 1 % would be taken as {as_what}")
    for slab in voxels:
        np.nan_to_num(slab, copy=False, nan=fill, posinf=fill, neginf=fill)
    return [f"{num_bad} NaN or infinite voxels are taken as {as_what}"]


def _clip_overflow(voxels: np.ndarray, where: str | Path) -> list[str]:
    num_beyond = sum(int(np.count_nonzero(np.abs(slab) > _MAX_HU)) for slab in voxels)
    if num_beyond > max(3, _MAX_OVERFLOW_SHARE * voxels.size):
        low, high = float(voxels.min()), float(voxels.max())
        if 60000 < high - low < 70000:
            raise VolumeError("WRAPAROUND", where, f"values jump by 65536 ({num_beyond} voxels, {low:g} to {high:g}): "
                              "a 16-bit overflow, or negative numbers stored as unsigned", "export the scan again")
        raise VolumeError("NOT_HU", where, f"expected Hounsfield units, got values from {low:g} to {high:g}, "
                          f"{percentiles_text(voxels)}", "export the scan with its rescale slope and intercept")
    for slab in voxels:
        np.clip(slab, -_MAX_HU, _MAX_HU, out=slab)
    return [f"{num_beyond} voxels beyond {_MAX_HU:g} HU are clipped"]


def _is_hounsfield(voxels: np.ndarray) -> bool:
    low, high = _ends(voxels)
    in_range = -_MAX_HU <= low <= _LOW_MUST_BE_BELOW_HU and _HIGH_MUST_BE_ABOVE_HU <= high <= _MAX_HU
    return in_range and high - low >= _MIN_CONTRAST_HU


def _ends(voxels: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(_sample(voxels), (0.5, 99.5))
    return float(low), float(high)


def _demand_hounsfield(voxels: np.ndarray, where: str | Path, options: ReadOptions) -> None:
    if _is_hounsfield(voxels):
        return
    low, high = _ends(voxels)
    remedy = "export the scan with its rescale slope and intercept"
    if options.offset:
        remedy = options.remedy("intensity_offset", 0, f"{options.offset:g} HU were added to its numbers, see whether "
                                "they are Hounsfield units already", "; {} adds none")
    elif low > _LOW_MUST_BE_BELOW_HU and high > 500:
        answer = options.spelled("intensity_offset", -1024)
        stored_from_0 = f"use {answer}; otherwise export" if answer else "subtract 1024; otherwise export"
        remedy = f"if it is CT stored from 0, {stored_from_0} it as Hounsfield units"
    if options.asked_by == "recipe":  # who trains a model says what it is for
        remedy += f"; a model for numbers of another scale is made with {options.spelled('intensity', 'raw')}"
    raise VolumeError("NOT_HU", where, "expected Hounsfield units (air or fat well below 0, tissue near 50), got "
                      + percentiles_text(voxels), remedy)


def _sample(voxels: np.ndarray) -> np.ndarray:
    """At most some two million voxels, spread evenly: percentiles of these decide as well as those of all."""
    step = max(1, int(np.ceil((voxels.size / _MAX_SAMPLES) ** (1 / 3))))
    return voxels[::step, ::step, ::step]
