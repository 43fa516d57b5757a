"""Room on a disk: checked before long work, and reported in bytes where it has run out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError
from autosam3d.io.memory import size_text
from autosam3d.io.open_files import at_limit, limit_reached

# Errors of the operating system where there is no space, and where a file may not be written.
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_SUCH_PLACE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_REMEDY = "free some space, raise the quota or write elsewhere"
LEAST_BYTES = 4096
"""What the smallest result takes."""


def demand_room(place: Path, needed_bytes: int = LEAST_BYTES, remedy: str = _REMEDY) -> None:
    """Refuse work whose results cannot fit on their disk, before it begins.

    Args:
        place: a file or folder that need not exist.
        needed_bytes: that the results take at least.
        remedy: what to do.

    Raises:
        ResourceError: NO_SPACE, with the bytes needed and the bytes free.
    """
    free = free_bytes(place)
    if free is not None and free < needed_bytes:
        raise ResourceError("NO_SPACE", place, f"at least {_bytes(needed_bytes, 'needed')}, {_bytes(free, 'free')}",
                            remedy)


def free_bytes(place: Path) -> int | None:
    """Free on the disk that `place` is on, or would be; None where nobody can say."""
    with contextlib.suppress(OSError):
        there = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.lexists(p))
        return shutil.disk_usage(there).free
    return None


@contextlib.contextmanager
def room_named(folder: Path) -> Iterator[None]:
    """Inside, files are written for `folder`; where the disk is full, or none may be written, the error says so.

    Args:
        folder: for the message; what was written so far lies on its disk.

    Raises:
        ResourceError: NO_SPACE or NOT_WRITABLE.
    """
    try:
        yield
    except OSError as error:
        if _number_of(error) in NO_SPACE | _NOT_WRITABLE:
            raise write_error(error, folder) from error
        raise


def write_error(error: OSError, path: Path, *, written: int = 0, size_bytes: int | None = None) -> AutoSam3dError:
    """The error for the user where `path` cannot be written: the path, the bytes needed, the bytes free.

    Args:
        error: of the operating system, or of a library that wraps it.
        path: of the file or the folder.
        written: bytes that were there when it failed.
        size_bytes: of the whole, where it is known.
    """
    if at_limit(error):
        return limit_reached(path)
    number = _number_of(error)
    if number in _NO_SUCH_PLACE:
        return UsageError("OUTPUT_PATH", path, f"cannot be written there ({reason(error)})",
                          "name a file in a folder that exists")
    if number in _NOT_WRITABLE:
        return ResourceError("NOT_WRITABLE", path, f"expected a place that may be written ({reason(error)})",
                             "change the permissions or write elsewhere")
    needed = f"{size_bytes} bytes needed" if size_bytes else f"more than {_bytes(written, 'needed')}"
    there = free_bytes(path.parent)
    free = _bytes(there, "free") if there is not None else "free space unknown"
    # numpy raises an OSError without errno when a write falls short.
    short = number is None and size_bytes is not None and there is not None and there < size_bytes
    if number in NO_SPACE or short:
        return ResourceError("NO_SPACE", path, f"{needed}, {free} ({reason(error)})", _REMEDY)
    return ResourceError("IO", path, f"writing failed ({reason(error)}); {needed}, {free}",
                         "check the disk and try again")


def reason(error: OSError) -> str:
    """The operating system's words."""
    number = _number_of(error)
    return (os.strerror(number) if number is not None else type(error).__name__).lower()


def _number_of(error: BaseException) -> int | None:
    """The operating system's number of a fault, also where a library has wrapped it in an error of its own."""
    if isinstance(error, shutil.Error):  # a list of (source, target, reason)
        found = re.search(r"\[Errno (\d+)\]", str(error))
        return int(found[1]) if found else None
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            break
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return None


def _bytes(count: int, word: str) -> str:
    return f"{count} bytes {word}" + (f" ({size_text(count)})" if count >= 1024 or word == "free" else "")
