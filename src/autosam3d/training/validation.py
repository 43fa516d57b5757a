"""Dice on the validation cases while a network is trained, on all its ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autosam3d.data.cache import CachedCase
from autosam3d.evaluation.metrics import dice_per_label
from autosam3d.geometry.patches import Tiling
from autosam3d.inference.pipeline import label_prepared
from autosam3d.inference.torch_runtime import TorchPredictor
from autosam3d.training.run import Run


def validate(run: Run, cases: list[CachedCase]) -> np.ndarray:
    """Dice per organ, the mean over the cases that have it, on the preprocessed grid; NaN for an absent organ.

    Raises:
        Interrupted: on all ranks, after the same window.
    """
    recipe, fabric = run.recipe, run.fabric
    was_training = run.network.training
    run.network.eval()
    predictor = TorchPredictor(run.network, recipe.model.patch_size, fabric.device, recipe.train.precision)
    tiling = Tiling(overlap=recipe.train.val_overlap, importance=recipe.inference.importance)
    table = np.full((len(cases), len(recipe.labels.organs)), np.nan)

    def watch(done: int, total: int) -> None:
        run.demand_no_stop(busy=True)

    try:
        for index in range(fabric.global_rank, len(cases), fabric.world_size):
            case = cases[index]
            predicted = label_prepared(np.asarray(case.voxels, np.float32), predictor, tiling,
                                       air=recipe.preprocess.air, progress=watch)
            # Super-classes stand behind the organs. An organ that was not looked for is absent from the map: no score.
            dice = dice_per_label(predicted, np.asarray(case.labels), recipe.labels.num_values)
            table[index] = dice[: len(recipe.labels.organs)]
            run.observer.on_validation(min(index + fabric.world_size, len(cases)), len(cases))
        while run.demand_no_stop():
            pass  # ranks with fewer or smaller cases go on meeting the others
    finally:
        run.network.train(was_training)
    if fabric.world_size > 1:
        # Each row was filled by one rank; the others hold NaN there.
        everyone = fabric.all_gather(fabric.to_device(torch.from_numpy(table)))
        assert isinstance(everyone, Tensor)
        table = np.nan_to_num(everyone.cpu().numpy(), nan=-1.0).max(axis=0)
        table[table < 0] = np.nan
    present = np.isfinite(table)
    return np.where(present.any(0), np.nansum(table, 0) / np.maximum(present.sum(0), 1), np.nan)
