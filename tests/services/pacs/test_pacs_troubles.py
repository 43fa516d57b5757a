"""A study that cannot be looked at is told, passed over and tried again; the others are done all the same."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")
pytest.importorskip("requests", reason="the pacs extra is not installed")

import make_dicom as bad

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.services.pacs import arrivals
from autosam3d.services.pacs.arrivals import Arrivals
from autosam3d.services.pacs.dicomweb import DicomWeb, Limits
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.incoming import Incoming
from autosam3d.services.pacs.ledger import DONE, Ledger, Retry
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService
from autosam3d.services.pacs.state_folder import StateFolder
from autosam3d.services.pacs.troubles import Troubles
from autosam3d.services.pacs.watch import Watch, look, run_forever, run_once

SICK, WELL = "1.2.1", "1.2.2"
QUICK = Limits(read_seconds=30, answer_seconds=2, rate_seconds=0.3, max_json_bytes=1 << 20)


def _uid(tag: str, value: object) -> dict:
    return {tag: {"vr": "UI", "Value": [value]}, "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]}}


def _json(*items: object) -> bytes:
    return json.dumps(items).encode()


class Archive(BaseHTTPRequestHandler):
    """Two studies of one series of twelve objects each; `bad` says what is answered where, as a status and a body."""

    protocol_version = "HTTP/1.1"
    bad: dict[str, tuple[int, bytes]]
    headers_of: dict[bytes, str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        parts = path.removeprefix("/d/").split("/")
        where = "/".join(part for part in parts if not part.startswith("2.25"))
        if where in type(self).bad:
            status, content = type(self).bad[where]
        elif "offset=" in query and "offset=0" not in query:
            status, content = 204, b""
        elif parts == ["studies"]:
            count = {"00201208": {"Value": [12]}}
            status, content = 200, _json(*(_uid("0020000D", uid) | count for uid in (SICK, WELL)))
        elif parts[-1] == "series":
            status, content = 200, _json(_uid("0020000E", f"2.25.{parts[1]}") | {"00080060": {"Value": ["CT"]},
                                                                                "00201209": {"Value": [12]}})
        else:
            status, content = 200, _json(*(_uid("00080018", f"{parts[3]}.{n}") for n in range(12)))
        self.send_response(status)
        if content[:2] == b"\x1f\x8b":
            self.send_header("Content-Encoding", "gzip")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/evil")
        cut, drips, stops = (content.endswith(word) for word in (b"CUT", b"DRIP", b"STOP"))
        self.send_header("Content-Length", str(len(content) + 1000 * (cut or drips or stops)))
        self.end_headers()
        self.wfile.write(content)
        if cut:
            self.close_connection = True
        if stops:
            time.sleep(1.5)
        stop = threading.Event()
        while drips and not stop.wait(0.02):
            try:
                self.wfile.write(b" ")
            except OSError:
                return

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def archive() -> Iterator[DicomWeb]:
    Archive.bad = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield DicomWeb(f"http://127.0.0.1:{server.server_port}/d", limits=QUICK)
    server.shutdown()
    server.server_close()


class NoSegmenter:
    def segment(self, series: Path, folder: Path) -> list[Path]:
        (folder / "a").write_bytes(b"a")
        return [folder / "a"]


class NoSink:
    def put(self, path: Path) -> None: ...


class Beside:
    """A service whose clock is ours, and whose fetching is a stand-in."""

    def __init__(self, folder: Path, archive: DicomWeb | None) -> None:
        self.state, self.clock = StateFolder(folder / "state"), 1000.0
        for path in (self.state.incoming, self.state.path / "jobs"):
            path.mkdir(parents=True)
        self.ledger = Ledger(self.state.ledger)
        self.service = ArchiveService(self.state, self.ledger, NoSegmenter(), NoSink(), archive, now=lambda: self.clock)
        self.service._fetch = lambda job: self.state.series(job.id).mkdir(parents=True)  # type: ignore[method-assign]

    def studies(self) -> set[str]:
        return {job.study for job in self.ledger.jobs()}


@pytest.fixture
def beside(archive: DicomWeb, tmp_path: Path) -> Beside:
    return Beside(tmp_path, archive)


WATCH = Watch(rule=Rule(), model="m", settings="{}", settle_seconds=0, poll_seconds=1)
SERIES, IMAGES = f"studies/{SICK}/series", f"studies/{SICK}/series/instances"
HTML = b"<html>Doe^Jane</html>"
ODD_UID = _uid("0020000E", "../../etc") | {"00080060": {"Value": ["CT"]}}
FAULTS = {
    "series 500": (SERIES, 500, b"Doe^Jane", "SERVER_STATUS"),
    "series 403": (SERIES, 403, b"", "AUTH"),
    "series 404": (SERIES, 404, b"", "SERVER_NOT_FOUND"),
    "series redirected": (SERIES, 302, b"", "SERVER_STATUS"),
    "series HTML": (SERIES, 200, HTML, "BROKEN_ANSWER"),
    "series no list": (SERIES, 200, b'{"a": 1}', "BROKEN_ANSWER"),
    "series no UTF-8": (SERIES, 200, b'["\xff"]', "BROKEN_ANSWER"),
    "series deep": (SERIES, 200, b"[" * 200_000, "BROKEN_ANSWER"),
    "series large": (SERIES, 200, b" " * (2 << 20), "ANSWER_TOO_LARGE"),
    "series bomb": (SERIES, 200, gzip.compress(bytes(4 << 20)), "ANSWER_TOO_LARGE"),
    "series no gzip": (SERIES, 200, b"\x1f\x8b" + b"x" * 50, "BROKEN_ANSWER"),
    "series cut": (SERIES, 200, b'[{"0020000E":CUT', "BROKEN_ANSWER"),
    "series dripping": (SERIES, 200, b"[DRIP", "SERVER_SLOW"),
    "series that stop": (SERIES, 200, b"[STOP", "SERVER_SLOW"),
    "series without UID": (SERIES, 200, _json(ODD_UID), "BROKEN_ANSWER"),
    "series that are numbers": (SERIES, 200, _json(1, None, [], {}), "BROKEN_ANSWER"),
    "images 500": (IMAGES, 500, b"", "SERVER_STATUS"),
    "images HTML": (IMAGES, 200, HTML, "BROKEN_ANSWER"),
    "images without UID": (IMAGES, 200, _json(_uid("00080018", "1.2.3.bad")), "BROKEN_ANSWER"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_others_are_done_and_the_sick_one_later(name: str, archive: DicomWeb, beside: Beside,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    where, status, content, code = FAULTS[name]
    Archive.bad = {where: (status, content)}
    troubles = Troubles()
    with caplog.at_level(logging.INFO, "autosam3d"):
        assert look(beside.service, archive, WATCH, troubles) == 1
        assert beside.studies() == {WELL} and len(troubles) == 1
        while beside.service.work_once():
            pass
        assert [job.state for job in beside.ledger.jobs()] == [DONE]
        beside.clock += 0.5
        Archive.bad = {}
        assert look(beside.service, archive, WATCH, troubles) == 0  # put off
        beside.clock += 10.0
        assert look(beside.service, archive, WATCH, troubles) == 1
    assert beside.studies() == {SICK, WELL} and len(troubles) == 0
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2 and "passed over" in told[0] and "can be looked at again" in told[1], told
    assert code in told[0]
    assert not any(secret in caplog.text for secret in ("Doe", SICK, "2.25"))


def test_of_a_study_the_good_series_are_taken(archive: DicomWeb, beside: Beside) -> None:
    good = _uid("0020000E", "2.25.7") | {"00080060": {"Value": ["CT"]}, "00201209": {"Value": [12]}}
    Archive.bad = {SERIES: (200, _json(ODD_UID, good, "x"))}
    troubles = Troubles()
    assert look(beside.service, archive, WATCH, troubles) == 2 and len(troubles) == 1
    assert {job.series for job in beside.ledger.jobs()} == {"2.25.7", f"2.25.{WELL}"}


def test_studies_without_a_uid_hide_no_others(archive: DicomWeb, beside: Beside) -> None:
    """A whole page of them, and the good ones on the next."""
    odd = [_uid("0020000D", f"1.2.bad.{n}") for n in range(100)]
    asked = []

    def page(path: str, wish: dict) -> list:
        if path != "studies":
            return whole(path, wish)
        asked.append(wish["offset"])
        return odd if wish["offset"] == "0" else [_uid("0020000D", WELL)] if wish["offset"] == "100" else []

    whole, archive._page = archive._page, page  # type: ignore[method-assign]
    with pytest.raises(ArchiveError) as caught:
        look(beside.service, archive, WATCH, Troubles())
    assert caught.value.partial and "100 of 101" in caught.value.fault
    assert beside.studies() == {WELL} and asked == ["0", "100", "101"]


class Enough(Exception):
    """The test has seen enough."""


def _rounds(num: int, beside: Beside, seconds: list[float]) -> Callable[[float], None]:
    def sleep(pause: float) -> None:
        seconds.append(pause)
        beside.clock += pause
        if len(seconds) == num:
            raise Enough

    return sleep


@pytest.mark.parametrize(("status", "content", "does_work", "grows"), [
    (200, HTML, True, True), (500, b"", True, True), (200, b"[" * 200_000, True, True), (200, b'[{"CUT', True, True),
    (200, _json(_uid("0020000D", "bad")), True, False), (401, b"", False, True),
])
def test_work_that_was_taken_up_goes_on_under_a_broken_list(
    status: int, content: bytes, does_work: bool, grows: bool, archive: DicomWeb, beside: Beside,
    caplog: pytest.LogCaptureFixture
) -> None:
    """But where the archive is out of reach: there it would use up its tries."""
    look(beside.service, archive, WATCH, Troubles())
    Archive.bad = {"studies": (status, content)}
    seconds: list[float] = []
    with pytest.raises(Enough), caplog.at_level(logging.WARNING, "autosam3d"):
        run_forever(beside.service, archive, WATCH, _rounds(3, beside, seconds))
    assert beside.service.num_done == (2 if does_work else 0)
    assert seconds == ([2.0, 4.0, 8.0] if grows else [1.0, 1.0, 1.0])
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_once_does_what_can_be_done_and_counts_the_rest(archive: DicomWeb, beside: Beside) -> None:
    Archive.bad = {SERIES: (500, b"")}
    run_once(beside.service, archive, WATCH, lambda seconds: None)
    assert (beside.service.num_done, beside.service.num_failed) == (1, 1)
    Archive.bad = {"studies": (200, HTML)}
    with pytest.raises(ArchiveError, match="expected JSON"):
        run_once(beside.service, archive, WATCH, lambda seconds: None)


def test_an_archive_that_goes_away_in_between_is_not_asked_for_each_study(archive: DicomWeb, beside: Beside,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def gone(path: str, wish: object) -> list:
        asked.append(path)
        raise ArchiveError("SERVER_DOWN", "x", "it cannot be reached", "check it")

    listed = [f"1.2.{n}" for n in range(9)]
    monkeypatch.setattr(archive, "studies", lambda *args: (FoundLike(uid) for uid in listed))
    monkeypatch.setattr(archive, "_page", gone)
    with pytest.raises(ArchiveError):
        look(beside.service, archive, WATCH, Troubles())
    assert asked == ["studies/1.2.0/series", "studies"]


class FoundLike:
    num_instances = 12

    def __init__(self, uid: str) -> None:
        self.uid = uid


def test_a_bug_on_one_series_is_its_own_failure(archive: DicomWeb, beside: Beside) -> None:
    look(beside.service, archive, WATCH, Troubles())
    first = min(beside.ledger.jobs(), key=lambda job: job.id).id

    def fetch(job: object) -> None:
        if job.id == first:  # type: ignore[attr-defined]
            raise KeyError("Doe^Jane")
        beside.state.series(job.id).mkdir(parents=True)  # type: ignore[attr-defined]

    beside.service._fetch = fetch  # type: ignore[method-assign]
    while beside.service.work_once():
        pass
    jobs = {job.id: (job.state, job.code, job.fault) for job in beside.ledger.jobs()}
    assert jobs.pop(first) == ("waiting", "STEP_FAILED", "a step failed (KeyError)")
    assert [state for state, *_ in jobs.values()] == [DONE]


def test_troubles_are_tried_later_and_later() -> None:
    troubles, now, gaps = Troubles(Retry(first_seconds=10, most_seconds=100)), 0.0, []
    for _ in range(8):
        troubles.failed("a", VolumeError("X", "", "", ""), now)
        began = now
        while troubles.puts_off("a", now):
            now += 1.0
        gaps.append(now - began)
    assert gaps[0] <= 11 and 50 <= gaps[-1] <= 101 and not troubles.puts_off("b", 0.0)
    assert not troubles.puts_off("a", now - 1e6)  # the clock was set back


def test_a_received_series_that_the_disk_does_not_give_stops_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    beside = Beside(tmp_path, None)
    incoming = Incoming(beside.state.incoming, clock=lambda: beside.clock)
    how = Arrivals(rule=Rule(min_slices=1), model="m", settings="s", settle_seconds=0)
    import numpy as np

    for series in ("1.1", "1.2"):
        ds = bad.make_slice(0, np.zeros((20, 20), np.int16), 0.0)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = series, f"{series}.1"
        bad.save(ds, tmp_path / "x.dcm")
        path, file = incoming.open()
        with file:
            file.write((tmp_path / "x.dcm").read_bytes())
        incoming.put(path, series, f"{series}.1")
    sick, identify_image = incoming.due(0)[0], arrivals.identify_image

    def failing(path: Path, where: str) -> object:
        if path.parent.name == sick:
            raise ResourceError("IO", where, "reading failed (input/output error)", "check the disk")
        return identify_image(path, where)

    troubles = Troubles()
    monkeypatch.setattr(arrivals, "identify_image", failing)
    assert arrivals.look(beside.service, incoming, how, troubles) == 1 and len(troubles) == 1
    monkeypatch.setattr(arrivals, "identify_image", identify_image)
    beside.clock += 11
    assert arrivals.look(beside.service, incoming, how, troubles) == 1 and len(troubles) == 0
    assert {job.series for job in beside.ledger.jobs()} == {"1.1", "1.2"}
