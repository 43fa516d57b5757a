"""The state of a training run on disk, from which it goes on as if it had never stopped."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosam3d.checkpoints.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from autosam3d.errors import CheckpointError, UsageError, VolumeError
from autosam3d.io.files import write_text_atomic
from autosam3d.models.side_outputs import without_side_outputs
from autosam3d.training.run import Progress, Run

log = logging.getLogger(__name__)


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
        raise CheckpointError("KIND", path, f"expected a training state, got a checkpoint of kind "
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
