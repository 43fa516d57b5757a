"""How much memory a scan takes: what is planned, refused, and really held by a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import ResourceError
from autosam3d.inference import memory
from autosam3d.inference.memory import MemoryPlan, fit_memory
from autosam3d.io import write_ct
from autosam3d.scans.open_model import demand_model_ram
from autosam3d.volume import Volume
from command_line import write_model

MIB = 1 << 20
# Between the runs of one command the resident set differs by the placing of libraries and by what threads happen to
# hold: measured 0.4 MiB. Whole pages of a few libraries may be mapped or not.
_SPREAD = 4 * MIB
PLAN = MemoryPlan(process=300 * MIB, scan=100 * MIB, prepared=50 * MIB, accumulator=40 * MIB, slabs=0, labels=0,
                  predict=0)


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_lives_in_memory", lambda folder: True)


def test_a_limit_counts_the_program_and_free_memory_does_not(no_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PLAN.total == pytest.approx((300 + 32 + 1.1 * 190) * MIB, abs=1)
    assert fit_memory(PLAN, PLAN, PLAN.total, "scan") is PLAN
    least = replace(PLAN, accumulator=20 * MIB, half=True).total
    with pytest.raises(ResourceError) as caught:
        fit_memory(PLAN, PLAN, least - 1, "scan")
    assert caught.value.fault.startswith(f"needs {least / MIB:.1f} MiB of memory at least, 300.0 MiB of them ")

    # What is held already, the program and the scan, needs no room any more.
    held = PLAN.process + PLAN.scan
    monkeypatch.setattr(memory, "available_ram_bytes", lambda: PLAN.total - held)
    assert fit_memory(PLAN, PLAN, None, "scan") is PLAN
    monkeypatch.setattr(memory, "available_ram_bytes", lambda: least - held - 1)
    with pytest.raises(ResourceError) as caught:
        fit_memory(PLAN, PLAN, None, "scan")
    assert caught.value.fault.startswith(f"needs {(least - held) / MIB:.1f} MiB more memory at least, ")
    assert caught.value.fault.endswith(" are free")


def test_a_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    demand_model_ram(tmp_path / "best.json", 64 << 30)
    with pytest.raises(ResourceError, match="loading the model needs") as caught:
        demand_model_ram(tmp_path / "best.json", 10 * MIB)
    assert caught.value.where == str(tmp_path / "best.json")


# Coarse windows over a fine scan: the scan and its labels are most of the plan. And the other way round.
_MODELS = {
    "scan": ({"preprocess__spacing_mm": [4.0, 4.0, 4.0], "model__patch_size": [32, 32, 32]}, (128, 288, 288)),
    "windows": ({"preprocess__spacing_mm": [2.0, 2.0, 2.0], "model__patch_size": [64, 64, 64]}, (40, 150, 150)),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a child is told in KiB on Linux")
@pytest.mark.parametrize("kind", ["windows", pytest.param("scan", marks=pytest.mark.soak)])
def test_a_process_stays_below_max_ram_or_refuses(kind: str, tmp_path: Path) -> None:
    changes, shape = _MODELS[kind]
    write_model(tmp_path, inference__overlap=0.0, **changes)
    write_scan(tmp_path / "scan.nii.gz", shape)
    refused, _, error = segment(tmp_path, "probe", 400 * MIB)
    assert refused == 5
    least = mib_after("needs", error)
    assert mib_after("least,", error) > 100 and "400.0 MiB are allowed" in error

    if kind == "windows":  # the scale is one and the same
        code, _, error = segment(tmp_path, "below", least * MIB - _SPREAD)
        assert code == 5 and mib_after("needs", error) == pytest.approx(least, abs=_SPREAD / MIB)
        assert not (tmp_path / "below").exists()

    limit = int(least * MIB) + _SPREAD
    code, peak, error = segment(tmp_path, "fits", limit)
    assert code == 0, error
    assert peak < limit, f"{peak / MIB:.1f} MiB taken, {limit / MIB:.1f} allowed"
    assert peak > 0.8 * limit  # the plan is no wild guess either


def write_scan(path: Path, shape: tuple[int, int, int]) -> None:
    """Soft tissue in air, stored in another order than the one in memory, so that writing has to turn it round."""
    rng = np.random.default_rng(0)
    hu = np.full(shape, -1000, np.float32)
    hu[:, shape[1] // 6 : -shape[1] // 6, shape[2] // 6 : -shape[2] // 6] = 40
    hu += rng.integers(-20, 20, shape)
    write_ct(path, Volume(hu, np.diag([1.5, 1.5, 2.0, 1.0])), axis_codes="LPS")


# A forked process counts what its parent held until it became another program: so the parent is one that holds little.
_MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


def segment(folder: Path, out: str, max_ram_bytes: float) -> tuple[int, int, str]:
    """(exit code, most bytes resident, stderr) of a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": "/dev/shm"}  # sums on disk would not show here
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, sys.executable, "-m", "autosam3d", "segment", folder, folder / "scan.nii.gz",
         folder / out / "o.nii.gz", "--device", "cpu", "--threads", "1", "--max-ram", str(max_ram_bytes / (1 << 30))],
        capture_output=True, text=True, env=environment, timeout=200, check=True,
    )
    return *json.loads(done.stdout), done.stderr


def mib_after(word: str, text: str) -> float:
    found = re.search(rf"{word} ([0-9.]+) MiB", text)
    assert found, text
    return float(found[1])
