"""T10: training, segmentation and scores on machines that differ in all that must not matter.

Each is a process of its own. Hash seed, language, time zone and the order of listings change with every run; the number
of threads too, between which sums may be rounded in another order.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from autosam3d.io import read_segmentation
from command_line import contents
from elsewhere import other_place, shuffled_listing
from mini_run import environment, mini_recipe, weights_of, write_mini_dataset, write_recipe, write_sam
from soak_table import share_of


def test_elsewhere_the_same_bits(tmp_path: Path, figures: Callable[..., None]) -> None:
    data = write_mini_dataset(tmp_path / "data")
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=2, train__num_workers=1))
    sam = write_sam(tmp_path / "sam.safetensors")
    (tmp_path / "hook").mkdir()
    shuffled_listing(tmp_path / "hook")
    runs = share_of(3, least=2)
    for threads in (1, 2):
        for index in range(runs):
            _work(tmp_path, data, recipe, sam, threads, index)
    for threads in (1, 2):
        weights = {weights_of(tmp_path / f"run_{threads}_{i}", name) for i in range(runs) for name in ("best", "last")}
        assert len(weights) == 2
        outputs = [_kept(tmp_path / f"out_{threads}_{i}") for i in range(runs)]
        assert all(one == outputs[0] for one in outputs) and len(outputs[0]) > 20
    equal = [_equal_share(tmp_path / "out_1_0", tmp_path / f"out_{2}_{i}") for i in range(runs)]
    assert min(equal) >= 0.99999
    _train(tmp_path, data, recipe, sam, 1, 0, "other", "--set", "train.seed=1")
    assert weights_of(tmp_path / "run_other", "last") != weights_of(tmp_path / "run_1_0", "last")
    figures("T10", "train, segment and evaluate: threads 1 and 2, hash seed, language, time zone, order of listings",
            f"2 x {runs} runs: weights, label maps and scores the same bits at the same number of threads; across them "
            f"{100 * min(equal):.4f} % of the labels", "another train.seed gives other weights")


def _work(folder: Path, data: Path, recipe: Path, sam: Path, threads: int, index: int) -> None:
    name = f"{threads}_{index}"
    _train(folder, data, recipe, sam, threads, index, name)
    # One model for all: between threads it is the segmentation that is compared.
    out = folder / f"out_{name}"
    _run(folder, index, "segment", folder / "run_1_0", data / "imagesTr", out, "--threads", threads)
    _run(folder, index, "evaluate", out, data / "labelsTr", "--out", out / "scores")


def _train(folder: Path, data: Path, recipe: Path, sam: Path, threads: int, index: int, name: str, *more: str) -> None:
    _run(folder, index, "train", recipe, "--data", data, "--out", folder / f"run_{name}", "--device", "cpu",
         "--threads", threads, "--sam", sam, *more)


def _run(folder: Path, index: int, *words: object) -> None:
    env = environment(PYTHONPATH=f"{folder / 'hook'}:{environment().get('PYTHONPATH', '')}", **other_place(index))
    done = subprocess.run([sys.executable, "-m", "autosam3d", *map(str, words)], env=env, cwd=folder, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _kept(folder: Path) -> dict[str, bytes | None]:
    """All that a run wrote, but for the moment at which it did, and the name of its folder."""
    told = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d[0-9:+]*|" + folder.name.encode())
    return {name: told.sub(b"", value) if value and not name.endswith(".gz") else value
            for name, value in contents(folder).items()}


def _equal_share(one: Path, other: Path) -> float:
    """Of voxels, the worst scan's."""
    return min(float(np.mean(read_segmentation(path).labels == read_segmentation(other / path.name).labels))
               for path in one.glob("*.nii.gz"))
