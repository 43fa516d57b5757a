"""T8: every writer on a disk that is full at another moment of its work: what it says, and what it leaves.

The disk is a tmpfs with so many bytes free; where none can be mounted, a limit on the size of files stands for it. The
control arm is a library's own writer, which leaves a part of the file under its final name.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from make_dicom import ODD

from autosam3d.checkpoints.model_file import find_checkpoint
from command_line import Done, contents, mini_model, run, write_model
from exports import mini_export
from mini_run import mini_recipe, write_mini_dataset, write_recipe
from serving import phantom_ct

DISK = 64 << 20
FREE = (0, 3_000, 12_000, 60_000, 300_000, 1_500_000, 4_000_000)
"""Bytes left when a writer begins."""
_CONTROL = """
import sys, numpy as np, nibabel as nib
noise = np.random.default_rng(0).integers(0, 9, (80, 80, 80)).astype(np.uint8)
nib.save(nib.Nifti1Image(noise, np.eye(4)), sys.argv[1])
"""


@dataclass
class Disk:
    """A folder, and the limits under which a command runs there."""

    folder: Path
    mounted: bool
    limits: dict[str, int] = field(default_factory=dict)

    def leave(self, free: int) -> None:
        """Fill it, so that `free` bytes are left."""
        filler = self.folder / "filler"
        filler.unlink(missing_ok=True)
        if not self.mounted:
            self.limits["FSIZE"] = free
            return
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            file.write(bytes(max(0, shutil.disk_usage(self.folder).free - free - free % 4096)))

    def make_room(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)
        self.limits.clear()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield Disk(folder, done.returncode == 0)
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans, a series, a dataset, recipes and models on a disk with room."""
    folder = tmp_path_factory.mktemp("material")
    phantom_ct(folder / "ct.nii.gz")
    (folder / "dicom").mkdir()
    ODD["00_good"][0](folder / "dicom")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", mini_recipe(train__epochs=2))
    write_model(folder / "model", model={"network": "res_unet", "num_outputs": 3, "patch_size": [32, 32, 32],
                                         "channels": [4, 8, 8, 8, 8]})
    (folder / "pred").mkdir()
    for path in (folder / "data" / "labelsTr").glob("*.nii.gz"):
        (folder / "pred" / path.name).write_bytes(path.read_bytes())
    return folder


Command = Callable[[Path, Path], list[object]]
WRITERS: dict[str, Command] = {
    "nii.gz": lambda m, out: ["segment", mini_model(), m / "ct.nii.gz", out / "a.nii.gz", "--overwrite"],
    "nii": lambda m, out: ["segment", mini_model(), m / "ct.nii.gz", out / "a.nii", "--overwrite", "--preview"],
    "batch": lambda m, out: ["segment", mini_model(), m / "data" / "imagesTr", out / "batch"],
    "seg": lambda m, out: ["segment", mini_model(), m / "dicom" / "series", out / "a.dcm", "--format", "seg"],
    "rtstruct": lambda m, out: ["segment", mini_model(), m / "dicom" / "series", out / "a.dcm", "--format", "rtstruct"],
    "evaluate": lambda m, out: ["evaluate", m / "pred", m / "data" / "labelsTr", "--out", out / "scores"],
    "train": lambda m, out: ["train", m / "mini.yaml", "--data", m / "data", "--out", out / "run", "--device", "cpu"],
    "pack": lambda m, out: ["pack", mini_model(), out / "packed"],
    "export-web": lambda m, out: ["export-web", mini_export(), out / "web"],
    "phantom": lambda m, out: ["phantom", out / "phantoms", "--train", "1", "--val", "1", "--test", "0"],
    "export": lambda m, out: ["export", m / "model", out / "export"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_and_nothing_is_spoiled(name: str, disk: Disk, material: Path,
                                                    figures: Callable[..., None]) -> None:
    command = WRITERS[name](material, disk.folder)
    for old in ("a.nii.gz", "a.nii", "a.dcm"):
        if disk.folder / old in command and "--overwrite" in command:
            (disk.folder / old).write_bytes(b"the old file")
    before, found = contents(disk.folder), []
    for free in FREE if name != "export" else FREE[1::2]:
        disk.leave(free)
        done = run(*command, limits=disk.limits or None, seconds=300)
        disk.make_room()
        if done.code == 0:
            break
        _demand_told(done, disk.folder)
        found.append(contents(disk.folder))
        if name == "train" and list((disk.folder / "run").glob("*.json")):
            find_checkpoint(disk.folder / "run")
    if done.code:
        done = run(*command, seconds=300)  # with room it goes on, whatever was left
    assert done.code == 0, done.err
    assert found and not [path for left in found for path in left if ".tmp-" in path]
    # Each old file is there, or already the new one: a label map is whole before its picture is made.
    after = contents(disk.folder)
    assert all(left.get(path) in (before[path], after[path]) for left in found for path in before)
    control = _control(disk) if name == "nii.gz" else "see nii.gz"
    figures("T8", f"{name} on a {'tmpfs' if disk.mounted else 'limit of file sizes'} that is full at other moments",
            f"{len(found)} times told with path, bytes needed and bytes free, exit 5 or 6; nothing partial, old files "
            "as they were; with room the same command goes on", control)


def _demand_told(done: Done, folder: Path) -> None:
    assert "Traceback" not in done.err and done.code in (5, 6), done.err
    told = [line for line in done.err.splitlines() if "NO_SPACE" in line or "bytes free" in line]
    assert told and any(str(folder) in line for line in told), done.err
    assert any("bytes needed" in line and "bytes free" in line for line in told), done.err


def _control(disk: Disk) -> str:
    script = disk.folder.parent / "control.py"
    script.write_text(_CONTROL)
    disk.leave(20_000)
    path = disk.folder / "control.nii.gz"
    done = run(path, script=script, limits=disk.limits or None)
    assert done.code != 0 and path.exists()
    size = path.stat().st_size
    path.unlink()
    disk.make_room()
    return f"nibabel's own writer leaves {size} bytes under the final name"
