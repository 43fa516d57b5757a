"""``autosam3d pacs``: a service beside an archive: CT series in, SEG and RTSTRUCT back, each once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.options import Config, SetKey, cores
from autosam3d.errors import BatchError, MissingExtraError, UsageError

app = typer.Typer(name="pacs", help="Beside an archive: CT series in, DICOM SEG and RTSTRUCT back, each once.",
                  rich_markup_mode=None)

State = Annotated[Path | None, typer.Option("--state", help="Folder for the ledger and for scans at work; one process "
                                            "at a time.")]
Model = Annotated[Path | None, typer.Option(help="Run folder, checkpoint's .json, packed model or export; default: the "
                                            "model of the package.")]
RuleFile = Annotated[Path | None, typer.Option("--rule", help="YAML file that says which series are segmented.")]
BodyPart = Annotated[list[str] | None, typer.Option(help="BodyPartExamined; repeat it for several.")]
Description = Annotated[str | None, typer.Option(metavar="REGEX", help="Found in SeriesDescription.")]


@app.callback(invoke_without_command=True)
def watch(
    context: typer.Context,
    config: Config = None,
    overrides: SetKey = None,
    dicomweb: Annotated[str | None, typer.Option(metavar="URL", help="Root of the archive's DICOMweb service.")] = None,
    state: State = None,
    model: Model = None,
    rule: RuleFile = None,
    body_part: BodyPart = None,
    description: Description = None,
    every: Annotated[bool, typer.Option("--every", help="All CT series; else a rule is needed.")] = False,
    auth_file: Annotated[Path | None, typer.Option(help="One line, USER:PASSWORD or Bearer TOKEN, that you alone can "
                                                   "read; or the variable AUTOSAM3D_PACS_AUTH.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look, work, and leave.")] = False,
) -> None:
    """Watch an archive by DICOMweb: new CT series that meet a rule are fetched, segmented and stored back.

    Further keys, and the default of each: docs/pacs_watch.yaml.
    """
    if context.invoked_subcommand is not None:
        return
    _demand_extra("requests", "pydicom", "highdicom")
    from autosam3d.recipes.settings_file import read_settings
    from autosam3d.services.pacs.config import WatchConfig
    from autosam3d.services.pacs.run import watch_archive

    settings = read_settings(WatchConfig, config, overrides or (), {
        "--dicomweb": ("dicomweb", dicomweb), "--state": ("state", state), "--model": ("model", model),
        "--rule": ("rule_file", rule), "--body-part": ("rule.body_part", body_part),
        "--description": ("rule.description", description), "--every": ("every", every or None),
        "--auth-file": ("auth_file", auth_file),
    }, guide="docs/pacs_watch.yaml")
    num_done, num_failed = watch_archive(settings, cores(settings.threads), _tell, once=once)
    if num_failed:
        raise BatchError("FAILED_CASES", settings.state or "", f"{num_failed} series failed, {num_done} are done",
                         "see the lines above, and autosam3d pacs status; what may succeed later is tried again")
    typer.echo(f"{num_done} series done")


@app.command()
def listen(
    config: Config = None,
    overrides: SetKey = None,
    state: State = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Any but this machine's own needs --allow-ae."
                                             )] = None,
    allow_ae: Annotated[list[str] | None, typer.Option(metavar="TITLE", help="Sender that is answered; repeat it for "
                                                       "several.")] = None,
    send_to: Annotated[str | None, typer.Option(metavar="AE@HOST:PORT", help="Archive that takes the results by "
                                                "C-STORE.")] = None,
    dicomweb: Annotated[str | None, typer.Option(metavar="URL", help="Root of the DICOMweb service that takes the "
                                                 "results, instead.")] = None,
    model: Model = None,
    rule: RuleFile = None,
    body_part: BodyPart = None,
    description: Description = None,
) -> None:
    """Listen for CT series that are sent by C-STORE: those that meet a rule are segmented, and the results stored.

    Further keys, and the default of each: docs/pacs_listen.yaml.
    """
    _demand_extra("pynetdicom", "requests", "pydicom", "highdicom")
    from autosam3d.recipes.settings_file import read_settings
    from autosam3d.services.pacs.config import ListenConfig
    from autosam3d.services.pacs.run import listen_for_series

    settings = read_settings(ListenConfig, config, overrides or (), {
        "--state": ("state", state), "--port": ("port", port), "--host": ("host", host),
        "--allow-ae": ("allow_ae", allow_ae), "--send-to": ("send_to", send_to), "--dicomweb": ("dicomweb", dicomweb),
        "--model": ("model", model), "--rule": ("rule_file", rule), "--body-part": ("rule.body_part", body_part),
        "--description": ("rule.description", description),
    }, guide="docs/pacs_listen.yaml")
    listen_for_series(settings, cores(settings.threads), _tell)


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
        rows = {"series": [job.as_dict() for job in jobs], "unsettled_studies": unsettled, "incoming_series": incoming}
        typer.echo(json.dumps(rows, indent=1))
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
