"""Baselines from MONAI: nnU-Net's network and UNETR, under our interface. Needs the extra `baselines`.

*Source*: nnU-Net (arXiv:1904.08128) as MONAI's ``DynUNet``, UNETR (arXiv:2103.10504) as MONAI's ``UNETR``, which
hold the paper's 31.18 M and 93.02 M parameters; parity with MONAI 1.6.1 is what the tests hold them to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import einops  # noqa: F401 - MONAI's ViT asks for it, but only once it is being built
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.unetr import UNETR
from torch import Tensor, nn

from autosam3d.models.conv import guard_convolutions
from autosam3d.models.spec import NnUnetSpec, UnetrSpec

if TYPE_CHECKING:
    from jaxtyping import Float


def build_baseline(spec: NnUnetSpec | UnetrSpec) -> nn.Module:
    return NnUnet(spec) if isinstance(spec, NnUnetSpec) else Unetr(spec)


class NnUnet(nn.Module):
    """A U-Net of plain 3x3x3 convolutions, instance norm and leaky ReLU; any D, H, W that the strides divide.

    MONAI's parts under MONAI's names, walked through here: MONAI's own walk registers each part twice, and enlarges
    the outputs of deep supervision, which nnU-Net compares with reduced labels instead.
    """

    def __init__(self, spec: NnUnetSpec) -> None:
        super().__init__()
        self.spec = spec
        net = DynUNet(
            spatial_dims=3, in_channels=1, out_channels=spec.num_outputs, kernel_size=[3] * len(spec.channels),
            strides=spec.strides, upsample_kernel_size=spec.strides[1:], filters=spec.channels,
        )
        self.input_block, self.downsamples, self.bottleneck = net.input_block, net.downsamples, net.bottleneck
        self.upsamples, self.output_block = net.upsamples, net.output_block
        self.side_outputs = nn.ModuleList()
        guard_convolutions(self)

    def add_side_outputs(self) -> None:
        """One output for each level of the decoder but the finest, which has its own, and the coarsest, which nnU-Net
        gives no weight."""
        for dim in self.spec.channels[1:-2]:
            head = UnetOutBlock(3, dim, self.spec.num_outputs)
            head.apply(DynUNet.initialize_weights)
            self.side_outputs.append(head)

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"] | list[Tensor]:
        """Logits of background and organs; in training with side outputs a list, finest first.

        Raises:
            ValueError: the shape is not (B, 1, D, H, W) with multiples of `spec.multiple`.
        """
        of = self.spec.multiple
        if ct.dim() != 5 or ct.shape[1] != 1 or any(n < m or n % m for n, m in zip(ct.shape[2:], of, strict=True)):
            raise ValueError(f"expected (B, 1, D, H, W) with D, H, W multiples of {of}, got {tuple(ct.shape)}")
        skips = [self.input_block(ct)]
        for down in self.downsamples:
            skips.append(down(skips[-1]))
        levels = [self.bottleneck(skips[-1])]
        for up, skip in zip(self.upsamples, reversed(skips), strict=True):
            levels.append(up(levels[-1], skip))
        *coarser, finest = levels
        logits = self.output_block(finest)
        if not self.training or not self.side_outputs:
            return logits
        return [logits, *(head(level) for head, level in zip(self.side_outputs, reversed(coarser), strict=False))]


class Unetr(UNETR):
    """A ViT over tokens of 16 (or 8) voxels, whose blocks 4, 7, 10 and 12 feed a convolutional decoder.

    With tokens of 16 it is MONAI's network. Tokens of 8 lie on a grid twice as fine, so the deepest doubling, of
    block 10 and of the last one, is left out.
    """

    def __init__(self, spec: UnetrSpec) -> None:
        # With twice the size, tokens of 16 voxels make the grid that those of 8 make of the crop itself.
        size = [n * 16 // spec.token_size for n in spec.patch_size]
        super().__init__(
            in_channels=1, out_channels=spec.num_outputs, img_size=size, feature_size=spec.feature_size,
            hidden_size=spec.hidden_dim, mlp_dim=spec.mlp_dim, num_heads=spec.num_heads, proj_type="perceptron",
            norm_name="instance", conv_block=True, res_block=True,
        )
        self.spec = spec
        if spec.token_size == 8:
            self._read_small_tokens(spec)
        for name, parameter in self.named_parameters():
            if "norm_cross_attn" in name:  # MONAI's blocks hold it and never use it
                parameter.requires_grad_(False)
        guard_convolutions(self)

    def _read_small_tokens(self, spec: UnetrSpec) -> None:
        dim, features = spec.hidden_dim, spec.feature_size
        up = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        enlarging = {**up, "in_channels": dim, "stride": 1, "upsample_kernel_size": 2, "conv_block": True}
        self.vit.patch_embedding = PatchEmbeddingBlock(
            in_channels=1, img_size=spec.patch_size, patch_size=8, hidden_size=dim, num_heads=spec.num_heads,
            proj_type="perceptron",
        )
        self.encoder2 = UnetrPrUpBlock(out_channels=2 * features, num_layer=1, **enlarging)
        self.encoder3 = UnetrPrUpBlock(out_channels=4 * features, num_layer=0, **enlarging)
        self.encoder4 = UnetrBasicBlock(in_channels=dim, out_channels=8 * features, stride=1, **up)
        self.decoder5 = UnetrUpBlock(in_channels=dim, out_channels=8 * features, upsample_kernel_size=1, **up)

    def forward(self, x_in: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"]:
        """Logits of background and organs.

        Raises:
            ValueError: the shape is not (B, 1) and the spec's patch size.
        """
        if tuple(x_in.shape[1:]) != (1, *self.spec.patch_size):
            raise ValueError(f"expected (B, 1, *{self.spec.patch_size}), got {tuple(x_in.shape)}")
        return super().forward(x_in)
