"""How much a student hears of its teacher: the gradients of the two terms of its loss, and what the teacher knows.

    OMP_NUM_THREADS=2 python benchmarks/kd_terms.py NAME RUN TEACHER DATASET CACHE

RUN is a distilled student. Over crops as its training sees them: the norm of the gradient of the label term
(Dice + CE) and of the teacher's term (MSE, mean over all values), and the cosine between the two. Beside it the
teacher's own Dice on the training cases, from its kept probabilities: no student can learn more from it than it knows.
Writes results/NAME.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.data.cache import cache_cases, labels_of
from autosam3d.data.crops import CropDataset
from autosam3d.data.folder import open_dataset
from autosam3d.evaluation.metrics import dice_per_label
from autosam3d.training.losses import dice_ce_loss, teacher_mse
from autosam3d.training.teacher import cache_probabilities, load_teacher
from measured import write_result

CROPS = 48
SEED = 0


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    tuned = [p for p in network.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuned, retain_graph=True)])


def main(name: str, run: str, teacher_path: str, data: str, cache: str) -> None:
    model = load_model(run)
    recipe, network = model.recipe, model.network.train()
    teacher = load_teacher(teacher_path, recipe, sam=None, device="cpu")
    train_cases = open_dataset(Path(data), recipe).train
    cases = cache_probabilities(cache_cases(train_cases, recipe, Path(cache)), teacher, recipe, Path(cache))
    dataset, batch_dice = CropDataset(cases, recipe), recipe.train.batch_dice
    norms = []
    for position in range(CROPS):
        crops = [dataset[(1000, 2 * position + i, (2 * position + i) % len(dataset))] for i in range(2)]
        voxels, labels, probs = (torch.stack([crop[name] for crop in crops]) for name in ("voxels", "labels", "probs"))
        logits = network(voxels)
        own = gradient(dice_ce_loss(logits, labels, batch_dice=batch_dice).total, network)
        told = gradient(teacher_mse(logits, probs), network)
        norms.append([float(own.norm()), float(told.norm()), float(own @ told / (own.norm() * told.norm()))])
    labels, mse, cosine = np.median(norms, axis=0)
    dice = np.array([
        dice_per_label(labels_of(np.asarray(case.probs)), np.asarray(case.labels), recipe.labels.num_outputs)
        for case in cases if case.probs is not None])
    write_result(name, {
        "command": f"python benchmarks/kd_terms.py {name} RUN TEACHER DATASET CACHE",
        "run": {"recipe": recipe.name, "val_dice": model.metrics.get("val_dice"), "lambda": recipe.distill and
                recipe.distill.label_weight},
        "batches_of_two_crops": CROPS,
        "median_gradient_norm": {"labels": float(labels), "teacher_mse": float(mse), "ratio": float(labels / mse)},
        "median_cosine": float(cosine),
        "teacher_dice_on_training_cases": {"mean": float(np.nanmean(dice)), **{
            organ: float(np.nanmean(dice[:, i])) for i, organ in enumerate(recipe.labels.organs)}},
    }, SEED)


if __name__ == "__main__":
    main(*sys.argv[1:])
