"""Prompts for SAM made from the truth of one slice: points inside an organ, the box around it.

Pixels are (row, column) of the slice as it is shown; a `Frame` brings them into the square that SAM reads, where a
prompt is (x, y) as SAM has it: 0 is the middle of the first pixel.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

REFERENCE_SIZE = 1024
"""Pixels a side of SAM's square; jitter is said in these, whatever the model's own square is."""


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Which prompt an organ of a slice gets."""

    kind: Literal["point", "box"] = "point"
    num_points: int = 0
    """Points: 0 takes the one pixel that lies deepest in the organ, k takes k random pixels of it."""
    jitter_px: int = 0
    """Box: each side moves outwards by 0 up to this many pixels of a square of 1024. MedSAM was trained with 20."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("point", "box"):
            raise ValueError(f"kind: expected point or box, got {self.kind!r}")
        if not 0 <= self.num_points <= 100 or not 0 <= self.jitter_px <= REFERENCE_SIZE:
            raise ValueError(f"expected num_points 0 to 100 and jitter_px 0 to {REFERENCE_SIZE}, got "
                             f"{self.num_points} and {self.jitter_px}")


@dataclass(frozen=True)
class Frame:
    """Where a slice lies in the square that SAM reads: at its upper left corner, enlarged."""

    shape: tuple[int, int]
    """Of the slice."""
    scaled: tuple[int, int]
    """Of the slice in the square."""
    image_size: int
    """Of the square."""

    def to_square(self, rows_columns: np.ndarray) -> np.ndarray:
        """float32 [..., (x, y)] in the square of positions [..., (row, column)], in which 0.5 is the middle of the
        first pixel and 0 its border."""
        scale = np.array(self.scaled) / np.array(self.shape)
        return ((rows_columns * scale)[..., ::-1] - 0.5).astype(np.float32)


def random_for(spec_seed: int, *place: int | str) -> np.random.Generator:
    """The generator of one place (case, slice, organ, or epoch and position): no order of work changes a draw."""
    return np.random.default_rng([spec_seed, *(zlib.crc32(p.encode()) if isinstance(p, str) else p for p in place)])


def make_prompt(mask: np.ndarray, frame: Frame, spec: PromptSpec, random: np.random.Generator) -> np.ndarray:
    """The prompt of one organ: float32 [points, (x, y)], or the box's corners (x0, y0, x1, y1).

    Args:
        mask: bool [row, column] of the slice, not empty.
        random: for random points and jitter.
    """
    if spec.kind == "box":
        box = tight_box(mask)
        corners = frame.to_square(np.array(box, float).reshape(2, 2))
        # The far corner is the last pixel's, not the border behind it: as MedSAM takes it from a mask of the square.
        corners[0] += 0.5
        corners[1] -= 0.5
        grow = random.integers(0, spec.jitter_px, size=4, endpoint=True) * frame.image_size / REFERENCE_SIZE
        low = np.maximum(corners[0] - grow[:2], 0)
        high = np.minimum(corners[1] + grow[2:], np.array(frame.scaled[::-1]) - 1)
        return np.concatenate([low, np.maximum(high, low)]).astype(np.float32)
    pixels = random_pixels(mask, spec.num_points, random) if spec.num_points else deepest_pixel(mask)[None]
    return frame.to_square(pixels + 0.5)


def deepest_pixel(mask: np.ndarray) -> np.ndarray:
    """(row, column) of the pixel that is farthest from what is not the organ, the slice's border included."""
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
    return np.array(np.unravel_index(int(depth.argmax()), mask.shape))


def random_pixels(mask: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, (row, column)] pixels of the organ, different ones where it has as many."""
    pixels = np.argwhere(mask)
    return pixels[random.choice(len(pixels), count, replace=count > len(pixels))]


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First row and column of the organ, and those behind its last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
