"""T15: who may ask what, under which name, from which page."""

from __future__ import annotations

import base64
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import Running, answer_of, connected, fault, head, outcome, running

from autosam3d.errors import UsageError
from autosam3d.services.addresses import is_loopback
from autosam3d.services.serve.settings import demand_token_off_loopback, read_token
from command_line import run
from exports import mini_export

# Fixed: a test's name has it in it, and every worker of pytest must find the same names.
TOKEN = "Qm7tVnYw3kLr0sXbJd4fHg8z-a_2UeCi"
ROUTES = [("GET", "/"), ("GET", "/docs"), ("GET", "/docs.css"), ("GET", "/openapi.json"), ("POST", "/jobs"),
          ("GET", "/jobs/AAAAAAAAAAAAAAAAAAAAAA"), ("GET", "/jobs/AAAAAAAAAAAAAAAAAAAAAA/result"),
          ("DELETE", "/jobs/AAAAAAAAAAAAAAAAAAAAAA"), ("GET", "/info/"), ("POST", "/infer/x"), ("PUT", "/session/"),
          ("GET", "/session/x"), ("DELETE", "/session/x"), ("GET", "/auth/token/valid"), ("GET", "/model/model.onnx"),
          ("GET", "/nowhere"), ("OPTIONS", "/jobs"), ("HEAD", "/")]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.touch(0o600)
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture(scope="module")
def closed(token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("closed"), "--token-file", token_file, "--host", "0.0.0.0", "--allow-host",
                 "ct.example.org") as service:
        service.url = service.url.replace("0.0.0.0", "127.0.0.1")
        yield service


def test_every_route_asks_for_the_token(closed: Running) -> None:
    wrong = [None, "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Token {TOKEN}", "Basic x",
             f"Bearer {TOKEN.upper()}",
             "Basic " + base64.b64encode(f"{TOKEN}:x".encode()).decode(), "Bearer é".encode().decode("latin-1")]
    right = [f"Bearer {TOKEN}", f"bearer {TOKEN}", "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()]
    with closed.client() as client:
        for (method, path), shown in itertools.product(ROUTES, wrong):
            headers = [(b"authorization", shown.encode("latin-1"))] if shown is not None else []
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, shown)
            schemes = [value.split()[0] for value in answer.headers.get_list("www-authenticate")]
            assert schemes == ["Basic", "Bearer"]  # in one header, browsers would not ask for a password
            if method != "HEAD":
                fault(answer, 401, "TOKEN")
        for (method, path), shown in itertools.product(ROUTES, right):
            assert client.request(method, path, headers={"authorization": shown}).status_code not in (401, 403, 500)
        assert client.get("/health").status_code == 200
        assert client.get("/auth/").json() == {"enabled": True}
        assert client.get("/", params={"token": TOKEN}).status_code == 401


def test_the_token_is_in_no_log_url_or_error(closed: Running, ct: Path) -> None:
    bodies = []
    with closed.client(headers={"authorization": f"Bearer {TOKEN}"}) as client:
        job = client.post("/jobs", files={"file": ct.read_bytes()}).json()
        bodies += [str(job), str(outcome(client, job["id"])), client.get(f"/{TOKEN}").text,
                   client.get("/jobs", params={"token": TOKEN}).text, client.get("/").text, client.get("/docs").text]
        assert client.get("/").headers["cache-control"] == "no-store"
    assert TOKEN not in closed.log.read_text() and TOKEN not in "".join(bodies)
    arguments = Path(f"/proc/{closed.process.pid}/cmdline").read_bytes()
    kept = [p for p in closed.folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert TOKEN.encode() not in arguments and kept == []


def test_login_bodies_that_are_none(closed: Running) -> None:
    """Without a token: nothing is a bug of the service, and the right password among 16 fields is right."""
    kind = {"content-type": "application/x-www-form-urlencoded"}
    with closed.client() as client:
        for content, status, code in ((b"a=b&" * 17, 413, "PARTS"), (b"a=b&" * 1000, 413, "PARTS"),
                                      (b"a" * 5000, 413, "TOO_LARGE"), (b"", 401, "TOKEN"),
                                      (b"password=\xff\xfe%ff%00", 401, "TOKEN"), (b"%" * 4000, 401, "TOKEN")):
            fault(client.post("/auth/token", content=content, headers=kind), status, code)
        assert client.post("/auth/token", content=f"{'a=b&' * 15}password={TOKEN}", headers=kind).status_code == 200
    with connected(closed) as raw:
        raw.sendall(head(closed, "Content-Length: 4000", path="/auth/token") + b"password=x")
    with closed.client() as client:
        assert client.get("/health").status_code == 200
    assert " 500 " not in closed.log.read_text()


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("localhost", 200), ("[::1]", 200), ("ct.example.org", 200), ("CT.example.org:80", 200),
    ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("192.0.2.7", 403),
    ("0.0.0.0", 403), ("", 403), ("x" * 1000, 403), ("[::1]evil", 403), ("127.0.0.1]", 403), ("127.0.0.1:evil", 403),
])
def test_only_its_own_names(closed: Running, host: str, status: int) -> None:
    with closed.client() as client:
        answer = client.get("/health", headers={"host": host})
    assert answer.status_code == status, answer.text
    if status == 403:
        fault(answer, 403, "HOST")


def test_ten_thousand_headers(closed: Running) -> None:
    """They come in one piece, so that no limit on what is incomplete meets them."""
    with connected(closed) as raw:
        raw.sendall(head(closed, *(f"X{i}: y" for i in range(10_000)), method="GET", path="/health"))
        assert answer_of(raw).split()[1] in (b"431", b"400")
    with closed.client() as client:
        fault(client.get("/health", headers=[(f"x{i}", "y") for i in range(300)]), 431, "HEADERS")
        assert client.get("/health", headers=[(f"x{i}", "y") for i in range(150)]).status_code == 200


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 404), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"origin": "https://localhost"}, 403), ({"origin": "file://"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403),
    ({"sec-fetch-site": "same-origin"}, 404), ({"origin": ""}, 403),
])
def test_pages_of_others_may_not_ask(service: Running, headers: dict[str, str], status: int) -> None:
    with service.client() as client:
        answer = client.delete("/jobs/" + "A" * 22, headers=headers)
        fault(answer, status, "ORIGIN" if status == 403 else "NO_SUCH_JOB")
        own = client.delete("/jobs/" + "A" * 22, headers={"origin": service.url})
        fault(own, 404, "NO_SUCH_JOB")
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", "10.0.0.1"])
def test_no_token_off_loopback_no_service(host: str, tmp_path: Path) -> None:
    run("serve", mini_export(), "--host", host, "--folder", tmp_path / "state").demand_error("NO_TOKEN", 2)
    assert not (tmp_path / "state").exists()
    with pytest.raises(UsageError):
        demand_token_off_loopback(host, None)
    demand_token_off_loopback(host, TOKEN)


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "128.0.0.1", "localhost.", "127.0.0.1.evil.example", "")))


@pytest.mark.parametrize(("content", "mode"), [(TOKEN, 0o644), (TOKEN, 0o640), (TOKEN, 0o602), ("short", 0o600),
                                               ("", 0o600), ("a b" * 10, 0o600), ("é" * 20, 0o600), ("x" * 600, 0o600)])
def test_token_files_that_are_none(content: str, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(UsageError) as error:
        read_token(path)
    assert error.value.code == "TOKEN_FILE" and (not content or content[:5] not in str(error.value))
    done = run("serve", mini_export(), "--token-file", path, "--folder", tmp_path / "state")
    line = done.demand_error("TOKEN_FILE", 2)
    assert not content or content not in line


def test_ipv6_works(tmp_path: Path) -> None:
    with running(tmp_path / "six", "--host", "::1", "--set", "app=false") as service, service.client() as client:
        assert service.url.startswith("http://[::1]:")
        assert client.get("/health").status_code == 200
        assert "API alone" in client.get("/").text


def test_nobody_outside_is_asked(ct: Path, tmp_path: Path) -> None:
    """T16: no connection leaves the machine, and no name is looked up, by the service or by its worker."""
    told, env = listening(tmp_path)
    with running(tmp_path / "alone", env=env) as service, service.client() as client:
        job = client.post("/jobs", files={"file": ct.read_bytes()}).json()
        assert outcome(client, job["id"])["state"] == "done"
        assert isinstance(client.get("/"), httpx.Response)
    asked = told.read_text().splitlines() if told.exists() else []
    assert [line for line in asked if "127.0.0.1" not in line] == []


# Runs where there is no network but the loopback: the command line, then the service with a job of a series.
_ALONE = """
import errno, fcntl, os, socket, struct, subprocess, sys
from pathlib import Path
sys.path[:0] = sys.argv[5:]
with socket.socket() as sock:  # loopback up. *Source*: netdevice(7), SIOCSIFFLAGS and IFF_UP
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh", b"lo", 1))
    assert sock.connect_ex(("192.0.2.1", 9)) == errno.ENETUNREACH
from running import outcome, running, send
export, ct, slices, folder = map(Path, sys.argv[1:5])
segment = [sys.executable, "-m", "autosam3d", "segment", export, ct, folder / "out.nii.gz", "--backend", "onnxruntime"]
subprocess.run(segment, check=True)
assert (folder / "out.nii.gz").is_file()
small = (export, "--backend", "onnxruntime", "--threads", 1)
with running(folder / "service", model=small) as service, service.client() as client:
    job = outcome(client, send(client, slices), seconds=200)
    assert job["state"] == "done" and "rtstruct" in job["formats"], job
    assert client.get("/").status_code == client.get("/docs").status_code == 200
print("alone and well")
"""


def test_command_line_and_service_work_without_a_network(ct: Path, slices: Path, tmp_path: Path) -> None:
    """T16: in a network of their own, which leads nowhere; nothing is even tried."""
    pytest.importorskip("highdicom")
    alone = [shutil.which("unshare") or "unshare", "-rn"]
    if sys.platform != "linux" or not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("needs Linux that lets a user have a network of his own (unshare -rn)")
    told, env = listening(tmp_path)
    folders = [str(p) for p in (Path(__file__).parent, Path(__file__).parents[2])]
    done = subprocess.run([*alone, sys.executable, "-c", _ALONE, str(mini_export()), str(ct), str(slices),
                           str(tmp_path), *folders], env=os.environ | env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "alone and well" in done.stdout, done.stderr
    asked = told.read_text().splitlines()
    # The test's own requests, and its one probe.
    assert [line for line in asked if "127.0.0.1" not in line and "192.0.2.1" not in line] == []
    assert sum("192.0.2.1" in line for line in asked) == 1


def listening(folder: Path) -> tuple[Path, dict[str, str]]:
    """(a file that names whom Python processes ask, the environment in which they do that)."""
    hook, told = folder / "hook", folder / "asked"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\ndef seen(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):\n"
        "        where = args[0] if event == 'socket.getaddrinfo' else args[-1]\n"
        f"        with open({str(told)!r}, 'a') as file: file.write(f'{{event}} {{where}}\\n')\n"
        "sys.addaudithook(seen)\n")
    env = {"PYTHONPATH": os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])}
    probe = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), 0.01)\nexcept OSError: pass\n"
    subprocess.run([sys.executable, "-c", probe], env=os.environ | env, check=True)
    assert "192.0.2.1" in told.read_text()
    told.unlink()
    return told, env
