"""Training in this process: a run that was stopped anywhere ends as one that was not, and what else a run promises."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import autosam3d.checkpoints.checkpoint as checkpoint_module
import autosam3d.checkpoints.tensor_file as tensor_file_module
import autosam3d.data.cache as cache_module
import autosam3d.data.entries as entries_module
import autosam3d.training.objective as objective_module
import autosam3d.training.run as run_module
import autosam3d.training.state as state_module
import autosam3d.training.train as train_module
from autosam3d.checkpoints.checkpoint import load_model, read_checkpoint
from autosam3d.checkpoints.model_file import content_sha256
from autosam3d.data.augment import augment
from autosam3d.data.cache import cache_cases
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.errors import (
    CheckpointError,
    RecipeError,
    ResourceError,
    UsageError,
    VolumeError,
)
from autosam3d.geometry.preprocess import prepare_ct
from autosam3d.io import read_ct, write_ct
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.autosam.sam_weights import convert_sam_state, frozen_names
from autosam3d.models.build import build_network
from autosam3d.models.spec import NetworkSpec, ResUnetSpec, SwinUnetrSpec
from autosam3d.recipes.recipe import Recipe, dump_recipe
from autosam3d.training.losses import SegmentationLoss, dice_ce_loss
from autosam3d.training.optimizer import parameter_groups
from autosam3d.training.run import Observer, Run, build_fabric
from autosam3d.training.schedule import learning_rate
from autosam3d.training.stopping import Interrupted, StopRequest
from autosam3d.training.train import TrainResult, train
from autosam3d.volume import Volume
from mini_run import VAL, log_rows, mini_recipe, weights_of, write_mini_dataset, write_sam

# 3 epochs of 3 steps, validated after the second and the third; saved after steps 2, 4, 6, 8 and each validation.
RECIPE = mini_recipe(sampling__patches_per_volume=2, train__batch_size=3, train__save_every_steps=2)
EMA = mini_recipe(sampling__patches_per_volume=2, train__batch_size=3, train__save_every_steps=2, optim__ema=0.9,
                  optim__per_step=True, train__batch_dice=True)
STEPS = 9


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def cases(folder: Path) -> CaseSet:
    return open_dataset(write_mini_dataset(folder / "data"), RECIPE)


@pytest.fixture(scope="module")
def sam(folder: Path) -> Path:
    return write_sam(folder / "sam.safetensors")


@pytest.fixture(scope="module")
def start(folder: Path, cases: CaseSet) -> Callable[..., TrainResult]:
    def start(recipe: Recipe, run: Path, observer: Observer | None = None, **options: Any) -> TrainResult:
        return train(recipe, cases, run, device="cpu", cache_dir=folder / "cache", observer=observer, **options)

    return start


@pytest.fixture(scope="module")
def whole(folder: Path, start: Callable[..., TrainResult]) -> Path:
    """A run that nothing disturbed."""
    result = start(RECIPE, folder / "whole")
    assert result == TrainResult(None, 3, result.best_dice, result.seconds)
    return folder / "whole"


@pytest.fixture(scope="module")
def whole_ema(folder: Path, start: Callable[..., TrainResult], sam: Path) -> Path:
    """The same with SAM weights and an average of the tuned ones."""
    start(EMA, folder / "whole_ema", sam=sam)
    return folder / "whole_ema"


def at_step(step: int, action: Callable[[], None]) -> Observer:
    return Observer(on_step=lambda done, total, values: action() if done == step else None)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """A kill -9 from inside: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


def demand_equal(run: Path, expected: Path) -> None:
    for name in ("best", "last"):
        assert weights_of(run, name) == weights_of(expected, name)
    assert log_rows(run) == log_rows(expected)
    assert (run / "validation.csv").read_text() == (expected / "validation.csv").read_text()
    for name in ("best", "last"):
        mine, other = (json.loads((r / f"{name}.json").read_text()) for r in (run, expected))
        for meta in (mine, other):
            meta.pop("sha256")
            meta.get("progress", {}).pop("seconds", None)
        assert mine == other


# ---- stopping, killing, resuming ----


def test_a_run_can_be_repeated_to_the_bit(whole: Path, start: Callable[..., TrainResult], tmp_path: Path) -> None:
    start(RECIPE, tmp_path / "run")
    demand_equal(tmp_path / "run", whole)


def test_stopped_by_signals_and_resumed_is_as_if_never_stopped(
    whole_ema: Path, sam: Path, start: Callable[..., TrainResult], tmp_path: Path
) -> None:
    stops = [
        at_step(1, terminate),  # in the middle of an epoch
        at_step(3, terminate),  # at its end
        Observer(on_validation=lambda done, total: terminate() if done == 1 else None),  # inside the validation
    ]
    for observer in stops:
        result = start(EMA, tmp_path / "run", observer, sam=sam)
        assert result.stopped_by == signal.SIGTERM
        assert not (tmp_path / "run" / "validation.csv").exists()
    for step in (7, 8):
        assert start(EMA, tmp_path / "run", at_step(step, terminate), sam=sam).stopped_by == signal.SIGTERM
    assert start(EMA, tmp_path / "run", sam=sam).stopped_by is None
    demand_equal(tmp_path / "run", whole_ema)


def test_killed_anywhere_and_resumed_is_as_if_never_killed(
    whole: Path, start: Callable[..., TrainResult], tmp_path: Path
) -> None:
    random = np.random.default_rng(5)
    kills = [at_step(int(step), kill) for step in sorted(random.choice(np.arange(1, STEPS + 1), 4, replace=False))]
    kills.insert(2, Observer(on_validation=lambda done, total: kill()))
    for observer in kills:
        try:
            start(RECIPE, tmp_path / "run", observer)
        except Killed:
            continue
    assert start(RECIPE, tmp_path / "run").epoch == 3
    demand_equal(tmp_path / "run", whole)


@pytest.mark.parametrize("function", ["write_text_atomic", "write_tensors"])
def test_killed_inside_every_save(function: str, whole: Path, start: Callable[..., TrainResult], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    # Each start dies in its third write: the best model and the state after it are two, so each start gets further.
    real = getattr(checkpoint_module, function)
    for _ in range(20):
        count = itertools.count()

        def dying(*args: Any, count: Iterator[int] = count, **options: Any) -> Any:
            if next(count) == 2:
                raise Killed
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, function, dying)
            try:
                result = start(RECIPE, tmp_path / "run")
            except Killed:
                continue
            assert result.epoch == 3
            break
    else:
        pytest.fail("the run never came to its end")
    demand_equal(tmp_path / "run", whole)
    stray = [p.name for p in (tmp_path / "run").iterdir() if ".tmp" in p.name]
    assert not stray


def test_a_finished_run_is_left_alone(whole: Path, start: Callable[..., TrainResult], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    result = start(RECIPE, run, Observer(on_step=lambda *_: pytest.fail("it trained on")))
    assert result.stopped_by is None and result.epoch == 3 and result.best_dice is not None
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_all_signals_stop_and_handlers_are_given_back(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    for number in (signal.SIGINT, signal.SIGUSR1):
        observer = Observer(on_step=lambda *_, number=number: os.kill(os.getpid(), number))
        assert start(RECIPE, tmp_path / "run", observer).stopped_by == number
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_signal_ends_at_once(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    def twice() -> None:
        terminate()
        terminate()

    with pytest.raises(KeyboardInterrupt):
        start(RECIPE, tmp_path / "run", at_step(3, twice))
    assert read_checkpoint(tmp_path / "run" / "last.json").meta["progress"]["global_step"] == 2


@pytest.mark.parametrize("where", ["forward", "backward", "validation"])
def test_a_stop_gives_up_the_pass_at_work(where: str, whole_ema: Path, sam: Path, start: Callable[..., TrainResult],
                                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each pass marks its way through the network: the first block, the decoder, and back to the first block.
    way: list[str] = []
    real = train_module.start_run

    def watched(*args: Any) -> Run:
        run = real(*args)

        def after_block(module: Any, arguments: Any, output: torch.Tensor) -> None:
            way.append("block" if module.training else "validation")
            if way.count("block" if where == "forward" else where) == 3:
                terminate()
            if output.requires_grad:
                output.register_hook(lambda _: way.append("gradient"))

        def after_decoder(module: Any, arguments: Any, output: torch.Tensor) -> None:
            way.append("decoder" if module.training else "validated")
            if where == "backward" and way.count("decoder") == 3:
                output.register_hook(lambda _: terminate())

        run.network.image_encoder.blocks[0].register_forward_hook(after_block)
        run.network.decoder.register_forward_hook(after_decoder)
        return run

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "start_run", watched)
        assert start(EMA, tmp_path / "run", sam=sam).stopped_by == signal.SIGTERM
    step = ["block", "decoder", "gradient"]
    assert way == {"forward": 2 * step + step[:1], "backward": 2 * step + step[:2],
                   "validation": 6 * step + 2 * ["validation", "validated"] + ["validation"]}[where]
    steps = 6 if where == "validation" else 2
    assert read_checkpoint(tmp_path / "run" / "last.json").meta["progress"]["global_step"] == steps
    assert len(log_rows(tmp_path / "run")) == 1 + steps
    start(EMA, tmp_path / "run", sam=sam)
    demand_equal(tmp_path / "run", whole_ema)


def test_what_is_saved_already_is_not_saved_again(start: Callable[..., TrainResult], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    real = state_module.save_checkpoint

    def signalled(path: Path, *args: Any, **options: Any) -> None:
        terminate()
        real(path, *args, **options)
        saves.append(read_checkpoint(path).meta["progress"]["global_step"])

    monkeypatch.setattr(state_module, "save_checkpoint", signalled)
    assert start(RECIPE, tmp_path / "run").stopped_by == signal.SIGTERM
    assert saves == [2]


def test_a_signal_that_comes_twice_is_one_request_among_several_processes() -> None:
    for echo_s, ended in ((0.0, True), (60.0, False)):
        stop = StopRequest(echo_s)
        with stop.listen():
            terminate()
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                assert ended
            else:
                assert not ended
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted):
            stop.demand_none()


@pytest.mark.parametrize("function", ["prepare_ct", "save_array"])
def test_a_case_at_work_is_given_up_at_once(function: str, cases: CaseSet, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"prepare_ct": cache_module, "save_array": entries_module}[function]
    real, calls = getattr(module, function), itertools.count()

    def endless(*args: Any) -> Any:
        if next(calls) == 4:  # the fifth case, or the second array of the second
            terminate()
            time.sleep(30)
        return real(*args)

    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(module, function, endless)
        result = train(RECIPE, cases, tmp_path / "run", device="cpu")
    assert result.stopped_by == signal.SIGTERM and time.monotonic() - started < 15
    cache = tmp_path / "run" / "cache"
    assert not [p for p in cache.rglob("*") if ".tmp" in p.name]
    made = {"prepare_ct": 4, "save_array": 1}[function]
    assert sorted(len(list(entry.iterdir())) for entry in cache.iterdir()) == [1] * (made == 1) + [4] * made
    assert len(list(cache.glob("*/info.json"))) == made
    prepared: list[int] = []
    monkeypatch.setattr(cache_module, "prepare_ct", lambda *args: prepared.append(1) or prepare_ct(*args))
    assert train(RECIPE, cases, tmp_path / "run", device="cpu").stopped_by is None
    assert len(prepared) == 6 - made


def test_stopped_while_cases_are_prepared(cases: CaseSet, tmp_path: Path) -> None:
    observer = Observer(on_cache=lambda done, total: terminate() if done == 2 else None)
    result = train(RECIPE, cases, tmp_path / "run", device="cpu", observer=observer)
    assert result.stopped_by == signal.SIGTERM and result.epoch == 0
    assert len(list((tmp_path / "run" / "cache").iterdir())) == 2


# ---- a folder that holds something else, or something damaged ----


def test_another_recipe_is_not_trained_in_the_same_folder(whole: Path, start: Callable[..., TrainResult]) -> None:
    with pytest.raises(UsageError) as caught:
        start(replace(RECIPE, optim=replace(RECIPE.optim, lr=1e-4)), whole)
    assert caught.value.code == "OTHER_RUN" and "lr: 0.0001" in caught.value.fault


@pytest.mark.parametrize("kept", [None, "last", "previous", "best"])
def test_a_run_that_never_saved_gives_way_to_another_recipe(kept: str | None, stopped: Path, whole: Path,
                                                            start: Callable[..., TrainResult]) -> None:
    shutil.copy(whole / "best.json", stopped / "best.json")
    for name in {"last", "previous", "best"} - {kept}:
        (stopped / f"{name}.json").unlink()
    other = mini_recipe(train__epochs=2)
    if kept is not None:
        with pytest.raises(UsageError) as caught:
            start(other, stopped)
        assert caught.value.code == "OTHER_RUN" and "--out" in caught.value.remedy
        return
    assert start(other, stopped).epoch == 2
    assert (stopped / "recipe.yaml").read_text() == dump_recipe(other)
    assert [row[1] for row in log_rows(stopped)[1:]] == ["1", "2", "3", "4"]  # nothing of the run before
    assert start(other, stopped).epoch == 2


def test_a_warm_up_as_long_as_the_training_is_refused(cases: CaseSet, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        train(mini_recipe(optim__warmup_epochs=3), cases, tmp_path / "run", device="cpu")
    assert caught.value.code == "BAD_VALUE" and not (tmp_path / "run").exists()


def test_a_damaged_recipe_file_is_not_taken_for_the_same_run(whole: Path, start: Callable[..., TrainResult],
                                                             tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError):
        start(RECIPE, run)


def test_other_sam_weights_are_refused(whole_ema: Path, whole: Path, start: Callable[..., TrainResult], sam: Path,
                                       tmp_path: Path) -> None:
    other = write_sam(tmp_path / "other.safetensors", seed=1)
    for run, recipe, given in ((whole_ema, EMA, other), (whole_ema, EMA, None), (whole, RECIPE, sam)):
        with pytest.raises(UsageError) as caught:
            start(recipe, run, sam=given)
        assert caught.value.code == "OTHER_SAM"
    moved = shutil.copy(sam, tmp_path / "moved.safetensors")
    assert start(EMA, whole_ema, sam=moved).epoch == 3


def test_other_scans_are_refused(folder: Path, start: Callable[..., TrainResult], whole: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder / "data", tmp_path / "data"))
    image = data / "imagesTr" / "c1_0000.nii.gz"
    volume = read_ct(image)
    write_ct(image, Volume(volume.voxels_hu + 5, volume.affine))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(VolumeError) as caught:
        train(RECIPE, open_dataset(data, RECIPE), run, device="cpu", cache_dir=folder / "cache")
    assert caught.value.code == "DATA_CHANGED"


@pytest.fixture
def stopped(start: Callable[..., TrainResult], tmp_path: Path) -> Path:
    """A run with a last and a previous state: stopped after step 5, previous is of step 4."""
    start(RECIPE, tmp_path / "run", at_step(5, terminate))
    return tmp_path / "run"


def damage_json(run: Path) -> None:
    path = run / "last.json"
    path.write_bytes(path.read_bytes()[:-200] + b"\xff")


def damage_weights(run: Path) -> None:
    path = run / json.loads((run / "last.json").read_text())["weights"]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_weights(run: Path) -> None:
    (run / json.loads((run / "last.json").read_text())["weights"]["file"]).unlink()


@pytest.mark.parametrize("damage", [damage_json, damage_weights, lose_weights])
def test_a_damaged_last_state_falls_back_to_the_one_before(damage: Callable[[Path], None], stopped: Path, whole: Path,
                                                           start: Callable[..., TrainResult],
                                                           caplog: pytest.LogCaptureFixture) -> None:
    damage(stopped)
    messages: list[str] = []
    observer = at_step(5, kill)  # and once more, before anything new is saved
    observer.on_message = messages.append
    with pytest.raises(Killed):
        start(RECIPE, stopped, observer)
    assert messages[0] == "resuming at epoch 2, step 4" and "last" in caplog.text
    for name in ("last", "previous"):
        assert read_checkpoint(stopped / f"{name}.json").meta["progress"]["global_step"] == 4
    start(RECIPE, stopped)
    demand_equal(stopped, whole)


def test_two_damaged_states_stop_the_run_and_nothing_is_overwritten(stopped: Path,
                                                                    start: Callable[..., TrainResult]) -> None:
    damage_json(stopped)
    (stopped / "previous.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in stopped.iterdir() if p.is_file()}
    with pytest.raises(CheckpointError) as caught:
        start(RECIPE, stopped)
    assert caught.value.code == "CORRUPT" and caught.value.exit_code == 4
    assert {p.name: p.read_bytes() for p in stopped.iterdir() if p.is_file()} == before


def test_a_model_renamed_to_a_state_is_refused(whole: Path, start: Callable[..., TrainResult], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "previous.json").unlink()
    shutil.copy(run / "best.json", run / "last.json")
    with pytest.raises(CheckpointError) as caught:
        start(RECIPE, run)
    assert caught.value.code == "KIND"


def test_another_number_of_processes_goes_on_at_the_same_crop(stopped: Path, start: Callable[..., TrainResult]) -> None:
    # As if three processes had made the two steps of the second epoch: six of one process, which are all it has.
    path = stopped / "last.json"
    meta = json.loads(path.read_text())
    assert meta["progress"]["step_in_epoch"] == 2
    meta["world_size"] = 3
    meta["sha256"] = content_sha256(meta)
    path.write_text(json.dumps(meta))
    seen: list[int] = []
    start(RECIPE, stopped, Observer(on_step=lambda done, total, values: seen.append(done)))
    assert len(seen) == 3  # only the third epoch is left


def test_a_full_disk_ends_the_run_and_what_was_saved_stays(whole: Path, start: Callable[..., TrainResult],
                                                           monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, count = tensor_file_module._chunks, itertools.count()

    def full(tensors: Any) -> Iterator[bytes | memoryview]:
        yield b"half"
        raise OSError(28, "No space left on device")

    def save(path: Path, tensors: Any) -> None:
        if next(count) < 2:
            return tensor_file_module.write_tensors(path, tensors)
        calls = itertools.count()
        with monkeypatch.context() as inner:  # the hash and the size are told first, then the file is written
            inner.setattr(tensor_file_module, "_chunks", lambda t: full(t) if next(calls) == 2 else real(t))
            return tensor_file_module.write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_tensors", save)
        with pytest.raises(ResourceError) as caught:
            start(RECIPE, tmp_path / "run")
    assert caught.value.code == "NO_SPACE" and caught.value.exit_code == 5
    assert not [p.name for p in (tmp_path / "run").iterdir() if ".tmp" in p.name]
    assert read_checkpoint(tmp_path / "run" / "last.json").meta["progress"]["global_step"] == 4
    start(RECIPE, tmp_path / "run")
    demand_equal(tmp_path / "run", whole)


def test_too_little_space_is_refused_before_any_work(start: Callable[..., TrainResult], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ResourceError) as caught:
        start(RECIPE, tmp_path / "run", Observer(on_cache=lambda *_: pytest.fail("cases were prepared")))
    assert caught.value.code == "NO_SPACE"
    assert "bytes needed" in caught.value.fault and "1000000 bytes free" in caught.value.fault
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(ResourceError, match=r"at least 4096 bytes needed \(4\.0 KiB\), 0 bytes free") as caught:
        start(RECIPE, tmp_path / "new")
    assert caught.value.where == str(tmp_path / "new") and not (tmp_path / "new").exists()


# ---- numbers that are not finite ----


def poisoned(steps: set[int]) -> Callable[..., SegmentationLoss]:
    count = itertools.count(1)

    def loss(*args: Any, **options: Any) -> SegmentationLoss:
        real = dice_ce_loss(*args, **options)
        return real._replace(total=real.total * float("nan")) if next(count) in steps else real

    return loss


def test_one_bad_step_is_skipped(start: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(objective_module, "dice_ce_loss", poisoned({2}))
    assert start(mini_recipe(train__epochs=2), tmp_path / "run").epoch == 2
    rows = log_rows(tmp_path / "run")
    assert [row[3] == "nan" for row in rows[1:]] == [False, True, False, False]
    assert caplog.text.count("step skipped") == 1
    load_model(tmp_path / "run")


def test_a_step_and_a_model_that_do_not_fit_say_so(
    start: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*given: object, **more: object) -> None:
        torch.empty(1 << 50)

    recipe = mini_recipe(train__epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(objective_module, "dice_ce_loss", too_large)
        with pytest.raises(ResourceError, match=r"a training step \(batch of 2, crops of 16 x 16 x 16") as caught:
            start(recipe, tmp_path / "run")
    assert caught.value.code == "MEMORY" and "train.batch_size" in caught.value.remedy
    assert start(recipe, tmp_path / "run").epoch == 1
    monkeypatch.setattr(checkpoint_module, "load_strictly", too_large)
    with pytest.raises(ResourceError, match="loading the model needs more memory") as caught:
        load_model(tmp_path / "run")
    assert caught.value.code == "MEMORY" and "best.json" in caught.value.where


def test_a_loss_that_stays_nan_stops_the_run_with_the_last_good_weights(
    start: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five in a row over the border of an epoch of three steps.
    recipe = mini_recipe(sampling__patches_per_volume=2, train__batch_size=3, optim__ema=0.9)
    monkeypatch.setattr(objective_module, "dice_ce_loss", poisoned(set(range(3, 30))))
    with pytest.raises(CheckpointError) as caught:
        start(recipe, tmp_path / "run")
    assert caught.value.code == "NONFINITE" and caught.value.exit_code == 4 and "step 7;" in caught.value.fault
    # The settings that it names are another run, so the remedy sends it to another folder.
    assert "new folder (--out)" in caught.value.remedy
    with pytest.raises(UsageError, match="--out"):
        start(replace(recipe, optim=replace(recipe.optim, lr=1e-4)), tmp_path / "run")
    state = read_checkpoint(tmp_path / "run" / "last.json")
    assert state.meta["progress"]["global_step"] == 6
    steps = {float(t) for name, t in state.tensors.items() if name.startswith("optimizer.step.")}
    assert steps == {2.0}  # two good ones
    load_model(tmp_path / "run")
    monkeypatch.undo()
    assert start(recipe, tmp_path / "run").epoch == 3  # what made it NaN is gone: it goes on


# ---- what is trained, and what is not ----


def test_frozen_weights_stay_sams_to_the_bit(start: Callable[..., TrainResult], sam: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    real = train_module.start_run
    monkeypatch.setattr(train_module, "start_run", lambda *args: runs.append(real(*args)) or runs[-1])
    start(replace(EMA, train=replace(EMA.train, epochs=2)), tmp_path / "run", sam=sam)
    [run] = runs
    frozen = frozen_names(run.network)
    original = convert_sam_state(load_file(sam), EMA.model)
    parameters = dict(run.network.named_parameters())
    assert len(frozen) > 40
    for name in frozen:
        assert parameters[name].grad is None and not parameters[name].requires_grad
        assert torch.equal(parameters[name], original[name])
    tuned = [p for name, p in parameters.items() if name not in frozen]
    assert all(p.grad is not None for p in tuned)
    norm = "image_encoder.blocks.0.norm1.weight"
    assert not torch.equal(parameters[norm], original[norm])  # SAM's norms are tuned
    for name in ("best", "last"):
        stored = read_checkpoint(tmp_path / "run" / f"{name}.json")
        assert stored.meta["contains"] == "tuned"
        assert not any(key.endswith(tuple(frozen)) for key in stored.tensors)


def test_the_kept_model_is_the_average_and_the_state_holds_both(whole_ema: Path) -> None:
    best = read_checkpoint(whole_ema / "best.json").tensors
    state = read_checkpoint(whole_ema / "last.json").tensors
    own = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    average = {n.removeprefix("average."): t for n, t in state.items() if n.startswith("average.")}
    assert own.keys() == average.keys() == best.keys()
    assert any(not own[name].equal(average[name]) for name in own)
    epoch = read_checkpoint(whole_ema / "best.json").meta["epoch"]
    if epoch == 2:  # the best is the last: then it is the average that the state holds
        assert all(best[name].equal(average[name]) for name in best)


def test_weights_not_frozen_are_trained_and_kept_whole(
    start: Callable[..., TrainResult], sam: Path, tmp_path: Path
) -> None:
    recipe = mini_recipe(train__freeze_sam=False, train__epochs=2, train__validate_every=2)
    start(recipe, tmp_path / "run", sam=sam)
    stored = read_checkpoint(tmp_path / "run" / "best.json")
    original = convert_sam_state(load_file(sam), recipe.model)
    qkv = "image_encoder.blocks.0.attn.qkv.weight"
    assert stored.meta["contains"] == "all" and not stored.tensors[qkv].equal(original[qkv])
    sam.rename(tmp_path / "hidden")
    try:
        assert load_model(tmp_path / "run").recipe == recipe  # no SAM file is needed
    finally:
        (tmp_path / "hidden").rename(sam)


def test_weight_decay_spares_norms_biases_and_tables(folder: Path) -> None:
    torch.manual_seed(0)
    network = AutoSam(RECIPE.model)
    bare, decayed = sorted(parameter_groups(network, RECIPE), key=lambda group: group["weight_decay"])
    assert decayed["weight_decay"] == 1e-5 and bare["weight_decay"] == 0
    names = {id(p): name for name, p in network.named_parameters()}
    spared = {names[id(p)] for p in bare["params"]}
    assert len(decayed["params"]) + len(bare["params"]) == len(names)
    for name, parameter in network.named_parameters():
        is_table = name.rpartition(".")[2] in ("pos_embed", "depth_embed", "rel_pos_d", "rel_pos_h", "rel_pos_w")
        assert (name in spared) == (parameter.ndim == 1 or is_table), name


@pytest.mark.parametrize("spec", [RECIPE.model, SwinUnetrSpec(num_outputs=3), ResUnetSpec(num_outputs=3)])
def test_the_last_layer_has_a_rate_of_its_own(spec: NetworkSpec) -> None:
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, head_lr=10.0))
    network = build_network(spec)
    head = {id(p) for group in parameter_groups(network, recipe) if group["scale"] == 10 for p in group["params"]}
    names = [name for name, p in network.named_parameters() if id(p) in head]
    assert names and all(".out." in f".{name}" for name in names)
    kernels = [p for p in network.parameters() if id(p) in head and p.ndim > 1]
    assert len(kernels) == 1 and spec.num_outputs in kernels[0].shape


# ---- learning ----


@pytest.mark.parametrize(("run", "recipe", "per_step"), [("whole", RECIPE, False), ("whole_ema", EMA, True)])
def test_the_logged_rate_is_the_schedules(
    run: str, recipe: Recipe, per_step: bool, request: pytest.FixtureRequest
) -> None:
    rows = log_rows(request.getfixturevalue(run))
    assert rows[0][:4] == ["epoch", "step", "lr", "loss"]
    expected = [learning_rate(e + (s / 3 if per_step else 0), 3, recipe.optim) for e in range(3) for s in range(3)]
    assert [row[:3] for row in rows[1:]] == [[str(i // 3), str(i + 1), f"{lr:.6g}"] for i, lr in enumerate(expected)]


LEARNING = mini_recipe(
    train__epochs=12, train__validate_every=12, train__save_every_steps=1000, sampling__patches_per_volume=2,
    sampling__foreground_share=1.0, model__fuse_stride=1, model__head_dim=12, optim__lr=1e-2,
    optim__schedule="constant", augment__rotate90_prob=0.0, augment__scale_prob=0.0, augment__shift_prob=0.0,
    augment__affine_prob=0.0, inference__importance="constant",
)


@pytest.fixture(scope="module")
def learnt(folder: Path, start: Callable[..., TrainResult]) -> tuple[Path, TrainResult]:
    """A run long enough to learn two blobs."""
    return folder / "learnt", start(LEARNING, folder / "learnt")


def test_an_easy_task_is_learnt(learnt: tuple[Path, TrainResult]) -> None:
    run, result = learnt
    losses = [float(row[3]) for row in log_rows(run)[1:]]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert result.best_dice is not None and result.best_dice > 0.4


def naive_dice(model: Any, voxels: np.ndarray, truth: np.ndarray) -> list[float]:
    """Dice per organ of a sliding window without overlap and without importance, written out."""
    sums, counts = np.zeros((3, *voxels.shape)), np.zeros(voxels.shape)
    for corner in itertools.product(*({0, n - 16} for n in voxels.shape)):
        here = tuple(slice(c, c + 16) for c in corner)
        with torch.no_grad():
            logits = model.network(torch.from_numpy(voxels[here].astype(np.float32))[None, None])
        sums[(slice(None), *here)] += logits.softmax(1)[0].numpy()
        counts[here] += 1
    predicted = (sums / counts).argmax(0)
    return [2 * np.sum((predicted == k) & (truth == k)) / (np.sum(predicted == k) + np.sum(truth == k)) for k in (1, 2)]


def test_validation_dice_is_what_an_independent_computation_gives(learnt: tuple[Path, TrainResult], cases: CaseSet,
                                                                  folder: Path) -> None:
    run, result = learnt
    model = load_model(run)
    cached = cache_cases(cases.val, LEARNING, folder / "cache")
    assert [case.name for case in cached] == list(VAL)
    table = np.array([naive_dice(model, np.asarray(case.voxels), np.asarray(case.labels)) for case in cached])
    assert table.min() > 0.1  # else nothing is proven
    assert result.best_dice == pytest.approx(table.mean(), abs=1e-6)
    organs = model.metrics["val_dice_per_organ"]
    assert [organs[name] for name in LEARNING.labels.organs] == pytest.approx(table.mean(0).tolist(), abs=1e-6)


def test_best_is_the_best_and_only_then_replaced(start: Callable[..., TrainResult], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    dices = iter([0.3, 0.7, 0.5, 0.7])
    monkeypatch.setattr(train_module, "validate", lambda run, cases: np.array([next(dices), np.nan]))
    recipe = mini_recipe(train__epochs=4, train__validate_every=1)
    result = start(recipe, tmp_path / "run")
    meta = read_checkpoint(tmp_path / "run" / "best.json").meta
    assert result.best_dice == 0.7 and meta["epoch"] == 1
    assert meta["metrics"] == {"val_dice": 0.7, "val_dice_per_organ": {"right_kidney": 0.7, "left_kidney": None}}
    lines = (tmp_path / "run" / "validation.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines[1:]] == ["0.3", "0.7", "0.5", "0.7"]


def test_without_validation_cases_the_last_epoch_is_kept(cases: CaseSet, folder: Path, tmp_path: Path) -> None:
    recipe = mini_recipe(train__epochs=2, train__validate_every=1)
    unvalidated = CaseSet(cases.folder, cases.train, (), ())
    result = train(recipe, unvalidated, tmp_path / "run", device="cpu", cache_dir=folder / "cache")
    assert result.best_dice is None
    best, last = (read_checkpoint(tmp_path / "run" / f"{name}.json") for name in ("best", "last"))
    assert best.meta["epoch"] == 1 and best.meta["metrics"] == {}
    assert all(tensor.equal(last.tensors[f"model.{name}"]) for name, tensor in best.tensors.items())
    assert not (tmp_path / "run" / "validation.csv").exists()


def test_fewer_validation_cases_on_request(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    observer = Observer(on_validation=lambda done, total: seen.append((done, total)))
    start(mini_recipe(train__epochs=1, train__val_cases=1), tmp_path / "run", observer)
    assert seen == [(1, 1)]


# ---- precision and devices ----


def test_bf16_trains_in_bf16_and_keeps_float32_weights(start: Callable[..., TrainResult], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    real = objective_module.dice_ce_loss

    def watch(logits: torch.Tensor, *args: Any, **options: Any) -> SegmentationLoss:
        loss = real(logits, *args, **options)
        seen.add(loss.total.dtype)
        return loss

    inner: set[torch.dtype] = set()
    monkeypatch.setattr(objective_module, "dice_ce_loss", watch)
    from autosam3d.models.autosam.encoder import Mlp

    forward = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x: inner.add((y := forward(self, x)).dtype) or y)
    start(mini_recipe(train__precision="bf16", train__epochs=1), tmp_path / "run")
    assert seen == {torch.float32} and inner == {torch.bfloat16}
    assert {t.dtype for t in read_checkpoint(tmp_path / "run" / "best.json").tensors.values()} == {torch.float32}


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_precision_follows_the_hardware(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "bf16_in_hardware", lambda kind: hardware and kind == "cpu")
    assert build_fabric("cpu", "auto")._precision.precision == ("bf16-mixed" if hardware else "32-true")
    assert build_fabric("cpu", "fp32")._precision.precision == "32-true"


@pytest.mark.parametrize("device", ["cuda:7", "tpu", "gpu", "cuda:-1", "cpu:x", ""])
def test_absent_devices_are_usage_errors(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_fabric(device, "auto")
    assert caught.value.code == "DEVICE"


def test_a_run_folder_at_or_below_a_file_is_refused(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="--out") as caught:
            start(RECIPE, run)
        assert caught.value.code == "OUTPUT_PATH"


def test_augmentation_is_part_of_training(start: Callable[..., TrainResult], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("autosam3d.data.crops.augment", lambda *args: calls.append(1) or augment(*args))
    start(mini_recipe(train__epochs=1), tmp_path / "run")
    assert len(calls) == 4
