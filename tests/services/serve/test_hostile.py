"""T12, T13, T17 and T21: what hostile senders, names and files cannot do."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hostile_names import NAMES
from running import FORMS, Running, answer_of, connected, fault, head, outcome, running, send, until

from command_line import contents
from serving import zipped

CANARY = "canary-4711-doe"
REFUSED = ("46_cut_in_header", "47_two_missing", "48_place_taken_twice", "50_two_patients", "51_half_across",
           "53_very_uneven", "55_no_pixel_spacing", "56_two_coordinates", "57_no_rescale", "58_mixed_size",
           "59_unknown_syntax", "60_broken_fragments", "63_forged_rows", "65_mr", "69_bad_number")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    """Upload deadlines as they are are half a minute; here they are short, and everything is logged."""
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(
        "import dataclasses\nimport autosam3d.services.serve.settings as s\n_init = s.ServeSettings.__init__\n"
        "def init(self, **told):\n    _init(self, **{'chunk_seconds': 2.0, 'rate_seconds': 2.0, 'header_seconds': 3.0,"
        " **told})\ns.ServeSettings.__init__ = init\n")
    path = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    with running(tmp_path_factory.mktemp("service"), "--set", "queue=300", "--set", "max_upload_mib=4",
                 env={"PYTHONPATH": path}) as service:
        yield service


@pytest.fixture(autouse=True)
def _nothing_left(service: Running):
    """After each test the server is the same process, and files of uploads are gone."""
    pid = service.process.pid
    yield
    assert service.process.poll() is None and service.process.pid == pid
    until(lambda: [name for name in service.files() if "/upload/" in name] == [], seconds=8)
    with service.client() as client:
        until(lambda: client.get("/health").json()["receiving"] == 0, seconds=15)


def test_ten_gigabytes_are_refused_before_the_body(service: Running) -> None:
    with connected(service) as raw:
        raw.sendall(head(service, "Content-Type: application/zip", "Content-Length: 10000000000"))
        began = time.monotonic()
        answer = answer_of(raw)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"TOO_LARGE" in answer and time.monotonic() - began < 5
    for length in ("-1", "1e3", "x", "9" * 30):
        with connected(service) as raw:
            raw.sendall(head(service, "Content-Type: application/zip", f"Content-Length: {length}"))
            assert answer_of(raw).split()[1] in (b"400", b"413")


def test_an_endless_body_is_cut_at_the_limit(service: Running) -> None:
    sent = 0
    with connected(service) as raw:
        raw.sendall(head(service, "Content-Type: application/octet-stream", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        try:
            while sent < 64 << 20:
                raw.sendall(chunk)
                sent += 0x10000
        except OSError:
            pass
        else:
            pytest.fail("all of it was taken")
    assert sent < 16 << 20  # the limit is 4 MiB; the rest is what the system's buffers hold


@pytest.mark.parametrize("kind", ["raw", "form"])
def test_bodies_cut_anywhere_leave_nothing(service: Running, kind: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + bytes(5000) + b"\r\n--b--\r\n"
    body, told = (bytes(5000), "application/zip") if kind == "raw" else (form, "multipart/form-data; boundary=b")
    for cut in [int(len(body) * share / 25) for share in range(25)]:
        with connected(service) as raw:
            raw.sendall(head(service, f"Content-Type: {told}", f"Content-Length: {len(body)}") + body[:cut])


def test_slow_senders_are_let_go(service: Running) -> None:
    """Fifty with slow heads, fifty with slow bodies; meanwhile others are served."""
    raws = []
    for number in range(100):
        raw = socket.create_connection(service.address, timeout=30)
        whole = head(service, "Content-Type: application/zip", "Content-Length: 100000")
        raw.sendall(whole if number % 2 else whole[:20])
        raws.append(raw)
    end, began = time.monotonic() + 15, time.monotonic()
    alive = list(raws)
    with service.client() as client:
        while alive and time.monotonic() < end:
            asked = time.monotonic()
            assert client.get("/health").status_code == 200
            assert time.monotonic() - asked < 2
            still = []
            for raw in alive:
                try:
                    raw.setblocking(False)
                    if raw.recv(1 << 16) == b"":
                        continue
                except BlockingIOError:
                    pass
                except OSError:
                    continue
                try:
                    raw.send(b"x")
                    still.append(raw)
                except OSError:
                    continue
            alive = still
            time.sleep(0.5)
    for raw in raws:
        raw.close()
    assert not alive, f"{len(alive)} are held after {time.monotonic() - began:.0f} s"


def test_ten_thousand_parts_and_long_fields(service: Running) -> None:
    def parts(name: str, count: int, content: bytes) -> bytes:
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        return (head + content + b"\r\n") * count + b"--b--\r\n"

    kind = {"content-type": "multipart/form-data; boundary=b"}
    with service.client() as client:
        fault(client.post("/jobs", content=parts("file", 10_000, b"x"), headers=kind), 413, "PARTS")
        fault(client.post("/jobs", content=parts("x", 100, b"x"), headers=kind), 413, "PARTS")
        scan = parts("file", 1, b"x").removesuffix(b"--b--\r\n")
        told = fault(client.post("/jobs", content=scan + parts("x", 1, b"x" * 100_000), headers=kind), 413, "FIELD")
        assert told == "expected at most 64 KiB in the field `x`, which is no scan"


def test_ten_thousand_ranges_are_one_answer(service: Running, ct: Path) -> None:
    with service.client() as client:
        page = client.get("/index.html").content
        ranges = ",".join(f"{i}-{i}" for i in range(10_000))
        answer = client.get("/index.html", headers={"range": f"bytes={ranges}"[:60_000]})
        assert answer.status_code == 200 and answer.content == page
        assert client.get("/index.html", headers={"range": "bytes=0-9"}).content == page[:10]


@pytest.mark.parametrize("raw_head", [b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" * 50,
                                      b"GET / HTTP/9.9\r\n\r\n",
                                      b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"A" * 200_000,
                                      b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"])
def test_what_is_no_request(service: Running, raw_head: bytes) -> None:
    with connected(service) as raw:
        try:
            raw.sendall(raw_head)
            raw.shutdown(socket.SHUT_WR)
        except OSError:
            return
        answer = answer_of(raw)
        assert answer == b"" or answer.split()[1] in (b"400", b"403", b"431"), answer[:200]


def test_names_lead_nowhere(service: Running, ct: Path, slices: Path, tmp_path: Path) -> None:
    """T13: of uploads, fields, jobs, sessions, models and files: 62 names in 8 places."""
    outside = {p: contents(p) for p in (tmp_path, ct.parent, slices.parent)}
    content = b"no scan " * 10
    jobs = []
    with service.client() as client:
        for name in NAMES:
            escaped = name.encode().replace(b'"', b"%22").replace(b"\r", b"%0D").replace(b"\n", b"%0A")
            body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n--b--\r\n' % (
                escaped, content)
            answer = client.post("/jobs", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
            # python-multipart refuses part headers of more than 4 KiB.
            assert answer.status_code == (400 if len(name) > 4000 else 202), (name, answer.text)
            if answer.status_code == 202:
                jobs.append(answer.json()["id"])
            with service.client() as other:
                raw = "/" + (name if name.isascii() and name.isprintable() and " " not in name else quote(name))
                for path in (f"/jobs{raw}", f"/jobs{raw}/result", f"/session{raw}", f"/assets{raw}", f"/model{raw}"):
                    status = _get(service, path)
                    assert 300 <= status < 500 or (status == 200 and name in (".", "./.")), (path, status)
                assert other.post("/infer/x", params={"session_id": name, "image": name}).status_code in (400, 404)
        for job_id in jobs:
            assert outcome(client, job_id)["state"] == "failed"
    assert {p: contents(p) for p in outside} == outside
    assert sorted(p.name for p in service.folder.iterdir() if not p.name.startswith("jobs.sqlite")) == [
        "jobs", "serve.lock", "tmp", "web"]
    text = service.log.read_text()
    assert "Traceback" not in text and " 500 " not in text


def _get(service: Running, path: str) -> int:
    """The status of a request whose path is sent as it is."""
    with connected(service) as raw:
        raw.sendall(head(service, "Connection: close", method="GET", path=path))
        answer = answer_of(raw)
    return int(answer.split()[1]) if answer else 499


def test_patients_are_named_nowhere(service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T17: canaries in tags, files, names, comments and headers; only DICOM results carry the few that an archive
    needs."""
    pytest.importorskip("highdicom")
    import canaries
    from make_dicom import BROKEN, series

    canaries.marked_slices(monkeypatch)
    folder = canaries.renamed(series()(tmp_path))
    path, nifti = canaries.zipped(folder), canaries.nifti()
    spoiled = {"cut": path[:-200], "half": path[:5000], "letter": CANARY.encode() * 100,
               "gzip": b"\x1f\x8b" + CANARY.encode() * 50, "nifti": nifti[:-60], "more": nifti + CANARY.encode()}
    for name in REFUSED:
        (tmp_path / name).mkdir()
        spoiled[name] = canaries.zipped(canaries.renamed(BROKEN[name][0](tmp_path / name)))
    bodies, jobs = [], []
    with service.client(headers={"user-agent": CANARY, "referer": f"http://{CANARY}/", "x-other": CANARY}) as client:
        def post(content: bytes, name: str) -> str:
            files = {f"{CANARY}": b"x", "file": (f"{CANARY}.{name}", content)}
            jobs.append(client.post(f"/jobs?note={CANARY}", files=files).json()["id"])
            return jobs[-1]

        for job_id, forms in ((post(path, "zip"), FORMS), (post(nifti, "nii.gz"), {"nifti", "json", "csv"})):
            job = outcome(client, job_id)
            assert job["state"] == "done" and set(job["formats"]) == forms
            for form in forms:
                answer = client.get(f"/jobs/{job_id}/result", params={"format": form})
                bodies.append(json.dumps(job).encode() + str(answer.headers).encode())
                if form in ("seg", "seg-labelmap", "rtstruct"):
                    canaries.demand_carried_alone(answer.content)
                else:
                    bodies.append(answer.content)
        failing = [post(content, "nii.gz" if name in ("nifti", "more") else "zip") for name, content in
                   spoiled.items()]
        for job_id in failing:
            job = outcome(client, job_id)
            assert job["state"] == "failed" and job["error"]["status"] == 422, job
            bodies += [json.dumps(job).encode(), client.get(f"/jobs/{job_id}/result").content]
        assert len(failing) >= 20
        for answer in (client.get(f"/{CANARY}"), client.get(f"/jobs/{CANARY}"), client.get(f"/jobs?x={CANARY}"),
                       client.post(f"/jobs?format={CANARY}", content=b"x", headers={"content-type": "application/zip"}),
                       client.post("/jobs", content=b"x", headers={"content-type": f"text/{CANARY}"}),
                       client.post(f"/infer/{CANARY}?image={CANARY}"), client.get("/session/" + CANARY)):
            bodies.append(answer.content + str(answer.headers).encode())
        assert not [body for body in bodies if b"canary" in body or canaries.found_in(body)]
        log = service.log.read_text()
        assert "canary" not in log and canaries.found_in(log) == set() and "POST /jobs 202" in log
        assert not [job_id for job_id in jobs if job_id in log]
        # While results wait to be fetched: of the patient they hold what they carry, and nothing else does.
        kept = {name: places for name, places in canaries.found_below(service.folder).items()
                if not name.endswith((".seg.dcm", ".seg-labelmap.dcm", ".rtstruct.dcm"))}
        assert kept == {}
        for job_id in jobs:
            client.delete(f"/jobs/{job_id}")
    left = [p for p in service.folder.rglob("*") if p.is_file() and "canary" in
            p.name + p.read_bytes().decode("latin-1")]
    assert left == [] and canaries.found_below(service.folder) == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_dead_worker_is_replaced_and_the_scan_done(service: Running, long_ct: Path, number: signal.Signals) -> None:
    with service.client() as client:
        job_id = send(client, long_ct, overlap=0.5, format="nifti")
        until(lambda: client.get(f"/jobs/{job_id}").json()["percent"] > 0)
        (pid,) = service.workers()
        os.kill(pid, number)
        assert outcome(client, job_id)["state"] == "done"
        assert service.workers() != [pid]


def test_a_worker_that_always_dies_is_503_and_the_next_scan_is_done(service: Running, ct: Path, long_ct: Path) -> None:
    with service.client() as client:
        job_id = send(client, long_ct, overlap=0.9)
        stop = threading.Event()

        def murder() -> None:
            while not stop.is_set():
                if client.get(f"/jobs/{job_id}").json().get("stage") == "segmenting":
                    for pid in service.workers():
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)

        thread = threading.Thread(target=murder)
        thread.start()
        try:
            job = outcome(client, job_id)
        finally:
            stop.set()
            thread.join()
        assert job["error"]["code"] == "WORKER_DIED" and job["error"]["status"] == 503
        answer = client.get(f"/jobs/{job_id}/result")
        fault(answer, 503, "WORKER_DIED")
        assert int(answer.headers["retry-after"]) > 0
        assert outcome(client, send(client, ct))["state"] == "done"


def test_nested_sequences_do_not_reach_the_server(service: Running, ct: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from make_dicom import BROKEN

    for name, (maker, code, _) in BROKEN.items():
        if name not in ("nested sequences", "deflated bomb") and "nest" not in name and "bomb" not in name:
            continue
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        with service.client() as client:
            job_id = send(client, zipped(maker(folder), tmp_path / "x.zip"))
            job = outcome(client, job_id)
            assert job["error"]["code"] == code and job["error"]["status"] == 422, (name, job)
    with service.client() as client:
        assert outcome(client, send(client, ct))["state"] == "done"
