"""Draws the page in Chromium with a CT and the organs found in it, to be looked at.

``python web/test/make_picture.py EXPORT SCAN PNG`` from the repository; EXPORT is a folder of `autosam3d export`.
Scans of patients stay out of the repository, and so do their pictures in 3D, which show a face.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from autosam3d.checkpoints.exported import open_export
from autosam3d.export.web import write_web_folder

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))
from bench_web import FLAGS, _served  # noqa: E402


def main() -> None:
    export, scan, png = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        write_web_folder(open_export(Path(export)), Path(scratch) / "site")
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with _served(Path(scratch) / "site") as address:
            page = chromium.new_context(color_scheme="dark", viewport={"width": 1200, "height": 860},
                                        service_workers="block").new_page()
            page.goto(address)
            page.set_input_files("#file" if Path(scan).is_file() else "#folder", scan)
            while not page.inner_text("#status").startswith("Done"):
                assert not page.is_visible("#error"), page.inner_text("#error")
                time.sleep(0.5)
            page.wait_for_timeout(5000)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.save(png, optimize=True)


if __name__ == "__main__":
    main()
