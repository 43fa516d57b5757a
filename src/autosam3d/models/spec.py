"""The sizes and options that define a network. No torch here, since recipes are read without it.

*Source* of AutoSAM's defaults: the published parameter count 26,530,944 pins adapter 384, neck 256, prompt generator 16
and decoder 128 (paper Table 1, SAM ViT-B, 16 outputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from autosam3d.axes import Size


@dataclass(frozen=True, kw_only=True)
class VitSpec:
    """The sizes of SAM's image encoder, as in its 2D weights."""

    embed_dim: int
    num_blocks: int
    num_heads: int
    taps: tuple[int, int, int, int]
    """Blocks (from 0) whose output feeds a neck; SAM's global-attention blocks in B, L and H."""
    pretrain_patch: int = 16
    """Edge of SAM's 2D patch kernel."""
    pretrain_grid: int = 64
    """Edge of SAM's table of absolute positions."""
    pretrain_window: int = 14
    """Attention window of SAM's local blocks: their tables have 2*14-1 rows, the global ones 2*64-1."""
    mlp_ratio: float = 4.0


VITS: dict[str, VitSpec] = {
    "vit_b": VitSpec(embed_dim=768, num_blocks=12, num_heads=12, taps=(2, 5, 8, 11)),
    "vit_l": VitSpec(embed_dim=1024, num_blocks=24, num_heads=16, taps=(5, 11, 17, 23)),
    "vit_h": VitSpec(embed_dim=1280, num_blocks=32, num_heads=16, taps=(7, 15, 23, 31)),
    # Not a SAM size: small enough for tests and for two CPU cores, trained from scratch.
    "vit_tiny": VitSpec(embed_dim=96, num_blocks=4, num_heads=3, taps=(0, 1, 2, 3), pretrain_grid=32),
}


@dataclass(frozen=True, kw_only=True)
class AutoSamSpec:
    """AutoSAM Adapter: 3D encoder from a 2D SAM, Auto Prompt Generator, multi-layer aggregation decoder.

    All triples are (z, y, x).
    """

    num_outputs: int
    """K: organs and background."""
    network: Literal["autosam"] = "autosam"
    patch_size: Size = (128, 128, 128)
    """The crop that the model is built for; other sizes run, with interpolated depth positions."""
    vit: str = "vit_b"
    scale: Size = (4, 4, 4)
    """How far the CT is (virtually) enlarged per axis before SAM's 16-voxel tokens are cut: 1, 2, 4, 8 or 16;
    a token covers 16/scale voxels."""
    attn_window: Size = (8, 8, 8)
    """Tokens per attention window; a grid smaller than the window is one window."""
    global_blocks: tuple[int, ...] = ()
    """Blocks that attend over the whole grid."""
    adapter_dim: int = 384
    """Width of the spatial adapters; 0 leaves them out (ablation)."""
    adapter_act: str = "relu"
    """"relu" or "gelu"."""
    depth_embed: bool = True
    rel_pos_resize: str = "crop"
    """How SAM's relative-position tables shrink: "crop" keeps what an offset means, "interp" squeezes them."""
    neck_dim: int = 256
    prompt_dim: int = 16
    """Base width of the Auto Prompt Generator: its levels have 1, 2, 4, 8 and 10 times as many channels."""
    prompt_generator: bool = True
    """APG; False feeds F4 to the decoder as it is (Table 3)."""
    prompt_residual: bool = False
    """Prompt = F4 + APG(F4) instead of APG(F4)."""
    aggregation: bool = True
    """MLAM; False decodes from the prompt alone (Table 3)."""
    head_dim: int = 128
    """Width of the decoder's heads and of its fusion."""
    fuse_stride: int = 2
    """Where the image joins: 2 = half resolution (the public code), 1 = full resolution (the paper's words)."""
    full_res_refine: bool = False
    """A zero-started residual convolution over logits and image at full resolution."""
    sam_norm: bool = False
    """Apply SAM's RGB mean and deviation to the image (expects [0, 1])."""
    checkpointing: bool = False
    """Recompute encoder blocks in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        def demand(ok: bool, field: str, wish: str) -> None:
            _demand(self, ok, field, wish)

        _demand_common(self)
        demand(self.vit in VITS, "vit", f"one of {', '.join(VITS)}")
        demand(all(s in (1, 2, 4, 8, 16) for s in self.scale), "scale", "1, 2, 4, 8 or 16 per axis")
        demand(
            all(n >= 16 // s and n % (16 // s) == 0 for n, s in zip(self.patch_size, self.scale, strict=True)),
            "patch_size", f"positive multiples of {tuple(16 // s for s in self.scale)} (16/scale)",
        )
        demand(all(1 <= w <= 1024 for w in self.attn_window), "attn_window", "sizes from 1 to 1024")
        demand(0 <= self.adapter_dim <= 4096, "adapter_dim", "0 to 4096")
        demand(self.adapter_act in ("relu", "gelu"), "adapter_act", "relu or gelu")
        demand(self.rel_pos_resize in ("crop", "interp"), "rel_pos_resize", "crop or interp")
        for field in ("neck_dim", "prompt_dim", "head_dim"):
            demand(1 <= getattr(self, field) <= 4096, field, "a width from 1 to 4096")
        demand(self.fuse_stride in (1, 2), "fuse_stride", "1 or 2")
        blocks = VITS[self.vit].num_blocks
        demand(all(0 <= b < blocks for b in self.global_blocks), "global_blocks", f"blocks from 0 to {blocks - 1}")

    @property
    def token_size(self) -> Size:
        """Voxels per token (z, y, x)."""
        return tuple(16 // s for s in self.scale)  # type: ignore[return-value]

    @property
    def token_grid(self) -> Size:
        """Tokens per patch (d, h, w)."""
        return tuple(n // t for n, t in zip(self.patch_size, self.token_size, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class SwinUnetrSpec:
    """SwinUNETR, the paper's student: Tiny has `feature_size` 12 (4.08 M parameters), Small 24 (15.7 M)."""

    num_outputs: int
    """K: organs and background."""
    network: Literal["swin_unetr"] = "swin_unetr"
    patch_size: Size = (96, 96, 96)
    """The crop that the model is trained and exported for; multiples of 32."""
    feature_size: int = 12
    """Channels at full resolution; a multiple of 12 (the four stages have 3, 6, 12 and 24 heads)."""
    checkpointing: bool = False
    """Recompute Swin blocks in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        _demand_common(self)
        _demand(self, _multiples(self.patch_size, 32), "patch_size", "positive multiples of 32")
        fits = self.feature_size > 0 and self.feature_size % 12 == 0 and self.feature_size <= 96
        _demand(self, fits, "feature_size", "12, 24, 48 or another multiple of 12 up to 96")


@dataclass(frozen=True, kw_only=True)
class ResUnetSpec:
    """A strided residual U-Net, the edge tier: less work than SwinUNETR Tiny, with operators that all targets run."""

    num_outputs: int
    """K: organs and background."""
    network: Literal["res_unet"] = "res_unet"
    patch_size: Size = (96, 96, 96)
    """The crop that the model is trained and exported for; multiples of 32."""
    channels: tuple[int, int, int, int, int] = (16, 32, 64, 128, 256)
    """Of the five levels, from half resolution down."""

    def __post_init__(self) -> None:
        _demand_common(self)
        _demand(self, _multiples(self.patch_size, 32), "patch_size", "positive multiples of 32")
        _demand(self, all(1 <= c <= 4096 for c in self.channels), "channels", "five widths from 1 to 4096")


@dataclass(frozen=True, kw_only=True)
class NnUnetSpec:
    """nnU-Net's network, MONAI's ``DynUNet``; the defaults have 31.19 M parameters (paper Table 1: 31.18)."""

    num_outputs: int
    """K: organs and background."""
    network: Literal["nnunet"] = "nnunet"
    patch_size: Size = (128, 128, 128)
    """The crop that the model is trained for; multiples of what the strides multiply to."""
    channels: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    """Of each stage, finest first: 3 to 8 stages."""
    strides: tuple[Size, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    """Of each stage's first convolution, 1 or 2 per axis; the first stage keeps the CT's resolution."""

    def __post_init__(self) -> None:
        _demand_common(self)
        fits = 3 <= len(self.channels) <= 8 and all(1 <= c <= 4096 for c in self.channels)
        _demand(self, fits, "channels", "3 to 8 widths from 1 to 4096")
        fits = len(self.strides) == len(self.channels) and all(s in (1, 2) for triple in self.strides for s in triple)
        fits = fits and self.strides[0] == (1, 1, 1)
        _demand(self, fits, "strides", "a (z, y, x) of 1 or 2 for each of the channels, [1, 1, 1] first")
        # The deepest map is normalised over its voxels, so there must be two at least.
        fits = all(n % m == 0 for n, m in zip(self.patch_size, self.multiple, strict=True))
        fits = fits and self.patch_size != self.multiple and min(self.patch_size) > 0
        _demand(self, fits, "patch_size", f"positive multiples of {self.multiple} (the strides multiplied), and more")

    @property
    def multiple(self) -> Size:
        """What a crop's size must be a multiple of (z, y, x)."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class UnetrSpec:
    """UNETR, MONAI's: a plain ViT whose tokens a convolutional decoder reads; 93.03 M parameters at 128^3."""

    num_outputs: int
    """K: organs and background."""
    network: Literal["unetr"] = "unetr"
    patch_size: Size = (128, 128, 128)
    """The only crop that the model takes, for its positions are learned; multiples of `token_size`."""
    token_size: int = 16
    """Edge of a token in voxels: 16 as published, or 8, which leaves out the deepest doubling."""
    feature_size: int = 16
    """Channels at full resolution."""
    hidden_dim: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12

    def __post_init__(self) -> None:
        _demand_common(self)
        _demand(self, self.token_size in (8, 16), "token_size", "8 or 16")
        _demand(self, _multiples(self.patch_size, self.token_size), "patch_size",
                f"positive multiples of {self.token_size} (token_size)")
        for field in ("feature_size", "hidden_dim", "mlp_dim"):
            _demand(self, 1 <= getattr(self, field) <= 8192, field, "a width from 1 to 8192")
        fits = 1 <= self.num_heads <= 256 and self.hidden_dim % self.num_heads == 0
        _demand(self, fits, "num_heads", f"a divisor of hidden_dim, {self.hidden_dim}")


@dataclass(frozen=True, kw_only=True)
class NnFormerSpec:
    """nnFormer, written here; the defaults have 150,140,232 parameters at 16 outputs (paper Table 1: 150.14 M)."""

    num_outputs: int
    """K: organs and background."""
    network: Literal["nnformer"] = "nnformer"
    patch_size: Size = (128, 128, 128)
    """The crop that the model is trained for; multiples of `token_size`. Grids are padded where windows do not fit."""
    token_size: Size = (2, 4, 4)
    """Voxels per token, 1, 2 or 4 per axis."""
    embed_dim: int = 192
    """Channels of the first stage, doubled in each that follows."""
    num_heads: tuple[int, ...] = (6, 12, 24, 48)
    """Of each stage, finest first: 2 to 5 stages."""
    attn_windows: tuple[int, ...] = (4, 4, 8, 4)
    """Edge in tokens of each stage's attention windows; a grid smaller than its window is one window."""
    drop_path: float = 0.2
    """Stochastic depth: how often a sample leaves a block out in training, at the end of the way down and of the way
    up; it grows evenly from 0. 0.2 as published; a finished model leaves nothing out."""

    def __post_init__(self) -> None:
        _demand_common(self)
        _demand(self, 0 <= self.drop_path < 1, "drop_path", "0 up to less than 1")
        _demand(self, all(t in (1, 2, 4) for t in self.token_size), "token_size", "1, 2 or 4 per axis")
        fits = all(n >= t and n % t == 0 for n, t in zip(self.patch_size, self.token_size, strict=True))
        _demand(self, fits, "patch_size", f"positive multiples of {self.token_size} (token_size)")
        _demand(self, 2 <= self.embed_dim <= 4096 and self.embed_dim % 2 == 0, "embed_dim", "an even width up to 4096")
        dims = [self.embed_dim << stage for stage in range(len(self.num_heads))]
        fits = 2 <= len(dims) <= 5 and all(h >= 1 and d % h == 0 for d, h in zip(dims, self.num_heads, strict=True))
        _demand(self, fits, "num_heads", f"2 to 5 divisors of the stages' widths, {self.embed_dim} and its doubles")
        fits = len(self.attn_windows) == len(self.num_heads) and all(1 <= w <= 64 for w in self.attn_windows)
        _demand(self, fits, "attn_windows", "a size from 1 to 64 for each of num_heads")


NetworkSpec = AutoSamSpec | SwinUnetrSpec | ResUnetSpec | NnUnetSpec | UnetrSpec | NnFormerSpec
"""What a recipe's `model` section may be; the key `network` tells which."""

DEEPLY_SUPERVISED = ("nnunet", "nnformer")
"""Networks with outputs at coarser levels, for training with deep supervision."""


def _demand(spec: object, ok: bool, field: str, wish: str) -> None:
    if not ok:
        raise ValueError(f"{field}: expected {wish}, got {getattr(spec, field)!r}")


def _demand_common(spec: NetworkSpec) -> None:
    _demand(spec, spec.num_outputs >= 2, "num_outputs", "at least 2 (background and one organ)")
    _demand(spec, all(n <= 1024 for n in spec.patch_size), "patch_size", "at most 1024 per axis")


def _multiples(size: Size, of: int) -> bool:
    return all(n >= of and n % of == 0 for n in size)
