"""What the model benchmarks share: one measurement in a process of its own, the machine, and the result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def measure(work: Callable[[], object], runs: int) -> dict[str, float]:
    """Fastest of `runs` calls in seconds of CPU time, and the MB that one call needs at its peak beyond what was held.

    CPU time on one thread is the time on an idle machine, more or less, also where other work goes on beside.
    The peak is the kernel's (Linux: VmHWM), set back before the call, so that imports and the parent do not count.
    The first call, which also prepares the libraries' kernels, is not measured.
    """
    work()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mb("VmRSS")
    work()
    peak_mb = _resident_mb("VmHWM") - before
    best = float("inf")
    for _ in range(runs):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return {"cpu_seconds": round(best, 4), "peak_mb": round(peak_mb, 1)}


def _resident_mb(kind: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def in_child(script: str, *variant: str) -> dict[str, Any]:
    """Run ``script variant...`` in a fresh process, so that one's memory cannot hide another's; it prints JSON."""
    done = subprocess.run([sys.executable, script, *variant], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_result(name: str, result: dict[str, Any], seed: int) -> None:
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python benchmarks/bench_{name}.py",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads_used": torch.get_num_threads(),
                    "load_average": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seed": seed,
    }
    text = json.dumps(head | result, indent=1) + "\n"
    (Path(__file__).parent / "results" / f"{name}.json").write_text(text)
    print(text, end="")
