"""A training run: its parts, its folder, and its state on disk, from which it goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import (
    SamSource,
    attach_sam,
    load_strictly,
    read_checkpoint,
    save_checkpoint,
)
from autosam3d.errors import CheckpointError, RecipeError, ResourceError, UsageError, VolumeError
from autosam3d.inference.torch_runtime import bf16_in_hardware, pick_device
from autosam3d.io.files import remove_stale_temporaries, write_text_atomic
from autosam3d.io.lock_file import HeldError, sign_lock, take_lock
from autosam3d.io.memory import size_text
from autosam3d.models.autosam.sam_weights import frozen_names
from autosam3d.models.build import build_network
from autosam3d.models.side_outputs import without_side_outputs
from autosam3d.models.spec import AutoSamSpec
from autosam3d.recipes.recipe import Recipe, dump_recipe, recipe_from_dict
from autosam3d.recipes.yaml_text import parse_yaml
from autosam3d.training.optimizer import build_optimizer, state_bytes
from autosam3d.training.stopping import Interrupted, StopRequest, stop_inside
from autosam3d.training.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; all of it is in the training state on disk."""

    epoch: int = 0
    step_in_epoch: int = 0
    """Steps of `epoch` that are done; an epoch whose steps are all done may still lack its validation."""
    global_step: int = 0
    best_dice: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0
    """Time spent so far, over all starts of the run."""


@dataclass
class Observer:
    """What the command line shows; every call is optional."""

    on_cache: Callable[[int, int], None] = lambda done, total: None
    on_teacher: Callable[[int, int], None] = lambda done, total: None
    on_step: Callable[[int, int, Mapping[str, float]], None] = lambda done, total, values: None
    on_validation: Callable[[int, int], None] = lambda done, total: None
    on_message: Callable[[str], None] = lambda text: None


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
    progress: Progress = field(default_factory=Progress)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the tuned weights; empty when `optim.ema` is 0."""
    bad_steps: int = 0
    """Steps in a row, up to the last one, whose gradient was not finite."""
    data_sha256: str = ""
    """Of everything that the preprocessed cases were made from."""
    saved: Progress | None = None
    """Where the state on disk stands; None where there is none."""
    teacher: Teacher | None = None
    """Of a student; None where there is none or the labels alone count."""

    @cached_property
    def tuned(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps: all, less the frozen ones of a SAM file."""
        state = self.network.state_dict()
        left_out = set(frozen_names(self.network)) if self.sam and self.recipe.train.freeze_sam else set()
        return {name: tensor for name, tensor in state.items() if name not in left_out}

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


@contextmanager
def hold_run_folder(folder: Path, fabric: Fabric) -> Iterator[None]:
    """Make `folder`; inside, this run alone trains there. The lock ends with the process, however it ends.

    Raises:
        UsageError: RUNNING, another process trains there.
        ResourceError: UNWRITABLE.
    """
    with contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            with _demand_writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / "train.lock").open("a+", encoding="utf-8"))
            _lock(file, folder)
        yield


def _lock(file: TextIO, folder: Path) -> None:
    try:
        take_lock(file)
    except HeldError as owner:
        raise UsageError("RUNNING", folder, f"expected a run folder that nobody trains in, another process does "
                         f"({owner})", "wait for its end, or name another folder with --out") from None
    except OSError as error:  # some network file systems have none
        log.info("%s: cannot be locked (%s)", folder, error.strerror)
    with _demand_writable(folder):
        sign_lock(file)


@contextmanager
def _demand_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError("UNWRITABLE", folder, f"expected a folder that may be written ({error.strerror})",
                            "name another folder") from None


def prepare_run_folder(folder: Path, recipe: Recipe, fabric: Fabric) -> None:
    """Write recipe.yaml into `folder`, or check that the run in it is of the same recipe and settings.

    A run that has not saved anything yet is none: its recipe may be replaced.

    Raises:
        UsageError: OTHER_RUN.
        ResourceError: UNWRITABLE or NOT_WRITABLE.
    """
    path = folder / "recipe.yaml"
    text = dump_recipe(recipe)
    if fabric.is_global_zero:
        with _demand_writable(folder):
            remove_stale_temporaries(folder)
            begun = any((folder / f"{name}.json").exists() for name in ("last", "previous", "best"))
            if not path.exists() or (not begun and path.read_bytes() != text.encode()):
                write_text_atomic(path, text)
    fabric.barrier()
    there = path.read_bytes().decode("utf-8", errors="replace")
    if there != text and not _means(there, recipe, path):
        pairs = zip_longest(there.splitlines(), text.splitlines(), fillvalue="nothing")
        old, new = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        raise UsageError("OTHER_RUN", folder, f"it holds a run of another recipe or other settings: expected {old!r} "
                         f"as in its recipe.yaml, got {new!r}",
                         "name a new folder with --out, or give the same settings")


def _means(text: str, recipe: Recipe, path: Path) -> bool:
    """Whether a resolved recipe is this one: a key that an older version did not know has its default."""
    try:
        return recipe_from_dict(parse_yaml(text, str(path)), path) == recipe
    except RecipeError:
        return False


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


def demand_space(run: Run) -> None:
    """Refuse a run whose checkpoints cannot fit on the disk, at the start rather than hours later.

    Raises:
        ResourceError: NO_SPACE.
    """
    if not run.fabric.is_global_zero:
        return
    weights = sum(t.nbytes for t in run.tuned.values())
    state = weights + sum(t.nbytes for t in run.average.values())
    state += state_bytes(run.network, run.recipe)
    # last, previous and the next one being written; best and the next one.
    needed = 3 * state + 2 * weights - sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise ResourceError("NO_SPACE", run.folder, f"expected {size_text(needed)} free for the checkpoints, got "
                            f"{size_text(free)}", "free some space or name another folder with --out")


def save_state(run: Run) -> None:
    """The whole state of training to ``last.json``; the one before stays as ``previous.json``."""
    run.fabric.barrier()
    if run.fabric.is_global_zero:
        tensors = {f"model.{name}": tensor for name, tensor in run.tuned.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in run.average.items()}
        names = {id(parameter): name for name, parameter in run.network.named_parameters()}
        for parameter, state in run.optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
        place = {"progress": vars(run.progress), "data_sha256": run.data_sha256, "world_size": run.fabric.world_size}
        save_checkpoint(run.folder / "last.json", tensors, _meta(run, "training") | place,
                        previous=run.folder / "previous.json")
    run.fabric.barrier()
    run.saved = replace(run.progress)


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
        "epoch": run.progress.epoch,
        "torch": torch.__version__,
    }


def resume(run: Run) -> None:
    """Take up the state in the run folder, if there is one; a damaged last state falls back to the one before.

    Raises:
        CheckpointError: there are states and none can be read.
        UsageError: OTHER_SAM, OTHER_TEACHER.
        VolumeError: DATA_CHANGED.
    """
    last, fault = run.folder / "last.json", None
    for path in (last, run.folder / "previous.json"):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            _demand_state(checkpoint.meta, path)
        except CheckpointError as error:
            log.warning("%s", error)
            fault = fault or error
            continue
        _demand_same_origin(run, checkpoint.meta, path)
        _load_state(run, checkpoint.tensors, path)
        run.progress = Progress(**checkpoint.meta["progress"])
        # Positions of crops are the same for any number of processes; only steps are counted in larger bites.
        bites = checkpoint.meta["world_size"], run.fabric.world_size
        run.progress.step_in_epoch = run.progress.step_in_epoch * bites[0] // bites[1]
        if path != last and run.fabric.is_global_zero:
            # Else the next save would keep the damaged state as the previous one.
            write_text_atomic(last, path.read_text("utf-8"))
        run.saved = replace(run.progress)
        run.observer.on_message(f"resuming at epoch {run.progress.epoch + 1}, step {run.progress.global_step}")
        return
    if fault is not None:
        raise CheckpointError(fault.code, run.folder, f"its saved states cannot be read ({fault.where}: {fault.fault})",
                              "restore last.json and its weights from a copy, or name a new run folder")


def _demand_state(meta: Mapping[str, Any], path: Path) -> None:
    if meta.get("kind") != "training":
        raise CheckpointError("MISMATCH", path, f"expected a training state, got a checkpoint of kind "
                              f"{meta.get('kind')!r}", "do not rename checkpoints")


def _demand_same_origin(run: Run, meta: Mapping[str, Any], path: Path) -> None:
    before, now = (meta.get("sam") or {}).get("sha256"), run.sam.sha256 if run.sam else None
    if before != now:
        raise UsageError("OTHER_SAM", path, "the run began with other SAM weights" if before else
                         "the run began without SAM weights", "give the same --sam, or name a new run folder")
    before, now = (meta.get("teacher") or {}).get("sha256"), run.teacher.origin["sha256"] if run.teacher else None
    if before != now:
        raise UsageError("OTHER_TEACHER", path, "the run began with another teacher" if before else
                         "the run began without a teacher", "give the same teacher, or name a new run folder")
    if meta["data_sha256"] != run.data_sha256:
        raise VolumeError("DATA_CHANGED", path, "expected the training and validation files that the run began with, "
                          "got others", "restore them, or name a new run folder")


def _load_state(run: Run, tensors: Mapping[str, Tensor], path: Path) -> None:
    sections: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        section, _, rest = name.partition(".")
        sections[section][rest] = tensor
    load_strictly(run.network, sections["model"], set(run.tuned), path)
    if run.average:
        copy_into(run.average, sections["average"])
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in sections["optimizer"].items():
        key, _, parameter_name = name.partition(".")
        states[parameter_name][key] = tensor
    parameters = dict(run.network.named_parameters())
    for name, state in states.items():
        run.optimizer.state[parameters[name]] = {key: t.to(parameters[name].device) for key, t in state.items()}


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite each tensor of `target` by its namesake."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


