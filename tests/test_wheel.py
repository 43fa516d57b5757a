"""The wheel as a user has it: a script that uses it is type-checked, and what the script gets wrong is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import autosam3d
from made_once import made_once

REPO = Path(__file__).resolve().parents[1]
RIGHT = '''\
# pyright: reportUnknownMemberType=true, reportUnknownVariableType=true, reportUnknownArgumentType=true
from pathlib import Path

import numpy as np

import autosam3d
from autosam3d import AutoSam3dError, LabelMap, LoadedModel, ReadOptions, Segmentation, Volume


def organs_of(scan: Path, model: LoadedModel) -> dict[str, float]:
    ct: Volume = autosam3d.read_ct(scan, ReadOptions(prefer="sform", max_ram_bytes=8 << 30))
    depth, height, width = ct.shape
    found: Segmentation = autosam3d.segment(ct, model, batch_size=2, tta=depth < height < width)
    autosam3d.write_segmentation(scan.with_name("organs.nii.gz"), found, model.recipe.labels, overwrite=False)
    return {name: found.volume_ml(label) for label, name in found.organs.items()}


def main() -> int:
    try:
        volumes = organs_of(Path("scan.nii.gz"), autosam3d.load_model("runs/openkbp", device="cuda"))
    except autosam3d.VolumeError as error:
        print(error.code, error.where, error.fault, error.remedy)
        return error.exit_code
    except AutoSam3dError as error:
        return error.exit_code
    largest: str = max(volumes, key=lambda name: volumes[name])
    labels = LabelMap(organs=("liver", "left_kidney", "right_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
    made = Segmentation(np.zeros((4, 5, 6), np.uint8), np.eye(4), organs=labels.by_index)
    again: Segmentation = autosam3d.read_segmentation("organs.nii.gz")
    score = autosam3d.evaluate_folder("results", "truth", labels=labels, tolerances_mm=(1.0, 2.0)).summary().dice
    print(largest, made.spacing_mm, again.shape, score, autosam3d.__version__.upper())
    return 0
'''
WRONG = '''\
import autosam3d
from autosam3d.labels import np

model = autosam3d.load_modl("runs/openkbp")
ct = autosam3d.read_ct(3)
'''
"""A foreign name out of a module of ours, a name that does not exist, a number for a path."""


def _install(folder: Path) -> None:
    """An environment with the wheel in it, built offline from a copy of the sources; the rest it has from this one."""
    source, wheels = folder.with_name("source"), folder.with_name("wheels")
    shutil.copytree(REPO / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    wheels.mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(wheels)], cwd=source, check=True, timeout=200,
                   capture_output=True)
    venv.create(folder, symlinks=os.name != "nt")
    packages = _packages(folder)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Not the .pth files there: an editable install of ours stays outside.
    (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")


def _packages(environment: Path) -> Path:
    (found,) = [*environment.glob("lib/python*/site-packages"), *environment.glob("Lib/site-packages")]
    return found


@pytest.fixture(scope="module")
def environment() -> Path:
    return made_once("wheel", _install)


def test_the_wheel_holds_the_types_the_version_and_the_data(environment: Path) -> None:
    packages, ours = _packages(environment), REPO / "src/autosam3d"
    assert (packages / "autosam3d/py.typed").is_file()
    assert (packages / f"autosam3d-{autosam3d.__version__}.dist-info").is_dir()
    kept = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kept == {path.relative_to(packages / "autosam3d") for path in (packages / "autosam3d").rglob("*")
                    if path.is_file()}


@pytest.mark.slow
def test_a_users_script_is_checked_against_the_wheel(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT, "utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, "utf-8")
    settings = {"include": ["*.py"], "typeCheckingMode": "basic", "reportPrivateImportUsage": "error"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    python = next(environment.glob("bin/python" if os.name != "nt" else "Scripts/python.exe"))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(python), "-p", str(tmp_path)],
        capture_output=True, text=True, timeout=200, cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == 2
    found = [(Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["rule"])
             for each in told["generalDiagnostics"]]
    assert sorted(found) == [
        ("wrong.py", 2, "reportPrivateImportUsage"),
        ("wrong.py", 4, "reportAttributeAccessIssue"),
        ("wrong.py", 5, "reportArgumentType"),
    ], told["generalDiagnostics"]
