"""The browser app beside Python: seconds a window and peak of the wasm heap in Chromium, ONNX Runtime in the same run;
with scans, the page itself beside Python: labels that differ, seconds a window and a scan; bytes of a first visit.

``python benchmarks/bench_web.py [--export DIR] [--threads 2] [--edges 64 96] [--scan SCAN ...]`` prints Markdown.
Needs playwright and a Chromium; without an export the packaged model is exported first.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import importlib.util
import math
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.checkpoints.exported import load_exported, open_export
from autosam3d.export.onnx_graph import onnx_model, with_half_weights
from autosam3d.export.web import write_web_folder
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation, write_segmentation

REPO = Path(__file__).resolve().parents[1]
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader"]
_PAGE = """<!doctype html><meta charset=utf-8><script type=module>
const memories = [];
WebAssembly.Memory = new Proxy(WebAssembly.Memory, {construct(kind, words) {
  const memory = new kind(...words); memories.push(memory); return memory; }});
const ort = await import('./ort/ort.wasm.min.mjs');
ort.env.wasm.wasmPaths = new URL('./ort/', location.href).href;
window.bench = async (file, shape, threads, runs, level) => {
  ort.env.wasm.numThreads = threads;
  const session = await ort.InferenceSession.create(file,
    {executionProviders: ['wasm'], graphOptimizationLevel: level});
  let state = 1;
  const values = Float32Array.from({length: shape.reduce((a, b) => a * b)},
    () => (state = (state * 48271) % 2147483647) / 2147483647 - 0.5);
  const times = [];
  for (let i = 0; i <= runs; i++) {
    const started = performance.now();
    const {probs} = await session.run({ct: new ort.Tensor('float32', values, shape)}, ['probs']);
    times.push((performance.now() - started) / 1000);
    if (i === runs) return {seconds: Math.min(...times.slice(1)),
      heap: Math.max(...memories.map((m) => m.buffer.byteLength)),
      sum: probs.data.reduce((a, b) => a + b, 0)};
  }
};
document.title = 'ready';
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Static files with the headers that threads need."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--edges", type=int, nargs="*", default=[96], help="cubes beside the model's own window")
    parser.add_argument("--scan", type=Path, nargs="*", default=[], help="CTs, segmented by page and Python in turn")
    parser.add_argument("--no-windows", action="store_true", help="scans alone")
    options = parser.parse_args()
    if importlib.util.find_spec("playwright") is None or shutil.which("chromium") is None:
        print("not measured: it needs the package playwright and a chromium")
        return
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        export = options.export or _exported(Path(scratch) / "export")
        site = Path(scratch) / "site"
        write_web_folder(open_export(export), site)
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        print(f"`{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`, {datetime.now(UTC):%Y-%m-%d}, Chromium "
              f"{chromium.version}, {platform.processor() or platform.machine()}, {options.threads} threads\n")
        _first_visit(site)
        with _served(site) as address:
            if not options.no_windows:
                _windows(chromium, address, site, options)
            _scans(chromium, address, export, options)


def _exported(folder: Path) -> Path:
    from autosam3d.export.export import export_model

    export_model(load_model(), folder)
    return folder


def _first_visit(site: Path) -> None:
    parts = {"network": "model/", "runtime": "ort/", "webgpu": "webgpu/", "page and viewer": ""}
    sizes = dict.fromkeys(parts, 0)
    for path in site.rglob("*"):
        if path.is_file() and path.name not in ("licenses.txt", "autosam3d-web.json"):
            name = next(part for part, start in parts.items() if path.relative_to(site).as_posix().startswith(start))
            sizes[name] += len(gzip.compress(path.read_bytes(), 9))
    later = sizes.pop("webgpu")
    print("First visit, gzipped: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
          + f"; {sum(sizes.values()) / 1e6:.2f} MB in all; on request {later / 1e6:.2f} MB for the graphics card\n")


def _windows(chromium: Any, address: str, site: Path, options: argparse.Namespace) -> None:
    model = load_model()
    (site / "bench.html").write_text(_PAGE, "utf-8")
    sizes = [tuple(model.recipe.model.patch_size), *((edge,) * 3 for edge in options.edges)]
    print("| window | wasm, s | ONNX Runtime, s | ratio | wasm heap, MB |\n|---|---|---|---|---|")
    for size in sizes:
        graph = onnx_model(with_half_weights(model.network), size).SerializeToString()
        (site / "bench.onnx").write_bytes(graph)
        native = _native(graph, size, options)
        context = chromium.new_context()
        page = context.new_page()
        page.goto(address + "bench.html")
        while page.title() != "ready":
            time.sleep(0.1)
        level = "disabled" if math.prod(size) > 1 << 18 else "all"  # as web/src/runtime.ts does it
        order = [f"{address}bench.onnx", [1, 1, *size], options.threads, options.runs, level]
        found = page.evaluate("(order) => bench(...order)", order)
        context.close()
        text = " x ".join(map(str, size))
        print(f"| {text} | {found['seconds']:.2f} | {native:.2f} | {found['seconds'] / native:.2f} | "
              f"{found['heap'] / 1e6:.0f} |", flush=True)


def _native(graph: bytes, size: tuple[int, ...], options: argparse.Namespace) -> float:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    ct = np.random.default_rng(0).random((1, 1, *size), np.float32) - np.float32(0.5)
    session.run(["probs"], {"ct": ct})
    best = float("inf")
    for _ in range(options.runs):
        started = time.perf_counter()
        session.run(["probs"], {"ct": ct})
        best = min(best, time.perf_counter() - started)
    return best


def _scans(chromium: Any, address: str, export: Path, options: argparse.Namespace) -> None:
    if not options.scan:
        return
    print("| scan | voxels | windows | labels that differ | voxels of organs | ONNX Runtime, s a window | page | ratio "
          "| ONNX Runtime, s a scan | page | ratio | renderer's peak, MB |\n|" + "---|" * 12)
    with tempfile.TemporaryDirectory() as scratch:
        for scan in options.scan:
            ours, native = _in_python(scan, export, options.threads, Path(scratch) / "native.nii.gz")
            theirs, page, peak = _in_page(chromium, address, scan, Path(scratch) / "page.nii.gz")
            differ, organs = np.count_nonzero(theirs != ours), np.count_nonzero((theirs > 0) | (ours > 0))
            times = [f"{ours_s:.2f} | {page_s:.2f} | {page_s / ours_s:.2f}" for ours_s, page_s in
                     ((native.window_s, page.window_s), (native.scan_s, page.scan_s))]
            print(f"| {scan.name} | {ours.size} | {page.windows} | {differ} | {organs} | {' | '.join(times)} | "
                  f"{peak:.0f} |", flush=True)


@dataclass(frozen=True)
class _Times:
    """Of one scan, file to file."""

    scan_s: float
    windows: int
    window_s: float
    """Mean of the windows behind the first one."""

    @classmethod
    def of(cls, scan_s: float, ends: list[tuple[float, int]]) -> _Times:
        """From the moments at which windows were done, and their numbers."""
        (first_s, first), (last_s, last) = ends[0], ends[-1]
        return cls(scan_s, last, (last_s - first_s) / max(last - first, 1))


def _in_python(scan: Path, export: Path, threads: int, to: Path) -> tuple[np.ndarray, _Times]:
    """What `autosam3d segment EXPORT SCAN OUT --backend onnxruntime` does, without the start of Python."""
    ends: list[tuple[float, int]] = []
    started = time.perf_counter()
    model = load_exported(open_export(export), "onnxruntime", threads)
    found = segment(read_ct(scan), model, progress=lambda done, _: ends.append((time.perf_counter(), done)))
    write_segmentation(to, found, model.recipe.labels)
    return found.labels, _Times.of(time.perf_counter() - started, ends)


# The page's words about its progress, each with the moment at which it came.
_WATCH = """() => {
  window.ends = [];
  new MutationObserver(() => {
    const found = document.querySelector('#left').textContent.match(/window ([0-9]+) of/);
    if (found) window.ends.push([performance.now() / 1000, Number(found[1])]);
  }).observe(document.querySelector('#left'), {childList: true, characterData: true, subtree: true});
}"""


def _in_page(chromium: Any, address: str, scan: Path, to: Path) -> tuple[np.ndarray, _Times, float]:
    """The page as a person uses it, and the peak of the renderer's memory in MB."""
    context = chromium.new_context(accept_downloads=True, service_workers="block")
    page = context.new_page()
    page.goto(address)
    while "loading" in page.inner_text("#model"):
        time.sleep(0.1)
    page.evaluate(_WATCH)
    known = _renderers()
    started = time.perf_counter()
    page.set_input_files("#folder" if scan.is_dir() else "#file", scan)
    while not page.inner_text("#status").startswith("Done"):
        assert not page.is_visible("#error"), page.inner_text("#error")
        time.sleep(0.5)
    seconds = time.perf_counter() - started
    peak = max(_peak_mb(pid) for pid in known)
    with page.expect_download() as download:
        page.click("#nifti")
    download.value.save_as(to)
    times = _Times.of(seconds, page.evaluate("ends"))
    context.close()
    return read_segmentation(to).labels, times, peak


def _renderers() -> list[int]:
    """Chromium's processes that show pages."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"--type=renderer" in words:
                found.append(int(folder.name))
    return found


def _peak_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
