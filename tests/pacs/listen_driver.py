"""The listener with a stand-in for the network, which can be killed at a chosen moment:
``python listen_driver.py STATE SINK MOMENT [MAX_FILE_BYTES]``; it prints its port. SINK is AE@HOST:PORT or a URL."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import sys
from pathlib import Path

import driver

from autosam3d.errors import AutoSam3dError
from autosam3d.pacs import arrivals
from autosam3d.pacs.destination import parse_destination
from autosam3d.pacs.dicomweb import DicomWeb
from autosam3d.pacs.incoming import Incoming, RoomLimits
from autosam3d.pacs.ledger import Ledger, Retry
from autosam3d.pacs.listener import ListenSettings, listening
from autosam3d.pacs.receiving import ConnectionLimits
from autosam3d.pacs.rule import Rule
from autosam3d.pacs.service import Service
from autosam3d.pacs.sinks import DicomWebSink, DimseSink
from autosam3d.pacs.state_folder import hold_state_folder

MOMENTS = ("object received", "all received", "taken up", *driver.MOMENTS)
TITLE = "LISTENER"
SETTLE_SECONDS = 0.4


def main(state: Path, to: str, moment: str) -> None:
    sink = DicomWebSink(DicomWeb(to)) if to.startswith("http") else DimseSink(parse_destination(to), TITLE)
    with hold_state_folder(state) as folder, contextlib.closing(Ledger(folder.ledger)) as ledger:
        service = Service(folder, ledger, driver.FromHu(), sink, None, Retry(first_seconds=0.1))
        service.sweep()
        incoming = Incoming(folder.incoming, RoomLimits(max_objects=20))
        driver.kill_at(moment, service)
        kill_at(moment, incoming, service)
        limits = ConnectionLimits(idle_seconds=5, pdu_seconds=2)
        with listening(ListenSettings(ae_title=TITLE, port=0, allow_ae=("SCANNER", "ORTHANC"), limits=limits),
                       incoming) as (_, port):
            print(port, flush=True)
            arrivals.run_forever(service, incoming, arrivals.Arrivals(
                rule=Rule(), model=driver.MODEL, settings="{}", settle_seconds=SETTLE_SECONDS))


def kill_at(moment: str, incoming: Incoming, service: Service) -> None:
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    logging.getLogger("autosam3d.pacs").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arrivals._LOOK_SECONDS = 0.1
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    except AutoSam3dError as error:
        sys.exit(f"error[{error.code}] {error}")
