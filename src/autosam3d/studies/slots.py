"""The slots of this machine: places where one run at a time is trained, each a device with its CPU threads."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from autosam3d.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time is trained."""

    device: str
    """What its processes are given as ``--device``."""
    threads: int
    """Of the CPU."""
    visible_gpu: str | None = None
    """CUDA_VISIBLE_DEVICES of its processes; None leaves the variable as it is."""


def find_slots(devices: str, threads: int) -> list[Slot]:
    """One slot for each GPU that was named or is there, or one for the CPU.

    Args:
        devices: "auto", "cpu", or GPUs as ``cuda:0,cuda:1``.
        threads: of each slot; 0 divides the cores of this process among them.

    Raises:
        UsageError: DEVICE, a GPU is named twice or is not there; USAGE, `devices` is none of the three.
    """
    if devices == "auto":
        numbers = list(range(_num_gpus()))
    elif devices == "cpu":
        numbers = []
    elif re.fullmatch(r"cuda:[0-9]{1,2}(,cuda:[0-9]{1,2})*", devices):
        numbers = [int(part.removeprefix("cuda:")) for part in devices.split(",")]
        there = _num_gpus()
        if max(numbers) >= there or len(set(numbers)) < len(numbers):
            raise UsageError("DEVICE", f"--devices {devices}", f"expected different GPUs of the {there} that are here",
                             "name others, or auto")
    else:
        raise UsageError("USAGE", f"--devices {devices}", "expected auto, cpu, or GPUs as cuda:0,cuda:1",
                         "name one of these")
    if not numbers:
        return [Slot("cpu", threads or available_cores())]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    each = threads or max(1, available_cores() // len(numbers))
    return [Slot("cuda", each, visible[n] if visible else str(n)) for n in numbers]


def available_cores() -> int:
    """The number of cores that this process may use; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
