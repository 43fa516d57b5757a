"""Measures the seconds and memory of a training step and of an inference window, in a process of its own.

A plan uses them to say how long its runs take before any begins, and to find the epochs that fill a budget of minutes.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autosam3d.io.memory import available_ram_bytes, peak_bytes, resident_bytes
from autosam3d.recipes.recipe import Recipe, recipe_from_dict

_log = logging.getLogger(__name__)

_CHILD = "import sys; from autosam3d.studies.reproduce.cost import in_child; in_child(*sys.argv[1:])"
_SECONDS = 600
_STEPS, _WINDOWS = 5, 3


@dataclass(frozen=True)
class TrainingCost:
    """The cost of one model on one machine."""

    step_seconds: float
    """Of one optimiser step, the fastest of a few, so that other programs on the machine count little."""
    window_seconds: float
    """Of one window of inference in PyTorch."""
    memory_bytes: int
    """Peak in training: of the device where it is a GPU, else of the whole process."""
    machine: str
    """Device and threads."""

    def epochs_in(self, minutes: float, steps_per_epoch: int) -> int:
        """Whole epochs of training steps that fit into `minutes`; at least one."""
        return max(1, math.floor(minutes * 60 / (self.step_seconds * steps_per_epoch)))


def measure_training(recipe: Recipe, device: str, threads: int) -> TrainingCost | None:
    """The cost of `recipe` on random crops; None where it does not fit the memory or takes minutes a step.

    Args:
        recipe: of the run. A student's teacher does not run here: its probabilities are read from the disk.
        device: as for training.
        threads: of the CPU.
    """
    command = [sys.executable, "-c", _CHILD, device, str(threads)]
    try:
        done = subprocess.run(command, input=json.dumps(recipe.as_dict()), capture_output=True, text=True,
                              timeout=_SECONDS, check=True)
        return TrainingCost(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError, TypeError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        _log.warning("%s: the cost of a step cannot be measured (%s)", recipe.name, said[-1] if said else "no reason")
        return None


def in_child(device: str, threads: str) -> None:
    """Measure the recipe on stdin; the result goes to stdout as JSON."""
    import torch

    from autosam3d.checkpoints.machine import cpu_name
    from autosam3d.inference.torch_runtime import TorchPredictor
    from autosam3d.training.run import Observer, build_fabric, start_run
    from autosam3d.training.stopping import StopRequest
    from autosam3d.training.train import train_step

    torch.set_num_threads(int(threads))
    if device == "cpu":  # not with CUDA, which maps far more addresses than it uses
        _demand_no_more_than_there_is()
    recipe = recipe_from_dict(json.loads(sys.stdin.read()))
    labels_only = replace(recipe, distill=None)
    fabric = build_fabric(device, recipe.train.precision)
    on_gpu = fabric.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(labels_only, fabric, Path(folder), None, StopRequest(), Observer())
    shape = (recipe.train.batch_size, *recipe.model.patch_size)
    random = torch.Generator().manual_seed(0)
    voxels = torch.randn((shape[0], 1, *shape[1:]), generator=random).to(fabric.device)
    labels = torch.randint(recipe.model.num_outputs, shape, generator=random).to(fabric.device)
    run.wrapped.train()

    def timed(work) -> float:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(fabric.device)
        return time.perf_counter() - started

    step = min([timed(lambda: train_step(run, voxels, labels)) for _ in range(_STEPS + 1)][1:])
    memory = torch.cuda.max_memory_allocated(fabric.device) if on_gpu else peak_bytes()
    run.network.eval()
    predictor = TorchPredictor(run.network, recipe.model.patch_size, fabric.device, recipe.train.precision)
    patch = voxels[:1].cpu().numpy()
    window = min([timed(lambda: predictor.predict(patch)) for _ in range(_WINDOWS + 1)][1:])
    machine = torch.cuda.get_device_name(fabric.device) if on_gpu else f"{cpu_name()}, {threads} threads"
    cost = TrainingCost(round(step, 5), round(window, 5), int(memory), machine)
    sys.stdout.write(json.dumps(asdict(cost)) + "\n")


def _demand_no_more_than_there_is() -> None:
    """Let allocations beyond the free memory fail, so that a model that is too large does not stall the machine."""
    try:
        import resource
    except ImportError:  # Windows
        return
    free, held = available_ram_bytes(), resident_bytes()
    if free is not None and held:
        statm = Path("/proc/self/statm")
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else held
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + free, most))
