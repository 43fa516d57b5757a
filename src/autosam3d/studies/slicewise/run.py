"""A tuning of SAM on slices: its settings, its folder, and its state on disk, from which it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from autosam3d.checkpoints.checkpoint import save_checkpoint
from autosam3d.data.folder import CaseSet
from autosam3d.io import ReadOptions
from autosam3d.recipes.recipe import Recipe
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import KIND, SliceSam, tuned_tensors
from autosam3d.studies.slicewise.prompts import PromptSpec
from autosam3d.studies.slicewise.samples import SliceSample
from autosam3d.studies.slicewise.slices import TRUTH_NOTE
from autosam3d.training.run import Observer
from autosam3d.training.run_folder import claim_run_folder, demand_same_run
from autosam3d.training.state import Trained, read_state, save_state
from autosam3d.training.stopping import StopRequest

_LEARNING_RATES = {"box": 1e-4, "point": 5e-5}
"""*Source*: MedSAM's training, and that of its extension to points."""
_BATCH_SIZES = {"decoder": 8, "full": 2}
_STATE_KIND = f"{KIND}-training"


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
class TunePosition:
    """Where a tuning stands; all of it is in its state on disk, under the key ``progress``."""

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
    read_options: ReadOptions
    position: TunePosition = field(default_factory=TunePosition)
    saved: TunePosition | None = None

    @property
    def tuned(self) -> dict[str, Tensor]:
        return tuned_tensors(self.sam.network, self.settings.scope)

    @property
    def trained(self) -> Trained:
        """What the steps change, as it is saved."""
        return Trained(self.sam.network, self.tuned, self.optimizer)

    @property
    def finished(self) -> bool:
        minutes = self.settings.minutes
        return self.position.epoch >= self.settings.epochs or (
            minutes is not None and self.position.step_seconds >= 60 * minutes)


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
        ResourceError: NOT_WRITABLE.
    """
    text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
    claim_run_folder(folder, "tuning.json", text)
    demand_same_run(folder, "tuning.json", text)


def save_best(run: TuneRun, metrics: Mapping[str, Any]) -> None:
    """The weights as they are to ``best.json``."""
    contains = "all" if run.settings.scope == "full" else "tuned"
    save_checkpoint(run.folder / "best.json", run.tuned, _meta(run) | {
        "kind": KIND, "contains": contains, "metrics": dict(metrics)})


def _meta(run: TuneRun) -> dict[str, Any]:
    return {
        "recipe": run.recipe.as_dict(), "sam": vars(run.sam.sam), "settings": asdict(run.settings), "note": TRUTH_NOTE,
        "epoch": run.position.epoch, "step": run.position.global_step, "torch": torch.__version__,
    }


def save_tuning(run: TuneRun) -> None:
    """The whole state to ``last.json``; the one before stays as ``previous.json``."""
    place = {"kind": _STATE_KIND, "progress": vars(run.position), "data_sha256": run.data_sha256}
    save_state(run.folder, run.trained.tensors(), _meta(run) | place)
    run.saved = replace(run.position)


def resume_tuning(run: TuneRun) -> None:
    """Take up the state in the run folder, if there is one; a damaged last state falls back to the one before.

    Raises:
        CheckpointError: there are states and none can be read.
        VolumeError: DATA_CHANGED.
    """
    saved = read_state(run.folder, _STATE_KIND)
    if saved is None:
        return
    saved.demand_same_data(run.data_sha256, "training slices")
    run.trained.load(saved.tensors, saved.path)
    run.position = TunePosition(**saved.meta["progress"])
    saved.keep_as_last()
    run.saved = replace(run.position)
    run.observer.on_message(f"resuming at epoch {run.position.epoch + 1}, step {run.position.global_step}")
