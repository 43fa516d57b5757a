"""Patch grid, Gaussian importance and stitching: how a scan is cut into crops and put together again."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from autosam3d.axes import Size

# Slices that `Stitcher.finished` hands out at a time: enough to keep the Python overhead small, few enough to
# cost little memory beside the accumulator.
_SLAB_SLICES = 8
# A Gaussian's corner weighs 4e-11 of its centre: below this share the weights of MONAI's windows are cut off too.
_IMPORTANCE_FLOOR = 1e-3
_FILL_BYTES = 1 << 22
MAX_OVERLAP = 0.9
"""Of neighbouring windows: each voxel is seen a thousand times there; at 0.98 it were 125,000 times."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a sliding window walks over a scan."""

    overlap: float = 0.75
    """Share of the patch edge that neighbours share (paper, section 4: 0.75)."""
    importance: str = "gaussian"
    """Weight of a voxel inside its patch: "gaussian" or "constant"."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"overlap: expected 0 to {MAX_OVERLAP}, got {self.overlap}")
        if self.importance not in ("gaussian", "constant"):
            raise ValueError(f"importance: expected gaussian or constant, got {self.importance!r}")

    def weights(self, patch_size: Size) -> np.ndarray | None:
        """For `Stitcher`: float32 [D, H, W], None where all voxels weigh the same."""
        return gaussian_importance(patch_size) if self.importance == "gaussian" else None


@dataclass(frozen=True)
class Padding:
    """Voxels that `pad_to` put before and after the array, each (z, y, x)."""

    before: Size
    after: Size

    @property
    def is_empty(self) -> bool:
        """Whether the array was large enough."""
        return not any(self.before + self.after)


def pad_to(ct: np.ndarray, size: Sequence[int], fill: float = 0.0) -> tuple[np.ndarray, Padding]:
    """Grow an array [..., z, y, x] to at least `size`, the scan in the middle.

    Args:
        ct: returned as it is where it is large enough.
        size: (z, y, x).
        fill: value of the new voxels, for a prepared CT `Preprocess.air`.
    """
    missing = [max(0, wish - n) for n, wish in zip(ct.shape[-3:], size, strict=True)]
    before = tuple(m // 2 for m in missing)
    padding = Padding(before, tuple(m - b for m, b in zip(missing, before, strict=True)))  # type: ignore[arg-type]
    if padding.is_empty:
        return ct, padding
    width = [(0, 0)] * (ct.ndim - 3) + list(zip(padding.before, padding.after, strict=True))
    return np.pad(ct, width, constant_values=fill), padding


def unpad(ct: np.ndarray, padding: Padding) -> np.ndarray:
    """The view [..., z, y, x] that was there before `pad_to`."""
    return ct[(..., *(slice(b, n - a) for b, a, n in zip(padding.before, padding.after, ct.shape[-3:], strict=True)))]


def unpad_slabs(slabs: Iterable[np.ndarray], padding: Padding, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """`unpad` for a stream of slabs [K, dz, h, w] in z order, whose padded whole has the (z, y, x) `shape`."""
    start, stop, z = padding.before[0], shape[0] - padding.after[0], 0
    in_plane = Padding((0, *padding.before[1:]), (0, *padding.after[1:]))
    for slab in slabs:
        kept = unpad(slab[:, max(0, start - z) : max(0, stop - z)], in_plane)
        z += slab.shape[1]
        if kept.shape[1]:
            yield kept


def grid_starts(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[Size]:
    """Where patches start so that they cover an array: per axis evenly spaced, the last flush with the border.

    The number per axis is that of MONAI's sliding window, ``ceil((n - p) / step) + 1`` with ``p * (1 - overlap)``
    rounded down as step; the rest is spread evenly instead of being left to the last patch.

    Returns:
        (z, y, x) in lexicographic order, so z never falls.

    Raises:
        ValueError: an axis is shorter than the patch; `pad_to` first.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected 0 up to less than 1, got {overlap}")
    return list(itertools.product(*(_axis_starts(n, p, overlap) for n, p in zip(shape, patch_size, strict=True))))  # type: ignore[arg-type]


def _axis_starts(n: int, patch: int, overlap: float) -> list[int]:
    if not 1 <= patch <= n:
        raise ValueError(f"patch_size: expected 1 to {n} (the array), got {patch}")
    # The epsilon undoes binary fractions: 10 * (1 - 0.9) is a hair below 1.
    step = max(1, math.floor(patch * (1 - overlap) + 1e-6))
    gaps = math.ceil((n - patch) / step)
    return [round(i * (n - patch) / gaps) for i in range(gaps + 1)] if gaps else [0]


def gaussian_importance(patch_size: Sequence[int]) -> np.ndarray:
    """Weight of each voxel of a patch, float32 [D, H, W] in [0.001, 1]: the middle of a patch is predicted best.

    *Source*: nnU-Net (Isensee et al., Nature Methods 2021) and MONAI use a Gaussian whose sigma is an eighth of the
    patch edge; the floor is MONAI's.
    """
    z, y, x = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in patch_size)
    weights = z[:, None, None] * y[:, None] * x
    return np.maximum(weights / weights.max(), _IMPORTANCE_FLOOR).astype(np.float32)


class Stitcher:
    """Weighted mean of overlapping windows, rolling along z.

    Only as many slices are kept as a patch is deep. Windows come in z order; before the first window of a new row,
    the slices that no later window reaches are taken out. `stitch` does all of it.

    Sums and weights go through the same additions, so windows of ones give ones exactly.

    Args:
        shape: of the whole array, (z, y, x).
        num_channels: K.
        patch_size: of the windows, (z, y, x).
        importance: positive [D, H, W]; None weighs all voxels alike.
        dtype: of the accumulator: float32, or float16 for half the memory and about three digits.
        scratch: a folder for the accumulator, as a file without a name, instead of memory; the same result, slower.

    Raises:
        OSError: no room in `scratch`.
    """

    def __init__(
        self,
        shape: Size,
        num_channels: int,
        patch_size: Size,
        importance: np.ndarray | None = None,
        *,
        dtype: type[np.floating] = np.float32,
        scratch: Path | None = None,
    ) -> None:
        self._shape, self._patch = shape, patch_size
        weights = np.ones(patch_size) if importance is None else importance
        if weights.shape != tuple(patch_size) or not weights.min() > 0:
            raise ValueError(f"importance: expected positive weights of shape {patch_size}, got {weights.shape}")
        self._importance = weights.astype(np.float32)
        self._product = np.empty(patch_size, np.float32)
        size = (num_channels, patch_size[0], shape[1], shape[2])
        # A ring: slice z lies at z modulo the patch's depth, so nothing is moved when the window goes on.
        self._sums = np.zeros(size, dtype) if scratch is None else _zeros_on_disk(size, dtype, scratch)
        self._weights = np.zeros(size[1:], dtype)
        self._done_z = 0

    def add(self, probs: np.ndarray, start: Sequence[int]) -> None:
        """One window [K, D, H, W], of any float type, whose first voxel lies at `start`.

        Raises:
            ValueError: the window reaches beyond the array or below slices that are taken out already, or slices
                that it does not reach have not been taken out (`finished` first).
        """
        if probs.shape != (self._sums.shape[0], *self._patch):
            raise ValueError(f"probs: expected shape {(self._sums.shape[0], *self._patch)}, got {probs.shape}")
        if start[0] != self._done_z or any(
            s < 0 or s + p > n for s, p, n in zip(start, self._patch, self._shape, strict=True)
        ):
            expected = f"z = {self._done_z} and a window inside {self._shape}"
            raise ValueError(f"start: expected {expected}, got {tuple(start)}")
        rows = slice(start[1], start[1] + self._patch[1])
        columns = slice(start[2], start[2] + self._patch[2])
        turn = start[0] % self._patch[0]
        for here, there in ((slice(0, self._patch[0] - turn), slice(turn, None)), (slice(-turn, None), slice(0, turn))):
            if there == slice(0, 0):
                continue
            importance, product = self._importance[here], self._product[here]
            self._weights[there, rows, columns] += importance
            for sums, p in zip(self._sums, probs, strict=True):
                # Class by class: no second array of all classes is made.
                np.multiply(p[here], importance, out=product)
                sums[there, rows, columns] += product

    def finished(self, upto_z: int | None = None) -> Iterator[np.ndarray]:
        """Slices below `upto_z` (None: all) as float32 slabs [K, dz, h, w] in z order, each handed out once.

        Raises:
            ValueError: a voxel in them was covered by no window.
        """
        stop = self._shape[0] if upto_z is None else min(upto_z, self._shape[0])
        depth = self._patch[0]
        while self._done_z < stop:
            first = self._done_z % depth
            count = min(_SLAB_SLICES, stop - self._done_z, depth - first)
            here = slice(first, first + count)
            weights = self._weights[here].astype(np.float32)
            if not weights.min() > 0:
                raise ValueError(f"expected windows over all voxels, got none at some of slice {self._done_z} and on")
            slab = self._sums[:, here].astype(np.float32)
            slab /= weights
            self._sums[:, here] = 0
            self._weights[here] = 0
            self._done_z += count
            yield slab


def stitch(windows: Iterable[tuple[np.ndarray, Size]], stitcher: Stitcher) -> Iterator[np.ndarray]:
    """Windows (probabilities [K, D, H, W], start) in z order to mean slabs float32 [K, dz, h, w] in z order."""
    for probs, start in windows:
        yield from stitcher.finished(start[0])
        stitcher.add(probs, start)
    yield from stitcher.finished()


def _zeros_on_disk(shape: tuple[int, ...], dtype: type[np.floating], folder: Path) -> np.ndarray:
    """An array in a file that has no name: its blocks are freed with it, also when the process is killed."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with TemporaryFile(dir=folder) as file:
        # All blocks are taken now, while a full disk is still an error: later it would be a SIGBUS.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            for offset in range(0, num_bytes, _FILL_BYTES):
                file.write(bytes(min(_FILL_BYTES, num_bytes - offset)))
            file.flush()
        return np.memmap(file, dtype, mode="r+", shape=shape)
