"""The loss where not every organ was looked for: equal to the plain loss of a network with fewer, merged outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autosam3d.labels import LabelMap
from autosam3d.training.losses import deep_dice_ce_loss, dice_ce_loss

LABELS = LabelMap(organs=("liver", "right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),),
                  super_classes={"kidneys": ("right_kidney", "left_kidney")})
ALL, LIVER, LIVER_AND_KIDNEYS = (1, 2, 3), (1,), (1, 4)


def groups(*drawn: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.from_numpy(LABELS.groups(values)) for values in drawn])


def case(batch: int = 2, highest: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, 4, 5, 6, 7, generator=generator) * 2
    return logits, torch.randint(0, highest + 1, (batch, 5, 6, 7), generator=generator, dtype=torch.uint8)


def value_and_gradient(logits: Tensor, labels: Tensor, table: Tensor | None, batch_dice: bool) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    total = dice_ce_loss(logits, labels, table, batch_dice=batch_dice).total
    total.backward()
    assert logits.grad is not None
    return total.detach(), logits.grad


@pytest.mark.parametrize("batch_dice", [False, True])
def test_with_every_organ_drawn_it_is_the_plain_loss(batch_dice: bool) -> None:
    logits, labels = case()
    plain = value_and_gradient(logits, labels, None, batch_dice)
    for ours, theirs in zip(value_and_gradient(logits, labels, groups(ALL, ALL), batch_dice), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_an_unknown_organ_is_one_with_background(batch_dice: bool) -> None:
    logits, labels = case(highest=1)
    value, gradient = value_and_gradient(logits, labels, groups(LIVER, LIVER), batch_dice)
    merged = torch.stack([logits[:, [0, 2, 3]].logsumexp(1), logits[:, 1]], dim=1)  # liver, or anything else
    other, _ = value_and_gradient(merged, labels, None, batch_dice)
    torch.testing.assert_close(value, other)
    # What is not liver is not told whether it is background or kidney: their shares of the gradient are as they are.
    share = logits[:, [0, 2, 3]].softmax(1)
    torch.testing.assert_close(gradient[:, [0, 2, 3]], share * gradient[:, [0, 2, 3]].sum(1, keepdim=True))


def test_a_super_class_asks_for_one_of_its_organs() -> None:
    logits, labels = case(highest=1)
    labels[:, 2:4] = 4
    value, _ = value_and_gradient(logits, labels, groups(LIVER_AND_KIDNEYS, LIVER_AND_KIDNEYS), True)
    merged = torch.stack([logits[:, 0], logits[:, 1], logits[:, 2:].logsumexp(1)], dim=1)
    other, _ = value_and_gradient(merged, torch.where(labels == 4, 2, labels), None, True)
    torch.testing.assert_close(value, other)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_crop_in_which_nothing_was_looked_for_does_not_count(batch_dice: bool) -> None:
    logits, labels = case()
    labels[1] = 0
    value, gradient = value_and_gradient(logits, labels, groups(ALL, ()), batch_dice)
    alone, own = value_and_gradient(logits[:1], labels[:1], None, batch_dice)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient[:1], own)
    assert not gradient[1].any()
    value, gradient = value_and_gradient(logits, labels * 0, groups((), ()), batch_dice)
    assert value == 0 and not gradient.any()


def test_batch_dice_pools_an_organ_over_the_crops_in_which_it_was_looked_for() -> None:
    logits, labels = case()
    labels[1] = (labels[1] == 1).to(torch.uint8)
    loss = dice_ce_loss(logits, labels, groups(ALL, LIVER), batch_dice=True)
    probs = logits.softmax(1)
    expected = []
    for value in range(4):
        crops = [0, 1] if value < 2 else [0]
        predicted = [probs[1, [0, 2, 3]].sum(0) if (crop, value) == (1, 0) else probs[crop, value] for crop in crops]
        both = sum(float((p * (labels[crop] == value)).sum()) for p, crop in zip(predicted, crops, strict=True))
        sizes = sum(float(p.sum() + (labels[crop] == value).sum()) for p, crop in zip(predicted, crops, strict=True))
        expected.append(2 * both / sizes)
    assert float(loss.dice) == pytest.approx(1 - sum(expected) / 4, abs=1e-5)


def test_naive_training_unlearns_an_organ_and_this_does_not() -> None:
    """A voxel that is surely kidney, in a map that draws livers alone: as background it is pushed away."""
    logits = torch.tensor([0.0, 0.0, 3.0, 0.0]).view(1, 4, 1, 1, 1)
    labels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    _, naive = value_and_gradient(logits, labels, None, False)
    _, ours = value_and_gradient(logits, labels, groups(LIVER), False)
    assert float(naive[0, 2]) > 0.5 and abs(float(ours[0, 2])) < 0.1


def test_coarser_outputs_learn_from_the_same_organs() -> None:
    logits, labels = case(highest=1)
    coarse = logits[:, :, ::2, ::2, ::2].contiguous()
    loss = deep_dice_ce_loss([logits, coarse], labels, groups(LIVER, LIVER))
    merged = [torch.stack([x[:, [0, 2, 3]].logsumexp(1), x[:, 1]], dim=1) for x in (logits, coarse)]
    torch.testing.assert_close(loss.total, deep_dice_ce_loss(merged, labels).total)
