"""A training whose words nobody can read goes on and ends as if it had been heard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autosam3d.checkpoints.checkpoint import read_checkpoint
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.training.run import Observer
from autosam3d.training.train import train
from mini_run import environment, mini_recipe, weights_of, write_mini_dataset, write_recipe

RECIPE = mini_recipe(train__epochs=2, train__validate_every=1, train__save_every_steps=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", RECIPE)
    return folder


@pytest.fixture(scope="module")
def cases(folder: Path) -> CaseSet:
    return open_dataset(folder / "data", RECIPE)


def lost(*_: Any) -> None:
    raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture(scope="module")
def heard(cases: CaseSet, folder: Path) -> str:
    """The weights of a run that nobody hindered from speaking."""
    train(RECIPE, cases, folder / "heard", device="cpu", cache_dir=folder / "cache")
    return weights_of(folder / "heard", "last")


def test_no_word_is_a_reason_to_stop(cases: CaseSet, folder: Path, heard: str) -> None:
    silent = Observer(on_cache=lost, on_step=lost, on_validation=lost, on_message=lost)
    assert train(RECIPE, cases, folder / "silent", device="cpu", cache_dir=folder / "cache", observer=silent).epoch == 2
    assert weights_of(folder / "silent", "last") == heard


def test_a_validation_is_told_once_it_is_saved(cases: CaseSet, folder: Path) -> None:
    run, told = folder / "told", []

    def on_message(text: str) -> None:
        told.append((text.split(":")[0], read_checkpoint(run / "last.json").meta["progress"]["epoch"]))

    train(RECIPE, cases, run, device="cpu", cache_dir=folder / "cache", observer=Observer(on_message=on_message))
    assert told == [("epoch 1", 1), ("epoch 2", 2)]


def test_a_fault_of_the_observers_own_is_not_hidden(cases: CaseSet, folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(RECIPE, cases, folder / "own", device="cpu", cache_dir=folder / "cache",
              observer=Observer(on_step=lambda done, total, values: print(1 / 0)))


@pytest.mark.parametrize("streams", ["full and unread", "closed"])
def test_the_command_ends_well_whatever_became_of_its_streams(streams: str, folder: Path, heard: str) -> None:
    run = folder / streams.replace(" ", "_")
    command = [sys.executable, "-c", "from autosam3d.cli.main import main; main()", "train", "mini.yaml", "--data",
               "data", "--cache", "cache", "--threads", "1", "--device", "cpu", "--out", str(run)]
    if streams == "closed":
        done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=folder, env=environment())
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, cwd=folder, env=environment(), stdout=writer, stderr=full)
        os.close(writer)
    assert done.returncode == 0
    assert weights_of(run, "last") == heard
    assert read_checkpoint(run / "last.json").meta["progress"]["epoch"] == 2
    assert len((run / "validation.csv").read_text().splitlines()) == 3
