"""The table of the long forms: a row a test, which the next run of that test replaces and others leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
_TESTS = """
def test_counted(figures):
    figures("T5", "ten kills", "10 of 10 | all", "fails")

def test_failed():
    assert {fails} == 0
"""


def test_each_test_has_its_latest_row(tmp_path: Path) -> None:
    table = tmp_path / "soak.md"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "AUTOSAM3D_"))}
    environment |= {"AUTOSAM3D_SOAK_TABLE": str(table), "PYTHONPATH": str(REPO / "tests"),
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = []
    for fails, share in (("1", "0.1"), ("0", "1")):
        (tmp_path / "test_made.py").write_text(_TESTS.replace("{fails}", fails))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "soak_table", "-p", "no:cacheprovider", "."],
                              cwd=tmp_path, env=environment | {"AUTOSAM3D_SOAK_SHARE": share}, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == int(fails), done.stdout + done.stderr
        found.append([line.strip("| ").split(" | ")[:7] for line in table.read_text().splitlines() if "::" in line])
    counted, failed = (f"test_made.py::test_{name}" for name in ("counted", "failed"))
    assert found == [[["T5", counted, "ten kills", "10 of 10 / all", "fails", "passed", share],
                      ["-", failed, "test failed", "", "", outcome, share]]
                     for share, outcome in (("0.1", "failed"), ("1", "passed"))]
