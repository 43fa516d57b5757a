"""From a spec to its network."""

from __future__ import annotations

from typing import cast

from torch import nn

from autosam3d.errors import MissingExtraError
from autosam3d.models.side_outputs import DeeplySupervised
from autosam3d.models.spec import DEEPLY_SUPERVISED, AutoSamSpec, NetworkSpec, NnFormerSpec, ResUnetSpec, SwinUnetrSpec


def build_network(spec: NetworkSpec, side_outputs: bool = False) -> nn.Module:
    """The network of `spec`, with random weights: [B, 1, D, H, W] to logits [B, K, D, H, W].

    It keeps the spec as its attribute `spec`. On the meta device nothing is allocated.

    Args:
        side_outputs: with the outputs of deep supervision, for training; of `spec.DEEPLY_SUPERVISED` only.

    Raises:
        MissingExtraError: the network is MONAI's, which is not installed.
    """
    network = _build(spec)
    if side_outputs:
        if spec.network not in DEEPLY_SUPERVISED:
            raise ValueError(f"side_outputs: expected one of {DEEPLY_SUPERVISED}, got {spec.network}")
        cast(DeeplySupervised, network).add_side_outputs()
    return network


def _build(spec: NetworkSpec) -> nn.Module:
    if isinstance(spec, AutoSamSpec):
        from autosam3d.models.autosam.network import AutoSam

        return AutoSam(spec)
    if isinstance(spec, SwinUnetrSpec):
        from autosam3d.models.students.swin_unetr import SwinUnetr

        return SwinUnetr(spec)
    if isinstance(spec, ResUnetSpec):
        from autosam3d.models.students.res_unet import ResUnet

        return ResUnet(spec)
    if isinstance(spec, NnFormerSpec):
        from autosam3d.models.baselines.nnformer import NnFormer

        return NnFormer(spec)
    try:
        from autosam3d.models.baselines.monai import build_baseline
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("monai", "einops"):
            raise
        raise MissingExtraError("MISSING_EXTRA", spec.network, f"expected the package {package}, got none",
                                'pip install "autosam3d[baselines]"') from None
    return build_baseline(spec)
