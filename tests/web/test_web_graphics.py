"""The page's graphics card: WebGPU of SwiftShader, which is a right one and a slow one, and cards that are spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra export")

from autosam3d.data.phantom import make_phantom
from autosam3d.io import read_segmentation
from autosam3d.io.nifti.write import write_ct
from web_browser import MINI_ORGAN, Page, absent, served

pytestmark = pytest.mark.slow
_SOFTWARE_CARD = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
_SCRIPT = "webgpu/ort.webgpu.min.mjs"
# ONNX Runtime as it is, but for what it makes of a window; `run` counts them, the check before the scan first.
_SPOILED = """import * as real from "./real.mjs";
export const {{ env, Tensor }} = real;
let run = 0;
export const InferenceSession = {{ create: async (...words) => {{
  const session = await real.InferenceSession.create(...words);
  return {{ run: async (ct, names) => {{
    run++;
    const found = await session.run(ct, names);
    const values = Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
    {spoil}
    return found;
  }} }};
}} }};
"""


@pytest.fixture(scope="module")
def card_browser(chromium: Any, mini_address: str) -> Any:
    browser = chromium(*_SOFTWARE_CARD)
    page = browser.new_context(service_workers="block").new_page()
    page.goto(mini_address)
    if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
        absent("a Chromium whose SwiftShader gives WebGPU")
    page.context.close()
    return browser


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows."""
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    write_ct(path, make_phantom(3, (16, 16, 24), (6.0, 8.0, 8.0))[0])
    return path


@pytest.fixture(scope="module")
def plain(browser: Any, mini_address: str, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What WebAssembly makes of the scan, in a browser without a card."""
    page = Page(browser, mini_address, MINI_ORGAN, service_workers="block")
    labels = _labels(page, scan, tmp_path_factory.mktemp("plain") / "plain.nii.gz")
    page.context.close()
    assert len(np.unique(labels)) > 1
    return labels


def _page(browser: Any, address: str, **options: Any) -> Page:
    page = Page(browser, address, MINI_ORGAN, **options)
    page.until("!document.querySelector('#graphics-choice').hidden")
    return page


def _labels(page: Page, scan: Path, to: Path) -> np.ndarray:
    assert page.segment(scan).startswith("Done"), page.outcome()
    return read_segmentation(page.download("#nifti", to)).labels


def _asked_of_card(page: Page) -> list[str]:
    return [url for url in page.requests if "/webgpu/" in url]


def test_without_a_card_there_is_no_choice(browser: Any, mini_address: str) -> None:
    page = Page(browser, mini_address, MINI_ORGAN, service_workers="block")
    assert not page.page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)")
    page.page.wait_for_timeout(300)
    assert not page.page.is_visible("#graphics-choice") and page.faults == []
    page.context.close()


def test_the_card_is_loaded_when_it_is_asked_for_and_kept_from_then_on(
    card_browser: Any, mini_address: str, scan: Path, plain: np.ndarray, tmp_path: Path,
) -> None:
    page = _page(card_browser, mini_address)
    assert page.isolated()
    page.until("!document.querySelector('#graphics-choice').hidden")
    assert not page.page.is_checked("#graphics")
    np.testing.assert_array_equal(_labels(page, scan, tmp_path / "plain.nii.gz"), plain)
    assert _asked_of_card(page) == [] and not page.page.is_visible("#graphics-state")
    kept = """caches.keys().then(([name]) => caches.open(name)).then((cache) => cache.keys())
        .then((all) => all.filter(({url}) => url.includes('/webgpu/')).length)"""
    assert page.page.evaluate(kept) == 0
    page.page.check("#graphics")
    card = _labels(page, scan, tmp_path / "card.nii.gz")
    assert "Computing on the graphics card" in page.page.inner_text("#graphics-state")
    assert np.mean(card == plain) >= 0.9998
    assert page.page.evaluate(kept) == 3
    page.context.set_offline(True)
    page.page.reload()
    assert page.isolated()
    page.until("!document.querySelector('#graphics-choice').hidden")
    page.page.check("#graphics")
    np.testing.assert_array_equal(_labels(page, scan, tmp_path / "offline.nii.gz"), card)
    assert "Computing on the graphics card" in page.page.inner_text("#graphics-state")
    assert page.left_the_site() == [] and page.faults == []
    page.context.close()


@pytest.mark.parametrize(("spoil", "word"), [
    ("if (values.logits) values.logits.forEach((v, i) => { values.logits[i] = 1.01 * v; });",
     "its answers are not those of WebAssembly (logits differ by 0.01"),
    pytest.param("if (run === 2) (await env.webgpu.device).destroy();", "lost the graphics card",
                 marks=pytest.mark.soak),
    pytest.param(
        "if (run > 1) Object.values(values).forEach((v) => v.copyWithin(0, v.length / 3, 2 * v.length / 3)"
        ".copyWithin(v.length / 3, 2 * v.length / 3) && v.fill(1 / 3));", "its answers are not those of WebAssembly",
        marks=pytest.mark.soak),
], ids=["differs", "is lost", "changes its mind"])
def test_a_spoiled_card_gives_no_label(
    spoil: str, word: str, card_browser: Any, mini_site: Path, scan: Path, plain: np.ndarray, tmp_path: Path,
) -> None:
    """What it did is thrown away, the page says why, and the labels are those of WebAssembly."""
    site = Path(shutil.copytree(mini_site, tmp_path / "site"))
    (site / _SCRIPT).rename(site / "webgpu/real.mjs")
    (site / _SCRIPT).write_text(_SPOILED.format(spoil=spoil), "utf-8")
    with served(site) as address:
        page = _page(card_browser, address, service_workers="block")
        page.page.check("#graphics")
        np.testing.assert_array_equal(_labels(page, scan, tmp_path / "card.nii.gz"), plain)
        state = page.page.inner_text("#graphics-state")
        assert state.startswith("Not computing on the graphics card, but on WebAssembly: ") and word in state
        page.context.close()


def test_where_its_runtime_cannot_be_loaded_webassembly_works(
    card_browser: Any, mini_site: Path, scan: Path, tmp_path: Path,
) -> None:
    site = Path(shutil.copytree(mini_site, tmp_path / "site", ignore=shutil.ignore_patterns("*.asyncify.wasm")))
    with served(site) as address:
        page = _page(card_browser, address, service_workers="block")
        page.page.check("#graphics")
        assert page.segment(scan).startswith("Done")
        assert "Not computing on the graphics card" in page.page.inner_text("#graphics-state")
        page.context.close()
