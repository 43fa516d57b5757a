"""An archive that is down, lies, or sends half of it: one clear line, no loss, and nothing of a patient told."""

from __future__ import annotations

import http.server
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
pytest.importorskip("requests", reason="the pacs extra is not installed")

import driver
import make_dicom as bad

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError
from autosam3d.services.pacs.credentials import demand_safe_transport, read_credentials
from autosam3d.services.pacs.dicomweb import DicomWeb, Limits
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.ledger import DEAD, Ledger, Retry
from autosam3d.services.pacs.multipart import BrokenMultipartError, TooLargeError, body_of, boundary_of, write_parts
from autosam3d.services.pacs.rule import ImageFacts, SeriesFacts, read_rule
from autosam3d.services.pacs.state_folder import hold_state_folder
from lock_holders import needs_locks

UIDS = [f"{bad.SERIES_UID}.{n + 1}" for n in range(bad.NUM_SLICES)]


class FakeArchive(http.server.BaseHTTPRequestHandler):
    """Answers as it should but where `fault` says otherwise."""

    fault = ""
    stored: list[str]
    files: list[bytes]

    def do_GET(self) -> None:
        fault, path = type(self).fault, self.path.partition("?")[0]
        if fault == "500" and "/series" in path:
            return self.send_error(500, "Doe^Jane is not here")
        if fault == "401":
            return self.send_error(401)
        if path.endswith("/studies"):
            return self.json([] if "offset=0" not in self.path else [self.item("0020000D", "1.2.3")
                                                                     | {"00201208": {"vr": "IS", "Value": [12]}}])
        if path.endswith("/series"):
            return self.json([] if "offset=0" not in self.path else [
                self.item("0020000E", bad.SERIES_UID) | {"00080060": {"Value": ["CT"]}, "00201209": {"Value": [12]}}])
        if "SOPInstanceUID=" in self.path:
            uid = self.path.partition("SOPInstanceUID=")[2].partition("&")[0]
            return self.json([self.item("00080018", uid)] if uid in self.stored else [])
        if path.endswith("/instances"):
            return self.json([] if "offset=0" not in self.path else [self.item("00080018", uid) for uid in UIDS])
        files = list(self.files)
        if fault == "other study":
            files[3] = files[3].replace(b"1.2.3\0", b"1.2.9\0")
        if fault == "slice missing":
            files = files[:-1]
        body = b"".join(b"\r\n--B\r\nContent-Type: application/dicom\r\n\r\n" + f for f in files) + b"\r\n--B--\r\n"
        if fault == "cut":
            body = body[: len(body) // 2]
        self.send_response(200)
        kind = "text/html" if fault == "html" else 'multipart/related; type="application/dicom"; boundary=B'
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        import io

        import pydicom

        content = body.partition(b"\r\n\r\n")[2]
        uid = str(pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True).SOPInstanceUID)
        told = "00081198" if type(self).fault == "not stored" else "00081199"
        if told == "00081199":
            self.stored.append(uid)
        self.json({told: {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [uid]}}]}})

    @staticmethod
    def item(tag: str, uid: str) -> dict:
        return {tag: {"vr": "UI", "Value": [uid]}, "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]}}

    def json(self, tree: object) -> None:
        content = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[str]:
    from test_pacs_orthanc import phantom

    FakeArchive.fault, FakeArchive.stored = "", []
    FakeArchive.files = [path.read_bytes() for path in sorted(phantom(tmp_path / "fake").iterdir())]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeArchive)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/dicom-web"
    server.shutdown()


def state_of(state: Path) -> tuple[str, str]:
    ledger = Ledger(state / "ledger.sqlite", read_only=True)
    (job,) = ledger.jobs()
    ledger.close()
    return job.state, job.code


@pytest.mark.parametrize(("fault", "code"), [
    ("cut", "BROKEN_ANSWER"), ("html", "BROKEN_ANSWER"), ("other study", "WRONG_SERIES"),
    ("slice missing", "INCOMPLETE"), ("not stored", "NOT_STORED"),
])
def test_a_faulty_archive_is_tried_again_and_then_all_is_well(
    fault: str, code: str, archive: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FakeArchive.fault = fault
    with caplog.at_level(logging.DEBUG, "autosam3d"):
        service = driver.work(archive, tmp_path / "state")
    assert (service.num_done, service.num_failed) == (0, 1) and FakeArchive.stored == []
    state, told = state_of(tmp_path / "state")
    assert told == code and state == ("segmented" if fault == "not stored" else "waiting")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("autosam3d.services.pacs")]
    assert len(lines) == 1 and code in lines[0] and "\n" not in lines[0]
    assert not any(secret in caplog.text for secret in ("Doe", "4711", bad.SERIES_UID))
    FakeArchive.fault = ""
    ledger = Ledger(tmp_path / "state/ledger.sqlite")
    with ledger._db:
        ledger._db.execute("UPDATE jobs SET not_before = 0")
    ledger.close()
    assert driver.work(archive, tmp_path / "state").num_done == 1
    assert len(FakeArchive.stored) == len(set(FakeArchive.stored)) == 2


def test_after_enough_tries_a_series_is_given_up_with_its_reason(archive: str, tmp_path: Path) -> None:
    FakeArchive.fault = "cut"
    driver.work(archive, tmp_path / "state", tries=1)
    assert state_of(tmp_path / "state") == (DEAD, "BROKEN_ANSWER")
    assert not list((tmp_path / "state/jobs").iterdir())


def test_an_archive_that_answers_otherwise(archive: str, tmp_path: Path) -> None:
    FakeArchive.fault = "401"
    with pytest.raises(ArchiveError) as caught:
        driver.work(archive, tmp_path / "state")
    assert caught.value.code == "AUTH" and "Doe" not in str(caught.value)
    FakeArchive.fault = "500"  # to the list of one study
    service = driver.work(archive, tmp_path / "state")
    assert (service.num_done, service.num_failed) == (0, 1)


def test_an_archive_that_is_away_or_silent(tmp_path: Path) -> None:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/dicom-web"
        with pytest.raises(ArchiveError) as caught:
            driver.work(url, tmp_path / "state")
        assert caught.value.code == "SERVER_DOWN" and caught.value.exit_code == 5
        sock.listen()
        with pytest.raises(ArchiveError, match="no answer within"):
            list(DicomWeb(url, limits=Limits(read_seconds=0.3)).studies("CT"))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_multipart_comes_back_whatever_the_chunks(step: int, tmp_path: Path) -> None:
    contents = [b"", b"\r\n--", b"--B", os.urandom(3000), b"\r\n--C\r\n"]
    for n, content in enumerate(contents):
        (tmp_path / str(n)).write_bytes(content)
    chunks, length = body_of([tmp_path / str(n) for n in range(len(contents))], "B")
    body = b"".join(chunks)
    assert len(body) == length
    pieces = [body[i : i + step] for i in range(0, len(body), step)]
    limits = {"max_bytes": 10_000, "max_part_bytes": 5000, "max_parts": 5}

    def write(pieces: list[bytes], **change: int) -> int:
        return write_parts(pieces, b"B", lambda n: (tmp_path / f"out{n}").open("wb"), **(limits | change))

    assert write(pieces) == 5
    assert [(tmp_path / f"out{n}").read_bytes() for n in range(5)] == contents
    for change in ({"max_bytes": 2000}, {"max_part_bytes": 2000}, {"max_parts": 4}):
        with pytest.raises(TooLargeError):
            write(pieces, **change)
    with pytest.raises(BrokenMultipartError):
        write([body[:-6]])
    assert boundary_of('multipart/related; type="application/dicom"; boundary="a b"') == b"a b"


def test_credentials_are_kept_from_others_and_told_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_text("jane:s3cret\n")
    path.chmod(0o644)
    with pytest.raises(UsageError) as caught:
        read_credentials(path)
    assert caught.value.code == "AUTH_FILE" and "s3cret" not in str(caught.value)
    path.chmod(0o600)
    found = read_credentials(path)
    assert found is not None and found.header == "Basic amFuZTpzM2NyZXQ=" and "amFu" not in repr(found)
    assert read_credentials(None, {"AUTOSAM3D_PACS_AUTH": "Bearer abc"}).header == "Bearer abc"  # type: ignore
    demand_safe_transport("http://127.0.0.1:80/d", found, False)
    for url, insecure in (("http://archive.example/d", False), ("http://jane:s3cret@127.0.0.1/d", True),
                          ("ftp://archive.example", True), ("https://archive.example/d?a=b", True)):
        with pytest.raises(UsageError) as caught:
            demand_safe_transport(url, found, insecure)
        assert "s3cret" not in str(caught.value)


def test_rules(tmp_path: Path) -> None:
    path = tmp_path / "rule.yaml"
    path.write_text("body_part: [HeadNeck, NECK]\ndescription: hals|neck\nnot_description: bone\nmin_slices: 20\n"
                    "max_thickness_mm: 3\n")
    rule = read_rule(path)
    good = SeriesFacts(modality="CT", body_part="headneck", description="CT Neck 2.0", num_instances=100)
    assert rule.misses(good) == ""
    from dataclasses import replace

    for change in ({"modality": "SEG"}, {"body_part": ""}, {"description": "thorax"},
                   {"description": "neck BONE"}, {"num_instances": 19}):
        assert rule.misses(replace(good, **change))
    images = [ImageFacts("ORIGINAL\\PRIMARY\\AXIAL", 2.0)] * 19
    assert rule.misses_images([*images, ImageFacts("A", 2.0)]) == ""
    assert rule.misses_images([*images, ImageFacts("ORIGINAL\\PRIMARY\\LOCALIZER", 2.0)]) == "min_slices"
    assert rule.misses_images([*images, ImageFacts("A", 5.0)]) == "max_thickness_mm"
    assert [rule.misses_images([ImageFacts("A", 2.0, num)]) for num in (19, 20, 10**6)] == ["min_slices", "", ""]
    for text in ("modality: SEG", "descripton: a", "description: '('", "min_slices: two", "- a", "min_slices: 0"):
        path.write_text(text)
        with pytest.raises(AutoSam3dError) as caught:
            read_rule(path)
        assert caught.value.exit_code == 2


@needs_locks
def test_a_state_folder_without_locks_is_refused(tmp_path: Path, no_locks: None) -> None:
    with pytest.raises(ResourceError) as caught, hold_state_folder(tmp_path / "state"):
        pass
    assert caught.value.code == "NO_LOCK" and "--state" in caught.value.remedy


def test_one_process_a_state_folder_and_delays_that_grow(tmp_path: Path) -> None:
    import subprocess
    import sys

    with hold_state_folder(tmp_path / "state"):
        assert (tmp_path / "state").stat().st_mode & 0o077 == 0
        code = ("import sys; from pathlib import Path\n"
                "from autosam3d.services.pacs.state_folder import hold_state_folder\n"
                "with hold_state_folder(Path(sys.argv[1])): pass")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state")], capture_output=True, text=True)
        assert f"held by process {os.getpid()} on " in done.stderr and done.returncode == 1
    delays = np.array([[Retry().delay(n) for n in range(1, 15)] for _ in range(50)])
    assert (delays.max(axis=0) <= np.minimum(3600, 10 * 2.0 ** np.arange(14))).all() and delays.std(axis=0).min() > 0
