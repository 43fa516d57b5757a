"""Is one model better than another, and by how much: paired tests, intervals, effect sizes, several seeds.

Scores come as numbers by (case, organ). Everything here pairs: two models are compared on the same organs of the same
cases, and what one of them lacks is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import norm, rankdata

Key = tuple[str, str]
"""(case, organ)."""
Unit = Literal["case", "case x organ"]

BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
EXACT_UP_TO = 2000
"""Pairs. Above, the normal approximation is as good as exact and saves seconds."""
SAME = 1e-9
"""Differences are rounded to this: what is equal as fractions of voxels differs by less once it is subtracted."""
TEST_RULE = (
    "Two-sided Wilcoxon signed-rank test. Pairs without a difference are dropped, equal differences share their mean "
    f"rank, and p is exact for these ranks up to {EXACT_UP_TO} pairs; with n pairs left it cannot fall below 2 / 2^n. "
    "Several seeds of a model are averaged pair by pair before the test, so that n counts cases and not runs."
)
ORGAN_RULE = (
    "Pairs are organs of cases; organs of one case are not independent, so p is smaller than the cases alone would "
    "support. The interval of the difference is over cases."
)
_DOUBLE = 1000
"""Steps of counting subsets that may double the numbers before float64 overflows (at 2^1024)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_cases` cases with its 95 % bootstrap interval; the interval is None below two cases."""

    mean: float
    low: float | None
    high: float | None
    num_cases: int

    def __format__(self, spec: str) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} (95 % CI {self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True)
class Spread:
    """One number of several runs that differ in their seed alone."""

    mean: float
    sd: float | None
    """Of a sample (n - 1); None for one run."""
    low: float
    high: float
    num_runs: int

    def __format__(self, spec: str) -> str:
        if self.sd is None:
            return f"{self.mean:{spec}} (one seed)"
        return (f"{self.mean:{spec}} (SD {self.sd:{spec}}, {self.low:{spec}} to {self.high:{spec}}, "
                f"{self.num_runs} seeds)")


@dataclass(frozen=True)
class SignedRanks:
    """What the Wilcoxon signed-rank test says of paired differences."""

    p: float
    """Two-sided; 1 where nothing differs."""
    effect: float
    """Matched-pairs rank-biserial correlation, -1 to 1: share of the rank sum that is positive minus the rest."""
    num_pairs: int
    num_equal: int
    """Pairs without a difference: dropped."""
    method: Literal["exact", "normal approximation"]

    @property
    def smallest_p(self) -> float:
        """What p could be at least, if all pairs that are left pointed one way."""
        return smallest_p(self.num_pairs - self.num_equal)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How `first` differs from `second` on the same cases."""

    first: str
    second: str
    measure: str
    unit: Unit
    difference: Estimate
    """First minus second, organs averaged in each case; the interval is a bootstrap over cases."""
    test: SignedRanks
    num_left_out: int
    """Pairs that not every run of both models has."""
    p_holm: float | None = None
    """Adjusted for the family, where `with_holm` was asked."""
    num_family: int = 1
    smallest_p_holm: float | None = None
    """What `p_holm` could be at least, if every test of the family were as clear as its pairs allow."""

    @property
    def p(self) -> float:
        """After Holm, where there is a family."""
        return self.test.p if self.p_holm is None else self.p_holm

    @property
    def smallest_p(self) -> float:
        """What `p` could be at least."""
        return self.test.smallest_p if self.smallest_p_holm is None else self.smallest_p_holm

    def better(self, alpha: float = 0.01) -> bool:
        """`first` is above `second`, in the mean and in the ranks, and p is below `alpha`."""
        return self.p < alpha and self.difference.mean > 0 and self.test.effect > 0

    def worse(self, alpha: float = 0.01) -> bool:
        """The same of `second` above `first`."""
        return self.p < alpha and self.difference.mean < 0 and self.test.effect < 0

    def sentence(self, digits: int = 4) -> str:
        """Everything in words, for notes and logs."""
        said = (f"{self.first} minus {self.second}, {self.measure}: {_signed(self.difference, digits)}, "
                f"{_p_is(self.test.p)}")
        if self.p_holm is not None:
            said += f", {p_text(self.p_holm)} after Holm over {self.num_family}"
        said += f", effect {self.test.effect:+.2f}, {self.test.num_pairs} pairs ({self.unit})"
        if self.test.num_equal:
            said += f", {self.test.num_equal} of them equal"
        if self.num_left_out:
            said += f", {self.num_left_out} left out"
        return f"{said}, smallest p possible {p_text(self.smallest_p)} ({self.test.method})"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % percentile bootstrap interval of the finite ones of `values`; None if there is none.

    *Source*: Efron 1979, percentile interval; `BOOTSTRAP_RESAMPLES` resamples from the fixed `BOOTSTRAP_SEED`.
    """
    finite = np.array([v for v in values if math.isfinite(v)], np.float64)
    if not len(finite):
        return None
    if len(finite) < 2:
        return Estimate(float(finite[0]), None, None, 1)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(finite), (BOOTSTRAP_RESAMPLES, len(finite)))
    low, high = np.percentile(finite[draws].mean(axis=1), (2.5, 97.5))
    return Estimate(float(finite.mean()), float(low), float(high), len(finite))


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, least and largest of one number over seeds.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"values: expected finite numbers, one a seed, got {list(values)}")
    array = np.array(values, np.float64)
    sd = float(array.std(ddof=1)) if len(array) > 1 else None
    return Spread(float(array.mean()), sd, float(array.min()), float(array.max()), len(array))


def smallest_p(num_pairs: int) -> float:
    """The least two-sided p of a signed-rank test on `num_pairs` pairs that all differ: 2 / 2^n, 1 for no pair."""
    return min(1.0, 2.0 ** (1 - num_pairs))


def signed_ranks(differences: Sequence[float] | np.ndarray) -> SignedRanks:
    """The two-sided Wilcoxon signed-rank test of paired differences; `TEST_RULE` says how zeros and ties count.

    Raises:
        ValueError: where a difference is not finite.

    *Source*: Wilcoxon 1945; ties by their own permutation distribution, Pratt & Gibbons 1981, chapter 3; effect:
    Kerby 2014, "The simple difference formula".
    """
    values = np.asarray(differences, np.float64).ravel()
    if not np.isfinite(values).all():
        raise ValueError("differences: expected finite numbers, got some that are not")
    rounded = np.round(values / SAME)
    there = rounded[rounded != 0]
    doubled = np.rint(2 * rankdata(np.abs(there))).astype(np.int64)  # mean ranks are halves: whole numbers once doubled
    plus, total = int(doubled[there > 0].sum()), int(doubled.sum())
    effect = (2 * plus - total) / total if total else 0.0
    exact = len(there) <= EXACT_UP_TO
    lesser = min(plus, total - plus)
    p = min(1.0, 2 * (_share_at_most(doubled, lesser) if exact else _normal_tail(doubled, lesser)))
    return SignedRanks(p, effect, len(values), len(values) - len(there), "exact" if exact else "normal approximation")


def _share_at_most(ranks: np.ndarray, bound: int) -> float:
    """Share of all 2^n subsets of `ranks` whose sum is at most `bound`, counted sum by sum."""
    ways = np.zeros(bound + 1)
    ways[0] = 1.0
    reached = 0
    for i, rank in enumerate(np.sort(ranks).tolist()):
        if i >= _DOUBLE:
            ways *= 0.5
        if rank > bound:
            continue
        reached = min(bound, reached + rank)
        ways[rank : reached + 1] += ways[: reached + 1 - rank].copy()
    return math.ldexp(float(ways.sum()), -min(len(ranks), _DOUBLE))


def _normal_tail(ranks: np.ndarray, bound: int) -> float:
    """The same share as a normal distribution has it, with the variance of these very ranks; continuity corrected."""
    mean, sd = ranks.sum() / 2, math.sqrt(float((ranks.astype(np.float64) ** 2).sum())) / 2
    return float(norm.cdf((bound + 1 - mean) / sd))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being a family, in their own order.

    *Source*: Holm 1979, step-down; the adjusted value is the largest of (m - k + 1) p_(k) up to its place, at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def with_holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, which ask one question together, with their p adjusted."""
    adjusted = zip(holm([c.test.p for c in comparisons]), holm([c.test.smallest_p for c in comparisons]), strict=True)
    return [replace(c, p_holm=p, num_family=len(comparisons), smallest_p_holm=least)
            for c, (p, least) in zip(comparisons, adjusted, strict=True)]


def compare(
    first: tuple[str, Sequence[Mapping[Key, float]]],
    second: tuple[str, Sequence[Mapping[Key, float]]],
    *,
    measure: str,
    unit: Unit = "case",
) -> Comparison | None:
    """Compare two models on the pairs that all runs of both have; None where there is no such pair.

    Args:
        first: name, and the scores of each of its runs (one a seed) by (case, organ).
        second: the same of the other.
        measure: what the scores are, for the sentence.
        unit: what a pair of the test is: a case with its organs averaged, or an organ of a case (`ORGAN_RULE`).

    Raises:
        ValueError: no run, or a score that is not finite.
    """
    runs = [*first[1], *second[1]]
    if not first[1] or not second[1]:
        raise ValueError("runs: expected at least one run of each model, got none")
    keys = sorted(set.intersection(*(set(run) for run in runs)))
    if not keys:
        return None
    ours, theirs = over_seeds(first[1], keys), over_seeds(second[1], keys)
    by_organ = {key: ours[key] - theirs[key] for key in keys}
    by_case = list(over_organs(by_organ).values())
    difference = estimate(by_case)
    if difference is None or not all(map(math.isfinite, by_organ.values())):
        raise ValueError(f"scores of {first[0]} and {second[0]}: expected finite numbers, got some that are not")
    return Comparison(
        first=first[0], second=second[0], measure=measure, unit=unit, difference=difference,
        test=signed_ranks(by_case if unit == "case" else list(by_organ.values())),
        num_left_out=len(_units(set().union(*runs), unit)) - len(_units(set(keys), unit)),
    )


def over_seeds(runs: Sequence[Mapping[Key, float]], keys: Sequence[Key] | None = None) -> dict[Key, float]:
    """Each score averaged over the runs, for `keys` or for all that every run has."""
    chosen = sorted(set.intersection(*(set(run) for run in runs))) if keys is None else keys
    return {key: math.fsum(run[key] for run in runs) / len(runs) for key in chosen}


def over_organs(scores: Mapping[Key, float]) -> dict[str, float]:
    """The mean of each case over its organs."""
    by_case: dict[str, list[float]] = {}
    for (case, _), score in scores.items():
        by_case.setdefault(case, []).append(score)
    return {case: math.fsum(values) / len(values) for case, values in by_case.items()}


def p_text(p: float) -> str:
    """``0.0313``, ``1.000``, ``2.3e-07`` where it is small, ``< 1e-300`` where float64 ends."""
    if p < 1e-300:
        return "< 1e-300"
    return f"{p:.1e}" if p < 0.001 else f"{p:.4f}" if p < 0.1 else f"{p:.3f}"


def _units(keys: set[Key], unit: Unit) -> set:
    return {case for case, _ in keys} if unit == "case" else keys


def _p_is(p: float) -> str:
    return f"p {p_text(p)}" if p < 1e-300 else f"p = {p_text(p)}"


def _signed(value: Estimate, digits: int) -> str:
    if value.low is None or value.high is None:
        return f"{value.mean:+.{digits}f}"
    return f"{value.mean:+.{digits}f} (95 % CI {value.low:+.{digits}f} to {value.high:+.{digits}f})"
