"""Runs all runs of a study: trained, segmented, scored; on all devices, and on several machines at once.

Each stage is a command of this package in a process of its own; a stage that was stopped continues where it was. A run
is claimed by a lock on a file in its folder, which is released when the process and its stage have ended, however they
end; so the same command on several machines that share the folder divides the runs among them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from autosam3d.checkpoints.machine import machine
from autosam3d.checkpoints.model_file import read_meta
from autosam3d.errors import AutoSam3dError, UsageError
from autosam3d.io.files import write_text_atomic
from autosam3d.io.lock_file import HeldFolder, hold_folder
from autosam3d.recipes.recipe import dump_recipe
from autosam3d.studies.reproduce.guard import demand_own_run, demand_own_runs, keep_cases
from autosam3d.studies.reproduce.stages import Given, is_finished, is_trained, model_of, stages
from autosam3d.studies.reproduce.study import PlannedRun, Study
from autosam3d.studies.slots import Slot

_POLL_SECONDS = 2.0
_GRACE_SECONDS = 120.0
"""What a stage that was asked to stop may take before it is killed: a training saves its state first."""


@dataclass
class Outcome:
    """How the runs of a study ended."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of the run to the last line of the stage that failed."""
    stopped_by: int | None = None
    """The signal that stopped all of them; None where they ended by themselves."""


def run_study(
    study: Study, slots: Sequence[Slot], given: Given | None = None, tell: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Finish all runs of `study`. Runs that are finished already are kept, and a run that fails stops no other.

    SIGINT, SIGTERM, SIGHUP (the terminal was closed) and SIGUSR1 (a batch system's warning) stop the running stages,
    which save their state; then this function returns.

    Args:
        study: of `study.plan_study`.
        slots: that share the work.
        given: by the user.
        tell: called with a line for each stage or run that begins or ends.

    Raises:
        UsageError: OTHER_RUN, a run's folder holds another run; OTHER_DATA, the cases have changed.
    """
    demand_own_runs(study)
    keep_cases(study)
    work = _Work(study, given or Given(), tell)
    with work.listening(), ThreadPoolExecutor(len(slots)) as pool:
        loops = [pool.submit(work.do, slot) for slot in slots]
        while wait(loops, 0.2).not_done:
            if any(loop.done() and loop.exception() for loop in loops):  # a bug: stop the other slots, raise it below
                work.stop_stages()
        for loop in loops:
            loop.result()
    return work.outcome


class _Work:
    """The runs, and which slot works on which; shared by the slots, a thread each."""

    def __init__(self, study: Study, given: Given, tell: Callable[[str], None]) -> None:
        self.study, self.given, self.tell = study, given, tell
        self.outcome = Outcome()
        self._open = {run.spec.name: run for run in study.runs}
        self._lock, self._processes = threading.Lock(), set[subprocess.Popen]()
        self._held: dict[str, HeldFolder] = {}
        self._waiting: set[str] = set()
        self._stop = threading.Event()

    def do(self, slot: Slot) -> None:
        """Take one run after another until no run is left."""
        while not self._stop.is_set():
            with self._lock:
                if not self._open:
                    return
                run = next(filter(self._can_begin, self._open.values()), None)
                if run is not None:
                    del self._open[run.spec.name]
            if run is None:  # the runs that are left wait for a teacher that is being trained, here or elsewhere
                self._stop.wait(_POLL_SECONDS)
                continue
            if not self._claimed_and_done(run, slot):
                self._stop.wait(_POLL_SECONDS)
                with self._lock:  # another process has claimed it: try again later
                    self._open[run.spec.name] = run

    def _claimed_and_done(self, run: PlannedRun, slot: Slot) -> bool:
        """Claim the run and work on it; False where another process has claimed it. How it ended is in `outcome`."""
        name = run.spec.name
        try:
            with contextlib.ExitStack() as stack:
                try:
                    # A stage that outlives this process holds the run, too: nobody begins it a second time beside it.
                    self._held[name] = stack.enter_context(
                        hold_folder(run.folder, "claim.lock", what="run folder", option="--out", inherit=True))
                except UsageError as error:
                    if error.code != "LOCKED":
                        raise
                    if name not in self._waiting:
                        self._waiting.add(name)
                        self.tell(f"{name}: another process works on it ({error.fault})")
                    return False
                self._finish(run, slot)
        except (AutoSam3dError, OSError) as error:  # a full disk, a folder that may not be written
            fault = f"error[{error.code}] {error}" if isinstance(error, AutoSam3dError) else f"{error}"
            self.outcome.failed[name] = fault
            self.tell(f"{name}: failed: {fault}")
        return True

    def stop_stages(self, again: bool = False) -> None:
        """Ask the running stages to save and end, once; with `again` also a second time, as a second Ctrl-C does."""
        if self._stop.is_set() and not again:
            return
        self._stop.set()
        for process in list(self._processes):
            process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a signal that asks this process to end stops the stages."""

        def on_signal(number: int, frame: object) -> None:
            self.outcome.stopped_by = number
            self.stop_stages(again=True)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # A signal that is ignored stays ignored: `nohup` ignores SIGHUP so that the command outlives its terminal.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _can_begin(self, run: PlannedRun) -> bool:
        for name in (run.spec.teacher, run.spec.predicts_as):
            if name is None:
                continue
            if name in self.outcome.failed:
                return True  # it fails at once with this reason, or uses what was trained before
            if not is_trained(self._run(name)):
                return False
        return True

    def _run(self, name: str) -> PlannedRun:
        return next(run for run in self.study.runs if run.spec.name == name)

    def _finish(self, run: PlannedRun, slot: Slot) -> None:
        name = run.spec.name
        demand_own_run(run, self.study)  # another process may have begun it since the plan was made
        if is_finished(run):
            self.tell(f"{name}: finished already")
            self.outcome.finished.append(name)
            return
        for needed in (run.spec.teacher, run.spec.predicts_as):
            if needed is not None and needed in self.outcome.failed and not is_trained(self._run(needed)):
                self.outcome.failed[name] = f"{needed} failed"
                return
        write_text_atomic(run.recipe_file, dump_recipe(run.recipe))
        began = time.monotonic()
        for stage, command in stages(run, self.study, slot, self.given):
            self.tell(f"{name}: {stage}")
            fault = self._call(run, command, slot)
            if self._stop.is_set():
                return
            if fault is not None:
                self.outcome.failed[name] = fault
                self.tell(f"{name}: {stage} failed: {fault}")
                return
        _write_done(run, self.study, slot)
        self.outcome.finished.append(name)
        self.tell(f"{name}: finished in {(time.monotonic() - began) / 60:.1f} min")

    def _call(self, run: PlannedRun, command: Sequence[str], slot: Slot) -> str | None:
        """Run a stage; None where it succeeded, else the line of its output that says why it failed."""
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(slot.threads)}
        if slot.visible_gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.visible_gpu
        with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(['autosam3d', *command])}\n")
            log.flush()
            start = os.fstat(log.fileno()).st_size
            # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on once. The stage
            # inherits the claim, so that where this process is killed no other takes the run while its stage runs.
            process = subprocess.Popen([sys.executable, "-m", "autosam3d", *command], stdout=log, stderr=log,
                                       stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                                       pass_fds=self._held[run.spec.name].descriptors)
            self._processes.add(process)
            try:
                if self._stop.is_set():  # the signal came while the process was started
                    process.send_signal(signal.SIGTERM)
                code = self._wait(process)
            finally:
                self._processes.discard(process)
        if code == 0:
            return None
        output = (run.folder / "log.txt").read_bytes()[start:].decode("utf-8", errors="replace").strip().splitlines()
        faults = [line for line in output if line.startswith("error[")]
        if faults:
            return faults[-1]
        ended = f"it was killed by signal {-code}" if code < 0 else f"it ended with {code}"
        return f"{ended}{f', after {output[-1]!r}' if output else ''}"

    def _wait(self, process: subprocess.Popen) -> int:
        asked = None
        while True:
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                asked = asked or (time.monotonic() if self._stop.is_set() else None)
                if asked and time.monotonic() - asked > _GRACE_SECONDS:
                    process.kill()


def _write_done(run: PlannedRun, study: Study, slot: Slot) -> None:
    gpu = f", {run.cost.machine}" if run.cost and slot.device != "cpu" else ""
    done: dict[str, Any] = {
        "model": model_of(run), "machine": machine() + gpu, "date": datetime.now(UTC).date().isoformat(),
        "budget_minutes": study.budget_minutes, "seed": run.spec.seed, **_training_of(run),
    }
    write_text_atomic(run.folder / "done.json", json.dumps(done, indent=1, sort_keys=True) + "\n")


def _training_of(run: PlannedRun) -> dict[str, Any]:
    """Minutes and steps of training; also the number of parameters where it does not follow from the recipe."""
    if run.spec.kind == "nnunet_v2":
        result = json.loads((run.run / "result.json").read_text("utf-8"))
        return {"minutes": result["minutes"], "steps": result["steps"], "parameters": result["parameters"]}
    if run.spec.kind == "slicewise":
        if not (run.run / "best.json").is_file():  # SAM as it was given, not tuned
            return {"minutes": 0.0, "parameters": 0}
        weights = run.run / read_meta(run.run / "best.json")["weights"]["file"]
        return {**_progress(run.run), "parameters": _num_values(weights)}
    return _progress(run.weights)


def _progress(folder: Path) -> dict[str, Any]:
    progress = read_meta(folder / "last.json")["progress"]
    return {"minutes": progress["seconds"] / 60, "steps": progress["global_step"]}


def _num_values(path: Path) -> int:
    """Number of values in all tensors of a safetensors file; only its header is read."""
    with safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
