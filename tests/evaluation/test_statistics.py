"""Paired tests against brute force, closed forms and scipy; corrections, intervals and pairing by their laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, wilcoxon

from autosam3d.evaluation.statistics import (
    EXACT_UP_TO,
    Comparison,
    compare,
    estimate,
    holm,
    over_organs,
    over_seeds,
    p_text,
    signed_ranks,
    smallest_p,
    spread,
    with_holm,
)

FEW = st.lists(st.integers(-5, 5).map(lambda v: v / 8), min_size=1, max_size=11)
MANY = st.lists(st.integers(-400, 400).map(lambda v: v / 1000), min_size=1, max_size=60)


def brute_force_p(differences: list[float]) -> float:
    """Every choice of signs of the differences that are not zero, the literal definition."""
    there = np.array([d for d in differences if d != 0])
    if not len(there):
        return 1.0
    ranks = rankdata(np.abs(there))
    seen = min(ranks[there > 0].sum(), ranks[there < 0].sum())
    lesser = [min(sum(itertools.compress(ranks, signs)), ranks.sum() - sum(itertools.compress(ranks, signs)))
              for signs in itertools.product((0, 1), repeat=len(there))]
    return float(np.mean(np.array(lesser) <= seen + 1e-9))


@settings(max_examples=60, deadline=None)
@given(FEW)
def test_p_is_that_of_all_signs_with_ties_and_zeros(differences):
    assert signed_ranks(differences).p == pytest.approx(brute_force_p(differences), abs=1e-14)


@pytest.mark.parametrize("num", [1, 2, 6, 20, 49, 300])
def test_p_is_scipys_where_scipy_is_exact(num):
    """Without ties and zeros."""
    differences = np.random.default_rng(num).normal(0.3, 1, num)
    assert signed_ranks(differences).p == pytest.approx(wilcoxon(differences, method="exact").pvalue, rel=1e-9)


def test_zeros_are_dropped_and_counted():
    with_zeros, without = signed_ranks([0.0, 0.1, -0.2, 0.4, 0.0]), signed_ranks([0.1, -0.2, 0.4])
    assert (with_zeros.p, with_zeros.effect) == (without.p, without.effect)
    assert (with_zeros.num_pairs, with_zeros.num_equal, with_zeros.smallest_p) == (5, 2, 0.25)
    nothing = signed_ranks([0.0, 0.0])
    assert (nothing.p, nothing.effect, nothing.smallest_p) == (1.0, 0.0, 1.0)
    assert signed_ranks([]).p == 1.0


def test_differences_that_only_rounding_parts_are_ties():
    """0.3 - 0.2 and 0.2 - 0.1 differ in float64 and not as Dice; 0.1 + 0.2 - 0.3 is not zero there, and is."""
    assert 0.3 - 0.2 != 0.2 - 0.1
    assert signed_ranks([0.3 - 0.2, 0.1 - 0.2, 0.4]) == signed_ranks([0.1, -0.1, 0.4])
    assert signed_ranks([0.1 + 0.2 - 0.3, 0.5]).num_equal == 1


@pytest.mark.parametrize("num", range(1, 12))
def test_one_sided_pairs_reach_the_smallest_p(num):
    found = signed_ranks(np.arange(1, num + 1) / 10)
    assert found.p == found.smallest_p == smallest_p(num) == min(1, 2 / 2**num)
    assert (found.effect, signed_ranks(-np.arange(1, num + 1)).effect) == (1, -1)


def test_six_cases_cannot_go_under_the_papers_star_and_their_organs_can():
    """What the paper's star on BTCV needs: 6 test cases with 13 organs each."""
    assert smallest_p(6) == 0.03125
    assert smallest_p(78) < 0.01 / 4


def test_effect_is_the_share_of_rank_sums():
    """Ranks 1, 2, 3 of which 2 is against: (4 - 2) / 6."""
    assert signed_ranks([0.1, -0.2, 0.3]).effect == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(MANY, st.randoms(use_true_random=False))
def test_signs_and_order(differences, random):
    found, turned = signed_ranks(differences), signed_ranks([-d for d in differences])
    assert turned.p == found.p
    assert turned.effect == -found.effect
    shuffled = list(differences)
    random.shuffle(shuffled)
    assert signed_ranks(shuffled) == found
    assert found.smallest_p <= found.p <= 1
    assert -1 <= found.effect <= 1
    assert signed_ranks(np.cbrt(differences)).num_equal == found.num_equal


@settings(max_examples=40, deadline=None)
@given(MANY, st.floats(0.002, 50))
def test_scale_does_not_matter(differences, factor):
    assert signed_ranks(np.array(differences) * factor) == signed_ranks(differences)


def test_thousands_of_pairs_are_exact_and_the_approximation_joins_on():
    """Above 1000 pairs the counts are halved on the way so as to fit float64."""
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(0.05, 1, 1100), 3)
    values = values[values != 0]
    exact, rough = signed_ranks(values[:1080]), wilcoxon(values[:1080], method="asymptotic", correction=True)
    assert exact.method == "exact"
    assert exact.p == pytest.approx(rough.pvalue, rel=0.01)
    many = signed_ranks(rng.normal(0.05, 1, EXACT_UP_TO + 1))
    assert many.method == "normal approximation"
    assert signed_ranks(np.full(1200, 0.5)).p == pytest.approx(0, abs=1e-300)
    assert p_text(signed_ranks(np.full(1200, 0.5)).p) == "< 1e-300"


def test_the_approximation_is_near_the_exact_p(monkeypatch):
    values = np.random.default_rng(3).normal(0.1, 1, 400)
    exact = signed_ranks(values)
    monkeypatch.setattr("autosam3d.evaluation.statistics.EXACT_UP_TO", 10)
    assert signed_ranks(values).p == pytest.approx(exact.p, rel=0.02)


@pytest.mark.parametrize("bad", [[math.nan], [0.1, math.inf]])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        signed_ranks(bad)
    with pytest.raises(ValueError, match="finite"):
        spread(bad)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(p_values, random):
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, len(p_values) * p) for p, a in zip(p_values, adjusted, strict=True))
    assert [adjusted[i] for i in sorted(range(len(p_values)), key=p_values.__getitem__)] == sorted(adjusted)
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


def scores(shift: float = 0.0, cases: int = 6, organs: int = 3, seed: int = 0) -> dict[tuple[str, str], float]:
    rng = np.random.default_rng(seed)
    return {(f"case_{c}", f"organ_{o}"): float(rng.uniform(0.4, 0.8)) + shift * (1 + c + 6 * o)
            for c in range(cases) for o in range(organs)}


def compared(**kwargs) -> Comparison:
    found = compare(("ours", [scores(0.001)]), ("theirs", [scores()]), measure="Dice", **kwargs)
    assert found is not None
    return found


def test_the_unit_of_pairs_is_cases_or_organs_and_the_interval_is_always_over_cases():
    by_case, by_organ = compared(), compared(unit="case x organ")
    assert (by_case.test.num_pairs, by_organ.test.num_pairs) == (6, 18)
    assert by_case.difference == by_organ.difference
    assert by_case.difference.num_cases == 6
    assert by_case.difference.mean == pytest.approx(np.mean([0.001 * (1 + c + 6 * o) for c in range(6)
                                                             for o in range(3)]))
    assert (by_case.test.p, by_organ.test.p) == (2 / 2**6, 2 / 2**18)
    assert by_organ.better() and not by_case.better()


def test_organs_weigh_by_case_as_the_headline_mean_does():
    """A case with one organ counts as much as a case with three."""
    first = {("a", "liver"): 1.0, ("a", "spleen"): 0.0, ("a", "aorta"): 0.5, ("b", "liver"): 0.9}
    assert over_organs(first) == {"a": 0.5, "b": 0.9}
    found = compare(("x", [first]), ("y", [dict.fromkeys(first, 0.0)]), measure="Dice")
    assert found is not None and found.difference.mean == pytest.approx(0.7)


def test_pairs_that_one_lacks_are_left_out_and_counted():
    fewer = {key: value for key, value in scores().items() if key[0] != "case_5" and key != ("case_0", "organ_0")}
    by_case = compare(("ours", [scores(0.001)]), ("theirs", [fewer]), measure="Dice")
    by_organ = compare(("ours", [scores(0.001)]), ("theirs", [fewer]), measure="Dice", unit="case x organ")
    assert by_case is not None and (by_case.test.num_pairs, by_case.num_left_out) == (5, 1)
    assert by_organ is not None and (by_organ.test.num_pairs, by_organ.num_left_out) == (14, 4)
    assert "4 left out" in by_organ.sentence()
    assert compare(("a", [{("c", "o"): 1.0}]), ("b", [{("d", "o"): 1.0}]), measure="Dice") is None


def test_seeds_are_averaged_pair_by_pair_before_the_test():
    found = compare(("ours", [scores(0.001), scores(0.003)]), ("theirs", [scores()]), measure="Dice")
    mean = compare(("ours", [scores(0.002)]), ("theirs", [scores()]), measure="Dice")
    assert found is not None and mean is not None
    assert found.test == mean.test
    assert found.difference.mean == pytest.approx(mean.difference.mean)
    assert over_seeds([{("c", "o"): 0.0, ("d", "o"): 1.0}, {("c", "o"): 1.0}]) == {("c", "o"): 0.5}


def test_the_other_way_round_is_the_negative():
    there = compared()
    back = compare(("theirs", [scores()]), ("ours", [scores(0.001)]), measure="Dice")
    assert back is not None
    assert (back.test.p, back.test.effect) == (there.test.p, -there.test.effect)
    assert back.difference.mean == pytest.approx(-there.difference.mean)
    assert not back.better(1.0)


def test_a_family_is_adjusted_and_says_what_it_can_reach():
    family = with_holm([compared(), compared(unit="case x organ")])
    assert [c.p for c in family] == [0.03125, 2 * 2 / 2**18]
    assert [c.smallest_p for c in family] == [0.03125, 2 * 2 / 2**18]  # both tests can be as clear as that at once
    said = family[0].sentence()
    for part in ("ours minus theirs, Dice: +0.0", "95 % CI", "p = 0.0312", "after Holm over 2", "effect +1.00",
                 "6 pairs (case)", "smallest p possible 0.0312", "(exact)"):
        assert part in said, said


def test_wrong_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        compare(("a", []), ("b", [scores()]), measure="Dice")
    with pytest.raises(ValueError, match="finite"):
        compare(("a", [{("c", "o"): math.inf}]), ("b", [{("c", "o"): 1.0}]), measure="HD95")


def test_spread_over_seeds():
    found = spread([0.7, 0.8, 0.9])
    assert (found.mean, found.sd, found.low, found.high) == pytest.approx((0.8, 0.1, 0.7, 0.9))
    assert f"{found:.2f}" == "0.80 (SD 0.10, 0.70 to 0.90, 3 seeds)"
    assert f"{spread([0.7]):.2f}" == "0.70 (one seed)"
    with pytest.raises(ValueError, match="one a seed"):
        spread([])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_intervals_hold_their_mean_and_move_with_it(values):
    assume(max(values) - min(values) > 1e-6)
    found, moved = estimate(values), estimate([v + 1 for v in values])
    assert found is not None and moved is not None and found.low is not None and found.high is not None
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert moved.low == pytest.approx(found.low + 1)
    assert moved.mean == pytest.approx(found.mean + 1)


def test_an_interval_covers_as_often_as_it_says():
    """Means of 20 draws: 95 % intervals hold the true mean in about 92 to 95 of 100 (a percentile bootstrap is a
    little narrow at this size)."""
    rng = np.random.default_rng(1)
    hits = sum(bool(e and e.low is not None and e.high is not None and e.low <= 0.5 <= e.high)
               for e in (estimate(rng.uniform(0, 1, 20)) for _ in range(150)))
    assert 0.88 * 150 <= hits <= 150 * 0.985
