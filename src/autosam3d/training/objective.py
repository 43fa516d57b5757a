"""What a step minimises: the labels' term, the teacher's, and how much each is heard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autosam3d.io.files import write_text_atomic
from autosam3d.recipes.settings import Distillation
from autosam3d.training.losses import (
    deep_dice_ce_loss,
    dice_ce_loss,
    teacher_dice_ce,
    teacher_kl,
    teacher_mse,
)
from autosam3d.training.run import Run


class Objective(NamedTuple):
    """The loss of a step."""

    total: Tensor
    labels: Tensor | None
    """The labels' term, before it is weighed; None where it weighs nothing and was not asked for."""
    teacher: Tensor | None
    """The teacher's term, before it is weighed."""
    values: Mapping[str, Tensor]
    """``loss`` and its parts, for the log."""


def step_objective(
    run: Run, outputs: Tensor | list[Tensor], voxels: Tensor, labels: Tensor, probs: Tensor | None,
    groups: Tensor | None, *, weigh: bool = False,
) -> Objective:
    """What is minimised: ``lambda * (Dice + CE) + (1 - lambda) * T``.

    Of several `outputs`, those of deep supervision, each learns from the labels, and the finest from the teacher.

    Args:
        outputs: B K D H W, or such of several resolutions, finest first.
        voxels: B 1 D H W, shown to a teacher that is asked live.
        labels: B D H W.
        probs: B K D H W, the teacher's, where they come from the cache.
        groups: bool B V K, where not every organ was looked for in every case.
        weigh: make the labels' term even where it does not count, to measure it.

    *Source*: paper, section 3.6, equation 2, where T is the mean squared difference of probabilities.
    """
    settings, distill = run.recipe.train, run.recipe.distill
    weight = distill.label_weight if distill else 1.0
    values: dict[str, Tensor] = {}
    from_labels = from_teacher = total = None
    if weight > 0 or weigh:
        how = {"dice_weight": settings.dice_weight, "ce_weight": settings.ce_weight, "batch_dice": settings.batch_dice}
        deep = isinstance(outputs, list)
        parts = (deep_dice_ce_loss(outputs, labels, groups, **how) if deep
                 else dice_ce_loss(outputs, labels, groups, **how))
        from_labels = parts.total
        if weight > 0:
            values |= {"dice_loss": parts.dice, "ce_loss": parts.cross_entropy}
            total = from_labels if weight == 1 else weight * from_labels
    if distill and weight < 1:
        assert run.teacher is not None
        if probs is None:
            with run.fabric.autocast():
                probs = run.teacher.probabilities(voxels)
        finest = outputs[0] if isinstance(outputs, list) else outputs
        from_teacher = teacher_term(finest, probs, distill, settings.batch_dice)
        values["teacher_loss"] = from_teacher
        total = (1 - weight) * from_teacher if total is None else total + (1 - weight) * from_teacher
    assert total is not None
    return Objective(total, from_labels, from_teacher, {"loss": total, **values})


def teacher_term(logits: Tensor, probs: Tensor, distill: Distillation, batch_dice: bool) -> Tensor:
    """The teacher's term as ``distill.loss`` says.

    Args:
        logits: B K D H W of the student.
        probs: B K D H W of the teacher.
        batch_dice: of "dice_ce", as the labels' Dice has it.
    """
    if distill.loss == "mse":
        return teacher_mse(logits, probs, distill.mse_reduction)
    if distill.loss == "kl":
        return teacher_kl(logits, probs, distill.temperature)
    return teacher_dice_ce(logits, probs, batch_dice)


def keep_weights(run: Run, objective: Objective) -> None:
    """Note in `run.position` how long the gradients of both terms are, before they are weighed.

    Of several processes each sees its own crops, and the first one's count.
    """
    assert objective.labels is not None and objective.teacher is not None
    norms = {"labels": _gradient_norm(run, objective.labels), "teacher": _gradient_norm(run, objective.teacher)}
    run.position.gradients["start" if run.position.global_step == 0 else "end"] = norms


def write_teaching(run: Run) -> None:
    """``teaching.json`` of a student's run: by whom and how it was taught, and what was heard of it."""
    distill, gradients = run.recipe.distill, run.position.gradients
    if distill is None or run.teacher is None or not gradients:
        return
    heard = {when: norms | {"teacher_per_label": norms["teacher"] / norms["labels"] if norms["labels"] else None}
             for when, norms in gradients.items()}
    write_text_atomic(run.folder / "teaching.json", json.dumps({
        "teacher": run.teacher.origin, "loss": distill.loss, "lambda": distill.label_weight,
        "temperature": distill.temperature, "gradient_norm": heard}, indent=1) + "\n")


def _gradient_norm(run: Run, term: Tensor) -> float:
    tuned = [parameter for parameter in run.network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(term, tuned, retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt())
