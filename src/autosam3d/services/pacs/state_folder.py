"""The state folder of a service: its ledger and the files of its jobs, for one process at a time."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from autosam3d.io.folders import make_folder
from autosam3d.io.lock_file import hold_folder
from autosam3d.services.pacs.incoming import hash_of

_MODE = 0o700
"""What lies here are images of patients."""
_REMEDY = "name another folder with --state"


@dataclass(frozen=True)
class StateFolder:
    """The paths in a state folder."""

    path: Path

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def incoming(self) -> Path:
        """Series that others send to us; see `incoming.Incoming`."""
        return self.path / "incoming"

    def arrived(self, series: str) -> Path:
        """Folder with the objects of a series that was sent to us."""
        return self.incoming / hash_of(series)

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def job(self, key: str) -> Path:
        return self.path / "jobs" / key

    def series(self, key: str) -> Path:
        """Folder with the scan of a job."""
        return self.job(key) / "series"

    def forget(self, key: str) -> None:
        """Delete a job's files, which are images of a patient."""
        shutil.rmtree(self.job(key), ignore_errors=True)

    def fresh(self, folder: Path) -> Path:
        """Make `folder` anew: empty, and readable by its owner alone."""
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, mode=_MODE, remedy=_REMEDY)
        return folder

    def sweep(self, keep: Container[str]) -> None:
        """Delete what killed processes left: temporary files, and files of jobs that are not in `keep`."""
        for folder in [*(self.path / "jobs").iterdir()]:
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)
        self.fresh(self.scratch)


@contextlib.contextmanager
def hold_state_folder(path: Path) -> Iterator[StateFolder]:
    """Make the folder; inside, this process alone works there. The hold ends with the process, however it ends.

    Two processes would fetch, segment and send the same series, and sweep each other's files away: without locks the
    folder is refused.

    Raises:
        As `hold_folder`: LOCKED, NO_LOCK, OUTPUT_PATH, NOT_WRITABLE.
    """
    state = StateFolder(path)
    with hold_folder(path, "lock", what="state folder", option="--state", demand_lock=True, mode=_MODE):
        for folder in (path / "jobs", state.incoming):
            make_folder(folder, mode=_MODE, remedy=_REMEDY)
        yield state
