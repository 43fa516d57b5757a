"""Seconds and memory of everything around the network: body, prepare, windows, stitch, restore.

    python benchmarks/bench_segment.py

A synthetic 512 x 512 x 300 CT (0.8 x 0.8 x 1 mm) goes to 1 x 1 x 1.5 mm, windows of 96^3 at overlap 0.5, 14 classes.
The predictor is a table lookup. Each stage runs alone in a fresh process: its seconds, and its peak resident memory
above what its input takes. `restore` has the probabilities of that predictor, `restore_dense` random ones, where no
class can be left out anywhere: the worst case. `segment` is the whole way; `predict_seconds` of it passed inside the
predictor, beside the stitching, in another thread. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy

from autosam3d.geometry.patches import Stitcher, Tiling, grid_starts, stitch
from autosam3d.geometry.preprocess import HuWindow, Preprocess, find_body, plan_grid, prepare_ct
from autosam3d.geometry.restore import restore_labels
from autosam3d.inference.pipeline import SegmentOptions, plan_memory, segment
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.volume import Volume

RESULT = Path(__file__).parent / "results" / "segment.json"
NUM_OUTPUTS, PATCH, SEED = 14, (96, 96, 96), 0
SPEC = Preprocess(
    spacing_mm=(1.5, 1.0, 1.0), hu_window=HuWindow(low_hu=-125, high_hu=275), subtract_hu=-125, divide_hu=400
)
STAGES = ("find_body", "prepare", "stitch", "restore", "restore_dense", "segment")


class Lookup:
    """Probabilities from a table over the voxel value: organs in a narrow band of values each."""

    patch_size, num_outputs = PATCH, NUM_OUTPUTS

    def __init__(self) -> None:
        value = np.linspace(0, 1, 1024)[None]
        centers = np.concatenate([[-1.0], np.linspace(0.5, 0.95, NUM_OUTPUTS - 1)])[:, None]
        score = -(((value - centers) / 0.05) ** 2)
        score[0] = -((value[0] - 0.42).clip(0) / 0.05)
        table = np.exp(score - score.max(0))
        self._table = (table / table.sum(0)).astype(np.float32)
        self.seconds = 0.0

    def predict(self, patches: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        index = (patches[:, 0] * 1023).astype(np.intp)
        probs = np.stack([row.take(index) for row in self._table], axis=1)
        self.seconds += time.perf_counter() - began
        return probs

    def activation_bytes(self, batch_size: int) -> int:
        return 0


@dataclass
class Model:
    recipe: Recipe
    predictor: Lookup


def make_volume() -> Volume:
    """An elliptic trunk of 350 x 250 mm with thirteen organs as balls, in air, with noise of 12 HU."""
    rng = np.random.default_rng(SEED)
    hu = np.full((300, 512, 512), -1000, np.float32)
    z, y, x = (np.arange(n, dtype=np.float32) * mm for n, mm in zip(hu.shape, (1, 0.8, 0.8), strict=True))
    trunk = ((y[:, None] - 205) / 125) ** 2 + ((x - 205) / 175) ** 2 < 1
    hu[:, trunk] = 0
    for organ in range(NUM_OUTPUTS - 1):
        cz, cy, cx = rng.uniform((40, 150, 100), (260, 260, 310))
        ball = (z[:, None, None] - cz) ** 2 + (y[:, None] - cy) ** 2 + (x - cx) ** 2 < rng.uniform(12, 55) ** 2
        hu[ball] = 75 + 180 * organ / (NUM_OUTPUTS - 2)
    for plane in hu:
        plane += rng.normal(0, 12, plane.shape).astype(np.float32)
    return Volume(voxels_hu=hu, affine=np.diag([0.8, 0.8, 1.0, 1.0]))


def resident_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (most since `forget_peak`) of this process."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def run_stage(stage: str) -> dict[str, float]:
    """One stage in this process; seconds and memory are of the stage alone."""
    volume, predictor = make_volume(), Lookup()
    undo = plan_grid(volume, SPEC)
    shape = undo.prepared_shape
    prepared = prepare_ct(volume, SPEC, undo).voxels if stage == "restore" else np.empty(0)
    probs = np.full((NUM_OUTPUTS, *PATCH), 1 / NUM_OUTPUTS, np.float32) if stage == "stitch" else np.empty(0)
    notes: dict[str, float] = {}
    elsewhere = [0.0]
    forget_peak()
    before, began = resident_mib("VmRSS"), time.perf_counter()
    if stage == "find_body":
        box = find_body(volume.voxels_hu, volume.spacing_mm)
        notes["box_share"] = round(float(np.prod(box.shape)) / volume.voxels_hu.size, 3)
    elif stage == "prepare":
        prepare_ct(volume, SPEC, undo)
    elif stage == "stitch":
        starts = grid_starts(shape, PATCH, 0.5)
        stitcher = Stitcher(shape, NUM_OUTPUTS, PATCH, Tiling().weights(PATCH))
        for _ in stitch(((probs, start) for start in starts), stitcher):
            pass
        notes["windows"] = len(starts)
    elif stage == "restore":
        slabs = (predictor.predict(prepared[None, None, z : z + 8])[0] for z in range(0, shape[0], 8))
        labels = restore_labels(timed(slabs, elsewhere), undo, NUM_OUTPUTS)
        notes["foreground_share"] = round(float((labels > 0).mean()), 3)
    elif stage == "restore_dense":
        rng = np.random.default_rng(SEED)
        slabs = (rng.random((NUM_OUTPUTS, min(8, shape[0] - z), *shape[1:]), np.float32) for z in range(0, shape[0], 8))
        restore_labels(timed(slabs, elsewhere), undo, NUM_OUTPUTS)
    else:
        segment(volume, Model(make_recipe(), predictor), tiling=Tiling(overlap=0.5))
    seconds = time.perf_counter() - began - elsewhere[0]
    peak = resident_mib("VmHWM") - before
    if stage == "stitch":
        notes["ms_per_window"] = round(1000 * seconds / notes["windows"], 1)
    elif stage == "segment":
        plan = plan_memory(undo, predictor, SegmentOptions())
        notes["predict_seconds"] = round(predictor.seconds, 2)
        notes["planned_mib"] = round((plan.total - plan.scan) / 2**20)
    return {"seconds": round(seconds, 2), "peak_above_input_mib": round(peak), **notes}


def timed(slabs: Iterator[np.ndarray], clock: list[float]) -> Iterator[np.ndarray]:
    """Adds to `clock` the seconds that making the slabs takes."""
    while True:
        began = time.perf_counter()
        slab = next(slabs, None)
        clock[0] += time.perf_counter() - began
        if slab is None:
            return
        yield slab


def make_recipe() -> Recipe:
    phantom = load_recipe("phantom")
    labels = LabelMap(organs=tuple(f"organ_{i}" for i in range(1, NUM_OUTPUTS)))
    return replace(phantom, labels=labels, preprocess=SPEC, model=replace(phantom.model, num_outputs=NUM_OUTPUTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES)
    stage = parser.parse_args().stage
    if stage:
        print(json.dumps(run_stage(stage)))
        return
    results = {}
    for name in STAGES:
        command = [sys.executable, __file__, "--stage", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        results[name] = json.loads(done.stdout)
        print(f"{name:14s} {results[name]}", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    content = {
        "date": datetime.date.today().isoformat(), "command": "python benchmarks/bench_segment.py", "seed": SEED,
        "input": "512x512x300 at 0.8x0.8x1 mm to 1x1x1.5 mm, 14 classes, windows 96^3, overlap 0.5, 1 thread",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(),
                    "load_average": round(os.getloadavg()[0], 1), "numpy": np.__version__, "scipy": scipy.__version__,
                    "torch": "not used"},
        "stages": results,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"wrote {RESULT}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
