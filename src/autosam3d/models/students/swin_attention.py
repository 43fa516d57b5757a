"""Attention of the Swin stages: the softmax inside each window of tokens, in three orders of work.

*Source*: Swin Transformer (arXiv:2103.14030); the bias table and its index as MONAI 1.6.1 stores them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.models.dry_run import is_dry
from autosam3d.models.students.swin_cut import WINDOW, Cut, Side

if TYPE_CHECKING:
    from jaxtyping import Float

_SEAM = 100.0
"""What two tokens on different sides of a seam lose in their logit. *Source*: the mask of the published function."""


class WindowAttention(nn.Module):
    """Self-attention in windows of 7x7x7 tokens with a learned bias for each offset between two tokens.

    The grid is padded with zeros at its far ends to whole windows. That padding is seen by the tokens beside it: the
    published function has no mask for it.
    """

    MAX_MAP = 1 << 24
    """Entries of the tokens x tokens maps at a time in a graph for phones: 64 MB of float32."""
    MAX_SIDE_MAP = 1 << 22
    """The same in an ONNX file: 16 MB."""

    def __init__(self, dim: int, num_heads: int, shifted: bool) -> None:
        super().__init__()
        self.num_heads, self.shifted = num_heads, shifted
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A constant of 7 MB in the published state dicts: left out of ours, and ignored in theirs.
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        cut = Cut.of(cast(Size, tuple(tokens.shape[1:4])), self.shifted)
        if torch.onnx.is_in_onnx_export() and len(tokens) == 1:
            return self.proj(self.mix_sides(self.qkv(tokens.flatten(0, 3)), cut)).view(tokens.shape)
        return cut.merge(self.proj(self.mix(self.qkv(cut.split(tokens)), cut)))

    def mix(self, qkv: Tensor, cut: Cut) -> Tensor:
        """Attention proper, between the two projections: queries, keys and values (V, n, 3C) to (V, n, C)."""
        num_windows, n, triple_dim = qkv.shape
        heads, head_dim = self.num_heads, triple_dim // 3 // self.num_heads
        qkv = qkv.view(num_windows, n, 3 * heads, head_dim)
        if qkv.device.type == "cpu" and not torch.compiler.is_exporting():
            # Tokens last: a product with a long and a thin side is up to five times as fast if the thin one is not.
            q, k, v = qkv.permute(2, 0, 3, 1).contiguous().split(heads)  # heads V c n
            mixed = cast(Tensor, _MixOnCpu.apply(q * head_dim**-0.5, k, v, self.bias(n), cut)).permute(1, 3, 0, 2)
        else:
            q, k, v = _split(qkv.permute(0, 2, 1, 3), heads, 1)  # V heads n c
            q = q * head_dim**-0.5
            if any(cut.shift):
                q, k = widen(q, k, cut.seams(num_windows, q))
            step, bias = max(1, self.MAX_MAP // (heads * n * n)), self.bias(n)
            parts = zip(*(_split(t, step, 0) for t in (q, k, v)), strict=True)
            mixed = torch.cat([mix_windows(qs, ks, vs, bias) for qs, ks, vs in parts]).permute(0, 2, 1, 3)
        return mixed.reshape(num_windows, n, heads * head_dim)

    def mix_sides(self, qkv: Tensor, cut: Cut) -> Tensor:
        """The same as `mix`, for the tokens of one grid in their own order: (N, 3C) to (N, C).

        The form for ONNX files. As in training on a CPU only the maps that are needed are computed, each side of a seam
        by itself: for a patch of 32x64x64 less than half of them. Rows are gathered, which is slow on phones.
        """
        num_tokens, dim = len(qkv), qkv.shape[1] // 3
        qkv = torch.cat([qkv, self.qkv.bias[None]])  # a token of padding is 0 before the projection
        qkv = qkv.view(num_tokens + 1, 3 * self.num_heads, -1).transpose(0, 1)
        q, k, v = _split(qkv, self.num_heads, 0)  # heads N c
        q, bias = q * q.shape[-1] ** -0.5, self.bias(math.prod(cut.window))
        mixed, order = [], []
        for side in cut.sides():
            asking, seen = side.rows(side.asking), side.rows(side.seen)
            bias_side = _pick(_pick(bias, 1, side.places(side.asking)), 2, side.places(side.seen))[:, None]
            step = max(1, self.MAX_SIDE_MAP // (len(q) * len(asking[0]) * len(seen[0])))
            for start in range(0, len(asking), step):
                qs, ks, vs = (_gather(t, rows[start : start + step]) for t, rows in zip(
                    (q, k, v), (asking, seen, seen), strict=True))  # heads V n c
                mixed.append(mix_windows(qs, ks, vs, bias_side).flatten(1, 2))
            order += itertools.chain(*asking)
        mixed = _pick(torch.cat(mixed, 1), 1, sorted(range(num_tokens), key=order.__getitem__))
        return mixed.transpose(0, 1).reshape(num_tokens, dim)

    def bias(self, n: int) -> Tensor:
        """(heads, n, n): the bias of each pair of tokens.

        A window of fewer than 7x7x7 tokens reads the rows of the first n of 343, as the published function does:
        there the bias no longer follows the offset in space, yet weights were trained with it.
        """
        index = cast(Tensor, self.relative_position_index)[:n, :n]
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)


def mix_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k' + bias) v, the definition, in the one form that OpenVINO makes a single kernel of.

    Args:
        q: (V, heads, n, w), or heads first.
        k: (V, heads, m, w).
        v: (V, heads, m, c).
        bias: (heads, n, m), or with heads first (heads, 1, n, m).

    Returns:
        The shape of v, for n tokens.
    """
    return torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v


class _MixOnCpu(torch.autograd.Function):
    """Attention inside windows for training on a CPU: the same numbers as `widen` and `mix_windows`.

    * The cost of a 343x343 map is its transfer to memory and back, by far for head_dim 4. A few maps at a time stay in
      the processor's cache, and the backward pass computes them again.
    * No mask: a window that a seam cuts is computed as several small windows, and padding has no queries.
      At 64^3 voxels that leaves little more than half of the entries.
    * Always in float32 or float64: in bfloat16 the exponential, the largest part, takes longer on a CPU.
    """

    MAX_MAP = 1 << 19
    """Entries of the maps at a time and thread: 2 MB of float32."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cut: Cut) -> Tensor:  # type: ignore[override]
        """q, k, v (heads, V, c, n) and bias (heads, n, n) to (heads, V, c, n), with zeros for padding."""
        ctx.low, ctx.cut = v.dtype, cut
        q, k, v, bias = (_at_least_float32(t) for t in (q, k, v, bias))
        ctx.save_for_backward(q, k, v, bias)
        mixed = torch.zeros_like(v)
        with torch.autocast("cpu", enabled=False):
            for side in [max(cut.sides(), key=Side.num_pairs)] if is_dry(q) else cut.sides():
                q_side, k_side, v_side = side.queries(q), side.keys(k), side.keys(v)
                bias_side, mixed_side = side.pairs(bias), torch.empty_like(q_side)
                maps = _MixOnCpu._maps(2, bias_side)
                for rows, qs, ks, vs, out in _MixOnCpu._parts([bias_side], q_side, k_side, v_side, mixed_side):
                    logits, probs = maps[:, : len(qs)]
                    torch.bmm(qs.transpose(1, 2), ks, out=logits)
                    logits.unflatten(0, (len(rows), -1)).add_(rows[:, None])
                    torch.softmax(logits, -1, out=probs)
                    torch.bmm(vs, probs.transpose(1, 2), out=out)
                    if is_dry(q):
                        break
                side.put_queries(mixed, mixed_side)
        return mixed.to(ctx.low)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, bias = ctx.saved_tensors
        grad, softmax_backward = grad.to(v.dtype).contiguous(), torch.ops.aten._softmax_backward_data.out
        grad_q, grad_k, grad_v, grad_bias = (torch.zeros_like(t) for t in (q, k, v, bias))
        with torch.autocast("cpu", enabled=False):
            for side in ctx.cut.sides():
                bias_side, q_side, k_side, v_side = side.pairs(bias), side.queries(q), side.keys(k), side.keys(v)
                grad_bias_side = torch.zeros_like(bias_side)
                results = [torch.empty_like(q_side), torch.empty_like(k_side), torch.empty_like(v_side)]
                maps, grad_side = _MixOnCpu._maps(3, bias_side), side.queries(grad)
                for rows, grad_rows, qs, ks, vs, gs, gq, gk, gv in _MixOnCpu._parts(
                    [bias_side, grad_bias_side], q_side, k_side, v_side, grad_side, *results
                ):
                    logits, probs, grad_logits = maps[:, : len(qs)]
                    torch.bmm(qs.transpose(1, 2), ks, out=logits)
                    logits.unflatten(0, (len(rows), -1)).add_(rows[:, None])
                    torch.softmax(logits, -1, out=probs)
                    torch.bmm(gs, probs, out=gv)
                    grad_probs = torch.bmm(gs.transpose(1, 2), vs, out=logits)
                    softmax_backward(grad_probs, probs, -1, probs.dtype, grad_input=grad_logits)
                    torch.bmm(ks, grad_logits.transpose(1, 2), out=gq)
                    torch.bmm(qs, grad_logits, out=gk)
                    grad_rows += grad_logits.unflatten(0, (len(rows), -1)).sum(1)
                side.put_queries(grad_q, results[0])
                side.put_keys(grad_k, results[1])
                side.put_keys(grad_v, results[2])
                side.add_pairs(grad_bias, grad_bias_side)
        return grad_q.to(ctx.low), grad_k.to(ctx.low), grad_v.to(ctx.low), grad_bias, None

    @staticmethod
    def _num_maps(bias: Tensor) -> int:
        """How many maps at a time."""
        return max(1, _MixOnCpu.MAX_MAP * torch.get_num_threads() // bias[0].numel())

    @staticmethod
    def _maps(count: int, bias: Tensor) -> Tensor:
        """Memory for `count` times as many maps, used again and again."""
        return bias.new_empty(count, _MixOnCpu._num_maps(bias), *bias.shape[1:])

    @staticmethod
    def _parts(biases: list[Tensor], *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Some windows of one head at a time, or of some heads all windows.

        Yields:
            (heads', queries, keys) of each of `biases`, (heads' * V', c, n) of each of `tensors`.
        """
        heads, num_windows = tensors[0].shape[:2]
        step = _MixOnCpu._num_maps(biases[0])
        step_heads = max(1, step // num_windows)
        for head in range(0, heads, step_heads):
            of_heads = [t[head : head + step_heads] for t in biases]
            for window in range(0, num_windows, step):
                part = slice(head, head + step_heads), slice(window, window + step)
                yield of_heads + [t[part].flatten(0, 1) for t in tensors]


def widen(q: Tensor, k: Tensor, seams: Tensor) -> tuple[Tensor, Tensor]:
    """Add a channel per seam whose product is the mask.

    With side 0 or 1 of a seam the mask is -M (s_i + s_j - 2 s_i s_j). What depends on the query alone falls out of
    the softmax, so -M s_j (1 - 2 s_i) remains: exactly 0 in every window that no seam cuts.

    Args:
        q, k: (V, heads, n, c), q scaled.
        seams: (V, n, 3), see `Cut.seams`.
    """
    sides = seams.to(q.dtype)[:, None].expand(-1, q.shape[1], -1, -1)
    return torch.cat([q, 1 - 2 * sides], -1), torch.cat([k, -_SEAM * sides], -1)


def _split(x: Tensor, size: int, axis: int) -> Sequence[Tensor]:
    """``x.split(size, axis)``; in an exported graph as slices, because converters for phones fail on a split."""
    if not torch.compiler.is_exporting():
        return x.split(size, axis)
    count = x.shape[axis]
    return [x.narrow(axis, start, min(size, count - start)) for start in range(0, count, size)]


def _gather(x: Tensor, rows: list[list[int]]) -> Tensor:
    """Rows of each head, (heads, N, c), for each of V windows: (heads, V, n, c)."""
    return _pick(x, 1, list(itertools.chain(*rows))).unflatten(1, (len(rows), -1))


def _pick(x: Tensor, axis: int, rows: list[int]) -> Tensor:
    """``x.index_select(axis, rows)`` where that is not x itself."""
    return x if rows == list(range(x.shape[axis])) else x.index_select(axis, torch.tensor(rows))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def relative_position_index() -> Tensor:
    """(343, 343): the row of the bias table for each pair of tokens of a window."""
    place = torch.arange(WINDOW, dtype=torch.int32)  # exported files hold the index of every block
    base = 2 * WINDOW - 1
    code = (place[:, None, None] * base + place[:, None]) * base + place
    code = code.flatten()
    return code[:, None] - code[None] + (base**3 - 1) // 2
