"""The order of cases in an epoch: every case once, as often as its dataset weighs, with fully drawn ones among them."""

from __future__ import annotations

import numpy as np
import pytest

from autosam3d.data.order import weighted_order, with_whole_cases


def test_equal_weights_show_every_case_equally_often() -> None:
    order = weighted_order([2.0] * 7, 21, np.random.default_rng(0))
    assert np.bincount(order).tolist() == [3] * 7 and order.tolist() != sorted(order)


def test_weights_say_how_often() -> None:
    weights = [1.0] * 6 + [3.0] * 2
    counts = np.zeros(8)
    for epoch in range(600):
        order = weighted_order(weights, 8, np.random.default_rng([5, epoch]))
        assert len(order) == 8
        counts += np.bincount(order, minlength=8)
    # Due an epoch: 8/12 for the first six, 24/12 for the others. Four standard deviations of 600 draws are 0.08.
    assert counts / 600 == pytest.approx([2 / 3] * 6 + [2.0] * 2, abs=0.08)


@pytest.mark.parametrize("whole_count", [1, 3, 12, 40])
def test_a_batch_or_its_neighbour_holds_a_fully_drawn_case(whole_count: int) -> None:
    whole = [index < whole_count for index in range(40)]
    random = np.random.default_rng(whole_count)
    order = random.permutation(40)
    changed = with_whole_cases(order, whole, 4, random)
    assert all(any(whole[case] for case in changed[start : start + 4]) for start in range(0, 40, 4))
    if whole_count >= 10:  # enough for every window: cases only trade places
        assert sorted(changed) == list(range(40))
    else:
        assert set(range(whole_count)) <= set(changed.tolist())
        assert len(set(changed.tolist()) & set(range(whole_count, 40))) == 40 - whole_count - (10 - whole_count)


def test_without_fully_drawn_cases_the_order_stays() -> None:
    order = np.arange(9)
    assert with_whole_cases(order, [False] * 9, 2, np.random.default_rng(0)) is order
