"""``autosam3d serve``: scans in over HTTP, segmentations out, and the browser app."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.options import Config, SetKey, cores
from autosam3d.errors import MissingExtraError, UsageError


def serve(
    model: Annotated[Path | None, typer.Argument(help="Run folder, checkpoint's .json, packed model or export; "
                                                      "default: the model of the package.")] = None,
    config: Config = None,
    overrides: SetKey = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Any but this machine's own needs "
                                             "--token-file.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token that clients must show; nobody else may "
                                                         "be able to read it.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Name that clients call the service by, "
                                                         "beside its address; repeat it for several.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the queue and of all files.")] = None,
    workers: Annotated[int | None, typer.Option(help="Scans at the same time, a process each.")] = None,
    keep_hours: Annotated[float | None, typer.Option(help="Results are deleted after this.")] = None,
    backend: Annotated[str | None, typer.Option(help="As for segment.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a worker.")] = None,
) -> None:
    """Serve the browser app and segment scans that are sent over HTTP: POST /jobs, or from 3D Slicer.

    Further keys, and the default of each: docs/serve.yaml.
    """
    _demand_extra()
    from autosam3d.recipes.settings_file import read_settings
    from autosam3d.services.serve.config import ServeConfig
    from autosam3d.services.serve.server import serve as run_service

    settings = read_settings(ServeConfig, config, overrides or (), {
        "MODEL": ("model", model), "--host": ("host", host), "--port": ("port", port),
        "--token-file": ("token_file", token_file), "--allow-host": ("allow_host", allow_host),
        "--folder": ("folder", folder), "--workers": ("workers", workers), "--keep-hours": ("keep_hours", keep_hours),
        "--backend": ("backend", backend), "--device": ("device", device), "--threads": ("threads", threads),
    }, guide="docs/serve.yaml")
    service = settings.service()
    logging.getLogger("autosam3d.services.serve").setLevel(
        min(logging.INFO, logging.getLogger("autosam3d").getEffectiveLevel()))
    typer.echo("loading the model", err=True)
    run_service(service, settings.worker(cores(0)), _ready)


def _ready(address: str) -> None:
    typer.echo(f"autosam3d serves at {address} (API: {address}docs); Ctrl-C stops it")
    sys.stdout.flush()


def _demand_extra() -> None:
    import importlib.util

    if sys.platform == "win32":
        raise UsageError("PLATFORM", "serve", "expected Linux or macOS", "use the browser app, or a virtual machine")
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("MISSING_EXTRA", "serve", f"expected the packages {', '.join(missing)}, got none",
                                'pip install "autosam3d[serve]"')
