"""Our safetensors writer: the library's bytes, and nothing beside the file however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from autosam3d.checkpoints.checkpoint import read_checkpoint, save_checkpoint
from autosam3d.checkpoints.tensor_file import read_tensors, tensors_sha256, write_tensors
from autosam3d.errors import CheckpointError
from autosam3d.io.files import sha256_of

_EVERY_KIND = {
    f"{kind}".removeprefix("torch."): torch.arange(3).to(kind)
    for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                 torch.int8, torch.uint8, torch.bool)
}


@pytest.mark.parametrize("tensors", [
    _EVERY_KIND, {}, {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}, {'é"\\x\n': torch.ones(2, 2)},
    {"b": torch.ones(1), "a": torch.zeros(5, dtype=torch.uint8), "B": torch.ones(3)},
], ids=["every kind", "nothing", "small", "odd name", "order"])
def test_the_bytes_are_those_of_the_library(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors)
    assert sha256_of(path) == tensors_sha256(tensors)
    there = read_tensors(path)
    assert there.keys() == tensors.keys() and all(there[n].equal(t) and there[n].dtype == t.dtype
                                                  for n, t in tensors.items())


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "a")
    assert caught.value.code == "CORRUPT"


def test_what_is_killed_inside_a_save_is_swept_by_the_next(tmp_path: Path) -> None:
    """kill -9 in the middle of the weights, then between the weights and their JSON."""
    program = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        import autosam3d.checkpoints.checkpoint as checkpoint
        import autosam3d.checkpoints.tensor_file as tensor_file

        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "weights":
            whole, calls = tensor_file._chunks, []
            def chunks(tensors):
                calls.append(0)
                yield from whole(tensors)
                if len(calls) == 4:  # two hashes and a size before it
                    kill()
            tensor_file._chunks = chunks
        else:
            checkpoint.write_text_atomic = kill
        checkpoint.save_checkpoint(Path(sys.argv[1]) / "last.json", {"a": torch.ones(5000)}, {"recipe": {}})
    """)
    save_checkpoint(tmp_path / "last.json", {"a": torch.zeros(5000)}, {"recipe": {}})
    before = sorted(p.name for p in tmp_path.iterdir())
    for moment in ("weights", "json"):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path), moment], check=False)
        assert done.returncode == -signal.SIGKILL
        strays = [p for p in tmp_path.iterdir() if p.name not in before]
        assert len(strays) == 1 and strays[0].stat().st_size >= 20_000, moment
        assert not read_checkpoint(tmp_path / "last.json").tensors["a"].any()
        again = ("import sys\nfrom pathlib import Path\nfrom autosam3d.training.run_folder import claim_run_folder\n"
                 "claim_run_folder(Path(sys.argv[1]), 'recipe.yaml', '')")
        subprocess.run([sys.executable, "-c", again, str(tmp_path)], check=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, moment


def test_other_programs_read_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", _EVERY_KIND)
    assert load_file(tmp_path / "a.safetensors")["float32"].tolist() == [0.0, 1.0, 2.0]
