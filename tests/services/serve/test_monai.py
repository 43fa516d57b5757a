"""Requests of the form in which MONAI Label's clients (3D Slicer, OHIF) send them, and answers as they read them."""

from __future__ import annotations

import email.parser
import email.policy
import http.client
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pytest
from running import Running, connected, fault, head, running, send, until

from autosam3d.checkpoints.exported import load_exported
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation
from exports import LABELS, mini_export


@pytest.fixture(scope="module")
def model(service: Running) -> str:
    with service.client() as client:
        return next(iter(client.get("/info/").json()["models"]))


def _slicer_infer(service: Running, model: str, image: str, params: dict[str, Any], *, file: Path | None = None,
                  session_id: str | None = None, output: str | None = None, token: str = "") -> tuple[int, Any, bytes]:
    """As the client of the Slicer extension does it: its own multipart over http.client.

    Returns:
        (status, the headers, the body).
    """
    limit = "----------lImIt_of_THE_fIle_eW_$"
    selector = f"/infer/{quote_plus(model)}?image={quote_plus(image)}"
    selector += f"&session_id={session_id}" if session_id else ""
    selector += f"&output={output}" if output else ""
    body = f'--{limit}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{json.dumps(params)}\r\n'.encode()
    if file is not None:
        body += (f'--{limit}\r\nContent-Disposition: form-data; name="file"; filename="{file}"\r\n'
                 f"Content-Type: application/octet-stream\r\n\r\n").encode() + file.read_bytes() + b"\r\n"
    body += f"--{limit}--\r\n\r\n".encode()
    connection = http.client.HTTPConnection(*service.address, timeout=60)
    headers = {"content-type": f"multipart/form-data; boundary={limit}", "content-length": str(len(body))}
    connection.request("POST", selector, body, headers | ({"Authorization": f"bearer {token}"} if token else {}))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def _parts(headers: Any, content: bytes) -> dict[str, tuple[str | None, bytes]]:
    """A multipart answer: name to (file name, content)."""
    assert headers["content-type"].startswith("multipart/form-data; boundary=")
    assert int(headers["content-length"]) == len(content)
    text = f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + content
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text)
    return {part.get_param("name", header="content-disposition"): (  # type: ignore[misc]
        part.get_filename(), part.get_payload(decode=True)) for part in message.iter_parts()}  # type: ignore[attr-defined]


def _labels(content: bytes, folder: Path) -> np.ndarray:
    (folder / "got.nii.gz").write_bytes(content)
    return read_segmentation(folder / "got.nii.gz").labels


@pytest.fixture(scope="module")
def ours(ct: Path) -> np.ndarray:
    return segment(read_ct(ct), load_exported(mini_export(), "onnxruntime", 1)).labels


def test_info_is_what_slicer_makes_its_lists_of(service: Running) -> None:
    with service.client() as client:
        info = client.get("/info/").json()
        assert client.get("/info").json() == info
        assert client.get("/auth/").json() == {"enabled": False}
    (model,) = info["models"].values()
    assert info["labels"] == LABELS[1:] and model["type"] == "segmentation" and model["dimension"] == 3
    assert model["labels"] == {name: index for index, name in enumerate(LABELS) if index}
    assert all(info[name] == {} for name in ("trainers", "strategies", "scoring", "datastore"))
    assert {"name", "description", "version", "config"} <= set(info)


def test_slicers_way_a_session_and_infer(service: Running, model: str, ct: Path, ours: np.ndarray,
                                         tmp_path: Path) -> None:
    with service.client() as client, ct.open("rb") as file:
        created = client.put("/session/", files=[("files", ("volume.nii.gz", file))], data={"client_id": "user-xyz"})
        session_id = created.json()["session_id"]
        assert created.status_code == 200 and client.get(f"/session/{session_id}").status_code == 200
        for _ in range(2):  # a session serves as often as one likes
            status, headers, content = _slicer_infer(service, model, "volume", {"client_id": "user-xyz"},
                                                     session_id=session_id)
            assert status == 200
            parts = _parts(headers, content)
            name, image = parts["image"]
            assert name is not None and name.endswith(".nii.gz")
            assert np.array_equal(_labels(image, tmp_path), ours)
            params = json.loads(parts["params"][1])
            names = [k for k, _ in sorted(params["label_names"].items(), key=lambda item: item[1])]
            assert names == LABELS[1:] and set(params["volumes_ml"]) == set(names)
        fault(client.get(f"/jobs/{session_id}"), 404, "NO_SUCH_JOB")
        assert client.delete(f"/session/{session_id}").status_code == 200
        fault(client.get(f"/session/{session_id}"), 404, "NO_SUCH_SESSION")
    status, _, content = _slicer_infer(service, model, "volume", {}, session_id=session_id)
    assert status == 404 and json.loads(content)["code"] == "NO_SUCH_SESSION"
    until(lambda: service.files() == [], seconds=5)


@pytest.mark.parametrize("output", ["image", "json", "all", None])
def test_a_file_in_any_output(service: Running, model: str, ct: Path, ours: np.ndarray, output: str | None,
                              tmp_path: Path) -> None:
    status, headers, content = _slicer_infer(service, model, "", {}, file=ct, output=output)
    assert status == 200, content
    if output == "json":
        assert set(json.loads(content)["label_names"]) == set(LABELS[1:])
        return
    image = content if output == "image" else (_parts(headers, content)["image"][1])
    assert np.array_equal(_labels(image, tmp_path), ours)
    until(lambda: service.files() == [], seconds=5)  # nobody has the job's id, so it is deleted with its answer


def test_dicom_seg_of_a_zip(service: Running, model: str, slices: Path, ct: Path, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    status, headers, content = _slicer_infer(service, model, "", {}, file=slices, output="dicom_seg")
    assert status == 200 and headers["content-type"] == "application/dicom"
    (tmp_path / "x.dcm").write_bytes(content)
    assert pydicom.dcmread(tmp_path / "x.dcm").Modality == "SEG"
    status, _, content = _slicer_infer(service, model, "", {}, file=ct, output="dicom_seg")
    assert status == 422 and json.loads(content)["code"] == "FORMAT"


def test_what_it_does_not_have_is_said(service: Running, model: str, ct: Path) -> None:
    """OHIF's plug-in names a series of an archive, and sends nothing."""
    status, _, content = _slicer_infer(service, model, "1.2.840.1", {}, output="image")
    assert status == 404 and json.loads(content)["code"] == "IMAGE_ID"
    for name, image, code, expected in ((model, "", "NO_FILE", 400), ("deepedit", "x", "NO_SUCH_MODEL", 404)):
        status, _, content = _slicer_infer(service, name, image, {})
        assert status == expected and json.loads(content)["code"] == code
    with service.client() as client:
        fault(client.post(f"/infer/{model}", params={"output": "nrrd"}), 400, "PARAMETER")
        fault(client.post(f"/infer/{model}", params={"image": "x"}), 404, "IMAGE_ID")
        fault(client.put("/session/", content=b"x"), 400, "NO_FILE")
        for path in ("/activelearning/random", "/train/x", "/datastore/"):
            assert client.post(path).status_code in (404, 405)
    cut = ct.read_bytes()[:-50]
    (ct.parent / "cut.nii.gz").write_bytes(cut)
    status, _, content = _slicer_infer(service, model, "", {}, file=ct.parent / "cut.nii.gz")
    assert status == 422 and json.loads(content)["code"] == "TRUNCATED"
    until(lambda: service.files() == [], seconds=5)


def test_who_leaves_frees_the_slot(service: Running, model: str, ct: Path, long_ct: Path) -> None:
    with service.client() as client:
        busy = send(client, long_ct, overlap=0.9)
        until(lambda: client.get(f"/jobs/{busy}").json()["state"] == "running")
        body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + ct.read_bytes() + b"\r\n--b--\r\n"
        with connected(service) as raw:
            raw.sendall(head(service, "Content-Type: multipart/form-data; boundary=b", f"Content-Length: {len(body)}",
                             path=f"/infer/{model}") + body)
            until(lambda: client.get("/health").json()["queued"] == 1)
        until(lambda: client.get("/health").json()["queued"] == 0, seconds=5)
        client.delete(f"/jobs/{busy}")
    until(lambda: service.files() == [], seconds=5)


def test_slicers_login_takes_the_token_as_password(ct: Path, tmp_path: Path) -> None:
    token = "a-token-of-more-than-sixteen"
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(token)
    closed = ("--token-file", path, "--set", "app=false")
    with running(tmp_path / "closed", *closed) as service, service.client() as client:
        assert client.get("/auth/").json() == {"enabled": True}
        form = {"username": "doe", "password": "wrong-wrong-wrong-wrong", "grant_type": "password"}
        fault(client.post("/auth/token", data=form), 401, "TOKEN")
        fault(client.post("/auth/token", data={"x": "y" * 10_000}), 413, "TOO_LARGE")
        given = client.post("/auth/token", data=form | {"password": token}).json()
        shown = {"authorization": f"{given['token_type']} {given['access_token']}"}
        assert client.get("/auth/token/valid", headers=shown).status_code == 200
        model = next(iter(client.get("/info/", headers=shown).json()["models"]))
        assert _slicer_infer(service, model, "", {}, file=ct, token=token)[0] == 200
        assert _slicer_infer(service, model, "", {}, file=ct)[0] == 401


def test_several_at_once_each_get_their_own(service: Running, model: str, ct: Path, slices: Path) -> None:
    answers: dict[str, tuple[int, Any, bytes]] = {}
    threads = [threading.Thread(target=lambda p=path, n=name: answers.update(
        {n: _slicer_infer(service, model, "", {}, file=p, output="json")})) for name, path in
        (("a", ct), ("b", slices), ("c", ct))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[name][0] for name in "abc"] == [200, 200, 200]
    assert answers["a"][2] == answers["c"][2] != answers["b"][2]
