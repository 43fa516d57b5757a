"""`autosam3d slicewise`: SAM and MedSAM slice by slice, prompted from the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autosam3d.cli.console import BatchView, TrainingView, one_line, progress_bars
from autosam3d.cli.options import AssumeRas, Device, Force, Prefer, Sam, Set, Threads, run_folder_outside, set_threads
from autosam3d.errors import BatchError, UsageError, VolumeError

if TYPE_CHECKING:
    from autosam3d.data.folder import Case, CaseSet
    from autosam3d.recipes.recipe import Recipe

app = typer.Typer(
    name="slicewise",
    help="SAM and MedSAM slice by slice. The truth gives organs, slices and prompts: for comparison, not for use.",
    pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="For organs and HU window: a recipe or YAML file.")]
Data = Annotated[Path, typer.Option(help="Dataset folder in the nnU-Net v2 layout.")]
Style = Annotated[Literal["sam", "medsam"] | None, typer.Option(
    help="sam: the recipe's HU window, SAM's resizing and statistics; medsam: level 40, width 400, stretched, 0 to 1. "
         "Default: sam, or what a tuning was made with.")]
Prompt = Annotated[Literal["point", "box"] | None, typer.Option(
    help="point: the deepest pixel of the organ; box: the tight one. Default: point, or the tuning's.")]
Cache = Annotated[Path | None, typer.Option(help="Folder for image embeddings; one serves all prompts and tunings.")]


@app.command("segment")
def segment(
    recipe: RecipeName,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for CASE.nii.gz and CASE.report.json.")],
    sam: Sam = None,
    tuned: Annotated[Path | None, typer.Option(help="Run folder of `slicewise tune`.")] = None,
    style: Style = None,
    prompt: Prompt = None,
    points: Annotated[int, typer.Option(min=0, max=100, help="So many random points instead of the deepest.")] = 0,
    jitter: Annotated[int, typer.Option(min=0, max=1024, help="Box: sides move out by 0 to so many pixels of a "
                                                              "square of 1024.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of random points and jitter.")] = 0,
    part: Annotated[Literal["train", "val", "test"], typer.Option(help="Which cases of the dataset.")] = "test",
    case: Annotated[list[str] | None, typer.Option("--case", help="Only this case; repeat it for several.")] = None,
    cache: Cache = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs of other calls.")] = False,
    overrides: Set = None,
    prefer: Prefer = None,
    assume_ras: AssumeRas = False,
    force: Force = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment cases that have a truth, slice by slice, with SAM, MedSAM or a tuning; `evaluate` scores the result."""
    if sam is None and tuned is None:
        raise UsageError("USAGE", "--sam", "expected a SAM weight file or a tuning, got neither",
                         "give --sam FILE or --tuned RUN")
    plan, cases = _opened(recipe, data, overrides, out)
    chosen = _chosen(cases, part, case)
    set_threads(threads)
    from autosam3d.inference.torch_runtime import pick_device
    from autosam3d.studies.slicewise.cases import SlicewiseSettings, segment_cases
    from autosam3d.studies.slicewise.model import load_slice_sam
    from autosam3d.studies.slicewise.prompts import PromptSpec

    model = load_slice_sam(sam, tuned=tuned, device=pick_device(device))
    told: dict[str, Any] = model.tuned.meta.get("settings", {}) if model.tuned else {}
    prompts = PromptSpec(kind=prompt or told.get("prompt", "point"), num_points=points, jitter_px=jitter, seed=seed)
    if (points and prompts.kind == "box") or (jitter and prompts.kind == "point"):
        raise UsageError("USAGE", "slicewise segment", "expected --points with points and --jitter with boxes, got "
                         f"--prompt {prompts.kind}", "leave the other one out")
    with progress_bars() as bars:
        settings = SlicewiseSettings(framing=_framing(plan, style or told.get("framing", {}).get("style", "sam")),
                                     prompts=prompts, read_options=_reading(prefer, assume_ras, force))
        result = segment_cases(chosen, model, out, plan.labels, settings, cache=cache, overwrite=overwrite,
                               progress=BatchView(bars, "cases", "slices"))
    for path in result.written:
        typer.echo(f"wrote {path}")
    if result.skipped:
        typer.echo(f"skipped {len(result.skipped)} that were finished before")
    if result.slices:
        typer.echo(f"{result.slices} slices, {result.seconds / result.slices:.2f} s each; the truth gave organs, "
                   "slices and prompts", err=True)
    if result.failed:
        if result.total == 1:
            raise result.failed[0][1]
        for _, error in result.failed:
            typer.echo(one_line(f"error[{error.code}] {error}"), err=True)
        raise BatchError("FAILED_CASES", out, f"{len(result.failed)} of {result.total} cases failed",
                         "see the lines above; the others are done")


@app.command("tune")
def tune(
    recipe: RecipeName,
    data: Data,
    sam: Annotated[str, typer.Option(help="SAM or MedSAM weights to begin with: a file, or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    scope: Annotated[Literal["decoder", "full"], typer.Option(
        help="decoder: prompt encoder and mask decoder, with embeddings kept on disk; full: the image encoder too.")
    ] = "decoder",
    style: Style = "medsam",
    prompt: Annotated[Literal["point", "box"], typer.Option(help="What the model learns to be prompted with.")]
    = "point",
    jitter: Annotated[int, typer.Option(min=0, max=1024, help="Box: sides move out by 0 to so many pixels.")] = 20,
    lr: Annotated[float | None, typer.Option(help="Default: 1e-4 for boxes, 5e-5 for points.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: 8, or 2 with --scope full.")] = None,
    epochs: Annotated[int, typer.Option(min=1, max=10**6)] = 100,
    minutes: Annotated[float | None, typer.Option(help="End after so long in optimiser steps, over all starts.")]
    = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    min_px: Annotated[int, typer.Option(min=1, help="Ask for an organ where a slice shows so many pixels.")] = 100,
    min_vox: Annotated[int, typer.Option(min=1, help="...and its case so many voxels.")] = 1000,
    val_cases: Annotated[int, typer.Option(min=0, help="Validate on the first so many; 0 takes all.")] = 0,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs between validations.")] = 1,
    cache: Cache = None,
    overrides: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Tune SAM or MedSAM on the training slices of a dataset, or go on with a run that was stopped."""
    for name, value in (("--lr", lr), ("--minutes", minutes)):
        if value is not None and not 0 < value < 1e6:
            raise UsageError("USAGE", f"{name} {value}", "expected a positive number", "leave it out for the default")
    plan, cases = _opened(recipe, data, overrides, out)
    set_threads(threads)
    from autosam3d.inference.torch_runtime import pick_device
    from autosam3d.studies.slicewise.model import load_slice_sam
    from autosam3d.studies.slicewise.run import TuneSettings
    from autosam3d.studies.slicewise.tuning import tune as run_tuning

    model = load_slice_sam(sam, device=pick_device(device))
    settings = TuneSettings(
        scope=scope, framing=_framing(plan, style or "medsam"), prompt=prompt, jitter_px=jitter, lr=lr,
        batch_size=batch_size, epochs=epochs, minutes=minutes, seed=seed, min_slice_px=min_px, min_case_vox=min_vox,
        val_cases=val_cases, validate_every=validate_every,
    )
    with TrainingView() as view:
        result = run_tuning(plan, cases, model, out, settings, cache=cache, observer=view.observer)
    if result.stopped_by is not None:
        typer.echo(f"stopped and saved in {out}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    best = f"best validation Dice {result.best_dice:.4f}" if result.best_dice is not None else "no validation cases"
    typer.echo(f"{out}: tuned {result.step} steps in {result.seconds / 60:.1f} min, {best} (organs, slices and prompts "
               "from the truth)")


def _opened(recipe: str, data: Path, overrides: list[str] | None, out: Path) -> tuple[Recipe, CaseSet]:
    from autosam3d.data.folder import open_dataset
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe, overrides or ())
    run_folder_outside(out, data)
    return plan, open_dataset(data, plan)


def _chosen(cases: CaseSet, part: str, names: list[str] | None) -> list[Case]:
    of_part: tuple[Case, ...] = getattr(cases, part)
    unknown = sorted(set(names or ()) - {case.name for case in of_part})
    if unknown:
        raise UsageError("USAGE", f"--case {unknown[0]}", f"expected a case of the part {part}, which has "
                         f"{len(of_part)}, got another name", "name one of its cases, or another --part")
    if not of_part:
        raise VolumeError("NO_CASES", cases.folder, f"expected cases in the part {part}, got none",
                          "name another --part")
    return [case for case in of_part if not names or case.name in names]


def _framing(plan: Recipe, style: Literal["sam", "medsam"]) -> Any:
    from autosam3d.studies.slicewise.images import MEDSAM_WINDOW, Framing

    return Framing(style=style, hu_window=MEDSAM_WINDOW if style == "medsam" else plan.preprocess.hu_window)


def _reading(prefer: str | None, assume_ras: bool, force: bool) -> Any:
    from autosam3d.io import ReadOptions

    return ReadOptions(prefer=prefer, assume_ras=assume_ras, force=force)  # type: ignore[arg-type]
