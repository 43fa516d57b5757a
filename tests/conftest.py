"""What several tests share: where the real scans lie, and a user's cache of their own."""

from __future__ import annotations

import errno
import gc
import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# A shell that starts the tests in the background of a script lets them inherit an ignored SIGINT, and Python leaves it
# ignored; the tests are about programs that hear it, so they and all that they start get what a terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What `segment` keeps in the user's cache stays out of it, and out of the next run of the tests.
CACHE = tempfile.TemporaryDirectory(prefix="autosam3d-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
# What tests make once for all workers lies here: the process that starts the workers names the folder and removes it.
SHARED = None
if "AUTOSAM3D_TESTS" not in os.environ:
    SHARED = tempfile.TemporaryDirectory(prefix="autosam3d-tests-")
    os.environ["AUTOSAM3D_TESTS"] = SHARED.name

REPO = Path(__file__).resolve().parents[1]
REAL_DATA = REPO.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CTs; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real CTs are not beside this checkout (../shared/data)")
    return REAL_DATA


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files lie on a file system without locks, as some that are mounted over a network are."""
    from autosam3d.io import lock_file

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for name in ("flock", "lockf"):
        monkeypatch.setattr(lock_file.fcntl, name, refuse)


# Where .ci/run found all that tests need, a skipped test is a failure, but for these reasons: another platform, and
# what only some machines have.
MAY_BE_SKIPPED = ("real CT", "nnunetv2", "(extra mobile)", "needs node", "POSIX", "Windows", "Linux", "file system",
                  "another way", "this processor")


def pytest_collection_finish() -> None:
    gc.freeze()  # what all imports left behind is not looked through by every collection


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (os.environ.get("AUTOSAM3D_CI") and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not any(word in reason for word in MAY_BE_SKIPPED):
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {reason}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow files first, dealt to the workers of pytest-xdist: what one takes from another at the end is short then."""
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    if count == 1:
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:  # the browser's tests share a site and a browser
        groups.setdefault("web" if item.path.name.startswith("test_web") else str(item.path), []).append(item)
    cost = {name: sum(item.get_closest_marker("slow") is not None for item in group) for name, group in groups.items()}
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(filter(cost.get, groups), key=lambda name: -cost[name]):
        least = load.index(min(load))
        parts[least] += groups[name]
        load[least] += cost[name]
    rest = [item for name, group in groups.items() if not cost[name] for item in group]
    for index, part in enumerate(parts):  # each worker begins with as many tests as any other
        size = (len(items) - sum(map(len, parts[:index]))) // (count - index) - len(part)
        part += rest[: max(size, 0)]
        del rest[: max(size, 0)]
    items[:] = [item for part in parts for item in part]


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
pytest_plugins = ["web_browser", "soak_table"]
