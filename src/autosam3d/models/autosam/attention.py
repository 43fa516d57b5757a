"""Multi-head attention inside 3D windows, with SAM's decomposed relative position.

The logit between tokens i and j of one window is

    q_i . k_j / sqrt(c)  +  q_i . Rd[d_i - d_j]  +  q_i . Rh[h_i - h_j]  +  q_i . Rw[w_i - w_j]

with unscaled q in the last three terms. Everything beside the first is again an inner product: of the few numbers
``q_i . Rd[d_i - d']`` for all d' with the one-hot code of d_j. So q and k are widened by these channels and one
fused attention kernel does the whole, with no tokens x tokens bias in memory. The mask of shifted and of padded
windows is an inner product too: -M for each seam that lies between the two tokens.

*Source*: Segment Anything (relative position of the image encoder), Swin Transformer (cyclic shift).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size

if TYPE_CHECKING:
    from jaxtyping import Float


_SEAM = 1000.0
"""What two tokens on different sides of a seam lose in their logit. Weights far from their start give logits of a few
hundred: they, too, must not reach across a seam."""


class WindowAttention(nn.Module):
    """Self-attention in windows of `attn_window` tokens, or over the whole grid.

    Args:
        dim: channels C.
        num_heads: heads; C / num_heads channels each.
        attn_window: tokens per window (d, h, w); its tables hold 2n-1 offsets per axis.
        shifted: move the windows by half their size, so that neighbours of the other blocks' windows meet.
        whole_grid: attend over all tokens; `attn_window` then is only the grid that the tables are built for.
    """

    def __init__(
        self, dim: int, num_heads: int, attn_window: Size, shifted: bool = False, whole_grid: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_window, self.shifted, self.whole_grid = num_heads, attn_window, shifted, whole_grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        rows_d, rows_h, rows_w = (2 * n - 1 for n in attn_window)
        self.rel_pos_d = nn.Parameter(torch.zeros(rows_d, dim // num_heads))
        self.rel_pos_h = nn.Parameter(torch.zeros(rows_h, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows_w, dim // num_heads))

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        grid = cast(Size, tuple(tokens.shape[1:4]))
        # An axis shorter than the window is one window, and one window needs no shift.
        window = grid if self.whole_grid else cast(Size, tuple(map(min, self.attn_window, grid)))
        shift = cast(Size, tuple(n // 2 if self.shifted and g > n else 0 for n, g in zip(window, grid, strict=True)))
        windows = split_windows(tokens, window, shift)
        seams = window_seams(grid, window, shift, windows)
        mixed = self.mix(self.qkv(windows), window, seams)
        return merge_windows(self.proj(mixed), grid, window, shift)

    def mix(self, qkv: Tensor, window: Size, seams: Tensor | None) -> Tensor:
        """Attention proper, between the two projections: queries, keys and values (V, n, 3C) to (V, n, C).

        Args:
            qkv: as SAM's `qkv` layer gives them.
            window: tokens per axis, n in all.
            seams: see `window_seams`.
        """
        num_windows, num_tokens, triple_dim = qkv.shape
        dim = triple_dim // 3
        head_dim = dim // self.num_heads
        q, k, v = qkv.view(num_windows, num_tokens, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)  # V heads n c
        q, k = widen(q, k, window, (self.rel_pos_d, self.rel_pos_h, self.rel_pos_w), seams)
        mixed = softmax_attention(q, k, v, head_dim**-0.5)
        return mixed.transpose(1, 2).reshape(num_windows, num_tokens, dim)


def widen(
    q: Tensor, k: Tensor, window: Size, tables: Sequence[Tensor], seams: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add the channels whose inner product, times c**-0.5, is the relative position and the mask.

    Args:
        q, k: (V, heads, n, c), n = the window's tokens in (d, h, w) order.
        window: tokens per axis.
        tables: one per axis, (2m-1, c), offset 0 in the middle.
        seams: (V, n, s) of 0/1, or None.

    Returns:
        q and k of one width, a multiple of 8 (what the kernels like): c + d + h + w + 2s and zeros.
    """
    num_windows, num_heads, num_tokens, head_dim = q.shape
    root = head_dim**0.5
    grid_q = q.unflatten(2, window)
    relative = [
        torch.einsum(f"vmdhwc,{axis}ec->vmdhwe", grid_q, (offset_table(table, n) * root).to(q.dtype)).flatten(2, 4)
        for axis, n, table in zip("dhw", window, tables, strict=True)
    ]
    q_parts = [q, *relative]
    k_parts = [k, position_code(window, k).expand(num_windows, num_heads, -1, -1)]
    if seams is not None:
        # -M for each seam with one token on side 0 and the other on side 1; exactly 0 else, also in bfloat16.
        sides = seams.to(q.dtype)[:, None].expand(-1, num_heads, -1, -1)
        q_parts += [sides, 1 - sides]
        k_parts += [(sides - 1) * (_SEAM * root), sides * (-_SEAM * root)]
    fill = -sum(part.shape[-1] for part in q_parts) % 8
    if fill:
        zeros = q.new_zeros(1).expand(num_windows, num_heads, num_tokens, fill)
        q_parts.append(zeros)
        k_parts.append(zeros)
    return torch.cat(q_parts, -1), torch.cat(k_parts, -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k' * scale) v with q and k (V, heads, n, w) wider than v (V, heads, n, c)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] ** 2 <= _ChunkedAttention.MAX_MAP:
        mixed = _ChunkedAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
        return cast(Tensor, mixed).view(v.shape)
    # The flash kernels want one width for q, k and v; zero channels of v give zero channels of the result.
    width, head_dim = q.shape[-1], v.shape[-1]
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, width - head_dim)), scale=scale)[..., :head_dim]


class _ChunkedAttention(torch.autograd.Function):
    """The same for bfloat16 on a CPU: plain matrix products over a few heads at a time, recomputed backward.

    PyTorch's flash kernel for CPUs multiplies bfloat16 at about half the speed of its matrix product (measured:
    benchmarks/results/attention.json). A chunk's map is the only memory beside the result. Logits are rounded to
    bfloat16, as everywhere in PyTorch where attention is written as products.
    """

    MAX_MAP = 1 << 23
    """Entries of the tokens x tokens map at a time: 16 MB of bfloat16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        mixed = q.new_empty(v.shape)
        with torch.autocast("cpu", enabled=False):
            for part in _ChunkedAttention._parts(q):
                torch.bmm(_ChunkedAttention._map(q[part], k[part], scale), v[part], out=mixed[part])
        return mixed

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), q.new_empty(v.shape)
        with torch.autocast("cpu", enabled=False):
            for part in _ChunkedAttention._parts(q):
                probs = _ChunkedAttention._map(q[part], k[part], ctx.scale)
                torch.bmm(probs.transpose(1, 2), grad[part], out=grad_v[part])
                grad_probs = torch.bmm(grad[part], v[part].transpose(1, 2))
                grad_logits = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                torch.baddbmm(grad_q[part], grad_logits, k[part], beta=0, alpha=ctx.scale, out=grad_q[part])
                torch.baddbmm(
                    grad_k[part], grad_logits.transpose(1, 2), q[part], beta=0, alpha=ctx.scale, out=grad_k[part]
                )
        return grad_q, grad_k, grad_v, None

    @staticmethod
    def _parts(q: Tensor) -> list[slice]:
        step = max(1, _ChunkedAttention.MAX_MAP // q.shape[1] ** 2)
        return [slice(start, start + step) for start in range(0, q.shape[0], step)]

    @staticmethod
    def _map(q: Tensor, k: Tensor, scale: float) -> Tensor:
        logits = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        return torch.softmax(logits, -1)


def position_code(window: Size, like: Tensor) -> Tensor:
    """One-hot codes of each token's d, h and w side by side: (n, nd + nh + nw) of the dtype and device of `like`."""
    nd, nh, nw = window
    code_d, code_h, code_w = (torch.eye(n, dtype=like.dtype, device=like.device) for n in window)
    parts = (
        code_d.view(nd, 1, 1, nd).expand(nd, nh, nw, nd),
        code_h.view(1, nh, 1, nh).expand(nd, nh, nw, nh),
        code_w.view(1, 1, nw, nw).expand(nd, nh, nw, nw),
    )
    return torch.cat(parts, -1).flatten(0, 2)


def offset_table(table: Tensor, n: int) -> Tensor:
    """Lay a table of 2m-1 offsets out as (n, n, c): entry [i, j] belongs to offset i-j.

    A smaller n uses the offsets that occur; a larger one has the table stretched linearly.
    """
    rows = table.shape[0]
    if rows < 2 * n - 1:
        table = resize_table(table, n, "interp")
        rows = table.shape[0]
    index = torch.arange(n, device=table.device)
    return table[index[:, None] - index[None, :] + rows // 2]


def resize_table(table: Tensor, n: int, how: str) -> Tensor:
    """A table of 2n-1 offsets from one of another length: (rows, c) to (2n-1, c).

    "crop" keeps the middle, so that each offset keeps its vector; "interp" stretches or squeezes the whole table.
    A table that is too short for a crop is stretched.
    """
    rows, wanted = table.shape[0], 2 * n - 1
    if rows == wanted:
        return table
    if how == "crop" and rows > wanted:
        start = (rows - wanted) // 2
        return table[start : start + wanted]
    stretched = F.interpolate(table.float().t()[None], size=wanted, mode="linear", align_corners=False)
    return stretched[0].t().to(table.dtype)


def split_windows(tokens: Tensor, window: Size, shift: Size) -> Tensor:
    """Cut a grid into windows: (B, d, h, w, C) to (V, n, C), V = B times the windows of one grid.

    The grid is padded with zeros at its far ends to whole windows and rolled back by `shift` first.
    """
    batch, *grid, dim = tokens.shape
    over = [-g % n for g, n in zip(grid, window, strict=True)]
    if any(over):
        tokens = F.pad(tokens, (0, 0, 0, over[2], 0, over[1], 0, over[0]))
    if any(shift):
        tokens = torch.roll(tokens, tuple(-s for s in shift), (1, 2, 3))
    counts = [(g + o) // n for g, o, n in zip(grid, over, window, strict=True)]
    pairs = [size for pair in zip(counts, window, strict=True) for size in pair]
    tokens = tokens.view(batch, *pairs, dim).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return tokens.reshape(-1, window[0] * window[1] * window[2], dim)


def merge_windows(windows: Tensor, grid: Size, window: Size, shift: Size) -> Tensor:
    """Undo `split_windows`: (V, n, C) to (B, d, h, w, C)."""
    dim = windows.shape[-1]
    counts = [-(-g // n) for g, n in zip(grid, window, strict=True)]
    padded = [c * n for c, n in zip(counts, window, strict=True)]
    tokens = windows.view(-1, *counts, *window, dim).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *padded, dim)
    if any(shift):
        tokens = torch.roll(tokens, shift, (1, 2, 3))
    return tokens[:, : grid[0], : grid[1], : grid[2]]


def window_seams(grid: Size, window: Size, shift: Size, like: Tensor) -> Tensor | None:
    """On which side of each seam a token lies: (V, n, s) of 0/1; None where all tokens of all windows may meet.

    One seam per shifted axis (where the roll brought the two ends of the grid together) and one around the padding.
    Tokens attend to each other only if they are on the same side of every seam, so padding meets padding alone.

    Args:
        like: the windows (V, n, C), for batch, dtype and device.
    """
    padded = [-(-g // n) * n for g, n in zip(grid, window, strict=True)]
    sides = []
    axes = [torch.arange(p, device=like.device) for p in padded]
    for axis, s in enumerate(shift):
        if s:
            wrapped = axes[axis] < s  # rolled back by s: these come to the far end
            sides.append(_over_axis(wrapped, axis, padded))
    if list(grid) != padded:
        outside = torch.zeros(padded, dtype=torch.bool, device=like.device)
        for axis, g in enumerate(grid):
            outside = outside | _over_axis(axes[axis] >= g, axis, padded)
        sides.append(outside)
    if not sides:
        return None
    seams = split_windows(torch.stack(sides, -1).to(like.dtype)[None], window, shift)
    return seams.repeat(like.shape[0] // seams.shape[0], 1, 1)


def _over_axis(values: Tensor, axis: int, size: list[int]) -> Tensor:
    shape = [1, 1, 1]
    shape[axis] = -1
    return values.view(shape).expand(size)
