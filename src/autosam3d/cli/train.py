"""``autosam3d train`` and ``distill``: a model from a dataset, with or without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autosam3d.cli.console import TrainingView
from autosam3d.cli.options import Device, Model, Sam, Set, Threads, run_folder_outside, set_threads
from autosam3d.errors import RecipeError

Data = Annotated[list[str] | None, typer.Option(
    help="Dataset folder in the nnU-Net v2 layout; again for each further one, or NAME=FOLDER for a dataset of the "
         "recipe's `data`.", metavar="FOLDER")]

def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package, or a YAML file.")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE.")] = None,
    model: Model = None,
    sam: Sam = None,
    overrides: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for preprocessed cases; default OUT/cache.")] = None,
) -> None:
    """Train on a dataset, or go on with a run that was stopped."""
    from autosam3d.data.datasets import open_datasets
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe, overrides or (), model)
    folder = out or Path("runs") / plan.name
    cases = open_datasets(data or (), plan)
    for place in cases.folders:
        run_folder_outside(folder, place)
    set_threads(threads)
    from autosam3d.training.train import train as run_training

    with TrainingView() as view:
        result = run_training(plan, cases, folder, sam=sam, device=device, cache_dir=cache, observer=view.observer)
    _report_training(folder, result)


def distill(
    teacher: Annotated[Path, typer.Argument(help="The trained teacher: run folder, or a checkpoint's .json.")],
    data: Data = None,
    student: Annotated[str, typer.Option(help="tiny, small, edge, or a recipe (name or YAML file) with its own "
                                              "network; the first three take all else from the teacher.")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE.")] = None,
    sam: Sam = None,
    overrides: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for preprocessed cases and the teacher's probabilities, "
                                                    "shared by all students; default OUT/cache.")] = None,
) -> None:
    """Train a small student on labels and on a teacher's probabilities, or go on with a run that was stopped."""
    from autosam3d.data.datasets import open_datasets
    from autosam3d.training.distill import student_recipe

    plan = student_recipe(teacher, student, overrides or ())
    if plan.distill is None:
        raise RecipeError("NO_DISTILL", student, "expected a recipe with a distill section, got one without",
                          "add `distill: {lambda: 0.5}`, or use `autosam3d train`")
    folder = out or Path("runs") / plan.name
    cases = open_datasets(data or (), plan)
    for place in cases.folders:
        run_folder_outside(folder, place)
    set_threads(threads)
    from autosam3d.training.train import TeacherSource
    from autosam3d.training.train import train as run_training

    with TrainingView() as view:
        result = run_training(plan, cases, folder, teacher=TeacherSource(teacher, sam), device=device, cache_dir=cache,
                              observer=view.observer)
    _report_training(folder, result)


def _report_training(folder: Path, result: Any) -> None:
    if result.stopped_by is not None:
        if result.rank == 0:
            typer.echo(f"stopped and saved in {folder}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    if result.rank:
        return
    best = f"best validation Dice {result.best_dice:.4f}" if result.best_dice is not None else "no validation cases"
    typer.echo(f"{folder}: trained {result.epoch} epochs in {result.seconds / 60:.1f} min, {best}")
