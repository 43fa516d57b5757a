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

INT8 is another network by intent, so its logits and its share of equal labels are reported and not judged. It has
bounds of its own, on Dice alone: 0.99 in the mean of the organs, 0.97 for the worst. *Source*: the issue that asked
for INT8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autosam3d.export.golden import Golden, labels_of, lattice

MAX_LOGIT_SHARE = 1e-3
MIN_EQUAL_SHARE = 0.9998
MIN_DICE = 0.99
MIN_DICE_VOXELS = 100
BOUNDS = {"logit_share": MAX_LOGIT_SHARE, "equal_share": MIN_EQUAL_SHARE, "dice": MIN_DICE,
          "dice_judged_from_voxels": MIN_DICE_VOXELS}
"""As certificates and the page's description of a model name them."""
MIN_INT8_MEAN_DICE = 0.99
MIN_INT8_WORST_DICE = 0.97


@dataclass(frozen=True)
class OrganDice:
    """One organ in two label maps."""

    dice: float | None
    """None where neither has it."""
    reference_voxels: int
    voxels: int
    """In the map that is compared."""

    @property
    def is_judged(self) -> bool:
        """Large enough in either map: an organ that INT8 alone sees is a fault, too."""
        return max(self.reference_voxels, self.voxels) >= MIN_DICE_VOXELS


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """What a runtime said of the golden windows, and how long it took."""

    backend: str
    version: str
    threads: int
    seconds: float
    """That the windows took together."""
    logits: np.ndarray
    """float32 [n, K, D, H, W]."""
    int8: bool = False
    """Whether it is the INT8 network, which is judged by bounds of its own."""


@dataclass(frozen=True, eq=False)
class Reference:
    """PyTorch's logits that a runtime's are compared with."""

    logits: np.ndarray
    """float32 [n, K, D, H, W]."""
    of_stored_weights: bool = True
    """False where they are of the weights as they were trained: then the difference is reported and not judged."""


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
    own_voxels: Mapping[str, int]
    """Organ to its voxels in the runtime's labels."""
    judge_logits: bool = True
    """False where the logits are compared across the rounding of the weights."""
    int8: bool = False
    """Whether the bounds are those of INT8."""

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
        if self.int8:
            return int8_faults([{name: OrganDice(d, self.reference_voxels[name], self.own_voxels[name])
                                 for name, d in self.dice.items()}])
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


def int8_faults(scans: Sequence[Mapping[str, OrganDice]]) -> list[str]:
    """What keeps an INT8 network from being taken for the float32 one, one clause each.

    The mean is over the organs, each of which is the mean of its scans; the worst is that of any organ in any scan.

    Args:
        scans: organ to its Dice against float32, one mapping a scan.
    """
    judged = judged_int8(scans)
    if not judged:
        return [f"no organ of {MIN_DICE_VOXELS} voxels is shown, so nothing is proved"]
    faults = []
    mean = mean_int8_dice(judged)
    if not mean >= MIN_INT8_MEAN_DICE:
        faults.append(f"mean Dice of the organs against float32 is {mean:.4f}, needed {MIN_INT8_MEAN_DICE:g}")
    for name, values in judged.items():
        if not min(values) >= MIN_INT8_WORST_DICE:
            faults.append(f"Dice of {name} against float32 is {min(values):.4f}, needed {MIN_INT8_WORST_DICE:g}")
    return faults


def judged_int8(scans: Sequence[Mapping[str, OrganDice]]) -> dict[str, list[float]]:
    """Organ to its Dice in each scan where it is large enough; without organs that are nowhere."""
    found = {name: [scan[name].dice or 0.0 for scan in scans if name in scan and scan[name].is_judged]
             for name in {name: None for scan in scans for name in scan}}
    return {name: values for name, values in found.items() if values}


def mean_int8_dice(judged: Mapping[str, Sequence[float]]) -> float:
    """Over the organs, each the mean of its scans."""
    return float(np.mean([np.mean(values) for values in judged.values()]))


def compare_labels(labels: np.ndarray, truth: np.ndarray, organs: Sequence[str]) -> dict[str, OrganDice]:
    """Dice of two integer label maps of one shape, per organ; `organs` are the names of the labels from 1 on."""
    pairs = _count_pairs(labels, truth, len(organs) + 1)
    ours, theirs, both = pairs.sum(0), pairs.sum(1), pairs.diagonal()
    return {
        name: OrganDice(2 * float(both[i]) / float(ours[i] + theirs[i]) if ours[i] + theirs[i] else None,
                        int(theirs[i]), int(ours[i]))
        for i, name in enumerate(organs, start=1)
    }


def measure_parity(ran: Ran, golden: Golden, organs: Sequence[str], reference: Reference | None = None) -> Parity:
    """Compare what a runtime said with the golden case.

    Args:
        ran: the logits of a runtime for the windows of `golden`.
        golden: windows and PyTorch's answer.
        organs: names of the labels from 1 on.
        reference: PyTorch's logits at all voxels; None compares at those that `golden` keeps, which adds half a step of
            their storage (1.5e-5 of the scale) to the difference.
    """
    if reference is None:
        difference = float(np.abs(lattice(ran.logits) - golden.logits).max())
    else:
        difference = float(np.abs(ran.logits - reference.logits).max())
    labels, truth = labels_of(ran.logits), golden.labels
    pairs = _count_pairs(labels, truth, len(organs) + 1)
    compared = compare_labels(labels, truth, organs)
    return Parity(
        backend=ran.backend, version=ran.version, threads=ran.threads,
        seconds_per_window=round(ran.seconds / len(ran.logits), 4),
        max_logit_difference=difference, logit_scale=golden.scale, voxels=int(truth.size),
        judge_logits=reference is None or reference.of_stored_weights, int8=ran.int8,
        flipped=int(truth.size - pairs.trace()),
        organ_voxels=int(truth.size - pairs[0, 0]), dice={name: organ.dice for name, organ in compared.items()},
        reference_voxels={name: organ.reference_voxels for name, organ in compared.items()},
        own_voxels={name: organ.voxels for name, organ in compared.items()},
    )


def _count_pairs(labels: np.ndarray, truth: np.ndarray, width: int) -> np.ndarray:
    """int [width, width]: voxels by label in `truth` (row) and in `labels` (column)."""
    pairs = np.bincount((truth.astype(np.intp) * width + labels).ravel(), minlength=width**2)[: width**2]
    return pairs.reshape(width, width)
