"""A training run: its parts, how they are made, and how they are saved and taken up again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import SamSource, attach_sam, save_checkpoint
from autosam3d.errors import UsageError
from autosam3d.inference.torch_runtime import bf16_in_hardware, pick_device
from autosam3d.models.autosam.sam_weights import frozen_names
from autosam3d.models.build import build_network
from autosam3d.models.side_outputs import without_side_outputs
from autosam3d.models.spec import AutoSamSpec
from autosam3d.recipes.recipe import Recipe
from autosam3d.training.optimizer import build_optimizer
from autosam3d.training.state import SavedState, Trained, read_state, save_state
from autosam3d.training.stopping import Interrupted, StopRequest, stop_inside
from autosam3d.training.teacher import Teacher

log = logging.getLogger(__name__)

_KIND = "training"


@dataclass
class Position:
    """Where a run stands; all of it is in the training state on disk, under the key ``progress``."""

    epoch: int = 0
    step_in_epoch: int = 0
    """Steps of `epoch` that are done; an epoch whose steps are all done may still lack its validation."""
    global_step: int = 0
    best_dice: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0
    """Time spent so far, over all starts of the run."""
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a student: at "start" and "end" the norm of the gradient of the "labels"' and the "teacher"'s term."""


@dataclass
class Observer:
    """What the command line shows; every call is optional."""

    on_cache: Callable[[int, int], None] = lambda done, total: None
    on_teacher: Callable[[int, int], None] = lambda done, total: None
    on_step: Callable[[int, int, Mapping[str, float]], None] = lambda done, total, values: None
    on_validation: Callable[[int, int], None] = lambda done, total: None
    on_message: Callable[[str], None] = lambda text: None

    def unhindered(self) -> Observer:
        """The same, of which nothing is a reason to stop: what cannot be told (a full disk, a reader that has gone) is
        lost."""

        def lost(tell: Callable[..., None]) -> Callable[..., None]:
            def told(*facts: Any) -> None:
                with suppress(OSError):
                    tell(*facts)

            return told

        return Observer(**{name: lost(tell) for name, tell in vars(self).items()})


@dataclass
class Run:
    """The parts of a training run that its steps share."""

    recipe: Recipe
    fabric: Fabric
    network: nn.Module
    """The bare network."""
    wrapped: nn.Module
    """The same, as Fabric runs it."""
    optimizer: torch.optim.Optimizer
    folder: Path
    sam: SamSource | None
    stop: StopRequest
    observer: Observer
    position: Position = field(default_factory=Position)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the tuned weights; empty when `optim.ema` is 0."""
    bad_steps: int = 0
    """Steps in a row, up to the last one, whose gradient was not finite."""
    train_keys: list[str] = field(default_factory=list)
    """Of each training case what it was made from, sorted."""
    val_keys: list[str] = field(default_factory=list)
    """The same of the validation cases."""
    organ_cases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Organ to {dataset: its training cases in which the organ was looked for}."""
    saved: Position | None = None
    """Where the state on disk stands; None where there is none."""
    teacher: Teacher | None = None
    """Of a student; None where there is none or the labels alone count."""

    @cached_property
    def tuned(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps: all, less the frozen ones of a SAM file."""
        state = self.network.state_dict()
        left_out = set(frozen_names(self.network)) if self.sam and self.recipe.train.freeze_sam else set()
        return {name: tensor for name, tensor in state.items() if name not in left_out}

    @property
    def trained(self) -> Trained:
        """What the steps change, as it is saved."""
        return Trained(self.network, self.tuned, self.optimizer, self.average)

    def demand_no_stop(self, busy: bool = False) -> bool:
        """Raise `Interrupted` as soon as one rank was asked to stop: on all of them, with the same `stop.signal`.

        The ranks meet here, so all must come equally often. One that has no more to do comes on, not `busy`, until
        none is.

        Returns:
            Whether any rank is busy.
        """
        if self.fabric.world_size == 1:
            self.stop.demand_none()
            return busy
        mine = torch.tensor([self.stop.signal or 0, int(busy)], dtype=torch.int32, device=self.fabric.device)
        all_ranks = self.fabric.all_reduce(mine, reduce_op="max")
        assert isinstance(all_ranks, Tensor)
        number, any_busy = all_ranks.tolist()
        if number:  # a signal that came since is for the next meeting
            self.stop.signal = number
            raise Interrupted
        return bool(any_busy)


def build_fabric(device: str, precision: str) -> Fabric:
    """Fabric for one device, or for all processes that `torchrun` started.

    Raises:
        UsageError: DEVICE, the machine has no such device.
    """
    kind, _, number = pick_device(device).partition(":")
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    mixed = precision == "bf16" or (precision == "auto" and bf16_in_hardware(kind))
    alone = [int(number)] if number and kind != "cpu" else 1
    fabric = Fabric(
        accelerator=kind,
        devices=local_ranks() if distributed else alone,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")) if distributed else 1,
        # Ranks wait for each other while cases are prepared and while rank 0 saves: longer than the usual limit.
        strategy=DDPStrategy(timeout=timedelta(hours=2)) if distributed else "auto",
        precision="bf16-mixed" if mixed else "32-true",
    )
    fabric.launch()
    return fabric


def local_ranks() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def warnings_of_one_rank(fabric: Fabric) -> Iterator[None]:
    """Inside, ranks beside the first log errors only: what they would warn of, the first one does."""
    logger = logging.getLogger("autosam3d")
    before = logger.level
    if not fabric.is_global_zero:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def start_run(
    recipe: Recipe, fabric: Fabric, folder: Path, sam: str | Path | None, stop: StopRequest, observer: Observer,
    teacher: Teacher | None = None,
) -> Run:
    """Network and optimiser, fresh.

    Raises:
        UsageError: SAM weights for a network that has no place for them.
    """
    torch.manual_seed(recipe.train.seed)
    network = build_network(recipe.model, side_outputs=recipe.train.deep_supervision)
    is_autosam = isinstance(recipe.model, AutoSamSpec)
    if sam is not None and not is_autosam:
        raise UsageError("NO_PLACE_FOR_SAM", "--sam", f"expected a recipe with model.network autosam, got "
                         f"{recipe.model.network}", "leave --sam out")
    source = attach_sam(network, None, sam, freeze=recipe.train.freeze_sam) if sam is not None else None
    if source is None and is_autosam:
        log.warning("no SAM weights: every weight is trained from scratch, which is not the paper's method")
    optimizer = build_optimizer(network, recipe)
    if fabric.world_size == 1:  # several processes stop together, between two steps
        stop_inside(network, stop)
    wrapped, optimizer = fabric.setup(network, optimizer)
    run = Run(recipe, fabric, network, wrapped, optimizer, folder, source, stop, observer, teacher=teacher)
    if recipe.optim.ema > 0:
        run.average = {name: tensor.detach().clone() for name, tensor in run.tuned.items()}
    return run


def save_run(run: Run) -> None:
    """The whole state of training to ``last.json``; the one before stays as ``previous.json``. All ranks must come.

    Raises:
        ResourceError: the disk is full or not writable; the states that are there stay.
    """
    run.fabric.barrier()
    if run.fabric.is_global_zero:
        place = {"progress": vars(run.position), "world_size": run.fabric.world_size,
                 "threads": torch.get_num_threads(), "val_keys": run.val_keys,
                 "train_sha256": _sha256_of(run.train_keys), "data_sha256": _sha256_of((run.train_keys, run.val_keys))}
        save_state(run.folder, run.trained.tensors(), _meta(run, _KIND) | place)
    run.fabric.barrier()
    run.saved = replace(run.position)


def save_model(run: Run, metrics: Mapping[str, Any]) -> None:
    """The weights as they are to ``best.json``."""
    if run.fabric.is_global_zero:
        kept = without_side_outputs(run.tuned)
        save_checkpoint(run.folder / "best.json", kept, _meta(run, "model") | {"metrics": dict(metrics)})


def _meta(run: Run, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "contains": "tuned" if run.sam and run.recipe.train.freeze_sam else "all",
        "recipe": run.recipe.as_dict(),
        "sam": vars(run.sam) if run.sam else None,
        "teacher": run.teacher.origin if run.teacher else None,
        "cases": run.organ_cases,
        "epoch": run.position.epoch,
        "torch": torch.__version__,
    }


def resume_run(run: Run) -> None:
    """Take up the state in the run folder, if there is one; a damaged last state falls back to the one before.

    Raises:
        CheckpointError: there are states and none can be read.
        UsageError: OTHER_SAM, OTHER_TEACHER.
        VolumeError: DATA_CHANGED.
    """
    saved = read_state(run.folder, _KIND)
    if saved is None:
        return
    _demand_same_origin(run, saved)
    run.trained.load(saved.tensors, saved.path)
    run.position = Position(**saved.meta["progress"])
    # Positions of crops are the same for any number of processes; only steps are counted in larger bites.
    run.position.step_in_epoch = run.position.step_in_epoch * saved.meta["world_size"] // run.fabric.world_size
    if run.fabric.is_global_zero:
        saved.keep_as_last()
    run.saved = replace(run.position)
    before, now = saved.meta.get("threads"), torch.get_num_threads()
    if before not in (None, now) and run.fabric.device.type == "cpu":
        log.warning("the run was saved with %s threads and goes on with %s: sums are taken in another order, so the "
                    "last bits of the weights can differ from those of an undisturbed run", before, now)
    run.observer.on_message(f"resuming at epoch {run.position.epoch + 1}, step {run.position.global_step}")


def _demand_same_origin(run: Run, saved: SavedState) -> None:
    before, now = (saved.meta.get("sam") or {}).get("sha256"), run.sam.sha256 if run.sam else None
    if before != now:
        raise UsageError("OTHER_SAM", saved.path, "the run began with other SAM weights" if before else
                         "the run began without SAM weights", "give the same --sam, or name a new run folder")
    before = (saved.meta.get("teacher") or {}).get("sha256")
    now = run.teacher.origin["sha256"] if run.teacher else None
    if before != now:
        raise UsageError("OTHER_TEACHER", saved.path, "the run began with another teacher" if before else
                         "the run began without a teacher", "give the same teacher, or name a new run folder")
    old, new = set(saved.meta.get("val_keys", ())), set(run.val_keys)
    if (saved.meta["recipe"]["train"]["val_cases"] != run.recipe.train.val_cases and (old < new or new < old)
            and saved.meta.get("train_sha256") == _sha256_of(run.train_keys)):
        return  # the same files, more or fewer of them to validate on
    saved.demand_same_data(_sha256_of((run.train_keys, run.val_keys)), "training and validation files")


def _sha256_of(keys: list[str] | tuple[list[str], list[str]]) -> str:
    return hashlib.sha256(repr(keys).encode()).hexdigest()
