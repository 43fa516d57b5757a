"""A run goes on with other settings where they change no step of it, and with no others."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.errors import AutoSam3dError
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.training.run import Observer
from autosam3d.training.run_folder import FREE
from autosam3d.training.train import TrainResult, train
from mini_run import mini_recipe, weights_of, write_mini_dataset

# 2 epochs of 2 steps.
OTHER = {"num_workers": 1, "save_every_steps": 50, "validate_every": 1, "val_cases": 1, "val_overlap": 0.5,
         "max_nan_steps": 2}


def recipe_of(**changes: Any) -> Recipe:
    return mini_recipe(train__epochs=2, **changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("going_on")


@pytest.fixture(scope="module")
def cases(folder: Path) -> CaseSet:
    return open_dataset(write_mini_dataset(folder / "data"), recipe_of())


def go(recipe: Recipe, cases: CaseSet, run: Path, observer: Observer | None = None) -> TrainResult:
    return train(recipe, cases, run, device="cpu", cache_dir=run.parent / "cache", observer=observer)


@pytest.fixture(scope="module")
def stopped(folder: Path, cases: CaseSet) -> Path:
    """Stopped after step 1 of 4."""
    stop = Observer(on_step=lambda done, total, values: signal.raise_signal(signal.SIGTERM) if done == 1 else None)
    assert go(recipe_of(), cases, folder / "stopped", stop).stopped_by == signal.SIGTERM
    return folder / "stopped"


@pytest.fixture(scope="module")
def whole(folder: Path, cases: CaseSet) -> str:
    """What the last state's weights are where nothing disturbs the run."""
    go(recipe_of(), cases, folder / "whole")
    return weights_of(folder / "whole", "last")


def test_the_free_settings_are_those_of_this_page() -> None:
    assert set(FREE) == set(OTHER) <= set(recipe_of().as_dict()["train"])


@pytest.mark.parametrize("key", [*OTHER, "all"])
def test_a_setting_that_changes_no_step_may_change(key: str, stopped: Path, whole: str, cases: CaseSet, folder: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    run = Path(shutil.copytree(stopped, folder / key))
    changes = OTHER if key == "all" else {key: OTHER[key]}
    recipe = recipe_of(**{f"train__{name}": value for name, value in changes.items()})
    assert go(recipe, cases, run).epoch == 2
    assert weights_of(run, "last") == whole
    assert load_recipe(run / "recipe.yaml") == recipe
    said = {name for name in OTHER if f"train.{name} is" in caplog.text}
    assert said == {"validate_every", "val_cases", "val_overlap"} & set(changes)
    assert go(recipe, cases, run).epoch == 2  # and goes on from there
    assert go(recipe_of(), cases, run).epoch == 2  # and back


@pytest.mark.parametrize(("change", "line"), [
    ({"optim__lr": 1e-3}, "lr: 0.001"), ({"train__batch_size": 1}, "batch_size: 1"), ({"train__seed": 1}, "seed: 1"),
    ({"train__epochs": 3}, "epochs: 3"), ({"sampling__balance_organs": True}, "balance_organs: true"),
    ({"augment__flip_prob": 0.4}, "flip_prob: 0.4"), ({"train__ce_weight": 0.5}, "ce_weight: 0.5"),
])
def test_whatever_changes_the_weights_is_refused_by_its_name(change: dict[str, Any], line: str, stopped: Path,
                                                            cases: CaseSet) -> None:
    kept = (stopped / "recipe.yaml").read_bytes()
    for more in ({}, {"train__num_workers": 1}):
        with pytest.raises(AutoSam3dError) as caught:
            go(mini_recipe(**{"train__epochs": 2, **change, **more}), cases, stopped)
        assert caught.value.code == "OTHER_RUN" and line in caught.value.fault
    assert (stopped / "recipe.yaml").read_bytes() == kept


def test_other_validation_files_are_still_refused(stopped: Path, cases: CaseSet) -> None:
    kept = (stopped / "recipe.yaml").read_bytes()
    fewer = replace(cases, val=cases.val[:1])
    with pytest.raises(AutoSam3dError) as caught:
        go(recipe_of(), fewer, stopped)
    assert caught.value.code == "DATA_CHANGED"
    other = replace(cases, train=cases.train[:-1])
    with pytest.raises(AutoSam3dError) as caught:
        go(recipe_of(train__val_cases=1), other, stopped)
    assert caught.value.code == "DATA_CHANGED" and (stopped / "recipe.yaml").read_bytes() == kept


def test_other_threads_go_on_with_a_word(stopped: Path, cases: CaseSet, folder: Path,
                                         caplog: pytest.LogCaptureFixture) -> None:
    run = Path(shutil.copytree(stopped, folder / "threads"))
    assert json.loads((run / "last.json").read_text())["threads"] == 1
    torch.set_num_threads(2)
    try:
        assert go(recipe_of(), cases, run).epoch == 2
    finally:
        torch.set_num_threads(1)
    assert "saved with 1 threads and goes on with 2" in caplog.text
