"""A command under a tracer, with a home and a network of its own: what it asked for, and what it left in the home."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# Names resolve at port 53, also where the resolver is this machine's own.
_LOOK_UP = re.compile(r"sin6?_port=htons\(53\)")
_ADDRESS = re.compile(r'sa_family=AF_INET6?,.*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([0-9a-f.:]+)"')
_LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass(frozen=True)
class Traced:
    """What a command did."""

    code: int
    told: str
    """On stdout and stderr."""
    look_ups: list[str]
    """System calls that ask a name server."""
    outside: list[str]
    """System calls that name an address beyond this machine."""
    files: list[str]
    """What lies in the home folder and among the temporary files afterwards, this package's cache left out."""


@functools.cache
def demand_tracer() -> None:
    """Skip the test where no command can be traced in a network of its own."""
    if sys.platform != "linux" or not shutil.which("strace") or not shutil.which("unshare"):
        pytest.skip("needs strace and unshare")
    if subprocess.run(["unshare", "-rn", "strace", "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("needs Linux that lets a user have a network of his own (unshare -rn) and trace in it")


def traced(command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None = None, seconds: float = 120
           ) -> Traced:
    """Run `command` in a new `folder` until it ends, or for `seconds` of a service that does not.

    Args:
        command: a program and its arguments.
        folder: that does not exist; the working folder, HOME and TMPDIR are made in it.
        env: variables beside this process's.
        seconds: after which the command is asked to stop.
    """
    demand_tracer()
    for name in ("here", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    given = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "CI")}
    given |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"} | dict(env or {})
    # A loopback that is up, as every machine has it; nothing else leads out of the namespace.
    line = ["unshare", "-rn", "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh", "strace", "-f", "-qq",
            "--seccomp-bpf", "-e", "trace=connect,bind,sendto,sendmsg,sendmmsg", "-o", str(folder / "trace"),
            "timeout", "-s", "INT", str(seconds), *map(str, command)]
    done = subprocess.run(line, cwd=folder / "here", env=given, capture_output=True, text=True, timeout=seconds + 120)
    calls = (folder / "trace").read_text(errors="replace").splitlines()
    ours = folder / "home" / ".cache" / "autosam3d"
    left = [p for top in ("home", "tmp") for p in sorted((folder / top).rglob("*")) if p.is_file()]
    return Traced(
        done.returncode, done.stdout + done.stderr, [call for call in calls if _LOOK_UP.search(call)],
        [call for call in calls if (to := _ADDRESS.search(call)) and not to[1].startswith(_LOOPBACK)],
        [str(p.relative_to(folder)) for p in left if not p.is_relative_to(ours)])
