"""Are these numbers Hounsfield units? The checks that every CT passes before anything is computed from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError

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


def check_hounsfield(voxels: np.ndarray, where: str | Path, may_be_nonfinite: bool = True) -> list[str]:
    """Check float32 [z, y, x] and put right, in place, what has one meaning only.

    Not finite (at most 1 %) and padding below -1500 become -1024; a few voxels beyond the CT scale are clipped.

    Args:
        may_be_nonfinite: False spares a pass where the voxels come from integers.

    Returns:
        What was put right, one sentence each.

    Raises:
        VolumeError: NO_CONTENT, VOXELS_NONFINITE, WRAPAROUND or NOT_HU (with the measured percentiles).
    """
    warnings = _fill_nonfinite(voxels, where) if may_be_nonfinite else []
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise VolumeError("NO_CONTENT", where, f"every voxel is {low:g}", "check what was exported")
    if max(high, -low) > _MAX_HU:
        warnings += _clip_overflow(voxels, where)
    _demand_hounsfield(voxels, where)
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


def _fill_nonfinite(voxels: np.ndarray, where: str | Path) -> list[str]:
    num_bad = sum(slab.size - int(np.count_nonzero(np.isfinite(slab))) for slab in voxels)
    if num_bad == 0:
        return []
    if num_bad == voxels.size:
        raise VolumeError("NO_CONTENT", where, "every voxel is NaN or infinite", "check what was exported")
    share = num_bad / voxels.size
    if share > _MAX_NONFINITE_SHARE:
        raise VolumeError("VOXELS_NONFINITE", where, f"expected numbers, got {num_bad} NaN or infinite voxels "
                          f"({100 * share:.1f} %)", "repair the scan; up to 1 % would be taken as air")
    for slab in voxels:
        np.nan_to_num(slab, copy=False, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
    return [f"{num_bad} NaN or infinite voxels are taken as air, {AIR_HU:g} HU"]


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


def _demand_hounsfield(voxels: np.ndarray, where: str | Path) -> None:
    low, high = np.percentile(_sample(voxels), (0.5, 99.5))
    sound = low <= _LOW_MUST_BE_BELOW_HU and high >= _HIGH_MUST_BE_ABOVE_HU and high - low >= _MIN_CONTRAST_HU
    if sound:
        return
    remedy = "export the scan with its rescale slope and intercept"
    if low > _LOW_MUST_BE_BELOW_HU and high > 500:
        remedy = "if it is CT stored from 0, use --intensity-offset -1024; otherwise export it as Hounsfield units"
    raise VolumeError("NOT_HU", where, "expected Hounsfield units (air or fat well below 0, tissue near 50), got "
                      + percentiles_text(voxels), remedy)


def _sample(voxels: np.ndarray) -> np.ndarray:
    """At most some two million voxels, spread evenly: percentiles of these decide as well as those of all."""
    step = max(1, int(np.ceil((voxels.size / _MAX_SAMPLES) ** (1 / 3))))
    return voxels[::step, ::step, ::step]
