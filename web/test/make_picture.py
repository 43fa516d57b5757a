"""Draws docs/web_page.png: the page in Chromium with the phantom of tests/test_web.py, no patient's scan.

``python web/test/make_picture.py EXPORT`` from the repository's root; EXPORT is a folder of `autosam3d export`.
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

from autosam3d.export_web import write_web_folder
from autosam3d.exported import open_export
from autosam3d.io.nifti_write import write_ct
from autosam3d.phantom import make_phantom

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))
from bench_web import FLAGS, _served  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch)
        write_web_folder(open_export(sys.argv[1]), folder / "site")
        write_ct(folder / "phantom.nii.gz", make_phantom(3, (40, 80, 80), (5.0, 4.0, 4.0))[0])
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with _served(folder / "site") as address:
            page = chromium.new_context(color_scheme="dark", viewport={"width": 1200, "height": 700},
                                        service_workers="block").new_page()
            page.goto(address)
            page.set_input_files("#file", folder / "phantom.nii.gz")
            while not page.inner_text("#status").startswith("Done"):
                time.sleep(0.2)
            page.wait_for_timeout(1500)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(64).save(REPO / "docs/web_page.png", optimize=True)


if __name__ == "__main__":
    main()
