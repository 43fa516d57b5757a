"""The shapes that signatures promise, checked while the network runs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from autosam3d.models.autosam import adapter, attention, encoder, mask_decoder, prompt_generator
from autosam3d.models.autosam import network as autosam
from autosam3d.models.spec import AutoSamSpec

jaxtyping = pytest.importorskip("jaxtyping")
beartype = pytest.importorskip("beartype")


def check_module(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every annotated `forward` of a module checked; the annotations' names exist for type checkers only."""
    monkeypatch.setattr(module, "Float", jaxtyping.Float, raising=False)
    for item in list(vars(module).values()):
        if isinstance(item, type) and item.__module__ == module.__name__ and "forward" in vars(item):
            checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)(vars(item)["forward"])
            monkeypatch.setattr(item, "forward", checked)


def test_forward_shapes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (adapter, attention, autosam, encoder, mask_decoder, prompt_generator):
        check_module(module, monkeypatch)
    settings: dict[str, Any] = {
        "vit": "vit_tiny", "patch_size": (16, 16, 32), "adapter_dim": 6, "neck_dim": 8, "prompt_dim": 2, "head_dim": 4,
    }
    model = autosam.AutoSam(AutoSamSpec(num_outputs=3, **settings))
    assert model(torch.rand(2, 1, 16, 16, 32)).shape == (2, 3, 16, 16, 32)
    with pytest.raises(jaxtyping.TypeCheckError):
        model.necks["3"](torch.rand(2, 4, 4, 8))
