"""benchmarks/compare_runs.py: the same cases and organs for all models, and its faults in one line."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.errors import UsageError, VolumeError
from autosam3d.evaluation.evaluate import evaluate_folder, write_json

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/compare_runs.py"


@pytest.fixture
def compare_runs(tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("compare_runs", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RESULTS = tmp_path
    return module


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    """Evaluations of equal predictions: A of six cases, B of five of them, C of one, D of another."""
    for case in range(7):
        labels = np.zeros((16, 16, 12), np.uint8)
        labels[2:10, 2:10, 2:10] = 1
        labels[10:14, 10:14, 2:6] = 2
        _save(tmp_path / "truth" / f"c{case}.nii.gz", labels)
        labels[2 : 3 + case % 3, 2:10, 2:10] = 0
        labels[13, 10:14, 2:6] = 0
        for run, cases in (("A", range(6)), ("B", range(1, 6)), ("C", (5,)), ("D", (6,))):
            if case in cases:
                _save(tmp_path / run / f"c{case}.nii.gz", labels)
    found = {}
    for run in "ABCD":
        (tmp_path / f"e{run}").mkdir()
        result = evaluate_folder(tmp_path / run, tmp_path / "truth", labels={1: "liver", 2: "spleen"})
        write_json(result, tmp_path / f"e{run}/scores.json")
        found[run] = f"{run}={tmp_path}/e{run}"
    return found


def _save(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1])), path)


def _cells(page: Path) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()
            if line.startswith(("| A |", "| B |", "| C |"))]
    return {row[0]: row[1:] for row in rows}


def test_equal_predictions_have_equal_rows_on_the_cases_that_both_have(compare_runs: Any, runs: dict[str, str],
                                                                       tmp_path: Path) -> None:
    compare_runs.main("x", runs["A"], runs["B"])
    cells = _cells(tmp_path / "x.md")
    assert cells["A"] == cells["B"]
    dice = [2 * 8 - 2 * (1 + case % 3) for case in range(1, 6)]  # twice the slices that are left of 8
    liver = np.mean([d / (8 + 8 - (1 + case % 3)) for d, case in zip(dice, range(1, 6), strict=True)])
    assert float(cells["A"][1]) == pytest.approx(liver, abs=5e-4) and float(cells["A"][2]) == pytest.approx(0.857)
    assert "n = 5" in (tmp_path / "x.md").read_text()
    assert "left out: 1 of A." in (tmp_path / "x.md").read_text()


def test_one_common_case_has_no_interval(compare_runs: Any, runs: dict[str, str], tmp_path: Path) -> None:
    compare_runs.main("y", runs["A"], runs["C"])
    assert _cells(tmp_path / "y.md")["C"][0].endswith("(one case)")
    assert "| A minus C | +0.0000 (one case) |" in (tmp_path / "y.md").read_text()


def test_faults_are_one_line(compare_runs: Any, runs: dict[str, str], tmp_path: Path) -> None:
    for words, told in (((runs["A"], runs["A"]), "got A twice"), ((str(tmp_path / "eA"),), "expected NAME=FOLDER"),
                        ((runs["A"], runs["D"]), "a case in common, got none"), ((), "got no folder")):
        with pytest.raises(UsageError, match=told):
            compare_runs.main("z", *words)
    shutil.rmtree(tmp_path / "eB")
    with pytest.raises(VolumeError) as caught:
        compare_runs.main("z", runs["A"], runs["B"])
    assert caught.value.code == "UNREADABLE" and not (tmp_path / "z.md").exists()
