"""How much memory a checkpoint's network takes, from the header of its weight file: nothing is loaded, nor is torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autosam3d.models.spec import VITS, AutoSamSpec
from autosam3d.recipes.recipe import Recipe

_FLOAT_BYTES = 4


def network_bytes(json_path: Path, meta: Mapping[str, Any], recipe: Recipe) -> int:
    """Bytes of the weights of a checkpoint's network as it computes with them: float32, SAM's frozen ones included.

    Where the weight file cannot be asked, its size as the JSON tells it.

    Args:
        json_path: of the checkpoint.
        meta: its JSON.
        recipe: in it.
    """
    weights = meta["weights"]
    stated = weights.get("bytes")
    own = stated if isinstance(stated, int) else 0
    try:
        with safe_open(json_path.parent / str(weights.get("file")), framework="np") as file:
            names = list(file.keys())
            if meta.get("kind") == "training":  # beside the network lie its average and what the optimiser keeps
                names = [name for name in names if name.startswith("model.")]
            own = _FLOAT_BYTES * sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError, ValueError):
        pass  # loading will say what is wrong
    return own + (_frozen_bytes(recipe) if meta.get("sam") and meta.get("contains") != "all" else 0)


def _frozen_bytes(recipe: Recipe) -> int:
    """Of SAM's blocks, which are all but some hundredths of its encoder.

    *Source*: a ViT block has 4 d^2 weights in its attention and 2 r d^2 in its MLP (Dosovitskiy et al. 2021).
    """
    if not isinstance(recipe.model, AutoSamSpec):
        return 0
    vit = VITS[recipe.model.vit]
    return int(_FLOAT_BYTES * vit.num_blocks * vit.embed_dim**2 * (4 + 2 * vit.mlp_ratio))
