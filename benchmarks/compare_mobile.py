"""One window of an export on every runtime that it was written for, and on PyTorch: seconds, differences, file sizes.

    python benchmarks/compare_mobile.py EXPORT RUN [THREADS]

EXPORT is a folder that `autosam3d export RUN EXPORT --target ...` wrote. All runtimes take turns on the first window of
the golden case. The fastest of each is kept, and with one thread CPU time is what counts, so that other work on the
machine does little harm. Prints a Markdown table.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.checkpoints.exported import FILES_OF, RUNTIMES, installed_backends, load_exported, open_export
from autosam3d.export.golden import load_golden
from autosam3d.export.onnx_graph import with_half_weights
from autosam3d.export.parity import Ran, measure_parity

ROUNDS = 4


def main(folder: Path, run: Path, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    export = open_export(folder)
    golden = load_golden(export.path("golden.npz"), export.recipe)
    network = with_half_weights(load_model(run).network)

    def eager(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(windows)).numpy()

    runtimes = {"pytorch": eager}
    for name in installed_backends(export, RUNTIMES):
        runtimes[name] = load_exported(export, name, threads, output="logits").predictor.predict
    seconds = dict.fromkeys(runtimes, float("inf"))
    results = {name: predict(golden.ct[:1]) for name, predict in runtimes.items()}  # warm
    for _ in range(ROUNDS):
        for name, predict in runtimes.items():
            started = time.process_time() if threads == 1 else time.perf_counter()
            results[name] = predict(golden.ct[:1])
            ended = time.process_time() if threads == 1 else time.perf_counter()
            seconds[name] = min(seconds[name], ended - started)
    print("| runtime | s a window | PyTorch / it | largest logit difference, of the scale | labels equal | file MB |")
    print("|---|---|---|---|---|---|")
    for name, predict in runtimes.items():
        logits = np.concatenate([predict(window[None]) for window in golden.ct])
        ran = Ran(backend=name, version="", threads=threads, seconds=seconds[name], logits=logits)
        row = measure_parity(ran, golden, export.recipe.labels.organs)
        size = sum(export.path(file).stat().st_size for file in FILES_OF.get(name, ())) / 1e6
        print(f"| {name} | {seconds[name]:.3f} | {seconds['pytorch'] / seconds[name]:.2f} | {row.logit_share:.1e} | "
              f"{row.equal_share:.4%} | {f'{size:.1f}' if size else '-'} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *(int(n) for n in sys.argv[3:]))
