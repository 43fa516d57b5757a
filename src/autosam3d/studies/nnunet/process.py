"""Runs nnU-Net as another program: finds it, starts its stages, reads their events, stops them, explains failures."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosam3d.errors import MissingExtraError, ResourceError, UsageError

MIN_VERSION = (2, 8)
MARK = "@autosam3d "
# The longest wait for a stop: nnU-Net finishes its step and saves.
_STOP_S = 30
_PROBE_S = 300
_TAIL = 12
_PROBE = """
import json
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
found = {name: version(name) for name in ("nnunetv2", "torch", "torchvision")}
if found["torch"]:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.cuda.is_available(),
              "mps": torch.backends.mps.is_available()}
print("\\n@autosam3d " + json.dumps(found))
"""
# A bar of nnU-Net's: "Preprocessing cases:  20%|##  | 23/114 [01:56<..."
_BAR = re.compile(r"\s*([^:%]*):?\s+\d+%\|.*\| (\d+)/(\d+) \[")
_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator|MemoryError|[Cc]annot allocate memory")
_DISK = re.compile(r"No space left on device|Disk quota exceeded")

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class NnunetEnvironment:
    """A Python that can run nnU-Net."""

    python: str
    version: str
    torch: str
    cuda: bool
    mps: bool

    def device(self, wish: str) -> tuple[str, str | None]:
        """(nnU-Net's word for the device, value for CUDA_VISIBLE_DEVICES) of auto, cpu, mps, cuda or cuda:N."""
        if wish == "auto":
            wish = "cuda" if self.cuda else "cpu"
        kind, _, number = wish.partition(":")
        if (kind == "cuda" and not self.cuda) or (kind == "mps" and not self.mps):
            raise UsageError("DEVICE", wish, f"expected a device of the torch {self.torch} in {self.python}, got none "
                             "of that kind", "use --device cpu, or install a torch that has it there")
        return kind, number or None


@functools.cache
def find_nnunet(python: str | Path | None = None) -> NnunetEnvironment:
    """nnU-Net in the environment of `python`; default this one. Asked once a process; only torch is imported there.

    Raises:
        UsageError: PYTHON, there is no such program or it does not answer.
        MissingExtraError: NNUNET, it lacks nnunetv2 or has an old one; TORCHVISION, the CUDA build of torchvision
            lies beside a CPU build of torch, so that torch's own operators fail.
    """
    program = str(python or sys.executable)
    try:
        done = subprocess.run([program, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S,
                              stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = "no answer" if isinstance(error, subprocess.TimeoutExpired) else (error.strerror or "").lower()
        raise UsageError("PYTHON", program, f"expected a Python that runs, got: {reason}",
                         "name bin/python of the environment that has nnunetv2 with --python") from None
    line = next((text for text in done.stdout.splitlines() if text.startswith(MARK)), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UsageError("PYTHON", program, f"expected a Python that imports torch, got: {last}",
                         "repair that environment, or name another one with --python")
    found = json.loads(line.removeprefix(MARK))
    version, torch, torchvision = (found[name] or "" for name in ("nnunetv2", "torch", "torchvision"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MIN_VERSION or not torch:
        raise MissingExtraError("NNUNET", program, f"expected nnunetv2 2.8 or newer and torch, got nnunetv2 "
                                f"{version or 'missing'} and torch {torch or 'missing'}",
                                "install it in a venv of its own, as the README says, and name that with --python")
    if "+cpu" in torch and torchvision and "+cpu" not in torchvision:
        raise MissingExtraError("TORCHVISION", program, f"expected no CUDA build of torchvision beside torch {torch}, "
                                f"got torchvision {torchvision}: it breaks torch",
                                f"{program} -m pip uninstall torchvision timm; nnU-Net does without them")
    return NnunetEnvironment(program, version, torch, bool(found.get("cuda")), bool(found.get("mps")))


def run_stage(
    environment: NnunetEnvironment, script: Path, stage: str, spec: Path, *, log: Path,
    variables: Mapping[str, str], on_event: OnEvent, descriptors: Sequence[int] = (),
) -> None:
    """Run a stage of `script`; its output is appended to `log`, its events go to `on_event`.

    However this function is left, no process of the stage is left: an exception here, Ctrl-C among them, asks the
    stage to save and to end, and ends it after half a minute.

    Args:
        descriptors: that the stage keeps open: of a held folder, so that it is held as long as the stage works.

    Raises:
        UsageError: NNUNET_REFUSED, the stage says why it cannot do what is asked.
        ResourceError: MEMORY, NO_SPACE, else NNUNET_FAILED with the last line of its output; an event of kind
            ``tail`` with its last lines comes before.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    refused: list[str] = []
    command = [environment.python, str(script), stage, str(spec)]
    with log.open("a", encoding="utf-8", errors="replace") as written, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", env={**os.environ, **variables}, start_new_session=True,
        pass_fds=descriptors,
    ) as child:
        try:
            written.write(f"\n$ {' '.join(command)}\n")
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(MARK):
                    event = json.loads(line.removeprefix(MARK))
                    refused += [event["text"]] if event["kind"] == "refused" else []
                    on_event(event)
                elif bar := _BAR.match(line):
                    on_event({"kind": "bar", "text": bar[1], "done": int(bar[2]), "total": int(bar[3])})
                else:
                    written.write(line)
                    written.flush()
                    tail += [line.strip()] if line.strip() else []
            code = child.wait()
        finally:
            _end(child)
    if refused:
        raise UsageError("NNUNET_REFUSED", stage, refused[0], "change the option")
    if code:
        on_event({"kind": "tail", "lines": list(tail)})
        raise _explained(stage, code, list(tail), log)


def _end(child: subprocess.Popen[str]) -> None:
    """Ask the stage to end, then kill what is left of it and of the processes that it started."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        except BaseException:
            _kill_group(child)
            raise
    _kill_group(child)


def _kill_group(child: subprocess.Popen[str]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _explained(stage: str, code: int, tail: list[str], log: Path) -> ResourceError:
    text = "\n".join(tail)
    remedy = f"see {log}; the same command goes on with this stage"
    if code == -signal.SIGKILL or _MEMORY.search(text):
        return ResourceError("MEMORY", f"nnU-Net's {stage}", "expected enough memory, and it ran out or the process "
                             "was killed", f"free memory or take a smaller --patch or --batch; {remedy}")
    if _DISK.search(text):
        return ResourceError("NO_SPACE", f"nnU-Net's {stage}", "expected space on the disk, got none",
                             f"make room; {remedy}")
    last = next((line for line in reversed(tail) if re.match(r"\w*(Error|Exception|Interrupt)\b", line)), "")
    last = last or (tail[-1] if tail else "no word")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return ResourceError("NNUNET_FAILED", f"nnU-Net's {stage}", f"expected it to finish, got {how}: {last}", remedy)
