"""Series that others send to us: each object is whole on disk or absent, under a name made here.

    incoming/receiving/...       objects that are being received; emptied at the start
    incoming/SERIES/OBJECT.dcm   named by hashes of their UIDs

The threads of connections put files; only the one thread that works on jobs calls the other methods. The time when a
series last grew is kept in memory: after a restart each series counts as having grown just now.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autosam3d.io.files import flush_folder
from autosam3d.services.room import Room

_RECEIVING = "receiving"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutOfRoomError(Exception):
    """The disk is full or a limit is reached; the text says which."""


class OtherObjectError(Exception):
    """Another object with the same UID was received before."""


@dataclass(frozen=True, kw_only=True)
class RoomLimits:
    """How much of the disk senders may use."""

    max_object_bytes: int = 512 << 20
    max_objects: int = 20_000
    """In one series."""
    max_series: int = 1000
    min_free_bytes: int = 1 << 30


@dataclass
class _Series:
    objects: set[str]
    grew: float
    looked_at: int = -1
    """Number of objects when the series was last looked at; -1 before that."""


def hash_of(uid: str) -> str:
    """The name of a series or an object here; it identifies no patient."""
    return hashlib.sha256(uid.encode()).hexdigest()[:32]


class Incoming:
    """The received series in one folder.

    Args:
        folder: that exists; no other process works there.
        limits: see `RoomLimits`.
        clock: monotonic seconds.
    """

    def __init__(self, folder: Path, limits: RoomLimits | None = None, clock: Callable[[], float] = time.monotonic
                 ) -> None:
        self.folder, self.limits, self._clock = folder, limits or RoomLimits(), clock
        self._lock = threading.Lock()
        shutil.rmtree(folder / _RECEIVING, ignore_errors=True)
        (folder / _RECEIVING).mkdir(mode=0o700, exist_ok=True)
        self.room = Room(folder, self.limits.min_free_bytes)
        now = clock()
        self._series = {path.name: _Series({file.name for file in path.iterdir()}, now)
                        for path in _series_folders(folder)}

    def open(self) -> tuple[Path, BinaryIO]:
        """Open a new file for an object that is being received, for whose bytes `room` is asked as they come.

        Raises:
            OSError
        """
        path = self.folder / _RECEIVING / f"{secrets.token_hex(8)}.dcm"
        return path, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def put(self, path: Path, series: str, instance: str) -> bool:
        """Put a complete file that `open` made into its series; False where the same object was there already.

        Args:
            path: of the file; it is moved or deleted, however this ends.
            series: SeriesInstanceUID.
            instance: SOPInstanceUID.

        Raises:
            OtherObjectError
            OutOfRoomError
            OSError
        """
        key, name = hash_of(series), f"{hash_of(instance)}.dcm"
        target = self.folder / key / name
        try:
            with self._lock:
                found = self._series.get(key)
                if found is not None and name in found.objects:
                    if filecmp.cmp(path, target, shallow=False):
                        return False
                    raise OtherObjectError
                if found is None and len(self._series) >= self.limits.max_series:
                    raise OutOfRoomError("series")
                if found is not None and len(found.objects) >= self.limits.max_objects:
                    raise OutOfRoomError("objects in the series")
                if found is None:
                    target.parent.mkdir(mode=0o700, exist_ok=True)
                    flush_folder(self.folder)
                path.rename(target)
                found = self._series.setdefault(key, _Series(set(), 0.0))
                found.objects.add(name)
                found.grew = self._clock()
            flush_folder(target.parent)
            return True
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def due(self, settle_seconds: float) -> list[str]:
        """Hashes of the series that have not grown for so long and have grown since they were last looked at."""
        with self._lock:
            now = self._clock()
            return sorted(key for key, series in self._series.items()
                          if series.looked_at != len(series.objects) and now - series.grew >= settle_seconds)

    def objects(self, key: str) -> frozenset[str]:
        """Names of the files of a series."""
        with self._lock:
            found = self._series.get(key)
            return frozenset(found.objects) if found is not None else frozenset()

    def looked(self, key: str, num_objects: int) -> None:
        """Record that a series was looked at when it had so many objects."""
        with self._lock:
            if key in self._series:
                self._series[key].looked_at = num_objects

    def old(self, keep_seconds: float) -> list[str]:
        """Hashes of the series that have not grown since they were last looked at, nor for so long."""
        with self._lock:
            now = self._clock()
            return sorted(key for key, series in self._series.items()
                          if series.looked_at == len(series.objects) and now - series.grew >= keep_seconds)

    def drop(self, key: str) -> None:
        """Delete a series and its files."""
        with self._lock:
            self._series.pop(key, None)
            shutil.rmtree(self.folder / key, ignore_errors=True)


def is_no_room(error: OSError) -> bool:
    """Whether an error of the operating system means that the disk is full, or a quota or size limit is reached."""
    return error.errno in _NO_ROOM


def num_series(folder: Path) -> int:
    """Number of received series on disk, for processes that only read."""
    with contextlib.suppress(OSError):
        return len(_series_folders(folder))
    return 0


def _series_folders(folder: Path) -> list[Path]:
    """The folders of all series; other files, such as those of a desktop or an editor, are left alone."""
    return [path for path in folder.iterdir() if path.is_dir() and path.name != _RECEIVING]
