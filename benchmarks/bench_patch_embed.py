"""The folded patch embedding against enlarging the CT four times and convolving slice by slice (ViT-B, scale 4).

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_patch_embed.py [EDGE]``; the edge of the CT cube is 64 voxels unless
given (the enlarged volume of the naive way has 64 times as many voxels).
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from autosam3d.models.autosam.encoder import PatchEmbed
from measured import in_child, measure, write_result

DIM, SCALE, SEED = 768, 4, 0


def naive(embed: PatchEmbed, ct: Tensor) -> Tensor:
    """The CT enlarged, as RGB, through the 2D kernel slice by slice, then through the depth-wise kernel."""
    large = F.interpolate(ct, scale_factor=SCALE, mode="trilinear", align_corners=False)
    slices = large.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)
    planes = embed.proj(slices).unflatten(0, (ct.shape[0], -1)).transpose(1, 2)
    return embed.depth_proj(planes).permute(0, 2, 3, 4, 1)


def setup(edge: int) -> tuple[PatchEmbed, Tensor]:
    torch.manual_seed(SEED)
    embed = PatchEmbed(DIM, 16, (SCALE, SCALE, SCALE), sam_norm=False)
    embed.proj.requires_grad_(False)  # as in training: SAM's kernel is frozen
    return embed, torch.rand(1, 1, edge, edge, edge)


def child(form: str, passes: str, edge: str) -> None:
    embed, ct = setup(int(edge))

    def work() -> None:
        with torch.set_grad_enabled(passes == "training"):
            tokens = embed(ct) if form == "folded" else naive(embed, ct)
        if passes == "training":
            tokens.sum().backward()

    print(json.dumps(measure(work, runs=3 if form == "folded" else 1)))


def main(edge: int) -> None:
    embed, ct = setup(32)
    with torch.no_grad():
        wanted = naive(embed, ct)
        apart = (embed(ct) - wanted).abs().max() / wanted.abs().max()
    rows = {}
    for passes in ("inference", "training"):
        row = {form: in_child(__file__, form, passes, str(edge)) for form in ("folded", "naive")}
        row["times_faster"] = round(row["naive"]["cpu_seconds"] / row["folded"]["cpu_seconds"], 1)
        row["times_less_memory"] = round(row["naive"]["peak_mb"] / row["folded"]["peak_mb"], 1)
        rows[passes] = row
    settings = {"ct": [edge] * 3, "scale": SCALE, "dim": DIM, "result_mb": (edge // 4) ** 3 * DIM * 4 / 1e6}
    write_result("patch_embed", {"settings": settings, "largest_relative_difference_fp32": float(f"{apart:.2g}"),
                                 "rows": rows}, SEED)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(*sys.argv[1:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 64)
