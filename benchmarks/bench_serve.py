"""200 uploads of 8 MB at the same moment, to a real service with the packaged model (T11).

    python benchmarks/bench_serve.py

Two services: as it is started by default (a queue of 32), and with room for all of them. Each is warmed by one burst.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests/services/serve"), str(REPO / "tests")]

from load import Held, Load, burst  # noqa: E402
from running import Running, running, until  # noqa: E402

from autosam3d.checkpoints.machine import cpu_name  # noqa: E402
from serving import phantom_ct  # noqa: E402

COUNT, RESULT = 200, REPO / "benchmarks/results/serve.md"
LIMITS = "every answer 2xx, 429 or 503 with Retry-After; growth at most 300 MB; /health at most 250 ms at p99"
CASES = {"as by default (queue 32)": (), "with room for all": ("--queue", 250)}


def measure(args: tuple[object, ...], content: bytes, folder: Path) -> tuple[Load, Held, Held]:
    """The second of two bursts (memory: of both), and what the service held before and after it."""
    with running(folder, *args, model=None) as service:
        pid = service.process.pid
        first = asyncio.run(burst(service.url, pid, service.folder, COUNT, content))
        at_rest(service, first)
        before = Held.by(pid, service.folder)
        load = asyncio.run(burst(service.url, pid, service.folder, COUNT, content))
        load.rss_before, load.rss_peak = first.rss_before, max(first.rss_peak, load.rss_peak)
        at_rest(service, load)
        time.sleep(6)  # connections that are kept alive end after five seconds
        return load, before, Held.by(pid, service.folder)


def at_rest(service: Running, load: Load) -> None:
    """All jobs are deleted, and what was at work is given up."""
    with service.client() as client:
        for job_id in load.ids:
            client.delete(f"/jobs/{job_id}")
    until(lambda: service.files() == [], seconds=30)


def main() -> None:
    rows, held = [], []
    with tempfile.TemporaryDirectory() as name:
        scan = phantom_ct(Path(name) / "scan.nii", (158, 162, 164), 2.0)
        content = scan.read_bytes()
        for number, (case, args) in enumerate(CASES.items()):
            load, before, after = measure(args, content, Path(name) / str(number))
            statuses = ", ".join(f"{status}: {count}" for status, count in sorted(load.statuses.items()))
            broken = sum(load.broken.values())
            rows.append(f"| {case} | {statuses} | {broken} | {load.without_retry_after} | {load.seconds:.1f} | "
                        f"{(load.rss_peak - load.rss_before) / 1e6:.0f} | {load.health_ms(0.5):.0f} / "
                        f"{load.health_ms(0.99):.0f} / {load.health_ms(1):.0f} |")
            held.append(f"| {case} | {before.files} / {after.files} | {before.threads} / {after.threads} | "
                        f"{before.temp_bytes} / {after.temp_bytes} | {before.rss / 1e6:.0f} / {after.rss / 1e6:.0f} |")
    text = f"""# {COUNT} uploads of {len(content) / 1e6:.1f} MB at once

`python benchmarks/bench_serve.py`, {time.strftime("%Y-%m-%d")}, {os.cpu_count()} cores of {cpu_name()}.
The senders are {COUNT} connections of one process on the same machine; the packaged model segments what was accepted,
with all cores, all along. Each service is warmed by one such burst. Limits (reliability, T11):
{LIMITS}.

| service | answers | without one | without Retry-After | seconds | growth, MB | /health p50 / p99 / most, ms |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Before the burst / after it, when its jobs were deleted:

| service | open files | threads | bytes of jobs and temporaries | resident MB |
|---|---|---|---|---|
{chr(10).join(held)}
"""
    sys.stdout.write(text)
    RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
