"""Baselines in the one training loop: trained, resumed to the bit, kept without their side outputs, used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from autosam3d.checkpoints.checkpoint import load_model, read_checkpoint
from autosam3d.checkpoints.describe import describe_model
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.errors import UsageError
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct
from autosam3d.recipes.recipe import Recipe
from autosam3d.training.optimizer import state_bytes
from autosam3d.training.run import Observer, Run
from autosam3d.training.train import _seed_network, train
from mini_run import LABELS, log_rows, mini_recipe, weights_of, write_mini_dataset

NETWORKS: dict[str, dict[str, Any]] = {
    "nnunet": {"patch_size": [16, 16, 16], "channels": [4, 6, 8, 8],
               "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]},
    "unetr": {"patch_size": [16, 16, 16], "token_size": 8, "feature_size": 4, "hidden_dim": 8, "mlp_dim": 8,
              "num_heads": 2},
    "nnformer": {"patch_size": [16, 16, 16], "token_size": [2, 2, 2], "embed_dim": 4, "num_heads": [1, 2, 2],
                 "attn_windows": [3, 3, 3]},
}
SGD = {"optimizer": "sgd", "lr": 1e-2, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5, "decay_all": True,
       "schedule": "poly", "warmup_epochs": 0, "per_step": True, "clip_norm": 12.0, "ema": 0.9}
COSINE = {"lr": 1e-3, "decay_all": True, "schedule": "warmup_cosine", "warmup_epochs": 1, "clip_norm": 0.0}
DEEP = ("nnunet", "nnformer")


def recipe_of(network: str, **changes: Any) -> Recipe:
    deep = network in DEEP
    return mini_recipe(model={"network": network, **NETWORKS[network]}, optim=dict(SGD if deep else COSINE),
                       train__deep_supervision=deep, train__save_every_steps=2, **changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def cases(folder: Path) -> CaseSet:
    return open_dataset(write_mini_dataset(folder / "data"), mini_recipe())


@pytest.fixture(scope="module", params=list(NETWORKS))
def run(request: pytest.FixtureRequest, folder: Path, cases: CaseSet) -> tuple[str, Path]:
    """A run of three epochs of two steps, which nothing disturbed."""
    path = folder / request.param
    assert train(recipe_of(request.param), cases, path, device="cpu", cache_dir=folder / "cache").epoch == 3
    return request.param, path


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    run: tuple[str, Path], folder: Path, cases: CaseSet, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int, values: object) -> None:
        if done == 3:
            raise Killed

    network, whole = run
    recipe, again = recipe_of(network), tmp_path / "again"
    with pytest.raises(Killed):
        train(recipe, cases, again, device="cpu", cache_dir=folder / "cache", observer=Observer(on_step=kill))
    state = read_checkpoint(again / "last.json")
    assert state.meta["progress"]["global_step"] == 2
    moments = {name.split(".")[1] for name in state.tensors if name.startswith("optimizer.")}
    assert moments == ({"momentum_buffer"} if network in DEEP else {"exp_avg", "exp_avg_sq", "step"})
    train(recipe, cases, again, device="cpu", cache_dir=folder / "cache")
    for name in ("best", "last"):
        assert weights_of(again, name) == weights_of(whole, name)
    assert log_rows(again) == log_rows(whole)


def test_the_kept_model_has_no_side_outputs_and_segments(run: tuple[str, Path], cases: CaseSet) -> None:
    network, path = run
    best, state = (set(read_checkpoint(path / f"{name}.json").tensors) for name in ("best", "last"))
    side = {name for name in state if "side_outputs." in name}
    assert bool(side) == (network in DEEP)
    assert not any("side_outputs" in name for name in best)
    assert {f"model.{name}" for name in best} == {name for name in state - side if name.startswith("model.")}
    for source in (path, path / "last.json"):
        model = load_model(source)
        organs = segment(read_ct(cases.folder / "imagesTr" / "c4_0000.nii.gz"), model)
        assert organs.labels.shape == (24, 26, 28) and set(np.unique(organs.labels)) <= {0, 1, 2}
        assert model.predictor.activation_bytes(1) > 0
    text = describe_model(path)
    assert ("SGD 0.01, poly, deep supervision" in text) == (network in DEEP)
    assert ("with the outputs of deep supervision" in text) == (network in DEEP)


@pytest.mark.soak
def test_the_loss_falls(folder: Path, cases: CaseSet, tmp_path: Path) -> None:
    for network in NETWORKS:
        recipe = recipe_of(network, sampling__patches_per_volume=4, sampling__foreground_share=1.0, train__epochs=4,
                           train__val_cases=1)
        train(recipe, cases, tmp_path / network, device="cpu", cache_dir=folder / "cache")
        rows = (tmp_path / network / "log.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        losses = [float(row.split(",")[column]) for row in rows[1:]]
        third = len(losses) // 3
        assert np.mean(losses[-third:]) < 0.9 * np.mean(losses[:third]), network


def test_space_is_asked_for_sgds_one_moment(folder: Path, cases: CaseSet, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    needed: dict[str, int] = {}

    def remember(run: Run) -> None:
        weights = sum(t.nbytes for t in run.tuned.values())
        needed[run.recipe.optim.optimizer] = state_bytes(run.network, run.recipe) // weights
        raise UsageError("ENOUGH", "here", "seen", "none")

    monkeypatch.setattr("autosam3d.training.train.demand_space", remember)
    for name, optim in (("sgd", SGD), ("adamw", COSINE)):
        with pytest.raises(UsageError, match="seen"):
            recipe = mini_recipe(model={"network": "nnunet", **NETWORKS["nnunet"]}, optim=dict(optim))
            train(recipe, cases, tmp_path / name, device="cpu", cache_dir=folder / "cache")
    assert needed == {"sgd": 1, "adamw": 2}


def test_a_run_of_an_older_version_goes_on(folder: Path, cases: CaseSet, tmp_path: Path) -> None:
    """Its recipe lacks keys that are new since; their defaults are what it did."""
    recipe = mini_recipe(train__epochs=2)
    train(recipe, cases, tmp_path / "run", device="cpu", cache_dir=folder / "cache")
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    older = "".join(line for line in text.splitlines(True) if line.split(":")[0].strip() not in (
        "optimizer", "nesterov", "decay_all", "deep_supervision"))
    assert older.count("\n") == text.count("\n") - 4
    (tmp_path / "run" / "recipe.yaml").write_text(older)
    assert train(recipe, cases, tmp_path / "run", device="cpu", cache_dir=folder / "cache").epoch == 2
    with pytest.raises(UsageError) as caught:
        train(mini_recipe(train__epochs=2, optim__decay_all=True), cases, tmp_path / "run", device="cpu",
              cache_dir=folder / "cache")
    assert caught.value.code == "OTHER_RUN"
    assert json.loads((tmp_path / "run" / "last.json").read_text())["progress"]["epoch"] == 2
    assert recipe.labels == LABELS


def test_what_is_left_out_by_chance_depends_on_seed_step_and_rank_alone() -> None:
    """So a resumed run repeats it, and no two ranks leave out the same."""
    def drawn(seed: int, step: int, rank: int) -> list[float]:
        recipe = SimpleNamespace(model=SimpleNamespace(drop_path=0.2), train=SimpleNamespace(seed=seed))
        _seed_network(SimpleNamespace(recipe=recipe, position=SimpleNamespace(global_step=step),  # type: ignore[arg-type]
                                      fabric=SimpleNamespace(global_rank=rank)))
        return torch.rand(4).tolist()

    places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    first = [drawn(*place) for place in places]
    assert first == [drawn(*place) for place in places]
    assert len({tuple(values) for values in first}) == len(places)
