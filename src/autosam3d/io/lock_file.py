"""A folder that one process works in at a time: a lock file in it says which."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from autosam3d.errors import ResourceError, UsageError
from autosam3d.io.folders import make_folder, writable_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger(__name__)

_MAX_OWNER = 200


@dataclass(frozen=True)
class HeldFolder:
    """What the holder of a folder has in hand."""

    descriptors: tuple[int, ...]
    """For `subprocess.Popen(pass_fds=...)`: a process that is started with them holds the folder, too. Empty where the
    folder was not held with `inherit`, or where there are no locks."""


@contextlib.contextmanager
def hold_folder(
    folder: Path, name: str, *, what: str = "folder", option: str = "", inherit: bool = False,
    demand_lock: bool = False, believe_signature: bool = False, mode: int | None = None,
) -> Iterator[HeldFolder]:
    """Make `folder`; inside, this process alone works there. The hold ends with the process, however it ends.

    The lock file is signed with process and host, so that whoever is turned away learns by whom; an orderly end
    empties it. Windows has no such locks: there the folder is made and nobody is turned away.

    Args:
        folder: the folder.
        name: of the lock file in it, which stays there: removed, it could be another process's by now.
        what: the folder is called in messages, without an article.
        option: that names the folder, for the remedies.
        inherit: processes that are started with `HeldFolder.descriptors` hold the folder as well, until the last one
            ends. For stages that outlive a parent that is killed: whoever came then would work beside them. Without it
            no child ever holds the folder, so that it is free as soon as this process is gone.
        demand_lock: refuse a file system that has no locks. For services, where two processes in one folder do the same
            work twice and take each other's files away. A training or a study goes on instead, with a line in the log:
            there the lock only guards against starting it twice by mistake.
        believe_signature: turn away also where the file is signed by another machine, although it is not locked here:
            locks do not reach other machines everywhere. An orderly end has emptied the file; after a crash there a
            person has to remove it.
        mode: the permissions of `folder`.

    Raises:
        UsageError: LOCKED, another process works there; OUTPUT_PATH.
        ResourceError: NO_LOCK, with `demand_lock`; NOT_WRITABLE.
    """
    remedy = f"name another folder with {option}" if option else "name another folder"
    make_folder(folder, mode=mode, remedy=remedy)
    with contextlib.ExitStack() as stack:
        with writable_folder(folder, remedy):
            file = stack.enter_context((folder / name).open("a+", encoding="utf-8"))
        try:
            is_locked = _lock(file, inherit)
        except _HeldError as error:
            raise UsageError("LOCKED", folder, f"expected a {what} that no process works in, got one that is held by "
                             f"{error}", f"wait for its end, or {remedy}") from None
        except OSError as error:  # some network file systems have none
            if demand_lock:
                raise ResourceError("NO_LOCK", folder, f"the file system has no locks ({error.strerror}), so two "
                                    "processes could do the same work there", f"{remedy}, on a local disk") from None
            _log.info("%s: cannot be locked (%s): do not start two processes there", folder, error.strerror)
            is_locked = False
        owner = _read_owner(file)
        if believe_signature and owner and not owner.endswith(f" on {socket.gethostname()}"):
            raise UsageError("LOCKED", folder, f"expected a {what} that no process works in, got one that is held by "
                             f"{owner}, or was when that machine failed",
                             f"make sure that nothing runs there, then remove {folder / name}, or {remedy}")
        with writable_folder(folder, remedy):
            _sign(file)
        try:
            yield HeldFolder((file.fileno(),) if inherit and is_locked else ())
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


class _HeldError(Exception):
    """Another process has the lock; the text says which, as far as the file tells."""


def _lock(file: TextIO, inherit: bool) -> bool:
    """Lock `file` until it is closed or the process ends; False where the operating system knows no such locks.

    Raises:
        _HeldError: another process has it.
        OSError: this file system has no locks.
    """
    if fcntl is None:
        return False
    try:
        if inherit:
            # Of the open file: every process that has inherited the descriptor holds it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # Of this process: children that inherit the descriptor by chance do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _HeldError(_read_owner(file) or "another process") from None
    return True


def _sign(file: TextIO) -> None:
    """Write into a file that was locked who has it."""
    file.truncate(0)
    # Past the file's buffer: what a full disk refuses would be written, and refused, again when the file is closed.
    os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _read_owner(file: TextIO) -> str:
    """What the last holder wrote; nothing where it ended in order and emptied the file."""
    file.seek(0)
    return file.read(_MAX_OWNER).strip()
