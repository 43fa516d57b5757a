"""The command line: with its groups `cli_*.py` all that prints, and alone in exiting. Heavy imports wait inside."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from autosam3d import __version__
from autosam3d.cli import pacs as cli_pacs
from autosam3d.cli import slicewise as cli_slicewise
from autosam3d.cli.console import BatchView, LogToStderr, TrainingView, on_task, one_line, progress_bars
from autosam3d.cli.export import export, pack, verify
from autosam3d.cli.export_web import export_web
from autosam3d.cli.nnunet import nnunet
from autosam3d.cli.options import (
    AssumeRas,
    Device,
    Force,
    Prefer,
    Sam,
    Set,
    Threads,
    cores,
    run_folder_outside,
    set_threads,
)
from autosam3d.cli.reproduce import reproduce
from autosam3d.cli.serve import serve
from autosam3d.errors import AutoSam3dError, BatchError, CheckpointError, RecipeError, ResourceError, UsageError

app = typer.Typer(
    name="autosam3d",
    help="Automatic 3D multi-organ CT segmentation from SAM. Not a medical device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_slicewise.app)
app.add_typer(cli_pacs.app)

# Typer's own name for it differs between versions: click's class, or one of a copy inside Typer.
_CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Train another network its own way on "
                                           "the recipe's data: a preset (see autosam3d recipes), or a YAML file.")]
# What the operating system says of a path that cannot be, and what libraries say when memory has run out.
_NO_SUCH_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|out of memory|start new thread|[Cc]annot allocate memory|map segment")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, handlers=[LogToStderr(debug)])
    logging.getLogger("autosam3d").setLevel(logging.INFO if verbose or debug else logging.WARNING)
    logging.captureWarnings(True)
    if version:
        typer.echo(f"autosam3d {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package, or a YAML file.")],
    data: Annotated[Path, typer.Option(help="Dataset folder in the nnU-Net v2 layout.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE.")] = None,
    model: Model = None,
    sam: Sam = None,
    overrides: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for preprocessed cases; default OUT/cache.")] = None,
) -> None:
    """Train on a dataset, or go on with a run that was stopped."""
    from autosam3d.data.folder import open_dataset
    from autosam3d.recipes.recipe import load_recipe

    plan = load_recipe(recipe, overrides or (), model)
    folder = run_folder_outside(out or Path("runs") / plan.name, data)
    cases = open_dataset(data, plan)
    set_threads(threads)
    from autosam3d.training.train import train as run_training

    with TrainingView() as view:
        result = run_training(plan, cases, folder, sam=sam, device=device, cache_dir=cache, observer=view.observer)
    _report_training(folder, result)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Argument(help="The trained teacher: run folder, or a checkpoint's .json.")],
    data: Annotated[Path, typer.Option(help="Dataset folder in the nnU-Net v2 layout.")],
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
    from autosam3d.data.folder import open_dataset
    from autosam3d.training.distill import student_recipe

    plan = student_recipe(teacher, student, overrides or ())
    if plan.distill is None:
        raise RecipeError("NO_DISTILL", student, "expected a recipe with a distill section, got one without",
                          "add `distill: {lambda: 0.5}`, or use `autosam3d train`")
    folder = run_folder_outside(out or Path("runs") / plan.name, data)
    cases = open_dataset(data, plan)
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


@app.command()
def segment(
    paths: Annotated[list[Path], typer.Argument(
        metavar="[MODEL] INPUT OUTPUT", help="MODEL: run folder, checkpoint's .json, packed model or export; default: "
        "the model of the package. INPUT: NIfTI file, DICOM series or a zip of it, or a folder of scans. OUTPUT: NIfTI "
        "file (.nii.gz) or DICOM object (.dcm), or a folder when INPUT is a folder of scans.")],
    output_form: Annotated[str | None, typer.Option("--format", metavar="FORMAT", help="nifti (default); of a DICOM "
                                                    "series also seg, seg-labelmap (smaller, for new viewers) or "
                                                    "rtstruct.")] = None,
    sam: Sam = None,
    overlap: Annotated[float | None, typer.Option(help="Window overlap, 0 to 0.9; default: the recipe's.")] = None,
    max_ram: Annotated[float | None, typer.Option(help="GiB that this process may take at most, all in all.")] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Average over the mirror images that the model was trained on: "
                                                    "2 to 8 times the work.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that are not this tool's.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a picture of three planes.")] = False,
    prefer: Prefer = None,
    assume_ras: AssumeRas = False,
    intensity_offset: Annotated[float, typer.Option(help="Added to every voxel to make it HU.")] = 0.0,
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D file, from 0.")] = None,
    series: Annotated[str | None, typer.Option(help="DICOM SeriesInstanceUID, where a folder has several.")] = None,
    force: Force = False,
    backend: Annotated[str, typer.Option(help="auto, torch, onnxruntime, openvino, openvino-int8, litert or "
                                              "executorch. auto: the faster of onnxruntime and openvino; a teacher's "
                                              "checkpoint on PyTorch.")] = "auto",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment one CT scan, or a folder of them."""
    from autosam3d.geometry.patches import Tiling
    from autosam3d.inference.pipeline import SegmentOptions
    from autosam3d.io import ReadOptions
    from autosam3d.io.dicom.archive import unpacked_scan
    from autosam3d.io.output_formats import output_format
    from autosam3d.scans.batch import check_inputs, segment_batch

    # Beyond 0.9 each voxel is seen a thousand times and more.
    if overlap is not None and not 0 <= overlap <= 0.9:
        raise UsageError("USAGE", f"--overlap {overlap}", "expected 0 to 0.9", "the paper uses 0.75")
    if max_ram is not None and not 0 < max_ram <= 2**20:
        raise UsageError("USAGE", f"--max-ram {max_ram}", "expected a positive number of GiB", "try 8")
    if not abs(intensity_offset) <= 1e5:
        raise UsageError("USAGE", f"--intensity-offset {intensity_offset}", "expected a number of HU", "try -1024")
    options = ReadOptions(prefer=prefer, assume_ras=assume_ras, intensity_offset=intensity_offset,  # type: ignore[arg-type]
                          volume_index=volume, series=series, force=force)
    model, source, output = _model_and_scans(paths)
    form = output_format(output_form, output)
    with unpacked_scan(source) as scan:
        jobs = check_inputs(scan, output, form)
        from autosam3d.scans.open_model import ModelWish, open_model

        max_ram_bytes = max(1, int(max_ram * 2**30)) if max_ram is not None else None
        loaded = open_model(model, ModelWish(backend=backend, device=device, threads=cores(threads), sam=sam,
                                             max_ram_bytes=max_ram_bytes))
        tiling = loaded.recipe.inference
        if overlap is not None:
            tiling = Tiling(overlap=overlap, importance=tiling.importance)
        how = SegmentOptions(tiling=tiling, tta=tta, max_ram_bytes=max_ram_bytes)
        with progress_bars() as bars:
            result = segment_batch(
                jobs, loaded, options=options, how=how, form=form, overwrite=overwrite, preview=preview,
                progress=BatchView(bars),
            )
    _report_batch(result)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Segmentation file, or a folder of them.")],
    truth: Annotated[Path, typer.Argument(help="True label map, or the folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, scores.json and report.html.")] = Path("evaluation"),
    tolerance: Annotated[list[float] | None, typer.Option(help="NSD tolerance in mm; repeat it for several.")] = None,
    ct: Annotated[Path | None, typer.Option(help="Folder of the scans, for the pictures.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the organ names from this recipe.")] = None,
    prefer: Prefer = None,
    assume_ras: AssumeRas = False,
    force: Force = False,
) -> None:
    """Compare segmentations with the truth: Dice, NSD, HD95, volumes, and a report with pictures."""
    from autosam3d.evaluation.evaluate import evaluate_folder, write_csv, write_json
    from autosam3d.evaluation.report import write_report
    from autosam3d.evaluation.scores import counted
    from autosam3d.io import ReadOptions
    from autosam3d.recipes.recipe import load_recipe

    tolerances = tuple(tolerance or (1.0,))
    for mm in tolerances:
        if not 0 <= mm < 1000:
            raise UsageError("USAGE", f"--tolerance {mm:g}", "expected 0 to 1000 mm", "try 1")
    labels = load_recipe(recipe).labels if recipe else None
    options = ReadOptions(prefer=prefer, assume_ras=assume_ras, force=force)  # type: ignore[arg-type]
    with progress_bars() as bars:
        comparing = bars.add_task("comparing", total=None)
        result = evaluate_folder(predictions, truth, labels=labels, tolerances_mm=tolerances, ct_folder=ct,
                                 options=options, progress=on_task(bars, comparing))
        _make_folder(out)
        write_csv(result, out / "scores.csv")
        write_json(result, out / "scores.json")
        drawing = bars.add_task("drawing the report", total=None)
        write_report(result, out / "report.html", options=options, progress=on_task(bars, drawing))
    typer.echo(result.summary())
    typer.echo(f"wrote {out / 'scores.csv'}, {out / 'scores.json'} and {out / 'report.html'}")
    if result.missing:
        cases = counted(len(result.missing), "case")
        raise BatchError("MISSING", predictions, f"{cases} of the truth without a prediction: "
                         f"{', '.join(result.missing[:5])}", "segment them, then evaluate again")


@app.command()
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


@app.command()
def info(
    what: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="Recipe name, YAML file, or model folder.")],
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the whole recipe.")] = False,
    model: Model = None,
    overrides: Set = None,
) -> None:
    """Describe a recipe or a trained model: organs, preprocessing, parameters."""
    from autosam3d.recipes.recipe import dump_recipe, load_recipe

    json_path = _checkpoint_of(what)
    if json_path is not None:
        from autosam3d.checkpoints.checkpoint import read_meta, recipe_of
        from autosam3d.checkpoints.describe import describe_model

        if overrides or model:
            raise UsageError("USAGE", "--set" if overrides else "--model", "a trained model keeps its recipe",
                             "name a recipe, or leave it out")
        typer.echo(dump_recipe(recipe_of(read_meta(json_path), json_path)) if as_yaml else describe_model(json_path))
        return
    from autosam3d.checkpoints.describe import describe_recipe

    plan = load_recipe(what, overrides or (), model)
    typer.echo(dump_recipe(plan) if as_yaml else describe_recipe(plan))


@app.command()
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


@app.command()
def recipes() -> None:
    """List the recipes of the package, and the presets for --model."""
    from autosam3d.recipes.recipe import load_recipe, recipe_names
    from autosam3d.recipes.sources import preset_about, preset_names

    for name in recipe_names():
        typer.echo(f"{name:24} {load_recipe(name).about}")
    typer.echo("")
    for name in preset_names():
        typer.echo(f"--model {name:16} {preset_about(name)}")


for _command in (pack, export, verify):
    app.command()(_command)


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="New dataset folder.")],
    train_cases: Annotated[int, typer.Option("--train", min=1, max=10000)] = 8,
    val_cases: Annotated[int, typer.Option("--val", min=0, max=10000)] = 2,
    test_cases: Annotated[int, typer.Option("--test", min=0, max=10000)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a dataset of synthetic abdominal CTs with 13 organs, to try everything without patient data."""
    from autosam3d.data.phantom import write_phantom_dataset

    _make_folder(folder)
    with progress_bars() as bars:
        task = bars.add_task("phantoms", total=train_cases + val_cases + test_cases)
        write_phantom_dataset(folder, train_cases, val_cases, test_cases, seed,
                              progress=on_task(bars, task))
    typer.echo(f"wrote {train_cases + val_cases + test_cases} cases to {folder}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for everything that the demo makes.")] = Path("demo"),
    threads: Threads = 0,
) -> None:
    """Phantoms, training, segmentation and evaluation in one go, a few minutes on two cores."""
    _make_folder(folder)
    set_threads(threads)
    from autosam3d.cli.demo import run_demo

    with TrainingView() as view:
        result = run_demo(folder, view.observer, view.task)
    if result.stopped_by is not None:
        typer.echo(f"stopped and saved in {folder}; the same command goes on from here", err=True)
        raise typer.Exit(128 + result.stopped_by)
    typer.echo(result.summary)


app.command()(reproduce)
app.command()(nnunet)
app.command("export-web")(export_web)
app.command()(serve)


def main() -> None:
    """Run the command line; every failure ends as one line on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Ends by an exception, so that files half written are removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]  # wherever it stands
    code: Any = 0
    try:
        code = app(arguments, standalone_mode=False)
    except AutoSam3dError as error:
        _fail(f"error[{error.code}] {error}", error.exit_code, error if debug else None)
    except typer.Abort:
        code = 130
    except _CommandLineError as error:
        fault = error.format_message().rstrip(".")
        _fail(f"error[USAGE] autosam3d: {fault}; see autosam3d --help", 2, error if debug else None)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        _fail("error[MEMORY] autosam3d: the memory that this process may use has run out; give a smaller scan or a "
              "smaller batch, or use a machine with more memory", 5, error if debug else None)
    except OSError as error:
        _fail_by_system(error, debug)
    except SystemExit as leave:
        # 1 is typer's word for a reader of stdout that has gone, as in `| head`: the code of SIGPIPE.
        code = 141 if leave.code == 1 else leave.code
    if code == 130:
        _fail("stopped", 130, None)
    sys.exit(code if isinstance(code, int) else 0)


def _fail_by_system(error: OSError, debug: bool) -> None:
    """What the operating system refused at a place where nobody expected it."""
    reason = (error.strerror or str(error)).lower()
    if error.filename is None and sys.stdout is not None:
        # Printing has failed: what is left is not tried again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if error.filename is not None and error.errno in _NO_SUCH_PATH:
        _fail(f"error[PATH] {error.filename}: {reason}; check the path", 2, error if debug else None)
    _fail(f"error[IO] {error.filename or 'autosam3d'}: {reason}; check the disk and try again", 5,
          error if debug else None)


def _fail(line: str, code: int, error: BaseException | None) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        if error is not None:
            import traceback

            traceback.print_exception(error)
        sys.stderr.write(one_line(line) + "\n")
    sys.exit(code)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError("OUTPUT_PATH", path, f"expected a folder ({error.strerror})", "name another one") from None
    except OSError as error:
        raise ResourceError("NOT_WRITABLE", path, f"expected a folder that can be made ({error.strerror})",
                            "name another folder") from None


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


def _model_and_scans(paths: list[Path]) -> tuple[Path | None, Path, Path]:
    """[MODEL] INPUT OUTPUT, told apart by their number."""
    if len(paths) == 3:
        return paths[0], paths[1], paths[2]
    if len(paths) != 2:
        raise UsageError("USAGE", "segment", f"expected [MODEL] INPUT OUTPUT, got {len(paths)} paths",
                         "see autosam3d segment --help")
    if any((paths[0] / name).is_file() for name in ("best.json", "model.json", "last.json")):
        raise UsageError("USAGE", "segment", f"expected INPUT and OUTPUT after the model {paths[0]}, got one path",
                         "name the scan, and where its labels go")
    return None, paths[0], paths[1]


def _report_batch(result: Any) -> None:
    for path in result.written:
        typer.echo(f"wrote {path}")
    if result.skipped:
        typer.echo(f"skipped {len(result.skipped)} that were finished before")
    if result.failed:
        if result.total == 1:
            raise result.failed[0].error
        for failure in result.failed:
            typer.echo(one_line(f"error[{failure.error.code}] {failure.error}"), err=True)
        raise BatchError("FAILED_CASES", result.output, f"{len(result.failed)} of {result.total} scans failed",
                         "see the lines above; the others are done")
