"""A limit of open files is raised where it may be, and named where it is reached."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from autosam3d.errors import ResourceError
from autosam3d.io.files import readable, write_bytes_atomic
from autosam3d.io.open_files import at_limit, demand_open_files
from mini_run import environment


def reached(number: int = errno.EMFILE) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(("error", "meant"), [
    (reached(), True), (reached(errno.ENFILE), True), (reached(errno.EIO), False),
    (ValueError("too many open files"), False), (OSError("too many words"), False),
    (RuntimeError("unable to open shared memory object: Too many open files (24)"), True),
    (OSError("I/O error: Too many open files (os error 24)"), True),
])
def test_which_errors_say_so(error: Exception, meant: bool) -> None:
    assert at_limit(error) == meant


def test_reading_and_writing_name_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError) as caught, readable(tmp_path / "scan.nii"):
        raise reached()
    assert caught.value.code == "OPEN_FILES" and caught.value.where.endswith("scan.nii")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(reached()))
    with pytest.raises(ResourceError) as caught:
        write_bytes_atomic(tmp_path / "out", b"x")
    assert caught.value.code == "OPEN_FILES" and not list(tmp_path.iterdir())


def test_the_limit_is_raised_as_far_as_the_system_lets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        demand_open_files(lower - 1, "here", "do less")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == lower
        demand_open_files(lower + 7, "here", "do less")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (lower + 7, hard)
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ResourceError, match=f"here: expected that {hard + 1} files .* or do less"):
                demand_open_files(hard + 1, "here", "do less")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_command_line_names_it_wherever_it_is_met(tmp_path: Path) -> None:
    code = ("import sys, autosam3d.cli.main as m, autosam3d.cli.inspect\n"
            "def full(*a, **k): raise OSError(24, 'Too many open files', 'organs.npy')\n"
            "m.app = full\nm.main()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 5 and done.stderr.startswith("error[OPEN_FILES] organs.npy: cannot be opened")
