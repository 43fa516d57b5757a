"""The optimiser: the step that a recipe promises, and the room that its state takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autosam3d.models.build import build_network
from autosam3d.models.spec import NetworkSpec, NnFormerSpec, NnUnetSpec, UnetrSpec
from autosam3d.recipes.recipe import Recipe
from autosam3d.recipes.settings import Optim
from autosam3d.training.optimizer import build_optimizer, parameter_groups, state_bytes
from mini_run import mini_recipe

SGD = Optim(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5, decay_all=True, schedule="poly",
            warmup_epochs=0)
SPECS: list[NetworkSpec] = [
    NnUnetSpec(num_outputs=3, patch_size=(16, 16, 16), channels=(4, 6, 8), strides=((1,) * 3, (2,) * 3, (2,) * 3)),
    UnetrSpec(num_outputs=3, patch_size=(16, 16, 32), feature_size=4, hidden_dim=8, mlp_dim=8, num_heads=2),
    NnFormerSpec(num_outputs=3, patch_size=(8, 16, 16), embed_dim=4, num_heads=(1, 2), attn_windows=(2, 2)),
]


def with_optim(optim: Optim) -> Recipe:
    return replace(mini_recipe(), optim=optim)


def test_two_steps_of_sgd_by_hand() -> None:
    layer = nn.Linear(2, 2, dtype=torch.float64)
    optimizer = build_optimizer(layer, with_optim(SGD))
    value, speed = layer.bias.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in (1, 2):
        optimizer.zero_grad()
        (layer.bias * torch.tensor([1.0, -2.0], dtype=torch.float64) * step).sum().backward()
        optimizer.step()
        gradient = torch.tensor([1.0, -2.0], dtype=torch.float64) * step + 0.5 * value
        speed = gradient if step == 1 else 0.9 * speed + gradient
        value = value - 0.1 * (gradient + 0.9 * speed)
        torch.testing.assert_close(layer.bias.detach(), value)


@pytest.mark.parametrize("optim", [
    SGD, replace(SGD, momentum=0.0, nesterov=False), Optim(), Optim(decay_all=True, weight_decay=0.1),
])
def test_state_takes_the_room_that_was_asked_for(optim: Optim) -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 2, 3))
    network[0].bias.requires_grad_(False)
    recipe = with_optim(optim)
    optimizer = build_optimizer(network, recipe)
    network(torch.randn(1, 1, 6, 6, 6)).square().sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for name, t in state.items() if t is not None and name != "step"]
    assert sum(t.nbytes for t in kept) == state_bytes(network, recipe)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.network)
def test_the_last_layer_of_each_baseline_is_found(spec: NetworkSpec) -> None:
    network = build_network(spec)
    groups = parameter_groups(network, with_optim(Optim(head_lr=10.0)))
    head = [p for group in groups if group["scale"] == 10 for p in group["params"]]
    assert len(head) == 2 and all(spec.num_outputs in p.shape for p in head)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.network)
def test_decay_spares_norms_biases_and_tables_unless_told(spec: NetworkSpec) -> None:
    network = build_network(spec)
    names = {id(p): name for name, p in network.named_parameters()}
    spared = {names[id(p)] for group in parameter_groups(network, with_optim(Optim())) if group["weight_decay"] == 0
              for p in group["params"]}
    tables = ("offset_bias", "position_embeddings")
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert spared == {name for name, p in trained.items() if p.ndim <= 1 or name.endswith(tables)}
    [everything] = parameter_groups(network, with_optim(Optim(decay_all=True)))
    assert everything["weight_decay"] == 1e-5 and len(everything["params"]) == len(trained)
