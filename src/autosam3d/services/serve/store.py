"""The jobs on disk, in SQLite: an accepted job survives a restart."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
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

    Raises:
        ResourceError: STATE, the file is not a database with this table.
        sqlite3.Error: from any method, where the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.execute(_TABLE)
            self._queued = self._count()
        except sqlite3.Error as error:
            raise ResourceError("STATE", path, f"expected the table of jobs ({error})",
                                "move the file away; the service then begins with an empty one") from None
        path.chmod(0o600)

    @property
    def num_queued(self) -> int:
        return self._queued

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
            self._queued = self._count()

    def knows(self, once: str) -> bool:
        with self._lock:
            return self._one("SELECT * FROM jobs WHERE once = ?", once) is not None

    def get(self, job_id: str) -> StoredJob | None:
        with self._lock:
            return self._one("SELECT * FROM jobs WHERE id = ?", job_id)

    def num_before(self, job: StoredJob) -> int:
        """Number of jobs that will be started before a queued one."""
        with self._lock:
            row = self._db.execute("SELECT COUNT(*) FROM jobs WHERE state = ? AND number < ?",
                                   (QUEUED, job.number)).fetchone()
            return int(row[0])

    def num_sessions(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM jobs WHERE state = ?", (SESSION,)).fetchone()[0])

    def take(self) -> StoredJob | None:
        """Take the oldest queued job, whose state becomes running; None where the queue is empty."""
        with self._lock:
            job = self._one("SELECT * FROM jobs WHERE state = ? ORDER BY number LIMIT 1", QUEUED)
            if job is not None:
                self._db.execute("UPDATE jobs SET state = ?, attempts = attempts + 1 WHERE id = ?", (RUNNING, job.id))
                self._queued = self._count()
            return job

    def end(self, job_id: str, state: str, outcome: Mapping[str, Any], now: float) -> None:
        with self._lock:
            self._db.execute("UPDATE jobs SET state = ?, outcome = ?, ended = ? WHERE id = ?",
                             (state, json.dumps(outcome), now, job_id))
            self._queued = self._count()

    def put_back(self, job_id: str) -> None:
        """Queue a running job again that the service stopped itself; this does not count as an attempt."""
        with self._lock:
            self._db.execute("UPDATE jobs SET state = ?, attempts = attempts - 1 WHERE id = ? AND state = ?",
                             (QUEUED, job_id, RUNNING))
            self._queued = self._count()

    def remove(self, job_id: str) -> None:
        with self._lock:
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._queued = self._count()

    def recover(self, now: float) -> None:
        """After a start: queue jobs that were running, or fail those that were started `MAX_ATTEMPTS` times."""
        with self._lock:
            self._db.execute("UPDATE jobs SET state = ?, outcome = ?, ended = ? WHERE state = ? AND attempts >= ?",
                             (FAILED, json.dumps(_INTERRUPTED.as_dict()), now, RUNNING, MAX_ATTEMPTS))
            self._db.execute("UPDATE jobs SET state = ? WHERE state = ?", (QUEUED, RUNNING))
            self._queued = self._count()

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
        with self._lock:
            self._db.close()

    def _count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM jobs WHERE state = ?", (QUEUED,)).fetchone()[0])

    def _one(self, query: str, value: str) -> StoredJob | None:
        with closing(self._db.execute(query, (value,))) as rows:
            row = rows.fetchone()
        if row is None:
            return None
        outcome = None if row["outcome"] is None else json.loads(row["outcome"])
        return StoredJob(row["number"], row["id"], row["state"], row["attempts"], row["created"], row["ended"],
                   json.loads(row["request"]), outcome)
