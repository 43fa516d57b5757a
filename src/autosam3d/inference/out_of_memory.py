"""How Python and the libraries say that memory has run out. Imports nothing that takes memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from autosam3d.errors import ResourceError


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out. Python and NumPy have `MemoryError` for it, PyTorch's
    accelerators `torch.OutOfMemoryError`; of the others this is the one place that knows their words.
    """
    kind = type(error)
    if isinstance(error, MemoryError) or (kind.__module__, kind.__name__) == ("torch", "OutOfMemoryError"):
        return True
    if isinstance(error, ImportError):
        # glibc's loader, of a compiled library that is imported.
        words: tuple[str, ...] = ("failed to map segment from shared object", "cannot allocate memory",
                                  "Cannot allocate memory")
    elif isinstance(error, RuntimeError):
        # PyTorch's allocator on a CPU, the CUDA runtime, Python's threading, and C++ below ONNX Runtime and OpenVINO.
        words = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "can't start new thread", "std::bad_alloc",
                 "Failed to allocate memory for requested buffer")
    else:
        return False
    return any(word in str(error) for word in words)


@contextlib.contextmanager
def memory_named(where: str | Path, work: str, remedy: str) -> Iterator[None]:
    """Say what was at work where memory ran out inside.

    Args:
        where: the file or the device.
        work: what needs the memory, as the beginning of a sentence.
        remedy: what the user can do.

    Raises:
        ResourceError: MEMORY.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ImportError) as error:
        if not ran_out_of_memory(error):
            raise
        raise ResourceError("MEMORY", where, f"{work} needs more memory than this process may use", remedy) from error
