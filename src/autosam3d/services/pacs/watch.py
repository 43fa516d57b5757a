"""Polling an archive: which series are new, which studies no longer grow, and what a rule takes."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autosam3d.services.pacs.dicomweb import DicomWeb, FoundSeries
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.ledger import job_id
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService

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


def look(service: ArchiveService, archive: DicomWeb, watch: Watch) -> int:
    """Make jobs for series that are new, complete, and meet the rule; returns their number.

    The archive is asked for the number of objects of each study, page by page; the series of a study are read only
    where that number has changed since the last look.

    Raises:
        ArchiveError
    """
    since = None
    if watch.days is not None:
        since = (datetime.date.today() - datetime.timedelta(days=watch.days)).strftime("%Y%m%d")
    num_new = 0
    for modality in watch.rule.modality:
        for study in archive.studies(modality, since):
            series: list[FoundSeries] | None = None
            num = study.num_instances
            if num is None:
                series = [_counted(one, archive) for one in archive.series(study.uid)]
                num = sum(one.facts.num_instances or 0 for one in series)
            if not service.ledger.saw_study(study.uid, num, service.now(), watch.settle_seconds):
                continue
            found = archive.series(study.uid) if series is None else series
            num_new += sum(_take_up(one, service, archive, watch) for one in found)
            service.ledger.settle(study.uid)
    return num_new


def run_once(
    service: ArchiveService, archive: DicomWeb, watch: Watch, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look once, a second time where a study may still have been growing, and work on the jobs that are due."""
    look(service, archive, watch)
    if service.ledger.unsettled():
        sleep(watch.settle_seconds)
        look(service, archive, watch)
    # A job that fails is not due again before its delay; the next command repeats it.
    while service.work_once():
        pass


def run_forever(
    service: ArchiveService, archive: DicomWeb, watch: Watch, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look and work until the process is stopped; an archive that cannot be reached is waited for, and logged once."""
    num_failures = 0
    while True:
        try:
            look(service, archive, watch)
            if num_failures:
                _log.warning("%s: it answers again", archive.name)
            num_failures = 0
            looked = time.monotonic()
            # No job is worked on while the archive cannot be reached: that would use up its tries.
            while time.monotonic() - looked < watch.poll_seconds and service.work_once():
                pass
        except ArchiveError as error:
            num_failures += 1
            if num_failures == 1:
                _log.warning("%s: %s: %s; %s", error.where, error.code, error.fault, error.remedy)
        sleep(min(_MOST_POLL_SECONDS, watch.poll_seconds * 2.0 ** min(num_failures, 10) if num_failures
                  else watch.poll_seconds))


def _take_up(found: FoundSeries, service: ArchiveService, archive: DicomWeb, watch: Watch) -> bool:
    if watch.rule.misses(found.facts):
        return False
    key, num = job_id(found.uid, watch.model, watch.settings), found.facts.num_instances
    if num is not None and service.ledger.knows(key, num):
        return False
    images = archive.instances(found.study, found.uid)
    missed = watch.rule.misses_images(images)
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
