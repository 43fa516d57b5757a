"""Which run a folder is of, and who trains there: one process at a time; file systems without locks stop none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosam3d.errors import UsageError
from autosam3d.training.run_folder import claim_run_folder, demand_same_run, hold_run_folder
from lock_holders import held_by_another, needs_locks

NAME, TEXT = "recipe.yaml", "name: mini\nlr: 0.1\n"


def claim(folder: Path, text: str = TEXT) -> None:
    claim_run_folder(folder, NAME, text)
    demand_same_run(folder, NAME, text)


def test_a_run_that_has_saved_nothing_gives_way_and_one_that_has_does_not(tmp_path: Path) -> None:
    claim(tmp_path)
    claim(tmp_path, TEXT.replace("0.1", "0.2"))
    claim(tmp_path)
    (tmp_path / "last.json").write_text("{}")
    claim(tmp_path)
    with pytest.raises(UsageError, match=r"expected 'lr: 0.1' as in its recipe\.yaml, got 'lr: 0.2'") as caught:
        claim(tmp_path, TEXT.replace("0.1", "0.2"))
    assert caught.value.code == "OTHER_RUN" and (tmp_path / NAME).read_text() == TEXT


@pytest.mark.parametrize("saved", ["last", "previous", "best"])
def test_a_folder_with_a_model_of_unknown_origin_is_left_alone(saved: str, tmp_path: Path) -> None:
    (tmp_path / f"{saved}.json").write_text("{}")
    with pytest.raises(UsageError, match="it holds another run") as caught:
        claim(tmp_path)
    assert caught.value.code == "OTHER_RUN" and [p.name for p in tmp_path.iterdir()] == [f"{saved}.json"]


def test_a_text_that_goes_on_longer_is_another(tmp_path: Path) -> None:
    claim(tmp_path)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(UsageError, match=r"expected 'nothing' as in its recipe\.yaml, got 'more: 1'"):
        claim(tmp_path, TEXT + "more: 1\n")
    with pytest.raises(UsageError, match="expected 'its line ends'"):
        claim(tmp_path, TEXT.rstrip("\n"))
    demand_same_run(tmp_path, NAME, TEXT + "more: 1\n", same=lambda there: there == TEXT)


def rank(number: int) -> Any:
    return SimpleNamespace(is_global_zero=number == 0)


@needs_locks
def test_a_second_training_is_told_who_is_there(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "run", "train.lock") as holder:
        with pytest.raises(UsageError) as caught, hold_run_folder(tmp_path / "run", rank(0)):
            pass
        assert caught.value.code == "LOCKED" and f"held by process {holder.pid} on " in caught.value.fault
        assert caught.value.remedy.endswith("name another folder with --out")
        with hold_run_folder(tmp_path / "run", rank(1)):  # what the first rank of its own run holds
            pass


@needs_locks
def test_without_locks_a_training_goes_on(tmp_path: Path, no_locks: None) -> None:
    with hold_run_folder(tmp_path / "run", rank(0)):
        assert (tmp_path / "run/train.lock").read_text().startswith("process ")
