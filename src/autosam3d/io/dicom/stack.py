"""How the slices of a series lie above each other: complete, straight or leaning, even or nearly so, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.header import CtSlice

# Leans below this ratio are the rounding of positions.
_SAME_DIRECTION = 1e-3
# Gantries tilt by up to 30 degrees; beyond, positions are rather wrong than leaning.
_MAX_TILT = 35.0
# Positions are rounded when they are written; within this share of the spacing they are even.
_EVEN_TOLERANCE = 0.05
# Half a unit of the first decimal, which many exports round positions to, and a little for the line through them.
_ROUNDED_MM = 0.06
# But where slices are thinner still, no more than this share of their distance.
_ROUNDED_SHARE = 0.25
# What rounding adds to how far a slice may lie from its place on the even grid, in slices.
_ROUNDING_VOX = 0.01
# Rounding may put two neighbours nearer to each other or further apart by a whole unit of the last digit.
_ROUNDED_GAP_MM = 0.11
_MAX_GAP = 1.5
_MAX_GAP_SHARE = 0.2
_MAX_UNEVEN = 2.0
# The spacing of a stack is one that at least this share of its gaps has; blocks of another one are as long as this.
_MIN_SPACING_SHARE = 0.1
_MIN_BLOCK_GAPS = 4
_MAX_LISTED = 5


@dataclass(frozen=True)
class Stacking:
    """Of slices in the order of their heights."""

    orientation: np.ndarray
    """2x3, of columns and rows, across the way that the slices rise where their own digits leave that open."""
    heights_mm: np.ndarray
    """float64 [slice], above the first."""
    lean: np.ndarray
    """Columns and rows a millimetre of height: 0 where the stack rises along the normal, else a tilted gantry's."""
    step_mm: float
    """Between slices of an even grid."""
    is_even: bool
    """Whether the slices lie on it."""

    @property
    def normal(self) -> np.ndarray:
        return normal_of(self.orientation)

    @property
    def num_slices(self) -> int:
        """Of the grid."""
        return len(self.heights_mm) if self.is_even else int(np.floor(self.heights_mm[-1] / self.step_mm + 1e-6)) + 1


def stacking_of(stack: list[CtSlice], where: str, warnings: list[str]) -> Stacking:
    """How slices that are sorted by height, one a place, lie above each other.

    Raises:
        VolumeError: GANTRY_TILT, MISALIGNED, MISSING_SLICES (with the gaps), UNEVEN_SPACING.
    """
    first = stack[0]
    offsets = np.array([s.position_lps - first.position_lps for s in stack])
    orientation = _across(first, offsets[-1])
    normal = normal_of(orientation)
    heights = along(offsets, normal)
    lean = _lean(offsets - heights[:, None] * normal, heights, orientation, first, where, warnings)
    step_mm, is_even = _step(heights, [s.acquired.instance_number for s in stack], where, warnings)
    return Stacking(orientation, heights, lean, step_mm, is_even)


def normal_of(orientation: np.ndarray) -> np.ndarray:
    """The unit vector [3] along which slices are stacked."""
    normal = np.cross(*orientation)
    return normal / np.sqrt(along(normal, normal))


def along(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Inner products of [..., 3] with a direction, summed in this order, which the browser's code has, too: BLAS rounds
    otherwise from machine to machine, and a voxel may hang on the last bit."""
    return vectors[..., 0] * direction[0] + vectors[..., 1] * direction[1] + vectors[..., 2] * direction[2]


def even_tolerance_mm(step_mm: float) -> float:
    """How far from an even grid a slice may lie and count as on it: what rounding of written positions does."""
    return max(_EVEN_TOLERANCE * step_mm, min(_ROUNDED_MM, _ROUNDED_SHARE * step_mm))


def place_tolerance_vox(step_mm: float) -> float:
    """How far a slice of a series that counts as even may lie from its place on the grid, in slices. The grid begins at
    the first slice, which may be as far from the line through all of them as any other."""
    return 2 * even_tolerance_mm(step_mm) / step_mm + _ROUNDING_VOX


def _across(first: CtSlice, rise: np.ndarray) -> np.ndarray:
    """Directions of columns and rows. Where cosines are written with two or three decimals, the positions say better
    where the slices are stacked; the directions are turned to be across that."""
    orientation = first.orientation
    if first.cosine_rounding == 0:
        return orientation
    upward = rise / np.sqrt(along(rise, rise))
    if np.abs(upward - normal_of(orientation)).max() > 2 * first.cosine_rounding:
        return orientation
    rows = orientation[0] - along(orientation[0], upward) * upward
    rows = rows / np.sqrt(along(rows, rows))
    return np.array([rows, np.cross(upward, rows)])


def _lean(sideways: np.ndarray, heights: np.ndarray, orientation: np.ndarray, first: CtSlice, where: str,
          warnings: list[str]) -> np.ndarray:
    drift = np.linalg.norm(sideways, axis=1)
    # Lean as a ratio, with room for rounding of the written positions.
    straight_mm = max(_SAME_DIRECTION * heights[-1], 0.1 * min(first.spacing_mm))
    if drift.max() <= straight_mm:
        return np.zeros(2)
    lean = sideways[-1] / heights[-1]
    if np.abs(sideways - heights[:, None] * lean).max() > 0.5 * min(first.spacing_mm):
        raise VolumeError("MISALIGNED", where, f"slices are shifted sideways by up to {drift.max():.1f} mm",
                          "export the series again")
    # Slices that are shifted to and fro by less than half a pixel do not lean.
    if drift[-1] <= straight_mm:
        return np.zeros(2)
    tilt = float(np.degrees(np.arctan(np.linalg.norm(lean))))
    if tilt > _MAX_TILT:
        raise VolumeError("GANTRY_TILT", where, f"expected a gantry that is tilted by up to {_MAX_TILT:g} degrees, "
                          f"got {tilt:.1f}: the stack is sheared", "resample the series to a straight grid first")
    warnings.append(f"the gantry was tilted by {tilt:.1f} degrees; resampled to a straight grid")
    return along(orientation, lean) / first.spacing_mm[::-1]


def _step(heights: np.ndarray, numbers: list[int | None], where: str, warnings: list[str]) -> tuple[float, bool]:
    """(millimetres between slices of an even grid, whether the slices lie on it)."""
    gaps = np.diff(heights)
    even_mm = _even_step(heights)
    if even_mm is not None:
        return even_mm, True
    usual = _usual_gap(gaps)
    _demand_complete(heights, gaps, usual, numbers, where)
    spread = f"slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart"
    if gaps.max() > _MAX_UNEVEN * (1 + _EVEN_TOLERANCE) * gaps.min() + _ROUNDED_GAP_MM:
        raise VolumeError("UNEVEN_SPACING", where, spread, "reconstruct the scan with even slices")
    step_mm = float(np.median(gaps))
    blocks = _blocks(gaps)
    if len(blocks) > 1:  # the thin part keeps its resolution
        step_mm = min(float((heights[end] - heights[begin]) / (end - begin)) for begin, end in blocks)
    warnings.append(f"{spread}; resampled to {step_mm:.3g} mm")
    return step_mm, False


def _even_step(heights: np.ndarray) -> float | None:
    """Millimetres between even slices; None where they are uneven by more than their positions are rounded."""
    index = np.arange(len(heights))
    step_mm = float(heights[-1] / index[-1])
    off_mm = float(np.abs(heights - step_mm * index).max())
    if off_mm <= _SAME_DIRECTION * step_mm:
        return step_mm
    # The line that fits best, as the first and last position are rounded, too; sums in order, as the browser's.
    centred = index - index[-1] / 2
    fitted_mm = float(np.cumsum(centred * heights)[-1] / np.cumsum(centred * centred)[-1])
    middle = float(np.cumsum(heights)[-1] / len(heights))
    off_fitted_mm = float(np.abs(heights - middle - fitted_mm * centred).max())
    is_even = off_mm <= _EVEN_TOLERANCE * step_mm or off_fitted_mm <= even_tolerance_mm(fitted_mm)
    return fitted_mm if is_even else None


def _rounded_mm(gap_mm: float) -> float:
    """How much a gap may differ from another one of the same spacing."""
    return _ROUNDED_GAP_MM + _EVEN_TOLERANCE * gap_mm


def _usual_gap(gaps: np.ndarray) -> float:
    """The finest spacing that several gaps have; single ones may be wrong."""
    ordered = np.sort(gaps)
    for gap in ordered:
        near = ordered[(ordered >= gap) & (ordered <= gap + _rounded_mm(gap))]
        if len(near) >= max(2, _MIN_SPACING_SHARE * len(gaps)):
            return float(np.cumsum(near)[-1] / len(near))
    return float(np.median(gaps))


def _blocks(gaps: np.ndarray) -> list[tuple[int, int]]:
    """Where the stack is of blocks with a spacing each: the first gap of each, and the one behind its last. Empty where
    it is not: between two blocks one gap may be of neither."""
    runs: list[tuple[int, int]] = []
    begin = 0
    for end in range(1, len(gaps) + 1):
        usual = float(np.cumsum(gaps[begin:end])[-1] / (end - begin))
        if end == len(gaps) or abs(gaps[end] - usual) > _rounded_mm(usual):
            runs.append((begin, end))
            begin = end
    blocks = [run for run in runs if run[1] - run[0] >= _MIN_BLOCK_GAPS]
    num_between = len(gaps) - sum(end - begin for begin, end in blocks)
    return blocks if num_between <= len(blocks) else []


def _demand_complete(heights: np.ndarray, gaps: np.ndarray, usual: float, numbers: list[int | None], where: str
                     ) -> None:
    """Slices that were never measured, or were lost, are not made up.

    A few wide gaps are such slices, and so are many, where each is a whole multiple of the spacing: a scanner changes
    its spacing from block to block, not from slice to slice. InstanceNumber shows holes in a block, too.
    """
    times = np.rint(gaps / usual).astype(int)
    wide = gaps > _MAX_GAP * usual
    whole = np.abs(gaps - times * usual) <= _rounded_mm(usual)
    holes = _holes(numbers, wide, times)
    is_rare = wide.sum() <= _MAX_GAP_SHARE * len(gaps)
    is_lost = holes | (wide & ~_in_blocks(gaps) & (whole | is_rare))
    lost = np.flatnonzero(is_lost)
    if len(lost) == 0:
        return
    num_missing = np.maximum(1, times - 1)
    listed = ", ".join(f"{num_missing[i]} after slice {i + 1} at {heights[i]:.1f} mm" for i in lost[:_MAX_LISTED])
    more = f" and {len(lost) - _MAX_LISTED} more gaps" if len(lost) > _MAX_LISTED else ""
    shown = ", where InstanceNumber has holes, too" if holes[lost].all() else ""
    raise VolumeError("MISSING_SLICES", where, f"expected slices every {usual:.3g} mm, missing are {listed}{more}"
                      f"{shown}", "export the series again, whole")


def _in_blocks(gaps: np.ndarray) -> np.ndarray:
    inside = np.zeros(len(gaps), bool)
    for begin, end in _blocks(gaps):
        inside[begin:end] = True
    return inside


def _holes(numbers: list[int | None], wide: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool [gap]: wide ones over which InstanceNumber jumps as far as the position does."""
    if None in numbers or wide.all():
        return np.zeros(len(wide), bool)
    jumps = np.diff(np.array(numbers))
    if not ((jumps > 0).all() or (jumps < 0).all()):
        return np.zeros(len(wide), bool)
    unit = float(np.median(np.abs(jumps)[~wide]))
    return wide & (np.abs(jumps) == times * unit)
