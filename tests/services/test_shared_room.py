"""Many senders at once leave what must stay free, whether they say how much they send or not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import own_loop
from autosam3d.services import room as room_module
from autosam3d.services.room import NoRoomError, Room

KIB = 1 << 10


class Disk:
    """A disk of so many bytes, on which one folder lies."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.least = folder, size, size

    def free(self) -> int:
        taken = 0
        for place, _, names in os.walk(self.folder):  # which passes over folders that are deleted in this moment
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    taken += -(-Path(place, name).stat().st_size // 4096) * 4096
        self.least = min(self.least, self.size - taken)
        return self.size - taken


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path, 3000 * KIB)
    monkeypatch.setattr(room_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk.free()))
    monkeypatch.setattr(room_module, "_STEP_BYTES", 64 * KIB)
    return disk


def test_what_is_promised_is_not_promised_again(disk: Disk) -> None:
    room = Room(disk.folder, 1000 * KIB)
    first = room.place(1500 * KIB)
    with pytest.raises(NoRoomError):
        room.place(600 * KIB)
    second = room.place(500 * KIB)
    with pytest.raises(NoRoomError):
        second.need(501 * KIB)
    (disk.folder / "a").write_bytes(bytes(1400 * KIB))
    first.need(1400 * KIB)
    first.wrote(1400 * KIB)
    with pytest.raises(NoRoomError):
        room.place(1)
    first.close()  # 100 KiB of its promise were not used
    room.place(100 * KIB).close()
    second.close()
    second.close()
    third = room.place()
    third.need(600 * KIB)
    with pytest.raises(NoRoomError):
        third.need(601 * KIB)
    with pytest.raises(NoRoomError):
        Room(disk.folder, 1601 * KIB).place()


def test_threads_share_one_room(disk: Disk) -> None:
    room, gate, got = Room(disk.folder, 1000 * KIB), threading.Barrier(16), Counter()

    def write(number: int) -> None:
        gate.wait()
        place = room.place()
        try:
            with (disk.folder / str(number)).open("wb", buffering=0) as file:
                for _ in range(50):
                    place.need(8 * KIB)
                    file.write(bytes(8 * KIB))
                    place.wrote(8 * KIB)
            got["whole"] += 1
        except NoRoomError:
            got["refused"] += 1
        finally:
            place.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk.free() >= 1000 * KIB and got["refused"] and sum(got.values()) == 16


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["raw", "form of small files"])
def test_64_uploads_at_once_keep_the_reserve(told: bool, kind: str, disk: Disk, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from autosam3d.services.serve import intake
    from autosam3d.services.serve.app import make_app
    from autosam3d.services.serve.guard import Guard
    from autosam3d.services.serve.intake import ScanService
    from autosam3d.services.serve.runner import Runner
    from autosam3d.services.serve.settings import ServeSettings, SteadyClock
    from autosam3d.services.serve.store import JobStore
    from autosam3d.services.workers.messages import ModelFacts, WorkerSettings

    monkeypatch.setattr(intake, "_ROOM_LEFT_BYTES", 1000 * KIB)
    facts = ModelFacts(name="x", sha256="0" * 64, runtime="none", organs=("a",), side_pairs=())
    settings = ServeSettings(folder=disk.folder / "s", queue=100, allow_hosts=("x",))
    (settings.folder / "jobs").mkdir(parents=True)
    store = JobStore(disk.folder.parent / f"{disk.folder.name}.sqlite")
    head = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    body = bytes(300 * KIB) if kind == "raw" else (head + b"x\r\n") * 200 + b"--b--\r\n"
    content_type = "application/zip" if kind == "raw" else "multipart/form-data; boundary=b"

    async def chunks() -> AsyncIterator[bytes]:
        step = len(body) // 10 + 1
        for start in range(0, len(body), step):
            yield body[start : start + step]
            await asyncio.sleep(0)

    async def burst(service: ScanService) -> Counter[int]:
        through = httpx.ASGITransport(Guard(make_app(service), settings))
        async with httpx.AsyncClient(transport=through, base_url="http://x") as client:
            headers = {"content-type": content_type} | ({"content-length": str(len(body))} if told else {})
            answers = await asyncio.gather(*(client.post("/jobs", content=chunks(), headers=headers)
                                             for _ in range(64)))
        assert {answer.json().get("code") for answer in answers if answer.status_code == 507} == {"NO_SPACE"}
        return Counter(answer.status_code for answer in answers)

    with ThreadPoolExecutor(4) as threads:
        service = ScanService(settings, store, Runner(settings, WorkerSettings(), store, SteadyClock()),
                              SteadyClock(), facts, threads)
        statuses = own_loop.run(burst(service))
    free = disk.free()
    assert set(statuses) == {202, 507} and statuses[202] >= 1 and statuses[507] > 40, statuses
    assert disk.least >= 1000 * KIB
    # Nothing is left of those that were refused, nor promised to anybody.
    assert len(list((settings.folder / "jobs").iterdir())) == statuses[202]
    service.room.place(free - 1000 * KIB).close()
    store.close()


def test_a_series_that_is_fetched_stops_before_the_reserve(tmp_path: Path) -> None:
    pytest.importorskip("requests", reason="the pacs extra is not installed")
    from autosam3d.services.pacs.dicomweb import _with_room

    left = [3]

    def demand_room() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise NoRoomError

    taken = []
    with pytest.raises(NoRoomError):
        taken.extend(_with_room(iter([b"a"] * 10), demand_room))
    assert left == [-1]


def test_received_objects_keep_the_reserve(disk: Disk) -> None:
    pytest.importorskip("pynetdicom", reason="the pacs extra is not installed")
    from autosam3d.services.pacs.incoming import Incoming, RoomLimits
    from autosam3d.services.pacs.receiving import Received

    incoming = Incoming(disk.folder, RoomLimits(min_free_bytes=1000 * KIB))
    objects = []
    for _ in range(8):
        received = Received(*incoming.open(), 0.0)
        received.place = incoming.room.place()
        objects.append(received)
    for _ in range(100):
        for received in objects:
            received.write(bytes(8 * KIB), 1 << 30)
            if received.file is not None:
                received.file.flush()
    assert disk.free() >= 1000 * KIB and disk.least >= 1000 * KIB
    full = [received for received in objects if received.no_room == "disk"]
    assert full and all(received.path is None for received in full)
    for received in objects:
        received.discard()
    incoming.room.place(2000 * KIB).close()
