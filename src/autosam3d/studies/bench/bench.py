"""Where the time and the memory of a segmentation go, stage by stage and runtime by runtime, beside MONAI's way.

Each runtime is measured in a process of its own, so that one's memory cannot hide another's. MONAI's way is its
`sliding_window_inference` over the network in eager PyTorch (its own SwinUNETR, with the same weights, where the model
is one), with the same windows' size, overlap, weighting and threads: once over the whole resampled scan, as its users
run it, and once over our crop to the body, which tells the crop's part from the rest.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.checkpoints.exported import BACKENDS, PACKAGE_OF, installed_backends, is_export, open_export
from autosam3d.checkpoints.machine import cpu_name
from autosam3d.checkpoints.model_file import find_checkpoint, read_meta, recipe_of
from autosam3d.errors import AutoSam3dError, MissingExtraError, ResourceError
from autosam3d.geometry.patches import Stitcher, Tiling, grid_starts, pad_to, unpad_slabs
from autosam3d.geometry.preprocess import plan_grid, prepare_ct
from autosam3d.geometry.restore import SlabRestorer
from autosam3d.inference.pipeline import Model, SegmentOptions, segment_with
from autosam3d.io import read_ct, write_segmentation
from autosam3d.io.memory import resident_bytes
from autosam3d.scans.open_model import ModelWish, open_model
from autosam3d.studies.bench.meter import Meter
from autosam3d.studies.bench.monai import BASELINES, CROPPED, monai_predict, monai_starts, monai_way
from autosam3d.volume import Segmentation, Volume

_SAME_WINDOWS = "same_windows"
STAGES = ("load", "read", "resample", "model", "stitch", "restore", "write")


def bench(
    model: Path, ct: Path, backends: Sequence[str], *, overlap: float | None, threads: int, baseline: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model on a scan.

    Args:
        model: a checkpoint, or an export folder, which PyTorch and MONAI cannot run.
        backends: of `contenders`, in the order in which they run.
        overlap: of the windows; None takes the recipe's.
        threads: CPU threads of every contender.
        baseline: measure MONAI's way too; it needs a model that PyTorch can run.

    Returns:
        Plain values for JSON: ``rows`` by contender with ``seconds``, ``peak_mib``, ``whole_seconds``, ``windows``,
        ``labels_equal`` (share of voxels of the first contender's labels), and what belongs to a measurement. The row
        of MONAI's way over our crop also has ``same_windows_labels_equal``: against the first contender with its
        windows where MONAI lays them. What differs there is the implementation; the rest is where windows lie.

    Raises:
        VolumeError: the scan is broken.
        MissingExtraError: MONAI is not there for the baseline.
        ResourceError: a contender's process died.
    """
    if baseline and importlib.util.find_spec("monai") is None:
        raise MissingExtraError("MISSING_EXTRA", "bench", "expected the package monai for the comparison, got none",
                                "pip install monai einops, or give --no-baseline")
    json_path = find_checkpoint(model)
    reading = recipe_of(read_meta(json_path), json_path).reading.options("nobody")
    read_ct(ct, reading)  # a scan that is broken is refused before a model is exported for it
    if not backends:
        raise MissingExtraError("MISSING_EXTRA", "bench", "expected onnxruntime or openvino, got neither",
                                'pip install "autosam3d[fast]"')
    names = [*backends, *(BASELINES if baseline else ())]
    if backends[0] in BACKENDS:  # a checkpoint is exported once, which is nobody's time
        _in_child(_open_once, model, ct, backends[0], threads)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="autosam3d-bench-") as name:
        for index, contender in enumerate(names):
            if progress:
                progress(index, len(names))
            rows[contender] = _in_child(_measure, model, ct, contender, overlap, threads, Path(name))
        if baseline:
            _in_child(_label_at_monais_windows, model, ct, names[0], rows[names[0]]["overlap"], threads, Path(name))
        labels = {path.stem: np.load(path, mmap_mode="r") for path in Path(name).glob("*.npy")}
        for contender in names:
            rows[contender] |= _agreement(labels[contender], labels[names[0]], "labels_equal")
        if baseline:
            rows[CROPPED] |= _agreement(labels[CROPPED], labels[_SAME_WINDOWS], "same_windows_labels_equal")
    if progress:
        progress(len(names), len(names))
    scan = {key: rows[names[0]].pop(key) for key in ("shape_zyx", "spacing_mm_zyx")}
    for row in rows.values():
        for key in scan:
            row.pop(key, None)
    _share_of_peak(rows)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": _machine(threads),
        "scan": scan, "settings": {"overlap": rows[names[0]]["overlap"], "threads": threads}, "rows": rows,
    }


def _agreement(labels: np.ndarray, others: np.ndarray, name: str) -> dict[str, float]:
    """Share of equal labels, of all voxels and of those that are an organ for one of the two."""
    organs = (labels > 0) | (others > 0)
    same = labels == others
    return {name: float(same.mean()), f"organ_{name}": float(same[organs].mean()) if organs.any() else 1.0}


def contenders(model: Path) -> list[str]:
    """The runtimes that can run `model` here."""
    if is_export(model):
        return sorted(installed_backends(open_export(model)), reverse=True)
    return [*(name for name in reversed(BACKENDS) if importlib.util.find_spec(PACKAGE_OF[name]) is not None), "torch"]


def summary(result: dict[str, Any]) -> str:
    """A table: a line a contender, a column a stage, ratios to MONAI's way."""
    rows, lines = result["rows"], []
    slow = [name for name in BASELINES if name in rows]
    head = ["", *STAGES, "whole", "CPU", "peak MiB", "windows", "equal labels", *(f"{name} takes" for name in slow)]
    for name, row in rows.items():
        cells = [f"{row['seconds'].get(stage, 0):.2f}" for stage in STAGES]
        peak = max((mib for stage, mib in row["peak_mib"].items() if stage != "load"), default=0)
        ratios = [f"{rows[other]['whole_seconds'] / row['whole_seconds']:.1f}x" for other in slow]
        lines.append([name, *cells, f"{row['whole_seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{peak:.0f}",
                      str(row["windows"]), f"{row['labels_equal']:.4%}", *ratios])
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *lines]]
    if "same_windows_labels_equal" in rows.get(CROPPED, {}):
        text.append(f"with its windows where MONAI lays them, {next(iter(rows))} gives the same label to "
                    f"{rows[CROPPED]['same_windows_labels_equal']:.4%} of the voxels as {CROPPED}, and to "
                    f"{rows[CROPPED]['organ_same_windows_labels_equal']:.4%} of those of an organ")
    for name, row in rows.items():
        if row.get("matrix_peak_share"):
            text.append(f"{name}: the network ran at {row['matrix_peak_share']:.0%} of this machine's matrix peak "
                        f"({row['matrix_peak_gflops']:.0f} GFLOP/s measured)")
    return "\n".join(text)


def _in_child(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        child.join()
        raise ResourceError("CHILD", str(arguments[2]), f"its process ended with exit code {child.exitcode}",
                            "give a smaller scan, or close other programs") from None
    child.join()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _send(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(work(*arguments))
    except (AutoSam3dError, RuntimeError, ValueError, OSError, MemoryError) as error:
        sender.send(error)


def _measure(model: Path, ct: Path, contender: str, overlap: float | None, threads: int, folder: Path
             ) -> dict[str, Any]:
    """Measure one contender: each stage by itself, then the whole as `segment` does it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    meter = Meter()
    with meter.stage("load"):
        loaded, predict = _contender(model, contender, threads)
    reading = loaded.recipe.reading.options("nobody")
    with meter.stage("read"):
        volume = read_ct(ct, reading)
    tiling = loaded.recipe.inference
    tiling = tiling if overlap is None else Tiling(overlap=overlap, importance=tiling.importance)
    held = resident_bytes()
    if predict is not None:
        labels, windows = monai_way(volume, loaded, predict, tiling, meter, contender == CROPPED)
        stages = ("read", "resample", "model", "restore")
        whole, cpu = (sum(spent.get(s, 0.0) for s in stages) for spent in (meter.seconds, meter.cpu_seconds))
    else:
        labels, windows = _by_stages(volume, loaded, tiling, meter)
        started, used = time.perf_counter(), time.process_time()
        again = segment_with(read_ct(ct, reading), loaded, SegmentOptions(tiling=tiling)).labels
        whole, cpu = time.perf_counter() - started, time.process_time() - used
        if not np.array_equal(again, labels):
            raise ValueError("the stages one by one and `segment` gave different labels")
    result = Segmentation(labels, volume.affine, volume.source, dict(loaded.recipe.labels.by_index))
    with meter.stage("write"):
        write_segmentation(folder / f"{contender}.nii.gz", result, loaded.recipe.labels)
    np.save(folder / f"{contender}.npy", labels)
    row = {"seconds": meter.seconds, "peak_mib": meter.peak_mib, "whole_seconds": whole + meter.seconds["write"],
           "cpu_seconds": cpu + meter.cpu_seconds["write"],
           "windows": windows, "held_before_mib": held / 2**20, "overlap": tiling.overlap,
           "shape_zyx": list(volume.shape), "spacing_mm_zyx": [round(mm, 4) for mm in volume.spacing_mm]}
    return row | _matrix_peak(loaded)


def _open_once(model: Path, ct: Path, contender: str, threads: int) -> dict[str, Any]:
    _contender(model, contender, threads)
    return {}


def _label_at_monais_windows(model: Path, ct: Path, contender: str, overlap: float, threads: int, folder: Path
                             ) -> dict[str, Any]:
    loaded, _ = _contender(model, contender, threads)
    tiling = Tiling(overlap=overlap, importance=loaded.recipe.inference.importance)
    volume = read_ct(ct, loaded.recipe.reading.options("nobody"))
    np.save(folder / f"{_SAME_WINDOWS}.npy", _by_stages(volume, loaded, tiling, Meter(), monai_starts)[0])
    return {}


def _contender(model: Path, name: str, threads: int) -> tuple[Model, Callable[..., Any] | None]:
    """The model on a runtime; for MONAI's way also the function that it calls per window."""
    baseline = name in BASELINES
    loaded = open_model(model, ModelWish(backend="torch" if baseline else name, device="cpu", threads=threads))
    return loaded, monai_predict(loaded) if baseline else None


def _by_stages(
    volume: Volume, model: Model, tiling: Tiling, meter: Meter,
    place: Callable[[Sequence[int], Sequence[int], float], list[Size]] = grid_starts,
) -> tuple[np.ndarray, int]:
    """The work of `segment` in its order, one stage at a time. Returns labels and the number of windows."""
    recipe, predictor = model.recipe, model.predictor
    size = predictor.patch_size
    with meter.stage("resample"):
        undo = plan_grid(volume, recipe.preprocess)
        prepared = prepare_ct(volume, recipe.preprocess, undo).voxels
    ct, padding = pad_to(prepared, size, recipe.preprocess.air)
    starts = place(ct.shape, size, tiling.overlap)
    stitcher = Stitcher(ct.shape, predictor.num_outputs, size, tiling.weights(size))  # type: ignore[arg-type]
    restorer = SlabRestorer(undo, predictor.num_outputs)

    def slabs() -> Iterator[np.ndarray]:
        for start in starts:
            with meter.stage("stitch"):
                done = list(stitcher.finished(start[0]))
            yield from done
            window = ct[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]
            with meter.stage("model"):
                probs = predictor.predict(np.ascontiguousarray(window)[None, None])[0]
            with meter.stage("stitch"):
                stitcher.add(probs, start)
        yield from stitcher.finished()

    for slab in unpad_slabs(slabs(), padding, ct.shape):
        with meter.stage("restore"):
            restorer.add(slab)
    return restorer.finish(), len(starts)


def _share_of_peak(rows: dict[str, Any]) -> None:
    """Give each row the share of the machine's matrix peak that its network ran at, where PyTorch could count."""
    known = next((row for row in rows.values() if "matrix_peak_gflops" in row), None)
    if known is None:
        return
    for row in rows.values():
        rate = known["gflop_per_window"] * row["windows"] / row["seconds"]["model"]
        row["matrix_peak_share"] = rate / known["matrix_peak_gflops"]
        row["matrix_peak_gflops"] = known["matrix_peak_gflops"]


def _matrix_peak(loaded: Model) -> dict[str, float]:
    """Operations of a window, and what this machine's cores multiply at best; empty without a PyTorch network."""
    network = getattr(loaded, "network", None)
    if network is None:
        return {}
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, *loaded.recipe.model.patch_size))
    flops = counter.get_total_flops()
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    peak = 2 * 1024**3 / best
    return {"gflop_per_window": flops / 1e9, "matrix_peak_gflops": peak / 1e9}


def _machine(threads: int) -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "load_average": load,
            "threads": threads, "system": platform.system(), "python": platform.python_version()}
