"""A tuning of SAM on slices: its settings, its folder, and its state on disk, from which it goes on."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from autosam3d.checkpoints.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from autosam3d.data.folder import CaseSet
from autosam3d.errors import CheckpointError, UsageError, VolumeError
from autosam3d.io import ReadOptions
from autosam3d.io.files import remove_stale_temporaries, write_text_atomic
from autosam3d.recipes.recipe import Recipe
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import KIND, SliceSam, tuned_tensors
from autosam3d.studies.slicewise.prompts import PromptSpec
from autosam3d.studies.slicewise.samples import SliceSample
from autosam3d.studies.slicewise.slices import TRUTH_NOTE
from autosam3d.training.run import Observer
from autosam3d.training.stopping import StopRequest

log = logging.getLogger(__name__)

_LEARNING_RATES = {"box": 1e-4, "point": 5e-5}
"""*Source*: MedSAM's training, and that of its extension to points."""
_BATCH_SIZES = {"decoder": 8, "full": 2}

@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """One tuning, whole; kept with the model. Thresholds and rates are MedSAM's."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    scope: Literal["decoder", "full"] = "decoder"
    """"decoder": prompt encoder and mask decoder; "full": the image encoder too."""
    framing: Framing
    prompt: Literal["point", "box"] = "box"
    """Box: the tight one with `jitter_px`; point: a random one inside the organ. Validation takes the tight box or the
    deepest point."""
    jitter_px: int = 20
    lr: float | None = None
    """None: 1e-4 for boxes, 5e-5 for points; constant."""
    weight_decay: float = 0.01
    batch_size: int | None = None
    """None: 8 with the encoder frozen, 2 for all."""
    epochs: int = 100
    minutes: float | None = None
    """Ends the run after so long in optimiser steps, over all its starts, if `epochs` does not before; embeddings and
    validations take time of their own."""
    seed: int = 0
    min_slice_px: int = 100
    """An organ is asked for in a slice where it has as many pixels..."""
    min_case_vox: int = 1000
    """...and as many voxels in the whole case."""
    val_cases: int = 0
    """Validate on the first n validation cases; 0 takes all."""
    validate_every: int = 1
    """Epochs between validations; the run's begin and end are validated too."""
    save_every_steps: int = 200

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("validate_every", 1), ("save_every_steps", 1), ("min_slice_px", 1),
                          ("min_case_vox", 1), ("val_cases", 0), ("seed", 0), ("jitter_px", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("lr", "minutes", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.scope not in _BATCH_SIZES or self.prompt not in _LEARNING_RATES or self.weight_decay < 0:
            raise ValueError(f"expected scope decoder or full, prompt box or point, got {self.scope}, {self.prompt}")

    def resolved(self) -> TuneSettings:
        """With what None stood for."""
        return replace(self, lr=self.lr or _LEARNING_RATES[self.prompt],
                       batch_size=self.batch_size or _BATCH_SIZES[self.scope])

    @property
    def training_prompts(self) -> PromptSpec:
        if self.prompt == "box":
            return PromptSpec(kind="box", jitter_px=self.jitter_px, seed=self.seed)
        return PromptSpec(kind="point", num_points=1, seed=self.seed)


@dataclass
class TuneProgress:
    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    best_dice: float = -1.0
    seconds: float = 0.0
    """Steps and validations, over all starts of the run."""
    step_seconds: float = 0.0
    """Steps alone: what `TuneSettings.minutes` bounds."""


@dataclass
class TuneRun:
    settings: TuneSettings
    recipe: Recipe
    sam: SliceSam
    folder: Path
    optimizer: torch.optim.Optimizer
    encoder: SliceEncoder
    stop: StopRequest
    observer: Observer
    samples: list[SliceSample]
    data_sha256: str
    cases: CaseSet
    options: ReadOptions
    progress: TuneProgress = field(default_factory=TuneProgress)
    saved: TuneProgress | None = None

    @property
    def tuned(self) -> dict[str, Tensor]:
        return tuned_tensors(self.sam.network, self.settings.scope)

    @property
    def finished(self) -> bool:
        minutes = self.settings.minutes
        return self.progress.epoch >= self.settings.epochs or (
            minutes is not None and self.progress.step_seconds >= 60 * minutes)


def identity_of(settings: TuneSettings, recipe: Recipe, sam: SliceSam) -> dict[str, Any]:
    """What makes a run this one; how long it lasts may change."""
    whole = asdict(settings)
    for name in ("epochs", "minutes", "save_every_steps"):
        del whole[name]
    return {"settings": whole, "labels": list(recipe.labels.organs), "sam_sha256": sam.sam.sha256}


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write tuning.json into `folder`, or check that the run in it is this one.

    Raises:
        UsageError: OTHER_RUN.
    """
    remove_stale_temporaries(folder)
    path, text = folder / "tuning.json", json.dumps(identity, indent=1, sort_keys=True) + "\n"
    begun = any((folder / f"{name}.json").exists() for name in ("last", "previous", "best"))
    if not path.exists() and begun:
        raise UsageError("OTHER_RUN", folder, "expected a new folder or one of a tuning, it holds another run",
                         "name a new folder with --out")
    if not begun:
        write_text_atomic(path, text)
        return
    there = path.read_text("utf-8", errors="replace")
    if there != text:
        old, new = next(((a.strip(), b.strip()) for a, b in zip(there.splitlines(), text.splitlines(), strict=False)
                         if a != b), ("its end", "another"))
        raise UsageError("OTHER_RUN", folder, f"it holds a tuning with other settings: expected {old!r} as in its "
                         f"tuning.json, got {new!r}", "name a new folder with --out, or give the same settings")


def save_best(run: TuneRun, metrics: Mapping[str, Any]) -> None:
    """The weights as they are to ``best.json``."""
    contains = "all" if run.settings.scope == "full" else "tuned"
    save_checkpoint(run.folder / "best.json", run.tuned, _meta(run) | {
        "kind": KIND, "contains": contains, "metrics": dict(metrics)})


def _meta(run: TuneRun) -> dict[str, Any]:
    return {
        "recipe": run.recipe.as_dict(), "sam": vars(run.sam.sam), "settings": asdict(run.settings), "note": TRUTH_NOTE,
        "epoch": run.progress.epoch, "step": run.progress.global_step, "torch": torch.__version__,
    }


def save_state(run: TuneRun) -> None:
    """The whole state to ``last.json``; the one before stays as ``previous.json``."""
    tensors = {f"model.{name}": tensor for name, tensor in run.tuned.items()}
    names = {id(parameter): name for name, parameter in run.sam.network.named_parameters()}
    for parameter, state in run.optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    place = {"kind": f"{KIND}-training", "progress": vars(run.progress), "data_sha256": run.data_sha256}
    save_checkpoint(run.folder / "last.json", tensors, _meta(run) | place, previous=run.folder / "previous.json")
    run.saved = replace(run.progress)


def resume(run: TuneRun) -> None:
    """Take up the state in the run folder, if there is one; a damaged last state falls back to the one before.

    Raises:
        CheckpointError: there are states and none can be read; VolumeError: DATA_CHANGED.
    """
    fault: CheckpointError | None = None
    for path in (run.folder / "last.json", run.folder / "previous.json"):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            if checkpoint.meta.get("kind") != f"{KIND}-training":
                raise CheckpointError("KIND", path, f"expected the state of a tuning, got a checkpoint of kind "
                                      f"{checkpoint.meta.get('kind')!r}", "do not rename checkpoints")
        except CheckpointError as error:
            fault = fault or error
            log.warning("%s cannot be read (%s), trying the state before", path, error.code)
            continue
        if checkpoint.meta["data_sha256"] != run.data_sha256:
            raise VolumeError("DATA_CHANGED", path, "expected the training slices that the run began with, got others",
                              "restore them, or name a new run folder")
        _load_state(run, checkpoint.tensors, path)
        run.progress = TuneProgress(**checkpoint.meta["progress"])
        if path.name != "last.json":
            write_text_atomic(run.folder / "last.json", path.read_text("utf-8"))
        run.saved = replace(run.progress)
        run.observer.on_message(f"resuming at epoch {run.progress.epoch + 1}, step {run.progress.global_step}")
        return
    if fault is not None:
        raise CheckpointError(fault.code, run.folder, f"its saved states cannot be read ({fault.where}: {fault.fault})",
                              "restore last.json and its weights from a copy, or name a new run folder")


def _load_state(run: TuneRun, tensors: Mapping[str, Tensor], path: Path) -> None:
    model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    load_strictly(run.sam.network, model, set(run.tuned), path)
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter_name = name.split(".", 2)
            states[parameter_name][key] = tensor
    parameters = dict(run.sam.network.named_parameters())
    for name, state in states.items():
        run.optimizer.state[parameters[name]] = {key: t.to(parameters[name].device) for key, t in state.items()}
