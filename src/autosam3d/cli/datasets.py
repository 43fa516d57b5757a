"""``autosam3d prepare`` and ``phantom``: datasets in the layout that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.console import on_task, progress_bars
from autosam3d.cli.options import Set


def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe with a download section: btcv, amos_ct, ct_org.")],
    source: Annotated[Path, typer.Argument(help="The folder as it was downloaded.")],
    destination: Annotated[Path, typer.Argument(help="New folder, in the nnU-Net v2 layout.")],
    overrides: Set = None,
) -> None:
    """Bring a downloaded dataset into the nnU-Net v2 layout and check every case."""
    from autosam3d.data.download import prepare_dataset
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe, overrides or ())
    with progress_bars() as bars:
        task = bars.add_task("preparing", total=None)
        report = prepare_dataset(plan, source, destination,
                                 progress=on_task(bars, task))
    typer.echo(report.summary())


def phantom(
    folder: Annotated[Path, typer.Argument(help="New dataset folder.")],
    train_cases: Annotated[int, typer.Option("--train", min=1, max=10000)] = 8,
    val_cases: Annotated[int, typer.Option("--val", min=0, max=10000)] = 2,
    test_cases: Annotated[int, typer.Option("--test", min=0, max=10000)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a dataset of synthetic abdominal CTs with 13 organs, to try everything without patient data."""
    from autosam3d.data.phantom import write_phantom_dataset
    from autosam3d.io.folders import make_folder

    make_folder(folder)
    with progress_bars() as bars:
        task = bars.add_task("phantoms", total=train_cases + val_cases + test_cases)
        write_phantom_dataset(folder, train_cases, val_cases, test_cases, seed,
                              progress=on_task(bars, task))
    typer.echo(f"wrote {train_cases + val_cases + test_cases} cases to {folder}")
