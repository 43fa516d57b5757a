"""Folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from autosam3d.errors import ResourceError, UsageError


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
        ResourceError: NOT_WRITABLE.
    """
    stage = path.with_name(f".{path.name[:150]}.tmp-{os.getpid()}-{secrets.token_hex(6)}")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    old = stage.with_name(f"{stage.name}.old")
    try:
        yield stage
        with _explained(path):
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


def make_folder(path: Path) -> None:
    """`path` and what lies above it, where absent.

    Raises:
        As `staged_folder`.
    """
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UsageError("OUTPUT_PATH", path, f"expected a folder ({error.strerror})", "name another one") from None
    except OSError as error:
        raise ResourceError("NOT_WRITABLE", path, f"expected a folder that can be made ({error.strerror})",
                            "name another folder") from None
