"""Which teacher's term begins small organs: a toy of five, learnt from a teacher alone, beside the labels.

    OMP_NUM_THREADS=1 python benchmarks/teacher_terms.py

A network of three convolutions on two crops of noise with five organs of 36 voxels each. The teacher knows them,
softened by 2 %. Mean Dice after 100, 200 and 300 steps of AdamW, for each form of the teacher's term: `mse` and `kl` as
`distill.loss` has them, and three forms of Dice + CE: with squares in the denominator (`dice_ce`), without (the labels'
own Dice, with soft targets), and with the smaller of the two probabilities as overlap (Dice semimetric loss). Writes
results/teacher_terms.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.recipes.settings import Distillation
from autosam3d.training.losses import dice_ce_loss
from autosam3d.training.objective import teacher_term
from measured import write_result

MARKS = (100, 200, 300)
CLASSES = 6
PLACES = [(1, 2, 2), (6, 14, 4), (10, 4, 15), (3, 16, 16), (11, 10, 9)]
SMOOTH = 1e-5


def plain(logits: Tensor, probs: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, 1)
    student = log_probs.exp()
    overlap, total = (student * probs).sum((0, 2, 3, 4)), (student + probs).sum((0, 2, 3, 4))
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean() - (probs * log_probs).sum(1).mean()


def smaller(logits: Tensor, probs: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, 1)
    student = log_probs.exp()
    overlap, total = torch.minimum(student, probs).sum((0, 2, 3, 4)), (student + probs).sum((0, 2, 3, 4))
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean() - (probs * log_probs).sum(1).mean()


def learn(seed: int, contrast: float, term_of: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]) -> list[float]:
    labels = torch.zeros(2, 16, 24, 24, dtype=torch.long)
    for organ, (z, y, x) in enumerate(PLACES, start=1):
        labels[:, z : z + 3, y : y + 4, x : x + 4] = organ
    noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed))
    voxels = (labels.float() * contrast + 0.3 * noise).unsqueeze(1)
    probs = F.one_hot(labels, CLASSES).movedim(-1, 1).float() * 0.976 + 0.004
    term = term_of(labels, probs)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv3d(1, 12, 3, padding=1), nn.InstanceNorm3d(12), nn.GELU(),
                            nn.Conv3d(12, 12, 3, padding=1), nn.InstanceNorm3d(12), nn.GELU(),
                            nn.Conv3d(12, CLASSES, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    marks = []
    for step in range(1, MARKS[-1] + 1):
        optimizer.zero_grad()
        term(network(voxels)).backward()
        optimizer.step()
        if step in MARKS:
            with torch.no_grad():
                found = network(voxels).argmax(1)
            dice = [2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum())
                    for k in range(1, CLASSES)]
            marks.append(round(float(sum(dice)) / len(dice), 3))
    return marks


def main() -> None:
    torch.set_num_threads(1)
    forms: dict[str, Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]] = {
        **{loss: lambda _, probs, loss=loss: lambda logits: teacher_term(logits, probs, Distillation(loss=loss), True)
           for loss in ("mse", "kl", "dice_ce")},
        "dice_ce_without_squares": lambda _, probs: lambda logits: plain(logits, probs),
        "dice_ce_smaller": lambda _, probs: lambda logits: smaller(logits, probs),
        "labels": lambda labels, _: lambda logits: dice_ce_loss(logits, labels, batch_dice=True).total,
    }
    rows = [{"contrast": contrast, "seed": seed, **{name: learn(seed, contrast, form) for name, form in forms.items()}}
            for contrast in (0.5, 0.3) for seed in (0, 1)]
    for row in rows:
        print(row)
    write_result("teacher_terms", {"command": "OMP_NUM_THREADS=1 python benchmarks/teacher_terms.py",
                                   "dice_after_steps": list(MARKS), "rows": rows}, 0)


if __name__ == "__main__":
    main()
