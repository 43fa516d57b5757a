"""What one CT slice costs with SAM ViT-B in 2D: the encoder, the prompts of five organs, memory. Random weights, which
cost the same. Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_slicewise.py``.
"""

from __future__ import annotations

import os
import time

import torch

from autosam3d.io.memory import peak_bytes, resident_bytes
from autosam3d.studies.slicewise.model import measure_seconds, random_sam, vit_sizes
from measured import write_result


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sam = random_sam(vit_sizes("vit_b"))
    before, cpu, wall = resident_bytes(), time.process_time(), time.perf_counter()
    seconds = measure_seconds(sam, organs=5, repeats=1)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    write_result("slicewise", {
        "encode_cpu_seconds": round(seconds.encode * torch.get_num_threads(), 2),
        "decode_cpu_seconds_5_organs": round(seconds.decode * torch.get_num_threads(), 3), "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "weights_gb": round(before / 1e9, 2), "peak_gb": round(peak_bytes() / 1e9, 2),
    }, seed=0)


if __name__ == "__main__":
    main()
