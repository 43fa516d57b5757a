"""A job never stays running: whatever ends a worker's thread, and whatever the table of jobs cannot take."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import until

import own_loop
from autosam3d.errors import ResourceError
from autosam3d.services.serve import runner as runner_module
from autosam3d.services.serve.app import make_app
from autosam3d.services.serve.intake import ScanService
from autosam3d.services.serve.runner import RESULT, UPLOAD, Runner
from autosam3d.services.serve.settings import ServeSettings, SteadyClock
from autosam3d.services.serve.store import DONE, FAILED, QUEUED, RUNNING, JobStore, StoredJob
from autosam3d.services.workers.messages import ModelFacts, WorkerSettings
from autosam3d.services.workers.scan import ScanJob, ScanResult

FACTS = ModelFacts(name="x", sha256="0" * 64, runtime="none", organs=("a",), side_pairs=())


class Stand:
    """In the place of a worker's process; what it does is told by `act`."""

    pid = None

    def __init__(self) -> None:
        self.act: Callable[[], object] = lambda: None

    def start(self) -> ModelFacts:
        return FACTS

    def segment(self, job: ScanJob, progress: Any) -> ScanResult:
        self.act()
        (job.folder / "segmentation.nii.gz").write_bytes(b"x")
        return ScanResult(files={"nifti": job.folder / "segmentation.nii.gz"}, refused={}, organs=[],
                          shape_zyx=(1, 1, 1), spacing_mm_zyx=(1.0, 1.0, 1.0), warnings=(), from_dicom=False)

    def cancel(self) -> bool:
        return True

    def close(self) -> None: ...


class Served:
    """A runner with its table, and jobs by number."""

    def __init__(self, folder: Path) -> None:
        self.store, self.stand = JobStore(folder / "jobs.sqlite"), Stand()
        self.runner = Runner(ServeSettings(folder=folder), WorkerSettings(), self.store, SteadyClock())
        self.runner._workers = [self.stand]  # type: ignore[list-item]
        self.folder = folder

    def add(self, number: int) -> str:
        job_id = f"job-{number}"
        folder = self.runner.folder(job_id) / UPLOAD
        folder.mkdir(parents=True)
        (folder / "scan.nii").write_bytes(b"x")
        request = {"upload": "scan.nii", "forms": ["nifti"], "read": {}, "overlap": None, "request_id": "r"}
        self.store.add(job_id, QUEUED, request, 1.0)
        self.runner.wake()
        return job_id

    def ended(self, job_id: str) -> StoredJob:
        return until(lambda: self.store.get(job_id), lambda job: job.state in (DONE, FAILED), seconds=10)

    def on_disk(self, job_id: str) -> str | None:
        """The state that another process would read."""
        with contextlib.closing(sqlite3.connect(self.folder / "jobs.sqlite")) as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else row[0]

    def writable(self, yes: bool) -> None:
        """SQLite itself refuses to write, as on a full disk."""
        with self.store._lock:
            self.store._db.execute(f"PRAGMA query_only = {'OFF' if yes else 'ON'}")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in ("_MEND_SECONDS", "_MIN_PAUSE_SECONDS", "_MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(runner_module, name, 0.05)
    served = Served(tmp_path)
    served.runner.start()
    yield served
    served.writable(True)
    served.runner.stop(0.0)
    served.store.close()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("error", "status", "code"), [
    (RuntimeError("can't start new thread"), 503, "WORKER_FAILED"), (MemoryError(), 503, "WORKER_FAILED"),
    (KeyError("x"), 503, "WORKER_FAILED"), (OSError(28, "No space left on device"), 507, "IO"),
    (ResourceError("NO_SPACE", "scan", "the disk is full", "make room"), 507, "NO_SPACE"),
    (ResourceError("NO_PROCESS", "scan", "the system refuses", "try again later"), 503, "NO_PROCESS"),
])
def test_whatever_fails_the_job_ends_and_the_next_is_done(served: Served, error: Exception, status: int, code: str
                                                          ) -> None:
    served.stand.act = lambda: _raise(error)
    first = served.ended(served.add(1))
    assert first.state == FAILED and first.outcome is not None
    assert (first.outcome["status"], first.outcome["code"]) == (status, code)
    assert not [name for name in (RESULT, UPLOAD) if (served.runner.folder("job-1") / name).exists()]
    served.stand.act = lambda: None
    assert served.ended(served.add(2)).state == DONE and served.runner.works


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_replaced_and_its_job_ends(served: Served) -> None:
    """SystemExit passes every `except Exception`; the job is begun once more, and then no more."""
    served.stand.act = lambda: _raise(SystemExit())
    job = served.ended(served.add(1))
    assert job.outcome is not None and (job.state, job.outcome["code"], job.attempts) == (FAILED, "INTERRUPTED", 2)
    served.stand.act = lambda: None
    assert served.ended(served.add(2)).state == DONE and served.runner.num_workers == 1


@pytest.mark.parametrize("error", [None, RuntimeError()])
def test_an_end_that_cannot_be_written_is_told_at_once_and_written_later(served: Served, error: Exception | None
                                                                         ) -> None:
    def act() -> None:
        served.writable(False)
        if error is not None:
            raise error

    served.stand.act = act
    wanted = DONE if error is None else FAILED
    assert served.ended(served.add(1)).state == wanted
    assert served.on_disk("job-1") == RUNNING and served.store.num_unwritten == 1 and not served.runner.works
    until(lambda: served.runner.num_running == 0, seconds=5)
    served.writable(True)
    until(lambda: served.on_disk("job-1") == wanted, seconds=5)
    until(lambda: served.runner.works, seconds=5)
    served.stand.act = lambda: None
    assert served.ended(served.add(2)).state == DONE


def test_what_waits_stays_queued_while_nothing_can_be_written(served: Served) -> None:
    both = threading.Event()
    served.stand.act = lambda: (both.wait(10), served.writable(False))
    served.add(1)
    second = served.add(2)
    both.set()
    served.ended("job-1")
    until(lambda: not served.runner.works and served.runner._table_fails, seconds=5)
    job = served.store.get(second)
    assert job is not None and job.state == QUEUED
    served.runner.delete("job-1")  # deleting is what makes room
    assert served.store.get("job-1") is None and not served.runner.folder("job-1").exists()
    served.stand.act = lambda: None
    served.writable(True)
    assert served.ended(second).state == DONE
    assert served.on_disk("job-1") is None


def test_a_job_that_nobody_holds_is_begun_again(served: Served) -> None:
    """As after a take that was written but not answered."""
    (served.runner.folder("lost") / UPLOAD).mkdir(parents=True)
    (served.runner.folder("lost") / UPLOAD / "scan.nii").write_bytes(b"x")
    with served.store._lock:
        served.store._db.execute("INSERT INTO jobs (id, state, attempts, created, request) VALUES ('lost', 'running', "
                                 "0, 1.0, '{\"upload\": \"scan.nii\", \"forms\": [\"nifti\"], \"read\": {}}')")
    assert served.ended("lost").state == DONE


def test_health_knows_workers_and_queue(served: Served) -> None:
    service = ScanService(ServeSettings(folder=served.folder), served.store, served.runner, SteadyClock(), FACTS,
                          threads=None)  # type: ignore[arg-type]

    def health() -> httpx.Response:
        async def ask() -> httpx.Response:
            through = httpx.ASGITransport(make_app(service))
            async with httpx.AsyncClient(transport=through, base_url="http://x") as client:
                return await client.get("/health")

        return own_loop.run(ask())

    told = health()
    assert told.status_code == 200
    assert told.json() | {"version": ""} == {
        "status": "ok", "queued": 0, "running": 0, "receiving": 0, "workers": {"alive": 1, "expected": 1},
        "unwritten": 0, "version": ""}
    served.stand.act = lambda: served.writable(False)
    served.add(1)
    served.ended("job-1")
    told = until(health, lambda told: told.status_code == 503, seconds=5)
    assert (told.json()["status"], told.json()["unwritten"]) == ("failing", 1)
    served.writable(True)
    until(health, lambda told: told.json()["status"] == "ok", seconds=5)
    served.runner.begin_stop()
    assert health().json()["status"] == "stopping"
