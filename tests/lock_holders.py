"""Another process that holds a folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosam3d.io import lock_file

HOLDER = """
import subprocess, sys
from pathlib import Path
from autosam3d.io.lock_file import hold_folder
with hold_folder(Path(sys.argv[1]), sys.argv[2], inherit=sys.argv[3] == "inherit") as held:
    if sys.argv[4] == "stage":
        stage = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], pass_fds=held.descriptors)
        print(stage.pid, flush=True)
    else:
        print("held", flush=True)
    sys.stdin.read()
"""

needs_locks = pytest.mark.skipif(lock_file.fcntl is None, reason="Windows has no such locks")


@contextlib.contextmanager
def held_by_another(folder: Path, name: str, *, inherit: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Inside, another process holds `folder`; it ends in order behind the block, where nobody has killed it."""
    with _started(folder, name, inherit, "") as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.stdin.close()
        holder.wait(60)


@contextlib.contextmanager
def outlived_by_a_stage(folder: Path, name: str, *, inherit: bool) -> Iterator[int]:
    """Inside, the process that held `folder` was killed, and a stage that it had started is at work: its id."""
    with _started(folder, name, inherit, "stage") as holder:
        assert holder.stdout is not None
        stage = int(holder.stdout.readline())
        holder.kill()
        holder.wait(60)
        try:
            yield stage
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stage, signal.SIGKILL)


@contextlib.contextmanager
def _started(folder: Path, name: str, inherit: bool, stage: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), name, "inherit" if inherit else "alone", stage]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            yield holder
        finally:
            holder.kill()
