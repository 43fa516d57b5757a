"""What was seen and what became of it, in SQLite: the memory that makes each series be done once.

A job is a series with a model and settings. Its state is written before and after each step, and a step that was cut
off is done again, so at every moment a killed process can go on:

    waiting -> fetched -> segmented -> done
       |          |           |
       +----------+-----------+------> dead (with the reason; `requeue` begins anew)
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
    """When a step that failed is tried again."""

    tries: int = 10
    """Of all steps of a job together; after that many it is dead."""
    first_seconds: float = 10.0
    most_seconds: float = 3600.0
    random: random.Random = field(default_factory=random.Random)

    def delay(self, attempts: int) -> float:
        """Seconds after failure number `attempts`: doubled each time, and spread, so that an archive that comes back is
        not met by all at once."""
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
    """It was sent to us, so it cannot be fetched again."""
    num: int
    """Objects in the series when it was taken up."""
    state: str
    attempts: int
    not_before: float
    code: str
    fault: str
    files: Mapping[str, str]
    """Names in the job's folder to SHA-256, once it is segmented."""
    changed: float

    @property
    def is_open(self) -> bool:
        """Whether there is work to be done."""
        return self.state in _OPEN

    def as_dict(self) -> dict[str, Any]:
        """What may be told: no UID, since a UID leads to a patient. Times are seconds since 1970."""
        return {"series": self.id, "state": self.state, "slices": self.num, "tries": self.attempts,
                "received": self.received, "code": self.code, "reason": self.fault, "changed": self.changed,
                "next_try": self.not_before or None, "results": len(self.files) if self.state == DONE else 0}


def job_id(series: str, model: str, settings: str) -> str:
    """A name for a folder and for the eyes of others: no number of a patient can be read from it."""
    return hashlib.sha256("\n".join((series, model, settings)).encode()).hexdigest()[:16]


class Ledger:
    """One SQLite file; every method is one transaction.

    Args:
        path: of the file, made where it is absent.
        read_only: for those who only look, beside the process that writes.
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
        """Note how many objects a study has now; True where it has stood still long enough and is to be looked into."""
        with self._explained(), self._db:
            row = self._db.execute("SELECT num, since, settled FROM studies WHERE uid = ?", (uid,)).fetchone()
            if row is None or row[0] != num or row[1] > now:  # a clock that was set back
                self._db.execute("INSERT OR REPLACE INTO studies VALUES (?, ?, ?, 0)", (uid, num, now))
                return settle_seconds <= 0
            return not row[2] and now - row[1] >= settle_seconds

    def settle(self, uid: str) -> None:
        """All series of the study have been taken up or passed over."""
        with self._explained(), self._db:
            self._db.execute("UPDATE studies SET settled = 1 WHERE uid = ?", (uid,))

    def unsettled(self) -> int:
        """Studies that may still grow."""
        with self._explained():
            return self._db.execute("SELECT COUNT(*) FROM studies WHERE settled = 0").fetchone()[0]

    def add(self, study: str, series: str, model: str, settings: str, num: int, now: float, *,
            received: Collection[str] = (), anew: bool = False) -> bool:
        """Take up a series; False where that was done before.

        One that has grown since it was finished or given up is another scan, and is done again: the objects of its
        result name other images and have other UIDs.

        Args:
            study: its UID.
            series: likewise.
            model: SHA-256.
            settings: of the model's run.
            num: objects in the series.
            now: seconds since 1970.
            received: names of its files, where it was sent to us.
            anew: also where it has not grown since it was given up.
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
        """Names of the files of a series that was sent to us, from when it was taken up."""
        with self._explained():
            row = self._db.execute("SELECT objects FROM received WHERE job = ?", (key,)).fetchone()
        return frozenset(row[0].split()) if row is not None else frozenset()

    def note(self, key: str, code: str, fault: str) -> None:
        """Say something of a job, whatever its state."""
        with self._explained(), self._db:
            self._db.execute("UPDATE jobs SET code = ?, fault = ? WHERE id = ?", (code, fault, key))

    def knows(self, job: str, num: int) -> bool:
        """Whether `add` would refuse a series of `num` objects."""
        found = self.get(job)
        return found is not None and (found.state in _OPEN or num <= found.num)

    def move(self, job: SeriesJob, state: str, now: float, files: Mapping[str, str] | None = None) -> SeriesJob:
        """A step is done."""
        with self._explained(), self._db:
            self._db.execute("UPDATE jobs SET state = ?, not_before = 0, code = '', fault = '', files = ?, changed = ? "
                             "WHERE id = ?", (state, json.dumps(dict(job.files if files is None else files)), now,
                                              job.id))
        return self._known(job.id)

    def fail(self, job: SeriesJob, error: AutoSam3dError, retry: Retry | None, now: float) -> SeriesJob:
        """A step has failed; without `retry`, or after too many tries, the job is dead."""
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
            row = self._db.execute(  # beyond the longest delay a time was written by a clock that has been set back
                f"SELECT {_COLUMNS} FROM jobs WHERE state IN (?, ?, ?) AND (not_before <= ? OR not_before > ?) "
                "ORDER BY not_before, changed, id LIMIT 1", (*_OPEN, now, now + most_seconds)).fetchone()
        return None if row is None else _job(row)

    def get(self, key: str) -> SeriesJob | None:
        with self._explained():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (key,)).fetchone()
        return None if row is None else _job(row)

    def jobs(self) -> list[SeriesJob]:
        """All, the last changed first."""
        with self._explained():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY changed DESC, id").fetchall()
        return [_job(row) for row in rows]

    def requeue(self, key: str | None, now: float) -> int:
        """Begin dead jobs anew, all or the named one; those that were sent to us go on where their files are."""
        with self._explained(), self._db:
            # Files of a dead job are gone, but for those that cannot be fetched again.
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
