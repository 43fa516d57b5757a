"""From one series in the archive to its results in the archive, in steps that the ledger records.

Whatever happens in between, a kill included, repeating the job stores each result once: the ledger says which steps
are done, a step that was interrupted is repeated, results are kept on disk until they are stored, and their UIDs are
derived from the series, the model and the settings.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autosam3d.errors import AutoSam3dError, ResourceError, VolumeError
from autosam3d.io import ReadOptions
from autosam3d.io.dicom.identity import identify
from autosam3d.io.files import sha256_of
from autosam3d.io.memory import size_text
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.ledger import DEAD, DONE, FETCHED, SEGMENTED, WAITING, Ledger, Retry, SeriesJob
from autosam3d.services.pacs.sinks import Sink
from autosam3d.services.pacs.state_folder import StateFolder
from autosam3d.services.unforeseen import UNFORESEEN
from autosam3d.services.workers.scan import ScanJob
from autosam3d.services.workers.worker import Worker

_log = logging.getLogger(__name__)

# Room for a scan and its results, and a reserve for the rest of the machine.
_MIN_FREE_BYTES = 1 << 30
RESULTS = ("seg", "rtstruct")
"""The forms of `workers.scan` that are made from a series."""


class Segmenter(Protocol):
    """Makes the results of a scan: a worker process, or a stub in tests."""

    def segment(self, series: Path, folder: Path) -> list[Path]:
        """Make the DICOM objects of the series in the folder `series` in `folder`, and check them by reading them back.

        Raises:
            AutoSam3dError: a `ResourceError` may be gone at the next try; any other error stays.
        """
        ...


@dataclass(frozen=True)
class WorkerSegmenter:
    """Makes SEG and RTSTRUCT in a worker process, so that a crash does not end the service."""

    worker: Worker
    settings: str
    """The text that the ledger keeps; the UIDs of the results are derived from it."""
    overlap: float | None = None

    def segment(self, series: Path, folder: Path) -> list[Path]:
        job = ScanJob(source=series, folder=folder, forms=RESULTS, overlap=self.overlap, uid_settings=self.settings,
                      read_options=ReadOptions(asked_by="nobody"))
        result = self.worker.segment(job)
        for error in result.refused.values():  # both or none: one file alone would look like a complete result
            raise error
        return [result.files[form] for form in RESULTS]


@dataclass
class ArchiveService:
    """The steps from a series to its stored results, and what they share."""

    state: StateFolder
    ledger: Ledger
    segmenter: Segmenter
    sink: Sink
    archive: DicomWeb | None
    """Where series are fetched from; None where others send them."""
    retry: Retry = field(default_factory=Retry)
    now: Callable[[], float] = time.time
    tell: Callable[[str], None] = lambda text: None
    """Called with a line for each job that is done."""
    num_done: int = 0
    num_failed: int = 0

    def sweep(self) -> None:
        """Delete the files of jobs that are done. Called at the start, before any job is worked on."""
        needed = {job.id for job in self.ledger.jobs() if job.state in (FETCHED, SEGMENTED) or job.received}
        finished = {job.id for job in self.ledger.jobs() if job.state == DONE}
        self.state.sweep(needed - finished)

    def work_once(self) -> bool:
        """Work on one job that is due until it is done or fails; False where none is due."""
        job = self.ledger.due(self.now(), self.retry.most_seconds)
        if job is None:
            return False
        try:
            with named_faults():
                while job.state in (WAITING, FETCHED, SEGMENTED):
                    job = self._step(job)
        except AutoSam3dError as error:
            self._failed(self.ledger.get(job.id) or job, error)
            return True
        except UNFORESEEN as error:
            # Whatever it is, it is this series' failure: a process that ended here would begin with it again.
            self._failed(self.ledger.get(job.id) or job, ResourceError(
                "STEP_FAILED", job.id, f"a step failed ({type(error).__name__})", "report this if it happens again"))
            return True
        self.state.forget(job.id)
        self.num_done += 1
        self.tell(f"{job.id}: done, {len(job.files)} results stored")
        return True

    def _step(self, job: SeriesJob) -> SeriesJob:
        if job.state == WAITING:
            self._take_received(job) if job.received else self._fetch(job)
            return self.ledger.move(job, FETCHED, self.now())
        if job.state == FETCHED:
            if not self.state.series(job.id).is_dir():
                return self._step_back(job)
            return self.ledger.move(job, SEGMENTED, self.now(), self._segment(job))
        if any(not self._is_whole(job, name, digest) for name, digest in job.files.items()):
            return self._step_back(job)
        for name in job.files:
            self.sink.put(self.state.job(job.id) / name)
        return self.ledger.move(job, DONE, self.now())

    def _fetch(self, job: SeriesJob) -> None:
        if self.archive is None:
            raise VolumeError("NO_SOURCE", job.id, "expected the archive that holds the series, got none",
                              "start with --dicomweb")
        images = self.archive.instances(job.study, job.series)
        self._demand_room()
        stage = self.state.fresh(self.state.job(job.id) / "fetching")
        num_files = self.archive.fetch(job.study, job.series, stage, self._demand_room)
        found = set()
        for number, path in enumerate(sorted(stage.iterdir()), start=1):
            who = identify(path, f"{job.id}: file {number} of {num_files}")
            if (who.study, who.series) != (job.study, job.series):
                raise ArchiveError("WRONG_SERIES", self.archive.name, "it sent objects of another study or series than "
                                   "was asked for", "look at the archive; it will be tried again")
            found.add(who.instance)
        if found != set(images):
            raise ArchiveError("INCOMPLETE", self.archive.name, f"expected {len(images)} objects of the series, "
                               f"{len(found & set(images))} came, and {len(found - set(images))} others",
                               "it will be tried again")
        self._install(stage, job)

    def _take_received(self, job: SeriesJob) -> None:
        """Link the received files of the job under other names; they are copied only where links are not possible."""
        names = self.ledger.received(job.id)
        source, stage = self.state.arrived(job.series), self.state.fresh(self.state.job(job.id) / "fetching")
        self._demand_room()
        for number, name in enumerate(sorted(names)):
            if not (source / name).is_file():
                raise _received_files_missing()
            try:
                os.link(source / name, stage / f"{number:06d}.dcm")
            except OSError:  # some file systems have no links
                shutil.copyfile(source / name, stage / f"{number:06d}.dcm")
        if not names:
            raise _received_files_missing()
        self._install(stage, job)

    def _install(self, stage: Path, job: SeriesJob) -> None:
        target = self.state.series(job.id)
        shutil.rmtree(target, ignore_errors=True)
        stage.rename(target)

    def _segment(self, job: SeriesJob) -> dict[str, str]:
        folder = self.state.job(job.id)
        paths = self.segmenter.segment(self.state.series(job.id), folder)
        return {path.name: sha256_of(path) for path in paths}

    def _is_whole(self, job: SeriesJob, name: str, digest: str) -> bool:
        path = self.state.job(job.id) / name
        return path.is_file() and sha256_of(path) == digest

    def _step_back(self, job: SeriesJob) -> SeriesJob:
        """Move a job whose files are missing or changed back to the last state whose files are there."""
        if job.state == SEGMENTED and self.state.series(job.id).is_dir():
            return self.ledger.move(job, FETCHED, self.now(), {})
        return self.ledger.move(job, WAITING, self.now(), {})

    def _failed(self, job: SeriesJob, error: AutoSam3dError) -> None:
        again = error.retry if isinstance(error, ArchiveError) else isinstance(error, ResourceError)
        job = self.ledger.fail(job, error, self.retry if again else None, self.now())
        self.num_failed += 1
        if job.state == DEAD:
            if not job.received:
                self.state.forget(job.id)
            _log.warning("%s: given up after %d tries: %s: %s; %s", job.id, job.attempts, error.code, error.fault,
                         error.remedy)
        else:
            _log.warning("%s: %s: %s; try %d of %d in %.0f s", job.id, error.code, error.fault, job.attempts + 1,
                         self.retry.tries, job.not_before - self.now())

    def _demand_room(self) -> None:
        free = shutil.disk_usage(self.state.path).free
        if free < _MIN_FREE_BYTES:
            raise ResourceError("NO_SPACE", self.state.path, f"expected {size_text(_MIN_FREE_BYTES)} of free disk, got "
                                f"{size_text(free)}", "free some space")


def _received_files_missing() -> VolumeError:
    return VolumeError("LOST", "state folder", "the received files of the series are gone", "send it again")


@contextlib.contextmanager
def named_faults() -> Iterator[None]:
    """Turn errors of the operating system into a ResourceError that names no path."""
    try:
        yield
    except OSError as error:
        raise ResourceError("IO", "state folder", f"a file operation failed ({(error.strerror or 'unknown').lower()})",
                            "check the disk") from None
