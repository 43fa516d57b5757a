"""What a step costs is measured in a process of its own, and what does not fit harms nobody."""

from __future__ import annotations

import io

import pytest

from autosam3d.studies.reproduce import cost as cost_module
from autosam3d.studies.reproduce.cost import TrainingCost, measure_training
from autosam3d.studies.slots import find_slots
from mini_run import mini_recipe


@pytest.mark.slow
def test_a_step_is_measured_and_one_that_does_not_fit_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = measure_training(mini_recipe(), "cpu", 1)
    assert cost is not None and cost.step_seconds > 0 and cost.window_seconds > 0 and cost.memory_bytes > 1 << 27
    assert cost.machine.endswith("1 threads")
    huge = mini_recipe(model__patch_size=[512, 512, 512], train__batch_size=64)
    assert measure_training(huge, "cpu", 1) is None


def test_only_a_cpu_is_measured_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA maps far more addresses than there is memory: a limit on them would let no GPU begin."""
    called: list[str] = []
    monkeypatch.setattr(cost_module, "_demand_no_more_than_there_is", lambda: called.append("limited"))
    monkeypatch.setattr("sys.stdin", io.StringIO("no recipe"))
    for device, expected in (("cuda", []), ("cpu", ["limited"])):
        with pytest.raises(ValueError):
            cost_module.in_child(device, "1")
        assert called == expected


def test_epochs_of_a_budget() -> None:
    cost = TrainingCost(0.5, 0.1, 1, "x")
    assert [cost.epochs_in(minutes, 12) for minutes in (0.01, 0.1, 0.2, 1)] == [1, 1, 2, 10]


def test_a_machine_without_gpus_has_one_slot() -> None:
    (slot,) = find_slots("cpu", 3)
    assert (slot.device, slot.threads, slot.visible_gpu) == ("cpu", 3, None)
