"""``autosam3d pack``, ``export``, ``export-web`` and ``verify``: a trained model to carry away, and proof that it
is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autosam3d.cli.console import on_task, progress_bars
from autosam3d.cli.options import AssumeRas, Force, Prefer, Sam, Threads, cores, set_threads
from autosam3d.errors import CheckpointError


def pack(
    model: Annotated[Path, typer.Argument(help="Run folder, or a checkpoint's .json.")],
    destination: Annotated[Path, typer.Argument(help="New folder for model.json and its weights.")],
    sam: Sam = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights as float16: half the size, rounded.")] = False,
) -> None:
    """Write a model with all its weights, SAM's too, so that it needs no other file."""
    from autosam3d.checkpoints.checkpoint import pack_model

    typer.echo(f"wrote {pack_model(model, destination, sam=sam, half=half)}")


def export(
    model: Annotated[Path, typer.Argument(help="Run folder, or a checkpoint's .json.")],
    folder: Annotated[Path, typer.Argument(help="New folder for ONNX, OpenVINO, description and certificate.")],
    target: Annotated[list[str] | None, typer.Option("--target", help="Also write litert (TFLite), executorch or "
                                                     "coreml; repeat it for several.")] = None,
    ct: Annotated[Path | None, typer.Option(help="A CT of the kind that the model is for: the parity is shown on its "
                                                 "windows, and they go into the folder. Default: a phantom.")] = None,
    int8: Annotated[list[Path] | None, typer.Option(
        "--int8", metavar="SCANS", help="Also write an INT8 network, made and judged on SCANS: a folder of CTs of the "
        "kind that the model is for, or one CT each time it is given; two at least. In the order of their names every "
        "other one calibrates, the rest judge. All is refused unless Dice against float32 is 0.99, and 0.97 for the "
        "worst organ. Needs --ct.")] = None,
    sam: Sam = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export.")] = False,
    prefer: Prefer = None,
    assume_ras: AssumeRas = False,
    force: Force = False,
    threads: Threads = 0,
) -> None:
    """Write a model as ONNX and OpenVINO with a certificate that both say what PyTorch says; else write nothing."""
    from autosam3d.checkpoints.model_file import find_checkpoint, read_meta, recipe_of
    from autosam3d.checkpoints.targets import demand_mobile
    from autosam3d.io import ReadOptions, read_ct

    paths = _int8_scans(int8, ct is not None)
    json_path = find_checkpoint(model)
    recipe = recipe_of(read_meta(json_path), json_path)
    demand_mobile(recipe.model, target or ())
    read_options = recipe.reading.answers(
        ReadOptions(prefer=prefer, assume_ras=assume_ras, force=force, asked_by="evaluate"))  # type: ignore[arg-type]
    volume = read_ct(ct, read_options) if ct is not None else None
    set_threads(threads)
    from autosam3d.checkpoints.checkpoint import load_model
    from autosam3d.export.export import demand_replaceable, export_model

    trained, scans = load_model(json_path, sam=sam), None
    if paths and volume is not None:
        from autosam3d.export.int8 import read_scans

        demand_replaceable(folder, overwrite)
        scans = read_scans(paths, trained.recipe, read_options, volume)
    with progress_bars() as bars:
        result = export_model(trained, folder, targets=target or (), ct=volume, int8=scans, threads=cores(threads),
                              overwrite=overwrite, progress=on_task(bars, bars.add_task("exporting", total=None)))
    _print_parity(result.rows, result.not_run)
    if result.int8 is not None:
        _print_int8(result.int8)
    if result.organs_not_shown:
        typer.echo(f"the golden case shows no {', '.join(result.organs_not_shown)}: parity is not proved there; name a "
                   "scan with --ct", err=True)
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in result.sizes.items() if size > 5e4)
    typer.echo(f"wrote {folder}: {sizes}")


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
        from autosam3d.io.folders import temporary_folder

        trained = load_model(model, sam=sam)
        with temporary_folder("web") as scratch, progress_bars() as bars:
            on_step = on_task(bars, bars.add_task("exporting", total=None))
            export_model(trained, scratch / "export", threads=cores(threads), progress=on_step)
            made = write_web_folder(open_export(scratch / "export"), folder, overwrite=overwrite)
    typer.echo(f"wrote {folder}: {len(made.sizes)} files, {made.total_bytes / 1e6:.1f} MB, version {made.version}")
    typer.echo(f"try it with: python -m http.server --bind 127.0.0.1 --directory {folder} 8000, then open "
               "http://127.0.0.1:8000; other machines need https, without which browsers give neither threads nor "
               "offline use")


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `autosam3d export` wrote.")],
    threads: Threads = 0,
) -> None:
    """Check the files of an export by their hashes, and its golden case on every runtime that is installed here."""
    from autosam3d.export.verify import verify_export

    result = verify_export(folder, cores(threads))
    if result.faults:
        raise CheckpointError("PARITY", folder, "; ".join(result.faults), "do not use this model here, and report it")
    typer.echo(f"{len(result.files)} files are what they were when they were exported ({result.certified})")
    _print_parity(result.rows, result.not_run)


def _int8_scans(wish: list[Path] | None, has_ct: bool) -> list[Path]:
    """The scans that `--int8` names, in the order of their names; none where it is not given."""
    if not wish:
        return []
    from autosam3d.export.int8 import demand_int8
    from autosam3d.scans.found import scans_in

    paths = sorted(p for named in wish for p in (scans_in(named) if named.is_dir() else [named]))
    demand_int8(paths, has_ct)
    return paths


def _print_int8(int8: Any) -> None:
    from autosam3d.export.certificate import int8_text

    figures = int8.as_dict()
    worst = min(figures["organs"], key=lambda name: figures["organs"][name]["worst"])
    typer.echo(f"openvino-int8: {int8_text(figures)}; on {figures['judging_scans']} scans that did not calibrate it "
               f"Dice against float32 is {figures['mean_dice']:.4f}, at worst {figures['organs'][worst]['worst']:.4f} "
               f"({worst})")
    if figures["organs_not_judged"]:
        typer.echo(f"these scans show no {', '.join(figures['organs_not_judged'])}: INT8 is not judged there", err=True)


def _print_parity(rows: Any, not_run: dict[str, str]) -> None:
    from autosam3d.export.certificate import PARITY_HEAD, not_run_cells, parity_cells

    table = [PARITY_HEAD, *map(parity_cells, rows), *(not_run_cells(name, why) for name, why in not_run.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
