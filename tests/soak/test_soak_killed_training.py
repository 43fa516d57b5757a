"""T5 and T7, the long forms of tests/training/test_train_cli.py: fifty kills anywhere, ten inside a save, and signals.

The control arm saves as many programs do, over the old file: killed inside that save, the training cannot go on.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_train_cli import RECIPE, arguments, demand_equal, kill_often, wait_for_steps

import command_line
from autosam3d.checkpoints.checkpoint import read_checkpoint
from mini_run import log_rows, write_mini_dataset, write_recipe, write_sam
from soak_table import share_of

Tell = Callable[..., None]

# The real command, in a process that ends at a chosen moment of its n-th save of the training's state.
_KILLED_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
from autosam3d.checkpoints import checkpoint
from autosam3d.checkpoints.model_file import meta_text, sealed
from autosam3d.checkpoints.tensor_file import _chunks, tensors_sha256
from autosam3d.cli.main import main
from autosam3d.training import state

way, moment, count = os.environ["SOAK_SAVE"].split()
saves = 0

def at(name):
    if name == moment and saves == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

class Written:
    def __init__(self, file):
        self.file, self.calls = file, 0
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, chunk):
        half = len(chunk) // 2
        self.file.write(chunk[:half])
        self.calls += 1
        if self.calls == 5:
            self.file.flush()
            at("written")
        self.file.write(chunk[half:])

def is_temporary(name):
    return ".last-" in str(name) and ".tmp-" in str(name)

real_open, real_replace, real_fsync = Path.open, Path.replace, os.fsync

def opened(self, mode="r", *more, **how):
    global saves
    file = real_open(self, mode, *more, **how)
    if mode == "wb" and is_temporary(self):
        saves += 1
        return Written(file)
    return file

def fsync(fd):
    if is_temporary(os.readlink(f"/proc/self/fd/{fd}")):
        at("flushed")
    real_fsync(fd)

def replaced(self, target):
    stem = "weights" if is_temporary(self) else Path(target).name
    at(f"before_{stem}")
    done = real_replace(self, target)
    at(f"after_{stem}")
    return done

def in_place(json_path, tensors, meta, *, previous=None):
    # What a program does that saves over its last state: one name, written from the start.
    global saves
    saves += 1
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    weights = json_path.parent / "last-state.safetensors"
    with Written(real_open(weights, "wb")) as file:
        for chunk in _chunks(plain):
            file.write(bytes(chunk))
    at("before_last.json")
    entry = {"file": weights.name, "sha256": tensors_sha256(plain), "bytes": weights.stat().st_size}
    json_path.write_text(meta_text(sealed({**meta, "weights": entry})), "utf-8")

if way == "in_place":
    state.save_checkpoint = in_place
else:
    Path.open, Path.replace, os.fsync = opened, replaced, fsync
main()
"""
MOMENTS = ("written", "flushed", "before_weights", "after_weights", "before_last.json", "after_last.json",
           "before_previous.json", "after_previous.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", RECIPE)
    write_sam(folder / "sam.safetensors")
    (folder / "saves.py").write_text(_KILLED_IN_A_SAVE)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return go_on(folder, folder / "whole")


def command(folder: Path, run: Path) -> list[str | Path]:
    return arguments(folder, run, "--sam", folder / "sam.safetensors")


def go_on(folder: Path, run: Path) -> Path:
    """Train to the end."""
    done = command_line.run(*command(folder, run))
    assert done.code == 0, done.err
    return run


def killed_in_a_save(folder: Path, run: Path, way: str, moment: str, count: int) -> command_line.Done:
    return command_line.run(*command(folder, run), script=folder / "saves.py",
                            env={"SOAK_SAVE": f"{way} {moment} {count}"})


def test_killed_anywhere_it_is_the_same_run(folder: Path, whole: Path, tmp_path: Path, figures: Tell) -> None:
    kills, hit, runs = share_of(50), 0, 0
    while hit < kills:
        hit += kill_often(folder, tmp_path / f"{runs}", min(10, kills - hit), seed=100 + runs)
        demand_equal(tmp_path / f"{runs}", whole)
        assert not [p for p in (tmp_path / f"{runs}").iterdir() if ".tmp-" in p.name]
        shutil.rmtree(tmp_path / f"{runs}")
        runs += 1
    figures("T5", "kill -9 at random moments of a training that saves at every step; then it goes on to its end",
            f"{hit} kills in {runs} runs: all end with weights, optimiser and average of an undisturbed run",
            "in the next row")


def test_killed_inside_a_save_it_is_the_same_run(folder: Path, whole: Path, tmp_path: Path, figures: Tell) -> None:
    kills, runs = share_of(10, least=len(MOMENTS)), 0
    for index in range(kills):
        # Of the third save: the two before it carry the run on.
        done = killed_in_a_save(folder, tmp_path / f"{runs}", "atomic", MOMENTS[index % len(MOMENTS)], 3)
        assert done.code == -signal.SIGKILL, done.err
        if index % 4 == 3 or index == kills - 1:  # some more, and it would be at its end
            demand_equal(go_on(folder, tmp_path / f"{runs}"), whole)
            assert not [p for p in (tmp_path / f"{runs}").iterdir() if ".tmp-" in p.name]
            runs += 1
    lost = 0
    controls = ("written", "before_last.json")
    for moment in controls:
        assert killed_in_a_save(folder, tmp_path / moment, "in_place", moment, 3).code == -signal.SIGKILL
        lost += command_line.run(*command(folder, tmp_path / moment)).code != 0
    assert lost >= 1
    figures("T5", f"kill -9 inside a save, at {len(MOMENTS)} moments of it",
            f"{kills} kills in {runs} runs: all of them end with the same weights",
            f"a save over the last one: {lost} of {len(controls)} kills lose the training")


def test_signals_save_at_once_and_the_run_stays_the_same(folder: Path, whole: Path, tmp_path: Path, figures: Tell
                                                         ) -> None:
    random, slowest, runs = np.random.default_rng(7), 0.0, 0
    plan = [(n, None) for n in (signal.SIGTERM, signal.SIGINT) for _ in range(share_of(20) // 2)]
    plan += [(signal.SIGINT, signal.SIGTERM)] * share_of(5) + [(signal.SIGUSR1, None)] * share_of(5)
    waiting = [plan[index] for index in random.permutation(len(plan))]
    while waiting:
        run = tmp_path / f"{runs}"
        runs += 1
        for _ in range(min(5, len(waiting))):
            first, second = waiting.pop()
            before = len(log_rows(run)) - 1 if (run / "log.csv").exists() else 0
            child = command_line.start(*command(folder, run))
            wait_for_steps(run, before + int(random.integers(1, 3)), child)
            time.sleep(random.uniform(0, 0.05))
            began = time.monotonic()
            child.kill(first)
            if second is not None:
                child.kill(second)
            done = child.wait(10)
            slowest = max(slowest, time.monotonic() - began)
            assert done.code in {128 + n for n in (first, second) if n is not None}, done.err
            read_checkpoint(run / "last.json")
            assert "Traceback" not in done.err
        demand_equal(go_on(folder, run), whole)
    figures("T7", "SIGTERM, SIGINT, SIGUSR1, and a second signal, at random moments of a training",
            f"{len(plan)} signals in {runs} runs: saved, ended within {slowest:.1f} s, the same weights at the end")


def test_a_save_over_the_last_one_is_what_the_control_arm_says(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Undisturbed, the control arm is a whole training too: only kills tell the two ways apart."""
    done = killed_in_a_save(folder, tmp_path / "run", "in_place", "never", 0)
    assert done.code == 0, done.err
    assert log_rows(tmp_path / "run") == log_rows(whole)
    assert (tmp_path / "run" / "last-state.safetensors").stat().st_size > 1000
