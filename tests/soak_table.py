"""A plugin of pytest: what `make soak` did, test by test, as the table benchmarks/results/soak.md.

A long form says with the fixture `figures` what it did, how often, and what its control arm showed: the same measure on
a way of working that must fail, without which a test that passes says little. AUTOSAM3D_SOAK_TABLE names the table to
write; rows of tests that did not run this time stay as they are. AUTOSAM3D_SOAK_SHARE runs a share of each count.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SHARE = float(os.environ.get("AUTOSAM3D_SOAK_SHARE", "1"))
_NAMES = ("id", "done", "counts", "control")
_HEAD = """# The long forms of the tests

Written by `make soak`, a row a test; how the ids are meant, and what must come out, say the tests. A share other
than 1 did so much of the counts. *Control arm*: the same measure where it must find a fault.

| id | test | what was done | counts | control arm | outcome | share | seconds | date | machine |
|---|---|---|---|---|---|---|---|---|---|
"""
_rows: dict[str, str] = {}


def share_of(count: int, least: int = 1) -> int:
    """`count`, or as much of it as AUTOSAM3D_SOAK_SHARE leaves, `least` at least."""
    return max(min(least, count), round(count * SHARE))


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Call it as ``figures("T5", done, counts, control)`` for the row of this test."""

    def tell(*told: object) -> None:
        for name, value in zip(_NAMES, (*told, *["none"] * len(_NAMES)), strict=False):
            record_property(name, value)

    return tell


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each worker of pytest-xdist sends its reports to the process that writes the table."""
    if "AUTOSAM3D_SOAK_TABLE" not in os.environ or report.skipped or (report.when != "call" and not report.failed):
        return
    told = {"id": "-", "done": report.nodeid.rpartition("::")[2].replace("_", " "), "counts": "", "control": ""}
    told |= {name: str(value) for name, value in report.user_properties if name in _NAMES}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    cells = [told["id"], report.nodeid, told["done"], told["counts"], told["control"], report.outcome, f"{SHARE:g}",
             f"{report.duration:.0f}", today, _machine()]
    _rows[report.nodeid] = "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _rows or hasattr(session.config, "workerinput"):
        return
    path = Path(os.environ["AUTOSAM3D_SOAK_TABLE"])
    rows = dict(_rows_of(path.read_text("utf-8"))) if path.exists() else {}
    rows |= _rows
    path.write_text(_HEAD + "".join(f"{row}\n" for row in sorted(rows.values(), key=_order)), "utf-8")


def _rows_of(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        cells = line.split(" | ")
        if len(cells) > 2 and "::" in cells[1]:
            yield cells[1], line


def _order(row: str) -> tuple[int, str]:
    """T5 before T10, and what has no such name behind them."""
    number = "".join(c for c in row.split(" | ")[0] if c.isdigit())
    return int(number or 1000), row


def _machine() -> str:
    """The processor's name alone."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return f"{(names or [platform.processor() or 'unknown'])[0]}, {os.cpu_count()} cores"
