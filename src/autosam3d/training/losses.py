"""Dice and cross-entropy, always in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# MONAI's smoothing terms: an organ that a crop lacks, and that is not predicted, costs nothing.
_SMOOTH = 1e-5


class SegmentationLoss(NamedTuple):
    total: Tensor
    dice: Tensor
    cross_entropy: Tensor


def teacher_mse(logits: Tensor, probs: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared difference of a student's softmax output and its teacher's probabilities, temperature 1.

    Args:
        logits: B K D H W of the student, any float type; the loss is computed in float32.
        probs: B K D H W of the teacher, without gradient.
        reduction: "mean" over all values; "class_sum" adds the classes up and takes the mean over the voxels.

    *Source*: paper, section 3.5, equation of L_KD.
    """
    loss = F.mse_loss(F.softmax(logits.float(), dim=1), probs.float())
    return loss * logits.shape[1] if reduction == "class_sum" else loss


def dice_ce_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    batch_dice: bool = False,
) -> SegmentationLoss:
    """``dice_weight * (1 - Dice) + ce_weight * CE`` over softmax outputs, background included.

    Args:
        logits: B K D H W, any float type; the loss is computed in float32.
        labels: B D H W, integers 0..K-1.
        batch_dice: pool voxels over the batch before the ratio, steadier for small organs; False takes the ratio
            per crop (MONAI's DiceCELoss).

    *Source*: paper, section 3.5; the public code's DiceCELoss(softmax, include_background).
    """
    logits = logits.float()
    log_probs = F.log_softmax(logits, dim=1)
    cross_entropy = F.nll_loss(log_probs, labels.long())
    probs = log_probs.exp()
    truth = torch.zeros_like(probs).scatter_(1, labels.long().unsqueeze(1), 1.0)
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    overlap = (probs * truth).sum(axes)
    total = probs.sum(axes) + truth.sum(axes)
    dice = 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean()
    return SegmentationLoss(dice_weight * dice + ce_weight * cross_entropy, dice.detach(), cross_entropy.detach())


def deep_dice_ce_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    batch_dice: bool = False,
) -> SegmentationLoss:
    """`dice_ce_loss` of outputs at several resolutions, each against the labels at its own; of the finest its parts.

    Args:
        outputs: logits B K d h w, finest first, the first at the labels' resolution.
        labels: B D H W. Those of a coarser output are the nearest voxels.

    *Source*: nnU-Net: weights 1, 1/2, 1/4, ..., divided by their sum.
    """
    weights = [0.5**level for level in range(len(outputs))]
    total, finest = None, None
    for weight, logits in zip(weights, outputs, strict=True):
        reduced = labels
        if logits.shape[2:] != labels.shape[1:]:
            reduced = F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
        loss = dice_ce_loss(logits, reduced, dice_weight=dice_weight, ce_weight=ce_weight, batch_dice=batch_dice)
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
