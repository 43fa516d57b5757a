"""T6: kill -9 while scans are segmented, cases cached and a model exported. At each moment a file is absent or whole.

Killed at a random one of the moments at which the command opens, renames or removes a file, so that none is too short
to be hit. The control arm writes label maps as many programs do, straight to their names.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autosam3d.checkpoints.exported import open_export
from autosam3d.export.verify import verify_export
from command_line import mini_model, run, write_model
from file_events import FileEvents
from mini_run import mini_recipe, write_mini_dataset, write_recipe
from serving import phantom_ct
from soak_table import share_of

Tell = Callable[..., None]
_IN_PLACE = """
import sys
from autosam3d.io import files

def in_place(batch):
    for file in batch:
        file.write(file.path)

files.atomic_write_all = in_place
import autosam3d.io.nifti.write as write
write.atomic_write_all = in_place
"""


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def demand_no_temporaries(folder: Path) -> None:
    assert [p for p in folder.rglob("*") if ".tmp-" in p.name or ".old" in p.name] == []


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(share_of(20, least=5)):
        phantom_ct(folder / f"case{number:02d}.nii.gz", (24, 26 + number % 4, 28))
    return folder


def test_a_killed_batch_leaves_whole_files_and_goes_on(scans: Path, tmp_path: Path, figures: Tell) -> None:
    whole = tmp_path / "whole"
    run("segment", mini_model(), scans, whole).demand_ok()
    expected = hashes(whole, "*.nii.gz")
    kills, hit, batches, random = share_of(50), 0, 0, np.random.default_rng(6)
    found: dict[str, str] = {}
    while hit < kills:
        out = tmp_path / f"{batches}"
        batch = FileEvents(tmp_path / "scratch", out, "segment", mini_model(), scans, out)
        if batches == 0:
            batch.run().demand_ok()
            events = batch.count()
            shutil.rmtree(out)
        for _ in range(min(8, kills - hit)):
            done = batch.run(last=int(random.integers(1, max(2, events // 3))))
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done.err
            hit += 1
            found = {name: value for name, value in hashes(out, "*.nii.gz").items() if not name.startswith(".")}
            assert found.items() <= expected.items()
        done = run("segment", mini_model(), scans, out).demand_ok()
        # Whole ones are passed over, but for the one that it had not yet said to be finished.
        assert done.out.count("wrote ") <= len(expected) - len(found) + 1
        assert hashes(out, "*.nii.gz") == expected
        demand_no_temporaries(out)
        batches += 1
    figures("T6", f"kill -9 of `segment` over {len(expected)} scans, at file events",
            f"{hit} kills in {batches} batches: each label map absent or whole each time, the same bytes at the end",
            _control(scans, tmp_path, expected))


def _control(scans: Path, tmp_path: Path, expected: dict[str, str]) -> str:
    """Label maps written straight to their names, killed in the middle of the first."""
    out = tmp_path / "control"
    script = tmp_path / "in_place.py"
    script.write_text(_IN_PLACE + """
import os, signal
from pathlib import Path
real = Path.open
class Dies:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, chunk):
        self.file.write(bytes(chunk)[: len(chunk) // 2]); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)
def opened(self, mode="r", *more, **how):
    file = real(self, mode, *more, **how)
    return Dies(file) if "w" in mode and self.name.endswith(".nii.gz") else file
Path.open = opened
from autosam3d.cli.main import main
main()
""")
    assert run("segment", mini_model(), scans, out, script=script).code == -signal.SIGKILL
    torn = [name for name, value in hashes(out, "*.nii.gz").items() if expected[name] != value]
    assert torn
    return f"written straight to its name: {len(torn)} torn label map under a final name after one kill"


def test_a_killed_cache_is_whole_cases_and_goes_on(tmp_path: Path, figures: Tell) -> None:
    write_mini_dataset(tmp_path / "data")
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=1))

    def training(name: str) -> FileEvents:
        return FileEvents(tmp_path / "scratch", tmp_path / name, "train", recipe, "--data", tmp_path / "data", "--out",
                          tmp_path / f"run_{name}", "--cache", tmp_path / name, "--threads", "1", "--device", "cpu")

    whole, cache = training("whole"), training("cache")
    assert whole.run().code == 0
    expected, random, kills = hashes(tmp_path / "whole", "*.*"), np.random.default_rng(6), share_of(10, least=3)
    for _ in range(kills):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        done = cache.run(last=int(random.integers(1, whole.count() // 2)))
        assert done.code == -signal.SIGKILL, done.err
        for entry in (tmp_path / "cache").rglob("info.json"):  # with its JSON a case is there, and whole
            found = hashes(entry.parent, "*.*")
            assert found.items() <= {k.rpartition("/")[2]: v for k, v in expected.items()
                                     if entry.parent.name in k}.items() and len(found) >= 4
        assert cache.run().code == 0
        assert hashes(tmp_path / "cache", "*.*") == expected
        demand_no_temporaries(tmp_path / "cache")
    figures("T6", "kill -9 of `train` while it caches cases, at file events",
            f"{kills} kills: a case is absent or whole, the same bytes at the end")


def test_a_killed_export_is_none_and_is_made_again(tmp_path: Path, figures: Tell) -> None:
    model = write_model(tmp_path / "model", model={"network": "res_unet", "num_outputs": 3, "patch_size": [32, 32, 32],
                                                   "channels": [4, 8, 8, 8, 8]})
    (tmp_path / "out").mkdir()
    export = FileEvents(tmp_path / "scratch", tmp_path / "out", "export", model, tmp_path / "out" / "export")
    done = export.run()
    assert done.code == 0, done.err
    events, random, kills = export.count(), np.random.default_rng(6), share_of(5, least=2)
    shutil.rmtree(tmp_path / "out" / "export")
    for _ in range(kills):
        done = export.run(last=int(random.integers(2, events)))
        assert done.code == -signal.SIGKILL, done.err
        if (tmp_path / "out" / "export").exists():
            open_export(tmp_path / "out" / "export")
            shutil.rmtree(tmp_path / "out" / "export")
    assert export.run().code == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["export"]
    verify_export(tmp_path / "out" / "export", threads=1)
    figures("T6", "kill -9 of `export`, at file events", f"{kills} kills, of {events} moments: no "
            "export or a whole one, and the next leaves nothing else beside it")
