"""Row 92: starts, stops, restarts, and two of a kind."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from running import Running, fault, outcome, running, send, until

from autosam3d.errors import ResourceError, UsageError
from autosam3d.services.serve.server import _own_folder
from autosam3d.services.serve.settings import SteadyClock
from autosam3d.services.serve.store import DONE, FAILED, MAX_ATTEMPTS, QUEUED, RUNNING, JobStore, SentTwice
from command_line import run
from exports import mini_export
from lock_holders import needs_locks
from on_disk import demand_as_told


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_sigterm_drains_and_what_waits_is_done_by_the_next(ct: Path, long_ct: Path, tmp_path: Path) -> None:
    with running(tmp_path / "one", "--set", "app=false") as service:
        with service.client() as client:
            at_work = send(client, long_ct, overlap=0.5, format="nifti")
            waits = send(client, ct)
            until(lambda: client.get(f"/jobs/{at_work}").json()["percent"] > 0)
            (worker,) = service.workers()
            assert service.stop() == 143
        assert _gone(worker) and (service.folder / "serve.lock").read_text() == ""
        assert not list((service.folder / "tmp").iterdir())
        again = Running(tmp_path / "one", "--set", "app=false")
        try:
            with again.client() as client:
                assert client.get(f"/jobs/{at_work}").json()["state"] == "done"
                assert outcome(client, waits)["state"] == "done"
        finally:
            assert again.stop(signal.SIGINT) == 130
        assert "Traceback" not in service.log.read_text()


def test_a_scan_that_will_not_end_waits_for_the_next_start(long_ct: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import autosam3d.services.serve.settings as s\n_init = s.ServeSettings.__init__\n"
        "s.ServeSettings.__init__ = lambda self, **told: _init(self, **{**told, 'drain_seconds': 1.0})\n")
    path = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    with running(tmp_path / "one", "--set", "app=false", env={"PYTHONPATH": path}) as service:
        with service.client() as client:
            job_id = send(client, long_ct, overlap=0.9)
            until(lambda: client.get(f"/jobs/{job_id}").json()["percent"] > 0)
        began = time.monotonic()
        assert service.stop() == 143
        assert time.monotonic() - began < 15
        store = JobStore(service.folder / "jobs.sqlite")
        job = store.get(job_id)
        store.close()
        assert job is not None and (job.state, job.attempts) == (QUEUED, 0)
        assert not (service.folder / "jobs" / job_id / "result").exists()
        assert (service.folder / "jobs" / job_id / "upload" / "scan.nii.gz").is_file()


def test_a_killed_service_begins_its_job_once_more_and_then_no_more(long_ct: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    job_id = ""
    for _ in range(MAX_ATTEMPTS):
        service = Running(folder, "--set", "app=false")
        with service.client() as client:
            job_id = job_id or send(client, long_ct, overlap=0.9)
            until(lambda c=client, j=job_id: c.get(f"/jobs/{j}").json()["percent"] > 0)
            workers = service.workers()
        (service.folder / "jobs" / ("B" * 22) / "upload").mkdir(parents=True)  # an upload that was cut by the kill
        assert service.stop(signal.SIGKILL) == -9
        until(lambda w=workers: all(map(_gone, w)), seconds=10)
    last = Running(folder, "--set", "app=false")
    try:
        with last.client() as client:
            answer = client.get(f"/jobs/{job_id}").json()
            assert answer["state"] == "failed" and answer["error"]["code"] == "INTERRUPTED"
            fault(client.get(f"/jobs/{job_id}/result"), 503, "INTERRUPTED")
        assert not (last.folder / "jobs" / ("B" * 22)).exists()
    finally:
        assert last.stop() == 143


@needs_locks
def test_a_folder_without_locks_is_refused(tmp_path: Path, no_locks: None) -> None:
    with pytest.raises(ResourceError) as caught, _own_folder(tmp_path / "state"):
        pass
    assert caught.value.code == "NO_LOCK" and "--folder" in caught.value.remedy


def test_the_permissions_of_a_folder_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(UsageError) as caught, _own_folder(tmp_path / "mine"):
        pass
    assert caught.value.code == "OUTPUT_EXISTS" and (tmp_path / "mine").stat().st_mode & 0o777 == 0o755


def test_two_of_a_kind_and_other_bad_places(service: Running, tmp_path: Path) -> None:
    port = service.address[1]
    line = run("serve", mini_export(), "--folder", service.folder, "--port", 0, env={"TMPDIR": str(tmp_path)})
    assert f"process {service.process.pid} on {socket.gethostname()}" in _refusal(line, "LOCKED", 2)
    _refusal(run("serve", mini_export(), "--folder", tmp_path / "a", "--port", port), "PORT_IN_USE", 2)
    _refusal(run("serve", mini_export(), "--folder", tmp_path / "a", "--workers", 0), "BAD_VALUE", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    _refusal(run("serve", mini_export(), "--folder", tmp_path / "mine", "--port", 0), "OUTPUT_EXISTS", 2)
    _refusal(run("serve", mini_export(), "--folder", tmp_path / "mine/notes.txt", "--port", 0), "OUTPUT_PATH", 2)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    _refusal(run("serve", tmp_path / "no_model", "--folder", tmp_path / "b", "--port", 0), "NO_MODEL", 4)
    other = tmp_path / "c"
    other.mkdir()
    (other / "serve.lock").write_text("process 7 on another.example\n")
    _refusal(run("serve", mini_export(), "--folder", other, "--port", 0), "LOCKED", 2)
    (other / "serve.lock").unlink()
    (other / "jobs.sqlite").write_bytes(b"no table" * 100)
    _refusal(run("serve", mini_export(), "--folder", other, "--port", 0), "STATE", 5)
    with service.client() as client:
        assert client.get("/health").status_code == 200


def _refusal(done, code: str, exit_code: int) -> str:
    """One error line; before it may stand that the model was being loaded."""
    lines = [line for line in done.err.splitlines() if line != "loading the model"]
    assert done.code == exit_code and len(lines) == 1 and lines[0].startswith(f"error[{code}] "), done.err
    return lines[0]


def test_folders_and_files_are_the_owners_alone(service: Running, ct: Path) -> None:
    with service.client() as client:
        job_id = send(client, ct)
        outcome(client, job_id)
        # The browser app is nobody's secret, and lies in a closed folder.
        paths = [service.folder, *(p for p in service.folder.rglob("*") if "web" not in p.parts)]
        demand_as_told("The folder of serve", service.folder, "jobs/ID/result/**", "web/**")
        client.delete(f"/jobs/{job_id}")
    assert len(paths) > 8
    assert [p for p in paths if p.exists() and p.stat().st_mode & 0o077] == []


def test_the_table_of_jobs(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    for name in "abc":
        store.add(name, QUEUED, {"n": name}, now=1.0, once=f"key-{name}")
    with pytest.raises(SentTwice):
        store.add("d", QUEUED, {}, now=1.0, once="key-a")
    assert store.num_queued == 3 and store.num_before(store.get("c")) == 2  # type: ignore[arg-type]
    first = store.take()
    assert first is not None and first.id == "a" and store.num_queued == 2
    store.end("a", DONE, {"x": 1}, now=5.0)
    second = store.take()
    store.close()
    assert second is not None and second.id == "b"
    again = JobStore(tmp_path / "jobs.sqlite")
    assert [again.get(name).state for name in "abc"] == [DONE, RUNNING, QUEUED]  # type: ignore[union-attr]
    again.recover(now=9.0)
    assert [again.get(name).state for name in "abc"] == [DONE, QUEUED, QUEUED]  # type: ignore[union-attr]
    taken = again.take()
    assert taken is not None and taken.id == "b"
    again.recover(now=9.0)
    job = again.get("b")
    assert job is not None and job.state == FAILED and job.outcome is not None and job.outcome["status"] == 503
    assert again.old(before=6.0) == ["a"] and again.old(before=5.0) == []
    again.remove("a")
    assert again.ids() == {"b", "c"}
    again.close()
    with pytest.raises(sqlite3.Error):
        again.take()
    (tmp_path / "x").write_text("x" * 5000)
    with pytest.raises(ResourceError, match="move the file away"):
        JobStore(tmp_path / "x")


def test_setting_the_clock_changes_no_age(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock()
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock.now() - before < 5
