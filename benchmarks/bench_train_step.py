"""A training step of the small network (vit_tiny, 64^3 voxels, batch 1), in float32 and with bfloat16 autocast.

Forward, a plain loss, backward and AdamW, everything tuned; and the share of a training step's time that it waits for
crops, cut from cached phantoms with every augmentation switched on. Run as
``OMP_NUM_THREADS=1 python benchmarks/bench_train_step.py``; it also lists the five costliest operations.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from autosam3d.data.cache import cache_cases
from autosam3d.data.crops import CropDataset, CropLoader, StepSampler
from autosam3d.data.folder import open_dataset
from autosam3d.data.phantom import write_phantom_dataset
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.spec import AutoSamSpec
from autosam3d.recipes.recipe import load_recipe
from autosam3d.recipes.settings import Augment
from measured import in_child, measure, write_result

SEED, EDGE = 0, 64
SPEC = AutoSamSpec(
    num_outputs=6, vit="vit_tiny", patch_size=(EDGE,) * 3, scale=(4, 4, 4), adapter_dim=48, neck_dim=64, prompt_dim=8,
    head_dim=32,
)


def child(precision: str, batch: str) -> None:
    torch.manual_seed(SEED)
    model = AutoSam(SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    ct = torch.rand(int(batch), 1, EDGE, EDGE, EDGE)
    truth = torch.randint(0, SPEC.num_outputs, (int(batch), EDGE, EDGE, EDGE))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(ct)

    def step() -> None:
        F.cross_entropy(forward().float(), truth).backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        with torch.no_grad():
            forward()

    training, inference = measure(step, runs=3), measure(infer, runs=5)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    costs = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)[:5]
    whole = sum(event.self_cpu_time_total for event in profiled.key_averages())
    shares = {event.key: round(event.self_cpu_time_total / whole, 2) for event in costs}
    print(json.dumps({"step": training, "forward_cpu_seconds": inference["cpu_seconds"], "share_of_step": shares}))


def loader_child(precision: str, batch: str) -> None:
    """Share of the wall time of training steps spent waiting for the next batch of crops."""
    torch.manual_seed(SEED)
    model = AutoSam(SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    everything = Augment(flip_prob=0.5, rotate90_prob=0.5, scale_prob=0.5, shift_prob=0.5, affine_prob=0.5,
                         noise_prob=0.5)
    recipe = load_recipe("phantom", ["model.patch_size=[64,64,64]", "model.scale=[4,4,4]"])
    recipe = replace(recipe, augment=everything, sampling=replace(recipe.sampling, patches_per_volume=24))
    with tempfile.TemporaryDirectory() as folder:
        write_phantom_dataset(Path(folder) / "data", 1, 0, 0, SEED)
        cases = cache_cases(open_dataset(Path(folder) / "data", recipe).train, recipe, Path(folder) / "cache")
        dataset = CropDataset(cases, recipe)
        sampler = StepSampler(dataset, int(batch))
        waited, steps, mark = 0.0, 0, time.perf_counter()
        started = mark
        for crops in CropLoader(dataset, sampler, 0, False):
            ct, truth = crops["voxels"], crops["labels"]
            waited += time.perf_counter() - mark if steps else 0.0  # the first batch has nothing to hide behind
            started = started if steps else time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(ct)
            F.cross_entropy(logits[:, :6].float(), truth.long().clamp(max=5)).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps, mark = steps + 1, time.perf_counter()
        print(json.dumps({"steps": steps, "share_waiting_for_data": round(waited / (mark - started), 4)}))


def main() -> None:
    loader = {f"{p} batch {b}": in_child(__file__, "loader", p, b) for p in ("fp32", "bf16") for b in ("1", "2")}
    rows = {f"{p} batch {b}": in_child(__file__, p, b) for p in ("fp32", "bf16") for b in ("1", "2")}
    settings = {"vit": SPEC.vit, "ct": [EDGE] * 3, "parameters": sum(p.numel() for p in AutoSam(SPEC).parameters())}
    write_result("train_step", {"settings": settings, "rows": rows, "loader": loader}, SEED)


if __name__ == "__main__":
    if sys.argv[1:2] == ["loader"]:
        loader_child(*sys.argv[2:])
    else:
        child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
