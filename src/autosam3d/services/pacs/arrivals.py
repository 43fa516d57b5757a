"""Series that were sent to us: which are complete, which a rule takes, and when their files are deleted."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.io.dicom.identity import DicomIdentity, identify_image
from autosam3d.services.pacs.incoming import Incoming
from autosam3d.services.pacs.ledger import DEAD, WAITING, SeriesJob, job_id
from autosam3d.services.pacs.rule import ImageFacts, Rule, SeriesFacts
from autosam3d.services.pacs.service import ArchiveService, named_faults
from autosam3d.services.pacs.troubles import Troubles

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_AFTER_FAULT_SECONDS = 10.0
_HOUSEKEEPING_SECONDS = 3600.0
_DAY_SECONDS = 86_400.0
# What the files of one series are the reason of; all else is the ledger's or the disk's as a whole.
_OF_SERIES = ("IO",)


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When received series become jobs, and how long their files are kept."""

    rule: Rule
    model: str
    """SHA-256."""
    settings: str
    settle_seconds: float = 60.0
    """A series that has not grown for so long counts as complete."""
    keep_seconds: float = 3600.0
    """Files are kept for so long after the series last grew, so that slices that come late join the others."""
    keep_failed_days: float = 7.0
    """Files of a series whose job is dead are kept for so long, since they cannot be fetched again."""


def look(service: ArchiveService, incoming: Incoming, how: Arrivals, troubles: Troubles) -> int:
    """Make jobs for series that are complete and meet the rule, delete old files; returns the number of new jobs.

    A series whose files cannot be read now is put off, and the others go on.

    Args:
        troubles: what was put off by earlier looks, and is by this one.

    Raises:
        ResourceError: the ledger cannot be written.
    """
    num_new = 0
    for key in incoming.due(how.settle_seconds):
        if not troubles.puts_off(_name(key), service.now()):
            with _passed_over(key, service, troubles):
                num_new += _take_up(key, service, incoming, how)
    for key in incoming.old(max(how.keep_seconds, how.settle_seconds)):
        if not troubles.puts_off(_name(key), service.now()):
            with _passed_over(key, service, troubles):
                # A waiting job has not linked its files yet.
                job = _job_of(key, service, incoming, how)
                if job is None or job.state != WAITING:
                    incoming.drop(key)
    return num_new


def forget_failed(service: ArchiveService, how: Arrivals) -> None:
    """Delete the images of jobs that have been dead for `keep_failed_days`."""
    for job in service.ledger.jobs():
        if job.state == DEAD and job.received and service.now() - job.changed > how.keep_failed_days * _DAY_SECONDS:
            service.state.forget(job.id)


def run_forever(
    service: ArchiveService, incoming: Incoming, how: Arrivals, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Make jobs and work on them until the process is stopped; a full disk is waited for, and logged once."""
    kept_house, is_faulty, troubles = float("-inf"), False, Troubles()
    while True:
        try:
            if time.monotonic() - kept_house > _HOUSEKEEPING_SECONDS:
                forget_failed(service, how)
                kept_house = time.monotonic()
            look(service, incoming, how, troubles)
            if not service.work_once():
                sleep(_LOOK_SECONDS)
            is_faulty = False
        except ResourceError as error:
            if not is_faulty:
                _log.warning("%s: %s: %s; %s", error.where, error.code, error.fault, error.remedy)
            is_faulty = True
            sleep(_AFTER_FAULT_SECONDS)


def _name(key: str) -> str:
    return f"series {key[:16]}"


@contextlib.contextmanager
def _passed_over(key: str, service: ArchiveService, troubles: Troubles) -> Iterator[None]:
    """Inside, a disk that fails under this series does not keep the others from being looked at."""
    try:
        with named_faults():
            yield
    except ResourceError as error:
        if error.code not in _OF_SERIES:
            raise
        troubles.failed(_name(key), error, service.now())
    else:
        troubles.well(_name(key))


def _take_up(key: str, service: ArchiveService, incoming: Incoming, how: Arrivals) -> bool:
    names = incoming.objects(key)
    if not names:  # a process was killed after it made the folder and before it put the first object there
        incoming.drop(key)
        return False
    job = _job_of(key, service, incoming, how)
    if job is not None and job.is_open:
        return False  # looked at again when that job has ended
    # The job is dead and its images are deleted: the series was sent again on purpose.
    is_anew = job is not None and job.state == DEAD and not service.state.series(job.id).is_dir()
    if job is not None and not is_anew and not _is_more(job, names, service):
        incoming.looked(key, len(names))
        return False
    try:
        images = [identify_image(incoming.folder / key / name, _name(key)) for name in sorted(names)]
    except VolumeError as error:
        incoming.looked(key, len(names))
        _log.warning("%s: passed over: %s: %s", error.where, error.code, error.fault)
        return False
    incoming.looked(key, len(names))
    missed = _missed(images, how.rule)
    if missed:
        _log.info("series %s: passed over by the rule (%s)", key[:16], missed)
        return False
    return service.ledger.add(images[0].study, images[0].series, how.model, how.settings, len(names), service.now(),
                              received=names, anew=is_anew)


def _is_more(job: SeriesJob, names: frozenset[str], service: ArchiveService) -> bool:
    """Whether a series whose job has ended has new objects, and all objects that it had before."""
    known = service.ledger.received(job.id)
    num_new = len(names - known)
    if num_new == 0:
        _log.info("%s: it has no new objects, its job is %s", job.id, job.state)
        return False
    if not known <= names:
        late = VolumeError("LATE", job.id, f"{num_new} more objects came after its images had been deleted",
                           "send the whole series again")
        service.ledger.note(job.id, late.code, late.fault)
        _log.warning("%s: %s: %s; %s", late.where, late.code, late.fault, late.remedy)
        return False
    return True


def _missed(images: list[DicomIdentity], rule: Rule) -> str:
    first = images[0]
    if any(image.study != first.study for image in images):
        return "its objects name several studies"
    slices = [ImageFacts(image.image_type, image.thickness_mm, image.num_frames) for image in images]
    facts = SeriesFacts(modality=first.modality, body_part=first.body_part, description=first.description,
                        num_instances=sum(image.num_frames for image in images))
    return rule.misses(facts) or rule.misses_images(slices)


def _job_of(key: str, service: ArchiveService, incoming: Incoming, how: Arrivals) -> SeriesJob | None:
    """The job of a received series, if there is one; its UID is read from its objects."""
    for name in sorted(incoming.objects(key)):
        try:
            series = identify_image(incoming.folder / key / name, key).series
        except VolumeError:
            continue
        return service.ledger.get(job_id(series, how.model, how.settings))
    return None
