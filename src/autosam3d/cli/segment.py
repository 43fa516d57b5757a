"""``autosam3d segment``: one scan or a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autosam3d.cli.console import BatchView, one_line, progress_bars
from autosam3d.cli.options import AssumeRas, Device, Force, Prefer, Sam, Threads, cores
from autosam3d.errors import BatchError, UsageError

# Mapped and never touched. While libraries are loaded they map much before anything is known of their use.
_LOADING_SLACK = 1 << 30
_SLACK = 128 << 20
# A stack of 8 MiB in each of the pools that a runtime, PyTorch and BLAS may begin.
_SLACK_A_THREAD = 3 * (8 << 20)


def segment(
    paths: Annotated[list[Path], typer.Argument(
        metavar="[MODEL] INPUT OUTPUT", help="MODEL: run folder, checkpoint's .json, packed model or export; default: "
        "the model of the package. INPUT: NIfTI, NRRD or MetaImage file, DICOM series or a zip of it, or a folder of "
        "scans. OUTPUT: NIfTI file (.nii.gz) or DICOM object (.dcm), or a folder when INPUT is a folder of scans.")],
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
    intensity_offset: Annotated[float | None, typer.Option(help="Added to every voxel to make it HU.")] = None,
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D file, from 0.")] = None,
    series: Annotated[str | None, typer.Option(help="DICOM SeriesInstanceUID, where a folder has several.")] = None,
    acquisition: Annotated[int | None, typer.Option(help="Which of several in one DICOM series.")] = None,
    force: Force = False,
    backend: Annotated[str, typer.Option(help="auto, torch, onnxruntime, openvino, openvino-int8, litert or "
                                              "executorch. auto: the faster of onnxruntime and openvino; a teacher's "
                                              "checkpoint on PyTorch.")] = "auto",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment one CT scan, or a folder of them. What the options of reading leave open the model's recipe says."""
    from autosam3d.geometry.patches import MAX_OVERLAP, Tiling
    from autosam3d.inference.pipeline import SegmentOptions
    from autosam3d.io import ReadOptions
    from autosam3d.io.dicom.archive import unpacked_scan
    from autosam3d.io.output_formats import output_format
    from autosam3d.scans.batch import segment_batch
    from autosam3d.scans.jobs import check_inputs

    if overlap is not None and not 0 <= overlap <= MAX_OVERLAP:
        raise UsageError("USAGE", f"--overlap {overlap}", f"expected 0 to {MAX_OVERLAP}", "the paper uses 0.75")
    if max_ram is not None and not 0 < max_ram <= 2**20:
        raise UsageError("USAGE", f"--max-ram {max_ram}", "expected a positive number of GiB", "try 8")
    if intensity_offset is not None and not abs(intensity_offset) <= 1e5:
        raise UsageError("USAGE", f"--intensity-offset {intensity_offset}", "expected a number of HU", "try -1024")
    read_options = ReadOptions(prefer=prefer, assume_ras=assume_ras, intensity_offset=intensity_offset,  # type: ignore[arg-type]
                               volume_index=volume, series=series, acquisition=acquisition, force=force,
                               asked_by="segment")
    model, source, output = _model_and_scans(paths)
    form = output_format(output_form, output)
    with unpacked_scan(source) as scan:
        jobs = check_inputs(scan, output, form)
        max_ram_bytes = max(1, int(max_ram * 2**30)) if max_ram is not None else None
        loaded = _open_within(model, backend, device, cores(threads), sam, max_ram_bytes)
        tiling = loaded.recipe.inference
        if overlap is not None:
            tiling = Tiling(overlap=overlap, importance=tiling.importance)
        segment_options = SegmentOptions(tiling=tiling, tta=tta, max_ram_bytes=max_ram_bytes)
        with progress_bars() as bars:
            result = segment_batch(
                jobs, loaded, read_options=read_options, segment_options=segment_options, overwrite=overwrite,
                preview=preview, progress=BatchView(bars),
            )
    _report_batch(result)


def _open_within(
    model: Path | None, backend: str, device: str, threads: int, sam: str | None, max_ram_bytes: int | None,
) -> Any:
    """The model, opened; from then on the system refuses what would lead this process above its limit."""
    from autosam3d.io.memory import limit_memory
    from autosam3d.scans.open_model import ModelWish, may_use_gpu, open_model

    # A GPU's driver maps more than all memory there is.
    limit = max_ram_bytes if max_ram_bytes is not None and not may_use_gpu(device) else None
    if limit is not None:
        limit_memory(limit, _LOADING_SLACK)
    wish = ModelWish(backend=backend, device=device, threads=threads, sam=sam, max_ram_bytes=max_ram_bytes)
    loaded = open_model(model, wish)
    if limit is not None:
        limit_memory(limit, _SLACK + threads * _SLACK_A_THREAD)
    return loaded


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
