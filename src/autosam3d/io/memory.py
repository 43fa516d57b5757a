"""How much memory a reader may allocate, checked before it allocates."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from autosam3d.errors import ResourceError

# The rest is left to the process and the machine.
_USABLE_SHARE = 0.9


def available_ram_bytes() -> int | None:
    """Memory that this process may still allocate: the least of the machine's free memory, its control group's and its
    address-space limit. None where the platform reports none of them."""
    limits = [limit for limit in (_machine(), _control_group(), _address_space()) if limit is not None]
    return max(0, min(limits)) if limits else None


def resident_bytes() -> int:
    """Memory that this process holds now: interpreter, libraries, weights, data. Its peak where the platform reports
    only that; 0 where it reports nothing."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process ever held; 0 where the platform does not report it."""
    # Linux's `ru_maxrss` starts at the memory of the process that started this one.
    if peak := _status("VmHWM"):
        return peak
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
    except (ImportError, OSError, ValueError):
        return 0


def _status(key: str) -> int:
    """A size of this process in bytes, as Linux reports it; 0 where it does not."""
    try:
        for line in Path("/proc/self/status").read_text("ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def demand_ram(
    needed_bytes: int, where: str | Path, max_ram_bytes: int | None = None, *, work: str = "reading",
    remedy: str = "crop or resample the scan, or use a larger machine",
) -> None:
    """Raise before memory is allocated that is not there.

    Args:
        needed_bytes: in addition to what the process holds already.
        max_ram_bytes: the limit for the whole process; None takes what is free.
        work: what needs the memory, for the message.

    Raises:
        ResourceError: MEMORY, with the bytes needed and the bytes available: of the whole process where `max_ram_bytes`
            is given, else in addition to what it holds already.
    """
    if max_ram_bytes is not None:
        held = resident_bytes()
        if held + needed_bytes > max_ram_bytes:
            raise ResourceError("MEMORY", where, f"{work} needs {size_text(held + needed_bytes)} of memory, "
                                f"{size_text(held)} of them for the program itself, {size_text(max_ram_bytes)} are "
                                "allowed", remedy)
        return
    available = available_ram_bytes()
    if available is not None and needed_bytes > int(available * _USABLE_SHARE):
        raise ResourceError("MEMORY", where, f"{work} needs {size_text(needed_bytes)} of memory, "
                            f"{size_text(int(available * _USABLE_SHARE))} are free", remedy)


def limit_memory(max_ram_bytes: int, slack_bytes: int) -> None:
    """Have the system refuse this process more memory than a limit leaves: what no plan foresaw then ends as an error
    that says so. Only Linux counts this; elsewhere nothing changes.

    Args:
        max_ram_bytes: the limit for the whole process.
        slack_bytes: what may be mapped beyond it without ever being touched: stacks of threads, an allocator's reserve.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        if mapped := _status("VmData"):
            limit = mapped + max(0, max_ram_bytes - resident_bytes()) + slack_bytes
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def size_text(num_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} PiB"


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _control_group() -> int | None:
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int(Path(limit_file).read_text("ascii"))  # "max" is no number: no limit
            return limit - int(Path(usage_file).read_text("ascii")) + _cached_files(Path(usage_file).parent)
        except (OSError, ValueError):
            continue
    return None


def _cached_files(group: Path) -> int:
    """File pages that a control group counts as used but gives back when memory runs short."""
    for line in (group / "memory.stat").read_text("ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _address_space() -> int | None:
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        return soft - pages * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
