"""A file that one process holds at a time and that says which: who works in a folder."""

from __future__ import annotations

import os
import socket
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MAX_OWNER = 200


class HeldError(Exception):
    """Another process holds the file; the text says which, as far as the file tells."""


def take_lock(file: TextIO) -> None:
    """Hold `file`, open for reading and appending, until it is closed or the process ends, however it ends.

    Raises:
        HeldError: another process has it.
        OSError: this file system has no locks.
    """
    if fcntl is None:
        return
    try:
        # Not flock: child processes would inherit it, and keep it a while where their parent is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise HeldError(read_owner(file) or "unknown") from None


def sign_lock(file: TextIO) -> None:
    """Write into a file that was taken who has it.

    Raises:
        OSError: the disk is full, for example.
    """
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def read_owner(file: TextIO) -> str:
    """What the last holder wrote; nothing where it ended in order and emptied the file."""
    file.seek(0)
    return file.read(_MAX_OWNER).strip()


def is_of_this_machine(owner: str) -> bool:
    """Whether a holder worked on this machine; locks do not reach other machines everywhere."""
    return owner.endswith(f" on {socket.gethostname()}")
