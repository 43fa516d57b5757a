"""Who sends to the listener: dcmtk's storescu and echoscu, and bytes as no honest sender has them."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE

HOST = "127.0.0.1"


def _dcmtk(program: str) -> str | None:
    """Its path; pynetdicom puts scripts of the same names beside Python, which an activated environment has first."""
    ours = Path(sys.executable).parent
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(folder) != ours]
    return shutil.which(program, path=os.pathsep.join(folders))


def demand_dcmtk() -> None:
    if _dcmtk("storescu") is None or _dcmtk("echoscu") is None:
        pytest.skip("dcmtk's storescu and echoscu are not installed: apt-get install dcmtk")


def echo(port: str | int, called: str = "LISTENER", calling: str = "SCANNER") -> int:
    return _run("echoscu", port, called, calling)


def send(port: str | int, folder: Path, *options: str, called: str = "LISTENER", calling: str = "SCANNER") -> int:
    return _run("storescu", port, called, calling, "+sd", *options, folder=folder)


def store_bytes(port: int, content: bytes, sop_class: str, instance: str, syntax: str) -> int | None:
    """The status of a C-STORE whose data set is `content`; None where the connection ended."""
    entity = AE(ae_title="SCANNER")
    entity.dimse_timeout = entity.network_timeout = 10
    entity.add_requested_context(sop_class, syntax)
    association = entity.associate(HOST, port, ae_title="LISTENER")
    if not association.is_established:
        return None
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, instance
    request.DataSet = io.BytesIO(content)
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, 1)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()
    return None if answer is None else answer.Status


class Cutting:
    """Passes bytes on to a port until so many have gone, then ends both connections."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self._left, self._port = num_bytes, port
        self._listening = socket.create_server((HOST, 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        near, _ = self._listening.accept()
        with near, self._listening, socket.create_connection((HOST, self._port)) as far:
            threading.Thread(target=self._back, args=(far, near), daemon=True).start()
            while self._left > 0 and (piece := near.recv(min(4096, self._left))):
                far.sendall(piece)
                self._left -= len(piece)

    @staticmethod
    def _back(far: socket.socket, near: socket.socket) -> None:
        try:
            while piece := far.recv(4096):
                near.sendall(piece)
        except OSError:
            return


def _run(program: str, port: str | int, called: str, calling: str, *options: str, folder: Path | None = None) -> int:
    places = [HOST, str(port), *([str(folder)] if folder else [])]
    order = [_dcmtk(program) or program, "-aet", calling, "-aec", called, *options, *places]
    return subprocess.run(order, capture_output=True, timeout=60).returncode
