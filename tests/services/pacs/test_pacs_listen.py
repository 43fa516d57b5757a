"""The C-STORE listener beside real senders and a real archive: each series once, whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
pytest.importorskip("pynetdicom", reason="the pacs extra is not installed")

import make_dicom as bad
from listen_driver import MOMENTS, TITLE, Forge, Listener
from orthanc import Orthanc, free_port, running_orthanc
from senders import demand_dcmtk, echo, send
from test_pacs_orthanc import demand_right_sides, phantom
from typer.testing import CliRunner

from autosam3d.cli.pacs import app
from autosam3d.services.pacs.ledger import Ledger, SeriesJob

SECRETS = ("Doe", "4711", bad.SERIES_UID, "1.2.3 ")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    demand_dcmtk()
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture
def start(forge: Forge, orthanc: Orthanc, tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """Starts a listener beside an archive that is empty at first; what still runs is killed at the end."""
    orthanc.clear()
    started: list[Listener] = []

    def start(moment: str = "", to: str = f"ORTHANC@127.0.0.1:{orthanc.dicom_port}", **how: int) -> Listener:
        started.append(forge.start(tmp_path / "state", to, moment, **how))
        return started[-1]

    yield start
    for listener in started:
        try:
            os.kill(listener.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        listener.wait()


def the_job(state: Path) -> SeriesJob | None:
    ledger = Ledger(state / "ledger.sqlite", read_only=True)
    jobs = ledger.jobs()
    ledger.close()
    assert len(jobs) <= 1
    return jobs[0] if jobs else None


def wait_for(listener: Listener, wanted: Callable[[SeriesJob], bool]) -> SeriesJob:
    job = None
    for _ in range(600):
        job = the_job(listener.state)
        if job is not None and wanted(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job}\n{listener.log()}")


def is_done(job: SeriesJob) -> bool:
    return job.state == "done"


def test_a_series_that_is_sent_comes_back_once(orthanc: Orthanc, start: Callable[..., Listener], tmp_path: Path
                                               ) -> None:
    listener = start()
    series = phantom(tmp_path / "ct")
    assert echo(listener.port()) == 0
    assert send(listener.port(), series) == 0
    wait_for(listener, is_done)
    demand_right_sides(orthanc)
    assert send(listener.port(), series) == 0  # the same bytes: taken, and known
    time.sleep(1.0)
    assert listener.stop() == 128 + signal.SIGTERM
    listener = start()
    assert send(listener.port(), series) == 0
    time.sleep(1.0)
    demand_right_sides(orthanc)
    for path in (tmp_path / "state").rglob("*"):
        if "lock" not in path.name:
            assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700), path
        assert not any(secret in str(path) for secret in SECRETS)
    assert not list((tmp_path / "state/jobs").iterdir())
    told = CliRunner().invoke(app, ["status", "--state", str(tmp_path / "state"), "--json"]).stdout
    found = json.loads(told)
    assert found["incoming_series"] == 1 and not any(secret in told for secret in SECRETS)
    assert [(job["state"], job["slices"], job["results"]) for job in found["series"]] == [("done", 12, 2)]
    assert not any(secret in listener.log() for secret in SECRETS)


def test_orthanc_sends_and_takes_back_by_stow(orthanc: Orthanc, start: Callable[..., Listener], tmp_path: Path) -> None:
    listener = start(to=orthanc.dicomweb)
    orthanc.send(phantom(tmp_path / "ct"))
    orthanc.put("/modalities/listener", {"AET": TITLE, "Host": "127.0.0.1", "Port": int(listener.port())})
    (study,) = json.loads(orthanc.rest("/studies"))
    orthanc.rest("/modalities/listener/store", study.encode())
    wait_for(listener, is_done)
    demand_right_sides(orthanc)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_step_each_result_is_there_once(moment: str, orthanc: Orthanc, start: Callable[..., Listener],
                                                      tmp_path: Path) -> None:
    listener, series = start(moment), phantom(tmp_path / "ct")
    code = send(listener.port(), series)
    # Killed in the middle, it has not said of the last object that it has it; the sender knows.
    assert (code == 0) == (moment not in ("object received", "all received"))
    assert listener.wait() == -signal.SIGKILL
    stored = len(orthanc.objects("SEG")), len(orthanc.objects("RTSTRUCT"))
    assert stored == {"seg stored": (1, 0), "both stored": (1, 1)}.get(moment, (0, 0))
    listener = start()
    if moment == "object received":
        assert len(list((tmp_path / "state/incoming").rglob("*.dcm"))) == 7
        assert send(listener.port(), series) == 0
    job = wait_for(listener, is_done)
    assert job.num == bad.NUM_SLICES
    demand_right_sides(orthanc)
    assert listener.stop() == 128 + signal.SIGTERM


def test_slices_that_come_late_find_the_others_while_they_are_kept(orthanc: Orthanc, start: Callable[..., Listener],
                                                                   tmp_path: Path) -> None:
    listener, series = start(), phantom(tmp_path / "ct")
    assert send(listener.port(), series) == 0
    wait_for(listener, is_done)
    more = tmp_path / "more"
    more.mkdir()
    bad.save(bad.make_slice(12, np.full((bad.ROWS, bad.COLUMNS), 20, np.int16), 36.0), more / "12.dcm")
    assert send(listener.port(), more) == 0
    wait_for(listener, lambda job: job.num == 13 and is_done(job))
    assert len(orthanc.objects("SEG")) == len(orthanc.objects("RTSTRUCT")) == 2
    listener.stop()
    # The images are forgotten: a slice alone is no series, and this is said; sent whole, it is done.
    shutil.rmtree(next(p for p in (tmp_path / "state/incoming").iterdir() if p.name != "receiving"))
    bad.save(bad.make_slice(13, np.full((bad.ROWS, bad.COLUMNS), 20, np.int16), 39.0), more / "13.dcm")
    (more / "12.dcm").rename(series / "12.dcm")
    listener = start()
    assert send(listener.port(), more) == 0
    job = wait_for(listener, lambda job: job.code == "LATE")
    assert is_done(job) and job.num == 13
    assert send(listener.port(), series) == 0
    wait_for(listener, lambda job: job.num == 14 and is_done(job))
    assert len(orthanc.objects("SEG")) == 3


def test_an_archive_that_is_away(orthanc: Orthanc, start: Callable[..., Listener], tmp_path: Path) -> None:
    listener = start(to=f"ORTHANC@127.0.0.1:{free_port()}")
    assert send(listener.port(), phantom(tmp_path / "ct")) == 0
    wait_for(listener, lambda job: (job.state, job.code) == ("segmented", "SERVER_DOWN"))
    listener.stop()
    wait_for(start(), is_done)
    demand_right_sides(orthanc)


def test_a_disk_that_is_full(orthanc: Orthanc, start: Callable[..., Listener], tmp_path: Path) -> None:
    listener, folder = start(max_file_bytes=100_000), tmp_path / "large"
    folder.mkdir()
    bad.save(bad.make_slice(0, np.zeros((512, 512), np.int16), 0.0), folder / "0.dcm")
    assert send(listener.port(), folder) != 0
    assert echo(listener.port()) == 0
    assert not list((tmp_path / "state/incoming/receiving").iterdir())
    assert "0xA700" in listener.log()


def test_two_listeners_on_one_state_folder(orthanc: Orthanc, start: Callable[..., Listener], tmp_path: Path) -> None:
    first = start()
    first.port()
    second = start()
    assert second.wait() == 1 and "error[LOCKED]" in second.log()
