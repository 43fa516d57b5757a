"""``autosam3d demo``: the whole product in a few minutes, without patient data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.console import TrainingView
from autosam3d.cli.options import Threads, set_threads


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for everything that the demo makes.")] = Path("demo"),
    threads: Threads = 0,
) -> None:
    """Phantoms, training, segmentation and evaluation in one go, a few minutes on two cores."""
    from autosam3d.io.folders import make_folder

    make_folder(folder)
    set_threads(threads)
    from autosam3d.studies.demo import run_demo

    with TrainingView() as view:
        result = run_demo(folder, view.observer, view.task)
    if result.stopped_by is not None:
        typer.echo(f"stopped and saved in {folder}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    typer.echo(result.summary)
