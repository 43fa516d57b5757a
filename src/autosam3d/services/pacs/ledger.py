"""The record, in SQLite, of the series that were seen and of their jobs, so that each series is segmented once.

A job is a series with a model and settings. Its state is written before and after each step, and a step that was
interrupted is repeated, so a process that was killed at any moment can continue:

    waiting -> fetched -> segmented -> done
       |          |           |
       +----------+-----------+------> dead (with the reason; `requeue` starts again)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError

WAITING, FETCHED, SEGMENTED, DONE, DEAD = "waiting", "fetched", "segmented", "done", "dead"
_OPEN = (WAITING, FETCHED, SEGMENTED)
_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS studies (uid TEXT PRIMARY KEY, num INTEGER NOT NULL, since REAL NOT NULL,
                                    settled INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, study TEXT NOT NULL, series TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL,
    received INTEGER NOT NULL, num INTEGER NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL,
    not_before REAL NOT NULL, code TEXT NOT NULL, fault TEXT NOT NULL, files TEXT NOT NULL, changed REAL NOT NULL);
CREATE TABLE IF NOT EXISTS received (job TEXT PRIMARY KEY, objects TEXT NOT NULL);
"""
_COLUMNS = "id, study, series, model, settings, received, num, state, attempts, not_before, code, fault, files, changed"


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a failed step is repeated."""

    tries: int = 10
    """Failures of all steps of a job together after which it is dead."""
    first_seconds: float = 10.0
    most_seconds: float = 3600.0
    random: random.Random = field(default_factory=random.Random)

    def delay(self, attempts: int) -> float:
        """Seconds to wait after failure number `attempts`: doubled each time, and randomised, so that an archive that
        is available again does not get all requests at once."""
        return min(self.most_seconds, self.first_seconds * 2.0 ** (attempts - 1)) * self.random.uniform(0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class SeriesJob:
    """One series to be segmented by one model with one set of settings."""

    id: str
    study: str
    series: str
    model: str
    settings: str
    received: bool
    """Whether it was sent to us; then it cannot be fetched again."""
    num: int
    """Number of objects in the series when the job was made."""
    state: str
    attempts: int
    not_before: float
    code: str
    fault: str
    files: Mapping[str, str]
    """File name in the job's folder to SHA-256; empty until it is segmented."""
    changed: float

    @property
    def is_open(self) -> bool:
        """Whether the job is neither done nor dead."""
        return self.state in _OPEN

    def as_dict(self) -> dict[str, Any]:
        """What may be shown: no UID, since a UID identifies a patient. Times are seconds since 1970."""
        return {"series": self.id, "state": self.state, "slices": self.num, "tries": self.attempts,
                "received": self.received, "code": self.code, "reason": self.fault, "changed": self.changed,
                "next_try": self.not_before or None, "results": len(self.files) if self.state == DONE else 0}


def job_id(series: str, model: str, settings: str) -> str:
    """A name for folders and messages that identifies no patient: a hash of series UID, model and settings."""
    return hashlib.sha256("\n".join((series, model, settings)).encode()).hexdigest()[:16]


class Ledger:
    """One SQLite file; every method is one transaction.

    Args:
        path: of the file; created where it is absent.
        read_only: for processes that only read, beside the one that writes.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path = path
        if read_only and not path.is_file():
            raise UsageError("NO_LEDGER", path.parent, "expected the state folder of autosam3d pacs, found no ledger",
                             "name the folder that was given to --state")
        with self._explained():
            if read_only:
                self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
            else:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                self._db = sqlite3.connect(path, timeout=10)
                self._db.execute("PRAGMA synchronous = FULL")
                with self._db:
                    self._db.executescript(_TABLES)
                    if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                        self._db.execute(f"PRAGMA user_version = {_VERSION}")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise UsageError("LEDGER_VERSION", path, f"expected a ledger of version {_VERSION}, got {version}",
                             "use the version of autosam3d that wrote it, or another --state")

    def close(self) -> None:
        self._db.close()

    def saw_study(self, uid: str, num: int, now: float, settle_seconds: float) -> bool:
        """Record how many objects a study has; True where it has not grown for so long and is not settled yet."""
        with self._explained(), self._db:
            row = self._db.execute("SELECT num, since, settled FROM studies WHERE uid = ?", (uid,)).fetchone()
            if row is None or row[0] != num or row[1] > now:  # the clock was set back
                self._db.execute("INSERT OR REPLACE INTO studies VALUES (?, ?, ?, 0)", (uid, num, now))
                return settle_seconds <= 0
            return not row[2] and now - row[1] >= settle_seconds

    def settle(self, uid: str) -> None:
        """Record that a job was made for each series of the study that the rule takes."""
        with self._explained(), self._db:
            self._db.execute("UPDATE studies SET settled = 1 WHERE uid = ?", (uid,))

    def unsettled(self) -> int:
        """Number of studies that may still grow."""
        with self._explained():
            return self._db.execute("SELECT COUNT(*) FROM studies WHERE settled = 0").fetchone()[0]

    def add(self, study: str, series: str, model: str, settings: str, num: int, now: float, *,
            received: Collection[str] = (), anew: bool = False) -> bool:
        """Make a job for a series; False where there is one already.

        A series that has grown since its job was done or dead is another scan and gets a new job: the objects of its
        result name other images and have other UIDs.

        Args:
            study: its UID.
            series: likewise.
            model: SHA-256.
            settings: of the model's run.
            num: objects in the series.
            now: seconds since 1970.
            received: names of its files where it was sent to us.
            anew: make a job also where the series has not grown.
        """
        key = job_id(series, model, settings)
        with self._explained(), self._db:
            row = self._db.execute("SELECT num, state FROM jobs WHERE id = ?", (key,)).fetchone()
            if row is not None and (row[1] in _OPEN or (num <= row[0] and not anew)):
                return False
            self._db.execute(f"INSERT OR REPLACE INTO jobs ({_COLUMNS}) VALUES ({', '.join('?' * 14)})",
                             (key, study, series, model, settings, int(bool(received)), num, WAITING, 0, 0.0, "", "",
                              "{}", now))
            if received:
                self._db.execute("INSERT OR REPLACE INTO received VALUES (?, ?)", (key, " ".join(sorted(received))))
        return True

    def received(self, key: str) -> frozenset[str]:
        """Names of the files of a series that was sent to us, as they were when its job was made."""
        with self._explained():
            row = self._db.execute("SELECT objects FROM received WHERE job = ?", (key,)).fetchone()
        return frozenset(row[0].split()) if row is not None else frozenset()

    def note(self, key: str, code: str, fault: str) -> None:
        """Record a code and a reason for a job, whatever its state."""
        with self._explained(), self._db:
            self._db.execute("UPDATE jobs SET code = ?, fault = ? WHERE id = ?", (code, fault, key))

    def knows(self, job: str, num: int) -> bool:
        """Whether `add` would refuse a series of `num` objects."""
        found = self.get(job)
        return found is not None and (found.state in _OPEN or num <= found.num)

    def move(self, job: SeriesJob, state: str, now: float, files: Mapping[str, str] | None = None) -> SeriesJob:
        """Record that a step is done: the job's new state, and its files where they change."""
        with self._explained(), self._db:
            self._db.execute("UPDATE jobs SET state = ?, not_before = 0, code = '', fault = '', files = ?, changed = ? "
                             "WHERE id = ?", (state, json.dumps(dict(job.files if files is None else files)), now,
                                              job.id))
        return self._known(job.id)

    def fail(self, job: SeriesJob, error: AutoSam3dError, retry: Retry | None, now: float) -> SeriesJob:
        """Record that a step has failed; without `retry`, or after too many tries, the job is dead."""
        attempts = job.attempts + 1
        dead = retry is None or attempts >= retry.tries
        not_before = 0.0 if dead or retry is None else now + retry.delay(attempts)
        with self._explained(), self._db:
            self._db.execute("UPDATE jobs SET state = ?, attempts = ?, not_before = ?, code = ?, fault = ?, "
                             "changed = ? WHERE id = ?", (DEAD if dead else job.state, attempts, not_before, error.code,
                                              error.fault[:500], now, job.id))
        return self._known(job.id)

    def due(self, now: float, most_seconds: float) -> SeriesJob | None:
        """The open job that has waited longest and may be tried now."""
        with self._explained():
            row = self._db.execute(  # a time later than the longest delay was written before the clock was set back
                f"SELECT {_COLUMNS} FROM jobs WHERE state IN (?, ?, ?) AND (not_before <= ? OR not_before > ?) "
                "ORDER BY not_before, changed, id LIMIT 1", (*_OPEN, now, now + most_seconds)).fetchone()
        return None if row is None else _job(row)

    def get(self, key: str) -> SeriesJob | None:
        with self._explained():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (key,)).fetchone()
        return None if row is None else _job(row)

    def jobs(self) -> list[SeriesJob]:
        """All jobs, the last changed first."""
        with self._explained():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY changed DESC, id").fetchall()
        return [_job(row) for row in rows]

    def requeue(self, key: str | None, now: float) -> int:
        """Start dead jobs again, all or the named one; returns their number. Received series keep their files."""
        with self._explained(), self._db:
            # The files of a dead job were deleted, except those that were sent to us and cannot be fetched again.
            return self._db.execute(
                "UPDATE jobs SET state = CASE received WHEN 1 THEN ? ELSE ? END, attempts = 0, not_before = 0, "
                "changed = ? WHERE state = ? AND (? IS NULL OR id = ?)",
                (FETCHED, WAITING, now, DEAD, key, key)).rowcount

    def _known(self, key: str) -> SeriesJob:
        job = self.get(key)
        assert job is not None
        return job

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error):
                raise UsageError("LEDGER_DAMAGED", self._path, "expected the ledger of autosam3d pacs, got something "
                                 "else or a damaged one", "restore it, or name another --state folder") from None
            raise ResourceError("LEDGER", self._path, f"cannot be read or written ({error})",
                                "check the disk, and that no other program holds it") from None
        except OSError as error:
            raise ResourceError("NOT_WRITABLE", self._path, f"expected a file that can be written ({error.strerror})",
                                "name another --state folder") from None


def _job(row: tuple) -> SeriesJob:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return SeriesJob(**{**values, "received": bool(values["received"]), "files": json.loads(values["files"])})
