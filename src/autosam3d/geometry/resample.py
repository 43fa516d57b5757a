"""Linear interpolation between two grids that cover the same extent, slice by slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autosam3d.axes import Size


@dataclass(frozen=True)
class Taps:
    """Linear interpolation along one axis: out = source[below] + (source[above] - source[below]) * weight."""

    below: np.ndarray
    above: np.ndarray
    weight: np.ndarray
    identity: bool

    @classmethod
    def between(cls, n: int, m: int) -> Taps:
        """From n voxels to m over the same extent, half-pixel aligned, the border value beyond the outer centres."""
        at = np.clip((np.arange(m) + 0.5) * (n / m) - 0.5, 0, n - 1)
        below = at.astype(np.intp)
        above = below if n == m else np.minimum(below + 1, n - 1)
        return cls(below, above, (at - below).astype(np.float32), n == m)

    def part(self, start: int, stop: int) -> Taps:
        """The taps of the outputs start..stop."""
        here = slice(start, stop)
        return Taps(self.below[here], self.above[here], self.weight[here], self.identity)

    def moved(self, offset: int) -> Taps:
        """For a source that begins at `offset`."""
        return Taps(self.below - offset, self.above - offset, self.weight, self.identity)

    def reached_by(self, start: int, stop: int) -> tuple[int, int]:
        """The outputs that use any source in start..stop."""
        if start == stop:
            return 0, 0
        return int(np.searchsorted(self.above, start)), int(np.searchsorted(self.below, stop))


def lerp(a: np.ndarray, b: np.ndarray, weight: np.ndarray | np.float32, out: np.ndarray) -> None:
    """a + (b - a) * weight, which keeps constants exactly."""
    np.subtract(b, a, out=out)
    out *= weight
    out += a


def rows_first(old: Size, new: Size) -> bool:
    """Whether interpolating y before x leaves the smaller plane between the two."""
    return new[1] * old[2] <= old[1] * new[2]


def lerp_plane(plane: np.ndarray, y: Taps, x: Taps, rows_first: bool) -> np.ndarray:
    """A plane [h, w] at the places of the taps; it may be a view of `plane`."""
    for axis in (0, 1) if rows_first else (1, 0):
        taps = (y, x)[axis]
        if taps.identity:
            continue
        result, above = plane.take(taps.below, axis=axis), plane.take(taps.above, axis=axis)
        above -= result
        above *= taps.weight[:, None] if axis == 0 else taps.weight
        result += above
        plane = result
    return plane
