"""``autosam3d serve``: scans in over HTTP, segmentations out, and the browser app."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.options import Device, Sam, Threads, cores
from autosam3d.errors import MissingExtraError, UsageError


def serve(
    model: Annotated[Path | None, typer.Argument(help="Run folder, checkpoint's .json, packed model or export; "
                                                      "default: the model of the package.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs --token-file."
                                      )] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the token that clients must show; nobody else may "
                                                         "be able to read it.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Name that clients call the service by, "
                                                         "beside its address; repeat it for several.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the queue and of all files; default: the user's state "
                                                     "folder.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Scans at the same time, a process each.")] = 1,
    max_ram: Annotated[float, typer.Option(min=0.25, max=4096, help="GiB that a worker may take.")] = 4.0,
    queue: Annotated[int, typer.Option(min=1, max=10_000, help="Scans that may wait.")] = 32,
    max_upload: Annotated[int, typer.Option(min=1, max=65_536, help="MiB that a scan may have as it is sent.")] = 2048,
    keep_hours: Annotated[float, typer.Option(min=0.0003, max=8760, help="Results are deleted after this.")] = 24.0,
    scan_minutes: Annotated[float, typer.Option(min=0.1, max=1440, help="A scan that takes longer is given up.")] = 60,
    app: Annotated[bool, typer.Option("--app/--no-app", help="Give out the browser app, too.")] = True,
    backend: Annotated[str, typer.Option(help="As for segment.")] = "auto",
    sam: Sam = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Serve the browser app and segment scans that are sent over HTTP: POST /jobs, or from 3D Slicer."""
    _demand_extra()
    from autosam3d.services.serve.server import serve as run_service
    from autosam3d.services.serve.settings import ServeSettings, demand_token_off_loopback, read_token
    from autosam3d.services.workers.messages import WorkerSettings

    token = read_token(token_file) if token_file is not None else None
    demand_token_off_loopback(host, token)
    settings = ServeSettings(
        folder=(folder or _state_folder()).absolute(), host=host, port=port, token=token,
        allow_hosts=tuple(allow_host or ()), workers=workers, queue=queue, max_upload_bytes=max_upload << 20,
        keep_seconds=keep_hours * 3600, app=app,
    )
    per_worker = threads or max(1, cores(0) // workers)
    how = WorkerSettings(model=model.absolute() if model is not None else None, sam=sam, backend=backend, device=device,
                         threads=per_worker, max_ram_bytes=int(max_ram * 2**30), job_seconds=60 * scan_minutes)
    logging.getLogger("autosam3d.services.serve").setLevel(
        min(logging.INFO, logging.getLogger("autosam3d").getEffectiveLevel()))
    typer.echo("loading the model", err=True)
    run_service(settings, how, _ready)


def _ready(address: str) -> None:
    typer.echo(f"autosam3d serves at {address} (API: {address}docs); Ctrl-C stops it")
    sys.stdout.flush()


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local/state") / "autosam3d" / "serve"


def _demand_extra() -> None:
    import importlib.util

    if sys.platform == "win32":
        raise UsageError("PLATFORM", "serve", "expected Linux or macOS", "use the browser app, or a virtual machine")
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("MISSING_EXTRA", "serve", f"expected the packages {', '.join(missing)}, got none",
                                'pip install "autosam3d[serve]"')
