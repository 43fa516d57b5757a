"""How much memory a scan will need, and how much there is: asked before the work, not answered by the OOM killer."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autosam3d.axes import Size
from autosam3d.errors import ResourceError
from autosam3d.io.memory import available_ram_bytes, size_text

_log = logging.getLogger(__name__)

# Allocator rounding, Python, and arrays too small to be counted.
_MARGIN = 1.1
# What libraries load and threads claim at their first use, after the plan: with torch 2.13 on a CPU 10 to 25 MiB.
_FIRST_USE_BYTES = 32 << 20
# File systems that live in memory: an accumulator there would save nothing.
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per part of the way, at the moment when all parts exist together."""

    process: int = 0
    """What the process holds already beside the scan: interpreter, libraries, weights."""
    scan: int
    """The volume itself, which the caller holds."""
    prepared: int
    accumulator: int
    """The stitcher's sums and weights, as far as they lie in memory."""
    slabs: int
    """Finished slices on their way to labels."""
    labels: int
    predict: int
    """The model's input, output and activations for one batch."""
    batch_size: int = 1
    half: bool = False
    """Sums in float16."""
    scratch: Path | None = None
    """The folder of the sums; None keeps them in memory."""

    @property
    def total(self) -> int:
        """Of the whole process."""
        parts = self.scan + self.prepared + self.accumulator + self.slabs + self.labels + self.predict
        return self.process + _FIRST_USE_BYTES + math.ceil(parts * _MARGIN)

    def __str__(self) -> str:
        parts = ("process", "scan", "prepared", "accumulator", "slabs", "labels", "predict")
        sums = "on disk" if self.scratch else "float16" if self.half else "float32"
        listed = ", ".join(f"{name} {size_text(getattr(self, name))}" for name in parts)
        return f"{size_text(self.total)} ({listed}; batch {self.batch_size}, sums {sums})"


def estimate_ram_bytes(
    native_shape: Size, padded_shape: Size, num_outputs: int, patch_size: Size, predict_bytes: int, batch_size: int = 1,
    process_bytes: int = 0,
) -> MemoryPlan:
    """What `segment` will hold at its widest, with sums in float32 in memory.

    Args:
        native_shape: of the scan.
        padded_shape: of the prepared grid, grown to at least the patch.
        num_outputs: K.
        patch_size: of the windows.
        predict_bytes: what the predictor needs beside its input and output for one batch.
        batch_size: windows per call of the predictor.
        process_bytes: what the process holds at this moment beside the scan.
    """
    plane, native_plane = math.prod(padded_shape[1:]), math.prod(native_shape[1:])
    return MemoryPlan(
        process=process_bytes,
        scan=4 * math.prod(native_shape),
        prepared=4 * math.prod(padded_shape),
        accumulator=4 * (num_outputs + 1) * patch_size[0] * plane,
        # One slab of 8 slices, two slices in the restorer; per native slice a few planes of one class.
        slabs=4 * 10 * num_outputs * plane + 4 * 6 * native_plane,
        labels=math.prod(native_shape),
        # Two windows at a time: while the next is predicted, the last one is still being added. The answer to air is
        # kept.
        predict=4 * math.prod(patch_size) * (2 * batch_size * (1 + num_outputs) + num_outputs) + predict_bytes,
        batch_size=batch_size,
    )


def fit_memory(plan: MemoryPlan, smaller_batch: MemoryPlan, max_ram_bytes: int | None, where: str) -> MemoryPlan:
    """The first way to do the work that fits: as planned, batch 1, sums in half precision, sums on disk.

    Args:
        plan: the wish.
        smaller_batch: the same with one window per batch.
        max_ram_bytes: the limit for the whole process; None takes what the machine has free beside what the process
            holds already.
        where: named in the error.

    Raises:
        ResourceError: MEMORY, with the bytes needed at least and those allowed: of the whole process where there is
            a limit for it, else beside what it holds already.
    """
    held = plan.process + plan.scan
    free = available_ram_bytes() if max_ram_bytes is None else None
    allowed = max_ram_bytes if max_ram_bytes is not None else None if free is None else free + held
    smallest = plan
    for choice in _choices(plan, smaller_batch):
        if allowed is None or choice.total <= allowed:
            if choice is not plan:
                _log.warning("memory is short (%s allowed): %s", size_text(allowed or 0), choice)
            else:
                _log.info("memory planned: %s", choice)
            return choice
        smallest = min(smallest, choice, key=lambda c: c.total)
    if free is not None:
        needed, there = f"{size_text(smallest.total - held)} more memory", f"{size_text(free)} are free"
    else:
        assert max_ram_bytes is not None
        needed = f"{size_text(smallest.total)} of memory"
        there = f"{size_text(plan.process)} of them for the program itself, {size_text(max_ram_bytes)} are allowed"
    raise ResourceError(
        "MEMORY", where, f"needs {needed} at least, {there}",
        "use a machine with more memory, crop the scan, or take a model with smaller patches",
    )


def _choices(plan: MemoryPlan, smaller_batch: MemoryPlan) -> Iterator[MemoryPlan]:
    yield plan
    if plan.batch_size > 1:
        yield smaller_batch
    yield replace(smaller_batch, half=True, accumulator=smaller_batch.accumulator // 2)
    folder = Path(tempfile.gettempdir())
    if not _lives_in_memory(folder) and shutil.disk_usage(folder).free > 1.1 * smaller_batch.accumulator:
        # Written pages can be dropped; the eighth is what one window touches in an abdomen.
        yield replace(smaller_batch, scratch=folder, accumulator=smaller_batch.accumulator // 8)


def _lives_in_memory(folder: Path) -> bool:
    """Whether a folder's file system is memory; False where the system does not tell."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text("utf-8").splitlines()
    except OSError:
        return False
    for line in mounts:
        _, place, this_kind = line.split(" ")[:3]
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, this_kind
    return kind in _MEMORY_FILE_SYSTEMS
