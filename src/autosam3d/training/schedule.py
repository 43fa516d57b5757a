"""Learning rate over the epochs."""

from __future__ import annotations

import math

from autosam3d.errors import RecipeError
from autosam3d.recipes.settings import Optim

# The public code warms up by exp(10 * (e / warmup - 1)): from 4.5e-5 of the full rate to all of it.
_WARMUP_STEEPNESS = 10.0
_POLY_POWER = 0.9
# "exponential" ends at a hundredth of the full rate.
_EXPONENTIAL_END = 0.01


def learning_rate(epoch: float, epochs: int, optim: Optim) -> float:
    """The rate at `epoch` (from 0; fractions allowed) of a run of `epochs`.

    *Source*: paper, section 4, "warm-up exponential decay", as the public code has it: exponential warm-up, then
    polynomial decay over the whole run, so the rate is full at epoch `warmup_epochs` and falls from the next on.
    The option "exponential" decays as the words say. "poly" is nnU-Net's, without warm-up. "warmup_cosine" is UNETR's
    and SwinUNETR's: linear warm-up, then half a cosine down to 0; it begins at 1 / (warmup_epochs + 1) of the rate
    instead of 0, so that a first epoch of one rate is not lost.
    """
    if optim.schedule == "warmup_cosine":
        if epoch < optim.warmup_epochs:
            return optim.lr * (epoch + 1) / (optim.warmup_epochs + 1)
        done = (epoch - optim.warmup_epochs) / max(epochs - optim.warmup_epochs, 1)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if 0 < optim.warmup_epochs >= epoch:
        return optim.lr * math.exp(_WARMUP_STEEPNESS * (epoch / optim.warmup_epochs - 1))
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "exponential":
        span = max(epochs - optim.warmup_epochs, 1)
        return optim.lr * _EXPONENTIAL_END ** ((epoch - optim.warmup_epochs) / span)
    return optim.lr * max(1 - epoch / epochs, 0.0) ** _POLY_POWER


def demand_full_rate(optim: Optim, epochs: int) -> None:
    """Refuse a run that ends before its warm-up: it would never see the rate that its recipe names.

    Raises:
        RecipeError: BAD_VALUE.
    """
    if optim.warmup_epochs >= epochs:
        raise RecipeError("BAD_VALUE", "recipe: optim.warmup_epochs", f"expected fewer epochs than the {epochs} of "
                          f"train.epochs, got {optim.warmup_epochs}", "lower it, 0 for no warm-up, or train longer")
