"""The page in a real browser, for the tests of several files: the export, the site, Chromium, a page that remembers."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosam3d.checkpoints.exported import open_export
from autosam3d.data.phantom import make_phantom
from autosam3d.export.web import write_web_folder
from autosam3d.io.nifti.write import write_ct
from exports import mini_export, packaged_export

REPO = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("AUTOSAM3D_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader"]
WAIT_S = 240
MINI_ORGAN = "right kidney"
"""Of `mini_site`."""


def absent(what: str) -> None:
    """Skips; where all can be installed, tests/conftest.py makes a failure of it."""
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def web_export() -> Path:
    """The packaged model, exported."""
    return packaged_export()


@pytest.fixture(scope="session")
def site(web_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "site"
    write_web_folder(open_export(web_export), folder)
    return folder


@pytest.fixture(scope="session")
def mini_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a network of three convolutions, for what is not about the network: SwiftShader needs minutes for a window
    of the packaged one, WebAssembly a second."""
    folder = tmp_path_factory.mktemp("mini") / "site"
    write_web_folder(open_export(mini_export()), folder)
    return folder


class _Silent(http.server.SimpleHTTPRequestHandler):
    """What `python -m http.server` gives out, without its log."""

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server that gives out `folder`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    with served(site) as url:
        yield url


@pytest.fixture(scope="session")
def mini_address(mini_site: Path) -> Iterator[str]:
    with served(mini_site) as url:
        yield url


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Starts Chromium with flags of the test's own."""
    if importlib.util.find_spec("playwright") is None:
        absent("the package playwright")
    if CHROMIUM is None:
        absent("chromium")
    import playwright.sync_api as api

    with api.sync_playwright() as playwright:
        yield lambda *flags: playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])


@pytest.fixture(scope="session")
def browser(chromium: Any) -> Any:
    return chromium()


class Page:
    """A page of its own, which remembers where requests went."""

    def __init__(self, browser: Any, address: str, organ: str, **options: Any) -> None:
        self.address = address
        self._loaded = f"document.querySelector('#model').textContent.includes('{organ}')"
        self._errors = pytest.importorskip("playwright.sync_api").Error
        self.context = browser.new_context(accept_downloads=True, **options)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.goto(address)
        self.until(self._loaded)

    def until(self, true: str) -> None:
        """Asked again and again from outside: the page's policy forbids what Playwright waits with."""
        late = time.monotonic() + WAIT_S
        while True:
            # The page may be just loading once more, under its service worker.
            with contextlib.suppress(self._errors):
                if self.page.evaluate(true):
                    return
            assert time.monotonic() < late, f"{true}; the page says: {self.page.inner_text('#panel')}"
            self.page.wait_for_timeout(100)

    def isolated(self) -> bool:
        """After the service worker took the page over."""
        self.until(f"crossOriginIsolated && {self._loaded}")
        return True

    def segment(self, scan: Path) -> str:
        self.page.set_input_files("#folder" if scan.is_dir() else "#file", scan)
        return self.outcome()

    def drop(self, files: dict[str, bytes]) -> str:
        """Drops files on the page as a person does; Chromium gives a test no folder to drop."""
        data = self.page.evaluate_handle("""(files) => {
            const data = new DataTransfer();
            for (const [name, text] of files)
                data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
            return data;
        }""", [(name, base64.b64encode(content).decode()) for name, content in files.items()])
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": data})
        return self.outcome()

    def outcome(self) -> str:
        self.until("document.querySelector('#status').textContent.startsWith('Done') "
                   "|| !document.querySelector('#error').hidden")
        fault = self.page.text_content("#error") if self.page.is_visible("#error") else ""
        return fault or self.page.text_content("#status")

    def download(self, button: str, to: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click(button)
        download.value.save_as(to)
        return to

    def left_the_site(self) -> list[str]:
        own = (self.address, f"blob:{self.address}", "data:")
        return [url for url in self.requests if not url.startswith(own)]


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """Opens pages with the packaged model."""
    with _opening(browser, address, "brainstem") as open_page:
        yield open_page


@pytest.fixture
def opened_mini(browser: Any, mini_address: str) -> Iterator[Any]:
    """Opens pages with the small one."""
    with _opening(browser, mini_address, MINI_ORGAN) as open_page:
        yield open_page


@contextlib.contextmanager
def _opening(browser: Any, address: str, organ: str) -> Iterator[Any]:
    pages: list[Page] = []

    def open_page(**options: Any) -> Page:
        pages.append(Page(browser, address, organ, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An abdomen in an oblique grid of odd axis order; the model takes parts of it for a cord and a mandible. Cropped
    and resampled it fits into one window."""
    return _phantom(tmp_path_factory.mktemp("scan"), (16, 48, 48))


@pytest.fixture(scope="session")
def larger_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same over several windows."""
    return _phantom(tmp_path_factory.mktemp("scan"), (22, 60, 60))


def _phantom(folder: Path, shape: tuple[int, int, int]) -> Path:
    write_ct(folder / "phantom.nii.gz", make_phantom(3, shape, (4.0, 5.0, 5.0))[0])
    return folder / "phantom.nii.gz"
