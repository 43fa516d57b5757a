"""The jobs on disk, in SQLite: an accepted job survives a restart."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosam3d.errors import ResourceError
from autosam3d.services.serve.faults import ServiceFault

SESSION, QUEUED, RUNNING, DONE, FAILED = "session", "queued", "running", "done", "failed"
MAX_ATTEMPTS = 2
"""A job that was started this often and never ended fails: it may be what ends the service."""

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    once TEXT UNIQUE,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    ended REAL,
    request TEXT NOT NULL,
    outcome TEXT
)"""
_INTERRUPTED = ServiceFault(503, "INTERRUPTED", "the service was stopped twice while it worked on this scan; send it "
                                                "again")


class SentTwice(Exception):
    """Another job has the same idempotency key."""


@dataclass(frozen=True)
class StoredJob:
    """A job, as a row of the table."""

    number: int
    id: str
    state: str
    attempts: int
    created: float
    ended: float | None
    request: dict[str, Any]
    """Name of the upload in the job's folder, forms, options of reading, id of the request."""
    outcome: dict[str, Any] | None
    """The result of a job that is done, the `ServiceFault` of one that failed, else None."""


class JobStore:
    """The table of jobs. Every call is one transaction; all of them may be made from any thread.

    What became of a job that was worked on (`end`, `put_back`, `remove`) is true at once, also where the disk cannot
    take it: it is kept in memory, told by `get`, and written before the next job is taken.

    Raises:
        ResourceError: STATE, the file is not a database with this table.
        sqlite3.Error: from any method but these, where the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._unwritten: dict[str, tuple[str, tuple, Callable[[StoredJob], StoredJob | None]]] = {}
        self._queued = self._sessions = 0
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.execute(_TABLE)
            self._count()
        except sqlite3.Error as error:
            raise ResourceError("STATE", path, f"expected the table of jobs ({error})",
                                "move the file away; the service then begins with an empty one") from None
        path.chmod(0o600)

    @property
    def num_queued(self) -> int:
        return self._queued

    @property
    def num_sessions(self) -> int:
        return self._sessions

    @property
    def num_unwritten(self) -> int:
        """Jobs whose end could not be written yet."""
        return len(self._unwritten)

    def add(self, job_id: str, state: str, request: Mapping[str, Any], now: float, once: str | None = None) -> None:
        """Add a new job.

        Raises:
            SentTwice: `once` is that of another job.
        """
        with self._lock:
            try:
                self._db.execute("INSERT INTO jobs (id, once, state, created, request) VALUES (?, ?, ?, ?, ?)",
                                 (job_id, once, state, now, json.dumps(request)))
            except sqlite3.IntegrityError:
                raise SentTwice from None
            self._recount()

    def knows(self, once: str) -> bool:
        with self._lock:
            return self._one("SELECT * FROM jobs WHERE once = ?", once) is not None

    def get(self, job_id: str) -> StoredJob | None:
        with self._lock:
            job = self._one("SELECT * FROM jobs WHERE id = ?", job_id)
            if job is None or job_id not in self._unwritten:
                return job
            return self._unwritten[job_id][2](job)

    def num_before(self, job: StoredJob) -> int:
        """Number of jobs that will be started before a queued one."""
        with self._lock:
            row = self._db.execute("SELECT COUNT(*) FROM jobs WHERE state = ? AND number < ?",
                                   (QUEUED, job.number)).fetchone()
            return int(row[0])

    def take(self) -> StoredJob | None:
        """Take the oldest queued job, whose state becomes running; None where the queue is empty."""
        with self._lock:
            self._write()
            job = self._one("SELECT * FROM jobs WHERE state = ? ORDER BY number LIMIT 1", QUEUED)
            if job is not None:
                self._db.execute("UPDATE jobs SET state = ?, attempts = attempts + 1 WHERE id = ?", (RUNNING, job.id))
                self._recount()
            return job

    def end(self, job_id: str, state: str, outcome: Mapping[str, Any], now: float) -> None:
        self._keep(job_id, "UPDATE jobs SET state = ?, outcome = ?, ended = ? WHERE id = ?",
                   (state, json.dumps(outcome), now, job_id),
                   lambda job: replace(job, state=state, outcome=dict(outcome), ended=now))

    def put_back(self, job_id: str) -> None:
        """Queue a running job again that the service stopped itself; this does not count as an attempt."""
        self._keep(job_id, "UPDATE jobs SET state = ?, attempts = attempts - 1 WHERE id = ? AND state = ?",
                   (QUEUED, job_id, RUNNING), lambda job: replace(job, state=QUEUED, attempts=job.attempts - 1))

    def remove(self, job_id: str) -> None:
        """Remove a job, also from a full disk, where deleting jobs is what makes room."""
        self._keep(job_id, "DELETE FROM jobs WHERE id = ?", (job_id,), lambda job: None)

    def strays(self, held: Collection[str]) -> list[StoredJob]:
        """Jobs that are told as running, but for those that a worker holds."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM jobs WHERE state = ?", (RUNNING,)).fetchall()
            left = [row["id"] for row in rows if row["id"] not in held and row["id"] not in self._unwritten]
            return [job for name in left if (job := self._one("SELECT * FROM jobs WHERE id = ?", name)) is not None]

    def begin_again(self, job: StoredJob, now: float) -> None:
        """Queue a job that nobody works on although it is told as running, or fail it after `MAX_ATTEMPTS`."""
        if job.attempts >= MAX_ATTEMPTS:
            self.end(job.id, FAILED, _INTERRUPTED.as_dict(), now)
            return
        self._keep(job.id, "UPDATE jobs SET state = ? WHERE id = ? AND state = ?", (QUEUED, job.id, RUNNING),
                   lambda job: replace(job, state=QUEUED))

    def recover(self, now: float) -> None:
        """After a start: queue jobs that were running, or fail those that were started `MAX_ATTEMPTS` times."""
        with self._lock:
            self._db.execute("UPDATE jobs SET state = ?, outcome = ?, ended = ? WHERE state = ? AND attempts >= ?",
                             (FAILED, json.dumps(_INTERRUPTED.as_dict()), now, RUNNING, MAX_ATTEMPTS))
            self._db.execute("UPDATE jobs SET state = ? WHERE state = ?", (QUEUED, RUNNING))
            self._recount()

    def old(self, before: float) -> list[str]:
        """Ids of jobs that ended, and of sessions that were created, before a time."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM jobs WHERE (ended IS NOT NULL AND ended < ?) OR "
                                    "(state = ? AND created < ?)", (before, SESSION, before)).fetchall()
            return [row["id"] for row in rows]

    def ids(self) -> set[str]:
        with self._lock:
            return {row["id"] for row in self._db.execute("SELECT id FROM jobs")}

    def close(self) -> None:
        """Close the file, after a last try to write what could not be written."""
        with self._lock:
            with suppress(sqlite3.Error):
                self._write()
            self._db.close()

    def _keep(self, job_id: str, query: str, values: tuple, change: Callable[[StoredJob], StoredJob | None]) -> None:
        with self._lock:
            self._unwritten[job_id] = query, values, change
            with suppress(sqlite3.Error):
                self._write()

    def _write(self) -> None:
        for job_id, (query, values, _) in list(self._unwritten.items()):
            self._db.execute(query, values)
            del self._unwritten[job_id]
            self._recount()

    def _recount(self) -> None:
        """Count anew after a change, which is written and stays whether the count succeeds or not."""
        with suppress(sqlite3.Error):
            self._count()

    def _count(self) -> None:
        rows = self._db.execute("SELECT state, COUNT(*) FROM jobs WHERE state IN (?, ?) GROUP BY state",
                                (QUEUED, SESSION)).fetchall()
        found = {row[0]: int(row[1]) for row in rows}
        self._queued, self._sessions = found.get(QUEUED, 0), found.get(SESSION, 0)

    def _one(self, query: str, value: str) -> StoredJob | None:
        with closing(self._db.execute(query, (value,))) as rows:
            row = rows.fetchone()
        if row is None:
            return None
        outcome = None if row["outcome"] is None else json.loads(row["outcome"])
        return StoredJob(row["number"], row["id"], row["state"], row["attempts"], row["created"], row["ended"],
                   json.loads(row["request"]), outcome)
