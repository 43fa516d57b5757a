"""The listener with a stand-in for the network, which can be killed at a chosen moment.

`Forge` is one process that has imported everything and forks a listener for each order, a line of JSON with `state`,
`to` (AE@HOST:PORT or a URL), `moment`, `max_file_bytes`. A listener writes its port to STATE.port and its log to
STATE.log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import driver

from autosam3d.errors import AutoSam3dError
from autosam3d.services.pacs import arrivals
from autosam3d.services.pacs.destination import parse_destination
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.incoming import Incoming, RoomLimits
from autosam3d.services.pacs.ledger import Ledger, Retry
from autosam3d.services.pacs.listener import ListenSettings, listening
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService
from autosam3d.services.pacs.sinks import DicomWebSink, DimseSink
from autosam3d.services.pacs.state_folder import hold_state_folder

MOMENTS = ("object received", "all received", "taken up", *driver.MOMENTS)
TITLE = "LISTENER"
SETTLE_SECONDS = 0.4


def work(state: Path, to: str, moment: str, port_file: Path) -> None:
    sink = DicomWebSink(DicomWeb(to)) if to.startswith("http") else DimseSink(parse_destination(to), TITLE)
    with hold_state_folder(state) as folder, contextlib.closing(Ledger(folder.ledger)) as ledger:
        service = ArchiveService(folder, ledger, driver.FromHu(), sink, None, Retry(first_seconds=0.1))
        service.sweep()
        incoming = Incoming(folder.incoming, RoomLimits(min_free_bytes=1 << 20))
        driver.kill_at(moment, service)
        kill_at(moment, incoming, service)
        settings = ListenSettings(ae_title=TITLE, port=0, allow_ae=("SCANNER", "ORTHANC"))
        with listening(settings, incoming) as (_, port):
            port_file.with_suffix(".new").write_text(str(port))
            port_file.with_suffix(".new").rename(port_file)
            arrivals.run_forever(service, incoming, arrivals.Arrivals(
                rule=Rule(), model=driver.MODEL, settings="{}", settle_seconds=SETTLE_SECONDS))


def kill_at(moment: str, incoming: Incoming, service: ArchiveService) -> None:
    put, take_up, num = incoming.put, service._take_received, [0]

    def putting(*args):
        done = put(*args)
        num[0] += 1
        if num[0] == {"object received": 7, "all received": 12}.get(moment):
            driver.die()
        return done

    def taking(job):
        if moment == "taken up":
            driver.die()
        take_up(job)

    incoming.put, service._take_received = putting, taking  # type: ignore[method-assign]


@dataclass
class Listener:
    """One that runs, or ran."""

    forge: Forge
    state: Path
    pid: int

    def port(self) -> str:
        path = self.state.with_suffix(".port")
        for _ in range(400):
            if path.exists():
                return path.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log())

    def log(self) -> str:
        return self.state.with_suffix(".log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        return self.forge.ask({"wait": self.pid})


class Forge:
    """Forks listeners; what took long to import is imported once."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=os.environ | {
                                             "OMP_NUM_THREADS": "1",
                                             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})

    def start(self, state: Path, to: str, moment: str = "", max_file_bytes: int | None = None) -> Listener:
        state.with_suffix(".port").unlink(missing_ok=True)
        pid = self.ask({"state": str(state), "to": to, "moment": moment, "max_file_bytes": max_file_bytes})
        return Listener(self, state, pid)

    def ask(self, order: dict) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _warm_up() -> None:
    """One series, so that tables which libraries load at their first use are there before anything is forked."""
    from test_pacs_orthanc import phantom

    with tempfile.TemporaryDirectory() as folder:
        driver.FromHu().segment(phantom(Path(folder, "ct")), Path(folder))


def _serve_orders() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        state = Path(order["state"])
        log = os.open(state.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(log, number)
        try:
            if order["max_file_bytes"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"],) * 2)
            work(state, order["to"], order["moment"], state.with_suffix(".port"))
        except AutoSam3dError as error:
            sys.exit(f"error[{error.code}] {error}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arrivals._LOOK_SECONDS = 0.1
    _warm_up()
    _serve_orders()
