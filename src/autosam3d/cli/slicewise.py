"""`autosam3d slicewise`: SAM and MedSAM slice by slice, prompted from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autosam3d.cli.console import BatchView, TrainingView, one_line, progress_bars, say
from autosam3d.cli.options import Device, Sam, SetBoth, Threads, run_folder_outside, set_threads
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
    part: Annotated[Literal["train", "val", "test"], typer.Option(help="Which cases of the dataset.")] = "test",
    cache: Cache = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs of other calls.")] = False,
    overrides: SetBoth = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment cases that have a truth, slice by slice, with SAM, MedSAM or a tuning; `evaluate` scores the result.

    Keys of --set beside the recipe's: cases=[a,b]; prompts.num_points (random points instead of the deepest),
    prompts.jitter_px (sides of boxes move out by 0 to so many pixels of a square of 1024), prompts.seed;
    those of the recipe's section reading say how the scans are read.
    """
    if sam is None and tuned is None:
        raise UsageError("USAGE", "--sam", "expected a SAM weight file or a tuning, got neither",
                         "give --sam FILE or --tuned RUN")
    from autosam3d.recipes.settings_file import read_settings, split_overrides

    set_threads(threads)
    from autosam3d.inference.torch_runtime import pick_device
    from autosam3d.studies.slicewise.cases import SlicewiseSettings, segment_cases
    from autosam3d.studies.slicewise.model import load_slice_sam
    from autosam3d.studies.slicewise.settings import SEGMENT_KEYS, SegmentKeys

    own, of_recipe = split_overrides(overrides or (), SEGMENT_KEYS)
    keys = read_settings(SegmentKeys, None, own, guide="autosam3d slicewise segment --help")
    plan, cases = _opened(recipe, data, of_recipe, out)
    chosen = _chosen(cases, part, keys.cases)

    model = load_slice_sam(sam, tuned=tuned, device=pick_device(device))
    tuned_with: dict[str, Any] = model.tuned.meta.get("settings", {}) if model.tuned else {}
    prompts = keys.prompt_spec(prompt or tuned_with.get("prompt", "point"))
    with progress_bars() as bars:
        settings = SlicewiseSettings(framing=_framing(plan, style or tuned_with.get("framing", {}).get("style", "sam")),
                                     prompts=prompts, read_options=plan.reading.options())
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
    style: Style = "medsam",
    prompt: Annotated[Literal["point", "box"], typer.Option(help="What the model learns to be prompted with.")]
    = "point",
    cache: Cache = None,
    overrides: SetBoth = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Tune SAM or MedSAM on the training slices of a dataset, or go on with a run that was stopped.

    Keys of --set beside the recipe's: tune.scope (decoder: prompt encoder and mask decoder, with embeddings kept on
    disk; full: the image encoder too), tune.epochs, tune.minutes, tune.lr, tune.batch_size, tune.jitter_px, tune.seed,
    tune.min_slice_px, tune.min_case_vox, tune.val_cases, tune.validate_every and the others of TuneSettings.
    """
    from autosam3d.recipes.settings_file import split_overrides

    own, of_recipe = split_overrides(overrides or (), ("tune",))
    plan, cases = _opened(recipe, data, of_recipe, out)
    set_threads(threads)
    from autosam3d.inference.torch_runtime import pick_device
    from autosam3d.studies.slicewise.model import load_slice_sam
    from autosam3d.studies.slicewise.settings import tune_settings
    from autosam3d.studies.slicewise.tuning import tune as run_tuning

    settings = tune_settings(own, _framing(plan, style or "medsam"), prompt)
    model = load_slice_sam(sam, device=pick_device(device))
    with TrainingView() as view:
        result = run_tuning(plan, cases, model, out, settings, cache=cache, read_options=plan.reading.options(),
                            observer=view.observer)
    if result.stopped_by is not None:
        say(f"stopped and saved in {out}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    best = f"best validation Dice {result.best_dice:.4f}" if result.best_dice is not None else "no validation cases"
    say(f"{out}: tuned {result.step} steps in {result.seconds / 60:.1f} min, {best} (organs, slices and prompts "
        "from the truth)")


def _opened(recipe: str, data: Path, overrides: Sequence[str], out: Path) -> tuple[Recipe, CaseSet]:
    from autosam3d.data.folder import open_dataset
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe, overrides)
    run_folder_outside(out, data)
    return plan, open_dataset(data, plan)


def _chosen(cases: CaseSet, part: str, names: Sequence[str]) -> list[Case]:
    of_part: tuple[Case, ...] = getattr(cases, part)
    unknown = sorted(set(names) - {case.name for case in of_part})
    if unknown:
        raise UsageError("USAGE", f"cases: {unknown[0]}", f"expected a case of the part {part}, which has "
                         f"{len(of_part)}, got another name", "name one of its cases, or another --part")
    if not of_part:
        raise VolumeError("NO_CASES", cases.folder, f"expected cases in the part {part}, got none",
                          "name another --part")
    return [case for case in of_part if not names or case.name in names]


def _framing(plan: Recipe, style: Literal["sam", "medsam"]) -> Any:
    from autosam3d.studies.slicewise.images import MEDSAM_WINDOW, Framing

    return Framing(style=style, hu_window=MEDSAM_WINDOW if style == "medsam" else plan.preprocess.hu_window)
