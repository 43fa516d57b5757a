"""docs/bad-input.md is true: its tests exist, and it names the code word and exit code of every broken series."""

from __future__ import annotations

import json
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs/bad-input.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()
        if re.match(r"\| (\d+|T\d+) \|", line)]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", PAGE)
    assert len(named) > 60
    for path, name in named:
        assert not name or f"def {name}(" in (REPO / path).read_text("utf-8"), f"{path}::{name}"


def test_rows_are_there_and_each_has_a_test() -> None:
    firsts = {row[0] for row in ROWS}
    assert firsts >= {*map(str, (*range(45, 70), 91, 92)), *(f"T{n}" for n in (11, 12, 13, 15, 16, 17, 21, 23))}
    assert [row[0] for row in ROWS if not re.search(r"BROKEN|ODD|::test_", row[-1])] == []


def test_codes_and_cases_are_those_of_the_makers() -> None:
    listed = json.loads((REPO / "tests/badinput/MANIFEST.json").read_text("utf-8"))["dicom"]
    makers = [(REPO / "tests/badinput" / name).read_text("utf-8") for name in ("make_dicom.py", "make_field.py")]
    odd = {row for text in makers for row in re.findall(r'^    "(\d\d)_\w+": \(', text.partition("\nODD:")[2], re.M)}
    for row, _, answer, tests in (row for row in ROWS if len(row) == 4):
        told = {(case["code"], case["exit"]) for name, case in listed.items() if name.startswith(f"{row}_")}
        assert all(code in answer and f"exit {status}" in answer for code, status in told), row
        assert (f"BROKEN {row}" in tests) == bool(told), row
        assert (f"ODD {row}" in tests) == (row in odd), row
