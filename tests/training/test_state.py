"""The state of a training on disk: its layout is that of the versions before, and a damaged one falls back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autosam3d.checkpoints.model_file import content_sha256
from autosam3d.errors import CheckpointError, VolumeError
from autosam3d.io.files import sha256_of
from autosam3d.training.state import Trained, read_state, save_state

KIND = "slicewise-training"
POSITION = {"epoch": 1, "step_in_epoch": 2, "global_step": 6, "best_dice": 0.5, "seconds": 3.0}
PLACE = {"kind": KIND, "recipe": {}, "progress": POSITION, "data_sha256": "ab"}


def trained(average: bool = False) -> Trained:
    """A network with a frozen bias, and an AdamW that has not stepped yet."""
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    tuned = {"weight": network.weight.data}
    optimizer = torch.optim.AdamW([network.weight])
    return Trained(network, tuned, optimizer, {"weight": torch.zeros(2, 3)} if average else {})


def tensors_of_before() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("model.weight", "average.weight", "optimizer.exp_avg.weight", "optimizer.exp_avg_sq.weight")
    steps = {"optimizer.step.weight": torch.tensor(6.0)}
    return {name: torch.rand(2, 3, generator=generator) for name in names} | steps


def write_by_hand(folder: Path, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """A state as its layout says, file by file, with nothing of the code that writes states."""
    staged = folder / "staged"
    save_file(tensors, staged)
    digest = sha256_of(staged)
    weights = staged.rename(folder / f"{name}-{digest[:16]}.safetensors")
    entry = {"file": weights.name, "sha256": digest, "bytes": weights.stat().st_size}
    whole = {"format": 1, **meta, "weights": entry}
    whole["sha256"] = content_sha256(whole)
    (folder / f"{name}.json").write_text(json.dumps(whole))
    return weights


@pytest.mark.parametrize("average", [False, True])
def test_a_state_of_the_versions_before_is_taken_up_and_written_again_alike(average: bool, tmp_path: Path) -> None:
    tensors = {name: t for name, t in tensors_of_before().items() if average or not name.startswith("average.")}
    weights = write_by_hand(tmp_path, "last", tensors, PLACE)
    saved = read_state(tmp_path, KIND)
    assert saved is not None and saved.meta["progress"] == POSITION and saved.path == tmp_path / "last.json"
    there = trained(average)
    bias = there.network.bias.clone()
    there.load(saved.tensors, saved.path)
    assert torch.equal(there.network.weight, tensors["model.weight"]) and torch.equal(there.network.bias, bias)
    moments = there.optimizer.state[there.network.weight]
    assert torch.equal(moments["exp_avg"], tensors["optimizer.exp_avg.weight"]) and moments["step"] == 6

    again = tmp_path / "again"
    again.mkdir()
    save_state(again, there.tensors(), PLACE)
    assert (again / weights.name).read_bytes() == weights.read_bytes()
    written, before = (json.loads((folder / "last.json").read_text()) for folder in (again, tmp_path))
    assert set(written) - set(before) == {"autosam3d"}  # which version wrote it
    assert all(written[key] == before[key] for key in set(before) - {"sha256"})


def test_tensors_of_another_network_are_refused(tmp_path: Path) -> None:
    write_by_hand(tmp_path, "last", {"model.weight": torch.zeros(2, 4)}, PLACE)
    saved = read_state(tmp_path, KIND)
    assert saved is not None
    with pytest.raises(CheckpointError, match=r"shape \(2, 4\) instead of \(2, 3\)") as caught:
        trained().load(saved.tensors, saved.path)
    assert caught.value.code == "MISMATCH"


def test_a_damaged_last_state_falls_back_and_is_not_kept_as_the_previous_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"model.weight": torch.full((2, 3), float(step))}, PLACE | {"epoch": step})
    damaged = tmp_path / json.loads((tmp_path / "last.json").read_text())["weights"]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    saved = read_state(tmp_path, KIND)
    assert saved is not None and saved.path.name == "previous.json" and saved.meta["epoch"] == 1
    saved.keep_as_last()
    save_state(tmp_path, {"model.weight": torch.full((2, 3), 3.0)}, PLACE | {"epoch": 3})
    assert json.loads((tmp_path / "previous.json").read_text())["epoch"] == 1
    assert not damaged.exists() and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_no_state_none_that_can_be_read_and_one_of_another_training(tmp_path: Path) -> None:
    assert read_state(tmp_path, KIND) is None
    write_by_hand(tmp_path, "last", tensors_of_before(), PLACE | {"kind": "training"})
    (tmp_path / "previous.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a state of kind 'slicewise-training'") as caught:
        read_state(tmp_path, KIND)
    assert caught.value.code == "KIND" and caught.value.where == str(tmp_path)


def test_other_data_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path, {"model.weight": torch.zeros(2, 3)}, PLACE)
    saved = read_state(tmp_path, KIND)
    assert saved is not None
    saved.demand_same_data("ab", "slices")
    with pytest.raises(VolumeError, match="expected the slices that the run began with") as caught:
        saved.demand_same_data("cd", "slices")
    assert caught.value.code == "DATA_CHANGED"
