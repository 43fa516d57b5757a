"""Polling an archive: which series are new, which studies no longer grow, and what a rule takes."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autosam3d.errors import AutoSam3dError, ResourceError
from autosam3d.services.pacs.dicomweb import DicomWeb, FoundSeries, FoundStudy
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.incoming import hash_of
from autosam3d.services.pacs.ledger import job_id
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService, named_faults
from autosam3d.services.pacs.troubles import Troubles

_log = logging.getLogger(__name__)

_MOST_POLL_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How an archive is watched."""

    rule: Rule
    model: str
    """SHA-256."""
    settings: str
    poll_seconds: float = 60.0
    settle_seconds: float = 60.0
    """A study that has not grown for so long counts as complete."""
    days: int | None = None
    """Studies whose StudyDate is older are not looked at; None looks at all."""


def look(service: ArchiveService, archive: DicomWeb, watch: Watch, troubles: Troubles) -> int:
    """Make jobs for series that are new, complete, and meet the rule; returns their number.

    The archive is asked for the number of objects of each study, page by page; the series of a study are read only
    where that number has changed since the last look. A study that cannot be looked at is put off; the others go on.

    Args:
        troubles: what was put off by earlier looks, and is by this one.

    Raises:
        ArchiveError: the archive is out of reach, or its list of studies is broken; `partial` where all studies were
            looked at but those that the list does not name rightly.
        ResourceError: the ledger cannot be written.
    """
    since = None
    if watch.days is not None:
        since = (datetime.date.today() - datetime.timedelta(days=watch.days)).strftime("%Y%m%d")
    num_new = 0
    for modality in watch.rule.modality:
        for study in archive.studies(modality, since):
            name = f"study {hash_of(study.uid)[:16]}"
            if troubles.puts_off(name, service.now()):
                continue
            num, error = _look_at(study, service, archive, watch)
            num_new += num
            if error is None:
                troubles.well(name)
                continue
            troubles.failed(name, error, service.now())
            if isinstance(error, ArchiveError) and error.may_be_away:
                archive.demand_present()
    return num_new


def run_once(
    service: ArchiveService, archive: DicomWeb, watch: Watch, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look once, a second time where a study may still have been growing, and work on the jobs that are due.

    Studies that could not be looked at count as failed.

    Raises:
        As `look`; where the archive can be reached, after the jobs were worked on.
    """
    troubles, broken = Troubles(), None
    for number in range(2):
        try:
            broken = None
            look(service, archive, watch, troubles)
        except ArchiveError as error:
            if error.may_be_away:
                raise
            broken = error
        if number == 1 or not service.ledger.unsettled():
            break
        sleep(watch.settle_seconds)
    # A job that fails is not due again before its delay; the next command repeats it.
    while service.work_once():
        pass
    service.num_failed += len(troubles)
    if broken is not None:
        raise broken


def run_forever(
    service: ArchiveService, archive: DicomWeb, watch: Watch, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look and work until the process is stopped.

    An archive that cannot be reached is waited for, and so is a full disk; each is logged once. Where the archive
    answers, jobs are worked on whatever its lists are.
    """
    troubles, told, num_failures = Troubles(), "", 0
    while True:
        looked = time.monotonic()
        try:
            fault: ResourceError | None = None
            try:
                look(service, archive, watch, troubles)
            except ArchiveError as error:
                fault = error
            # No job is worked on while the archive cannot be reached: that would use up its tries.
            while (not _is_away(fault) and time.monotonic() - looked < watch.poll_seconds) and service.work_once():
                pass
        except ResourceError as error:
            fault = error
        told = _told(fault, told, archive)
        is_whole = fault is None or (isinstance(fault, ArchiveError) and fault.partial)
        num_failures = 0 if is_whole else num_failures + 1
        sleep(min(_MOST_POLL_SECONDS, watch.poll_seconds * 2.0 ** min(num_failures, 10) if num_failures
                  else watch.poll_seconds))


def _is_away(fault: ResourceError | None) -> bool:
    return isinstance(fault, ArchiveError) and fault.may_be_away


def _told(fault: ResourceError | None, before: str, archive: DicomWeb) -> str:
    """Log a fault that is another one than `before`, a code, or its end; returns the code to remember."""
    if fault is None:
        if before:
            _log.warning("%s: it answers again", archive.name)
        return ""
    if fault.code != before:
        _log.warning("%s: %s: %s; %s", fault.where, fault.code, fault.fault, fault.remedy)
    return fault.code


def _look_at(study: FoundStudy, service: ArchiveService, archive: DicomWeb, watch: Watch
             ) -> tuple[int, AutoSam3dError | None]:
    """(the number of new jobs, what kept one of the series from being looked at)."""
    series: list[FoundSeries] | None = None
    num, num_new, fault = study.num_instances, 0, None
    try:
        if num is None:
            series, fault = _series_of(study, archive, count=True)
            num = sum(one.facts.num_instances or 0 for one in series)
        if not service.ledger.saw_study(study.uid, num, service.now(), watch.settle_seconds):
            return 0, fault
        if series is None:
            series, fault = _series_of(study, archive, count=False)
    except ArchiveError as error:
        return 0, error
    for one in series:
        try:
            with named_faults():
                num_new += _take_up(one, service, archive, watch)
        except ArchiveError as error:
            fault = error
    if fault is None:
        service.ledger.settle(study.uid)
    return num_new, fault


def _series_of(study: FoundStudy, archive: DicomWeb, *, count: bool) -> tuple[list[FoundSeries], ArchiveError | None]:
    """(the series that can be looked at, what is wrong with the others)."""
    found: list[FoundSeries] = []
    fault = None
    listed = archive.series(study.uid)
    while True:
        try:
            one = next(listed, None)
        except ArchiveError as error:
            if not error.partial:
                raise
            return found, error
        if one is None:
            return found, fault
        try:
            found.append(_counted(one, archive) if count else one)
        except ArchiveError as error:
            if error.may_be_away:
                raise
            fault = error


def _take_up(found: FoundSeries, service: ArchiveService, archive: DicomWeb, watch: Watch) -> bool:
    if watch.rule.misses(found.facts):
        return False
    key, num = job_id(found.uid, watch.model, watch.settings), found.facts.num_instances
    if num is not None and service.ledger.knows(key, num):
        return False
    images = archive.instances(found.study, found.uid)
    missed = watch.rule.misses_images(images.values())
    if missed:
        _log.info("%s: passed over by the rule (%s)", key, missed)
        return False
    return service.ledger.add(found.study, found.uid, watch.model, watch.settings, len(images), service.now())


def _counted(found: FoundSeries, archive: DicomWeb) -> FoundSeries:
    """The series with its number of objects, also where the archive does not count them."""
    if found.facts.num_instances is not None:
        return found
    num = len(archive.instances(found.study, found.uid))
    return replace(found, facts=replace(found.facts, num_instances=num))
