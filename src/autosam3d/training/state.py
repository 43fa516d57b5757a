"""The state of a training on disk, from which it goes on as if it had never stopped.

``last.json`` names the newest state that is whole, ``previous.json`` the one before it. A state is named tensors (the
tuned weights, their moving average where there is one, what the optimiser keeps of each) and a dictionary: ``kind``,
which training writes such states; ``progress``, where it stands; and what it must be continued with.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from autosam3d.errors import CheckpointError, VolumeError
from autosam3d.io.files import write_text_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What the steps of a training change."""

    network: nn.Module
    tuned: Mapping[str, Tensor]
    """Those of the network's tensors that are kept, by their names in it."""
    optimizer: torch.optim.Optimizer
    average: Mapping[str, Tensor] = field(default_factory=dict)
    """Moving average of `tuned`; empty where there is none."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: ``model.NAME``, ``average.NAME``, ``optimizer.KEY.NAME``."""
        tensors = {f"model.{name}": tensor for name, tensor in self.tuned.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
        return tensors

    def load(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Take over what `tensors` gave.

        Args:
            where: they come from, for messages.

        Raises:
            CheckpointError: MISMATCH, they are not those of this network.
        """
        sections: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            section, _, rest = name.partition(".")
            sections[section][rest] = tensor
        load_strictly(self.network, sections["model"], set(self.tuned), where)
        copy_into(self.average, sections["average"])
        states: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in sections["optimizer"].items():
            key, _, parameter_name = name.partition(".")
            states[parameter_name][key] = tensor
        parameters = dict(self.network.named_parameters())
        for name, state in states.items():
            parameter = parameters[name]
            self.optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in state.items()}


@dataclass(frozen=True)
class SavedState:
    """A state as it was read."""

    path: Path
    """Of its JSON."""
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def demand_same_data(self, data_sha256: str, what: str) -> None:
        """Refuse to go on with data other than those that the run began with.

        Raises:
            VolumeError: DATA_CHANGED.
        """
        if self.meta["data_sha256"] != data_sha256:
            raise VolumeError("DATA_CHANGED", self.path, f"expected the {what} that the run began with, got others",
                              "restore them, or name a new run folder")

    def keep_as_last(self) -> None:
        """Let ``last.json`` name it again, else the next save would keep a damaged state as the previous one.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        last = self.path.with_name("last.json")
        if self.path != last:
            write_text_atomic(last, self.path.read_text("utf-8"))


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """A state to ``last.json``; the one before stays as ``previous.json``.

    Args:
        meta: with ``kind``, ``progress`` and ``data_sha256``.

    Raises:
        ResourceError: the disk is full or not writable; the states that are there stay.
    """
    save_checkpoint(folder / "last.json", tensors, meta, previous=folder / "previous.json")


def read_state(folder: Path, kind: str) -> SavedState | None:
    """The newest whole state in `folder`, None where none was saved; a damaged last one falls back to the one before.

    Args:
        kind: that the training writes.

    Raises:
        CheckpointError: there are states and none can be read.
    """
    fault: CheckpointError | None = None
    for path in (folder / "last.json", folder / "previous.json"):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            _demand_kind(checkpoint.meta, kind, path)
        except CheckpointError as error:
            log.warning("%s", error)
            fault = fault or error
            continue
        return SavedState(path, checkpoint.meta, checkpoint.tensors)
    if fault is not None:
        raise CheckpointError(fault.code, folder, f"its saved states cannot be read ({fault.where}: {fault.fault})",
                              "restore last.json and its weights from a copy, or name a new run folder")
    return None


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite each tensor of `target` by its namesake."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _demand_kind(meta: Mapping[str, Any], kind: str, path: Path) -> None:
    if meta.get("kind") != kind:
        raise CheckpointError("KIND", path, f"expected a state of kind {kind!r}, got a checkpoint of kind "
                              f"{meta.get('kind')!r}", "do not rename checkpoints")
