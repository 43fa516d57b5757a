"""Window attention with widened channels against the same with bias and mask tensors, as public codes write it.

One shifted block of ViT-B (12 heads of 64 channels, windows of 8x8x8 tokens) over 16^3 tokens, between the two
projections: from queries, keys and values to their mix. Run as
``OMP_NUM_THREADS=1 python benchmarks/bench_attention.py``; it also lists what training in float32 spends its time on.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from autosam3d.models.autosam.attention import WindowAttention, offset_table, split_windows, window_seams
from measured import in_child, measure, write_result

GRID, WINDOW, SHIFT, DIM, HEADS, SEED = (16, 16, 16), (8, 8, 8), (4, 4, 4), 768, 12, 0


def plain(attention: WindowAttention, qkv: Tensor, seams: Tensor, fused: bool = False) -> Tensor:
    """Logits, three broadcast biases, a mask, softmax, times v; or bias and mask given to the fused kernel."""
    num_windows, num_tokens, _ = qkv.shape
    head_dim = DIM // HEADS
    q, k, v = qkv.view(num_windows, num_tokens, 3, HEADS, head_dim).permute(2, 0, 3, 1, 4)
    tables = [
        offset_table(table, n).to(q.dtype)
        for table, n in zip((attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w), WINDOW, strict=True)
    ]
    grid_q = q.reshape(-1, *WINDOW, head_dim)
    rel_d = torch.einsum("bdhwc,dkc->bdhwk", grid_q, tables[0])[..., :, None, None]
    rel_h = torch.einsum("bdhwc,hkc->bdhwk", grid_q, tables[1])[..., None, :, None]
    rel_w = torch.einsum("bdhwc,wkc->bdhwk", grid_q, tables[2])[..., None, None, :]
    mask = torch.where((seams[:, :, None] == seams[:, None]).all(-1), 0.0, -100.0).to(q.dtype)[:, None]
    if fused:
        bias = (rel_d + rel_h + rel_w).reshape(num_windows, HEADS, num_tokens, num_tokens) + mask
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        logits = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        logits = (logits.view(-1, *WINDOW, *WINDOW) + rel_d + rel_h + rel_w).reshape(logits.shape) + mask
        mixed = logits.softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(num_windows, num_tokens, DIM)


def setup() -> tuple[WindowAttention, Tensor, Tensor]:
    torch.manual_seed(SEED)
    attention = WindowAttention(DIM, HEADS, WINDOW, shifted=True)
    for table in (attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table, std=0.1)
    qkv = split_windows(torch.randn(1, *GRID, 3 * DIM), WINDOW, SHIFT)
    seams = window_seams(GRID, WINDOW, SHIFT, qkv)
    assert seams is not None
    return attention, qkv, seams


def rows_width() -> int:
    """Channels of the widened q and k: their own, a one-hot code per axis, two per seam, filled up to eights."""
    return -(-(DIM // HEADS + sum(WINDOW) + 2 * sum(s > 0 for s in SHIFT)) // 8) * 8


def child(form: str, precision: str, passes: str) -> None:
    attention, qkv, seams = setup()
    if precision == "bf16":
        qkv = qkv.bfloat16()
    qkv.requires_grad_(passes == "training")
    forms = {
        "widened": lambda: attention.mix(qkv, WINDOW, seams), "plain": lambda: plain(attention, qkv, seams),
        "fused": lambda: plain(attention, qkv, seams, fused=True),
    }

    def work() -> None:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with autocast, torch.set_grad_enabled(passes == "training"):
            mixed = forms[form]()
        if passes == "training":
            mixed.float().sum().backward()

    result: dict[str, object] = dict(measure(work, runs=2))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    costs = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in costs)
    result["shares"] = {event.key: round(event.self_cpu_time_total / whole, 2) for event in costs[:4]}
    print(json.dumps(result))


def main() -> None:
    attention, qkv, seams = setup()
    with torch.no_grad():
        wanted = plain(attention, qkv, seams)
        apart = (attention.mix(qkv, WINDOW, seams) - wanted).abs().max() / wanted.abs().max()
    del qkv, wanted
    rows = {}
    for precision in ("fp32", "bf16"):
        for passes in ("inference", "training"):
            row = {form: in_child(__file__, form, precision, passes) for form in ("widened", "plain", "fused")}
            for other in ("plain", "fused"):
                row[f"times_faster_than_{other}"] = round(row[other]["cpu_seconds"] / row["widened"]["cpu_seconds"], 2)
                row[f"times_less_memory_than_{other}"] = round(row[other]["peak_mb"] / row["widened"]["peak_mb"], 2)
            rows[f"{precision} {passes}"] = row
    head_dim, width = DIM // HEADS, rows_width()
    # Multiply-adds per pair of tokens: forward two products, backward four, and the flash kernel makes the map anew.
    products = {"plain": 6 * head_dim, "widened": 7 * width}
    settings = {"grid": GRID, "window": WINDOW, "shift": SHIFT, "dim": DIM, "heads": HEADS}
    about = {"widened": "this project's", "plain": "matmul, three biases, mask, softmax, matmul",
             "fused": "bias and mask as one tensor, SDPA's attn_mask"}
    write_result("attention", {"settings": settings, "forms": about,
                               "multiply_adds_per_pair_of_tokens_fp32_training": products,
                               "largest_relative_difference_fp32": float(f"{apart:.2g}"), "rows": rows}, SEED)


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
