"""A folder is held by one process, which is told to whoever else comes; and file systems without locks."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

import pytest

from autosam3d.errors import ResourceError, UsageError
from autosam3d.io import lock_file
from autosam3d.io.folders import make_folder
from autosam3d.io.lock_file import hold_folder
from lock_holders import held_by_another, needs_locks, outlived_by_a_stage


@needs_locks
@pytest.mark.parametrize("inherit", [False, True])
def test_whoever_comes_second_is_told_who_is_there(tmp_path: Path, inherit: bool) -> None:
    with held_by_another(tmp_path / "a", "work.lock", inherit=inherit) as holder:
        with pytest.raises(UsageError) as caught, hold_folder(
            tmp_path / "a", "work.lock", what="run folder", option="--out", inherit=inherit
        ):
            pass
        assert caught.value.code == "LOCKED" and caught.value.exit_code == 2
        assert caught.value.fault == ("expected a run folder that no process works in, got one that is held by process "
                                      f"{holder.pid} on {socket.gethostname()}")
        assert caught.value.remedy == "wait for its end, or name another folder with --out"
    assert (tmp_path / "a/work.lock").read_text() == ""  # it ended in order
    with hold_folder(tmp_path / "a", "work.lock", inherit=inherit):
        assert (tmp_path / "a/work.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert (tmp_path / "a/work.lock").read_text() == ""


@needs_locks
@pytest.mark.parametrize("inherit", [False, True])
def test_a_holder_that_is_killed_holds_no_longer(tmp_path: Path, inherit: bool) -> None:
    with held_by_another(tmp_path, "work.lock", inherit=inherit) as holder:
        holder.kill()
        holder.wait(60)
        with hold_folder(tmp_path, "work.lock", inherit=inherit):
            pass


@needs_locks
def test_a_stage_that_has_inherited_the_folder_keeps_it(tmp_path: Path) -> None:
    with outlived_by_a_stage(tmp_path, "work.lock", inherit=True):
        with pytest.raises(UsageError) as caught, hold_folder(tmp_path, "work.lock", inherit=True):
            pass
        assert caught.value.code == "LOCKED"
    for _ in range(100):
        try:
            with hold_folder(tmp_path, "work.lock", inherit=True):
                return
        except UsageError:
            time.sleep(0.1)
    pytest.fail("the folder was held after the stage had ended")


@needs_locks
def test_a_child_of_a_process_that_holds_alone_holds_nothing(tmp_path: Path) -> None:
    with outlived_by_a_stage(tmp_path, "work.lock", inherit=False), hold_folder(tmp_path, "work.lock") as held:
        assert held.descriptors == ()


@needs_locks
@pytest.mark.parametrize("inherit", [False, True])
def test_without_locks_work_goes_on_where_only_a_double_start_is_lost(
    tmp_path: Path, no_locks: None, caplog: pytest.LogCaptureFixture, inherit: bool
) -> None:
    with caplog.at_level(logging.INFO), hold_folder(tmp_path / "a", "work.lock", inherit=inherit) as held:
        assert held.descriptors == () and (tmp_path / "a/work.lock").read_text().startswith("process ")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "cannot be locked (No locks available)" in caplog.text


@needs_locks
def test_without_locks_work_that_must_not_be_shared_is_refused(tmp_path: Path, no_locks: None) -> None:
    with pytest.raises(ResourceError) as caught, hold_folder(tmp_path, "work.lock", option="--state", demand_lock=True):
        pass
    assert caught.value.code == "NO_LOCK" and "No locks available" in caught.value.fault
    assert caught.value.remedy == "name another folder with --state, on a local disk"
    assert (tmp_path / "work.lock").read_text() == ""


def test_the_signature_of_another_machine_is_believed_where_that_is_asked_for(tmp_path: Path) -> None:
    signature = "process 7 on another.example\n"
    (tmp_path / "work.lock").write_text(signature)
    with pytest.raises(UsageError) as caught, hold_folder(tmp_path, "work.lock", believe_signature=True):
        pass
    assert caught.value.code == "LOCKED" and "process 7 on another.example" in caught.value.fault
    assert f"remove {tmp_path / 'work.lock'}" in caught.value.remedy
    assert (tmp_path / "work.lock").read_text() == signature
    (tmp_path / "work.lock").write_text(f"process 7 on {socket.gethostname()}\n")  # it crashed: its lock would say so
    with hold_folder(tmp_path, "work.lock", believe_signature=True):
        pass
    (tmp_path / "work.lock").write_text(signature)
    with hold_folder(tmp_path, "work.lock"):
        pass


def test_windows_turns_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "fcntl", None)
    with hold_folder(tmp_path / "a", "work.lock", inherit=True, demand_lock=True) as held:
        assert held.descriptors == ()


def test_places_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder/work.lock").mkdir(parents=True)
    for folder, code, status in ((tmp_path / "file", "OUTPUT_PATH", 2), (tmp_path / "file/below", "OUTPUT_PATH", 2),
                                 (tmp_path / "folder", "NOT_WRITABLE", 5)):
        with pytest.raises((UsageError, ResourceError)) as caught, hold_folder(folder, "work.lock", option="--out"):
            pass
        assert (caught.value.code, caught.value.exit_code) == (code, status)
        assert caught.value.remedy == "name another folder with --out"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_is_closed_also_where_it_was_open(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "as_it_is").mkdir(mode=0o711)
    make_folder(tmp_path / "open", mode=0o700)
    make_folder(tmp_path / "new/below", mode=0o700)
    make_folder(tmp_path / "as_it_is")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("open", "new/below", "as_it_is")] == [
        0o700, 0o700, 0o711]
