"""Runs of a study brought to their end: trained, segmented, scored; on all devices, and on several machines at once.

Each stage is a command of this package in a process of its own, and each can be stopped and goes on where it was. A run
is taken by a lock on a file in its folder, which ends with the process and its stage, however they end; so the same
command on several machines that share the folder divides the runs among them.
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
from autosam3d.errors import AutoSam3dError, CheckpointError, UsageError
from autosam3d.io.files import sha256_of, write_text_atomic
from autosam3d.io.lock_file import HeldFolder, hold_folder
from autosam3d.recipes.recipe import dump_recipe
from autosam3d.studies.reproduce.guard import demand_own_run, demand_own_runs, keep_cases
from autosam3d.studies.reproduce.study import PlannedRun, Study

_POLL_SECONDS = 2.0
_GRACE_SECONDS = 120.0
"""For a stage that was asked to stop: a training saves its state first."""
_TOLERANCES = ("--tolerance", "1", "--tolerance", "2", "--tolerance", "5")
"""Of the NSD, in mm."""
SMALL_PATCH = (32, 64, 64)
"""Of the 2core presets (z, y, x)."""


@dataclass(frozen=True)
class Worker:
    """A place where one run at a time can be."""

    device: str
    """As `--device` has it."""
    threads: int
    visible_gpu: str | None = None
    """CUDA_VISIBLE_DEVICES of its processes."""


@dataclass(frozen=True)
class Given:
    """What the user named for some of the runs."""

    sam: str | None = None
    """SAM weights."""
    medsam: str | None = None
    """MedSAM weights; None takes those of `sam`."""
    nnunet_python: Path | None = None
    """Of the environment that nnU-Net v2 is installed in."""


@dataclass
class Outcome:
    """What became of the runs."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name to the last line of its stage."""
    stopped_by: int | None = None
    """The signal."""


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has its scores, of the model as it stands."""
    try:
        done = json.loads((run.folder / "done.json").read_text("utf-8"))
        return bool(done["model"] == _model_of(run) and (run.evaluation / "scores.json").is_file())
    except (OSError, ValueError, KeyError, TypeError, AutoSam3dError):
        return False


def run_study(
    study: Study, workers: Sequence[Worker], given: Given | None = None, tell: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Bring all runs of `study` to their end; those that are there already are taken, one that fails stops no other.

    SIGINT, SIGTERM, SIGHUP (the terminal went) and SIGUSR1 (a batch system's warning) stop the stages at work, which
    save, and return.

    Args:
        workers: that share the work.
        given: by the user.
        tell: called with a line for each thing that begins or ends.

    Raises:
        UsageError: OTHER_RUN, OTHER_DATA.
    """
    demand_own_runs(study)
    keep_cases(study)
    work = _Work(study, given or Given(), tell)
    with work.listening(), ThreadPoolExecutor(len(workers)) as pool:
        places = [pool.submit(work.do, worker) for worker in workers]
        while wait(places, 0.2).not_done:
            if any(place.done() and place.exception() for place in places):  # a bug: raised below, and no run goes on
                work.stop_stages()
        for place in places:
            place.result()
    return work.outcome


def stages(run: PlannedRun, study: Study, worker: Worker, given: Given) -> list[tuple[str, list[str]]]:
    """Name and command line, behind ``autosam3d``, of what is left to do for a run."""
    how = ["--device", worker.device, "--threads", str(worker.threads)]
    todo: list[tuple[str, list[str]]] = []
    if run.spec.kind == "nnunet_v2":
        return [("nnU-Net v2", [*_nnunet(run, study, given), *how])]
    if run.spec.kind == "slicewise":
        todo += [(name, [*command, "--cache", str(study.folder / "embeddings"), *how])
                 for name, command in _slicewise(run, study, given)]
    else:
        todo += [(name, [*command, *how]) for name, command in _ours(run, study, given)]
    todo.append(("scoring", ["evaluate", str(run.prediction), str(study.data / "labelsTs"), "--out",
                             str(run.evaluation), "--recipe", str(run.recipe_file), *_TOLERANCES]))
    return todo


def _ours(run: PlannedRun, study: Study, given: Given) -> Iterator[tuple[str, list[str]]]:
    of = {planned.spec.name: planned for planned in study.runs}
    if run.is_ours and not _is_trained(run):
        where = ["--data", str(study.data), "--out", str(run.run), "--cache", str(study.cache)]
        if run.spec.kind == "distill":
            teacher = of[run.spec.teacher or ""].run
            yield "training", ["distill", str(teacher), "--student", str(run.recipe_file), *where]
        else:
            # SAM's weights fit none of the small variants.
            takes_sam = run.recipe.model.network == "autosam" and not run.spec.small
            sam = ["--sam", given.sam] if given.sam and takes_sam else []
            yield "training", ["train", str(run.recipe_file), *where, *sam]
    overlap = run.recipe.inference.overlap if run.spec.overlap is None else run.spec.overlap
    yield "segmenting", ["segment", str(run.weights), str(study.data / "imagesTs"), str(run.prediction),
                         "--overlap", str(min(overlap, 0.9))]


def _slicewise(run: PlannedRun, study: Study, given: Given) -> Iterator[tuple[str, list[str]]]:
    tuning, _, prompt = run.spec.model.partition(":")
    where = [str(run.recipe_file), "--data", str(study.data)]
    model = ["--sam", str(given.sam)]
    if tuning != "sam":
        length = []
        if study.budget_minutes:  # which then decides, and not the number of epochs
            length = ["--set", f"tune.minutes={study.budget_minutes:g}", "--set", "tune.epochs=1000000"]
        yield "tuning", ["slicewise", "tune", *where, "--sam", str(given.medsam or given.sam), "--out", str(run.run),
                         "--prompt", prompt, "--set", f"tune.seed={run.spec.seed}",
                         "--set", f"tune.scope={'full' if tuning == 'medsam_full' else 'decoder'}", *length]
        model = ["--tuned", str(run.run)]
    yield "segmenting", ["slicewise", "segment", *where, "--out", str(run.prediction), "--prompt", prompt, *model]


def _nnunet(run: PlannedRun, study: Study, given: Given) -> list[str]:
    length = ["--minutes", f"{study.budget_minutes:g}"] if study.budget_minutes else []
    small = (f"patch={list(SMALL_PATCH)}", "batch=2", "iterations=50") if run.spec.small else ()
    size = [word for key in small for word in ("--set", key)]
    return ["nnunet", str(study.data), str(run.run), "--preset", run.spec.model, "--python",
            str(given.nnunet_python or sys.executable), *length, *size, *_TOLERANCES]


class _Work:
    """The runs and who is at which; shared by the threads of the workers."""

    def __init__(self, study: Study, given: Given, tell: Callable[[str], None]) -> None:
        self.study, self.given, self.tell = study, given, tell
        self.outcome = Outcome()
        self._open = {run.spec.name: run for run in study.runs}
        self._lock, self._processes = threading.Lock(), set[subprocess.Popen]()
        self._held: dict[str, HeldFolder] = {}
        self._waiting: set[str] = set()
        self._stop = threading.Event()

    def do(self, worker: Worker) -> None:
        """Take run after run until none is left that can be begun."""
        while not self._stop.is_set():
            with self._lock:
                if not self._open:
                    return
                run = next(filter(self._can_begin, self._open.values()), None)
                if run is not None:
                    del self._open[run.spec.name]
            if run is None:  # its teacher is at work, here or elsewhere
                self._stop.wait(_POLL_SECONDS)
                continue
            if not self._claimed_and_done(run, worker):
                self._stop.wait(_POLL_SECONDS)
                with self._lock:  # another process has it: look again later
                    self._open[run.spec.name] = run

    def _claimed_and_done(self, run: PlannedRun, worker: Worker) -> bool:
        """Whether the run could be held; what became of it then is in `outcome`."""
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
                        self.tell(f"{name}: another process is at it ({error.fault})")
                    return False
                self._bring_to_end(run, worker)
        except (AutoSam3dError, OSError) as error:  # a full disk, a folder that may not be written
            fault = f"error[{error.code}] {error}" if isinstance(error, AutoSam3dError) else f"{error}"
            self.outcome.failed[name] = fault
            self.tell(f"{name}: failed: {fault}")
        return True

    def stop_stages(self, again: bool = False) -> None:
        """Ask the stages at work to save and end, once; a second signal of the user's (`again`) is passed on."""
        if self._stop.is_set() and not again:
            return
        self._stop.set()
        for process in list(self._processes):
            process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a signal stops the stages."""

        def on_signal(number: int, frame: object) -> None:
            self.outcome.stopped_by = number
            self.stop_stages(again=True)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # Who started it with `nohup` wants it to outlive the terminal.
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
                return True  # and fails at once, with the reason, or takes what is trained
            if not _is_trained(self._run(name)):
                return False
        return True

    def _run(self, name: str) -> PlannedRun:
        return next(run for run in self.study.runs if run.spec.name == name)

    def _bring_to_end(self, run: PlannedRun, worker: Worker) -> None:
        name = run.spec.name
        demand_own_run(run, self.study)  # another process may have begun it since the plan was made
        if is_finished(run):
            self.tell(f"{name}: there already")
            self.outcome.finished.append(name)
            return
        for needed in (run.spec.teacher, run.spec.predicts_as):
            if needed is not None and needed in self.outcome.failed and not _is_trained(self._run(needed)):
                self.outcome.failed[name] = f"{needed} failed"
                return
        write_text_atomic(run.recipe_file, dump_recipe(run.recipe))
        began = time.monotonic()
        for stage, command in stages(run, self.study, worker, self.given):
            self.tell(f"{name}: {stage}")
            fault = self._call(run, command, worker)
            if self._stop.is_set():
                return
            if fault is not None:
                self.outcome.failed[name] = fault
                self.tell(f"{name}: {stage} failed: {fault}")
                return
        _write_done(run, self.study, worker)
        self.outcome.finished.append(name)
        self.tell(f"{name}: finished in {(time.monotonic() - began) / 60:.1f} min")

    def _call(self, run: PlannedRun, command: Sequence[str], worker: Worker) -> str | None:
        """Run a stage; None, or the last line that it said where it failed."""
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(worker.threads)}
        if worker.visible_gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = worker.visible_gpu
        with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(['autosam3d', *command])}\n")
            log.flush()
            start = os.fstat(log.fileno()).st_size
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once. The claim goes along:
            # where this process is killed, nobody else takes the run while its stage is still at work.
            process = subprocess.Popen([sys.executable, "-m", "autosam3d", *command], stdout=log, stderr=log,
                                       stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                                       pass_fds=self._held[run.spec.name].descriptors)
            self._processes.add(process)
            try:
                if self._stop.is_set():  # the signal came between
                    process.send_signal(signal.SIGTERM)
                code = self._wait(process)
            finally:
                self._processes.discard(process)
        if code == 0:
            return None
        said = (run.folder / "log.txt").read_bytes()[start:].decode("utf-8", errors="replace").strip().splitlines()
        faults = [line for line in said if line.startswith("error[")]
        if faults:
            return faults[-1]
        ended = f"it was killed by signal {-code}" if code < 0 else f"it ended with {code}"
        return f"{ended}{f', behind {said[-1]!r}' if said else ''}"

    def _wait(self, process: subprocess.Popen) -> int:
        asked = None
        while True:
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                asked = asked or (time.monotonic() if self._stop.is_set() else None)
                if asked and time.monotonic() - asked > _GRACE_SECONDS:
                    process.kill()


def _is_trained(run: PlannedRun) -> bool:
    """Whether the training reached its last epoch."""
    try:
        meta = read_meta(run.run / "last.json")
        return (run.run / "best.json").is_file() and meta["progress"]["epoch"] >= run.recipe.train.epochs
    except (CheckpointError, KeyError, TypeError):
        return False


def _model_of(run: PlannedRun) -> str:
    """What tells the model of the scores from another one."""
    if run.spec.kind in ("train", "distill"):
        return str(read_meta(run.weights / "best.json")["weights"]["sha256"])
    return sha256_of(run.evaluation / "scores.json")


def _write_done(run: PlannedRun, study: Study, worker: Worker) -> None:
    gpu = f", {run.cost.machine}" if run.cost and worker.device != "cpu" else ""
    done: dict[str, Any] = {
        "model": _model_of(run), "machine": machine() + gpu, "date": datetime.now(UTC).date().isoformat(),
        "budget_minutes": study.budget_minutes, "seed": run.spec.seed, **_training_of(run),
    }
    write_text_atomic(run.folder / "done.json", json.dumps(done, indent=1, sort_keys=True) + "\n")


def _training_of(run: PlannedRun) -> dict[str, Any]:
    """Minutes of training and, where another program counts them, parameters."""
    if run.spec.kind == "nnunet_v2":
        result = json.loads((run.run / "result.json").read_text("utf-8"))
        return {"minutes": result["minutes"], "parameters": result["parameters"]}
    if run.spec.kind == "slicewise":
        if not (run.run / "best.json").is_file():  # as it was given
            return {"minutes": 0.0, "parameters": 0}
        weights = run.run / read_meta(run.run / "best.json")["weights"]["file"]
        return {"minutes": read_meta(run.run / "last.json")["progress"]["seconds"] / 60,
                "parameters": _num_values(weights)}
    return {"minutes": read_meta(run.weights / "last.json")["progress"]["seconds"] / 60}


def _num_values(path: Path) -> int:
    """In all tensors of a safetensors file; only its header is read."""
    with safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
