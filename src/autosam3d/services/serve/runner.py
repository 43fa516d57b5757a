"""The threads of the service: one for each worker process, which takes jobs from the queue, and one that deletes."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from autosam3d.errors import AutoSam3dError
from autosam3d.io import ReadOptions
from autosam3d.services.serve.faults import ServiceFault, disk_failed
from autosam3d.services.serve.settings import ServeSettings, SteadyClock
from autosam3d.services.serve.store import DONE, FAILED, JobStore, StoredJob
from autosam3d.services.unforeseen import UNFORESEEN
from autosam3d.services.workers.messages import ModelFacts, WorkerSettings, result_message
from autosam3d.services.workers.scan import ScanJob
from autosam3d.services.workers.worker import JobCancelled, Worker

_log = logging.getLogger(__name__)

UPLOAD = "upload"
"""Name of the folder in a job's folder with the files that were sent."""
RESULT = "result"
_SWEEP_SECONDS = 30.0
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 30.0
_MEND_SECONDS = 2.0


@dataclass
class ScanStatus:
    """How far the scan that a worker is segmenting has come."""

    stage: str = "starting"
    done: int = 0
    total: int = 1
    segmenting_since: float | None = None

    def update(self, stage: str, done: int, total: int) -> None:
        if stage == "segmenting" and self.segmenting_since is None:
            self.segmenting_since = time.monotonic()
        self.stage, self.done, self.total = stage, done, total

    @property
    def percent(self) -> float:
        """From 0 to 100: reading counts as 0, segmenting as 98, writing as the rest."""
        share = {"segmenting": 0.98 * self.done / max(1, self.total), "writing": 0.98}.get(self.stage, 0.0)
        return round(100 * share, 1)

    @property
    def seconds_left(self) -> float | None:
        if self.stage != "segmenting" or not self.done or self.segmenting_since is None:
            return None
        return round((time.monotonic() - self.segmenting_since) / self.done * (self.total - self.done), 1)


class Runner:
    """Segments the jobs of a store's queue.

    Args:
        settings: of the service.
        workers: of each worker process.
        store: whose jobs' folders lie in `settings.folder` / "jobs".
    """

    def __init__(self, settings: ServeSettings, workers: WorkerSettings, store: JobStore, clock: SteadyClock) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._workers = [Worker(workers) for _ in range(settings.workers)]
        self._running: dict[str, tuple[Worker, ScanStatus]] = {}
        self._deleted: set[str] = set()
        self._lock, self._wake = threading.Lock(), threading.Condition()
        self._stopping = self._table_fails = False
        self._threads: list[threading.Thread] = []
        self._sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self._maybe_strays: set[str] = set()

    def start(self) -> ModelFacts:
        """Load the model and start the threads.

        Raises:
            AutoSam3dError: as `Worker.start`.
        """
        facts = self._workers[0].start()
        self._threads = [self._thread(number) for number in range(len(self._workers))]
        for thread in (*self._threads, self._sweeper):
            thread.start()
        return facts

    @property
    def num_workers(self) -> int:
        """Threads that take jobs from the queue; as many as there are to be, unless something is wrong."""
        return sum(thread.is_alive() for thread in self._threads)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def works(self) -> bool:
        """Whether jobs are taken, and what becomes of them is written."""
        return self.num_workers == len(self._workers) and not self._table_fails and not self._store.num_unwritten

    @property
    def worker_pids(self) -> list[int]:
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    @property
    def stopping(self) -> bool:
        return self._stopping

    def wake(self) -> None:
        """Tell the threads that the queue has a new job."""
        with self._wake:
            self._wake.notify_all()

    def status(self, job_id: str) -> ScanStatus | None:
        with self._lock:
            found = self._running.get(job_id)
        return None if found is None else found[1]

    def folder(self, job_id: str) -> Path:
        return self._settings.folder / "jobs" / job_id

    def delete(self, job_id: str) -> None:
        """Delete a job and its files; a scan that is being segmented is cancelled."""
        with self._lock:
            found = self._running.get(job_id)
            if found is not None:
                self._deleted.add(job_id)
                found[0].cancel()
        self._store.remove(job_id)
        if found is None:  # otherwise its thread deletes the files, after the process has ended
            shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def begin_stop(self) -> None:
        """Start no more scans. May be called in a signal handler."""
        self._stopping = True

    def stop(self, deadline: float) -> None:
        """Let running scans finish until `deadline` (monotonic); the others stay queued for the next start."""
        self.begin_stop()
        self.wake()
        while self._running and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in self._workers:
            worker.close()
        for thread in (*self._threads, self._sweeper):
            if thread.is_alive():
                thread.join(10)

    def _thread(self, number: int) -> threading.Thread:
        return threading.Thread(target=self._work, args=(self._workers[number],), name=f"worker-{number}", daemon=True)

    def _work(self, worker: Worker) -> None:
        pause = _MIN_PAUSE_SECONDS
        while not self._stopping:
            try:
                job = self._store.take()
            except (OSError, sqlite3.Error) as error:
                # The disk may work again, for example a network disk.
                self._table_fails = True
                _log.error("the table of jobs cannot be written (%s), next try in %.0f s", type(error).__name__, pause)
                self._wait(pause)
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
                continue
            pause, self._table_fails = _MIN_PAUSE_SECONDS, False
            if job is not None:
                self._run(worker, job)
            else:
                self._wait(0.5)
        worker.close()

    def _wait(self, seconds: float) -> None:
        with self._wake:
            self._wake.wait(seconds)

    def _run(self, worker: Worker, job: StoredJob) -> None:
        status = ScanStatus()
        with self._lock:
            self._running[job.id] = (worker, status)
        folder = self.folder(job.id)
        began = time.monotonic()
        try:
            outcome = self._segment(worker, job, folder, status)
        except JobCancelled:
            outcome = None
        except UNFORESEEN as error:
            # Whatever it is, this job has an end and the next one its turn.
            _log.error("job of request %s: %s", job.request.get("request_id"), type(error).__name__)
            outcome = FAILED, _failed().as_dict()
        finally:
            with self._lock:
                del self._running[job.id]
                deleted = job.id in self._deleted
                self._deleted.discard(job.id)
        if deleted:
            shutil.rmtree(folder, ignore_errors=True)
            self._store.remove(job.id)
        elif outcome is None:
            shutil.rmtree(folder / RESULT, ignore_errors=True)
            self._store.put_back(job.id)
        else:
            state, content = outcome
            if state == FAILED:
                shutil.rmtree(folder / RESULT, ignore_errors=True)
            self._store.end(job.id, state, content, self._clock.now())
            shutil.rmtree(folder / UPLOAD, ignore_errors=True)
            if self._store.num_unwritten:
                _log.error("job of request %s: its end cannot be written yet", job.request.get("request_id"))
        _log.info("job of request %s: %s after %.1f s", job.request.get("request_id"),
                  "deleted" if deleted else "put back" if outcome is None else
                  outcome[0] if outcome[0] == DONE else outcome[1]["code"], time.monotonic() - began)

    def _segment(self, worker: Worker, job: StoredJob, folder: Path, status: ScanStatus) -> tuple[str, dict]:
        try:
            source = folder / UPLOAD / job.request["upload"]
            shutil.rmtree(folder / RESULT, ignore_errors=True)  # of an attempt that was interrupted
            (folder / RESULT).mkdir(mode=0o700)
            scan = ScanJob(source=source, folder=folder / RESULT, forms=tuple(job.request["forms"]),
                           read_options=ReadOptions(**job.request["read"]), overlap=job.request.get("overlap"))
            with self._lock:
                if job.id in self._deleted:
                    raise JobCancelled
            result = worker.segment(scan, status.update)
        except AutoSam3dError as error:
            return FAILED, ServiceFault.of(error).as_dict()
        except OSError as error:
            _log.error("job of request %s: %s", job.request.get("request_id"), type(error).__name__)
            return FAILED, disk_failed().as_dict()
        if not result.files:
            return FAILED, ServiceFault.of(next(iter(result.refused.values()))).as_dict()
        return DONE, result_message(result, (source, folder))

    def _sweep(self) -> None:
        due = 0.0
        while not self._stopping:
            try:
                self.mend()
                if time.monotonic() >= due:
                    due = time.monotonic() + min(_SWEEP_SECONDS, self._settings.keep_seconds / 2)
                    self.sweep()
            except (OSError, sqlite3.Error, *UNFORESEEN) as error:  # this thread watches the others
                _log.error("jobs cannot be looked after (%s)", type(error).__name__)
            until = time.monotonic() + _MEND_SECONDS
            while not self._stopping and time.monotonic() < until:
                time.sleep(0.2)

    def sweep(self) -> None:
        """Delete jobs that ended more than `keep_seconds` ago."""
        for job_id in self._store.old(self._clock.now() - self._settings.keep_seconds):
            self.delete(job_id)

    def mend(self) -> None:
        """Put a new thread in the place of one that died; give each job that is told as running, and that no worker has
        held at this look and the last, back to the queue."""
        for number, thread in enumerate(self._threads):
            if not thread.is_alive() and not self._stopping:
                _log.error("the thread of worker %d has died; another takes its place", number)
                self._threads[number] = self._thread(number)
                self._threads[number].start()
        strays = {job.id: job for job in self._store.strays(self._held())}
        for job_id in strays.keys() & self._maybe_strays - self._held():
            self._store.begin_again(strays[job_id], self._clock.now())
        self._maybe_strays = set(strays)

    def _held(self) -> set[str]:
        with self._lock:
            return set(self._running)


def _failed() -> ServiceFault:
    return ServiceFault(503, "WORKER_FAILED", "the service could not work on the scan; send it again later")


def worker_settings(base: WorkerSettings, settings: ServeSettings) -> WorkerSettings:
    """`base` with temporary files in the service's folder, which it empties."""
    return replace(base, scratch=settings.folder / "tmp")
