"""The devices of this machine, each a place for one run at a time."""

from __future__ import annotations

import os
import re

from autosam3d.errors import UsageError
from autosam3d.studies.reproduce.runner import Worker


def find_workers(devices: str, threads: int) -> list[Worker]:
    """One worker for each GPU that was named or is there, or one for the CPU.

    Args:
        devices: "auto", "cpu", or GPUs as ``cuda:0,cuda:1``.
        threads: of each; 0 shares the cores of this process.

    Raises:
        UsageError: DEVICE.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
        return [Worker("cpu", threads or cores)]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    each = threads or max(1, cores // len(numbers))
    return [Worker("cuda", each, visible[n] if visible else str(n)) for n in numbers]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
