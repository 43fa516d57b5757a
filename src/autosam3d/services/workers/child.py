"""The worker process itself: loads the model once, then segments one scan after another on request.

Requests come on stdin and answers go to the original stdout, a line of JSON each; what libraries print is discarded.
The process ends when its stdin is closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from autosam3d.errors import AutoSam3dError, ResourceError
from autosam3d.inference.out_of_memory import ran_out_of_memory
from autosam3d.io.memory import resident_bytes, size_text
from autosam3d.services.workers.messages import (
    MAX_LINE,
    ModelFacts,
    WorkerSettings,
    error_message,
    result_message,
    without_paths,
)
from autosam3d.services.workers.scan import ScanJob, ScanProgress, segment_scan

Tell = Callable[[dict[str, Any]], None]

# Address space that libraries map beyond the memory that they use: stacks, arenas, files.
_ADDRESS_SLACK = 1 << 30
# For the kernel's out-of-memory killer: it ends a worker before the service.
_KILL_FIRST = "900"
# The service answers questions about progress while a scan takes all cores.
_NICE = 5


def main() -> None:
    """Take the settings from stdin, load the model, work until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, sys.stdin.buffer), daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    # A log line may name a scan.
    logging.disable(logging.CRITICAL)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_KILL_FIRST, "ascii")
    with contextlib.suppress(BrokenPipeError):
        _work(WorkerSettings.from_dict(requests.get()), requests, tell)
    os._exit(0)  # a normal exit would wait for the thread that reads stdin


def _listen(requests: queue.SimpleQueue[dict[str, Any]], stdin: BinaryIO) -> None:
    while line := stdin.readline(MAX_LINE):
        requests.put(json.loads(line))
    os._exit(0)  # the owner is gone; a scan that is being segmented is given up


def _work(settings: WorkerSettings, requests: queue.SimpleQueue[dict[str, Any]], tell: Tell) -> None:
    from autosam3d.checkpoints.exported import ExportedModel
    from autosam3d.scans.open_model import ModelWish, open_model

    try:
        # Without the memory limit, which would forbid the export that is made once and makes a student faster.
        model = open_model(settings.model, ModelWish(backend=settings.backend, device=settings.device, sam=settings.sam,
                                                     threads=settings.threads))
    except AutoSam3dError as error:
        tell({"error": error_message(error, [])})
        return
    if "torch" in sys.modules and isinstance(model, ExportedModel):
        tell({"again": True})  # the export was made just now; start anew without the memory that its libraries keep
        return
    model.predictor.activation_bytes(1)
    if settings.max_ram_bytes is not None:
        _limit_address_space(settings.max_ram_bytes)
    facts = ModelFacts.of(model)
    tell({"ready": vars(facts)})
    while True:
        request = requests.get()
        job = ScanJob.from_dict(request["job"])
        private = (job.folder, job.source)
        try:
            with _memory_named(settings):
                result = segment_scan(job, model, _progress(tell), settings.max_ram_bytes)
            tell({"done": result_message(result, private)})
        except AutoSam3dError as error:
            tell({"error": error_message(error, private)})
        except OSError as error:
            reason = without_paths(error.strerror or type(error).__name__, private).lower()
            tell({"error": error_message(ResourceError("IO", "scan", f"a file operation failed ({reason})",
                                                       "check the disk and try again"), private)})


def _progress(tell: Tell) -> ScanProgress:
    return lambda stage, done, total: tell({"progress": [stage, done, total]})


@contextlib.contextmanager
def _memory_named(settings: WorkerSettings) -> Any:
    """Turn what libraries raise when memory has run out into one ResourceError, with what is allowed."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError) as error:
        if not ran_out_of_memory(error):
            raise
        allowed = "" if settings.max_ram_bytes is None else f", {size_text(settings.max_ram_bytes)} are allowed"
        raise ResourceError("MEMORY", "scan", f"memory has run out{allowed}",
                            "crop or resample the scan, or allow more memory") from None


def _limit_address_space(max_ram_bytes: int) -> None:
    """Limit what the memory estimate did not foresee, such as the memory of a decoder."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        mapped = pages * resource.getpagesize()
        limit = mapped + max(0, max_ram_bytes - resident_bytes()) + _ADDRESS_SLACK
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
