"""The examples run as they are printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = ["train.epochs=1", "optim.warmup_epochs=0", "sampling.patches_per_volume=1", "model.patch_size=[16, 32, 32]",
        "train.val_overlap=0", "model.head_dim=8", "model.fuse_stride=2", "inference.overlap=0"]


@pytest.mark.slow
def test_train_on_phantom_then_segment_one(tmp_path: Path) -> None:
    train = subprocess.run([sys.executable, EXAMPLES / "02_train_on_phantom.py", tmp_path, *TINY],
                           capture_output=True, text=True, timeout=200, check=False)
    assert train.returncode == 0, train.stderr
    assert "1 epochs, best validation Dice 0." in train.stdout
    scan = next((tmp_path / "data/imagesTs").glob("*.nii.gz"))
    segment = subprocess.run([sys.executable, EXAMPLES / "01_segment_one_ct.py", tmp_path / "run", scan,
                              tmp_path / "organs.nii.gz"], capture_output=True, text=True, timeout=200, check=False)
    assert segment.returncode == 0, segment.stderr
    assert segment.stdout.count(" ml\n") == 13
    assert (tmp_path / "organs.nii.gz").is_file()
