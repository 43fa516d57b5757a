"""The teacher's term in its three forms: closed forms, where each is smallest, and what a student hears of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.recipes.settings import Distillation
from autosam3d.training.losses import dice_ce_loss, teacher_dice_ce, teacher_kl
from autosam3d.training.objective import teacher_term


def soft_case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 4, 3, 4, 5, generator=generator) * 2 for _ in range(2))
    return logits, teacher.softmax(1)


def test_dice_ce_in_closed_form() -> None:
    """The teacher gives the organ 3/4 in the first crop of 8 voxels, 0 in the second; the student 1/2 everywhere."""
    probs = torch.zeros(2, 2, 2, 2, 2)
    probs[0, 0], probs[0, 1], probs[1, 0] = 0.25, 0.75, 1.0
    logits = torch.zeros(2, 2, 2, 2, 2)
    # Organ: 2 * 8 * 3/8 over 16/4 + 8 * 9/16. Background: 2 * (8/8 + 8/2) over 16/4 + 8/16 + 8.
    pooled = 1 - (6 / 8.5 + 10 / 12.5) / 2
    assert float(teacher_dice_ce(logits, probs, True)) == pytest.approx(pooled + math.log(2), abs=1e-5)
    # Crop by crop: organ 6 / (2 + 4.5) and 0, background 2 / (2 + 1/2) and 8 / (2 + 8).
    apart = 1 - (6 / 6.5 + 0 + 2 / 2.5 + 8 / 10) / 4
    assert float(teacher_dice_ce(logits, probs, False)) == pytest.approx(apart + math.log(2), abs=1e-5)


@pytest.mark.parametrize("loss", ["mse", "dice_ce", "kl"])
def test_no_answer_is_better_than_the_teachers_own(loss: str) -> None:
    _, probs = soft_case()
    distill = Distillation(loss=loss)  # type: ignore[arg-type]
    logits = probs.log().requires_grad_()
    at_teacher = teacher_term(logits, probs, distill, True)
    at_teacher.backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = logits.detach() + 0.3 * torch.randn(logits.shape, generator=generator)
        assert teacher_term(moved, probs, distill, True) > at_teacher.detach()


def test_kl_in_closed_form() -> None:
    student, teacher = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.3, 0.6])
    logits, probs = student.log().view(1, 3, 1, 1, 1).expand(2, 3, 2, 2, 2), teacher.view(1, 3, 1, 1, 1)
    probs = probs.expand(2, 3, 2, 2, 2)
    expected = float((teacher * (teacher / student).log()).sum())
    assert float(teacher_kl(logits, probs)) == pytest.approx(expected, rel=1e-4)
    soft_student, soft_teacher = ((p ** (1 / 3)) / (p ** (1 / 3)).sum() for p in (student, teacher))
    expected = 9 * float((soft_teacher * (soft_teacher / soft_student).log()).sum())
    assert float(teacher_kl(logits, probs, 3.0)) == pytest.approx(expected, rel=1e-3)
    zeros = torch.zeros(1, 3, 1, 1, 1)
    zeros[:, 0] = 1
    assert torch.isfinite(teacher_kl(logits[:1, :, :1, :1, :1], zeros))


def taught(term: Callable[[Tensor], Tensor], voxels: Tensor, steps: int) -> Tensor:
    """Labels that a small network gives after `steps` of AdamW."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 12, 3, padding=1), nn.InstanceNorm3d(12), nn.GELU(),
                            nn.Conv3d(12, 12, 3, padding=1), nn.InstanceNorm3d(12), nn.GELU(), nn.Conv3d(12, 6, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        term(network(voxels)).backward()
        optimizer.step()
    with torch.no_grad():
        return network(voxels).argmax(1)


def test_from_the_teacher_alone_small_organs_begin_with_dice_ce_and_not_with_mse() -> None:
    """Five organs of half a per cent of the voxels each; the teacher knows them, softened by 2 %."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, 16, 24, 24, dtype=torch.long)
    for organ, (z, y, x) in enumerate([(1, 2, 2), (6, 14, 4), (10, 4, 15), (3, 16, 16), (11, 10, 9)], start=1):
        labels[:, z : z + 3, y : y + 4, x : x + 4] = organ
    voxels = (labels.float() / 2 + 0.3 * torch.randn(labels.shape, generator=generator)).unsqueeze(1)
    probs = F.one_hot(labels, 6).movedim(-1, 1).float() * 0.976 + 0.004

    def dice(term: Callable[[Tensor], Tensor]) -> float:
        found = taught(term, voxels, 80)
        organs = [(found == organ, labels == organ) for organ in range(1, 6)]
        return float(sum(2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in organs)) / 5

    mse, dice_ce = (dice(lambda logits, loss=loss: teacher_term(logits, probs, Distillation(loss=loss), True))
                    for loss in ("mse", "dice_ce"))
    labels_alone = dice(lambda logits: dice_ce_loss(logits, labels, batch_dice=True).total)
    assert mse < labels_alone - 0.1 and dice_ce > labels_alone - 0.05, (mse, dice_ce, labels_alone)
