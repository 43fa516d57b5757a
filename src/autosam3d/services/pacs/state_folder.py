"""The folder that a service keeps its memory and its work in: for one process at a time, closed to all others."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import ResourceError, UsageError
from autosam3d.io.lock_file import HeldError, sign_lock, take_lock
from autosam3d.services.pacs.incoming import hash_of


@dataclass(frozen=True)
class StateFolder:
    """Where what lies."""

    path: Path

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def incoming(self) -> Path:
        """Series that are being sent to us; see `incoming.Incoming`."""
        return self.path / "incoming"

    def arrived(self, series: str) -> Path:
        """Objects of a series that was sent to us."""
        return self.incoming / hash_of(series)

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def job(self, key: str) -> Path:
        return self.path / "jobs" / key

    def series(self, key: str) -> Path:
        """The scan of a job."""
        return self.job(key) / "series"

    def forget(self, key: str) -> None:
        """Take a job's files away; they are images of a patient."""
        shutil.rmtree(self.job(key), ignore_errors=True)

    def fresh(self, folder: Path) -> Path:
        """`folder`, empty, for us alone."""
        shutil.rmtree(folder, ignore_errors=True)
        with _explained(folder):
            folder.mkdir(parents=True, mode=0o700)
        return folder

    def sweep(self, keep: Container[str]) -> None:
        """Remove what killed processes left: work of jobs that nobody needs any more, and temporaries."""
        for folder in [*(self.path / "jobs").iterdir()]:
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)
        self.fresh(self.scratch)


@contextlib.contextmanager
def hold_state_folder(path: Path) -> Iterator[StateFolder]:
    """Make the folder; inside, this process alone works there. The lock ends with the process, however it ends.

    Raises:
        UsageError: LOCKED, another process works there; OUTPUT_PATH.
        ResourceError: NOT_WRITABLE.
    """
    state = StateFolder(path)
    with contextlib.ExitStack() as stack:
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.name == "posix":
                path.chmod(0o700)
            file = stack.enter_context((path / "lock").open("a+", encoding="utf-8"))
        try:
            take_lock(file)
        except HeldError as owner:
            raise UsageError("LOCKED", path, f"expected a state folder that nobody works in, another process does "
                             f"({owner})", "wait for its end, or name another --state") from None
        except OSError as error:
            raise ResourceError("NO_LOCK", path, f"it cannot be locked ({error.strerror}), so two processes could do "
                                "the same work", "name a --state folder on a local disk") from None
        with _explained(path):
            sign_lock(file)
            for folder in (path / "jobs", state.incoming):
                folder.mkdir(exist_ok=True, mode=0o700)
        yield state


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError("OUTPUT_PATH", path, f"expected a folder ({error.strerror})", "name another one") from None
    except OSError as error:
        raise ResourceError("NOT_WRITABLE", path, f"expected a folder that can be written ({error.strerror})",
                            "name another --state") from None
