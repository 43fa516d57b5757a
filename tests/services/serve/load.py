"""T11: many senders at once, from this process, and what the service looks like meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

# Asks in a process of its own, with a connection each time: the senders' process has enough to do.
_ASK = """
import http.client, sys, time
while True:
    began = time.perf_counter()
    connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    print(time.perf_counter() - began, flush=True)
    time.sleep(0.02)
"""


@dataclass
class Load:
    """What a burst of uploads did."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    without_retry_after: int = 0
    broken: collections.Counter[str] = field(default_factory=collections.Counter)
    """Requests without an answer, by what happened to them."""
    seconds: float = 0.0
    health_seconds: list[float] = field(default_factory=list)
    rss_before: int = 0
    rss_peak: int = 0
    ids: list[str] = field(default_factory=list)

    def health_ms(self, share: float) -> float:
        ordered = sorted(self.health_seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    files: int
    threads: int
    rss: int
    temp_bytes: int

    @classmethod
    def by(cls, pid: int, folder: Path) -> Held:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        temp = 0
        for place, _, names in os.walk(folder):
            for name in names if Path(place) != folder and "web" not in Path(place).parts else ():
                with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                    temp += (Path(place) / name).stat().st_size if name != ".ses" else 0
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return cls(files, int(status["Threads"]), int(status["VmRSS"].split()[0]) * 1024, temp)


async def burst(url: str, pid: int, folder: Path, count: int, content: bytes) -> Load:
    """`count` senders begin together; /health is asked all along.

    Args:
        url: of the service.
        pid: its process.
        folder: its folder.
        content: of each body.
    """
    load = Load(rss_before=Held.by(pid, folder).rss)
    limits = httpx.Limits(max_connections=count + 10)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        done = asyncio.Event()

        async def watch() -> None:
            while not done.is_set():
                load.rss_peak = max(load.rss_peak, Held.by(pid, folder).rss)
                await asyncio.sleep(0.05)

        async def post() -> None:
            try:
                answer = await client.post("/jobs?format=json", content=content,
                                           headers={"content-type": "application/octet-stream"})
            except httpx.HTTPError as error:
                load.broken[type(error).__name__] += 1
                return
            load.statuses[answer.status_code] += 1
            if answer.status_code in (429, 503):
                load.without_retry_after += "retry-after" not in answer.headers
            elif answer.status_code == 202:
                load.ids.append(answer.json()["id"])

        asking = subprocess.Popen([sys.executable, "-c", _ASK, *url.removeprefix("http://").split(":")],
                                  stdout=subprocess.PIPE, text=True)
        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        await asyncio.gather(*(post() for _ in range(count)))
        load.seconds = time.perf_counter() - began
        done.set()
        await watching
        asking.terminate()
        told, _ = asking.communicate()
        load.health_seconds = [float(line) for line in told.splitlines()]
    return load
