"""Tuning SAM or MedSAM on slices: prompt encoder and mask decoder with the encoder frozen, or all. START with `tune`.

Everything random is drawn from (seed, epoch, position), so a run that was stopped anywhere and started again ends with
the same weights as one that was not. With the encoder frozen each slice is encoded once and its embedding kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autosam3d.data.folder import CaseSet
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.evaluation.metrics import dice_per_label
from autosam3d.io import ReadOptions
from autosam3d.io.options import DEFAULTS
from autosam3d.recipes.recipe import Recipe
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.model import SliceSam, demand_memory, tuned_tensors
from autosam3d.studies.slicewise.prompts import PromptSpec
from autosam3d.studies.slicewise.run import (
    TuneRun,
    TuneSettings,
    claim_folder,
    identity_of,
    resume_tuning,
    save_best,
    save_tuning,
)
from autosam3d.studies.slicewise.samples import (
    SliceSample,
    collect_samples,
    make_batch,
    order_of_epoch,
    read_case_with_organs,
    samples_sha256,
)
from autosam3d.studies.slicewise.slices import segment_slices
from autosam3d.training.losses import mask_loss
from autosam3d.training.run import Observer, build_fabric
from autosam3d.training.run_folder import hold_run_folder
from autosam3d.training.runlog import RunLog
from autosam3d.training.stopping import Interrupted, StopRequest, stop_inside

log = logging.getLogger(__name__)

_MAX_NAN_STEPS = 5


@dataclass(frozen=True)
class TuneResult:
    stopped_by: int | None
    """The signal that stopped the run; None when it is finished."""
    epoch: int
    step: int
    best_dice: float | None
    """Mean validation Dice of the best checkpoint; None without validation cases."""
    seconds: float
    """In training and validation, over all starts."""
    encode_seconds: float
    """For the embeddings, this time."""


def tune(
    recipe: Recipe,
    cases: CaseSet,
    sam: SliceSam,
    folder: Path,
    settings: TuneSettings,
    *,
    cache: Path | None = None,
    read_options: ReadOptions = DEFAULTS,
    observer: Observer | None = None,
) -> TuneResult:
    """Tune `sam` on the training slices, or go on with the run in `folder`; ``best.json`` is what `segment` takes.

    SIGTERM, SIGHUP, Ctrl-C and SIGUSR1 save and return; the same call goes on from there.

    Args:
        recipe: for the organs.
        sam: is changed; not a tuned one.
        cache: for embeddings; default ``folder/embeddings``. Not used where all is tuned.

    Raises:
        UsageError: OTHER_RUN, LOCKED, OUTPUT_PATH, RANKS (several processes), TUNED.
        VolumeError: as `collect_samples`; DATA_CHANGED.
        CheckpointError: the saved state cannot be read; NONFINITE.
        ResourceError: memory, disk.
    """
    settings = settings.resolved()
    if sam.tuned is not None:
        raise UsageError("TUNED", folder, "expected a SAM file to begin with, got a tuning of one",
                         "name the SAM file with --sam")
    fabric = build_fabric(str(sam.device), "fp32")
    if fabric.world_size > 1:
        raise UsageError("RANKS", "slicewise tune", f"expected one process, got {fabric.world_size}",
                         "start it without torchrun")
    observer, stop = (observer or Observer()).unhindered(), StopRequest()
    with hold_run_folder(folder, fabric), stop.listen():
        claim_folder(folder, identity_of(settings, recipe, sam))
        started = time.perf_counter()
        try:
            kept = (cache or folder / "embeddings") if settings.scope == "decoder" else None
            encoder = SliceEncoder(sam, settings.framing, kept, stop.demand_none)
            run = _start(recipe, cases, encoder, folder, settings, read_options, observer, stop)
            _encode_all(run)
        except Interrupted:
            return TuneResult(stop.signal, 0, 0, None, 0.0, time.perf_counter() - started)
        encode_seconds = time.perf_counter() - started
        runlog = RunLog(folder, run.position.global_step)
        try:
            _tune_epochs(run, runlog)
        except Interrupted:
            pass
        finally:
            sam.network.eval()
            runlog.close()
        if run.saved is None or replace(run.saved, seconds=run.position.seconds) != run.position:
            save_tuning(run)
        best = run.position.best_dice if run.position.best_dice >= 0 else None
        return TuneResult(None if run.finished else stop.signal, run.position.epoch, run.position.global_step, best,
                          run.position.seconds, encode_seconds)


def _start(
    recipe: Recipe, cases: CaseSet, encoder: SliceEncoder, folder: Path, settings: TuneSettings,
    read_options: ReadOptions, observer: Observer, stop: StopRequest,
) -> TuneRun:
    sam = encoder.sam
    demand_memory(sam, settings.batch_size or 1, training=settings.scope == "full")
    samples = collect_samples(
        cases.train, encoder, recipe.labels, min_slice_px=settings.min_slice_px, min_case_vox=settings.min_case_vox,
        read_options=read_options, watch=stop.demand_none, progress=observer.on_cache,
    )
    tuned = set(tuned_tensors(sam.network, settings.scope))
    for name, parameter in sam.network.named_parameters():
        parameter.requires_grad_(name in tuned and "positional_embedding" not in name)
    parameters = [p for p in sam.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr or 0.0, weight_decay=settings.weight_decay, fused=True)
    stop_inside(sam.network, stop)
    run = TuneRun(settings, recipe, sam, folder, optimizer, encoder, stop, observer, samples, samples_sha256(samples),
               cases, read_options)
    resume_tuning(run)
    return run


def _encode_all(run: TuneRun) -> None:
    """Embeddings of all samples onto the disk; those that are there stay."""
    if run.settings.scope == "full":
        return
    encoder, samples = run.encoder, run.samples
    missing = [sample for sample in samples if not encoder.path(sample.key).exists()]
    encoder.demand_space(len(missing))
    for done, sample in enumerate(missing):
        run.observer.on_teacher(done, len(missing))
        encoder(sample.image)
    run.observer.on_teacher(len(missing), len(missing))


def _tune_epochs(run: TuneRun, runlog: RunLog) -> None:
    position, settings = run.position, run.settings
    message = _validate_and_keep(run, runlog) if position.global_step == 0 else None
    while not run.finished:
        if message:
            run.observer.on_message(message)
        _tune_steps(run, runlog)
        last = run.finished or position.epoch + 1 == settings.epochs
        validated = last or (position.epoch + 1) % settings.validate_every == 0
        message = _validate_and_keep(run, runlog) if validated else None
        position.epoch, position.step_in_epoch = position.epoch + 1, 0
        save_tuning(run)
    if message:
        run.observer.on_message(message)


def _tune_steps(run: TuneRun, runlog: RunLog) -> None:
    """The remaining steps of the current epoch, or of the minutes."""
    position, settings = run.position, run.settings
    size, count = settings.batch_size or 1, len(run.samples)
    order = order_of_epoch(count, settings.seed, position.epoch)
    per_epoch = math.ceil(count / size)
    bad = 0
    for step in range(position.step_in_epoch, per_epoch):
        started = time.perf_counter()
        run.stop.demand_none()
        positions = range(step * size, min((step + 1) * size, count))
        values, good = _step(run, [run.samples[order[p]] for p in positions], positions)
        bad = 0 if good else bad + 1
        if bad >= _MAX_NAN_STEPS:
            raise CheckpointError("NONFINITE", run.folder, f"the loss was not finite for {bad} steps in a row at step "
                                  f"{position.global_step + 1}", "start in a new folder (--out) with a lower tune.lr")
        position.step_in_epoch, position.global_step = step + 1, position.global_step + 1
        took = time.perf_counter() - started
        position.seconds += took
        position.step_seconds += took
        runlog.step(position.epoch, position.global_step, values | {"lr": settings.lr or 0.0, "seconds": took})
        run.observer.on_step(position.global_step, per_epoch * settings.epochs, values)
        if run.finished:
            return
        if good and position.global_step % settings.save_every_steps == 0:
            save_tuning(run)


def _step(run: TuneRun, samples: Sequence[SliceSample], positions: Sequence[int]) -> tuple[dict[str, float], bool]:
    """One optimiser step. False, and no change of any weight, where the gradient is not finite."""
    sam, settings = run.sam, run.settings
    sam.network.train()
    batch = make_batch(samples, positions, run.encoder, settings.training_prompts, run.position.epoch)
    if settings.scope == "full":
        pixels = [settings.framing.pixels(image, sam.sizes.image_size) for image in batch.images]
        embeddings = sam.encode(torch.stack(pixels))
    else:
        embeddings = torch.cat([run.encoder(image) for image in batch.images])
    loss = mask_loss(sam.decode(embeddings, batch.prompts)[:, 0], batch.masks)
    run.optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    norm = nn.utils.clip_grad_norm_([p for p in sam.network.parameters() if p.grad is not None], math.inf)
    good = bool(torch.isfinite(norm))
    if good:
        run.optimizer.step()
    else:
        log.warning("step %d: the gradient is not finite, step skipped", run.position.global_step + 1)
    return {"loss": float(loss.total.detach()), "dice_loss": float(loss.dice), "ce_loss": float(loss.cross_entropy),
            "grad_norm": float(norm)}, good


def _validate_and_keep(run: TuneRun, runlog: RunLog) -> str | None:
    """Validate; keep the weights if they are the best yet, or the last of a run without validation cases.

    Returns:
        What is worth saying after the next save.
    """
    position, started = run.position, time.perf_counter()
    dice = _validate(run)
    mean = float(np.nanmean(dice)) if np.isfinite(dice).any() else None
    metrics = {"val_dice": mean, "val_dice_per_organ": {
        name: None if math.isnan(value) else float(value)
        for name, value in zip(run.recipe.labels.organs, dice, strict=True)}}
    if mean is None or mean > position.best_dice:
        position.best_dice = mean if mean is not None else position.best_dice
        save_best(run, metrics)
    position.seconds += time.perf_counter() - started
    if mean is None:
        return None
    runlog.validation(position.epoch, position.global_step, metrics)
    return f"step {position.global_step}: validation Dice {mean:.3f} (best {position.best_dice:.3f})"


def _validate(run: TuneRun) -> np.ndarray:
    """Dice per organ in 3D, the mean over the validation cases that have it; NaN for an organ that none has."""
    cases = run.cases.val[: run.settings.val_cases or None]
    run.sam.network.eval()
    prompts = PromptSpec(kind=run.settings.prompt, seed=run.settings.seed)
    table = np.full((len(cases), len(run.recipe.labels.organs)), np.nan)
    for index, case in enumerate(cases):
        run.observer.on_validation(index, len(cases))
        pair = read_case_with_organs(case, run.recipe.labels, run.read_options)
        if pair is None:
            continue
        ct, truth = pair
        made = segment_slices(ct, truth, run.encoder, prompts, run.recipe.labels, name=case.name,
                              progress=lambda done, total: run.stop.demand_none())
        table[index] = dice_per_label(made.segmentation.labels, truth, run.recipe.labels.num_outputs)
    run.observer.on_validation(len(cases), len(cases))
    seen = np.isfinite(table)
    return np.where(seen.any(0), np.nansum(table, 0) / np.maximum(1, seen.sum(0)), np.nan)
