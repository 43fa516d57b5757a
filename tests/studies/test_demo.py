"""The demo from end to end with a tiny network; a second call keeps what is there, a stopped one goes on."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from autosam3d.data import phantom
from autosam3d.recipes.recipe import load_recipe
from autosam3d.studies import demo
from autosam3d.training.train import Observer, TrainResult
from command_line import contents

TINY = ("train.epochs=1", "optim.warmup_epochs=0", "sampling.patches_per_volume=1", "model.patch_size=[16, 32, 32]",
        "train.val_overlap=0", "model.head_dim=8", "model.fuse_stride=2", "inference.overlap=0")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("NUM_TRAIN", 2), ("NUM_VAL", 1), ("NUM_TEST", 1)):
        monkeypatch.setattr(demo, name, number)
    coarse = partial(phantom.make_phantom, shape=(32, 64, 64), spacing_mm=(7.5, 5.25, 5.25))
    monkeypatch.setattr(phantom, "make_phantom", coarse)
    monkeypatch.setattr(demo, "load_recipe", lambda name: load_recipe(name, TINY))


def test_a_second_demo_says_what_it_keeps_and_does_nothing_twice(tmp_path: Path) -> None:
    messages: list[str] = []
    stages: dict[str, list[tuple[int, int]]] = {}
    observer = replace(Observer(), on_message=messages.append)

    def show(stage: str, done: int, total: int) -> None:
        stages.setdefault(stage, []).append((done, total))

    first = demo.run_demo(tmp_path, observer, show)
    assert first.stopped_by is None and "1 case: Dice " in first.summary
    assert list(stages) == ["making phantoms", "segmenting phantom_003 (1 of 1)", "evaluating", "drawing the report",
                            "drawing the cases"]
    for steps in stages.values():  # each ends, and each moves
        assert steps[-1][0] == steps[-1][1] > 0 and steps == sorted(steps)
    assert not any("already" in message for message in messages)
    before = contents(tmp_path)
    assert {"report.html", "scores.csv", "scores.json", "phantom_003.png"} <= set(before)

    messages.clear()
    stages.clear()
    second = demo.run_demo(tmp_path, observer, show)
    assert second.summary.partition("\nopen")[0] == first.summary.partition("\nopen")[0]
    assert [m for m in messages if "already" in m] == [
        f"4 phantoms in {tmp_path / 'data'} were there already",
        f"{tmp_path / 'run'} is trained already: the model is used as it is",
        "1 of 1 scans were segmented by this model already",
    ]
    assert not any(stage.startswith("segmenting") for stage in stages)
    after = contents(tmp_path)
    assert {name for name in set(after) ^ set(before) if "tensorboard" not in name} == set()
    for name in before:
        if name.startswith(("data/", "predictions/")) or "best" in name:
            assert after[name] == before[name], name


def test_a_stopped_training_is_not_segmented_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda *_, **__: TrainResult(signal.SIGINT, 0, None, 0.0))
    result = demo.run_demo(tmp_path, Observer(), lambda *_: None)
    assert result.stopped_by == signal.SIGINT
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
