"""The real command line in milliseconds: `run` and `start` fork a process that has imported everything.

In the fork runs `autosam3d.cli.main.main` with its own arguments, working folder, environment, resource limits, stdout,
stderr and exit code; nothing is replaced but that typer has read the signatures of the commands before. It is a
process, so it can be killed, run out of memory or write into a full disk without harm to the test.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERVER = """
import encodings.ascii, gc, json, os, resource, runpy, signal, sys, time
import PIL.Image, rich.progress, torch, torch.utils.tensorboard, typer.main
import autosam3d.cli.main, autosam3d.training.train, autosam3d.checkpoints.describe, autosam3d.evaluation.report
import autosam3d.io.dicom.series, autosam3d.data.download, autosam3d.scans.batch, autosam3d.checkpoints.checkpoint
import autosam3d.evaluation.overlay, autosam3d.data.phantom, autosam3d.scans.open_model
import autosam3d.io.dicom.archive, autosam3d.models.autosam.network
torch.set_num_threads(1)
PIL.Image.init()
command = typer.main.get_command(autosam3d.cli.main.app)  # 50 ms of reading signatures
typer.main.get_command = lambda app: command

def run(request):
    for number, name in enumerate((os.devnull, request["out"], request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    if request["more_bytes"] is not None:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + request["more_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    sys.argv = ["autosam3d", *map(os.fsdecode, map(bytes.fromhex, request["args"]))]
    code = 99
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        else:
            autosam3d.cli.main.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def wait(pid, seconds):
    end = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.004)

print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "warm" in request:
        # The dry run that foresees a network's memory is slow the first time it meets an operator.
        autosam3d.checkpoints.checkpoint.load_model(request["warm"]).predictor.activation_bytes(1)
        print(json.dumps(None), flush=True)
        continue
    if "load" in request:
        __import__(request["load"])
        print(json.dumps(None), flush=True)
        continue
    if "wait" in request:
        print(json.dumps(wait(request["wait"], request["seconds"])), flush=True)
        continue
    gc.freeze()  # or the first collection in a fork copies every page that holds an object
    pid = os.fork()
    if pid == 0:
        run(request)
    print(json.dumps(pid), flush=True)
"""

_ERROR_LINE = re.compile(r"error\[([A-Z][A-Z0-9_]*)\] \S.*: \S.*; \S.*")


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    """The exit code, or minus the signal that killed it."""
    out: str
    err: str
    peak_bytes: int
    """Most memory it held, that of the process it was forked from included."""
    cpu_seconds: float

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("WARNING: ")]

    def demand_ok(self) -> Done:
        """Exit code 0 and nothing on stderr but warnings."""
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        strangers = [line for line in self.err.splitlines() if not line.startswith("WARNING: ")]
        assert not strangers, f"beside warnings stderr holds {strangers}"
        return self

    def demand_error(self, code: str, exit_code: int) -> str:
        """The contract of a failure: one line ``error[CODE] where: fault; remedy``, its exit code, no traceback, and
        before it nothing but warnings; nothing on stdout. Returns the line."""
        assert "Traceback" not in self.err, self.err
        assert self.code == exit_code, f"expected exit code {exit_code}, got {self.code}: {self.err}"
        *before, line = self.err.splitlines() or [""]
        assert _ERROR_LINE.fullmatch(line), f"not the form of an error line: {self.err!r}"
        assert line.startswith(f"error[{code}] "), f"expected {code}, got: {line}"
        strangers = [other for other in before if not other.startswith("WARNING: ")]
        assert not strangers, f"before the error line stand {strangers}"
        assert not self.out, f"stdout of a failure: {self.out!r}"
        return line


@dataclass
class Started:
    """A command at work."""

    pid: int
    line: CommandLine
    out: Path
    err: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Done:
        ended = self.line.ask({"wait": self.pid, "seconds": seconds})
        out, err = (path.read_text("utf-8", errors="surrogateescape") for path in (self.out, self.err))
        assert ended is not None, f"still running after {seconds} s: {err}"
        return Done(ended[0], out, err, ended[1], ended[2])


class CommandLine:
    """The process that is forked; its commands write their output into files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            environment.pop(name, None)
        self._server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)
        assert self._answer() == "ready"

    def start(
        self, *args: object, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None, more_bytes: int | None = None, script: Path | None = None,
    ) -> Started:
        """See the function `start`."""
        self._count += 1
        out, err = (self._folder / f"{kind}{self._count}" for kind in ("out", "err"))
        for path in (out, err):
            path.touch()  # a child may be killed before it opens them
        pid = self.ask({
            "args": [os.fsencode(str(a)).hex() for a in args], "out": str(out), "err": str(err),
            "cwd": str(cwd or self._folder), "env": dict(env or {}), "limits": dict(limits or {}),
            "more_bytes": more_bytes, "script": script and str(script),
        })
        return Started(pid, self, out, err)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def start(*args: object, **how: Any) -> Started:
    """Start ``autosam3d ARGS``.

    Args:
        cwd, env: working folder, and variables beside those of the test.
        limits: of `resource.setrlimit`, by their names without RLIMIT_.
        more_bytes: address space beyond what the process has when it begins.
        script: a Python file that is run with ARGS instead.
    """
    return _line().start(*args, **how)


def run(*args: object, seconds: float = 120, **how: Any) -> Done:
    """``autosam3d ARGS`` from start to end; `how` as in `start`."""
    return start(*args, **how).wait(seconds)


@functools.cache
def load_once(module: str) -> None:
    """Import `module` before the commands of this session, which else does each by itself."""
    _line().ask({"load": module})


@functools.cache
def warm(model: Path) -> None:
    """Foresee the memory of `model` before the commands of this session, each of which takes a second for a network of
    other operators than the mini model's."""
    _line().ask({"warm": str(model)})


@functools.cache
def mini_model() -> Path:
    """A model folder (read-only, please) whose tiny network has random weights."""
    folder = _folder() / "model"
    folder.mkdir()
    write_model(folder)
    return folder


def write_model(folder: Path, seed: int = 0, model: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A model of `mini_recipe` with `changes`, or with another `model` section, as ``folder/best.json``."""
    import torch

    from autosam3d.checkpoints.checkpoint import save_checkpoint
    from autosam3d.models.build import build_network
    from autosam3d.recipes.recipe import recipe_from_dict
    from mini_run import mini_recipe

    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    recipe = mini_recipe(**changes)
    if model is not None:
        recipe = recipe_from_dict(recipe.as_dict() | {"model": dict(model)}, "test")
    meta = {"kind": "model", "contains": "all", "recipe": recipe.as_dict(), "sam": None, "epoch": 0, "metrics": {},
            "torch": torch.__version__}
    save_checkpoint(folder / "best.json", build_network(recipe.model).state_dict(), meta)
    return folder


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="autosam3d-cli-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _line() -> CommandLine:
    line = CommandLine(_folder())
    atexit.register(line.close)
    line.ask({"warm": str(mini_model())})
    return line


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Inside, nothing in `folder` may appear, vanish or change; the folder itself need not exist."""
    before = contents(folder)
    yield
    after = contents(folder)
    assert after == before, f"{folder} changed: {sorted(set(after) ^ set(before)) or 'other contents'}"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path below `folder` to content, None for a folder; {} where there is nothing."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
