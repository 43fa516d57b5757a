"""T20: hundreds of scans in one process and a thousand requests to one service hold no more than the first few did."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exports import mini_export
from mini_run import environment
from serving import phantom_ct
from soak_table import share_of

pytest.importorskip("fastapi", reason="the serve extra is not installed")
from load import Held
from running import outcome, running, send, until

MIB = 1 << 20
MOST_MIB_A_RUN = 0.1
# Segments the scan again and again, as one process of a batch does; `keep` is the control arm, which forgets nothing.
_AGAIN = """
import gc, json, os, resource, sys, tempfile, threading
from pathlib import Path
from autosam3d.io import read_ct
from autosam3d.scans.batch import segment_batch
from autosam3d.scans.jobs import check_inputs
from autosam3d.scans.open_model import ModelWish, open_model

(model_path, scan, out), count, keep = map(Path, sys.argv[1:4]), int(sys.argv[4]), sys.argv[5]
model = open_model(model_path, ModelWish(backend="onnxruntime", device="cpu", threads=1))
temporary, kept, rows = Path(tempfile.mkdtemp()), [], []
tempfile.tempdir = str(temporary)
for index in range(count):
    result = segment_batch(check_inputs(scan, out / f"{index % 2}.nii.gz"), model, overwrite=True)
    for path in out.iterdir():
        path.unlink()
    assert not result.failed and (result.written or result.skipped)
    if keep == "keep":
        kept.append(read_ct(scan))
    rss = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    rows.append([rss, len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir(temporary))])
print(json.dumps(rows))
"""


def again(folder: Path, scan: Path, count: int, keep: str) -> np.ndarray:
    """[run, (bytes resident, files open, threads, temporary files)] after each of `count` runs."""
    (folder / keep).mkdir()
    done = subprocess.run([sys.executable, "-c", _AGAIN, mini_export(), scan, folder / keep, str(count), keep],
                          env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def mib_a_run(resident: np.ndarray) -> float:
    """The slope of a straight line through them."""
    return float(np.polyfit(np.arange(len(resident)), resident / MIB, 1)[0])


def test_hundreds_of_scans_in_one_process(tmp_path: Path, figures: Callable[..., None]) -> None:
    scan = phantom_ct(tmp_path / "ct.nii.gz")
    count = share_of(300, least=90)
    rows = again(tmp_path, scan, count, "forget")
    slope = mib_a_run(rows[50:, 0])
    assert slope < MOST_MIB_A_RUN
    assert len({tuple(row) for row in rows[50:, 1:]}) == 1  # files, threads, temporary files
    control = mib_a_run(again(tmp_path, scan, 90, "keep")[50:, 0])
    assert control > MOST_MIB_A_RUN
    figures("T20", "scans segmented in one process", f"{count} runs: {slope:.3f} MiB a run after the first 50 "
            f"(at most {MOST_MIB_A_RUN}), {rows[-1, 1]} files open and {rows[-1, 2]} thread(s) all along",
            f"a process that keeps each scan: {control:.2f} MiB a run")


@pytest.mark.alone
def test_a_thousand_requests(tmp_path: Path, figures: Callable[..., None]) -> None:
    scan = phantom_ct(tmp_path / "ct.nii.gz")
    count = share_of(1000, least=200)
    with running(tmp_path / "service", "--set", "app=false") as service, service.client() as client:
        def ask(index: int) -> None:
            if index % 20 == 0:
                job_id = send(client, scan, format="nifti")
                assert outcome(client, job_id)["state"] == "done"
                assert client.get(f"/jobs/{job_id}/result").status_code == 200
                client.delete(f"/jobs/{job_id}")
            elif index % 20 == 10:
                job = outcome(client, client.post("/jobs", files={"file": b"no scan " * 9}).json()["id"])
                assert job["state"] == "failed"
                client.delete(f"/jobs/{job['id']}")
            else:
                assert client.get(("/health", "/jobs/none", "/docs")[index % 3]).status_code in (200, 404)

        def held() -> Held:
            until(lambda: service.files() == [], seconds=30)
            return Held.by(service.process.pid, service.folder)

        for index in range(100):
            ask(index)
        before = held()
        for index in range(count):
            ask(index)
        after = held()
    slope = (after.rss - before.rss) / MIB / count
    assert slope < MOST_MIB_A_RUN
    assert after.files <= before.files + 2 and after.threads <= before.threads and after.temp_bytes == 0
    figures("T20", "requests to one service, every twentieth a scan and another one no scan",
            f"{count} requests: {slope:.4f} MiB a request after the first 100 (at most {MOST_MIB_A_RUN}), "
            f"{after.files} files open ({before.files} before), {after.threads} threads ({before.threads} before)")
