"""A training step of the small network (vit_tiny, 64^3 voxels, batch 1), in float32 and with bfloat16 autocast.

Forward, a plain loss, backward and AdamW, everything tuned. Run as
``OMP_NUM_THREADS=1 python benchmarks/bench_train_step.py``; it also lists the five costliest operations.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from autosam3d.models.autosam import AutoSam
from autosam3d.models.spec import AutoSamSpec
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


def main() -> None:
    rows = {f"{p} batch {b}": in_child(__file__, p, b) for p in ("fp32", "bf16") for b in ("1", "2")}
    settings = {"vit": SPEC.vit, "ct": [EDGE] * 3, "parameters": sum(p.numel() for p in AutoSam(SPEC).parameters())}
    write_result("train_step", {"settings": settings, "rows": rows}, SEED)


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
