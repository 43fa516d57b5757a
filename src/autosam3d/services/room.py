"""Disk space that is promised to what is being received, so that many senders at once leave what must stay free."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

_STEP_BYTES = 4 << 20
FILE_BYTES = 4096
"""What a file takes beside its bytes: file systems give whole blocks."""


class NoRoomError(Exception):
    """The disk has no room for more that is received."""


class Room:
    """The free space of one disk. Any thread may use it.

    Args:
        folder: on the disk.
        left_bytes: what stays free.
    """

    def __init__(self, folder: Path, left_bytes: int) -> None:
        self._folder, self._left_bytes = folder, left_bytes
        self._lock = threading.Lock()
        self._promised = 0

    def place(self, num_bytes: int = 0) -> Place:
        """Promise room for so many bytes; for more as they come.

        Raises:
            NoRoomError: there is not so much; for 0, less is free than must stay.
        """
        self.promise(num_bytes)
        return Place(self, num_bytes)

    def promise(self, num_bytes: int) -> None:
        with self._lock:
            # What was promised and is not written yet is still free on the disk.
            if shutil.disk_usage(self._folder).free - self._promised < num_bytes + self._left_bytes:
                raise NoRoomError
            self._promised += num_bytes

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._promised -= num_bytes


class Place:
    """The room of one upload or object; `Room.place` makes it, and one thread uses it."""

    def __init__(self, room: Room, num_bytes: int) -> None:
        self._room, self._unused = room, num_bytes

    def need(self, num_bytes: int) -> None:
        """Called before so many bytes are written, beyond those of which `wrote` was told.

        Raises:
            NoRoomError
        """
        if num_bytes > self._unused:
            step = max(num_bytes - self._unused, _STEP_BYTES)
            self._room.promise(step)
            self._unused += step

    def wrote(self, num_bytes: int) -> None:
        """Called after so many bytes were written: now the disk itself says that they are not free."""
        self._room.give_back(num_bytes)
        self._unused -= num_bytes

    def close(self) -> None:
        """Give back what was promised and not used. May be called again."""
        self._room.give_back(self._unused)
        self._unused = 0
