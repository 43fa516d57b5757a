"""From probabilities on the prepared grid to labels on the scan's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autosam3d.geometry.preprocess import Undo
from autosam3d.geometry.resample import Taps, lerp, lerp_plane, rows_first

# Two corner values this far apart cannot change places by rounding: float32 lerps of numbers up to 1 err by < 1e-6.
_CLEAR_MARGIN = np.float32(1e-5)


def restore_labels(slabs: Iterable[np.ndarray], undo: Undo, num_outputs: int) -> np.ndarray:
    """Probabilities on the prepared grid to labels on the scan's own: see `SlabRestorer`.

    Args:
        slabs: float16 or float32 [K, dz, h, w], in z order, all slices of the prepared scan together.
        undo: of `prepare_ct`.
        num_outputs: K, organs and background.

    Returns:
        uint8 [z, y, x] on the scan's grid.

    Raises:
        ValueError: as `SlabRestorer.add`.
    """
    restorer = SlabRestorer(undo, num_outputs)
    for slab in slabs:
        restorer.add(slab)
    return restorer.finish()


class SlabRestorer:
    """Takes probabilities slab by slab, interpolates them on the scan's grid and keeps the winner of each voxel.

    Probabilities are interpolated linearly on the native grid, then the largest wins, the lowest label among equals;
    outside the box all is background. Only a few slices of all classes exist at any moment.

    A class is interpolated only inside the rectangle where it is not clearly below background at the prepared
    voxels around; elsewhere background beats it after any interpolation too, so the result is the same.

    Args:
        undo: of `prepare_ct`.
        num_outputs: K, at most 256.
    """

    def __init__(self, undo: Undo, num_outputs: int) -> None:
        if not 1 <= num_outputs <= 256:
            raise ValueError(f"num_outputs: expected 1 to 256, got {num_outputs}")
        self._undo, self._num_outputs = undo, num_outputs
        self._labels = np.zeros(undo.native_shape, np.uint8)
        # Of each label's voxels: their number, and the sum of the probabilities that won.
        self._counts, self._winning = np.zeros(num_outputs), np.zeros(num_outputs)
        self._z, self._y, self._x = (
            Taps.between(m, n) for n, m in zip(undo.box.shape, undo.prepared_shape, strict=True)
        )
        # One order for all classes and rectangles, so that equal probabilities stay equal to the last bit.
        self._rows_first = rows_first(undo.prepared_shape, undo.box.shape)
        self._slices: dict[int, _Slice] = {}
        self._next_prepared = 0
        self._next_native = 0

    def add(self, slab: np.ndarray) -> None:
        """The next slices, float16 or float32 [K, dz, h, w]; not kept after the call.

        Raises:
            ValueError: another shape than [K, dz, h, w], or more slices than the prepared scan has.
        """
        expected = (self._num_outputs, *self._undo.prepared_shape[1:])
        if slab.ndim != 4 or (slab.shape[0], *slab.shape[2:]) != expected:
            raise ValueError(f"slab: expected [K, dz, h, w] with K, h, w = {expected}, got {slab.shape}")
        if self._next_prepared + slab.shape[1] > self._undo.prepared_shape[0]:
            raise ValueError(f"slab: expected {self._undo.prepared_shape[0]} slices in all, got more")
        for z in range(slab.shape[1]):
            self._slices[self._next_prepared] = _Slice.of(slab[:, z])
            self._next_prepared += 1
            # Native slices are ready as soon as the upper one of their two neighbours is here.
            ready = int(np.searchsorted(self._z.above, self._next_prepared))
            for native_z in range(self._next_native, ready):
                self._restore_slice(native_z)
            self._next_native = ready

    def finish(self) -> np.ndarray:
        """uint8 labels on the scan's whole grid.

        Raises:
            ValueError: slabs are missing.
        """
        if self._next_prepared != self._undo.prepared_shape[0]:
            raise ValueError(f"expected {self._undo.prepared_shape[0]} slices in all, got {self._next_prepared}")
        return self._labels

    def confidence(self) -> dict[int, float]:
        """Label to the mean probability of its voxels, 0 to 1; organs without a voxel are left out."""
        return {k: float(self._winning[k] / self._counts[k]) for k in range(1, self._num_outputs) if self._counts[k]}

    def _restore_slice(self, native_z: int) -> None:
        below, above, weight = (a[native_z] for a in (self._z.below, self._z.above, self._z.weight))
        for old in [z for z in self._slices if z < below]:
            del self._slices[old]
        a, b = self._slices[int(below)], self._slices[int(above)]
        contested = [_union(*pair) for pair in zip(a.contested, b.contested, strict=True)]
        (y0, y1), (x0, x1) = rows, columns = self._native_range(_union(*contested))
        if y0 == y1 or x0 == x1:
            return
        best = self._interpolate(a.probs[0], b.probs[0], weight, rows, columns)
        labels = np.zeros(best.shape, np.uint8)
        for k, rectangle in enumerate(contested, start=1):
            (ky0, ky1), (kx0, kx1) = k_rows, k_columns = self._native_range(rectangle)
            if ky0 == ky1 or kx0 == kx1:
                continue
            here = (slice(ky0 - y0, ky1 - y0), slice(kx0 - x0, kx1 - x0))
            probs = self._interpolate(a.probs[k], b.probs[k], weight, k_rows, k_columns)
            wins = probs > best[here]
            labels[here][wins] = k
            np.maximum(best[here], probs, out=best[here])
        self._counts += np.bincount(labels.ravel(), minlength=self._num_outputs)
        self._winning += np.bincount(labels.ravel(), best.ravel(), self._num_outputs)
        corner = self._undo.box.start
        self._labels[
            corner[0] + native_z, corner[1] + y0 : corner[1] + y1, corner[2] + x0 : corner[2] + x1
        ] = labels

    def _native_range(self, rectangle: _Rectangle) -> tuple[tuple[int, int], tuple[int, int]]:
        """Native rows and columns whose interpolation touches the prepared rectangle."""
        return self._y.reached_by(*rectangle[0]), self._x.reached_by(*rectangle[1])

    def _interpolate(
        self, a: np.ndarray, b: np.ndarray, weight: np.float32, rows: tuple[int, int], columns: tuple[int, int]
    ) -> np.ndarray:
        """One class between two prepared slices [h, w], on native `rows` and `columns`."""
        y, x = self._y.part(*rows), self._x.part(*columns)
        here = (slice(y.below[0], y.above[-1] + 1), slice(x.below[0], x.above[-1] + 1))
        plane = np.empty((here[0].stop - here[0].start, here[1].stop - here[1].start), np.float32)
        lerp(a[here].astype(np.float32, copy=False), b[here].astype(np.float32, copy=False), weight, plane)
        return lerp_plane(plane, y.moved(here[0].start), x.moved(here[1].start), self._rows_first)


_Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""(first row, row after the last), the same for columns; equal numbers where it is empty."""
_EMPTY: _Rectangle = ((0, 0), (0, 0))


@dataclass(frozen=True)
class _Slice:
    """One prepared slice of all classes [K, h, w], and where each organ is not clearly below background."""

    probs: np.ndarray
    contested: list[_Rectangle]

    @classmethod
    def of(cls, probs: np.ndarray) -> _Slice:
        sure = probs[0].astype(np.float32) - _CLEAR_MARGIN
        return cls(probs.copy(), [_bounds(p >= sure) for p in probs[1:]])


def _bounds(mask: np.ndarray) -> _Rectangle:
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return _EMPTY
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _union(*rectangles: _Rectangle) -> _Rectangle:
    filled = [r for r in rectangles if r != _EMPTY]
    if not filled:
        return _EMPTY
    return (
        (min(r[0][0] for r in filled), max(r[0][1] for r in filled)),
        (min(r[1][0] for r in filled), max(r[1][1] for r in filled)),
    )
