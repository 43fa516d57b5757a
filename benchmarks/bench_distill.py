"""An epoch of distillation with the ViT-B teacher beside the student (live) against one from its kept answers (cache).

Real training runs of SwinUNETR Tiny at 64^3 on four phantoms, the teacher with random weights: what it says does not
change how long it takes. The time to fill the cache is given beside. Run as
``OMP_NUM_THREADS=2 python benchmarks/bench_distill.py``.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch

from autosam3d.checkpoints.checkpoint import save_checkpoint
from autosam3d.data.folder import open_dataset
from autosam3d.data.phantom import write_phantom_dataset
from autosam3d.models.build import build_network
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.training.distill import student_recipe
from autosam3d.training.train import TeacherSource, train
from measured import write_result

SEED, EDGE, CASES, EPOCHS = 0, 64, 4, 3
TEACHER = [f"model.patch_size=[{EDGE}, {EDGE}, {EDGE}]", "preprocess.spacing_mm=[4.0, 4.0, 4.0]"]


def random_teacher(folder: Path, recipe: Recipe) -> Path:
    torch.manual_seed(SEED)
    meta = {"kind": "model", "contains": "all", "recipe": recipe.as_dict(), "sam": None, "epoch": 0}
    save_checkpoint(folder / "best.json", build_network(recipe.model).state_dict(), meta)
    return folder


def seconds_per_epoch(run: Path) -> float:
    """Median over the epochs after the first, in which kernels are prepared."""
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return statistics.median(
        sum(float(row["seconds"]) for row in rows if int(row["epoch"]) == epoch) for epoch in range(1, EPOCHS))


def main() -> None:
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom_dataset(folder / "data", CASES, 0, 0, SEED)
        plan = load_recipe("btcv", TEACHER)
        (folder / "teacher").mkdir()
        teacher = random_teacher(folder / "teacher", plan)
        cases = open_dataset(folder / "data", plan)
        settings = [f"train.epochs={EPOCHS}", "optim.warmup_epochs=0", "distill.teacher_overlap=0.0"]
        for mode in ("live", "cache"):
            recipe = student_recipe(teacher, "tiny", [*settings, f"distill.teacher_probs={mode}"])
            started = time.perf_counter()
            result = train(recipe, cases, folder / mode, teacher=TeacherSource(teacher), device="cpu",
                           cache_dir=folder / "cache")
            steps = seconds_per_epoch(folder / mode)
            before = time.perf_counter() - started - result.seconds
            rows[mode] = {"epoch_seconds": round(steps, 2), "before_first_step_seconds": round(before, 1)}
    ratio = rows["live"]["epoch_seconds"] / rows["cache"]["epoch_seconds"]
    write_result("distill", {
        "settings": {"teacher": "vit_b, random weights", "student": "swin_unetr 12", "crop": [EDGE] * 3,
                     "cases": CASES, "batch": plan.train.batch_size, "precision": plan.train.precision},
        "rows": rows, "live_over_cache": round(ratio, 2),
    }, SEED)


if __name__ == "__main__":
    main()
