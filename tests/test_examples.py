"""The examples run as they are printed."""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

from autosam3d.data import phantom

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = ["train.epochs=1", "optim.warmup_epochs=0", "sampling.patches_per_volume=1", "model.patch_size=[16, 32, 32]",
        "train.val_overlap=0", "model.head_dim=8", "model.fuse_stride=2", "inference.overlap=0"]


def test_train_on_phantom_then_segment_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = partial(phantom.make_phantom, shape=(32, 64, 64), spacing_mm=(7.5, 5.25, 5.25))
    monkeypatch.setattr(phantom, "make_phantom", coarse)

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    assert "1 epochs, best validation Dice 0." in run("02_train_on_phantom.py", tmp_path, *TINY)
    scan = next((tmp_path / "data/imagesTs").glob("*.nii.gz"))
    assert run("01_segment_one_ct.py", tmp_path / "run", scan, tmp_path / "organs.nii.gz").count(" ml\n") == 13
    assert (tmp_path / "organs.nii.gz").is_file()
