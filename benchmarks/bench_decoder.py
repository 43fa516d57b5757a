"""The decoder's fusion with enlarging and taps exchanged against the literal order: enlarge, join, convolve.

Two settings: the small network at 48^3 (tokens of 4 x 2 x 2 voxels, fused at full resolution) and ViT-B's decoder over
16^3 tokens, fused at twice that (a 64^3 crop of the paper's preset). Run as
``OMP_NUM_THREADS=1 python benchmarks/bench_decoder.py``.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from autosam3d.models.autosam.mask_decoder import conv_enlarged
from measured import in_child, measure, write_result

SEED = 0
SETTINGS = {
    "vit_tiny": {"channels": 128, "width": 32, "grid": (12, 24, 24), "size": (48, 48, 48)},
    "vit_b": {"channels": 512, "width": 128, "grid": (16, 16, 16), "size": (32, 32, 32)},
}


def literal(x: Tensor, weight: Tensor, size: tuple[int, int, int]) -> Tensor:
    large = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
    return F.conv3d(large, weight, padding=1)


def setup(name: str) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    torch.manual_seed(SEED)
    about = SETTINGS[name]
    x = torch.randn(1, about["channels"], *about["grid"]).contiguous(memory_format=torch.channels_last_3d)
    return x, torch.randn(about["width"], about["channels"], 3, 3, 3) / 60, about["size"]


def child(name: str, form: str, precision: str, passes: str) -> None:
    x, weight, size = setup(name)
    x.requires_grad_(passes == "training")
    weight.requires_grad_(passes == "training")
    fuse = conv_enlarged if form == "exchanged" else literal

    def work() -> None:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with autocast, torch.set_grad_enabled(passes == "training"):
            fused = fuse(x, weight, size)
        if passes == "training":
            fused.float().sum().backward()

    print(json.dumps(measure(work, runs=3)))


def main() -> None:
    rows, apart = {}, {}
    for name in SETTINGS:
        x, weight, size = setup(name)
        wanted = literal(x, weight, size)
        apart[name] = float(f"{(conv_enlarged(x, weight, size) - wanted).abs().max() / wanted.abs().max():.2g}")
        for precision in ("fp32", "bf16"):
            for passes in ("inference", "training"):
                row = {form: in_child(__file__, name, form, precision, passes) for form in ("exchanged", "literal")}
                row["times_faster"] = round(row["literal"]["cpu_seconds"] / row["exchanged"]["cpu_seconds"], 1)
                row["times_less_memory"] = round(row["literal"]["peak_mb"] / row["exchanged"]["peak_mb"], 2)
                rows[f"{name} {precision} {passes}"] = row
    write_result("decoder", {"settings": SETTINGS, "largest_relative_difference_fp32": apart, "rows": rows}, SEED)


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
