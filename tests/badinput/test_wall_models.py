"""The wall: damaged, foreign and hostile model files against the real command line (rows 84 to 90).

Nothing in a model file is run, nothing is believed that is not covered by a hash, and no output appears.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_nifti
import pytest
import torch
from safetensors.torch import load_file, save_file

from autosam3d.checkpoints.model_file import content_sha256
from autosam3d.io.files import sha256_of
from command_line import mini_model, run, unchanged, write_model
from mini_run import mini_recipe, write_mini_dataset, write_recipe, write_sam

Damage = Callable[[Path, Path], Any]
"""Given a model's JSON and its weight file."""


def edit(change: Callable[[dict[str, Any]], Any], signed: bool = True) -> Damage:
    """Change the JSON; `signed` makes its own hash right again, as an attacker would."""

    def damage(model: Path, weights: Path) -> None:
        meta = json.loads(model.read_text("utf-8"))
        change(meta)
        if signed:
            meta["sha256"] = content_sha256(meta)
        model.write_text(json.dumps(meta), "utf-8")

    return damage


def replace_weights(write: Callable[[Path], Any]) -> Damage:
    """Other weights with a JSON that vouches for them."""

    def damage(model: Path, weights: Path) -> None:
        write(weights)
        entry = {"sha256": sha256_of(weights), "bytes": weights.stat().st_size}
        edit(lambda meta: meta["weights"].update(entry))(model, weights)

    return damage


def change_tensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def write(weights: Path) -> None:
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)

    return replace_weights(write)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x20
    path.write_bytes(content)


def climb(model: Path, weights: Path) -> None:
    """The weight file lies elsewhere, where a path with .. leads."""
    (model.parent.parent / "elsewhere").mkdir()
    weights.rename(model.parent.parent / "elsewhere" / weights.name)
    edit(lambda meta: meta["weights"].update(file=f"../elsewhere/{weights.name}"))(model, weights)


def link(model: Path, weights: Path) -> None:
    weights.rename(model.parent.parent / "elsewhere.safetensors")
    weights.symlink_to(model.parent.parent / "elsewhere.safetensors")


def header_of_exabytes(weights: Path) -> None:
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def tensor_of_terabytes(weights: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))


def set_recipe(path: str, value: object) -> Damage:
    def change(meta: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        node = meta["recipe"]
        for section in sections:
            node = node[section]
        node[key] = value

    return edit(change)


MODELS: dict[str, tuple[Damage, str]] = {
    "84_json_cut": (lambda m, w: cut(m, 0.6), "CORRUPT"),
    "84_json_empty": (lambda m, w: m.write_bytes(b""), "CORRUPT"),
    "84_json_text": (lambda m, w: m.write_text("a model"), "CORRUPT"),
    "84_json_list": (lambda m, w: m.write_text("[1, 2]"), "CORRUPT"),
    "84_json_not_utf8": (lambda m, w: m.write_bytes(b"\xff\xfe{}"), "CORRUPT"),
    "84_json_nested": (lambda m, w: m.write_text("[" * 100_000), "CORRUPT"),
    "84_json_huge": (lambda m, w: os.truncate(m, 100 << 20), "CORRUPT"),
    "84_weights_cut": (lambda m, w: cut(w, 0.5), "CORRUPT"),
    "84_weights_empty": (lambda m, w: w.write_bytes(b""), "CORRUPT"),
    "84_weights_missing": (lambda m, w: w.unlink(), "CORRUPT"),
    "84_weights_are_text": (replace_weights(lambda w: w.write_text("weights")), "CORRUPT"),
    "84_weights_a_folder": (lambda m, w: (w.unlink(), w.mkdir()), "CORRUPT"),
    "84_weights_a_fifo": (lambda m, w: (w.unlink(), os.mkfifo(w)), "CORRUPT"),
    "85_flip_in_numbers": (lambda m, w: flip(w, 0.7), "HASH"),
    "85_flip_in_header": (lambda m, w: flip(w, 0.0005), "HASH"),
    "85_recipe_edited": (edit(lambda meta: meta["recipe"]["preprocess"].update(subtract_hu=0.0), signed=False), "HASH"),
    "87_header_of_exabytes": (replace_weights(header_of_exabytes), "CORRUPT"),
    "87_tensor_of_terabytes": (replace_weights(tensor_of_terabytes), "CORRUPT"),
    "88_other_classes": (set_recipe("labels.organs", ["right_kidney", "left_kidney", "liver"]), "MISMATCH"),
    "88_other_width": (set_recipe("model.head_dim", 16), "MISMATCH"),
    "88_absurd_width": (set_recipe("model.head_dim", 10**9), "MISMATCH"),
    "88_other_recipe": (edit(lambda meta: meta.update(recipe={"name": "x"})), "MISMATCH"),
    "88_missing_tensor": (change_tensor(lambda t: t.pop(sorted(t)[0])), "MISMATCH"),
    "88_tensor_too_many": (change_tensor(lambda t: t.update(more=torch.zeros(3))), "MISMATCH"),
    "88_no_tensors": (change_tensor(lambda t: t.clear()), "MISMATCH"),
    "89_nan": (change_tensor(lambda t: t[sorted(t)[3]].fill_(float("nan"))), "NONFINITE"),
    "89_infinite": (change_tensor(lambda t: t[sorted(t)[3]].view(-1)[:1].fill_(float("inf"))), "NONFINITE"),
    "90_newer_format": (edit(lambda meta: meta.update(format=2)), "VERSION"),
    "90_format_is_text": (edit(lambda meta: meta.update(format="1")), "VERSION"),
    "90_path_climbs": (climb, "MODEL_PATH"),
    "90_path_absolute": (edit(lambda meta: meta["weights"].update(file="/etc/passwd")), "MODEL_PATH"),
    "90_path_is_a_number": (edit(lambda meta: meta["weights"].update(file=7)), "MODEL_PATH"),
    "90_link": (link, "CORRUPT"),
}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return make_nifti.ODD["00_good"][0](tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_refused(name: str, tmp_path: Path, scan: Path) -> None:
    damage, code = MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(mini_model(), model)
    damage(model / "best.json", next(model.glob("*.safetensors")))
    out = tmp_path / "out"
    for arguments in (("segment", model, scan, out), ("pack", model, out)):
        done = run(*arguments, limits={"CPU": 15})
        line = done.demand_error(code, 4)
        assert str(model) in line
        assert not out.exists()
    described = run("info", model)  # says what the JSON says, and refuses what is no such JSON
    assert described.code in (0, 4) and "Traceback" not in described.err


@pytest.mark.parametrize(("content", "expected"), [
    (None, "NO_MODEL"), ({}, "NO_MODEL"), ({"notes.txt": b"x"}, "NO_MODEL"), ({"best.json": b"{}"}, "CORRUPT"),
], ids=["absent", "empty", "something_else", "no_model"])
def test_a_folder_without_a_model_is_refused(
    content: dict[str, bytes] | None, expected: str, tmp_path: Path, scan: Path
) -> None:
    model = tmp_path / "model"
    if content is not None:
        model.mkdir()
        for name, text in content.items():
            (model / name).write_bytes(text)
    for arguments in (("segment", model, scan, tmp_path / "out"), ("pack", model, tmp_path / "out")):
        run(*arguments).demand_error(expected, 4)
    if content is not None:
        run("info", model).demand_error(expected, 4)
    run("segment", scan, scan, tmp_path / "out").demand_error("NO_MODEL", 4)
    assert not (tmp_path / "out").exists()


def test_a_network_that_answers_nan_is_refused(tmp_path: Path, scan: Path) -> None:
    """Finite weights whose activations overflow."""
    model = tmp_path / "model"
    model.mkdir()
    write_model(model)
    change_tensor(lambda t: [v.fill_(3e38) for k, v in t.items() if k.startswith("decoder")])(
        model / "best.json", next(model.glob("*.safetensors"))
    )
    run("segment", model, scan, tmp_path / "out").demand_error("NONFINITE", 4)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ SAM weight files


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def pickle_that_runs(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": Evil(canary)}))


def torch_zip_that_runs(path: Path, canary: Path) -> None:
    torch.save({"image_encoder.pos_embed": Evil(canary)}, path)


def torch_legacy_that_runs(path: Path, canary: Path) -> None:
    torch.save({"image_encoder.pos_embed": Evil(canary)}, path, _use_new_zipfile_serialization=False)


def zip_bomb(path: Path, canary: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(400 << 20) if name.endswith("data/0") else content)


def claims_more_than_it_holds(path: Path, canary: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.zeros(1).expand(1 << 40)}, path)


def wrong_architecture(path: Path, canary: Path) -> None:
    save_file({"conv1.weight": torch.ones(64, 3, 7, 7)}, path)


def numbers_not_finite(path: Path, canary: Path) -> None:
    write_sam(path)
    tensors = load_file(path)
    tensors["image_encoder.pos_embed"].fill_(float("nan"))
    save_file(tensors, path)


SAM_FILES: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
    "84_absent": ("sam.pth", lambda p, c: None, "NO_SAM"),
    "84_empty": ("sam.pth", lambda p, c: p.write_bytes(b""), "CORRUPT"),
    "84_text_safetensors": ("sam.safetensors", lambda p, c: p.write_text("these are no weights"), "CORRUPT"),
    "84_html": ("sam.pth", lambda p, c: p.write_text("<html>404</html>"), "CORRUPT"),
    "84_lfs_pointer": ("sam.pth", lambda p, c: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "CORRUPT"),
    "84_cut": ("sam.safetensors", lambda p, c: (write_sam(p), cut(p, 0.5)), "CORRUPT"),
    "84_cut_pth": ("sam.pth", lambda p, c: (torch.save({"a": torch.ones(999)}, p), cut(p, 0.7)), "CORRUPT"),
    "84_folder": ("sam.pth", lambda p, c: p.mkdir(), "NO_SAM"),
    "84_fifo": ("sam.pth", lambda p, c: os.mkfifo(p), "NO_SAM"),
    "85_flip_pth": ("sam.pth", lambda p, c: (torch.save({"a": torch.ones(9999)}, p), flip(p, 0.5)), "CORRUPT"),
    "86_pickle": ("sam.pth", pickle_that_runs, "UNSAFE"),
    "86_torch_zip": ("sam.pth", torch_zip_that_runs, "UNSAFE"),
    "86_torch_legacy": ("sam.pth", torch_legacy_that_runs, "UNSAFE"),
    "86_named_safetensors": ("sam.safetensors", torch_zip_that_runs, "CORRUPT"),
    "86_whole_module": ("sam.pth", lambda p, c: torch.save(torch.nn.Linear(2, 2), p), "UNSAFE"),
    "87_zip_bomb": ("sam.pth", zip_bomb, "UNSAFE"),
    "87_claims": ("sam.pth", claims_more_than_it_holds, "UNSAFE"),
    "88_wrong_architecture": ("sam.safetensors", wrong_architecture, "MISMATCH"),
    "88_wrong_architecture_pth": ("sam.pth", lambda p, c: torch.save({"conv1.weight": torch.ones(3)}, p), "MISMATCH"),
    "88_a_number": ("sam.pth", lambda p, c: torch.save(42, p), "MISMATCH"),
    "89_nan": ("sam.safetensors", numbers_not_finite, "NONFINITE"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("data") / "blobs")


@pytest.mark.parametrize("name", SAM_FILES)
def test_a_bad_sam_file_is_refused_and_never_run(name: str, tmp_path: Path, dataset: Path) -> None:
    file_name, make, code = SAM_FILES[name]
    path, canary = tmp_path / file_name, tmp_path / "canary"
    make(path, canary)
    idle = run("--version").peak_bytes
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    done = run("train", recipe, "--data", dataset, "--out", tmp_path / "run", "--sam", path, limits={"CPU": 20})
    line = done.demand_error(code, 4)
    assert str(path) in line and "weights_only" not in line
    assert not canary.exists()
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    assert done.peak_bytes < idle + (200 << 20)


def test_the_sam_file_of_a_model_must_be_the_one_it_was_trained_on(tmp_path: Path, dataset: Path, scan: Path) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=1))
    sam, other, model = write_sam(tmp_path / "sam.safetensors"), write_sam(tmp_path / "other.safetensors", seed=1), (
        tmp_path / "run")
    done = run("train", recipe, "--data", dataset, "--out", model, "--sam", sam)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    run("segment", model, scan, out, "--sam", other).demand_error("HASH", 4)
    sam.rename(tmp_path / "moved.safetensors")
    with unchanged(model):
        line = run("segment", model, scan, out).demand_error("NO_SAM", 4)
        assert "--sam" in line and not out.exists()
        run("segment", model, scan, out, "--sam", tmp_path / "moved.safetensors").demand_ok()
