"""``autosam3d train`` and ``distill``: a model from a dataset, with or without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosam3d.cli.console import TrainingView, say
from autosam3d.cli.options import Device, Model, Sam, Set, Threads, run_folder_outside, set_threads
from autosam3d.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from autosam3d.data.folder import CaseSet

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
    more: Annotated[list[Path] | None, typer.Option("--teacher", metavar="TEACHER", help="A further teacher; again "
                                                    "for more. What all say is averaged.")] = None,
    unlabelled: Annotated[list[Path] | None, typer.Option(metavar="FOLDER", help="Folder of scans that nobody "
                                                          "labelled; again for more. The teacher alone speaks of "
                                                          "them.")] = None,
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
    if unlabelled:
        cases = _with_unlabelled(cases, unlabelled, plan.distill.label_weight)
    for place in (*cases.folders, *(unlabelled or ())):
        run_folder_outside(folder, place)
    set_threads(threads)
    from autosam3d.training.train import TeacherSource
    from autosam3d.training.train import train as run_training

    source = TeacherSource(teacher, sam, tuple(more or ()))
    with TrainingView() as view:
        result = run_training(plan, cases, folder, teacher=source, device=device, cache_dir=cache,
                              observer=view.observer)
    _report_training(folder, result)


def _with_unlabelled(cases: CaseSet, folders: list[Path], label_weight: float) -> CaseSet:
    from autosam3d.data.unlabelled import with_unlabelled
    from autosam3d.scans.found import case_names, scans_in

    if label_weight == 1:
        raise UsageError("UNLABELLED", "--unlabelled", "expected distill.lambda below 1, since a teacher alone speaks "
                         "of scans without labels, got 1", "leave --unlabelled out, or lower distill.lambda")
    scans: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError("UNLABELLED", folder, "expected a folder of scans, got none", "check the path")
        found = scans_in(folder)
        for name, path in zip(case_names(found, folder), found, strict=True):
            unique = name if name not in scans else f"{folder.name}/{name}"
            scans[unique if unique not in scans else str(path)] = path
    return with_unlabelled(cases, scans)


def _report_training(folder: Path, result: Any) -> None:
    if result.stopped_by is not None:
        if result.rank == 0:
            say(f"stopped and saved in {folder}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    if result.rank:
        return
    best = f"best validation Dice {result.best_dice:.4f}" if result.best_dice is not None else "no validation cases"
    say(f"{folder}: trained {result.epoch} epochs in {result.seconds / 60:.1f} min, {best}")
