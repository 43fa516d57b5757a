"""`batch_dice` on several devices is that of the joined batch, value and gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import command_line
from autosam3d.training.losses import dice_ce_loss, teacher_dice_ce

# What each of two ranks does, as DDP has it: the mean of the ranks' gradients.
_RANK = """
import sys
import torch
import torch.distributed as dist
from autosam3d.training.losses import dice_ce_loss, teacher_dice_ce

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
case = torch.load(f"{folder}/case.pt")
found = {}
for name in ("plain", "drawn", "none", "soft"):
    weight = case["weight"].clone().requires_grad_()
    half = slice(2 * rank, 2 * rank + 2)
    logits = case["voxels"][half] * weight[:, None, None, None]
    if name == "soft":
        loss = teacher_dice_ce(logits, case["probs"][half], batch_dice=True)
    else:
        groups = None if name == "plain" else case[name][half]
        loss = dice_ce_loss(logits, case["labels_" + name][half], groups, ce_weight=0.0, batch_dice=True).total
    loss.backward()
    dist.all_reduce(weight.grad)
    found[name] = (loss.detach(), weight.grad / 2)
torch.save(found, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


DRAWN = {"plain": [[1, 2, 3]] * 4, "drawn": [[1, 2, 3], [1], [2], [2, 3]], "none": [[], [], [1], [3]]}
"""Name of a case to the organs that were looked for in each of four crops, two on each rank."""


def groups(drawn: list[list[int]]) -> Tensor:
    """What was not looked for is in background's group."""
    table = torch.zeros(len(drawn), 4, 4, dtype=torch.bool)
    for crop, organs in enumerate(drawn):
        table[crop, organs, organs] = True
        table[crop, 0, [k for k in range(4) if k not in organs]] = True
    return table


def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path: Path) -> None:
    """Of every loss that pools, also where nothing was looked for in any crop of a rank."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (4, 5, 6, 7))
    case = {"voxels": torch.randn(4, 4, 5, 6, 7), "weight": torch.tensor([1.0, 2.0, -1.0, 0.5]),
            "probs": torch.softmax(torch.randn(4, 4, 5, 6, 7), 1)}
    for name, drawn in DRAWN.items():
        case[name] = groups(drawn)
        seen = torch.stack([torch.isin(crop, torch.tensor([0, *organs])) for crop, organs in
                            zip(labels, drawn, strict=True)])
        case[f"labels_{name}"] = labels * seen
    torch.save(case, tmp_path / "case.pt")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    ranks = [command_line.start(tmp_path, rank, script=script) for rank in (0, 1)]
    for done in [rank.wait(100) for rank in ranks]:
        assert done.code == 0, done.err
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for name in (*DRAWN, "soft"):
        weight = case["weight"].clone().requires_grad_()
        logits = case["voxels"] * weight[:, None, None, None]
        if name == "soft":
            whole = teacher_dice_ce(logits, case["probs"], batch_dice=True)
        else:
            whole = dice_ce_loss(logits, case[f"labels_{name}"], None if name == "plain" else case[name], ce_weight=0.0,
                                 batch_dice=True).total
        (gradient,) = torch.autograd.grad(whole, weight)
        torch.testing.assert_close((both[0][name][0] + both[1][name][0]) / 2, whole.detach())
        for _, averaged in (found[name] for found in both):
            torch.testing.assert_close(averaged, gradient, rtol=1e-4, atol=1e-6)
