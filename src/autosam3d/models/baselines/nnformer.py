"""nnFormer, a baseline that is in no package: attention inside windows on the way down and on the way up.

    ct ── stem ── stage 1 ─────────────────────────── skip attention, stage ── out ── logits       1/token
                    └ down, stage 2 ───────────── skip attention, stage ┘                          half of it
                        └ down, stage 3 ───── skip attention, stage ┘                              a quarter
                            └ down, stage 4 ───── up ┘                                             an eighth

A stage is two blocks, whose windows lie on the grid and between its windows. On the way up the first block's queries
come from below and its keys and values from the skip.

*Source*: nnFormer (arXiv:2109.03201), in the size of its network for Synapse. Ours is not theirs in three details:
an offset between two tokens has one bias and no two offsets share one by mistake; padding is never attended to; a grid
smaller than its window is one window, unshifted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.models.autosam.attention import merge_windows, split_windows, window_seams
from autosam3d.models.conv import guard_convolutions
from autosam3d.models.spec import NnFormerSpec

if TYPE_CHECKING:
    from jaxtyping import Float


class NnFormer(nn.Module):
    """The whole network, for any batch size and any D, H, W that are multiples of `spec.token_size`."""

    def __init__(self, spec: NnFormerSpec) -> None:
        super().__init__()
        self.spec = spec
        sizes = [(spec.embed_dim << i, *pair) for i, pair in
                 enumerate(zip(spec.num_heads, spec.attn_windows, strict=True))]
        self.stem = Stem(spec.embed_dim, spec.token_size)
        down, up = (drop_rates(spec.drop_path, count) for count in (len(sizes), len(sizes) - 1))
        self.stages = nn.ModuleList([Stage(*size, rates) for size, rates in zip(sizes, down, strict=True)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for dim, _, _ in sizes])
        self.downs = nn.ModuleList([Down(dim) for dim, _, _ in sizes[:-1]])
        # The way up begins at the coarsest grid.
        self.ups = nn.ModuleList([UpStage(*size, rates) for size, rates in zip(sizes, reversed(up), strict=False)])
        self.out = Expanding(spec.embed_dim, spec.num_outputs, spec.token_size)
        self.side_outputs = nn.ModuleList()
        self.apply(_start_linear)
        guard_convolutions(self)

    def add_side_outputs(self) -> None:
        """Outputs of the decoder's second and third level, as published; of fewer where there are fewer."""
        for stage in range(1, min(3, len(self.ups))):
            dim = self.spec.embed_dim << stage
            self.side_outputs.append(Expanding(dim, self.spec.num_outputs, self.spec.token_size))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"] | list[Tensor]:
        """Logits of background and organs; in training with side outputs a list, finest first.

        Raises:
            ValueError: the shape is not (B, 1, D, H, W) with multiples of the token size.
        """
        token = self.spec.token_size
        if ct.dim() != 5 or ct.shape[1] != 1 or any(n < t or n % t for n, t in zip(ct.shape[2:], token, strict=True)):
            raise ValueError(f"expected (B, 1, D, H, W) with D, H, W multiples of {token}, got {tuple(ct.shape)}")
        tokens, grids = self.stem(ct), []
        for index, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            tokens = stage(self.downs[index - 1](tokens) if index else tokens)
            grids.append(norm(tokens))
        *skips, tokens = grids
        levels = []
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            tokens = up(tokens, skip)
            levels.append(tokens)
        logits = self.out(tokens)
        if not self.training or not self.side_outputs:
            return logits
        coarser = zip(self.side_outputs, reversed(levels[:-1]), strict=False)
        return [logits, *(_crop(head(level), ct, 1 << i) for i, (head, level) in enumerate(coarser, 1))]


class Stem(nn.Module):
    """Voxels to tokens in two steps of two convolutions, each but the last followed by GELU and norm."""

    def __init__(self, dim: int, token_size: Size) -> None:
        super().__init__()
        first = cast(Size, tuple(min(t, 2) for t in token_size))
        second = cast(Size, tuple(t // f for t, f in zip(token_size, first, strict=True)))
        half = dim // 2
        shapes = ((1, half, first), (half, half, 1), (half, dim, second), (dim, dim, 1))
        self.convs = nn.ModuleList([nn.Conv3d(a, b, 3, stride, 1) for a, b, stride in shapes])
        self.norms = nn.ModuleList([nn.LayerNorm(b) for _, b, _ in shapes])

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B d h w C"]:
        x = ct
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            last = conv is self.convs[-1]
            tokens = norm((x if last else F.gelu(x)).permute(0, 2, 3, 4, 1))
            x = tokens.permute(0, 4, 1, 2, 3)
        return tokens


class Down(nn.Module):
    """Half the grid, rounded up, and twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv3d(dim, 2 * dim, 3, 2, 1)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B e i x E"]:
        return self.conv(self.norm(F.gelu(tokens)).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class Stage(nn.Module):
    """Attention inside windows on the grid, then inside windows shifted by half their size."""

    def __init__(self, dim: int, num_heads: int, attn_window: int, drop: tuple[float, float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(dim, SelfAttention(dim, num_heads, attn_window, shifted=False), drop[0]),
            Block(dim, SelfAttention(dim, num_heads, attn_window, shifted=True), drop[1]),
        )

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        return self.blocks(tokens)


class UpStage(nn.Module):
    """Double the grid, attend to the skip inside windows, then attend inside shifted windows."""

    def __init__(self, dim: int, num_heads: int, attn_window: int, drop: tuple[float, float]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.up = nn.ConvTranspose3d(2 * dim, dim, 2, 2)
        self.skip = SkipBlock(dim, SkipAttention(dim, num_heads, attn_window, shifted=False), drop[0])
        self.block = Block(dim, SelfAttention(dim, num_heads, attn_window, shifted=True), drop[1])

    def forward(
        self, tokens: Float[Tensor, "B e i x E"], skip: Float[Tensor, "B d h w C"]
    ) -> Float[Tensor, "B d h w C"]:
        up = self.up(self.norm(tokens).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        d, h, w = skip.shape[1:4]  # an odd grid was rounded up on the way down
        return self.block(self.skip(up[:, :d, :h, :w], skip))


class Block(nn.Module):
    """Attention and MLP, each normalised first and added to its input, or left out with the chance `drop`."""

    def __init__(self, dim: int, attn: SelfAttention | SkipAttention, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        tokens = tokens + self.kept(self.attn(self.norm1(tokens)))
        return tokens + self.kept(self.mlp(self.norm2(tokens)))

    def kept(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        """In training 0 for the samples that leave this out; the others as much larger as makes the mean the same."""
        if not self.training or self.drop == 0:
            return tokens
        keep = 1 - self.drop
        return tokens * (tokens.new_empty(len(tokens), 1, 1, 1, 1).bernoulli_(keep) / keep)


class SkipBlock(Block):
    """The same with queries from the coarser level and keys and values from the skip, both under one norm."""

    def forward(
        self, up: Float[Tensor, "B d h w C"], skip: Float[Tensor, "B d h w C"]
    ) -> Float[Tensor, "B d h w C"]:
        tokens = up + skip + self.kept(self.attn(self.norm1(up), self.norm1(skip)))
        return tokens + self.kept(self.mlp(self.norm2(tokens)))


class Windows(nn.Module):
    """What both kinds of attention share: windows, the bias of each offset, and softmax."""

    def __init__(self, dim: int, num_heads: int, attn_window: int, shifted: bool) -> None:
        super().__init__()
        self.num_heads, self.attn_window, self.shifted = num_heads, attn_window, shifted
        self.offset_bias = nn.Parameter(torch.empty(num_heads, *[2 * attn_window - 1] * 3))
        nn.init.trunc_normal_(self.offset_bias, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def cut(self, grid: Size) -> tuple[Size, Size]:
        """Tokens per window, and how far the windows are shifted: not where one window holds the axis."""
        window = cast(Size, tuple(min(self.attn_window, n) for n in grid))
        shift = tuple(w // 2 if self.shifted and n > w else 0 for n, w in zip(grid, window, strict=True))
        return window, cast(Size, shift)

    def bias(self, window: Size) -> Tensor:
        """(heads, n, n): the bias of each pair of tokens, by the offset between them."""
        table = self.offset_bias
        for axis, n in enumerate(window):
            index = torch.arange(n, device=table.device)
            offset = index[:, None] - index[None, :] + self.attn_window - 1
            table = table.index_select(1 + 2 * axis, offset.flatten()).unflatten(1 + 2 * axis, (n, n))
        n = window[0] * window[1] * window[2]
        return table.permute(0, 1, 3, 5, 2, 4, 6).reshape(self.num_heads, n, n)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Size) -> Tensor:
        """softmax(q k' / sqrt(c) + bias) v inside each window, then the projection.

        Args:
            q, k, v: (V, n, C), the windows of `split_windows`.

        Returns:
            (B, d, h, w, C).
        """
        window, shift = self.cut(grid)
        bias = self.bias(window)
        seams = window_seams(grid, window, shift, q.new_empty(1, 1, 1).expand(len(q), 1, 1))
        num_windows = len(q)
        if seams is not None:  # the same for all samples
            num_windows = _windows_of(grid, window)
            sides = seams[:num_windows]
            apart = (sides[:, :, None] != sides[:, None]).any(-1)  # windows n n
            bias = bias + torch.zeros_like(apart, dtype=bias.dtype).masked_fill(apart, -torch.inf)[:, None]
        q, k, v = (
            t.reshape(-1, num_windows, t.shape[1], self.num_heads, t.shape[2] // self.num_heads).transpose(2, 3)
            for t in (q, k, v)
        )  # B windows heads n c
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(2, 3)
        return merge_windows(self.proj(mixed.reshape(-1, mixed.shape[2], q.shape[2] * q.shape[4])), grid, window, shift)


class SelfAttention(Windows):
    def __init__(self, dim: int, num_heads: int, attn_window: int, shifted: bool) -> None:
        super().__init__(dim, num_heads, attn_window, shifted)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        grid = cast(Size, tuple(tokens.shape[1:4]))
        q, k, v = self.qkv(split_windows(tokens, *self.cut(grid))).chunk(3, -1)
        return self.mix(q, k, v, grid)


class SkipAttention(Windows):
    """Queries come from the coarser level, without a projection; keys and values come from the skip."""

    def __init__(self, dim: int, num_heads: int, attn_window: int, shifted: bool) -> None:
        super().__init__(dim, num_heads, attn_window, shifted)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(
        self, up: Float[Tensor, "B d h w C"], skip: Float[Tensor, "B d h w C"]
    ) -> Float[Tensor, "B d h w C"]:
        grid = cast(Size, tuple(skip.shape[1:4]))
        k, v = self.kv(split_windows(skip, *self.cut(grid))).chunk(2, -1)
        return self.mix(split_windows(up, *self.cut(grid)).to(k.dtype), k, v, grid)


class Expanding(nn.Module):
    """Tokens to the logits of their voxels."""

    def __init__(self, dim: int, num_outputs: int, token_size: Size) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(dim, num_outputs, token_size, token_size)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B K D H W"]:
        return self.up(tokens.permute(0, 4, 1, 2, 3))


def drop_rates(most: float, num_stages: int) -> list[tuple[float, float]]:
    """Of the two blocks of each stage in the order in which they work: evenly from 0 to `most`.

    *Source*: nnFormer's network for Synapse, ``linspace(0, 0.2, sum(depths))`` on the way down and on the way up.
    """
    rates = torch.linspace(0, most, 2 * num_stages, dtype=torch.float64, device="cpu").tolist()
    return list(zip(rates[::2], rates[1::2], strict=True))


def _crop(logits: Tensor, ct: Tensor, step: int) -> Tensor:
    """Without what lies beyond the CT, where grids were rounded up; `step` voxels of the CT are one of `logits`."""
    d, h, w = (-(-n // step) for n in ct.shape[2:])
    return logits[:, :, :d, :h, :w]


def _windows_of(grid: Size, window: Size) -> int:
    counts = [-(-n // w) for n, w in zip(grid, window, strict=True)]
    return counts[0] * counts[1] * counts[2]


def _start_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
