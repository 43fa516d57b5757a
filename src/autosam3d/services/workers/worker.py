"""A worker process as its owner uses it: it segments scans, reports progress, can be cancelled, and may crash.

    worker = Worker(WorkerSettings(threads=2, max_ram_bytes=4 << 30))
    result = worker.segment(ScanJob(source=scan, folder=folder, forms=("nifti", "json")), progress=print)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import autosam3d
from autosam3d.errors import ResourceError
from autosam3d.io.files import remove_stale_temporaries
from autosam3d.services.workers.messages import MAX_LINE, ModelFacts, WorkerSettings, error_from, result_from
from autosam3d.services.workers.scan import SCRATCH, ScanJob, ScanProgress, ScanResult

_CHILD = "from autosam3d.services.workers.child import main; main()"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerDied(ResourceError):
    """The process ended in the middle of a scan: killed, out of memory, or crashed in native code."""


class WorkerTimeout(ResourceError):
    """The scan took longer than `WorkerSettings.job_seconds`."""


class JobCancelled(Exception):
    """The scan was cancelled by its owner."""


class Worker:
    """A process that keeps a model loaded. It is started at its first use, and again after it has ended.

    One thread gives it scans; `cancel` and `close` may be called from any.

    Args:
        settings: how it runs.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._facts: ModelFacts | None = None
        self._lock = threading.Lock()
        self._busy, self._closed = False, False
        self._ended_by = ""
        """Why this object ended the process: "cancel", "timeout", "close", or "" where it did not."""

    @property
    def facts(self) -> ModelFacts | None:
        """The model, while a process has it loaded."""
        return self._facts

    @property
    def pid(self) -> int | None:
        """Process id while the process runs, else None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> ModelFacts:
        """Load the model, unless it is loaded already, and describe it.

        Raises:
            AutoSam3dError: as `open_model`.
            WorkerDied, WorkerTimeout: the process ended, or took too long, while it loaded the model.
            JobCancelled: `close` was called.
        """
        if self.pid is not None and self._facts is not None:
            return self._facts
        message = self._begin()
        if "again" in message:
            self._end()
            message = self._begin()
        if "error" in message:
            self._end()
            raise error_from(message["error"])
        self._facts = ModelFacts.from_dict(message["ready"])
        return self._facts

    def segment(self, job: ScanJob, progress: ScanProgress | None = None, *, retries: int = 1) -> ScanResult:
        """Segment one scan; returns when its files are written.

        Where it fails, no file is half-written and no temporary file is left, however the process ended.

        Args:
            job: what to do.
            progress: called in this thread.
            retries: how often a scan is repeated in a new process after the worker died.

        Raises:
            AutoSam3dError: as `segment_scan`, without the scan's place: `where` is "scan" or "model".
            WorkerDied: the process ended more than `retries` times.
            WorkerTimeout: the scan took longer than `settings.job_seconds`.
            JobCancelled: `cancel` or `close` was called meanwhile.
        """
        with self._lock:
            self._busy, self._ended_by = True, ""
        try:
            while True:
                try:
                    return self._segment_once(job, progress)
                except WorkerDied:
                    if retries <= 0:
                        raise
                    retries -= 1
        finally:
            with self._lock:
                self._busy, self._ended_by = False, ""

    def cancel(self) -> bool:
        """Cancel the running scan by ending the process; the next scan starts a new one. False where no scan runs."""
        with self._lock:
            if not self._busy:
                return False
            self._kill("cancel")
            return True

    def close(self) -> None:
        """End the process for good."""
        with self._lock:
            self._closed = True
            self._kill("close")
        self._end()

    def _segment_once(self, job: ScanJob, progress: ScanProgress | None) -> ScanResult:
        self.start()
        try:
            self._send({"job": job.as_dict()})
            with self._deadline(self.settings.job_seconds):
                while "progress" in (message := self._answer("it worked on a scan")):
                    if progress is not None:
                        progress(*message["progress"])
        except BaseException:
            # Also where `progress` raised: the process would go on with a scan that nobody waits for.
            self._end()
            shutil.rmtree(job.folder / SCRATCH, ignore_errors=True)
            remove_stale_temporaries(job.folder)
            raise
        if "error" in message:
            raise error_from(message["error"])
        return result_from(message["done"], job.folder)

    def _begin(self) -> dict[str, Any]:
        """Start a process; its message about the model: `ready`, `error`, or `again` to start it once more."""
        self._facts = None
        with self._lock:
            if self._closed or self._ended_by == "cancel":
                raise JobCancelled
            self._ended_by = ""
            self._process = self._spawn()
        try:
            self._send(self.settings.as_dict())
            with self._deadline(self.settings.start_seconds):
                return self._answer("it loaded its model")
        except BaseException:
            self._end()  # or the process would be forgotten while it runs
            raise

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            # In a session of its own, so that Ctrl-C at the terminal reaches the owner alone.
            return subprocess.Popen([sys.executable, "-P", "-c", _CHILD], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    env=_environment(self.settings), start_new_session=True)
        except OSError as error:
            raise _no_process(error.strerror or type(error).__name__) from None

    def _send(self, message: Mapping[str, Any]) -> None:
        process = self._process
        if process is None:  # `close` was called meanwhile
            raise JobCancelled
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # a process that has ended is noticed when its answer is read
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()

    def _answer(self, while_: str) -> dict[str, Any]:
        process = self._process
        if process is None:  # `close` was called between two answers
            raise JobCancelled
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(ValueError):  # `close` has closed the pipe
            line = process.stdout.readline(MAX_LINE)
        if line.endswith(b"\n"):
            return json.loads(line)
        self._end()
        if self._ended_by in ("cancel", "close"):
            raise JobCancelled
        if self._ended_by == "timeout":
            raise WorkerTimeout("TIMEOUT", "scan", f"expected an answer in {self.settings.job_seconds:.0f} s, got none "
                                f"while {while_}", "crop or resample the scan, or allow more time")
        raise WorkerDied("WORKER_DIED", "scan", f"the worker process ended ({_how(process.returncode)}) while {while_}",
                         "try again; if it happens again, the scan may need more memory than there is, or be damaged")

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        def late() -> None:
            with self._lock:
                self._kill("timeout")

        timer = threading.Timer(seconds, late)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # Python's word where the system allows no more threads
            raise _no_process("no thread can be begun") from None
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self, why: str) -> None:
        """Kill the process and remember why; the lock is held by the caller."""
        self._ended_by = self._ended_by or why
        process = self._process
        if process is not None and process.poll() is None:
            _kill_group(process)

    def _end(self) -> None:
        """End the process, reap it and close its pipes."""
        process, self._process, self._facts = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            _kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()


def _no_process(why: str) -> ResourceError:
    return ResourceError("NO_PROCESS", "scan", f"expected to begin a process for the scan, the system refuses ({why})",
                         "try again later, or allow the service more processes, files and memory")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started itself
            return
    process.kill()


def _environment(settings: WorkerSettings) -> dict[str, str]:
    home = os.fspath(Path(autosam3d.__file__).parents[1])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | dict.fromkeys(_THREADS, str(settings.threads)) | {"PYTHONPATH": path}
    return variables | ({"TMPDIR": os.fspath(settings.scratch)} if settings.scratch is not None else {})


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
