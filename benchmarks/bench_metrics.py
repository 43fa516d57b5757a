"""Time to score one case, against MONAI and surface-distance: 13 organs, 160 x 256 x 256 voxels, two NSD tolerances.

Every candidate computes, for each organ, Dice, NSD at both tolerances and HD95, from the same two label maps, on one
thread. Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_metrics.py``; it writes ``results/metrics.json``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import monai
import numpy as np
import surface_distance
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from autosam3d.evaluation.metrics import evaluate_case

SHAPE, SPACING_MM, TOLERANCES_MM, SEED = (160, 256, 256), (3.0, 1.5, 1.5), (1.0, 2.0), 0
# About the 13 organs of BTCV, as radii in mm of balls of like volume; they are made ellipsoids and moved by the seed.
RADII_MM = (40, 34, 34, 20, 14, 70, 46, 24, 20, 16, 26, 9, 9)
Scores = np.ndarray
"""[organ, (Dice, NSD at each tolerance, HD95)]"""


def make_case() -> tuple[np.ndarray, np.ndarray]:
    """(prediction, truth), uint8 [z, y, x]: ellipsoids, and the same warped by a smooth random field of about 2 mm."""
    rng = np.random.default_rng(SEED)
    extent_mm = np.array(SHAPE) * SPACING_MM
    grid_mm = [np.arange(n) * mm for n, mm in zip(SHAPE, SPACING_MM, strict=True)]
    truth = np.zeros(SHAPE, np.uint8)
    for label, radius_mm in enumerate(RADII_MM, start=1):
        radii = radius_mm * rng.uniform(0.8, 1.25, 3)
        centre = rng.uniform(radii + 5, extent_mm - radii - 5)
        z, y, x = (((g - c) / r) ** 2 for g, c, r in zip(grid_mm, centre, radii, strict=True))
        truth[z[:, None, None] + y[:, None] + x < 1] = label
    shift_vox = []
    for mm in SPACING_MM:
        coarse = rng.normal(0, 2.0, [max(3, n // 16) for n in SHAPE])
        field_mm = ndimage.zoom(coarse, np.array(SHAPE) / coarse.shape, order=1)
        shift_vox.append((field_mm / mm).astype(np.float32))
    places = [i + s for i, s in zip(np.indices(SHAPE, np.float32), shift_vox, strict=True)]
    return ndimage.map_coordinates(truth, places, order=0), truth


def ours(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    organs = {label: str(label) for label in range(1, len(RADII_MM) + 1)}
    scores = evaluate_case(prediction, truth, SPACING_MM, organs, TOLERANCES_MM)
    return np.array([(s.dice, *s.nsd, s.hd95_mm) for s in scores])


def deepmind(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    rows = []
    for label in range(1, len(RADII_MM) + 1):
        p, t = prediction == label, truth == label
        surfaces = surface_distance.compute_surface_distances(t, p, SPACING_MM)
        nsd = [surface_distance.compute_surface_dice_at_tolerance(surfaces, mm) for mm in TOLERANCES_MM]
        hd95 = surface_distance.compute_robust_hausdorff(surfaces, 95)
        rows.append((surface_distance.compute_dice_coefficient(t, p), *nsd, hd95))
    return np.array(rows)


def with_monai(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    """Organ by organ, which spares MONAI a one-hot array of 13 volumes."""
    rows = []
    for label in range(1, len(RADII_MM) + 1):
        p, t = (torch.from_numpy(a == label)[None, None].float() for a in (prediction, truth))
        nsd = [
            compute_surface_dice(p, t, [mm], include_background=True, spacing=SPACING_MM, use_subvoxels=True).item()
            for mm in TOLERANCES_MM
        ]
        hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=SPACING_MM).item()
        rows.append((compute_dice(p, t).item(), *nsd, hd95))
    return np.array(rows)


def seconds(score: Callable[[np.ndarray, np.ndarray], Scores], case: tuple[np.ndarray, np.ndarray], runs: int
            ) -> tuple[float, Scores]:
    """The fastest of `runs` runs."""
    best, scores = float("inf"), np.empty(0)
    for _ in range(runs):
        started = time.perf_counter()
        scores = score(*case)
        best = min(best, time.perf_counter() - started)
    return best, scores


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = make_case()
    our_s, our_scores = seconds(ours, case, 7)
    their_s, their_scores = seconds(deepmind, case, 2)
    monai_s, monai_scores = seconds(with_monai, case, 2)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python {' '.join(sys.argv)}",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads_used": 1, "system": platform.system()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
                     "monai": monai.__version__, "surface-distance": "0.1"},
        "case": {"shape": SHAPE, "spacing_mm": SPACING_MM, "organs": len(RADII_MM), "tolerances_mm": TOLERANCES_MM,
                 "seed": SEED, "mean_dice": round(float(our_scores[:, 0].mean()), 4)},
        "seconds": {"autosam3d": round(our_s, 3), "surface-distance": round(their_s, 3), "monai": round(monai_s, 3)},
        "times_faster_than": {"surface-distance": round(their_s / our_s, 1), "monai": round(monai_s / our_s, 1)},
        "largest_difference": {"surface-distance": _apart(our_scores, their_scores),
                               "monai (hd95_mm by another definition)": _apart(our_scores, monai_scores)},
    }
    text = json.dumps(result, indent=1) + "\n"
    (Path(__file__).parent / "results" / "metrics.json").write_text(text)
    print(text, end="")


def _apart(a: Scores, b: Scores) -> dict[str, float]:
    apart = np.abs(a - b).max(axis=0)
    return {"dice": float(f"{apart[0]:.2g}"), "nsd": float(f"{apart[1:-1].max():.2g}"),
            "hd95_mm": float(f"{apart[-1]:.2g}")}


if __name__ == "__main__":
    main()
