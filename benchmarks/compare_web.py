"""Browser and Python on the same scans: equal labels, seconds, bytes of the first visit.

``python benchmarks/compare_web.py EXPORT SCAN...`` needs playwright and chromium (AUTOSAM3D_CHROMIUM: another one).
"""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from autosam3d.certificate import cpu_name
from autosam3d.export_web import write_web_folder
from autosam3d.exported import load_exported, open_export
from autosam3d.inference import segment
from autosam3d.io import read_ct, read_segmentation

FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader"]
WAIT_MS = 560_000


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    export = open_export(Path(sys.argv[1]))
    scans = [Path(name) for name in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as scratch:
        site = write_web_folder(export, Path(scratch) / "site")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Silent, directory=site.folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = _in_browser(f"http://127.0.0.1:{server.server_port}/", scans, Path(scratch))
        server.shutdown()
        for scan, row in zip(scans, rows, strict=True):
            row.update(_beside_python(export, scan, Path(scratch) / f"{scan.name}.seg.nii.gz"))
        first_visit = sum(len(gzip.compress((site.folder / name).read_bytes(), 6)) for name in site.sizes
                          if name not in ("licenses.txt", "sw.js"))
    result = {"command": f"python benchmarks/compare_web.py {' '.join(Path(a).name for a in sys.argv[1:])}",
              "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": cpu_name(), "cores": os.cpu_count(),
              "site_mb": round(site.total_bytes / 1e6, 1), "first_visit_gzip_mb": round(first_visit / 1e6, 2),
              "scans": rows}
    print(json.dumps(result, indent=1))


def _in_browser(address: str, scans: list[Path], folder: Path) -> list[dict[str, Any]]:
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("AUTOSAM3D_CHROMIUM") or shutil.which("chromium"), args=FLAGS)
        page = browser.new_context(accept_downloads=True).new_page()
        page.goto(address)
        page.wait_for_timeout(5000)
        if not page.evaluate("crossOriginIsolated"):
            sys.exit("the page got no threads: is the service worker there?")
        for scan in scans:
            page.set_input_files("#file", scan)
            page.wait_for_selector("#left:has-text('window 1 of')", state="attached", timeout=WAIT_MS)
            started = time.perf_counter()
            page.wait_for_selector("#status:has-text('Done')", timeout=WAIT_MS)
            after_first = time.perf_counter() - started
            windows = int(re.findall(r"of (\d+)", page.text_content("#left") or "")[0])
            with page.expect_download() as download:
                page.click("#nifti")
            download.value.save_as(folder / f"{scan.name}.seg.nii.gz")
            rows.append({"scan": scan.name, "windows": windows, "told": page.text_content("#status"),
                         "threads": page.text_content("#threads"),
                         "seconds_after_first_window": round(after_first, 2)})
        browser.close()
    return rows


def _beside_python(export: Any, scan: Path, from_browser: Path) -> dict[str, Any]:
    model = load_exported(export, "onnxruntime", os.cpu_count() or 1)
    volume = read_ct(scan)
    started = time.perf_counter()
    ours = segment(volume, model).labels
    seconds = time.perf_counter() - started
    theirs = read_segmentation(from_browser).labels
    organ = (ours > 0) | (theirs > 0)
    return {"voxels": ours.size, "voxels_that_differ": int(np.count_nonzero(ours != theirs)),
            "organ_voxels": int(np.count_nonzero(organ)), "python_seconds": round(seconds, 2),
            "equal_percent": round(100 * float(np.mean(ours == theirs)), 5),
            "equal_of_organs_percent": round(100 * float(np.mean(ours[organ] == theirs[organ])), 4)}


if __name__ == "__main__":
    main()
