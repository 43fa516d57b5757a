"""Does a runtime say what PyTorch said? Three measures and their bounds.

What is compared with what:

- **Logits** against PyTorch in float32 with the weights *as they are stored*, rounded to float16. The difference is
  what the runtime itself does: another order of sums, other kernels. Bound: a thousandth of the largest absolute logit.
- **Labels and Dice** against PyTorch in float32 with the weights *as they were trained*. The difference is what a user
  gets to see: rounding of the weights and runtime together. Bounds: 99.98 % of the voxels equal, Dice 0.99 for
  each organ.

PyTorch with stored weights is a row of its own, compared with trained ones throughout: what rounding alone does. It has
no bound for its logits; labels and Dice say whether it matters. A Dice is judged from 100 voxels on: below,
one voxel at a border moves it by more than the bound. What a case does not show, it does not prove: organs that are in
none of its windows are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autosam3d.golden import Golden, labels_of, lattice

MAX_LOGIT_SHARE = 1e-3
MIN_EQUAL_SHARE = 0.9998
MIN_DICE = 0.99
MIN_DICE_VOXELS = 100


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One runtime against PyTorch."""

    backend: str
    version: str
    threads: int
    seconds_per_window: float
    max_logit_difference: float
    logit_scale: float
    """Largest absolute logit of PyTorch."""
    voxels: int
    flipped: int
    """Voxels with another label than PyTorch with trained weights."""
    organ_voxels: int
    """Voxels that are an organ for one of the two."""
    dice: Mapping[str, float | None]
    """Organ to Dice between the two; None where neither has it."""
    reference_voxels: Mapping[str, int]
    """Organ to its voxels in PyTorch's labels."""
    judge_logits: bool = True
    """False where the logits are compared across the rounding of the weights."""

    @property
    def logit_share(self) -> float:
        return self.max_logit_difference / self.logit_scale

    @property
    def equal_share(self) -> float:
        return 1 - self.flipped / self.voxels

    @property
    def judged_dice(self) -> dict[str, float]:
        """Of the organs that are large enough."""
        return {name: d for name, d in self.dice.items()
                if d is not None and self.reference_voxels[name] >= MIN_DICE_VOXELS}

    @property
    def worst_dice(self) -> float | None:
        return min(self.judged_dice.values(), default=None)

    def faults(self) -> list[str]:
        """What is out of bounds, one clause each."""
        faults = []
        if self.judge_logits and not self.logit_share <= MAX_LOGIT_SHARE:  # also where it is NaN
            faults.append(f"logits differ by {self.logit_share:.2g} of their scale, allowed {MAX_LOGIT_SHARE:g}")
        if not self.equal_share >= MIN_EQUAL_SHARE:
            faults.append(f"{self.equal_share:.4%} of the labels are equal, needed {MIN_EQUAL_SHARE:.2%}")
        for name, dice in self.judged_dice.items():
            if not dice >= MIN_DICE:
                faults.append(f"Dice of {name} is {dice:.4f}, needed {MIN_DICE:g}")
        return faults

    def as_dict(self) -> dict[str, Any]:
        shares = {"logit_share": self.logit_share, "equal_share": self.equal_share, "worst_judged_dice":
                  self.worst_dice, "within_bounds": not self.faults()}
        return asdict(self) | shares


def measure_parity(
    logits: np.ndarray, golden: Golden, organs: Sequence[str], *, backend: str, version: str, threads: int,
    seconds: float, reference: np.ndarray | None = None, judge_logits: bool = True,
) -> Parity:
    """Compare the logits [n, K, D, H, W] of a runtime with the golden case.

    Args:
        organs: names of the labels from 1 on.
        seconds: that the windows took together.
        reference: PyTorch's logits at all voxels; None compares at those that `golden` keeps, which adds half a step of
            their storage (1.5e-5 of the scale) to the difference.
        judge_logits: False where `reference` is of other weights.
    """
    if reference is None:
        difference = float(np.abs(lattice(logits) - golden.logits).max())
    else:
        difference = float(np.abs(logits - reference).max())
    labels, truth = labels_of(logits), golden.labels
    # Sizes of the organs in both label maps and of their overlap, from one count of pairs.
    width = len(organs) + 1
    pairs = np.bincount((truth.astype(np.intp) * width + labels).ravel(), minlength=width**2)[: width**2]
    pairs = pairs.reshape(width, width)
    ours, theirs, both = pairs.sum(0), pairs.sum(1), pairs.diagonal()
    return Parity(
        backend=backend, version=version, threads=threads, seconds_per_window=round(seconds / len(logits), 4),
        max_logit_difference=difference, logit_scale=golden.scale, voxels=int(truth.size),
        judge_logits=judge_logits, flipped=int(truth.size - both.sum()), organ_voxels=int(truth.size - both[0]),
        dice={name: 2 * float(both[i]) / float(ours[i] + theirs[i]) if ours[i] + theirs[i] else None
              for i, name in enumerate(organs, start=1)},
        reference_voxels={name: int(theirs[i]) for i, name in enumerate(organs, start=1)},
    )
