"""Files that are whole or absent: atomic writes, safe opening, and hashes. No image format is known here."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.io.open_files import at_limit, limit_reached
from autosam3d.io.room import reason, write_error

# Errors of the operating system where the disk fails, or the network over which a folder is mounted.
_FAILING = {errno.EIO} | {getattr(errno, name) for name in ("ESTALE", "ETIMEDOUT", "EREMOTEIO", "ECONNRESET",
                                                             "EHOSTDOWN") if hasattr(errno, name)}
# The host is part of a temporary file's name: in a shared folder only files of this host's dead processes are removed.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# So is a number of this start of the process: in a container that is started again, the next one has the same number.
_START = secrets.token_hex(4)
_MAX_NAME_BYTES = 180
REPLACED = ".old"
"""How the name of a folder ends that makes room for its successor (`folders.staged_folder`)."""


@dataclass(frozen=True)
class FileToWrite:
    """One file of `atomic_write_all`."""

    path: Path
    write: Callable[[Path], None]
    """Fills the temporary file that it is given."""
    verify: Callable[[Path], None] | None = None
    """Reads the temporary file back and raises where its content is not as intended."""
    size_bytes: int | Callable[[], int] | None = None
    """How large it will be, where known; only for the message on a full disk, so that a function is asked then."""


def atomic_write(
    path: str | Path,
    write: Callable[[Path], None],
    verify: Callable[[Path], None] | None = None,
    *,
    size_bytes: int | Callable[[], int] | None = None,
) -> None:
    """Write a file so that `path` holds, at every moment, the old content or the whole new one.

    `write` fills a temporary file beside `path`; it is flushed to disk, checked by `verify`, and renamed. On any
    failure, an exception raised by a signal handler included, the temporary file is removed and `path` is untouched.
    What killed processes left in the folder goes when a process first writes there.

    Raises:
        ResourceError: NO_SPACE, NOT_WRITABLE or IO; the message names the path, the bytes needed and the bytes free.
        UsageError: OUTPUT_PATH, where the folder does not exist or `path` is a folder.
    """
    atomic_write_all([FileToWrite(Path(path), write, verify, size_bytes)])


def atomic_write_all(files: Iterable[FileToWrite]) -> None:
    """Write several files that belong together: all are complete on disk before the first one is renamed.

    They are renamed in the given order; put the one that others look for last. Raises as `atomic_write`.
    """
    files = list(files)
    temporaries: list[Path] = []
    try:
        for file in files:
            _sweep_once(str(file.path.parent), os.getpid())
            temporary = temporary_beside(file.path)
            temporaries.append(temporary)
            with _explained(file, temporary):
                file.write(temporary)
                _flush(temporary)
                if file.verify is not None:
                    file.verify(temporary)
        for file, temporary in zip(files, temporaries, strict=True):
            with _explained(file, temporary):
                if file.path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file.path))
                temporary.replace(file.path)
        for folder in dict.fromkeys(file.path.parent for file in files):
            flush_folder(folder)
    finally:
        # After success every temporary file has been renamed, so this removes only what a failure left.
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """`atomic_write` of bytes, read back and compared."""
    atomic_write_all([bytes_to_write(path, content)])


def write_text_atomic(path: str | Path, text: str) -> None:
    """`atomic_write` of UTF-8 text; line ends are not converted."""
    write_bytes_atomic(path, text.encode("utf-8"))


def bytes_to_write(path: str | Path, content: bytes) -> FileToWrite:
    """`content` as an entry for `atomic_write_all`."""

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != content:
            raise OSError(errno.EIO, "what was read back differs from what was written")

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    return FileToWrite(Path(path), write, verify, len(content))


def remove_stale_temporaries(folder: str | Path) -> list[Path]:
    """Remove the temporary files and folders that killed writers of this host left in `folder`; living writers keep
    theirs. Of a folder that was being replaced the old one is put back, if the new one did not take its place.

    Returns:
        What is gone.
    """
    removed = []
    for path in Path(folder).glob(f".*.tmp-*-{_HOST}*"):
        name, _, rest = path.name[1:].rpartition(".tmp-")
        pid_text, _, token = rest.partition("-")
        if not pid_text.isdigit() or _is_at_work(int(pid_text), token.removeprefix(_HOST)):
            continue
        with contextlib.suppress(OSError):
            if path.name.endswith(REPLACED):
                if len(os.fsencode(name)) > _MAX_NAME_BYTES - 4:
                    continue  # it may be the beginning of a longer name
                if not path.with_name(name).exists():
                    path.rename(path.with_name(name))
                    continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
    return removed


def temporary_beside(path: Path) -> Path:
    """A new name beside `path` for what will take its place, by which `remove_stale_temporaries` knows it."""
    # A file name may have at most 255 bytes on common file systems; bytes that are not UTF-8 are left out.
    name = os.fsencode(path.name)[:_MAX_NAME_BYTES].decode("utf-8", errors="ignore")
    return path.with_name(f".{name}.tmp-{os.getpid()}-{_HOST}{_START}{secrets.token_hex(4)}")


@functools.lru_cache(maxsize=1024)
def _sweep_once(folder: str, pid: int) -> None:
    """Sweep a folder when the process `pid` first writes there."""
    with contextlib.suppress(OSError):
        remove_stale_temporaries(folder)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text.

    Raises:
        VolumeError: NOT_A_FILE or UNREADABLE.
    """
    with open_regular(path) as file, readable(path):
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def decoded(content: bytes) -> str:
    """Text that people edit: UTF-8, and with a byte order mark, as editors on Windows set one, also UTF-16.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def flush_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk, where the file system supports it."""
    # Some network file systems cannot flush a folder; the files are renamed all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; it never waits on a FIFO and never opens a device.

    Raises:
        VolumeError: NOT_A_FILE or UNREADABLE. ResourceError: IO.
    """
    with readable(path):
        # Checked before it is opened, since opening a device can act on it, and after, since it may have been replaced.
        _demand_regular(Path(path).stat().st_mode, path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        try:
            _demand_regular(os.fstat(descriptor).st_mode, path)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise


def read_private(path: str | Path, max_bytes: int, code: str) -> bytes:
    """At most `max_bytes` of a file with a secret in it, which its owner alone may read.

    Raises:
        UsageError: `code`, others may read it.
        VolumeError: NOT_A_FILE or UNREADABLE.
    """
    with open_regular(path) as file, readable(path):
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and mode & 0o077:
            raise UsageError(code, path, f"expected a file that its owner alone can read, got mode {mode & 0o777:o}",
                             "chmod 600 it, and change what it holds: others may have read it")
        return file.read(max_bytes)


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn the operating system's faults while reading `path` into VolumeError UNREADABLE, and those of the disk or the
    network below it, which may pass, into ResourceError IO.

    Raises:
        VolumeError: UNREADABLE.
        ResourceError: IO, or OPEN_FILES where the process has too many files open already.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FAILING:
            raise ResourceError("IO", path, f"reading failed ({reason(error)})",
                                "check the disk or the network that it lies on, and try again") from None
        if at_limit(error):
            raise limit_reached(path) from None
        raise VolumeError("UNREADABLE", path, f"cannot be read ({reason(error)})",
                          "check that it exists and that you may read it") from None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise VolumeError("UNREADABLE", repr(str(path)), "a path cannot hold a null byte", "check the path") from None


def _demand_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise VolumeError("NOT_A_FILE", path, f"expected a regular file, got {kind}", "name the image file itself")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(file: FileToWrite, temporary: Path) -> Iterator[None]:
    try:
        yield
    except AutoSam3dError:
        raise
    except OSError as error:
        try:
            written = temporary.stat().st_size
        except OSError:
            written = 0
        size = file.size_bytes() if callable(file.size_bytes) else file.size_bytes
        raise write_error(error, file.path, written=written, size_bytes=size) from error


def _is_at_work(pid: int, token: str) -> bool:
    if pid == os.getpid():
        return token.startswith(_START)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
