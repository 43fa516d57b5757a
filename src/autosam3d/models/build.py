"""From a spec to its network."""

from __future__ import annotations

from torch import nn

from autosam3d.models.spec import AutoSamSpec, NetworkSpec, SwinUnetrSpec


def build_network(spec: NetworkSpec) -> nn.Module:
    """The network of `spec`, with random weights: [B, 1, D, H, W] to logits [B, K, D, H, W].

    It keeps the spec as its attribute `spec`. On the meta device nothing is allocated.
    """
    if isinstance(spec, AutoSamSpec):
        from autosam3d.models.autosam import AutoSam

        return AutoSam(spec)
    if isinstance(spec, SwinUnetrSpec):
        from autosam3d.models.swin_unetr import SwinUnetr

        return SwinUnetr(spec)
    from autosam3d.models.res_unet import ResUnet

    return ResUnet(spec)
