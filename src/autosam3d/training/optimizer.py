"""The optimiser that a recipe names, and what of a network it treats how."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autosam3d.recipes.recipe import Recipe

_HEADS = ("out.", "decoder.out.", "output_block.")
"""Names of the last layer, the one that makes logits, of each network."""
_TABLES = ("pos_embed", "depth_embed", "rel_pos_d", "rel_pos_h", "rel_pos_w", "position_embeddings", "offset_bias")
"""Ends of the names of position tables."""


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over what of `network` is trained."""
    optim = recipe.optim
    groups = parameter_groups(network, recipe)
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, optim.beta2), fused=True)


def state_bytes(network: nn.Module, recipe: Recipe) -> int:
    """What the optimiser will keep: two moments of AdamW, one of SGD, none without momentum."""
    copies = 2 if recipe.optim.optimizer == "adamw" else int(recipe.optim.momentum > 0)
    return copies * sum(p.nbytes for p in network.parameters() if p.requires_grad)


def parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only, or on all with ``optim.decay_all``; the last layer by itself.

    Each group's ``scale`` times the schedule's rate is its rate.
    """
    optim = recipe.optim
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim <= 1 or name.endswith(_TABLES)
        decay = optim.weight_decay if optim.decay_all or not bare else 0.0
        scale = optim.head_lr if name.startswith(_HEADS) else 1.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "scale": scale} for (scale, decay), group in groups.items()]
