"""How a grid of tokens is cut into attention windows, and which of their tokens attend to which.

*Source*: Swin Transformer (arXiv:2103.14030); padding and its missing mask as in MONAI 1.6.1.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autosam3d.axes import Size

Slices = tuple[slice, slice, slice]

WINDOW = 7
"""Tokens per axis of an attention window; a shorter axis is one window."""


@dataclass(frozen=True)
class Cut:
    """How a grid of tokens is cut into windows. All triples are (d, h, w)."""

    grid: Size
    window: Size
    shift: Size
    """How far the grid is rolled back first."""

    @classmethod
    def of(cls, grid: Size, shifted: bool) -> Cut:
        """Windows of 7 tokens, shifted by 3; an axis of at most 7 tokens is one window and is not shifted."""
        window = cast(Size, tuple(min(WINDOW, g) for g in grid))
        return cls(grid, window, cast(Size, tuple(WINDOW // 2 if shifted and g > WINDOW else 0 for g in grid)))

    @property
    def counts(self) -> Size:
        """Windows per axis."""
        return cast(Size, tuple(-(-g // n) for g, n in zip(self.grid, self.window, strict=True)))

    def split(self, tokens: Tensor) -> Tensor:
        """Cut a grid into windows: (B, d, h, w, C) to (V, n, C), V = B times the windows of one grid.

        The grid is padded with zeros at its far ends to whole windows, then rolled. No tensor has more than five
        axes, the most that runtimes on phones support.
        """
        batch, *grid, dim = tokens.shape
        over = [-g % n for g, n in zip(grid, self.window, strict=True)]
        if any(over):
            tokens = F.pad(tokens, (0, 0, 0, over[2], 0, over[1], 0, over[0]))
        if any(self.shift):
            tokens = torch.roll(tokens, tuple(-s for s in self.shift), (1, 2, 3))
        (d, h, w), (nd, nh, nw) = self.window, self.counts
        tokens = tokens.reshape(batch * nd, d, nh, h, nw * w * dim).transpose(1, 2)
        tokens = tokens.reshape(batch * nd * nh, d * h, nw, w * dim).transpose(1, 2)
        return tokens.reshape(batch * nd * nh * nw, d * h * w, dim)

    def merge(self, windows: Tensor) -> Tensor:
        """Undo `split`: (V, n, C) to (B, d, h, w, C)."""
        dim = windows.shape[-1]
        (d, h, w), (nd, nh, nw) = self.window, self.counts
        batch = windows.shape[0] // (nd * nh * nw)
        tokens = windows.reshape(batch * nd * nh, nw, d * h, w * dim).transpose(1, 2)
        tokens = tokens.reshape(batch * nd, nh, d, h, nw * w * dim).transpose(1, 2)
        tokens = tokens.reshape(batch, nd * d, nh * h, nw * w, dim)
        if any(self.shift):
            tokens = torch.roll(tokens, self.shift, (1, 2, 3))
        return tokens[:, : self.grid[0], : self.grid[1], : self.grid[2]]

    def seams(self, num_windows: int, like: Tensor) -> Tensor:
        """On which side of each seam a token lies: (V, n, 3) of 0 and 1, of the dtype and device of `like`.

        A seam is where the roll brought the two ends of an axis together. Tokens attend to each other only if they
        are on the same side of all three.
        """
        nd, nh, nw = (c * n for c, n in zip(self.counts, self.window, strict=True))
        near = [torch.arange(n, device=like.device) < s for n, s in zip((nd, nh, nw), self.shift, strict=True)]
        sides = [
            near[0].view(nd, 1, 1).expand(nd, nh, nw),
            near[1].view(1, nh, 1).expand(nd, nh, nw),
            near[2].view(1, 1, nw).expand(nd, nh, nw),
        ]
        seams = self.split(torch.stack(sides, -1).to(like.dtype)[None])
        return seams.repeat(num_windows // len(seams), 1, 1)

    def sides(self) -> list[Side]:
        """The parts of windows whose tokens attend to each other; together they hold all queries except padding."""
        axes = [_axis_sides(*axis) for axis in zip(self.grid, self.window, self.shift, strict=True)]
        return [Side(self, *cast(tuple[Slices, Slices, Slices], tuple(zip(*parts, strict=True))))
                for parts in itertools.product(*axes)]


@dataclass(frozen=True)
class Side:
    """The same part of several windows: its keys see each other and nothing else."""

    cut: Cut
    windows: Slices
    asking: Slices
    """Tokens of the window whose queries count: no padding."""
    seen: Slices
    """Tokens of the window that they see, padding included."""

    def num_pairs(self) -> int:
        """Entries of this part's maps, of one head."""
        return math.prod(s.stop - s.start for s in (*self.windows, *self.asking, *self.seen))

    def queries(self, x: Tensor) -> Tensor:
        """From (heads, V, c, n) of all windows to (heads, V', c, n') of this part."""
        return self._view(x, self.asking).flatten(6).flatten(1, 4)

    def keys(self, x: Tensor) -> Tensor:
        """See `queries`."""
        return self._view(x, self.seen).flatten(6).flatten(1, 4)

    def rows(self, tokens: Slices) -> list[list[int]]:
        """The rows of these tokens in the flattened grid, a list for each of V' windows; padding has the row after all.

        Lists, not tensors, so that an exporter stores them as constants and does not trace their computation.
        """
        d, h, w = self.cut.grid
        axes = zip(self.cut.grid, self.cut.window, self.cut.shift, self.windows, tokens, strict=True)
        zs, ys, xs = ([window[part] for window in _axis_tokens(*axis)[windows]] for *axis, windows, part in axes)
        return [
            [(k * h + j) * w + i if k < d and j < h and i < w else d * h * w for k in z for j in y for i in x]
            for z in zs for y in ys for x in xs
        ]

    def places(self, tokens: Slices) -> list[int]:
        """The positions of these tokens in a flattened window."""
        (_, h, w), (z, y, x) = self.cut.window, (range(s.start, s.stop) for s in tokens)
        return [(k * h + j) * w + i for k in z for j in y for i in x]

    def pairs(self, bias: Tensor) -> Tensor:
        """From (heads, n, n) to (heads, queries, keys)."""
        return self._pairs_view(bias).flatten(4).flatten(1, 3)

    def put_queries(self, x: Tensor, part: Tensor) -> None:
        """Undo `queries`: write `part` to its place in x."""
        view = self._view(x, self.asking)
        view.copy_(part.view(view.shape))

    def put_keys(self, x: Tensor, part: Tensor) -> None:
        """Undo `keys`."""
        view = self._view(x, self.seen)
        view.copy_(part.view(view.shape))

    def add_pairs(self, bias: Tensor, part: Tensor) -> None:
        """Undo `pairs`, adding."""
        view = self._pairs_view(bias)
        view += part.view(view.shape)

    def _view(self, x: Tensor, tokens: Slices) -> Tensor:
        heads, _, dim, _ = x.shape
        x = x.view(heads, -1, *self.cut.counts, dim, *self.cut.window)
        return x[(slice(None), slice(None), *self.windows, slice(None), *tokens)]

    def _pairs_view(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *self.cut.window, *self.cut.window)[(slice(None), *self.asking, *self.seen)]


def _axis_tokens(grid: int, window: int, shift: int) -> list[list[int]]:
    """The tokens of each window along one axis; those from `grid` on are padding."""
    whole = -(-grid // window) * window
    return [[(first + i + shift) % whole for i in range(window)] for first in range(0, whole, window)]


def _axis_sides(grid: int, window: int, shift: int) -> list[tuple[slice, slice, slice]]:
    """One axis of `Cut.sides`: (windows, asking, seen) of each part."""
    count = -(-grid // window)
    sides: list[tuple[slice, slice, slice]] = []
    for index in range(count):
        start = index * window + shift  # of this window, on the grid that was not rolled
        seam = min(window, count * window - start)
        for low, high, first in ((0, seam, start), (seam, window, 0)):
            real = min(high, low + grid - first)
            if real <= low:
                continue  # nothing or padding alone
            tokens = slice(low, real), slice(low, high)
            if sides and sides[-1][1:] == tokens and sides[-1][0].stop == index:
                sides[-1] = (slice(sides[-1][0].start, index + 1), *tokens)
            else:
                sides.append((slice(index, index + 1), *tokens))
    return sides
