"""A scan's way through the service, and every way in which it is turned away (rows 91 of the catalogue)."""

from __future__ import annotations

import io
import os
import re
import threading
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from running import FORMS, Running, answer_of, connected, fault, head, outcome, running, send, until

from autosam3d.checkpoints.exported import load_exported
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation
from exports import mini_export


def test_a_nifti_comes_back_as_segment_makes_it(service: Running, ct: Path, tmp_path: Path) -> None:
    with service.client() as client:
        job_id = send(client, ct)
        assert re.fullmatch(r"[A-Za-z0-9_-]{22}", job_id)
        job = outcome(client, job_id)
        assert job["state"] == "done" and set(job["formats"]) == {"nifti", "json", "csv"}
        got = client.get(f"/jobs/{job_id}/result")
        assert got.headers["content-disposition"] == 'attachment; filename="segmentation.nii.gz"'
        (tmp_path / "got.nii.gz").write_bytes(got.content)
        ours = segment(read_ct(ct), load_exported(mini_export(), "onnxruntime", 1))
        theirs = read_segmentation(tmp_path / "got.nii.gz")
        assert np.array_equal(theirs.labels, ours.labels) and theirs.organs == ours.organs
        volumes = client.get(f"/jobs/{job_id}/result", params={"format": "json"}).json()
        assert volumes["organs"] == job["organs"]
        assert [o["voxels"] for o in job["organs"]] == [int((ours.labels == o["label"]).sum()) for o in job["organs"]]
        assert client.get(f"/jobs/{job_id}/result", params={"format": "csv"}).text.startswith("label,organ,voxels")
        fault(client.get(f"/jobs/{job_id}/result", params={"format": "seg"}), 422, "FORMAT")
        assert not (service.folder / "jobs" / job_id / "upload").exists()
        assert client.delete(f"/jobs/{job_id}").status_code == 204
        fault(client.get(f"/jobs/{job_id}"), 404, "NO_SUCH_JOB")
    assert not (service.folder / "jobs" / job_id).exists()


def test_slices_come_back_in_all_forms_however_they_are_sent(service: Running, slices: Path, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    found = []
    with service.client() as client, zipfile.ZipFile(slices) as archive:
        parts = [("file", (name, archive.read(name))) for name in archive.namelist()]
        for answer in (client.post("/jobs", content=slices.read_bytes(), headers={"content-type": "application/zip"}),
                       client.post("/jobs", files=parts)):
            job = outcome(client, answer.json()["id"])
            assert job["state"] == "done" and set(job["formats"]) == FORMS, job
            files = {form: client.get(f"/jobs/{job['id']}/result", params={"format": form}) for form in FORMS}
            assert all(file.status_code == 200 for file in files.values())
            found.append([o["voxels"] for o in job["organs"]])
            for form, modality in (("seg", "SEG"), ("seg-labelmap", "SEG"), ("rtstruct", "RTSTRUCT")):
                assert pydicom.dcmread(io.BytesIO(files[form].content)).Modality == modality
                assert files[form].headers["content-type"] == "application/dicom"
    assert found[0] == found[1] and sum(found[0]) > 0


def test_progress_cancel_and_a_free_slot(service: Running, ct: Path, long_ct: Path) -> None:
    with service.client() as client:
        long_id, next_id = send(client, long_ct, overlap=0.9), send(client, ct)
        assert client.get(f"/jobs/{next_id}").json() == {"id": next_id, "state": "queued", "percent": 0.0, "before": 0}
        job = until(lambda: client.get(f"/jobs/{long_id}").json(), lambda job: job["percent"] > 0)
        assert job["state"] == "running" and job["stage"] == "segmenting" and job["seconds_left"] > 0
        for job_id, words in ((long_id, "is being worked on"), (next_id, "waits in the queue")):
            early = client.get(f"/jobs/{job_id}/result", params={"format": "json"})
            told = fault(early, 409, "NOT_READY")
            assert words in told and "ask GET /jobs/ID" in told and 2 <= int(early.headers["retry-after"]) <= 60
        assert client.delete(f"/jobs/{long_id}").status_code == 204
        fault(client.get(f"/jobs/{long_id}"), 404, "NO_SUCH_JOB")
        assert outcome(client, next_id)["state"] == "done"
    until(lambda: not (service.folder / "jobs" / long_id).exists(), seconds=5)


def test_a_full_queue_is_429_and_says_when(service: Running, ct: Path, long_ct: Path) -> None:
    with service.client() as client:
        busy = send(client, long_ct, overlap=0.9)
        until(lambda: client.get(f"/jobs/{busy}").json()["state"] == "running")
        waiting = [send(client, ct) for _ in range(4)]
        answer = client.post("/jobs", files={"file": ct.read_bytes()})
        fault(answer, 429, "QUEUE_FULL")
        assert int(answer.headers["retry-after"]) > 0
        for job_id in (*waiting, busy):
            client.delete(f"/jobs/{job_id}")
        assert until(lambda: client.get("/health").json(), lambda told: told["queued"] == 0)["status"] == "ok"


def test_bad_scans_fail_in_words_and_the_next_is_done(service: Running, ct: Path, slices: Path, tmp_path: Path) -> None:
    cut = ct.read_bytes()[:-80]
    letter = b"Doe^Jane is ill. " * 100
    evil = tmp_path / "x.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../doe", b"x")
    with service.client() as client:
        for content, code in ((cut, "TRUNCATED"), (letter, "NOT_NIFTI"), (evil.read_bytes(), "ARCHIVE_PATH")):
            job_id = client.post("/jobs", files={"file": content}).json()["id"]
            job = outcome(client, job_id)
            assert job["state"] == "failed" and (job["error"]["code"], job["error"]["status"]) == (code, 422)
            answer = client.get(f"/jobs/{job_id}/result")
            assert "doe" not in fault(answer, 422, code).lower() and "doe" not in str(job).lower()
            until(lambda j=job_id: not [name for name in service.files() if j in name], seconds=5)
        job_id = client.post("/jobs", files={"file": ct.read_bytes()}, params={"format": "seg"}).json()["id"]
        assert outcome(client, job_id)["error"]["code"] == "FORMAT"
        assert outcome(client, send(client, ct))["state"] == "done"


@pytest.mark.parametrize(("kind", "content", "status", "code"), [
    ("text/plain", b"x", 415, "CONTENT_TYPE"),
    ("application/x-www-form-urlencoded", b"x", 415, "CONTENT_TYPE"),
    ("multipart/form-data", b"x", 400, "MULTIPART"),
    ("multipart/form-data; boundary=b", b"no form", 400, "MULTIPART"),
    ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', 400,
     "MULTIPART"),
    ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nx\r\n--b--\r\n', 400,
     "NO_FILE"),
    ("multipart/form-data; boundary=b", b"--b\r\n" + b"A: " + b"x" * (1 << 20) + b"\r\n\r\nx\r\n--b--\r\n", 400,
     "MULTIPART"),
    ("application/octet-stream", b"", 400, "NO_FILE"),
])
def test_bodies_that_are_none(service: Running, kind: str, content: bytes, status: int, code: str) -> None:
    with service.client() as client:
        fault(client.post("/jobs", content=content, headers={"content-type": kind}), status, code)
    until(lambda: not [name for name in service.files() if "upload" in name], seconds=5)


@pytest.mark.parametrize(("parts", "words"), [
    ([("scan", "ct.nii.gz", 2 << 20)], "got the part `scan`;"), ([("scan", "", 2 << 20)], "got the part `scan`;"),
    ([("image", "doe_jane.nii.gz", 100)], "got the part `image`;"), ([("params", "", 5), ("File", "x", 5)],
                                                                    "got the part `params`, `File`;"),
    ([("doe jane", "x", 5)], "got the part (a name with other signs);"), ([], "got none;"),
])
def test_a_scan_under_another_name_is_named(service: Running, parts: list[tuple[str, str, int]], words: str) -> None:
    """Whatever its size, which is not what is wrong with it; what may name a patient is not repeated."""
    body = b"".join(f'--b\r\nContent-Disposition: form-data; name="{name}"'.encode()
                    + (f'; filename="{file}"'.encode() if file else b"") + b"\r\n\r\n" + bytes(size) + b"\r\n"
                    for name, file, size in parts) + b"--b--\r\n"
    with service.client() as client:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        told = fault(client.post("/jobs", content=body, headers=kind), 400, "NO_FILE")
        assert told.startswith("expected the scan in a part of the name `file`") and words in told, told
        assert "long" not in told and "doe" not in told and told.endswith("give the part with the scan this name")
        session = fault(client.put("/session/", content=body, headers=kind), 400, "NO_FILE")
        assert "`files` or `file`" in session
    until(lambda: not [name for name in service.files() if "upload" in name], seconds=5)


@pytest.mark.parametrize("query", ["format=dicom", "format=", "overlap=1", "overlap=x", "prefer=best", "volume=-1",
                                   "intensity_offset=nan", "intensity_offset=1e9", "series=%2e%2e%2fx", "force=2"])
def test_parameters_are_checked(service: Running, query: str) -> None:
    with service.client() as client:
        answer = client.post(f"/jobs?{query}", content=b"x", headers={"content-type": "application/octet-stream"})
    assert fault(answer, 400, answer.json()["code"]) and answer.json()["code"] == "PARAMETER"


def test_the_same_key_twice_at_once(service: Running, ct: Path) -> None:
    answers: list[httpx.Response] = []
    gate = threading.Barrier(4)

    def post() -> None:
        with service.client() as client:
            gate.wait()
            answers.append(client.post("/jobs", files={"file": ct.read_bytes()},
                                       headers={"idempotency-key": "scan-of-today"}))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.status_code for a in answers) == [202, 409, 409, 409]
    fault(next(a for a in answers if a.status_code == 409), 409, "SENT_TWICE")
    with service.client() as client:
        client.delete(f"/jobs/{next(a for a in answers if a.status_code == 202).json()['id']}")
        fault(client.post("/jobs", content=b"x", headers={"idempotency-key": "a b", "content-type": "application/zip"}),
              400, "IDEMPOTENCY_KEY")


def test_unknown_addresses_and_methods(service: Running) -> None:
    with service.client() as client:
        fault(client.get("/jobs/" + "A" * 22), 404, "NO_SUCH_JOB")
        fault(client.get("/nowhere"), 404, "NOT_FOUND")
        fault(client.put("/jobs"), 405, "METHOD")
        fault(client.post("/jobs", headers={"content-encoding": "gzip", "content-type": "application/zip"},
                          content=b"x"), 415, "CONTENT_ENCODING")


def test_a_sender_who_leaves_leaves_nothing(service: Running) -> None:
    before = service.files()
    with connected(service) as raw:
        raw.sendall(head(service, "Content-Type: application/zip", "Content-Length: 1000000") + b"PK\3\4" + b"x" * 5000)
        until(lambda: service.files() != before or _folders(service), seconds=5)
    until(lambda: service.files() == before, seconds=5)
    with service.client() as client:
        until(lambda: client.get("/health").json()["receiving"] == 0, seconds=5)


def _folders(service: Running) -> list[Path]:
    return [p for p in (service.folder / "jobs").glob("*/upload") if p.is_dir()]


def test_results_go_after_their_time(ct: Path, tmp_path: Path) -> None:
    short = ("--keep-hours", 1 / 1800, "--set", "app=false")
    with running(tmp_path / "short", *short) as service, service.client() as client:
        job_id = send(client, ct)
        assert outcome(client, job_id)["state"] == "done"
        until(lambda: client.get(f"/jobs/{job_id}").status_code == 404, seconds=10)
        until(lambda: service.files() == [], seconds=5)


def test_a_full_disk_is_507(ct: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a disk without room."""
    folder = tmp_path / "full"
    folder.mkdir()
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if 'AUTOSAM3D_FULL' in os.environ: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n")


    path = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "AUTOSAM3D_FULL": "1"}
    with running(folder, "--set", "app=false", env=env) as service, service.client() as client:
        answer = client.post("/jobs", files={"file": bytes(3 << 20)})
        fault(answer, 507, "NO_SPACE")
        assert int(answer.headers["retry-after"]) > 0
        until(lambda: service.files() == [], seconds=5)
        assert outcome(client, send(client, ct))["state"] == "done"


def test_answers_are_fast_while_a_scan_is_segmented(service: Running, long_ct: Path) -> None:
    """Not a measurement: a blocked event loop would answer after seconds."""
    with service.client() as client:
        busy = send(client, long_ct, overlap=0.9)
        until(lambda: client.get(f"/jobs/{busy}").json()["percent"] > 0)
        began = time.monotonic()
        for _ in range(20):
            assert client.get("/health").status_code == 200
        assert time.monotonic() - began < 20
        client.delete(f"/jobs/{busy}")


def test_the_pages_need_nothing_from_elsewhere(service: Running) -> None:
    with service.client() as client:
        page = client.get("/docs")
        assert page.status_code == 200 and "POST /jobs" in page.text and "<script" not in page.text
        assert not re.search(r"(src|href)=\"?(https?:)?//", page.text)
        assert client.get("/docs.css").headers["content-type"].startswith("text/css")
        assert "/jobs/{job_id}/result" in client.get("/openapi.json").json()["paths"]
        root = client.get("/")
        assert root.headers["cross-origin-opener-policy"] == "same-origin"
        assert root.headers["cross-origin-embedder-policy"] == "require-corp"
        assert "default-src 'none'" in root.headers["content-security-policy"]
        assert "https://" not in root.text and "<canvas" in root.text
        assert client.get("/ort/ort-wasm-simd-threaded.wasm").headers["content-type"] == "application/wasm"
        model = client.get("/model/model.onnx")
        assert model.content == (mini_export() / "model.onnx").read_bytes()
    with connected(service) as raw:
        raw.sendall(head(service, "Content-Length: 5", "Content-Type: application/zip") + b"xxxxx")
        assert b"202" in answer_of(raw).splitlines()[0]
