"""A trunk CT of 512 x 512 x 300 voxels on two cores: the whole of `segment`, and what each lever gives.

    python benchmarks/trunk.py CT [--keep FOLDER] [--only NAME ...]

CT is a real CT of the trunk. It is resampled to voxels of 1.5 mm, continued in z by its mirror image to 300 slices,
surrounded by air to 512 x 512, and written to a temporary folder with two models of 14 outputs, windows of 96^3 at
1.5 mm: SwinUNETR Tiny and the edge tier. Their weights are random, which time does not see; the background's bias is
such that a seventh of a window of this CT is an organ, so that the way back to labels has what a trained model gives
it. Each row is a process of its own that does what `autosam3d segment` does, from its first import to the written file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "trunk.json"
SHAPE, SPACING_MM, PATCH, THREADS = (300, 512, 512), 1.5, (96, 96, 96), 2
# name: (model, backend, overlap, crop to the body, air computed once)
ROWS: dict[str, tuple[str, str, float, bool, bool]] = {
    "all levers": ("tiny", "openvino", 0.25, True, True),
    "overlap 0.5": ("tiny", "openvino", 0.5, True, True),
    "onnxruntime": ("tiny", "onnxruntime", 0.25, True, True),
    "torch": ("tiny", "torch", 0.25, True, True),
    "no crop": ("tiny", "openvino", 0.25, False, True),
    "no crop, air computed": ("tiny", "openvino", 0.25, False, False),
    "edge": ("edge", "openvino", 0.25, True, True),
    "edge, overlap 0.5": ("edge", "openvino", 0.5, True, True),
}


def make_ct(source: Path, path: Path) -> None:
    from scipy import ndimage

    from autosam3d.io import read_ct, write_ct
    from autosam3d.volume import Volume

    volume = read_ct(source)
    hu = ndimage.zoom(volume.voxels_hu, [mm / SPACING_MM for mm in volume.spacing_mm], order=1)
    hu = np.pad(hu, ((0, max(0, SHAPE[0] - len(hu))), (0, 0), (0, 0)), mode="symmetric")[: SHAPE[0]]
    whole = np.full(SHAPE, -1024, np.float32)
    start = [(n - m) // 2 for n, m in zip(SHAPE, hu.shape, strict=True)]
    if min(start) < 0:
        raise SystemExit(f"{source}: expected a CT of at most 768 mm across, got {hu.shape} voxels of 1.5 mm")
    whole[tuple(slice(s, s + m) for s, m in zip(start, hu.shape, strict=True))] = hu
    write_ct(path, Volume(np.round(whole), np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])))


def make_model(folder: Path, ct: Path, network: dict[str, Any]) -> None:
    """A run folder and an export."""
    import torch

    from autosam3d.geometry.preprocess import prepare_ct
    from autosam3d.io import read_ct
    from autosam3d.recipes.recipe import load_recipe, recipe_from_dict
    from bench_cold_start import make_models

    tree = load_recipe("btcv").as_dict()
    tree["model"] = network | {"patch_size": list(PATCH)}
    tree["preprocess"]["spacing_mm"] = [SPACING_MM] * 3
    recipe = recipe_from_dict(tree)
    voxels = prepare_ct(read_ct(ct), recipe.preprocess).voxels
    middle = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(voxels.shape, PATCH, strict=True))

    def raise_background(model: torch.nn.Module) -> None:
        """Until a seventh of the middle window is not background."""
        last = model.out.conv.conv if network["network"] == "swin_unetr" else model.out
        with torch.no_grad():
            logits = model(torch.from_numpy(np.ascontiguousarray(voxels[middle]))[None, None])[0]
            ahead = (logits[1:].amax(0) - logits[0]).flatten()
            last.bias[0] += ahead.kthvalue(int(ahead.numel() * 6 / 7)).values

    make_models(folder, recipe, raise_background)


def run_row(folder: Path, name: str) -> dict[str, Any]:
    """One segmentation in this process."""
    began, used = time.perf_counter(), time.process_time()
    from dataclasses import replace

    import autosam3d.inference.pipeline as inference
    from autosam3d.geometry.patches import Tiling, grid_starts
    from autosam3d.geometry.preprocess import plan_grid
    from autosam3d.io import read_ct, write_segmentation
    from autosam3d.io.memory import peak_bytes
    from autosam3d.scans.open_model import ModelWish, open_model

    which, backend, overlap, crop, air = ROWS[name]
    place = folder / which / ("run" if backend == "torch" else "export")
    model: Any = open_model(place, ModelWish(backend=backend, device="cpu", threads=THREADS))
    model = replace(model, recipe=replace(model.recipe, preprocess=replace(model.recipe.preprocess,
                                                                           crop_to_body=crop)))
    if not air:
        inference._is_blank = lambda crop: False
    predictor, calls, inside = model.predictor, [0], [0.0]
    predict = predictor.predict

    def timed(patches: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        result = predict(patches)
        inside[0] += time.perf_counter() - started
        calls[0] += len(patches)
        return result

    predictor.predict = timed
    loaded = time.perf_counter() - began
    volume = read_ct(folder / "ct.nii.gz")
    read = time.perf_counter() - began - loaded
    shape = plan_grid(volume, model.recipe.preprocess).prepared_shape
    tiling = Tiling(overlap=overlap)
    finish = inference.begin_segment(volume, model, inference.SegmentOptions(tiling=tiling))
    del volume
    result = finish(None)
    segmented = time.perf_counter() - began - loaded - read
    write_segmentation(folder / "out.nii.gz", result, model.recipe.labels)
    seconds, cpu, peak = time.perf_counter() - began, time.process_time() - used, peak_bytes() / 2**20
    padded = tuple(max(n, p) for n, p in zip(shape, PATCH, strict=True))
    return {
        "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, "load": loaded, "read": read, "segment": segmented,
        "write": seconds - loaded - read - segmented, "model": inside[0], "computed": calls[0],
        "windows": len(grid_starts(padded, PATCH, overlap)), "grid_zyx": list(shape),
        "foreground": float((result.labels > 0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for CT and models, used again where it is there")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help="make CT and models, measure nothing")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(run_row(given.ct, given.row)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "ct.nii.gz").exists():
            make_ct(given.ct, folder / "ct.nii.gz")
        for which, network in {"tiny": {"network": "swin_unetr", "feature_size": 12},
                               "edge": {"network": "res_unet"}}.items():
            if not (folder / which / "export" / "model.json").exists():
                make_model(folder / which, folder / "ct.nii.gz", network)
        if given.prepare:
            return
        rows = {row: _measured(folder, row) for row in given.only}
    _write(rows)


def _measured(folder: Path, row: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, str(folder), "--row", row], check=True, stdout=subprocess.PIPE,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    result = {key: round(value, 3) if isinstance(value, float) else value
              for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    result |= {"load_average": round(os.getloadavg()[0], 1), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(f"{row:22s} {result}", flush=True)
    return result


def _write(rows: dict[str, Any]) -> None:
    """Rows that were not measured now stay as they were."""
    old = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.exists() else {}
    info = Path("/proc/cpuinfo")
    cpu = next((line.partition(":")[2].strip() for line in (info.read_text().splitlines() if info.exists() else ())
                if line.startswith("model name")), "")
    content = {
        "command": "python benchmarks/trunk.py TotalSegmentatorExamples/example_ct.nii.gz",
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS}, "rows": old | rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
