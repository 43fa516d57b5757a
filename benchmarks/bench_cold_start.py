"""From the start of the process to the first window's probabilities, and the memory that it takes: three runtimes.

SwinUNETR Tiny, random weights, 96^3. Each runtime starts three times in a fresh process that does what
`autosam3d segment` does before its first window: imports, hashes, loading, one window. Wall time depends on what else
the machine does; CPU time hardly does. Memory is the peak above what was resident after the imports.
Run as ``OMP_NUM_THREADS=2 python benchmarks/bench_cold_start.py [EXPORT RUN]``; both folders are made where not given.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PATCH, SEED, STARTS, THREADS = (96, 96, 96), 0, 3, 2
BACKENDS = ("torch", "onnxruntime", "openvino")
CHILD = """
import sys, time
started = time.process_time()
from pathlib import Path
import numpy as np
import autosam3d.scans.batch, autosam3d.io
from autosam3d.io.memory import peak_bytes, resident_bytes
from autosam3d.scans.open_model import ModelWish, open_model
if sys.argv[2] == "torch":
    import torch, autosam3d.checkpoints.checkpoint
else:
    __import__(sys.argv[2])
imported, before = time.process_time() - started, resident_bytes()
model = open_model(Path(sys.argv[1]), ModelWish(backend=sys.argv[2], device="cpu", threads=int(sys.argv[3])))
loaded = time.process_time() - started
predictor = model.predictor
patch = np.random.default_rng(0).normal(size=(1, 1, *predictor.patch_size)).astype(np.float32)
probs = predictor.predict(patch)
first = time.process_time() - started
print(imported, loaded, first, peak_bytes() - before, "torch" in sys.modules, flush=True)
again = time.process_time()
predictor.predict(patch)
print(time.process_time() - again, peak_bytes() - before, flush=True)
"""


def start(folder: Path, backend: str) -> dict[str, float]:
    """One cold start; seconds of wall clock until the first window is there, of CPU for its parts, and MB."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), backend, str(THREADS)], stdout=subprocess.PIPE,
                             text=True)
    assert child.stdout is not None
    imported, loaded, first, first_bytes, has_torch = child.stdout.readline().split()
    wall = time.perf_counter() - began
    again, peak_bytes = child.stdout.readline().split()
    child.wait()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = ended.ru_utime + ended.ru_stime - used.ru_utime - used.ru_stime - float(again)
    assert (has_torch == "True") == (backend == "torch")
    return {
        "wall_s": wall, "cpu_s": cpu, "import_cpu_s": float(imported), "load_cpu_s": float(loaded) - float(imported),
        "first_window_cpu_s": float(first) - float(loaded), "next_window_cpu_s": float(again),
        "first_peak_mb": int(first_bytes) / 2**20, "peak_mb": int(peak_bytes) / 2**20,
    }


def make_models(folder: Path, recipe: Any = None, prepare: Any = None) -> tuple[Path, Path]:
    """A run folder with random weights and its export, without the certificate.

    Args:
        folder: new.
        recipe: of the model; None is Tiny at 96^3 with the preprocessing of `openkbp`.
        prepare: called with the network before anything is written.
    """
    import torch

    from autosam3d.checkpoints.checkpoint import load_model, save_checkpoint
    from autosam3d.export import export
    from autosam3d.export.onnx_graph import with_half_weights
    from autosam3d.models.build import build_network
    from autosam3d.recipes.recipe import load_recipe, recipe_from_dict

    if recipe is None:
        tree = load_recipe("openkbp").as_dict()
        tree["model"] = {"network": "swin_unetr", "feature_size": 12, "patch_size": list(PATCH)}
        recipe = recipe_from_dict(tree)
    torch.manual_seed(SEED)
    run, exported = folder / "run", folder / "export"
    run.mkdir(parents=True)
    exported.mkdir()
    network = build_network(recipe.model).eval()
    if prepare is not None:
        prepare(network)
    save_checkpoint(run / "best.json", network.state_dict(), {
        "kind": "model", "contains": "all", "recipe": recipe.as_dict(), "sam": None, "epoch": 0, "metrics": {}})
    model = load_model(run)
    export._write_graphs(with_half_weights(model.network), recipe, exported)
    export._write_meta(exported, export._meta(model, export._entries(exported)))
    return exported, run


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(a) for a in sys.argv[1:3]] or make_models(Path(place))
        exported, run = folders
        outputs = json.loads((exported / "model.json").read_text("utf-8"))["recipe"]["model"]["num_outputs"]
        setting = f"SwinUNETR Tiny, {outputs} outputs, {PATCH[0]}^3, {THREADS} threads"
        result: dict[str, Any] = {"setting": setting, "starts": STARTS}
        for backend in BACKENDS:
            rows = [start(run if backend == "torch" else exported, backend) for _ in range(STARTS)]
            result[backend] = {key: round(min(row[key] for row in rows), 3) for key in rows[0]}
        result["file_mb"] = {p.name: round(p.stat().st_size / 1e6, 2) for p in sorted(exported.iterdir())}
    for backend in BACKENDS[1:]:
        keys = ("wall_s", "cpu_s", "next_window_cpu_s")
        result[f"torch_over_{backend}"] = {key: round(result["torch"][key] / result[backend][key], 2) for key in keys}
    from measured import write_result  # imports torch: last, so that nothing of it is in the way

    write_result("cold_start", json.loads(json.dumps(result)), SEED)


if __name__ == "__main__":
    main()
