"""Dice and cross-entropy, always in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

# MONAI's smoothing terms: an organ that a crop lacks, and that is not predicted, costs nothing.
_SMOOTH = 1e-5
# Answers that are kept in steps of 1/255 hold zeros, whose logarithm there is none of.
_LEAST_PROBABILITY = 1e-4


class SegmentationLoss(NamedTuple):
    total: Tensor
    dice: Tensor
    cross_entropy: Tensor


def teacher_mse(logits: Tensor, probs: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared difference of a student's softmax output and its teacher's probabilities, temperature 1.

    Args:
        logits: B K D H W of the student, any float type; the loss is computed in float32.
        probs: B K D H W of the teacher, without gradient.
        reduction: "mean" over all values; "class_sum" adds the K classes up, background included, and takes the mean
            over the voxels: K times as much.

    *Source*: paper, section 3.6, L_MSE of equation 2.
    """
    loss = F.mse_loss(F.softmax(logits.float(), dim=1), probs.float())
    return loss * logits.shape[1] if reduction == "class_sum" else loss


def teacher_dice_ce(logits: Tensor, probs: Tensor, batch_dice: bool = False) -> Tensor:
    """``1 - Dice + CE`` against a teacher's probabilities: of the labels' own scale, from the first step on.

    The cross-entropy of soft targets has the gradient (student - teacher) a voxel, while that of squared differences of
    probabilities carries a factor p (1 - p), next to nothing for an organ that has not begun. The Dice has squares in
    its denominator, ``2 sum s q / (sum s^2 + sum q^2)``: it is largest where the student says what the teacher says,
    which the one of the labels, without squares, is not for soft targets.

    Args:
        logits: B K D H W of the student, any float type; the loss is computed in float32.
        probs: B K D H W of the teacher, without gradient.
        batch_dice: as in `dice_ce_loss`.

    *Source*: of the Dice, Milletari et al., V-Net, 3DV 2016, section 3. Of three forms tried, benchmarks/results/
    teaching.md.
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    probs = probs.float()
    cross_entropy = -(probs * log_probs).sum(1).mean()
    student = log_probs.exp()
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    overlap = (student * probs).sum(axes)
    total = student.square().sum(axes) + probs.square().sum(axes)
    if batch_dice:
        overlap, total = _over_ranks(torch.stack((overlap, total)))
    return 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean() + cross_entropy


def teacher_kl(logits: Tensor, probs: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(teacher || student)``, both softened by the temperature T: summed over classes, mean over voxels.

    Args:
        logits: B K D H W of the student, any float type; the loss is computed in float32.
        probs: B K D H W of the teacher at temperature 1, without gradient.

    *Source*: Hinton et al., Distilling the knowledge in a neural network, 2015, section 2: T^2 keeps the gradient's
    scale. The mean over voxels, not over crops: summed over a volume it drowns all else.
    """
    log_student = F.log_softmax(logits.float() / temperature, dim=1)
    # A softmax of log p / T is the softmax of the teacher's own logits / T; uint8 steps of 1/255 leave zeros.
    log_teacher = F.log_softmax(probs.float().clamp_min(_LEAST_PROBABILITY).log() / temperature, dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
    return temperature**2 * divergence


def dice_ce_loss(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    batch_dice: bool = False,
) -> SegmentationLoss:
    """``dice_weight * (1 - Dice) + ce_weight * CE`` over softmax outputs, background included.

    Args:
        logits: B K D H W, any float type; the loss is computed in float32.
        labels: B D H W, integers 0..K-1; with `groups` 0..V-1.
        groups: bool B V K, `LabelMap.groups` of each crop, where not every organ was looked for in each: the loss is
            that of the probabilities summed over what a value stands for, the mean over the values that a crop's map
            can hold. A crop in which nothing was looked for does not count.
        batch_dice: pool voxels over the batch, that of all ranks, before the ratio, steadier for small organs; False
            takes the ratio per crop (MONAI's DiceCELoss).

    *Source*: paper, section 3.6, equation 1; the public code's DiceCELoss(softmax, include_background). With `groups`,
    the marginal loss of Shi et al., Medical Image Analysis 70 (2021).
    """
    logits = logits.float()
    log_probs = F.log_softmax(logits, dim=1)
    if groups is not None:
        return _marginal_loss(log_probs, labels.long(), groups, dice_weight, ce_weight, batch_dice)
    cross_entropy = F.nll_loss(log_probs, labels.long())
    probs = log_probs.exp()
    truth = torch.zeros_like(probs).scatter_(1, labels.long().unsqueeze(1), 1.0)
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    overlap = (probs * truth).sum(axes)
    total = probs.sum(axes) + truth.sum(axes)
    if batch_dice:
        overlap, total = _over_ranks(torch.stack((overlap, total)))
    dice = 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean()
    return SegmentationLoss(dice_weight * dice + ce_weight * cross_entropy, dice.detach(), cross_entropy.detach())


def _marginal_loss(
    log_probs: Tensor, labels: Tensor, groups: Tensor, dice_weight: float, ce_weight: float, batch_dice: bool
) -> SegmentationLoss:
    possible = groups.any(2)  # B V
    labelled = possible[:, 1:].any(1)
    if not labelled.any():
        nothing = log_probs.sum() * 0
        dice = nothing
        if batch_dice and _num_ranks() > 1:  # the other ranks wait for this one's sums
            none = nothing.expand(possible.shape[1])
            dice = _dice_over_ranks(none, none, possible.any(0))
        return SegmentationLoss(nothing + dice_weight * dice, dice.detach(), nothing.detach())
    log_probs, labels, groups, possible = log_probs[labelled], labels[labelled], groups[labelled], possible[labelled]
    members = torch.stack([table[crop] for table, crop in zip(groups, labels, strict=True)]).movedim(-1, 1)
    cross_entropy = -torch.logsumexp(log_probs.masked_fill(~members, -torch.inf), dim=1).mean()
    probs = torch.einsum("bvk,bkzyx->bvzyx", groups.float(), log_probs.exp())
    truth = torch.zeros_like(probs).scatter_(1, labels.unsqueeze(1), 1.0)
    # Where a crop's map cannot hold a value both are 0 there, so a pool over the batch is one over those that can.
    overlap = (probs * truth).sum((2, 3, 4))
    total = probs.sum((2, 3, 4)) + truth.sum((2, 3, 4))
    if batch_dice:
        dice = _dice_over_ranks(overlap.sum(0), total.sum(0), possible.any(0))
    else:
        dice = 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH))[possible].mean()
    return SegmentationLoss(dice_weight * dice + ce_weight * cross_entropy, dice.detach(), cross_entropy.detach())


def _dice_over_ranks(overlap: Tensor, total: Tensor, possible: Tensor) -> Tensor:
    """1 - Dice of the sums of all ranks, (V) each, the mean over the values that some rank's maps can hold."""
    overlap, total, holders = _over_ranks(torch.stack((overlap, total, possible.to(overlap.dtype))))
    held = holders > 0.5
    if not held.any():
        return overlap.sum() * 0
    return 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH))[held].mean()


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_ranks(sums: Tensor) -> Tensor:
    """`sums` added up over all ranks of the run.

    Each rank has the loss of the whole batch then, and its gradient along its own sums; DDP takes the mean of the
    ranks' gradients, where their sum is meant, so each counts as often as there are ranks.
    """
    num_ranks = _num_ranks()
    if num_ranks == 1:
        return sums
    whole = sums.detach().clone()
    dist.all_reduce(whole)
    return whole + num_ranks * (sums - sums.detach())


def deep_dice_ce_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    batch_dice: bool = False,
) -> SegmentationLoss:
    """`dice_ce_loss` of outputs at several resolutions, each against the labels at its own; of the finest its parts.

    Args:
        outputs: logits B K d h w, finest first, the first at the labels' resolution.
        labels: B D H W. Those of a coarser output are the nearest voxels.
        groups: as in `dice_ce_loss`.

    *Source*: nnU-Net: weights 1, 1/2, 1/4, ..., divided by their sum.
    """
    weights = [0.5**level for level in range(len(outputs))]
    total, finest = None, None
    for weight, logits in zip(weights, outputs, strict=True):
        reduced = labels
        if logits.shape[2:] != labels.shape[1:]:
            reduced = F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
        loss = dice_ce_loss(logits, reduced, groups, dice_weight=dice_weight, ce_weight=ce_weight,
                            batch_dice=batch_dice)
        finest = finest or loss
        part = loss.total * (weight / sum(weights))
        total = part if total is None else total + part
    assert total is not None and finest is not None
    return finest._replace(total=total)


def mask_loss(logits: Tensor, masks: Tensor) -> SegmentationLoss:
    """Dice + binary cross-entropy of masks that were asked for one by one; Dice of squared probabilities, per mask.

    Args:
        logits: B H W, any float type; the loss is computed in float32.
        masks: B H W, 0 or 1.

    *Source*: MedSAM's training, MONAI's DiceLoss(sigmoid, squared_pred) and BCEWithLogitsLoss, both as means.
    """
    logits, masks = logits.float(), masks.float()
    probs = logits.sigmoid()
    overlap = (probs * masks).sum((1, 2))
    total = (probs**2).sum((1, 2)) + (masks**2).sum((1, 2))
    dice = (1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks)
    return SegmentationLoss(dice + cross_entropy, dice.detach(), cross_entropy.detach())
