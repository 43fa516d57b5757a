"""``autosam3d info``, ``recipes`` and ``bench``: what a recipe or a model is, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.console import on_task, progress_bars
from autosam3d.cli.options import Model, Set, Threads, cores
from autosam3d.errors import CheckpointError, UsageError


def info(
    what: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="Recipe name, YAML file, or model folder.")],
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the whole recipe.")] = False,
    model: Model = None,
    overrides: Set = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="As for train: also print which organ comes "
                                                   "from how many cases of which dataset.")] = None,
) -> None:
    """Describe a recipe or a trained model: organs, preprocessing, parameters."""
    from autosam3d.recipes.recipe import dump_recipe, load_recipe

    json_path = _checkpoint_of(what)
    if json_path is not None:
        from autosam3d.checkpoints.checkpoint import read_meta, recipe_of
        from autosam3d.checkpoints.describe import describe_model

        if overrides or model or data:
            given = "--set" if overrides else "--model" if model else "--data"
            raise UsageError("USAGE", given, "a trained model keeps its recipe",
                             "name a recipe, or leave it out")
        typer.echo(dump_recipe(recipe_of(read_meta(json_path), json_path)) if as_yaml else describe_model(json_path))
        return
    from autosam3d.checkpoints.describe import describe_cases, describe_recipe

    plan = load_recipe(what, overrides or (), model)
    typer.echo(dump_recipe(plan) if as_yaml else describe_recipe(plan))
    if data:
        from autosam3d.data.datasets import open_datasets, organ_counts

        cases = open_datasets(data, plan)
        counts = organ_counts(cases.train, plan, cases.folder.name)
        typer.echo("\n".join(["", *describe_cases(counts)]))


def recipes() -> None:
    """List the recipes of the package, and the presets for --model."""
    from autosam3d.recipes.recipe import load_recipe, recipe_names
    from autosam3d.recipes.sources import preset_about, preset_names

    for name in recipe_names():
        typer.echo(f"{name:24} {load_recipe(name).about}")
    typer.echo("")
    for name in preset_names():
        typer.echo(f"--model {name:16} {preset_about(name)}")


def bench(
    model: Annotated[Path, typer.Argument(help="Run folder, checkpoint's .json, packed model or export.")],
    ct: Annotated[Path, typer.Argument(help="One scan.")],
    out: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None,
    overlap: Annotated[float | None, typer.Option(min=0, max=0.9, help="Window overlap, default the recipe's.")] = None,
    baseline: Annotated[bool, typer.Option(help="Measure MONAI's sliding window in eager PyTorch too.")] = True,
    threads: Threads = 0,
) -> None:
    """Measure where time and memory go, per stage and runtime, beside MONAI's sliding window."""
    import json

    from autosam3d.checkpoints.exported import is_export
    from autosam3d.checkpoints.model_file import find_checkpoint
    from autosam3d.io.files import write_text_atomic
    from autosam3d.studies.bench.bench import bench as measure
    from autosam3d.studies.bench.bench import contenders, summary

    model = find_checkpoint(model)
    with progress_bars() as bars:
        task = bars.add_task("measuring", total=None)
        result = measure(model, ct, contenders(model), overlap=overlap, threads=cores(threads),
                         baseline=baseline and not is_export(model), progress=on_task(bars, task))
    if out is not None:
        write_text_atomic(out, json.dumps(result, indent=1) + "\n")
    typer.echo(summary(result))


def _checkpoint_of(what: str) -> Path | None:
    """The checkpoint that a path leads to; None where it means a recipe, though a folder may have that name."""
    path = Path(what)
    if not path.is_dir() and path.suffix != ".json":
        return None
    from autosam3d.checkpoints.checkpoint import find_checkpoint
    from autosam3d.recipes.recipe import recipe_names

    try:
        return find_checkpoint(path)
    except CheckpointError:
        if what in recipe_names():
            return None
        raise
