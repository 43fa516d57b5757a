"""Where the package keeps things of its own, with and without a home."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from autosam3d import user_folders
from autosam3d.cli.home import settle_home
from autosam3d.user_folders import cache_folder, state_folder


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No folder is named by the environment, and temporary files lie in a folder of the test."""
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    user_folders._temporary.cache_clear()
    user_folders._own_temporary.cache_clear()
    return tmp_path


@pytest.mark.parametrize("system, expected", [
    ("linux", "/home/u/.cache/autosam3d"), ("darwin", "/home/u/Library/Caches/autosam3d"),
    ("win32", "/home/u/local/autosam3d/Cache"),
])
def test_the_cache_lies_where_the_platform_wants_it(
    monkeypatch: pytest.MonkeyPatch, system: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("LOCALAPPDATA", "/home/u/local")
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(user_folders, "may_be_made", lambda folder: True)
    assert cache_folder() == Path(expected)


def test_a_folder_that_is_named_counts_where_it_is_absolute(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(nowhere / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "named"))
    monkeypatch.setenv("XDG_STATE_HOME", "beside")
    assert cache_folder() == nowhere / "named" / "autosam3d"
    assert state_folder() == nowhere / "home" / ".local" / "state" / "autosam3d"


def test_a_home_that_cannot_be_written_is_stood_in_for_and_said_once(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (nowhere / "file").touch()
    monkeypatch.setenv("HOME", str(nowhere / "file"))  # nothing can be made below a file, by root neither
    expected = nowhere / "tmp" / f"autosam3d-{os.getuid()}" / "cache"
    assert cache_folder() == cache_folder() == expected
    assert expected.is_dir() and stat.S_IMODE(expected.parent.stat().st_mode) == 0o700
    assert [r.getMessage() for r in caplog.records] == [
        f"the cache is {expected}, because {nowhere}/file/.cache/autosam3d cannot be written; set XDG_CACHE_HOME to "
        "keep it elsewhere"]


@pytest.mark.parametrize("taken", ["link", "open to all"])
def test_a_temporary_folder_of_someone_else_is_not_used(nowhere: Path, monkeypatch: pytest.MonkeyPatch, taken: str
                                                        ) -> None:
    monkeypatch.setenv("HOME", "")
    place = nowhere / "tmp" / f"autosam3d-{os.getuid()}"
    monkeypatch.setattr(user_folders, "_home", lambda: None)
    if taken == "link":
        (nowhere / "theirs").mkdir(mode=0o700)
        place.symlink_to(nowhere / "theirs")
    else:
        place.mkdir()
        place.chmod(0o777)
    folder = cache_folder()
    assert folder.parent != place and folder.parent.parent == nowhere / "tmp"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_who_has_a_home_keeps_it(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("LOGNAME", "someone")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    before = dict(os.environ)
    settle_home()
    assert dict(os.environ) == before | {"MPLCONFIGDIR": str(nowhere / ".cache" / "autosam3d" / "matplotlib")}


_NAMELESS = """
import getpass, os, sys
import autosam3d.user_folders as folders
from autosam3d.cli.home import settle_home
try:
    getpass.getuser(); sys.exit("this uid has a name")
except (KeyError, OSError):
    pass
settle_home()
print(os.path.expanduser("~"), getpass.getuser(), folders.cache_folder(), folders.state_folder(), sep="\\n")
"""


def test_a_uid_without_a_name_and_a_home(nowhere: Path) -> None:
    """As containers run: `docker --user 54321`."""
    alone = [shutil.which("unshare") or "unshare", "-U", "--map-user=54321", "--map-group=54321"]
    if sys.platform != "linux" or not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("needs Linux that lets a user have a namespace of his own (unshare -U)")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "TMPDIR": str(nowhere / "tmp")}
    done = subprocess.run([*alone, sys.executable, "-c", _NAMELESS], env=env, cwd=nowhere, capture_output=True,
                          text=True)
    own = nowhere / "tmp" / "autosam3d-54321"
    assert done.stdout.splitlines() == [str(own / "no-home"), "uid54321", str(own / "cache"), str(own / "state")], (
        done.stderr)
    assert sorted(p.name for p in nowhere.iterdir()) == ["tmp"]  # no folder that is named ~
