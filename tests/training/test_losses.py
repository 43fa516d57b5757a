"""The loss: MONAI's where it claims to be, closed forms where MONAI has none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor

from autosam3d.training.losses import deep_dice_ce_loss, dice_ce_loss


def random_case(outputs: int = 4, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    logits = torch.randn(batch, outputs, 5, 6, 7, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, outputs, (batch, 5, 6, 7), generator=generator)
    labels[0] = 0  # a crop without organs
    return logits, labels


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(("dice_weight", "ce_weight"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_value_and_gradient_are_monais(batch_dice: bool, dice_weight: float, ce_weight: float) -> None:
    logits, labels = random_case()
    ours, theirs = (logits.float().requires_grad_() for _ in range(2))
    loss = dice_ce_loss(ours, labels, dice_weight=dice_weight, ce_weight=ce_weight, batch_dice=batch_dice)
    monai = DiceCELoss(softmax=True, to_onehot_y=True, include_background=True, batch=batch_dice,
                       lambda_dice=dice_weight, lambda_ce=ce_weight)(theirs, labels.unsqueeze(1))
    torch.testing.assert_close(loss.total, monai)
    loss.total.backward()
    monai.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_total_is_the_weighted_sum_of_its_parts_which_carry_no_gradient() -> None:
    logits, labels = random_case()
    loss = dice_ce_loss(logits.requires_grad_(), labels, dice_weight=0.25, ce_weight=3.0)
    assert float(loss.total.detach()) == pytest.approx(0.25 * float(loss.dice) + 3 * float(loss.cross_entropy))
    assert loss.total.requires_grad and not loss.dice.requires_grad and not loss.cross_entropy.requires_grad


def test_batch_dice_in_closed_form() -> None:
    # Probability 3/4 for class 1 everywhere, of 2 x 8 voxels; class 1 is true in 8 of the first crop, 0 of the second.
    logits = torch.zeros(2, 2, 2, 2, 2)
    logits[:, 1] = math.log(3)
    labels = torch.stack([torch.ones(2, 2, 2), torch.zeros(2, 2, 2)]).to(torch.uint8)
    pooled = dice_ce_loss(logits, labels, batch_dice=True).dice
    # class 1: 2 * 6 / (12 + 8), class 0: 2 * 2 / (4 + 8)
    assert float(pooled) == pytest.approx(1 - (12 / 20 + 4 / 12) / 2, abs=1e-5)
    apart = dice_ce_loss(logits, labels, batch_dice=False).dice
    # crop 1: class 1 is 2 * 6 / (6 + 8), class 0 is 0; crop 2: class 1 is 0, class 0 is 2 * 2 / (2 + 8)
    assert float(apart) == pytest.approx(1 - (12 / 14 + 4 / 10) / 4, abs=1e-5)


def test_batch_dice_is_dice_per_crop_for_one_crop() -> None:
    logits, labels = random_case(batch=1)
    assert dice_ce_loss(logits, labels, batch_dice=True).total == dice_ce_loss(logits, labels).total


@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_perfect_prediction_costs_nothing_even_where_organs_are_absent(batch_dice: bool) -> None:
    _, labels = random_case()
    logits = 50 * F.one_hot(labels, 6).movedim(-1, 1).float()  # classes 4 and 5 never occur
    loss = dice_ce_loss(logits, labels, batch_dice=batch_dice)
    assert 0 <= float(loss.total) < 1e-4


def test_a_wrong_prediction_costs_all_of_dice() -> None:
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    logits = torch.zeros(1, 2, 4, 4, 4)
    logits[:, 1] = 40
    assert float(dice_ce_loss(logits, labels).dice) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, labels = random_case()
    assert dice_ce_loss(logits, labels.to(dtype)).total == dice_ce_loss(logits, labels).total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_lifted_to_float32(dtype: torch.dtype) -> None:
    logits, labels = random_case()
    half = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dice_ce_loss(half.requires_grad_(), labels)
    assert loss.total.dtype == loss.dice.dtype == loss.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(loss.total, dice_ce_loss(half.detach().float(), labels).total, rtol=0, atol=0)
    loss.total.backward()
    assert half.grad is not None and half.grad.dtype == dtype and bool(half.grad.abs().sum() > 0)


def test_huge_logits_stay_finite() -> None:
    logits, labels = random_case()
    wild = (logits * 1e4).float().requires_grad_()
    loss = dice_ce_loss(wild, labels).total
    loss.backward()
    assert wild.grad is not None and bool(torch.isfinite(loss)) and bool(torch.isfinite(wild.grad).all())


# ---- deep supervision ----


def test_one_output_is_the_plain_loss() -> None:
    logits, labels = random_case()
    deep, plain = deep_dice_ce_loss([logits], labels, batch_dice=True), dice_ce_loss(logits, labels, batch_dice=True)
    assert deep == plain


def test_outputs_weigh_1_a_half_and_a_quarter_of_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 12, 4), (4, 6, 4), (2, 3, 2)]
    outputs = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    blocks = torch.randint(0, 3, (2, 2, 3, 2), generator=generator)
    reduced = [blocks.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(2, 3),
               blocks.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3), blocks]
    apart = [dice_ce_loss(o, y, ce_weight=2.0) for o, y in zip(outputs, reduced, strict=True)]
    whole = deep_dice_ce_loss(outputs, reduced[0].to(torch.uint8), ce_weight=2.0)
    expected = (4 * apart[0].total + 2 * apart[1].total + apart[2].total) / 7
    torch.testing.assert_close(whole.total, expected)
    assert (whole.dice, whole.cross_entropy) == (apart[0].dice, apart[0].cross_entropy)


def test_every_output_learns() -> None:
    outputs = [torch.zeros(1, 3, n, n, n, requires_grad=True) for n in (8, 4)]
    deep_dice_ce_loss(outputs, torch.randint(0, 3, (1, 8, 8, 8))).total.backward()
    assert all(bool(o.grad.abs().min() > 0) for o in outputs if o.grad is not None)
    assert all(o.grad is not None for o in outputs)
