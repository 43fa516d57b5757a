"""``autosam3d export-web``: the browser app as a static folder, with the user's own model and organs in it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from autosam3d.cli.console import on_task, progress_bars
from autosam3d.cli.options import Sam, Threads, cores, set_threads


def export_web(
    model: Annotated[Path, typer.Argument(help="Run folder, a checkpoint's .json, or a folder of autosam3d export.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the page and the model.")],
    sam: Sam = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a web export.")] = False,
    threads: Threads = 0,
) -> None:
    """Write a static web page that segments CTs in the browser with this model; the scans stay on their device."""
    from autosam3d.checkpoints.exported import is_export, open_export
    from autosam3d.export.web import demand_replaceable, write_web_folder

    demand_replaceable(folder, overwrite)
    if is_export(model):
        made = write_web_folder(open_export(model), folder, overwrite=overwrite)
    else:
        set_threads(threads)
        from autosam3d.checkpoints.checkpoint import load_model
        from autosam3d.export.export import export_model

        trained = load_model(model, sam=sam)
        with TemporaryDirectory(prefix="autosam3d-web-") as scratch, progress_bars() as bars:
            on_step = on_task(bars, bars.add_task("exporting", total=None))
            export_model(trained, Path(scratch) / "export", threads=cores(threads), progress=on_step)
            made = write_web_folder(open_export(Path(scratch) / "export"), folder, overwrite=overwrite)
    typer.echo(f"wrote {folder}: {len(made.sizes)} files, {made.total_bytes / 1e6:.1f} MB, version {made.version}")
    typer.echo(f"try it with: python -m http.server --bind 127.0.0.1 --directory {folder} 8000, then open "
               "http://127.0.0.1:8000; other machines need https, without which browsers give neither threads nor "
               "offline use")
