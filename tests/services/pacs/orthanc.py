"""A real Orthanc with its DICOMweb plug-in, for as long as a test needs it, on free ports of this machine."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def demand_orthanc() -> str:
    """The program; skipped where it is absent."""
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    if Path(program).exists() and PLUGIN.exists():
        return program
    pytest.skip("Orthanc and its DICOMweb plug-in are not installed: apt-get install orthanc orthanc-dicomweb")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass
class Orthanc:
    port: int
    dicom_port: int

    @property
    def dicomweb(self) -> str:
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def rest(self, path: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=30) as answer:
            return answer.read()

    def put(self, path: str, content: object) -> None:
        data = json.dumps(content).encode()
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method="PUT"),
                               timeout=30).close()

    def clear(self) -> None:
        for key in json.loads(self.rest("/studies")):
            gone = urllib.request.Request(f"http://127.0.0.1:{self.port}/studies/{key}", method="DELETE")
            urllib.request.urlopen(gone, timeout=30).close()

    def send(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*.dcm")):
            self.rest("/instances", path.read_bytes())

    def objects(self, modality: str) -> list[bytes]:
        """Files of all objects of a modality."""
        found = []
        for key in json.loads(self.rest("/series")):
            series = json.loads(self.rest(f"/series/{key}"))
            if series["MainDicomTags"]["Modality"] == modality:
                found += [self.rest(f"/instances/{one}/file") for one in series["Instances"]]
        return found


@contextmanager
def running_orthanc(folder: Path, **settings: object) -> Iterator[Orthanc]:
    program = demand_orthanc()
    folder.mkdir(exist_ok=True)
    orthanc = Orthanc(free_port(), free_port())
    config = {
        "Name": "test", "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "HttpPort": orthanc.port, "DicomPort": orthanc.dicom_port, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "Plugins": [str(PLUGIN)], "DicomAlwaysAllowStore": True, "SaveJobs": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}, **settings,
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                with socket.create_connection(("127.0.0.1", orthanc.port), 1):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield orthanc
    finally:
        process.terminate()
        process.wait(20)
