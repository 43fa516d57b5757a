"""A stop-watch that also sees memory: seconds, CPU seconds and the peak of a process, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Meter:
    """Seconds and peak memory per stage; a stage may be entered many times."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Of all threads; other programs on the machine hardly change it."""
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Peak memory of the whole process inside each stage; empty where the system does not report it (not Linux)."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        watched = _forget_peak()
        started, used = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - used
            if watched:
                self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), _peak_mib())


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts again
    except OSError:
        return False
    return True


def _peak_mib() -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
