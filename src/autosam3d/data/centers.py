"""Where crops on organs are centred: a voxel drawn from all organ voxels of a case, none of which is listed anywhere.

A case keeps how many voxels each organ has in each axial plane. A draw picks a rank among them, which names the plane,
and finds the voxel in that plane alone: exact, however large the organs are, at a few kilobytes a case.

*Source*: paper, section 4, "foreground and background patches are randomly sampled at a 1 : 1 ratio" with MONAI, to
which foreground is the voxels of all organs alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

COUNTS_DTYPE = np.dtype(np.int32)


def count_organs(planes: Callable[[int], np.ndarray], num_planes: int, num_organs: int) -> np.ndarray:
    """int32 [z, organs]: the voxels of organ k in plane z are in column k - 1; background is not counted.

    Args:
        planes: from z to the labels [y, x] of that plane, 0 to `num_organs`.
    """
    counts = np.zeros((num_planes, num_organs), COUNTS_DTYPE)
    for z in range(num_planes):
        counts[z] = np.bincount(planes(z).ravel(), minlength=num_organs + 1)[1:]
    return counts


def draw_center(
    counts: np.ndarray, planes: Callable[[int], np.ndarray], random: np.random.Generator, *, balance_organs: bool
) -> tuple[int, int, int]:
    """(z, y, x) of an organ voxel: of any with the same chance, or with `balance_organs` of any organ first.

    Args:
        counts: as `count_organs` gives them, of the same `planes`; with at least one voxel.
    """
    sizes = counts.sum(axis=0, dtype=np.int64)
    if balance_organs:
        organ = int(random.choice(np.flatnonzero(sizes)))
        rank = int(random.integers(sizes[organ]))
    else:
        rank = int(random.integers(sizes.sum()))
        up_to = np.cumsum(sizes)
        organ = int(np.searchsorted(up_to, rank, side="right"))
        rank -= int(up_to[organ] - sizes[organ])
    up_to = np.cumsum(counts[:, organ], dtype=np.int64)
    z = int(np.searchsorted(up_to, rank, side="right"))
    rank -= int(up_to[z] - counts[z, organ])
    plane = planes(z)
    y, x = divmod(int(np.flatnonzero(plane == organ + 1)[rank]), plane.shape[1])
    return z, y, x
