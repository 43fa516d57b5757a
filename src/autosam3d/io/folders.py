"""Folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from autosam3d.errors import ResourceError, UsageError


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
