"""T11, small: every sender is answered, memory stays bounded, and everything is given back."""

from __future__ import annotations

from pathlib import Path

from load import Held, burst
from running import running, until

import own_loop


def test_a_burst_of_uploads(tmp_path: Path) -> None:
    """Bodies that are no scan: each is a job, refused by its worker."""
    with running(tmp_path / "busy", "--set", "queue=20", "--set", "max_upload_mib=4", "--set", "app=false") as service:
        pid = service.process.pid
        warm = own_loop.run(burst(service.url, pid, service.folder, 40, bytes(1 << 20)))
        assert sum(warm.statuses.values()) == 40

        def at_rest() -> bool:
            with service.client() as client:
                for job_id in warm.ids:
                    client.delete(f"/jobs/{job_id}")
                return client.get("/health").json()["queued"] == 0 and service.files() == []

        until(at_rest, seconds=30)
        before = Held.by(pid, service.folder)
        load = own_loop.run(burst(service.url, pid, service.folder, 60, bytes(2 << 20)))
        assert not load.broken, load.broken
        assert sum(load.statuses.values()) == 60 and set(load.statuses) <= {202, 429, 503}, load.statuses
        assert load.statuses[202] >= 20 and load.without_retry_after == 0
        assert load.rss_peak - load.rss_before < 300 << 20
        warm.ids = load.ids
        until(at_rest, seconds=30)
        until(lambda: (after := Held.by(pid, service.folder)).files <= before.files + 2
              and after.threads <= before.threads and after.temp_bytes == 0, seconds=15)
