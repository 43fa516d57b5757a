"""Training: one plain loop. START with `train`, which is the whole run from top to bottom.

Everything random is drawn from (seed, epoch, position), so a run that was stopped anywhere and started again ends
with the same weights as one that was not. A stop gives up the step or the validation at work and saves what was
before it; several processes agree on it, between two steps and after each window of a validation.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosam3d.data.cache import CachedCase, demand_organs
from autosam3d.data.crops import CropDataset, CropLoader, StepSampler, demand_files_for
from autosam3d.data.datasets import organ_counts
from autosam3d.data.folder import CaseSet
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.inference.out_of_memory import memory_named
from autosam3d.recipes.recipe import Recipe
from autosam3d.training.cases import ask_teacher, cache_on_all_ranks
from autosam3d.training.objective import keep_weights, step_objective, write_teaching
from autosam3d.training.run import (
    Observer,
    Run,
    build_fabric,
    resume_run,
    save_model,
    save_run,
    start_run,
    warnings_of_one_rank,
)
from autosam3d.training.run_folder import demand_space, hold_run_folder, keep_recipe, prepare_run_folder
from autosam3d.training.runlog import RunLog
from autosam3d.training.schedule import demand_full_rate, learning_rate
from autosam3d.training.state import copy_into
from autosam3d.training.stopping import Interrupted, StopRequest
from autosam3d.training.teacher import Teacher, load_teacher
from autosam3d.training.validation import validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """Where a student's teacher is."""

    path: str | Path
    """A run folder, a packed model or a checkpoint's JSON."""
    sam: str | Path | None = None
    """Its SAM file, where that lies elsewhere than in its training."""
    further: tuple[str | Path, ...] = ()
    """More teachers; what all of them say is averaged."""


@dataclass(frozen=True)
class TrainResult:
    stopped_by: int | None
    """The signal that stopped the run, the same in all processes; None when it is finished."""
    epoch: int
    best_dice: float | None
    """Mean validation Dice of the best checkpoint; None without validation cases."""
    seconds: float
    rank: int = 0
    """Of this process; the first one, 0, speaks for all."""


def train(
    recipe: Recipe,
    cases: CaseSet,
    run_folder: Path,
    *,
    sam: str | Path | None = None,
    teacher: TeacherSource | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    observer: Observer | None = None,
) -> TrainResult:
    """Train, or go on training, the network of `recipe` on `cases`.

    SIGTERM, SIGHUP, Ctrl-C and SIGUSR1 save and return; the same call goes on from there. In one process the stop comes
    within an operation of the network and the time to save. Several processes stop at the end of the step, or of the
    window of a validation, that they are in.

    Args:
        run_folder: made if absent; a run that stands there already is resumed, if it is of the same recipe, but for
            settings that change no step (`run_folder.FREE`).
        sam: SAM weights, a file or a Hugging Face id. None trains everything from scratch.
        teacher: whom the network learns from, as ``recipe.distill`` says. Not even opened where the labels alone count.
        device: "auto", "cpu", "cuda" or "cuda:N". Started by `torchrun`, each process takes its own device.
        cache_dir: for preprocessed cases; default ``run_folder/cache``.

    Raises:
        UsageError: the folder holds a run of another recipe or SAM file, or another process trains there; the device
            is absent; the recipe's warm-up is as long as its training; it distils and there is no teacher.
        VolumeError: a case is broken, an organ is nowhere, or the cases are not those that the run began with.
        CheckpointError: the SAM file does not fit; the saved state cannot be read; the loss stayed non-finite (the
            last good state is kept).
        ResourceError: the disk is full or not writable; fewer files may be open than `train.num_workers` need.
    """
    demand_full_rate(recipe.optim, recipe.train.epochs)
    demand_files_for(recipe.train.num_workers)
    fabric = build_fabric(device, recipe.train.precision)
    observer = observer.unhindered() if observer and fabric.is_global_zero else Observer()
    stop = StopRequest(echo_s=2.0 if fabric.world_size > 1 else 0.0)
    with warnings_of_one_rank(fabric), hold_run_folder(run_folder, fabric), stop.listen():
        prepare_run_folder(run_folder, recipe, fabric)
        try:
            with stop.at_once():
                # What can be wrong at once comes before the cases, which may take an hour to prepare.
                loaded_teacher = _load_teacher(recipe, teacher, fabric.device)
                run = start_run(recipe, fabric, run_folder, sam, stop, observer, loaded_teacher)
                demand_space(run)
                train_cases, val_cases = _take_up(run, cases, cache_dir or run_folder / "cache")
        except Interrupted:
            return TrainResult(stop.signal, 0, None, 0.0, fabric.global_rank)
        dataset = CropDataset(train_cases, recipe)
        sampler = StepSampler(dataset, recipe.train.batch_size, fabric.global_rank, fabric.world_size)
        runlog = RunLog(run_folder, run.position.global_step, enabled=fabric.is_global_zero)
        try:
            with CropLoader(dataset, sampler, recipe.train.num_workers, fabric.device.type == "cuda") as loader:
                _train_epochs(run, loader, sampler, val_cases, runlog)
        except Interrupted:
            pass
        finally:
            runlog.close()
        return _leave(run)


def _take_up(run: Run, cases: CaseSet, cache_dir: Path) -> tuple[list[CachedCase], list[CachedCase]]:
    """Training and validation cases, and `run` where it stood when it was last saved."""
    train_cases, val_cases = cache_on_all_ranks(run, cases, cache_dir)
    demand_organs(train_cases, run.recipe, cases.folder)
    run.train_keys, run.val_keys = (sorted(case.key for case in part) for part in (train_cases, val_cases))
    run.organ_cases = organ_counts(cases.train, run.recipe, cases.folder.name)
    resume_run(run)
    keep_recipe(run)
    return ask_teacher(run, train_cases, cache_dir), val_cases


def _train_epochs(
    run: Run, loader: CropLoader, sampler: StepSampler, val_cases: list[CachedCase], runlog: RunLog
) -> None:
    recipe, position = run.recipe, run.position
    while position.epoch < recipe.train.epochs:
        _train_steps(run, loader, sampler, runlog)
        last = position.epoch + 1 == recipe.train.epochs
        validated = last or (position.epoch + 1) % recipe.train.validate_every == 0
        message = _validate_and_keep(run, val_cases, runlog) if validated else None
        position.epoch, position.step_in_epoch = position.epoch + 1, 0
        if validated:
            save_run(run)
        if message:  # said once it is true whatever comes
            run.observer.on_message(message)


def _leave(run: Run) -> TrainResult:
    position = run.position
    finished = position.epoch >= run.recipe.train.epochs
    # A stop during a save, or before the first step after it, finds the state on disk already.
    if not finished and (run.saved is None or replace(run.saved, seconds=position.seconds) != position):
        save_run(run)
    if finished and run.fabric.is_global_zero:
        write_teaching(run)
    best = position.best_dice if position.best_dice >= 0 else None
    signal = None if finished else run.stop.signal
    return TrainResult(signal, position.epoch, best, position.seconds, run.fabric.global_rank)


def _train_steps(run: Run, loader: CropLoader, sampler: StepSampler, runlog: RunLog) -> None:
    """The remaining steps of the current epoch.

    Raises:
        Interrupted: a stop was asked for; `run` is as it was after its last whole step.
        CheckpointError: NONFINITE. ResourceError: MEMORY.
    """
    recipe, position, fabric = run.recipe, run.position, run.fabric
    sampler.epoch, sampler.first_step = position.epoch, position.step_in_epoch
    run.demand_no_stop()
    if len(sampler) == 0:
        return
    run.wrapped.train()
    total = sampler.steps_per_epoch * recipe.train.epochs
    size = " x ".join(map(str, recipe.model.patch_size))
    work = f"a training step (batch of {recipe.train.batch_size}, crops of {size} voxels)"
    mark = time.perf_counter()
    for batch in loader:
        waited = time.perf_counter() - mark
        rate = _set_learning_rate(run, sampler.steps_per_epoch)
        with memory_named(str(fabric.device), work, "lower train.batch_size or model.patch_size, or take a device with "
                          "more memory"):
            # The first and the last step of a student say what it hears of its teacher.
            weigh = run.teacher is not None and position.global_step in (0, total - 1)
            crops = {name: tensor.to(fabric.device, non_blocking=True) for name, tensor in batch.items()}
            values, good = train_step(run, weigh=weigh, **crops)
        run.bad_steps = 0 if good else run.bad_steps + 1
        if run.bad_steps >= recipe.train.max_nan_steps:
            save_run(run)
            raise CheckpointError(
                "NONFINITE", run.folder, f"the loss was not finite for {run.bad_steps} steps in a row at step "
                f"{position.global_step + 1}; the last good state is kept",
                "start in a new folder (--out) with a lower optim.lr or train.precision=fp32")
        position.step_in_epoch += 1
        position.global_step += 1
        took = time.perf_counter() - mark
        position.seconds += took
        values |= {"lr": rate, "seconds": took, "data_wait": waited / took}
        runlog.step(position.epoch, position.global_step, values)
        run.observer.on_step(position.global_step, total, values)
        run.demand_no_stop()
        if position.global_step % recipe.train.save_every_steps == 0 and good:
            save_run(run)
        mark = time.perf_counter()


def train_step(
    run: Run, voxels: Tensor, labels: Tensor, probs: Tensor | None = None, groups: Tensor | None = None, *,
    weigh: bool = False,
) -> tuple[dict[str, float], bool]:
    """One optimiser step. False, and no change of any weight, where loss or gradient is not finite.

    Args:
        voxels: B 1 D H W.
        labels: B D H W.
        probs: B K D H W, the teacher's, where they come from the cache.
        groups: bool B V K, where not every organ was looked for in every case.
        weigh: also measure what the teacher's gradient weighs beside the labels'.
    """
    _seed_network(run)
    objective = step_objective(run, run.wrapped(voxels), voxels, labels, probs, groups, weigh=weigh)
    loss, values = objective.total, objective.values
    if weigh and objective.teacher is not None:
        keep_weights(run, objective)
    run.optimizer.zero_grad(set_to_none=True)
    run.fabric.backward(loss)
    parameters = [p for p in run.network.parameters() if p.requires_grad]
    limit = run.recipe.optim.clip_norm or math.inf
    # The gradients of all ranks were averaged in backward, so this norm, and the decision, is the same on each.
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    good = bool(torch.isfinite(norm))
    if good:
        run.optimizer.step()
        _update_average(run)
    else:
        log.warning("step %d: the gradient is not finite, step skipped", run.position.global_step)
    return {name: float(value.detach()) for name, value in values.items()} | {"grad_norm": float(norm)}, good


def _seed_network(run: Run) -> None:
    """What a network leaves out by chance in a step is drawn from (seed, step, rank), so that a resumed run repeats it.
    """
    if getattr(run.recipe.model, "drop_path", 0) > 0:
        drawn = np.random.SeedSequence([run.recipe.train.seed, run.position.global_step, run.fabric.global_rank])
        torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _update_average(run: Run) -> None:
    if not run.average:
        return
    # The average of a young run would mostly remember the start: let its memory grow with the run.
    decay = min(run.recipe.optim.ema, (1 + run.position.global_step) / (10 + run.position.global_step))
    with torch.no_grad():
        for name, tensor in run.tuned.items():
            run.average[name].lerp_(tensor, 1 - decay)


def _set_learning_rate(run: Run, steps_per_epoch: int) -> float:
    optim, position = run.recipe.optim, run.position
    epoch = position.epoch + (position.step_in_epoch / steps_per_epoch if optim.per_step else 0.0)
    rate = learning_rate(epoch, run.recipe.train.epochs, optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


@contextmanager
def _averaged_weights(run: Run) -> Iterator[None]:
    """Inside, the network has the averaged weights, where there are any."""
    if not run.average:
        yield
        return
    own = {name: tensor.clone() for name, tensor in run.tuned.items()}
    copy_into(run.tuned, run.average)
    try:
        yield
    finally:
        copy_into(run.tuned, own)


def _validate_and_keep(run: Run, val_cases: list[CachedCase], runlog: RunLog) -> str | None:
    """Validate; keep the weights if they are the best yet, or the last of a run without validation cases.

    Returns:
        What is worth saying after the next save.
    """
    position = run.position
    started = time.perf_counter()
    with _averaged_weights(run):
        dice = validate(run, val_cases) if val_cases else None
        mean = float(np.nanmean(dice)) if dice is not None and np.isfinite(dice).any() else None
        if mean is None or mean > position.best_dice:
            position.best_epoch = position.epoch
            position.best_dice = mean if mean is not None else position.best_dice
            save_model(run, _metrics_dict(run.recipe, dice, mean))
    position.seconds += time.perf_counter() - started
    if mean is None:
        return None
    runlog.validation(position.epoch, position.global_step, _metrics_dict(run.recipe, dice, mean))
    return (f"epoch {position.epoch + 1}: validation Dice {mean:.3f} "
            f"(best {position.best_dice:.3f}, epoch {position.best_epoch + 1})")


def _metrics_dict(recipe: Recipe, dice: np.ndarray | None, mean: float | None) -> dict[str, Any]:
    if dice is None:
        return {}
    organs = {name: (float(d) if np.isfinite(d) else None) for name, d in zip(recipe.labels.organs, dice, strict=True)}
    return {"val_dice": mean, "val_dice_per_organ": organs}


def _load_teacher(recipe: Recipe, source: TeacherSource | None, device: torch.device) -> Teacher | None:
    if recipe.distill is None or recipe.distill.label_weight == 1:
        return None
    if source is None:
        raise UsageError("NO_TEACHER", recipe.name, "expected a teacher, since the recipe distils",
                         "use `autosam3d distill`, or set distill.lambda=1 to learn from the labels alone")
    if recipe.distill.min_agreement > 0 and not source.further and not recipe.distill.teacher_mirror:
        raise UsageError("ONE_VOTER", "distill.min_agreement", "expected two voters or more, got one teacher",
                         "name a second one with --teacher, or set distill.teacher_mirror=true")
    return load_teacher([source.path, *source.further], recipe, sam=source.sam, device=device)
