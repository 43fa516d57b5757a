"""What one window costs in a runtime, measured in a process of its own: seconds and memory.

Apart, so that no runtime's memory stays in the process that only wanted to know, and one that dies takes nobody along.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from autosam3d.io.memory import peak_bytes, resident_bytes

_log = logging.getLogger(__name__)

_CHILD = "import sys; from autosam3d.checkpoints.probe import in_child; in_child(*sys.argv[1:])"
_SECONDS = 300
_RUNS = 3


@dataclass(frozen=True)
class Cost:
    """Of one window."""

    seconds: float
    """The fastest of a few."""
    activation_bytes: int
    """Resident growth of the first calls beside input and output; 0 where the system does not tell."""


def measure_cost(folder: Path, backend: str, threads: int) -> Cost | None:
    """The cost of a window of an export folder; None where the runtime fails or takes minutes."""
    command = [sys.executable, "-c", _CHILD, str(folder), backend, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True,
                              stdin=subprocess.DEVNULL)
        return Cost(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError, TypeError) as error:
        _log.info("%s: the cost of a window cannot be measured (%s)", backend, type(error).__name__)
        return None


def in_child(folder: str, backend: str, threads: str) -> None:
    """The measurement; its answer goes to stdout, as JSON."""
    from autosam3d.checkpoints.exported import load_exported

    predictor = load_exported(Path(folder), backend, int(threads)).predictor
    patch = np.random.default_rng(0).normal(size=(1, 1, *predictor.patch_size)).astype(np.float32)
    before, seconds, result = resident_bytes(), [], np.empty(0)
    for _ in range(_RUNS):
        started = time.perf_counter()
        result = predictor.predict(patch)
        seconds.append(time.perf_counter() - started)
    peak = peak_bytes()
    grown = max(0, peak - before - 2 * result.nbytes) if peak and before else 0
    sys.stdout.write(json.dumps(asdict(Cost(round(min(seconds), 5), grown))) + "\n")
