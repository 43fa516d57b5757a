"""The learning rate: the printed values of the paper's public code, and the ends of the other schedules."""

from __future__ import annotations

import math

import pytest

from autosam3d.errors import RecipeError
from autosam3d.recipes.settings import Optim
from autosam3d.training.schedule import demand_full_rate, learning_rate

PAPER = Optim(lr=5e-4, warmup_epochs=5)


def test_paper_values() -> None:
    warm_up = [learning_rate(epoch, 200, PAPER) for epoch in range(5)]
    assert [f"{rate:.1e}" for rate in warm_up] == ["2.3e-08", "1.7e-07", "1.2e-06", "9.2e-06", "6.8e-05"]
    assert learning_rate(5, 200, PAPER) == 5e-4
    for epoch in (6, 50, 100, 199):
        assert learning_rate(epoch, 200, PAPER) == pytest.approx(5e-4 * (1 - epoch / 200) ** 0.9, rel=1e-12)


def test_rises_to_the_full_rate_then_falls() -> None:
    rates = [learning_rate(epoch, 200, PAPER) for epoch in range(200)]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == rates[5] and min(rates) > 0


def test_exponential_ends_at_a_hundredth() -> None:
    optim = Optim(lr=5e-4, warmup_epochs=5, schedule="exponential")
    assert learning_rate(5, 200, optim) == 5e-4
    assert learning_rate(200, 200, optim) == pytest.approx(5e-6)
    ratio = learning_rate(101, 200, optim) / learning_rate(100, 200, optim)
    assert ratio == pytest.approx(0.01 ** (1 / 195)) and f"{ratio:.4f}" == "0.9767"


def test_constant_after_the_warm_up() -> None:
    optim = Optim(lr=1e-3, warmup_epochs=2, schedule="constant")
    assert learning_rate(0, 10, optim) == pytest.approx(1e-3 * math.exp(-10))
    assert {learning_rate(epoch, 10, optim) for epoch in (2, 3, 9, 10)} == {1e-3}


def test_poly_is_nnu_nets() -> None:
    optim = Optim(lr=1e-2, warmup_epochs=0, schedule="poly")
    assert learning_rate(0, 1000, optim) == 1e-2
    for epoch in (1, 500, 999):
        assert learning_rate(epoch, 1000, optim) == pytest.approx(1e-2 * (1 - epoch / 1000) ** 0.9, rel=1e-12)


def test_cosine_rises_in_a_line_and_falls_to_nothing() -> None:
    optim = Optim(lr=1e-4, warmup_epochs=4, schedule="warmup_cosine")
    assert [learning_rate(e, 20, optim) for e in range(5)] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert learning_rate(12, 20, optim) == pytest.approx(5e-5)  # half-way down
    assert learning_rate(8, 20, optim) == pytest.approx(1e-4 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(20, 20, optim) == pytest.approx(0, abs=1e-20)
    falling = [learning_rate(e, 20, optim) for e in range(4, 21)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", ["exp_warmup_poly", "exponential", "constant", "poly", "warmup_cosine"])
def test_without_warm_up_it_starts_at_the_full_rate(schedule: str) -> None:
    optim = Optim(lr=1e-3, warmup_epochs=0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(0, 10, optim) == 1e-3


@pytest.mark.parametrize("schedule", ["exp_warmup_poly", "exponential", "constant", "warmup_cosine"])
@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_run_shorter_than_its_warm_up_has_finite_rates(schedule: str, epochs: int) -> None:
    optim = Optim(lr=1e-3, warmup_epochs=5, schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < learning_rate(e / 4, epochs, optim) <= 1e-3 for e in range(4 * epochs))


def test_fractions_of_epochs_lie_between_their_neighbours() -> None:
    for epoch in (0, 3, 7, 150):
        ends = sorted(learning_rate(e, 200, PAPER) for e in (epoch, epoch + 1))
        assert ends[0] < learning_rate(epoch + 0.5, 200, PAPER) < ends[1]


@pytest.mark.parametrize(("warmup_epochs", "epochs"), [(5, 5), (1, 1), (9, 3)])
def test_a_run_that_never_sees_the_full_rate_is_refused(warmup_epochs: int, epochs: int) -> None:
    optim = Optim(lr=1e-3, warmup_epochs=warmup_epochs)
    assert max(learning_rate(epoch, epochs, optim) for epoch in range(epochs)) < 1e-3
    with pytest.raises(RecipeError) as caught:
        demand_full_rate(optim, epochs)
    assert caught.value.exit_code == 2 and "optim.warmup_epochs" in caught.value.where
    longer = warmup_epochs + 1
    demand_full_rate(optim, longer)
    assert max(learning_rate(epoch, longer, optim) for epoch in range(longer)) == 1e-3
