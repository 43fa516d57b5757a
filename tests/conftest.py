"""What several tests share: where the real scans lie, and a user's cache of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# What `segment` keeps in the user's cache stays out of it, and out of the next run of the tests.
CACHE = tempfile.TemporaryDirectory(prefix="autosam3d-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

REPO = Path(__file__).resolve().parents[1]
REAL_DATA = REPO.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CTs; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real CTs are not beside this checkout (../shared/data)")
    return REAL_DATA


# Where .ci/run found all that tests need, a skipped test is a failure, but for these reasons: another platform, and
# what only some machines have.
MAY_BE_SKIPPED = ("real CT", "nnunetv2", "(extra mobile)", "needs node", "POSIX", "Windows", "Linux", "file system",
                  "another way")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (os.environ.get("AUTOSAM3D_CI") and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not any(word in reason for word in MAY_BE_SKIPPED):
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
pytest_plugins = ["web_browser"]
