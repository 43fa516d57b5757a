"""Series that are being sent to us: each object whole on disk or not there, under names of our own.

    incoming/receiving/...       what is coming in now; emptied at the start
    incoming/SERIES/OBJECT.dcm   hashes of their UIDs

Files are put by the threads of connections; all else is asked by the one thread that works. When a series last grew is
known to this process alone: after a restart each counts as having grown just now, whatever the clocks say.
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

_RECEIVING = "receiving"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutOfRoomError(Exception):
    """There is no room, or there is more than there may be; the text says of what."""


class OtherObjectError(Exception):
    """An object of this UID was received before, and it was another one."""


@dataclass(frozen=True, kw_only=True)
class RoomLimits:
    """What others may take of our disk."""

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
    """Objects at the last look."""


def hash_of(uid: str) -> str:
    """What a series or an object is called here: nothing of a patient can be read from it."""
    return hashlib.sha256(uid.encode()).hexdigest()[:32]


class Incoming:
    """What lies in one folder.

    Args:
        folder: that exists; nobody else works there.
        limits: see `RoomLimits`.
        clock: seconds, steady.
    """

    def __init__(self, folder: Path, limits: RoomLimits | None = None, clock: Callable[[], float] = time.monotonic
                 ) -> None:
        self.folder, self.limits, self._clock = folder, limits or RoomLimits(), clock
        self._lock = threading.Lock()
        shutil.rmtree(folder / _RECEIVING, ignore_errors=True)
        (folder / _RECEIVING).mkdir(mode=0o700, exist_ok=True)
        now = clock()
        self._series = {path.name: _Series({file.name for file in path.iterdir()}, now)
                        for path in _series_folders(folder)}

    def open(self) -> tuple[Path, BinaryIO]:
        """A new file for an object that is coming in.

        Raises:
            OutOfRoomError
            OSError
        """
        if shutil.disk_usage(self.folder).free < self.limits.min_free_bytes:
            raise OutOfRoomError("disk")
        path = self.folder / _RECEIVING / f"{secrets.token_hex(8)}.dcm"
        return path, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def put(self, path: Path, series: str, instance: str) -> bool:
        """Take up a file that `open` gave and that is on disk to its end; False where that very object was there.

        Args:
            path: is gone afterwards, however this ends.
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
        """Series, by their hashes, that have not grown for so long and have not been looked at as they are."""
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
        """What is to be done with a series of so many objects has been decided."""
        with self._lock:
            if key in self._series:
                self._series[key].looked_at = num_objects

    def old(self, keep_seconds: float) -> list[str]:
        """Series that were looked at as they are and have not grown for so long."""
        with self._lock:
            now = self._clock()
            return sorted(key for key, series in self._series.items()
                          if series.looked_at == len(series.objects) and now - series.grew >= keep_seconds)

    def drop(self, key: str) -> None:
        """Forget a series and its files."""
        with self._lock:
            self._series.pop(key, None)
            shutil.rmtree(self.folder / key, ignore_errors=True)


def is_no_room(error: OSError) -> bool:
    """Whether the operating system has no room, rather than another fault."""
    return error.errno in _NO_ROOM


def num_series(folder: Path) -> int:
    """Series on disk, for those who look from outside."""
    with contextlib.suppress(OSError):
        return len(_series_folders(folder))
    return 0


def _series_folders(folder: Path) -> list[Path]:
    """Of all series; what else lies there, a file of the desktop's or an editor's, is left alone."""
    return [path for path in folder.iterdir() if path.is_dir() and path.name != _RECEIVING]
