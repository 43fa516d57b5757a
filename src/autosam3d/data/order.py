"""In which order the cases of an epoch are seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autosam3d.recipes.recipe import Recipe


def weighted_order(weights: Sequence[float], length: int, random: np.random.Generator) -> np.ndarray:
    """Indexes of cases, `length` of them, each as often as its weight says, as far as whole numbers can.

    Equal weights: every case equally often. Others: what a case is due beyond a whole number is drawn, so that over the
    epochs it is seen as its weight says.
    """
    count = len(weights)
    if len(set(weights)) == 1:
        return random.permutation(length) % count
    due = np.asarray(weights, np.float64) * length / sum(weights)
    # Systematic sampling of the fractions: their sum is whole, and each is drawn with its own probability.
    shuffled = random.permutation(count)
    reached = np.cumsum(due[shuffled])
    reached[-1] = length
    edges = np.floor(reached + random.random())
    times = np.empty(count, np.int64)
    times[shuffled] = np.diff(edges, prepend=0)
    return random.permutation(np.repeat(np.arange(count), times))


def with_whole_cases(
    order: np.ndarray, whole: Sequence[bool], window: int, random: np.random.Generator
) -> np.ndarray:
    """`order` with a fully drawn case among every `window` positions: background is learnt from those alone.

    Cases trade places as far as there are enough; beyond that a partly drawn one gives way to a fully drawn one, drawn
    at random. Without fully drawn cases `order` stays as it is.
    """
    whole_cases = np.flatnonzero(whole)
    if not len(whole_cases):
        return order
    order = order.copy()
    is_whole = np.asarray(whole)
    starts = range(0, len(order), window)
    spare = [place for start in starts
             for place in np.flatnonzero(is_whole[order[start : start + window]])[1:] + start]
    for start in starts:
        part = order[start : start + window]
        if is_whole[part].any():
            continue
        place = start + int(random.integers(len(part)))
        if spare:
            other = spare.pop(int(random.integers(len(spare))))
            order[place], order[other] = order[other], order[place]
        else:
            order[place] = random.choice(whole_cases)
    return order


def learns_background_from_labels(recipe: Recipe) -> bool:
    """Whether no teacher says what is background in a case that is partly drawn."""
    return recipe.distill is None or recipe.distill.label_weight == 1
