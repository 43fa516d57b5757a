"""SwinUNETR, the student: MONAI's function and weight names in an order of work that every runtime can follow.

    ct ─┬───────────────────────────────────────────── encoder1 ─── decoder1 ── out ── logits     D     H     W
        └─ 2x2x2 tokens ─┬──────────────────────────── encoder2 ─── decoder2                      D/2   H/2   W/2
           Swin stage 1 ─┴─┬────────────────────────── encoder3 ─── decoder3                      D/4   H/4   W/4
             Swin stage 2 ─┴─┬──────────────────────── encoder4 ─── decoder4                      D/8   H/8   W/8
               Swin stage 3 ─┴─┬─────────────────────────────────── decoder5                      D/16  H/16  W/16
                 Swin stage 4 ─┴────────────────────── encoder10 ──────┘                          D/32  H/32  W/32

A state dict of ``monai.networks.nets.SwinUNETR(1, K, feature_size=F)`` loads strictly, and ours is the same without
the index of its bias tables, which is a constant.

*Source*: "Swin UNETR" (arXiv:2201.01266); parity with MONAI 1.6.1 is what the tests hold it to. Weights trained with
a MONAI that merged tokens in another order (``PatchMerging`` once took two corners twice) load as well, but mean
another function there, too.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autosam3d.models.conv import Conv3d
from autosam3d.models.instance_norm import norm_leaky
from autosam3d.models.pointwise import Doubling, Mixing
from autosam3d.models.spec import SwinUnetrSpec
from autosam3d.models.students.swin_attention import WindowAttention

if TYPE_CHECKING:
    from jaxtyping import Float

_HEADS = (3, 6, 12, 24)
_CORNERS = (0, 3, 2, 6, 1, 5, 4, 7)
"""Which of the eight groups of stored weights is for the token at (z, y, x) = 000, 001, 010 ... 111 of a merging."""


class SwinUnetr(nn.Module):
    """The whole network, for any batch size and any D, H, W that are multiples of 32."""

    def __init__(self, spec: SwinUnetrSpec) -> None:
        super().__init__()
        self.spec = spec
        f = spec.feature_size
        self.swinViT = SwinEncoder(f, spec.checkpointing)
        self.encoder1 = _named(layer=ResBlock(1, f))
        self.encoder2 = _named(layer=ResBlock(f, f))
        self.encoder3 = _named(layer=ResBlock(2 * f, 2 * f))
        self.encoder4 = _named(layer=ResBlock(4 * f, 4 * f))
        self.encoder10 = _named(layer=ResBlock(16 * f, 16 * f))
        self.decoder5 = UpBlock(16 * f, 8 * f)
        self.decoder4 = UpBlock(8 * f, 4 * f)
        self.decoder3 = UpBlock(4 * f, 2 * f)
        self.decoder2 = UpBlock(2 * f, f)
        self.decoder1 = UpBlock(f, f)
        self.out = _named(conv=_named(conv=Mixing(f, spec.num_outputs)))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"]:
        """Logits of background and organs at the CT's resolution.

        Raises:
            ValueError: the shape is not (B, 1, D, H, W) with multiples of 32.
        """
        if ct.dim() != 5 or ct.shape[1] != 1 or any(n < 32 or n % 32 for n in ct.shape[2:]):
            raise ValueError(f"expected (B, 1, D, H, W) with D, H, W multiples of 32, got {tuple(ct.shape)}")
        if not torch.compiler.is_exporting():  # ExecuTorch does not support this layout
            ct = ct.to(memory_format=torch.channels_last_3d)
        half, quarter, eighth, sixteenth, deepest = self.swinViT(ct)
        x = self.decoder5(self.encoder10(deepest), sixteenth)
        x = self.decoder4(x, self.encoder4(eighth))
        x = self.decoder3(x, self.encoder3(quarter))
        x = self.decoder2(x, self.encoder2(half))
        x = self.decoder1(x, self.encoder1(ct))
        return self.out(x)


class SwinEncoder(nn.Module):
    """Tokens of 2x2x2 voxels through four stages, each of which halves the grid and doubles the channels."""

    def __init__(self, dim: int, checkpointing: bool) -> None:
        super().__init__()
        self.patch_embed = _named(proj=Tokens(dim))
        self.layers1, self.layers2, self.layers3, self.layers4 = (
            nn.ModuleList([Stage(dim << i, heads, checkpointing)]) for i, heads in enumerate(_HEADS)
        )

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> list[Tensor]:
        """The five token grids, finest first, each (B, C, d, h, w) and normalised over its channels."""
        tokens = self.patch_embed(ct).permute(0, 2, 3, 4, 1)
        grids = [tokens]
        for (stage,) in (self.layers1, self.layers2, self.layers3, self.layers4):
            tokens = stage(tokens)
            grids.append(tokens)
        return [F.layer_norm(t, t.shape[-1:]).permute(0, 4, 1, 2, 3) for t in grids]


class Tokens(nn.Conv3d):
    """2x2x2 voxels to one token: a convolution of stride 2, no two tokens of which share a voxel."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim, 2, stride=2)

    def forward(self, input: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B C D/2 H/2 W/2"]:
        if not torch.compiler.is_exporting():
            return super().forward(input)
        # Written as a matrix product: OpenVINO would keep a convolution's layout in all token grids after it, and
        # transpose each of them wherever channels must be contiguous.
        batch, _, d, h, w = input.shape
        x = input.reshape(batch * d * h // 2, 2, w // 2, 2).transpose(1, 2)  # (B D h) w y x
        x = x.reshape(batch * d // 2, 2, h * w // 4, 4).transpose(1, 2)  # (B d) (h w) z (y x)
        x = F.linear(x.reshape(batch, d // 2, h // 2, w // 2, 8), self.weight.flatten(1), self.bias)
        return x.permute(0, 4, 1, 2, 3)


class Stage(nn.Module):
    """One block whose windows lie on the grid, one whose windows are shifted by half their size, then merging."""

    def __init__(self, dim: int, num_heads: int, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList([Block(dim, num_heads, shifted=False), Block(dim, num_heads, shifted=True)])
        self.downsample = Merging(dim)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d/2 h/2 w/2 2*C"]:
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                tokens = cast(Tensor, checkpoint(block, tokens, use_reentrant=False))
            else:
                tokens = block(tokens)
        return self.downsample(tokens)


class Block(nn.Module):
    """Window attention and MLP, each normalised first and added to its input."""

    def __init__(self, dim: int, num_heads: int, shifted: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, shifted)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(linear1=nn.Linear(dim, 4 * dim), act=nn.GELU(), linear2=nn.Linear(4 * dim, dim))
        )

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Merging(nn.Module):
    """2x2x2 tokens side by side, normalised, to twice the channels. The axes are even."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d/2 h/2 w/2 2*C"]:
        batch, d, h, w, dim = tokens.shape
        tokens = tokens.reshape(batch * d, h // 2, 2, w // 2, 2 * dim).transpose(2, 3)  # (B d) h w y (x C)
        tokens = tokens.reshape(batch * d // 2, 2, h * w // 4, 4 * dim).transpose(1, 2)  # (B d) (h w) z (y x C)
        tokens = tokens.reshape(batch, d // 2, h // 2, w // 2, 8 * dim)
        # The weights have the corners in another order. They are fewer than the tokens, so they are moved.
        scale, shift, reduction = (
            torch.cat([t[..., k * dim : (k + 1) * dim] for k in _CORNERS], -1)
            for t in (self.norm.weight, self.norm.bias, self.reduction.weight)
        )
        return F.linear(F.layer_norm(tokens, (8 * dim,), scale, shift, self.norm.eps), reduction)


class ResBlock(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut, which has weights where the channels change.

    Instance norm without weights after each convolution, leaky ReLU of slope 0.01.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv1 = _named(conv=Conv3d(dim_in, dim_out, 3, padding=1, bias=False))
        self.conv2 = _named(conv=Conv3d(dim_out, dim_out, 3, padding=1, bias=False))
        self.conv3 = _named(conv=Mixing(dim_in, dim_out, bias=False)) if dim_in != dim_out else None

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B E d h w"]:
        shortcut = x if self.conv3 is None else norm_leaky(self.conv3(x), 1)
        x = norm_leaky(self.conv1(x), 0.01)
        return F.leaky_relu_(norm_leaky(self.conv2(x), 1) + shortcut, 0.01)


class UpBlock(nn.Module):
    """Double the grid, lay the encoder's map beside it, convolve."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.transp_conv = _named(conv=Doubling(dim_in, dim_out))
        self.conv_block = ResBlock(2 * dim_out, dim_out)

    def forward(
        self, x: Float[Tensor, "B C d h w"], skip: Float[Tensor, "B E 2*d 2*h 2*w"]
    ) -> Float[Tensor, "B E 2*d 2*h 2*w"]:
        return self.conv_block(torch.cat([self.transp_conv(x), skip], 1))


def _named(**part: nn.Module) -> nn.Sequential:
    """One module under its name in the published weights."""
    return nn.Sequential(OrderedDict(part))
