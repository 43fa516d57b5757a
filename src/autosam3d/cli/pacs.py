"""``autosam3d pacs``: a service beside an archive: CT series in, SEG and RTSTRUCT back, each once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from autosam3d.cli.options import Threads, cores
from autosam3d.errors import BatchError, MissingExtraError, UsageError

app = typer.Typer(name="pacs", help="Beside an archive: CT series in, DICOM SEG and RTSTRUCT back, each once.",
                  rich_markup_mode=None)

Model = Annotated[Path | None, typer.Option(help="Run folder, checkpoint's .json, packed model or export; default: the "
                                            "model of the package.")]
RuleFile = Annotated[Path | None, typer.Option(help="YAML file that says which series are segmented.")]
BodyPart = Annotated[list[str] | None, typer.Option(help="BodyPartExamined; repeat it for several.")]
Modality = Annotated[list[str] | None, typer.Option(help="Default CT.")]
Description = Annotated[str | None, typer.Option(metavar="REGEX", help="Found in SeriesDescription.")]
Every = Annotated[bool, typer.Option("--every", help="All series of the modality; else a rule is needed.")]
AuthFile = Annotated[Path | None, typer.Option(help="One line, USER:PASSWORD or Bearer TOKEN, that you alone can read; "
                                               "or the variable AUTOSAM3D_PACS_AUTH.")]
CaFile = Annotated[Path | None, typer.Option(help="Certificates of the authorities to believe.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Take any certificate, and send credentials over plain "
                                        "http.")]
Overlap = Annotated[float | None, typer.Option(min=0, max=0.9, help="Window overlap, default the model's.")]
MaxRam = Annotated[float | None, typer.Option(min=0.25, max=4096, help="GiB that the worker may take.")]
Tries = Annotated[int, typer.Option(min=1, max=1000, help="Failures of a series until it is given up.")]
State = Annotated[Path | None, typer.Option("--state", help="Folder for the ledger and for scans at work; one process "
                                            "at a time.")]


@app.callback(invoke_without_command=True)
def watch(
    context: typer.Context,
    dicomweb: Annotated[str | None, typer.Option(metavar="URL", help="Root of the archive's DICOMweb service.")] = None,
    state: State = None,
    model: Model = None,
    rule: RuleFile = None,
    body_part: BodyPart = None,
    modality: Modality = None,
    description: Description = None,
    every: Every = False,
    poll: Annotated[float, typer.Option(min=1, max=86400, help="Seconds between two looks.")] = 60.0,
    settle: Annotated[float, typer.Option(min=0, max=86400, help="Seconds that a study must not have grown.")] = 60.0,
    days: Annotated[int | None, typer.Option(min=0, max=36500, help="Look at studies of N days alone.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look, work, and leave.")] = False,
    tries: Tries = 10,
    auth_file: AuthFile = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    overlap: Overlap = None,
    max_ram: MaxRam = None,
    threads: Threads = 0,
) -> None:
    """Watch an archive by DICOMweb: new CT series that meet a rule are fetched, segmented and stored back."""
    if context.invoked_subcommand is not None:
        return
    if dicomweb is None or state is None:
        raise UsageError("USAGE", "pacs", "expected --dicomweb URL and --state FOLDER", "see autosam3d pacs --help")
    _demand_extra("requests", "pydicom", "highdicom")
    chosen = _rule(rule, modality, body_part, description, every)
    archive = _archive(dicomweb, auth_file, ca_file, insecure)
    from autosam3d.services.pacs.ledger import Retry
    from autosam3d.services.pacs.service import ArchiveService
    from autosam3d.services.pacs.sinks import DicomWebSink
    from autosam3d.services.pacs.watch import Watch, run_forever, run_once

    with contextlib.closing(archive), _at_work(state, model, overlap, max_ram, threads) as (folder, ledger, segmenter):
        service = ArchiveService(folder, ledger, segmenter, DicomWebSink(archive), archive, Retry(tries=tries),
                                 tell=_tell)
        service.sweep()
        how = Watch(rule=chosen, model=segmenter.worker.start().sha256, settings=segmenter.settings,
                    poll_seconds=poll, settle_seconds=settle, days=days)
        if not once:
            run_forever(service, archive, how)
        run_once(service, archive, how)
        if service.num_failed:
            raise BatchError("FAILED_CASES", state, f"{service.num_failed} series failed, {service.num_done} are done",
                             "see the lines above, and autosam3d pacs status; what may succeed later is tried again")
        typer.echo(f"{service.num_done} series done")


@app.command()
def listen(
    state: State = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 11_112,
    ae_title: Annotated[str, typer.Option(metavar="TITLE", help="Ours; senders must call it.")] = "AUTOSAM3D",
    send_to: Annotated[str | None, typer.Option(metavar="AE@HOST:PORT", help="Archive that takes the results by "
                                                "C-STORE.")] = None,
    dicomweb: Annotated[str | None, typer.Option(metavar="URL", help="Root of the DICOMweb service that takes the "
                                                 "results, instead.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs --allow-ae."
                                      )] = "127.0.0.1",
    allow_ae: Annotated[list[str] | None, typer.Option(metavar="TITLE", help="Sender that is answered; repeat it for "
                                                       "several.")] = None,
    allow_from: Annotated[list[str] | None, typer.Option(metavar="ADDRESS", help="Address or network, such as "
                                                         "10.1.0.0/16, that is answered; repeat it.")] = None,
    model: Model = None,
    rule: RuleFile = None,
    body_part: BodyPart = None,
    modality: Modality = None,
    description: Description = None,
    every: Every = False,
    settle: Annotated[float, typer.Option(min=0, max=86400, help="Seconds that a series must not have grown.")] = 60.0,
    keep: Annotated[float, typer.Option(min=0, max=720, help="Hours that images are kept for slices that come late."
                                        )] = 1.0,
    keep_failed: Annotated[float, typer.Option(min=0, max=3650, help="Days that images of a series are kept that was "
                                               "given up.")] = 7.0,
    tries: Tries = 30,
    auth_file: AuthFile = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    overlap: Overlap = None,
    max_ram: MaxRam = None,
    threads: Threads = 0,
) -> None:
    """Listen for CT series that are sent by C-STORE: those that meet a rule are segmented, and the results stored."""
    if state is None or (send_to is None) == (dicomweb is None):
        raise UsageError("USAGE", "pacs listen", "expected --state FOLDER and either --send-to or --dicomweb",
                         "see autosam3d pacs listen --help")
    _demand_extra("pynetdicom", "requests", "pydicom", "highdicom")
    from autosam3d.services.pacs.arrivals import Arrivals, run_forever
    from autosam3d.services.pacs.destination import parse_destination
    from autosam3d.services.pacs.incoming import Incoming
    from autosam3d.services.pacs.ledger import Retry
    from autosam3d.services.pacs.listener import ListenSettings, listening
    from autosam3d.services.pacs.receiving import ConnectionLimits, networks
    from autosam3d.services.pacs.service import ArchiveService
    from autosam3d.services.pacs.sinks import DicomWebSink, DimseSink

    chosen = _rule(rule, modality, body_part, description, every)
    where = ListenSettings(ae_title=ae_title, host=host, port=port, allow_ae=tuple(allow_ae or ()),
                           limits=ConnectionLimits(allow_from=networks(allow_from or ())))
    with contextlib.ExitStack() as stack:
        if send_to is not None:
            sink: Any = DimseSink(parse_destination(send_to), ae_title)
        else:
            archive = _archive(dicomweb or "", auth_file, ca_file, insecure)
            sink = DicomWebSink(stack.enter_context(contextlib.closing(archive)))
        folder, ledger, segmenter = stack.enter_context(_at_work(state, model, overlap, max_ram, threads))
        service = ArchiveService(folder, ledger, segmenter, sink, None, Retry(tries=tries), tell=_tell)
        service.sweep()
        incoming = Incoming(folder.incoming)
        address, number = stack.enter_context(listening(where, incoming))
        _tell(f"{ae_title} listens on {address} port {number}; Ctrl-C stops it")
        sha256 = segmenter.worker.start().sha256  # what is sent meanwhile waits on disk
        run_forever(service, incoming, Arrivals(
            rule=chosen, model=sha256, settings=segmenter.settings, settle_seconds=settle, keep_seconds=3600 * keep,
            keep_failed_days=keep_failed))


@app.command()
def status(
    state: Annotated[Path, typer.Option("--state", help="Folder that was given to autosam3d pacs.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What became of each series; neither names nor numbers of patients."""
    from autosam3d.services.pacs.incoming import num_series
    from autosam3d.services.pacs.ledger import Ledger
    from autosam3d.services.pacs.state_folder import StateFolder

    with contextlib.closing(Ledger(_state_of(state), read_only=True)) as ledger:
        jobs, unsettled = ledger.jobs(), ledger.unsettled()
    incoming = num_series(StateFolder(state).incoming)
    if as_json:
        told = {"series": [job.as_dict() for job in jobs], "unsettled_studies": unsettled, "incoming_series": incoming}
        typer.echo(json.dumps(told, indent=1))
        return
    typer.echo(f"{'series':16}  {'state':9}  {'slices':>6}  {'tries':>5}  {'changed':19}  reason")
    for job in jobs:
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.changed))
        reason = f"{job.code}: {job.fault}" if job.fault else job.code
        typer.echo(f"{job.id:16}  {job.state:9}  {job.num:6}  {job.attempts:5}  {changed:19}  {reason}".rstrip())
    typer.echo(f"{len(jobs)} series; {unsettled} studies may still grow; {incoming} series lie as they were sent")


@app.command()
def retry(
    state: Annotated[Path, typer.Option("--state", help="Folder that was given to autosam3d pacs.")],
    series: Annotated[str | None, typer.Argument(help="As status names it; default: all that were given up.")] = None,
) -> None:
    """Begin series anew that were given up; the service must not run meanwhile."""
    from autosam3d.services.pacs.ledger import Ledger
    from autosam3d.services.pacs.state_folder import hold_state_folder

    _state_of(state)
    with hold_state_folder(state) as folder, contextlib.closing(Ledger(folder.ledger)) as ledger:
        typer.echo(f"{ledger.requeue(series, time.time())} series will be tried again")


@contextlib.contextmanager
def _at_work(state: Path, model: Path | None, overlap: float | None, max_ram: float | None, threads: int
             ) -> Iterator[tuple[Any, Any, Any]]:
    """(state folder, ledger, segmenter whose worker is not started yet), all ours until the end."""
    from autosam3d.services.pacs.ledger import Ledger
    from autosam3d.services.pacs.service import RESULTS, WorkerSegmenter
    from autosam3d.services.pacs.state_folder import hold_state_folder
    from autosam3d.services.workers.messages import WorkerSettings
    from autosam3d.services.workers.worker import Worker

    settings = json.dumps({"overlap": overlap, "results": RESULTS}, sort_keys=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(hold_state_folder(state.absolute()))
        ledger = stack.enter_context(contextlib.closing(Ledger(folder.ledger)))
        folder.fresh(folder.scratch)
        worker = stack.enter_context(contextlib.closing(Worker(WorkerSettings(
            model=model.absolute() if model is not None else None, threads=cores(threads), scratch=folder.scratch,
            max_ram_bytes=int(max_ram * 2**30) if max_ram is not None else None))))
        yield folder, ledger, WorkerSegmenter(worker, settings, overlap)


def _archive(url: str, auth_file: Path | None, ca_file: Path | None, insecure: bool) -> Any:
    from autosam3d.services.pacs.credentials import demand_safe_transport, read_credentials
    from autosam3d.services.pacs.dicomweb import DicomWeb

    credentials = read_credentials(auth_file)
    demand_safe_transport(url, credentials, insecure)
    if ca_file is not None and not ca_file.is_file():
        raise UsageError("CA_FILE", ca_file, "expected a file of certificates", "check the path")
    return DicomWeb(url, credentials, False if insecure else str(ca_file) if ca_file is not None else True)


def _rule(path: Path | None, modality: list[str] | None, body_part: list[str] | None, description: str | None,
          every: bool) -> Any:
    from autosam3d.services.pacs.rule import Rule, read_rule

    said = bool(modality or body_part or description or every)
    if path is not None:
        if said:
            raise UsageError("USAGE", "--rule", "expected a rule or single options, got both", "put all into the file")
        return read_rule(path)
    if not (body_part or description or every):
        raise UsageError("USAGE", "pacs", "expected a rule, since no model is made for every CT",
                         "add --rule FILE, --body-part or --description, or --every")
    return Rule(modality=tuple(modality or ("CT",)), body_part=tuple(body_part or ()), description=description)


def _state_of(state: Path) -> Path:
    from autosam3d.services.pacs.state_folder import StateFolder

    ledger = StateFolder(state).ledger
    if not ledger.is_file():
        raise UsageError("NO_LEDGER", state, "expected the state folder of autosam3d pacs, found no ledger",
                         "name the folder that was given to --state")
    return ledger


def _tell(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()


def _demand_extra(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("MISSING_EXTRA", "pacs", f"expected the packages {', '.join(missing)}, got none",
                                'pip install "autosam3d[pacs]"')
