"""Tuning SAM on slices: it learns, what is frozen stays, and a stopped run ends as one that was not."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import command_line
import tiny_sam
from autosam3d.checkpoints.model_file import read_meta
from autosam3d.data.folder import open_dataset
from autosam3d.errors import CheckpointError, UsageError, VolumeError
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.io import write_segmentation
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import load_slice_sam
from autosam3d.studies.slicewise.run import TuneSettings
from autosam3d.studies.slicewise.samples import collect_samples, make_batch, order_of_epoch
from autosam3d.studies.slicewise.tuning import tune
from autosam3d.training.losses import mask_loss
from autosam3d.training.run import Observer
from autosam3d.volume import Segmentation
from mini_run import LABELS, SHAPE, affine_of, log_rows, mini_recipe, weights_of, write_mini_dataset, write_recipe
from on_disk import demand_as_told

FRAMING = Framing(style="medsam", hu_window=HuWindow(low_hu=-160, high_hu=240))
SETTINGS = TuneSettings(framing=FRAMING, min_slice_px=20, min_case_vox=100, epochs=2, lr=1e-3, batch_size=8,
                        val_cases=1, save_every_steps=1)
RECIPE = mini_recipe()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", RECIPE)
    tiny_sam.write_pth(folder / "sam.pth")
    command_line.load_once("transformers.models.sam.modeling_sam")
    return folder


def run(folder: Path, out: Path, settings: TuneSettings = SETTINGS, observer: Observer | None = None):
    return tune(RECIPE, open_dataset(folder / "data", RECIPE), load_slice_sam(folder / "sam.pth"), out, settings,
                cache=folder / "cache", observer=observer)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nothing disturbed."""
    result = run(folder, folder / "whole")
    assert result.stopped_by is None and result.epoch == 2 and result.best_dice is not None
    return folder / "whole"


def test_the_loss_is_dice_of_squares_and_cross_entropy() -> None:
    masks = torch.zeros(2, 4, 4)
    masks[:, :2] = 1
    perfect = mask_loss(masks * 60 - 30, masks)
    assert perfect.total < 1e-4
    even = mask_loss(torch.zeros(2, 4, 4), masks)  # p = 0.5: overlap 4, squares 4 + 8
    assert float(even.dice) == pytest.approx(1 - 8 / 12, abs=1e-5)
    assert float(even.cross_entropy) == pytest.approx(np.log(2), abs=1e-6)
    # Each mask counts alike, however small.
    masks[1] = 0
    masks[1, 0, 0] = 1
    assert float(mask_loss(torch.zeros(2, 4, 4), masks).dice) == pytest.approx((4 / 12 + 1 - 1 / 5) / 2, abs=1e-4)


def test_samples_are_slices_with_an_organ_that_is_large_enough(folder: Path) -> None:
    cases = open_dataset(folder / "data", RECIPE).train
    encoder = SliceEncoder(load_slice_sam(folder / "sam.pth"), FRAMING, folder / "cache")
    few, many = (collect_samples(cases, encoder, LABELS, min_slice_px=px, min_case_vox=100) for px in (80, 5))
    assert 0 < len(few) < len(many)
    for sample in few:
        assert sample.organs and all(np.count_nonzero(sample.labels == o) >= 80 for o in sample.organs)
    order = [order_of_epoch(len(many), 0, epoch) for epoch in (0, 1)]
    assert sorted(order[0]) == list(range(len(many))) and (order[0] != order[1]).any()
    prompts = SETTINGS.training_prompts
    batches = [make_batch(many[:3], range(3), encoder, prompts, epoch) for epoch in (0, 0, 1)]
    assert torch.equal(batches[0].prompts, batches[1].prompts) and batches[0].masks.shape == (3, 32, 32)
    assert not torch.equal(batches[0].prompts, batches[2].prompts)
    for mask, (x0, y0, x1, y1) in zip(batches[0].masks, batches[0].prompts[:, 0].tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())  # pixels of 2 x 2 in the square
        assert rows.size and y0 - 2 <= 2 * rows.min() and 2 * rows.max() <= y1 + 2
        assert x0 - 2 <= 2 * columns.min() and 2 * columns.max() <= x1 + 2
    empty = folder / "empty.nii.gz"
    write_segmentation(empty, Segmentation(np.zeros(SHAPE, np.uint8), affine_of()), LABELS)
    with_empty = [replace(cases[0], label_path=empty), *cases]
    assert len(collect_samples(with_empty, encoder, LABELS, min_slice_px=80, min_case_vox=100)) == len(few)
    with pytest.raises(VolumeError, match=r"tune\.min_slice_px") as caught:
        collect_samples(cases, encoder, LABELS, min_slice_px=9999, min_case_vox=1)
    assert caught.value.code == "NO_SAMPLES"


@pytest.mark.soak
def test_tuning_lowers_the_loss_and_raises_dice(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, replace(SETTINGS, scope="full", epochs=12, lr=3e-3, save_every_steps=1000))
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    dice = [float(row["dice_mean"]) for row in csv.DictReader((tmp_path / "validation.csv").open())]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert result.best_dice is not None and result.best_dice > dice[0] + 0.2
    tuned = load_slice_sam(None, tuned=tmp_path)
    assert tuned.sha256 != tuned.sam.sha256 and tuned.encoder_sha256 == tuned.sha256


def test_with_the_encoder_frozen_the_rest_is_kept_and_put_onto_the_same_sam(folder: Path, whole: Path) -> None:
    base, tuned = load_slice_sam(folder / "sam.pth"), load_slice_sam(None, tuned=whole)
    assert tuned.encoder_sha256 == base.encoder_sha256 and tuned.sha256 != base.sha256
    before, after = base.network.state_dict(), tuned.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    meta = json.loads((whole / "best.json").read_text())
    assert meta["contains"] == "tuned" and "truth" in meta["note"]
    if meta["step"]:
        assert changed and all(name.startswith(("prompt_encoder.", "mask_decoder.")) for name in changed)
    other = tiny_sam.write_pth(folder / "other.pth", seed=5)
    with pytest.raises(CheckpointError) as caught:
        load_slice_sam(other, tuned=whole)
    assert caught.value.code == "HASH"
    with pytest.raises(UsageError, match="tuning of one"):
        tune(RECIPE, open_dataset(folder / "data", RECIPE), tuned, folder / "again", SETTINGS)


def demand_equal(out: Path, expected: Path) -> None:
    for name in ("best", "last"):
        assert weights_of(out, name) == weights_of(expected, name)
    assert log_rows(out) == log_rows(expected)
    assert (out / "validation.csv").read_text() == (expected / "validation.csv").read_text()


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [1, 4])
def test_a_killed_run_ends_as_one_that_was_not(steps: int, folder: Path, whole: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int, values: object) -> None:
        if done == steps:
            raise _Killed

    with pytest.raises(_Killed):
        run(folder, tmp_path, observer=Observer(on_step=kill))
    if steps > 2:  # the last state is damaged as well: the one before it is taken
        weights = tmp_path / json.loads((tmp_path / "last.json").read_text())["weights"]["file"]
        weights.write_bytes(weights.read_bytes()[:100])
    told: list[str] = []
    result = run(folder, tmp_path, observer=Observer(on_message=told.append))
    assert result.stopped_by is None
    assert steps == 1 or any("resuming" in text for text in told)
    demand_equal(tmp_path, whole)


def test_other_settings_another_sam_and_changed_data_are_refused(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(UsageError) as caught:
        run(folder, out, replace(SETTINGS, lr=2e-3))
    assert caught.value.code == "OTHER_RUN" and "lr" in str(caught.value)
    other = load_slice_sam(tiny_sam.write_pth(tmp_path / "other.pth", seed=5))
    with pytest.raises(UsageError, match="sam_sha256"):
        tune(RECIPE, open_dataset(folder / "data", RECIPE), other, out, SETTINGS, cache=folder / "cache")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "best.json").write_text("{}")
    with pytest.raises(UsageError, match="another run"):
        run(folder, tmp_path / "train")
    assert run(folder, out, replace(SETTINGS, epochs=2)).epoch == 2  # finished: nothing to do
    demand_equal(out, whole)


def arguments(folder: Path, out: Path, *more: str) -> list[str | Path]:
    return ["slicewise", "tune", folder / "mini.yaml", "--data", folder / "data", "--sam", folder / "sam.pth", "--out",
            out, "--prompt", "box", "--set", "tune.lr=1e-3", "--set", "tune.epochs=2", "--set", "tune.min_slice_px=20",
            "--set", "tune.min_case_vox=100", "--set", "tune.val_cases=1", "--cache", folder / "cache", "--device",
            "cpu", "--threads", "1", *more]


def test_minutes_bound_the_steps_and_not_the_validations(folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1000, minutes=1e-4)
    result = run(folder, tmp_path / "out", settings)
    assert result.step == 1 and result.stopped_by is None  # the validation before it took longer than the budget
    progress = read_meta(tmp_path / "out" / "last.json")["progress"]
    assert 0.006 <= progress["step_seconds"] < progress["seconds"]


def test_the_command_tunes_and_its_result_segments(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command_line.run(*arguments(folder, out))
    assert done.code == 0 and "best validation Dice" in done.out and "from the truth" in done.out, done.err
    assert weights_of(out, "last") == weights_of(whole, "last")
    demand_as_told("A tuning of SAM on slices", out, "best.json", "best-HASH.safetensors", "previous.json")
    assert {path.suffix for path in (folder / "cache").glob("??/*")} == {".embedding"}
    result = command_line.run("slicewise", "segment", folder / "mini.yaml", "--data", folder / "data", "--tuned", out,
                              "--part", "val", "--out", tmp_path / "labels", "--threads", "1", "--device", "cpu")
    assert result.code == 0 and result.out.count("wrote") == 2, result.err
    report = json.loads((tmp_path / "labels" / "c4.report.json").read_text())
    assert report["model"]["settings"]["prompts"]["kind"] == "box"
    assert report["model"]["settings"]["framing"]["style"] == "medsam"


def test_wrong_calls_of_the_command(folder: Path, tmp_path: Path) -> None:
    high = ("--set", "tune.min_slice_px=5000")
    command_line.run(*arguments(folder, tmp_path / "a", *high)).demand_error("NO_SAMPLES", 3)
    line = command_line.run(*arguments(folder, tmp_path / "a", "--set", "tune.lr=0")).demand_error("BAD_VALUE", 2)
    assert "--set: tune.lr: expected a positive number, got 0" in line
    line = command_line.run(*arguments(folder, tmp_path / "a", "--set", "tune.epoch=3")).demand_error("UNKNOWN_KEY", 2)
    assert "did you mean tune.epochs?" in line
    (tmp_path / "file").write_text("x")
    command_line.run(*arguments(folder, tmp_path / "file")).demand_error("OUTPUT_PATH", 2)
    assert not list((tmp_path / "a").glob("*.safetensors"))
