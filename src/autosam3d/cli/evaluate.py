"""``autosam3d evaluate``: segmentations beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosam3d.cli.console import on_task, progress_bars
from autosam3d.cli.options import AssumeRas, Force, Prefer, Tolerances
from autosam3d.errors import BatchError


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Segmentation file, or a folder of them.")],
    truth: Annotated[Path, typer.Argument(help="True label map, or the folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, scores.json and report.html.")] = Path("evaluation"),
    tolerance: Tolerances = None,
    ct: Annotated[Path | None, typer.Option(help="Folder of the scans, for the pictures.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the organ names, and how scans are read, from "
                                                "this recipe.")] = None,
    prefer: Prefer = None,
    assume_ras: AssumeRas = False,
    force: Force = False,
) -> None:
    """Compare segmentations with the truth: Dice, NSD, HD95, volumes, and a report with pictures."""
    from autosam3d.evaluation.evaluate import evaluate_folder
    from autosam3d.evaluation.report import write_evaluation
    from autosam3d.evaluation.scores import counted
    from autosam3d.io import ReadOptions
    from autosam3d.io.folders import make_folder
    from autosam3d.io.room import demand_room
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe) if recipe else None
    read_options = ReadOptions(prefer=prefer, assume_ras=assume_ras, force=force, asked_by="evaluate")  # type: ignore[arg-type]
    if plan is not None:
        read_options = plan.reading.answers(read_options)
    window = {"hu_window": plan.preprocess.hu_window} if plan is not None and read_options.is_raw else {}
    with progress_bars() as bars:
        comparing = bars.add_task("comparing", total=None)
        demand_room(out)
        result = evaluate_folder(predictions, truth, labels=plan.labels if plan else None,
                                 tolerances_mm=tuple(tolerance or (1.0,)), ct_folder=ct, read_options=read_options,
                                 progress=on_task(bars, comparing))
        make_folder(out)
        drawing = bars.add_task("drawing the report", total=None)
        written = write_evaluation(result, out, read_options=read_options, progress=on_task(bars, drawing),
                                   **window)
    typer.echo(result.summary())
    typer.echo("wrote {}, {} and {}".format(*written))
    if result.missing:
        cases = counted(len(result.missing), "case")
        raise BatchError("MISSING_PREDICTIONS", predictions, f"{cases} of the truth without a prediction: "
                         f"{', '.join(result.missing[:5])}", "segment them, then evaluate again")
