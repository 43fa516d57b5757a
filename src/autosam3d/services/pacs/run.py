"""From settings to a service that runs: START with `watch_archive` and `listen_for_series`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import UsageError
from autosam3d.services.pacs.config import ListenConfig, PacsConfig, WatchConfig
from autosam3d.services.pacs.credentials import demand_safe_transport, read_credentials
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.ledger import Ledger, Retry
from autosam3d.services.pacs.service import RESULTS, ArchiveService, WorkerSegmenter
from autosam3d.services.pacs.sinks import DicomWebSink, Sink
from autosam3d.services.pacs.state_folder import StateFolder, hold_state_folder
from autosam3d.services.workers.messages import WorkerSettings
from autosam3d.services.workers.worker import Worker

Tell = Callable[[str], None]
"""Called with a line for each thing that happens."""


@dataclass(frozen=True)
class _AtWork:
    """What a service has to itself until it ends."""

    folder: StateFolder
    ledger: Ledger
    segmenter: WorkerSegmenter
    """Its worker is not started yet."""


def watch_archive(config: WatchConfig, threads: int, tell: Tell, *, once: bool = False) -> tuple[int, int]:
    """Look at an archive again and again, and bring each series that meets the rule to its results in the archive.

    Args:
        threads: of the worker.
        tell: called with a line for each thing that happens.
        once: look, work, and return; else it ends by an exception alone.

    Returns:
        The numbers of series that are done and that failed.

    Raises:
        UsageError: USAGE, what must be given is not; as `hold_state_folder`, `demand_safe_transport`, `read_rule`.
    """
    from autosam3d.services.pacs.watch import Watch, run_forever, run_once

    if config.dicomweb is None or config.state is None:
        raise UsageError("USAGE", "pacs", "expected --dicomweb URL and --state FOLDER", "see autosam3d pacs --help")
    rule = config.chosen_rule()
    archive = _archive(config, config.dicomweb)
    with contextlib.closing(archive), _at_work(config, config.state, threads) as ours:
        service = ArchiveService(ours.folder, ours.ledger, ours.segmenter, DicomWebSink(archive), archive,
                                 Retry(tries=config.tries), tell=tell)
        service.sweep()
        how = Watch(rule=rule, model=ours.segmenter.worker.start().sha256, settings=ours.segmenter.settings,
                    poll_seconds=config.poll_seconds, settle_seconds=config.settle_seconds, days=config.days)
        if not once:
            run_forever(service, archive, how)
        run_once(service, archive, how)
        return service.num_done, service.num_failed


def listen_for_series(config: ListenConfig, threads: int, tell: Tell) -> None:
    """Take images in by C-STORE, and bring each series that meets the rule to its results in the archive. Ends by an
    exception alone.

    Args:
        threads: of the worker.
        tell: called with a line for each thing that happens.

    Raises:
        UsageError: USAGE, what must be given is not; as `listening`, `hold_state_folder`, `parse_destination`.
    """
    from autosam3d.services.pacs.arrivals import Arrivals, run_forever
    from autosam3d.services.pacs.incoming import Incoming
    from autosam3d.services.pacs.listener import ListenSettings, listening
    from autosam3d.services.pacs.receiving import ConnectionLimits, networks

    if config.state is None or (config.send_to is None) == (config.dicomweb is None):
        raise UsageError("USAGE", "pacs listen", "expected --state FOLDER and either --send-to or --dicomweb",
                         "see autosam3d pacs listen --help")
    rule = config.chosen_rule()
    where = ListenSettings(ae_title=config.ae_title, host=config.host, port=config.port, allow_ae=config.allow_ae,
                           limits=ConnectionLimits(allow_from=networks(config.allow_from)))
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_sink(config))
        ours = stack.enter_context(_at_work(config, config.state, threads))
        service = ArchiveService(ours.folder, ours.ledger, ours.segmenter, sink, None, Retry(tries=config.tries),
                                 tell=tell)
        service.sweep()
        incoming = Incoming(ours.folder.incoming)
        address, number = stack.enter_context(listening(where, incoming))
        tell(f"{config.ae_title} listens on {address} port {number}; Ctrl-C stops it")
        sha256 = ours.segmenter.worker.start().sha256  # what is sent meanwhile waits on disk
        run_forever(service, incoming, Arrivals(
            rule=rule, model=sha256, settings=ours.segmenter.settings, settle_seconds=config.settle_seconds,
            keep_seconds=3600 * config.keep_hours, keep_failed_days=config.keep_failed_days))


@contextlib.contextmanager
def _sink(config: ListenConfig) -> Iterator[Sink]:
    from autosam3d.services.pacs.destination import parse_destination
    from autosam3d.services.pacs.sinks import DimseSink

    if config.send_to is not None:
        yield DimseSink(parse_destination(config.send_to), config.ae_title)
        return
    with contextlib.closing(_archive(config, config.dicomweb or "")) as archive:
        yield DicomWebSink(archive)


@contextlib.contextmanager
def _at_work(config: PacsConfig, state: Path, threads: int) -> Iterator[_AtWork]:
    settings = json.dumps({"overlap": config.overlap, "results": RESULTS}, sort_keys=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(hold_state_folder(state.absolute()))
        ledger = stack.enter_context(contextlib.closing(Ledger(folder.ledger)))
        folder.fresh(folder.scratch)
        worker = stack.enter_context(contextlib.closing(Worker(WorkerSettings(
            model=config.model.absolute() if config.model is not None else None, threads=threads,
            scratch=folder.scratch,
            max_ram_bytes=int(config.max_ram_gib * 2**30) if config.max_ram_gib is not None else None))))
        yield _AtWork(folder, ledger, WorkerSegmenter(worker, settings, config.overlap))


def _archive(config: PacsConfig, url: str) -> DicomWeb:
    credentials = read_credentials(config.auth_file)
    demand_safe_transport(url, credentials, config.insecure)
    if config.ca_file is not None and not config.ca_file.is_file():
        raise UsageError("CA_FILE", config.ca_file, "expected a file of certificates", "check the path")
    trusted = str(config.ca_file) if config.ca_file is not None else True
    return DicomWeb(url, credentials, False if config.insecure else trusted)
