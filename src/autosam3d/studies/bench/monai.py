"""MONAI's way through a scan, for comparison: its sliding window over the network in eager PyTorch.

With its own SwinUNETR, with the same weights, where the model is one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.geometry.patches import Tiling
from autosam3d.geometry.preprocess import plan_grid, prepare_ct
from autosam3d.geometry.restore import SlabRestorer
from autosam3d.inference.pipeline import Model
from autosam3d.studies.bench.meter import Meter
from autosam3d.volume import Volume

BASELINE, CROPPED = "monai", "monai_cropped"
BASELINES = (BASELINE, CROPPED)


def monai_predict(loaded: Any) -> Callable[[Any], Any]:
    """Windows [B, 1, D, H, W] to probabilities, tensors both, as MONAI's users have it."""
    import torch

    network = _monai_network(loaded)

    def predict(window: torch.Tensor) -> torch.Tensor:
        return torch.softmax(network(window), dim=1)

    return predict


def monai_starts(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[Size]:
    """Where MONAI's windows start: a whole step apart, the last one flush with the border; as many as ours.

    *Source*: ``dense_patch_slices`` of MONAI 1.6.1, by what it gives.
    """
    axes = []
    for n, p in zip(shape, patch_size, strict=True):
        step = max(1, int(p * (1 - overlap)))
        axes.append([min(i * step, n - p) for i in range(math.ceil((n - p) / step) + 1)])
    return list(itertools.product(*axes))  # type: ignore[arg-type]


def monai_way(volume: Volume, model: Model, predict: Callable[..., Any], tiling: Tiling, meter: Meter, crop: bool
               ) -> tuple[np.ndarray, int]:
    """The same preparation, then MONAI's windows and sums for all classes at once, then the same way back.

    Its "model" holds the sums too: MONAI does both in one call.
    """
    import torch
    from monai.inferers.utils import sliding_window_inference

    recipe = model.recipe
    spec = recipe.preprocess if crop else replace(recipe.preprocess, crop_to_body=False)
    with meter.stage("resample"):
        undo = plan_grid(volume, spec)
        prepared = prepare_ct(volume, spec, undo).voxels
    calls = 0

    def counted(window: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return predict(window)

    with meter.stage("model"), torch.no_grad():
        probs = sliding_window_inference(
            torch.from_numpy(prepared)[None, None], recipe.model.patch_size, 1, counted, overlap=tiling.overlap,
            mode=tiling.importance, sigma_scale=0.125, padding_mode="constant", cval=recipe.preprocess.air)
    assert isinstance(probs, torch.Tensor)
    restorer = SlabRestorer(undo, recipe.model.num_outputs)
    with meter.stage("restore"):
        restorer.add(probs[0].numpy())
        labels = restorer.finish()
    return labels, calls


def _monai_network(loaded: Any) -> Any:
    """MONAI's own network with the same weights where it has one, else ours."""
    spec = loaded.recipe.model
    if spec.network != "swin_unetr":
        return loaded.network
    from monai.networks.nets.swin_unetr import SwinUNETR

    network = SwinUNETR(in_channels=1, out_channels=spec.num_outputs, feature_size=spec.feature_size, use_v2=False)
    network.load_state_dict(loaded.network.state_dict() | {
        name: buffer for name, buffer in network.state_dict().items() if name.endswith("relative_position_index")})
    return network.eval()
