"""The browser app: its unit tests, the folder that `export-web` writes, the page in a real browser beside Python."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.checkpoints.exported import load_exported, open_export
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.export.web import MARKER, write_web_folder
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation
from autosam3d.recipes.reading import Reading
from web_browser import Page, absent

REPO = Path(__file__).resolve().parents[2]
WEB, APP = REPO / "web", REPO / "src/autosam3d/web_app"
# A CT of the user's own may be named here, to show the agreement on it.
CASES = os.environ.get("AUTOSAM3D_WEB_CTS", "")


def test_unit_tests_of_the_page() -> None:
    """Reading, preparing, stitching and restoring give the bits that Python gave: see web/test/make_vectors.py."""
    if not (shutil.which("node") and (WEB / "node_modules/vitest").is_dir()):
        absent("node, and npm ci in web/")
    vitest = [WEB / "node_modules/.bin/vitest", "run"]
    done = subprocess.run(vitest, cwd=WEB, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_built_page_is_that_of_the_source(tmp_path: Path) -> None:
    if not (shutil.which("node") and (WEB / "node_modules/vite").is_dir()):
        absent("node, and npm ci in web/")
    build = [WEB / "node_modules/.bin/vite", "build", "--outDir", tmp_path / "app", "--logLevel", "error"]
    done = subprocess.run(build, cwd=WEB, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh, kept = ({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
                   for folder in (tmp_path / "app", APP))
    assert sorted(fresh) == sorted(kept)
    assert [name for name in kept if fresh[name] != kept[name]] == [], "run npm run build in web/"


def test_the_built_page_forbids_requests_elsewhere() -> None:
    page = (APP / "index.html").read_text("utf-8")
    assert "default-src 'none'" in page and "connect-src 'self' data: blob:" in page
    assert "http://" not in page and "https://" not in page
    assert sum(p.stat().st_size for p in APP.rglob("*") if p.is_file() and p.parent.name != "webgpu") < 20e6


def test_every_bundled_package_has_the_text_of_its_licence() -> None:
    texts = (APP / "licenses.txt").read_text("utf-8").split(f"\n{'-' * 80}\n\n")
    lock = json.loads((WEB / "package-lock.json").read_text("utf-8"))["packages"]
    runtime = {path.rpartition("node_modules/")[2] for path, entry in lock.items()
               if path and not (entry.get("dev") or entry.get("optional"))}
    inside = {"papaya", "base64", "nibabel,", "conform.py", "openjpeg", "emscripten", "musl", "third"}
    assert len(runtime) > 20
    assert sorted(text.split()[0] for text in texts) == sorted(runtime | inside)
    assert [text.split()[0] for text in texts if "opyright" not in text or len(text) < 400] == []
    # Parts of ONNX Runtime that its WebAssembly names in messages or in the paths of its sources.
    parts = ("dawn", "abseil-cpp", "protocolbuffers/protobuf", "onnx", "google/re2", "Eigen", "google/flatbuffers",
             "nlohmann/json", "dcleblanc/SafeInt", "Microsoft GSL", "MurmurHash3")
    assert [part for part in parts if f"_____\n\n{part}\n" not in texts[-1]] == []
    assert "Copyright 2017-2023 The Dawn & Tint Authors" in texts[-1]


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((WEB / "package-lock.json").read_text("utf-8"))
    assert len(lock["packages"]) > 20
    assert [name for name, entry in lock["packages"].items() if "resolved" in entry] == []


@pytest.mark.slow
def test_the_folder_holds_the_model_and_no_scan(site: Path, web_export: Path) -> None:
    meta = json.loads((site / "model/model.json").read_text("utf-8"))
    assert (site / "model/model.onnx").read_bytes() == (web_export / "model.onnx").read_bytes()
    assert [label["name"] for label in meta["use"]["labels"]][:2] == ["background", "brainstem"]
    assert "machine" not in meta and not list(site.rglob("golden*"))
    build = next(line for line in (site / "sw.js").read_text("utf-8").splitlines() if line.startswith("const BUILD"))
    kept = json.loads(build.removeprefix("const BUILD = ").removesuffix(";"))
    assert all((site / name).exists() for name in (*kept["files"], *kept["later"]))
    assert {"./", "./model/model.onnx", "./ort/ort-wasm-simd-threaded.wasm"} <= set(kept["files"])
    # What only the graphics card needs is no part of a first visit.
    assert sorted(kept["later"]) == sorted(f"./webgpu/{p.name}" for p in (APP / "webgpu").iterdir())
    assert not set(kept["later"]) & set(kept["files"])
    assert meta["bounds"] == {"logit_share": 1e-3, "equal_share": 0.9998, "dice": 0.99, "dice_judged_from_voxels": 100}


@pytest.mark.slow
def test_another_model_is_another_version(web_export: Path, tmp_path: Path) -> None:
    export = open_export(web_export)
    one = write_web_folder(export, tmp_path / "one")
    again = write_web_folder(export, tmp_path / "again")
    assert one.version == again.version
    for reading in (Reading(intensity="raw"), Reading(intensity_offset=-1024)):  # the page reads HU as it is stored
        other = replace(export, recipe=replace(export.recipe, reading=reading))
        with pytest.raises(UsageError, match="run it with autosam3d segment"):
            write_web_folder(other, tmp_path / "raw")
    export.meta["use"]["overlap"] = 0.5
    assert write_web_folder(export, tmp_path / "other").version != one.version


@pytest.mark.slow
def test_folders_of_others_are_left_alone(web_export: Path, tmp_path: Path) -> None:
    export = open_export(web_export)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a web export"):
        write_web_folder(export, tmp_path / "mine", overwrite=True)
    write_web_folder(export, tmp_path / "web")
    with pytest.raises(UsageError, match="--overwrite"):
        write_web_folder(export, tmp_path / "web")
    write_web_folder(export, tmp_path / "web", overwrite=True)
    assert (tmp_path / "web" / MARKER).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "web"]


@pytest.mark.slow
def test_a_damaged_export_leaves_nothing(web_export: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(web_export, broken)
    data = bytearray((broken / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "model.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        write_web_folder(open_export(broken), tmp_path / "web")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(("words", "code"), [(["nowhere", "out"], 4), ([".", "."], 2)])
def test_the_command_refuses_in_one_line(words: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = subprocess.run([sys.executable, "-m", "autosam3d", "export-web", *words], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _agreement(page: Page, scan: Path, export: Path, to: Path) -> tuple[float, int]:
    """Share of voxels with one label in the browser and in Python, and voxels that are any organ in either."""
    assert page.segment(scan).startswith("Done")
    ours = segment(read_ct(scan), load_exported(open_export(export), "onnxruntime", 1))
    theirs = read_segmentation(page.download("#nifti", to))
    assert np.allclose(theirs.affine, ours.affine) and theirs.labels.shape == ours.labels.shape
    assert theirs.organs == ours.organs
    rows = page.download("#csv", to.with_suffix(".csv")).read_text().splitlines()[1:]
    for row in rows:
        label, _, voxels, ml, sure = row.split(",")
        assert int(voxels) == np.count_nonzero(theirs.labels == int(label))
        assert float(sure or 0) == pytest.approx(ours.confidence.get(int(label), 0), abs=2e-3)
        assert float(ml) == pytest.approx(theirs.volume_ml(int(label)), abs=1e-3)
    equal = float(np.mean(ours.labels == theirs.labels))
    return equal, int(np.count_nonzero((ours.labels > 0) | (theirs.labels > 0)))


@pytest.mark.slow
def test_the_browser_labels_as_python_does(opened: Any, web_export: Path, larger_phantom: Path,
                                           tmp_path: Path) -> None:
    page = opened()
    assert page.isolated()
    for scan in [larger_phantom, *(Path(name) for name in CASES.split(os.pathsep) if name)]:
        equal, organ_voxels = _agreement(page, scan, web_export, tmp_path / "seg.nii.gz")
        print(f"{scan.name}: {100 * equal:.5f} % of the voxels equal, {organ_voxels} of organs")
        assert organ_voxels > 50
        assert equal >= 0.999
    assert "thread" in page.page.text_content("#threads")
    assert page.left_the_site() == [] and page.faults == []


@pytest.mark.slow
def test_without_threads_it_says_so_and_works(opened_mini: Any, phantom: Path) -> None:
    page = opened_mini(service_workers="block")
    assert page.page.evaluate("crossOriginIsolated") is False
    assert page.segment(phantom).startswith("Done")
    assert "one thread" in page.page.text_content("#threads")


@pytest.mark.slow
def test_it_works_offline_after_the_first_visit(opened_mini: Any, phantom: Path) -> None:
    page = opened_mini()
    assert page.isolated()
    page.context.set_offline(True)
    page.page.reload()
    assert page.isolated()
    assert page.segment(phantom).startswith("Done")


@pytest.mark.slow
def test_nothing_reaches_another_address(opened: Any, elsewhere: tuple[str, list[str]], site: Path) -> None:
    """Neither the page nor the worker may ask elsewhere, whoever's code runs in them."""
    url, asked = elsewhere
    page = opened()
    assert page.isolated()
    ask = f"fetch('{url}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused')"
    assert page.page.evaluate(ask) == "refused"
    script = next((site / "assets").glob("worker-*.js")).name
    with page.page.expect_worker() as worker:
        page.page.evaluate(f"void new Worker('./assets/{script}', {{type: 'module'}})")
    assert worker.value.evaluate(ask) == "refused"
    assert asked == []
    assert any("Content Security Policy" in fault for fault in page.faults)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another web server, and who asked it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/stolen", asked
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_organs_hide_by_keyboard_and_cancel_stops(opened: Any, larger_phantom: Path) -> None:
    page = opened(viewport={"width": 390, "height": 844})
    assert page.isolated()
    page.page.set_input_files("#file", larger_phantom)
    page.page.wait_for_selector("#cancel", state="visible")
    page.page.focus("#cancel")
    page.page.keyboard.press("Enter")
    assert page.page.text_content("#status") == "Cancelled."
    assert not page.page.is_visible("#work")
    assert page.segment(larger_phantom).startswith("Done")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.page.locator("#organs input:enabled").first
    before = page.page.screenshot(clip=_clip(page))
    box.focus()
    page.page.keyboard.press("Space")
    page.page.wait_for_timeout(500)
    assert not box.is_checked()
    assert page.page.screenshot(clip=_clip(page)) != before
    unnamed = page.page.evaluate("""[...document.querySelectorAll('button, input, canvas, progress')].filter((e) =>
        !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map((e) => e.id)""")
    assert unnamed == []


def _clip(page: Page) -> dict[str, float]:
    page.page.evaluate("scrollTo(0, 0)")
    box = page.page.locator("#canvas").bounding_box()
    assert box is not None
    return box


@pytest.mark.slow
def test_bad_scans_are_refused_in_words(opened_mini: Any, phantom: Path, tmp_path: Path) -> None:
    page = opened_mini()
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(phantom.read_bytes()[:-500])
    assert "cut or damaged" in page.segment(cut)
    text = tmp_path / "notes.nii"
    text.write_text("no scan " * 100)
    assert "expected a NIfTI file" in page.segment(text)
    large = tmp_path / "large.nii"
    header = nib.Nifti1Header()
    header.set_data_shape((1024, 1024, 1500))
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([0.5, 0.5, 0.5, 1]), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with large.open("wb") as file:  # sparse: it takes no room on the disk
        file.write(header.binaryblock)
        file.truncate(352 + 2 * 1024 * 1024 * 1500)
    refusal = page.segment(large)
    assert "needs about" in refusal and "this device can give" in refusal
    assert page.segment(phantom).startswith("Done")
