"""Models on disk: bit-exact, whole or absent, and nothing that was changed is loaded."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import autosam3d.checkpoints.checkpoint as checkpoint_module
from autosam3d.checkpoints.checkpoint import (
    LoadedModel,
    attach_sam,
    load_model,
    load_strictly,
    pack_model,
    read_checkpoint,
    save_checkpoint,
)
from autosam3d.checkpoints.model_file import content_sha256, find_checkpoint, read_meta
from autosam3d.errors import CheckpointError, ResourceError, UsageError
from autosam3d.io.files import sha256_of
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.autosam.sam_weights import frozen_names
from autosam3d.recipes.recipe import Recipe
from mini_run import mini_recipe, write_sam

META: dict[str, Any] = {"kind": "model", "contains": "all", "recipe": mini_recipe().as_dict(), "sam": None, "epoch": 1,
                        "metrics": {"val_dice": 0.5}}


def tensors(seed: int = 0, size: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(size, 3, generator=generator),
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=generator).t(),
    }


def weights_path(json_path: Path) -> Path:
    return json_path.parent / json.loads(json_path.read_text())["weights"]["file"]


def fails(action: Callable[[], Any], *codes: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        action()
    assert caught.value.code in codes, caught.value
    assert caught.value.exit_code == 4
    return caught.value


def network_of(recipe: Recipe, seed: int = 0) -> AutoSam:
    torch.manual_seed(seed)
    network = AutoSam(recipe.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small checkpoint; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "best.json", tensors(), META)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy")) / "best.json"


# ---- round trip ----


def test_round_trip_is_bit_exact(copy: Path) -> None:
    read = read_checkpoint(copy)
    for name, tensor in tensors().items():
        back = read.tensors[name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert back.reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
    assert read.tensors.keys() == tensors().keys()
    assert {key: read.meta[key] for key in META} == json.loads(json.dumps(META))
    path = weights_path(copy)
    assert read.meta["weights"] == {"file": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size}
    assert path.name == f"best-{sha256_of(path)[:16]}.safetensors"


def test_equal_content_gives_equal_files(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.json", tensors(), META)
    assert (tmp_path / "best.json").read_bytes() == (saved / "best.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in saved.iterdir())


def test_keys_that_are_numbers_and_tuples_survive_the_hash(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.json", tensors(), META | {"metrics": {2: (1, 2.5), 10: None}})
    assert read_meta(tmp_path / "m.json")["metrics"] == {"2": [1, 2.5], "10": None}


# ---- damage ----


def test_every_flipped_byte_of_the_weights_is_refused(copy: Path) -> None:
    path = weights_path(copy)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in sorted({0, 8, len(whole) - 1, *random.integers(0, len(whole), 50).tolist()}):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        fails(lambda: read_checkpoint(copy), "HASH")
    path.write_bytes(whole)
    read_checkpoint(copy)


def test_every_truncation_of_the_weights_is_refused(copy: Path) -> None:
    path = weights_path(copy)
    whole = path.read_bytes()
    for length in {0, 1, 8, len(whole) - 1, *np.random.default_rng(1).integers(0, len(whole), 20).tolist()}:
        path.write_bytes(whole[:length])
        fails(lambda: read_checkpoint(copy), "CORRUPT")
    path.write_bytes(whole + b"\0")
    fails(lambda: read_checkpoint(copy), "CORRUPT")


def test_every_changed_byte_of_the_json_is_refused_or_harmless(copy: Path) -> None:
    whole = copy.read_bytes()
    meaning = read_meta(copy)
    random = np.random.default_rng(2)
    refused = 0
    for place in random.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        copy.write_bytes(changed)
        try:
            assert read_meta(copy) == meaning  # white space became other white space
        except CheckpointError as error:
            assert error.code in ("CORRUPT", "HASH", "VERSION")
            refused += 1
    assert refused > 290


def test_every_truncation_of_the_json_is_refused(copy: Path) -> None:
    whole = copy.read_bytes()
    for length in {0, 1, len(whole) - 3, *np.random.default_rng(3).integers(0, len(whole) - 2, 20).tolist()}:
        copy.write_bytes(whole[:length])
        fails(lambda: read_checkpoint(copy), "CORRUPT")


@pytest.mark.parametrize("content", [
    b"[]", b"null", b"{}", b'{"weights": [], "recipe": {}}', b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 100000,
    b'{"weights": {}, "recipe": ' + b"1" * 5000 + b"}",
])
def test_a_json_that_is_something_else_is_refused(copy: Path, content: bytes) -> None:
    copy.write_bytes(content)
    fails(lambda: read_checkpoint(copy), "CORRUPT", "VERSION")


def test_a_json_of_gigabytes_is_not_read(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    fails(lambda: read_checkpoint(copy), "CORRUPT")


def test_a_pipe_is_not_waited_for(copy: Path) -> None:
    copy.unlink()
    os.mkfifo(copy)
    fails(lambda: load_model(copy), "CORRUPT")


def rewrite(json_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What an attacker or a later version could write: the JSON's own hash is right."""
    meta = json.loads(json_path.read_text())
    change(meta)
    meta["sha256"] = content_sha256(meta)
    json_path.write_text(json.dumps(meta))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(copy: Path, version: Any) -> None:
    rewrite(copy, lambda meta: meta.update(format=version))
    assert "upgrade" in fails(lambda: read_checkpoint(copy), "VERSION").remedy


@pytest.mark.parametrize("name", [
    "../best-0123456789abcdef.safetensors", "/etc/passwd", "best.safetensors", "", None, 7, ".",
    "a/best-0123456789abcdef.safetensors", "best-0123456789abcdef.safetensors\n",
    "best-0123456789abcdef.safetensors\0",
])
def test_a_weight_file_elsewhere_is_refused(copy: Path, name: Any) -> None:
    rewrite(copy, lambda meta: meta["weights"].update(file=name))
    fails(lambda: read_checkpoint(copy), "MODEL_PATH")


def test_a_link_and_a_missing_weight_file_are_refused(copy: Path, saved: Path) -> None:
    path = weights_path(copy)
    path.unlink()
    fails(lambda: read_checkpoint(copy), "CORRUPT")
    path.symlink_to(saved / path.name)
    fails(lambda: read_checkpoint(copy), "CORRUPT")


def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_hash(copy: Path) -> None:
    path = weights_path(copy)
    huge_header = (1 << 62).to_bytes(8, "little") + b"{}"
    for content in (b"", b"\x80\x02cos\nsystem\n", huge_header, path.read_bytes()[:-4]):
        path.write_bytes(content)
        rewrite(copy, lambda meta: meta["weights"].update(sha256=sha256_of(path), bytes=path.stat().st_size))
        fails(lambda: read_checkpoint(copy), "CORRUPT")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    bad = tensors()
    bad["b"][2] = value
    save_checkpoint(tmp_path / "best.json", bad, META)
    assert "b holds" in fails(lambda: read_checkpoint(tmp_path / "best.json"), "NONFINITE").fault


# ---- strict loading ----


def test_wrong_names_and_shapes_are_listed() -> None:
    network = network_of(mini_recipe())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    names = list(state)
    del state[names[0]]
    state["foreign.weight"] = torch.zeros(1)
    state[names[5]] = torch.zeros(2, 2)
    error = fails(lambda: load_strictly(network, state, set(names), Path("m.json")), "MISMATCH")
    assert f"missing {names[0]}" in error.fault and "unexpected foreign.weight" in error.fault
    assert f"{names[5]} has shape (2, 2)" in error.fault
    fourth = fails(lambda: load_strictly(network, {}, set(names), Path("m.json")), "MISMATCH")
    assert f"and {len(names) - 3} more" in fourth.fault
    assert all(network.state_dict()[name].equal(before[name]) for name in names)  # nothing was half loaded


def test_a_recipe_of_another_network_is_refused(tmp_path: Path) -> None:
    network = network_of(mini_recipe())
    for change in ({"model__neck_dim": 16}, {"labels__organs": ["liver"], "labels__side_pairs": []}):
        meta = META | {"recipe": mini_recipe(**change).as_dict()}
        save_checkpoint(tmp_path / "best.json", network.state_dict(), meta)
        fails(lambda: load_model(tmp_path), "MISMATCH")


def test_a_recipe_that_is_not_valid_is_a_models_fault(copy: Path) -> None:
    rewrite(copy, lambda meta: meta["recipe"]["model"].update(neck_dim=-1))
    assert "a width from 1 to 4096, got -1" in fails(lambda: load_model(copy), "MISMATCH").fault
    rewrite(copy, lambda meta: meta.update(recipe={"name": "mini"}))
    fails(lambda: load_model(copy), "MISMATCH")
    rewrite(copy, lambda meta: meta.update(recipe=[1]))
    fails(lambda: load_model(copy), "CORRUPT")


@pytest.mark.parametrize("change", [{"neck_dim": 1_000_000}, {"adapter_dim": 10**8}, {"head_dim": 10**6}])
def test_a_recipe_of_absurd_sizes_takes_no_memory(copy: Path, change: dict[str, int]) -> None:
    rewrite(copy, lambda meta: meta["recipe"]["model"].update(change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(lambda: load_model(copy), "MISMATCH")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# ---- loss of work ----


def test_killed_between_weights_and_json_the_old_one_stands(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_checkpoint(copy)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_text_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(copy, tensors(1), META)
    monkeypatch.undo()
    after = read_checkpoint(copy)
    assert after.meta == before.meta and after.tensors["a.weight"].equal(before.tensors["a.weight"])
    save_checkpoint(copy, tensors(2), META)
    assert len(list(copy.parent.glob("*.safetensors"))) == 1 and len(list(copy.parent.iterdir())) == 2


@pytest.mark.parametrize("moment", ["write_tensors", "tensors_sha256"])
def test_killed_while_weights_are_written_the_old_one_stands(copy: Path, monkeypatch: pytest.MonkeyPatch,
                                                             moment: str) -> None:
    listing = sorted(p.name for p in copy.parent.iterdir())

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(copy, tensors(1), META)
    monkeypatch.undo()
    assert read_checkpoint(copy).tensors["a.weight"].equal(tensors()["a.weight"])
    save_checkpoint(copy, tensors(), META)
    assert sorted(p.name for p in copy.parent.iterdir()) == listing


def test_old_weight_files_go_and_named_ones_stay(copy: Path) -> None:
    folder = copy.parent
    last, previous = folder / "last.json", folder / "previous.json"
    for seed in range(4):
        save_checkpoint(last, tensors(seed), META, previous=previous)
    stranger = folder / "last-not-ours.safetensors"
    stranger.touch()
    save_checkpoint(last, tensors(4), META, previous=previous)
    assert stranger.exists()
    for path, seed in ((last, 4), (previous, 3), (copy, 0)):
        assert read_checkpoint(path).tensors["a.weight"].equal(tensors(seed)["a.weight"])
    assert len(list(folder.glob("*.safetensors"))) == 4


def test_previous_never_names_the_weights_of_last(tmp_path: Path) -> None:
    # An epoch that ends right after a periodic save is saved again: two names of one file would be no safety.
    last, previous = tmp_path / "last.json", tmp_path / "previous.json"
    for seed, epoch in ((0, 0), (1, 0), (1, 1), (1, 2)):
        save_checkpoint(last, tensors(seed), META | {"epoch": epoch}, previous=previous)
    assert weights_path(last) != weights_path(previous)
    assert read_checkpoint(previous).tensors["a.weight"].equal(tensors(0)["a.weight"])
    assert read_meta(last)["epoch"] == 2


def test_a_full_disk_leaves_the_old_one_and_says_how_much_is_needed(copy: Path) -> None:
    before = {p.name: p.read_bytes() for p in copy.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ResourceError) as caught:
            save_checkpoint(copy, {"a": torch.zeros(100_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "NO_SPACE" and "400072 bytes needed" in caught.value.fault
    assert {p.name: p.read_bytes() for p in copy.parent.iterdir()} == before


def test_a_folder_below_a_file_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    save_checkpoint(tmp_path / "best.json", network_of(mini_recipe()).state_dict(), META)
    with pytest.raises(UsageError) as caught:
        pack_model(tmp_path, tmp_path / "file" / "packed")
    assert caught.value.code == "OUTPUT_PATH"


# ---- SAM beside the checkpoint ----


@pytest.fixture(scope="module")
def tuned_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, AutoSam]:
    """A model trained on a SAM file, as `train` saves it: the run folder, the SAM file, the network."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = mini_recipe()
    network = network_of(recipe)
    source = attach_sam(network, None, write_sam(folder / "sam.safetensors"))
    frozen = set(frozen_names(network))
    kept = {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}
    (folder / "run").mkdir()
    save_checkpoint(folder / "run" / "best.json", kept, META | {"contains": "tuned", "sam": vars(source)})
    return folder / "run", folder / "sam.safetensors", network.eval()


def outputs(model: LoadedModel | AutoSam) -> Tensor:
    network = model.network if isinstance(model, LoadedModel) else model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return network(torch.randn(1, 1, 16, 16, 16, generator=generator))


def test_a_tuned_model_takes_its_sam_from_where_it_lay(tuned_only: tuple[Path, Path, AutoSam]) -> None:
    run, sam, network = tuned_only
    loaded = load_model(run)
    assert outputs(loaded).equal(outputs(network)) and loaded.recipe == mini_recipe()
    assert loaded.sha256 == sha256_of(weights_path(run / "best.json")) and loaded.metrics == {"val_dice": 0.5}
    assert not loaded.network.training
    stored = load_file(weights_path(run / "best.json"))
    assert not set(stored) & set(frozen_names(network))
    assert sum(t.numel() for t in stored.values()) < 0.5 * sum(p.numel() for p in network.parameters())
    assert Path(read_meta(run / "best.json")["sam"]["source"]) == sam.resolve()


def test_the_sam_file_is_known_by_its_hash(tuned_only: tuple[Path, Path, AutoSam], tmp_path: Path) -> None:
    run, sam, network = tuned_only
    moved = Path(shutil.copy(sam, tmp_path / "elsewhere.safetensors"))
    assert outputs(load_model(run, sam=moved)).equal(outputs(network))
    other = write_sam(tmp_path / "other.safetensors", seed=1)
    assert "--sam" in fails(lambda: load_model(run, sam=other), "HASH").remedy
    moved.write_bytes(moved.read_bytes()[:-10])
    fails(lambda: load_model(run, sam=moved), "CORRUPT")
    fails(lambda: load_model(run, sam=tmp_path / "absent.pth"), "NO_SAM")


def test_a_sam_file_that_is_gone_names_the_way_out(tuned_only: tuple[Path, Path, AutoSam], tmp_path: Path) -> None:
    run = Path(shutil.copytree(tuned_only[0], tmp_path / "run"))
    rewrite(run / "best.json", lambda meta: meta["sam"].update(source=str(tmp_path / "gone.pth")))
    assert "--sam" in fails(lambda: load_model(run), "NO_SAM").remedy


def test_a_packed_model_needs_no_other_file(tuned_only: tuple[Path, Path, AutoSam], tmp_path: Path) -> None:
    run, sam, network = tuned_only
    moved = Path(shutil.copy(sam, tmp_path / "sam.safetensors"))
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    rewrite(copied / "best.json", lambda meta: meta["sam"].update(source=str(tmp_path / "gone.pth")))
    packed = pack_model(copied, tmp_path / "packed", sam=moved)
    moved.unlink()
    assert packed == tmp_path / "packed" / "model.json"
    assert outputs(load_model(tmp_path / "packed")).equal(outputs(network))
    again = pack_model(packed, tmp_path / "again")
    assert weights_path(again).name == weights_path(packed).name
    assert read_meta(packed)["metrics"] == {"val_dice": 0.5}


def test_a_model_trained_from_scratch_needs_no_sam(tmp_path: Path) -> None:
    network = network_of(mini_recipe()).eval()
    save_checkpoint(tmp_path / "best.json", network.state_dict(), META)
    assert outputs(load_model(tmp_path)).equal(outputs(network))
    patch = np.zeros((1, 1, 16, 16, 16), np.float32)
    predictor = load_model(tmp_path).predictor
    assert predictor.patch_size == (16, 16, 16) and predictor.num_outputs == 3
    np.testing.assert_allclose(predictor.predict(patch).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_training_state_loads_as_the_model_that_would_be_kept(tmp_path: Path, averaged: bool,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    own, average = (network_of(mini_recipe(), seed).eval() for seed in (1, 2))
    state = {f"model.{n}": t for n, t in own.state_dict().items()}
    if averaged:
        state |= {f"average.{n}": t for n, t in average.state_dict().items()}
    state["optimizer.step.apg.x"] = torch.tensor(1.0)
    save_checkpoint(tmp_path / "last.json", state, META | {"kind": "training"})
    assert outputs(load_model(tmp_path)).equal(outputs(average if averaged else own))
    assert "no best checkpoint yet" in caplog.text


# ---- which file is meant ----


def test_a_folder_means_its_best_then_packed_then_last(tmp_path: Path) -> None:
    for name in ("last.json", "model.json", "best.json"):
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name
    assert find_checkpoint(tmp_path / "last.json") == tmp_path / "last.json"


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    for path in (tmp_path, tmp_path / "absent", tmp_path / "weights.pth"):
        fails(lambda path=path: find_checkpoint(path), "NO_MODEL")


def test_foreign_safetensors_do_not_count_as_ours(tmp_path: Path) -> None:
    recipe = replace(mini_recipe(), name="other")
    foreign = tmp_path / "best-0000000000000000.safetensors"
    save_file({"x": torch.zeros(3)}, foreign)
    save_checkpoint(tmp_path / "best.json", tensors(), META | {"recipe": recipe.as_dict()})
    assert not foreign.exists()  # it has the name of an old weight file of this very checkpoint
    assert read_meta(tmp_path / "best.json")["recipe"]["name"] == "other"
