"""Folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from autosam3d.errors import ResourceError, UsageError
from autosam3d.io.files import REPLACED, remove_stale_temporaries, temporary_beside
from autosam3d.io.room import NO_SPACE, room_named, write_error


def demand_replaceable(folder: Path, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse a folder that holds anything but what may be replaced.

    Args:
        folder: which need not exist.
        overwrite: what `is_ours` recognises may be replaced.
        is_ours: whether a folder was written by the command that asks.
        what: such a folder is called, with its article.

    Raises:
        UsageError: OUTPUT_EXISTS.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError("OUTPUT_EXISTS", folder, "expected a new folder, got a file or a link", "name another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_ours(folder):
        raise UsageError("OUTPUT_EXISTS", folder, f"the folder holds files that are not {what}", "name another folder")
    if not overwrite:
        raise UsageError("OUTPUT_EXISTS", folder, f"the folder holds {what}",
                         "name another folder or allow --overwrite")


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; it takes that name when the block ends, and goes where the block fails.

    What lies at `path` is replaced; whether it may be is the caller's business.

    Raises:
        UsageError: OUTPUT_PATH, there is no such place.
        ResourceError: NOT_WRITABLE, or NO_SPACE, also of what is written inside.
    """
    stage = temporary_beside(path)
    with writable_folder(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path.parent)
        stage.mkdir()
    old = stage.with_name(stage.name + REPLACED)
    try:
        with room_named(path):
            yield stage
        with writable_folder(path):
            if path.exists():
                path.rename(old)  # between the two renames nothing lies at `path`: folders cannot trade places
            try:
                stage.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    finally:
        for folder in (stage, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A new folder in the system's place for temporary files, which its owner alone can read; gone when the block ends.

    What killed processes left there goes, too.

    Args:
        kind: of work, for its name.

    Raises:
        ResourceError: NO_SPACE or NOT_WRITABLE.
    """
    place = Path(tempfile.gettempdir())
    remove_stale_temporaries(place)
    folder = temporary_beside(place / f"autosam3d-{kind}")
    with writable_folder(place, "name another folder in TMPDIR"):
        folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path, *, mode: int | None = None, remedy: str = "name another folder") -> None:
    """Make `path` and the folders above it, where they are absent.

    Args:
        path: the folder.
        mode: the permissions of `path`, also where it exists already; None leaves them to the process and to whoever
            made it.
        remedy: what to do where the folder cannot be made; it names the option that names the folder.

    Raises:
        UsageError: OUTPUT_PATH, a file lies at `path` or above it, or the path cannot exist.
        ResourceError: NOT_WRITABLE, the operating system refuses for another reason.
    """
    with writable_folder(path, remedy):
        path.mkdir(mode=0o777 if mode is None else mode, parents=True, exist_ok=True)
        if mode is not None and os.name == "posix":
            path.chmod(mode)  # of a folder that was there, and without the process's umask


@contextlib.contextmanager
def writable_folder(path: Path, remedy: str = "name another folder") -> Iterator[None]:
    """Inside, a folder is made or written to; what the operating system refuses there is an error of ours.

    Args:
        path: the folder, for the message.
        remedy: what to do.

    Raises:
        UsageError: OUTPUT_PATH, something else than a folder lies there, or there is no such place.
        ResourceError: NO_SPACE; NOT_WRITABLE, any other refusal.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UsageError("OUTPUT_PATH", path, f"expected a folder ({error.strerror})", remedy) from None
    except OSError as error:
        if error.errno in NO_SPACE:
            raise write_error(error, path) from None
        raise ResourceError("NOT_WRITABLE", path, f"expected a folder that can be made and written to "
                            f"({error.strerror})", remedy) from None
