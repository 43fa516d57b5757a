"""The service with a stand-in for the network, which can be killed at a chosen moment:
``python driver.py URL STATE MOMENT``.

Organs are read from HU; the archive, the ledger, reading, writing and storing are real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np

from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.output_formats import RTSTRUCT, SEG, label_writer
from autosam3d.labels import LabelMap
from autosam3d.services.pacs import sinks
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.ledger import Ledger, Retry
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService
from autosam3d.services.pacs.state_folder import hold_state_folder
from autosam3d.services.pacs.watch import Watch, run_once
from autosam3d.volume import Segmentation

LABELS = LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
MODEL = "ab" * 32
MOMENTS = ("fetched", "segmented", "seg stored", "both stored")


class FromHu:
    """A bright organ on the right, a darker one on the left."""

    settings = "{}"

    def segment(self, series: Path, folder: Path) -> list[Path]:
        volume = read_ct(series)
        labels = np.select([volume.voxels_hu > 350, volume.voxels_hu > 150], [1, 2]).astype(np.uint8)
        organs = Segmentation(labels, volume.affine, volume.source)
        paths = []
        for form, name in ((SEG, "a.seg.dcm"), (RTSTRUCT, "a.rtstruct.dcm")):
            write = label_writer(form, series, volume.source, ReadOptions(), "test", MODEL, "{}")
            write(folder / name, organs, LABELS)
            paths.append(folder / name)
        return paths


def work(url: str, state: Path, moment: str = "", tries: int = 10, auth=None) -> ArchiveService:
    archive = DicomWeb(url, auth)
    with hold_state_folder(state) as folder, contextlib.closing(Ledger(folder.ledger)) as ledger:
        service = ArchiveService(folder, ledger, FromHu(), sinks.DicomWebSink(archive), archive, Retry(tries=tries))
        service.sweep()
        kill_at(moment, service)
        run_once(service, archive, Watch(rule=Rule(), model=MODEL, settings="{}", settle_seconds=0))
    return service


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, service: ArchiveService) -> None:
    sink = type(service.sink)
    move, put = service.ledger.move, sink.put
    count = [0]

    def moved(job, state, *rest):
        if moment == "both stored" and state == "done":
            die()
        done = move(job, state, *rest)
        if state == moment:
            die()
        return done

    def stored(self, path):
        put(self, path)
        count[0] += 1
        if moment == "seg stored" and count[0] == 1:
            die()

    service.ledger.move = moved  # type: ignore[method-assign]
    sink.put = stored  # type: ignore[method-assign]


if __name__ == "__main__":
    done = work(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4])
    sys.exit(6 if done.num_failed else 0)
