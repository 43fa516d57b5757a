"""Memory that has run out is known by type, or by the words of the library that says it, and by nothing else."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from autosam3d.errors import CheckpointError, ResourceError
from autosam3d.inference.out_of_memory import memory_named, ran_out_of_memory


def raised_by(code: object) -> BaseException:
    with pytest.raises(BaseException) as caught:
        code()  # type: ignore[operator]
    return caught.value


def test_what_numpy_and_pytorch_raise() -> None:
    assert ran_out_of_memory(raised_by(lambda: np.ones(1 << 50, np.uint8)))
    assert ran_out_of_memory(raised_by(lambda: torch.empty(1 << 50)))
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux")
def test_what_threads_and_imports_raise_where_the_address_space_is_full() -> None:
    code = ("import os, resource, threading, time\n"
            "from autosam3d.inference.out_of_memory import ran_out_of_memory\n"
            "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (pages + (60 << 20),) * 2)\n"
            "try: import torch\n"
            "except ImportError as error: print(ran_out_of_memory(error))\n"
            "try: [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(99)]\n"
            "except RuntimeError as error: print(ran_out_of_memory(error), flush=True)\n"
            "os._exit(0)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\nTrue\n", done.stderr


@pytest.mark.parametrize("error", [
    RuntimeError("expected a budget, it is out of memory of the user"), ValueError("DefaultCPUAllocator: x"),
    ImportError("No module named 'map segment'"), RuntimeError("shape mismatch"), CheckpointError("X", "a", "b", "c"),
])
def test_other_faults_are_not_taken_for_it(error: Exception) -> None:
    assert not ran_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_named("cpu", "a step", "take less"):
        raise error
    assert caught.value is error


def test_it_is_named_with_what_was_at_work() -> None:
    with pytest.raises(ResourceError) as caught, memory_named("cpu", "a training step", "lower train.batch_size"):
        torch.empty(1 << 50)
    assert caught.value.code == "MEMORY" and caught.value.exit_code == 5
    line = "cpu: a training step needs more memory than this process may use; lower train.batch_size"
    assert str(caught.value) == line
