"""Reading .nii.gz: time and memory beside nibabel and SimpleITK, and how many damaged files each lets pass.

    python benchmarks/bench_read_nifti.py

Writes benchmarks/results/read_nifti.md. Each timing is a process of its own (median of five, the readers taking
turns); memory is the peak (Linux: VmHWM) above the process before reading. The scan is made from a fixed seed.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SHAPE, REPEATS, NUM_FLIPS, NUM_CUTS = (512, 512, 300), 5, 60, 20
READ_ONCE = """
import logging, sys, time
logging.disable(logging.CRITICAL)
import nibabel, numpy
import SimpleITK as sitk
from autosam3d.io import read_ct

def ours(path):
    return read_ct(path).voxels_hu

def nib(path):
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return numpy.ascontiguousarray(numpy.asarray(image.dataobj, numpy.float32).T)

def itk(path):
    return sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(path, sitk.sitkFloat32), "RAS"))

def kilobytes(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

before, start = kilobytes("VmRSS"), time.perf_counter()
{"autosam3d": ours, "nibabel": nib, "SimpleITK": itk}[sys.argv[1]](sys.argv[2])
print(time.perf_counter() - start, (kilobytes("VmHWM") - before) / 1024)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = speed(folder)
        passed = corruption(folder)
    lines = [
        "# Reading .nii.gz", "",
        f"- date: {datetime.date.today()}", "- command: `python benchmarks/bench_read_nifti.py`",
        f"- machine: {_cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, numpy {np.__version__}; "
        f"other work on it, load average {os.getloadavg()[0]:.1f}",
        f"- scan: {' x '.join(map(str, SHAPE))} int16, seed 0; median of {REPEATS} (least to most)",
        f"- damage: {NUM_FLIPS} single-bit flips and {NUM_CUTS} cuts of a {'x'.join(map(str, (128, 128, 60)))} scan, "
        "seed 1; passed = returned an array without an error", "",
        "| reader | seconds | peak memory, MiB | flips that passed | cuts that passed |", "|---|---|---|---|---|",
    ]
    for reader, (times, memory) in rows.items():
        flips, cuts = passed[reader]
        seconds = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        lines.append(f"| {reader} | {seconds} | {memory:.0f} | {flips} of {NUM_FLIPS} | {cuts} of {NUM_CUTS} |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results/read_nifti.md").write_text(text)
    print(text)


def speed(folder: Path) -> dict[str, tuple[list[float], float]]:
    """reader: (seconds, MiB)."""
    path = folder / "ct.nii.gz"
    _write_scan(path, SHAPE)
    readers = ("autosam3d", "nibabel", "SimpleITK")
    times: dict[str, list[float]] = {reader: [] for reader in readers}
    memory = dict.fromkeys(readers, 0.0)
    for _ in range(REPEATS):
        for reader in readers:
            run = subprocess.run([sys.executable, "-c", READ_ONCE, reader, str(path)], capture_output=True, text=True,
                                 check=True)
            seconds, mebibytes = map(float, run.stdout.split())
            times[reader].append(seconds)
            memory[reader] = max(memory[reader], mebibytes)
    return {reader: (times[reader], memory[reader]) for reader in readers}


def corruption(folder: Path) -> dict[str, tuple[int, int]]:
    """reader: (flips, cuts) that were returned as data."""
    import logging

    import nibabel as nib
    import SimpleITK as sitk

    from autosam3d.errors import AutoSam3dError
    from autosam3d.io import read_ct

    logging.disable(logging.CRITICAL)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    _write_scan(folder / "small.nii.gz", (128, 128, 60))
    content = (folder / "small.nii.gz").read_bytes()
    rng = np.random.default_rng(1)
    damaged = []
    for place in rng.integers(10, len(content), NUM_FLIPS):
        hurt = bytearray(content)
        hurt[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(hurt))
    damaged += [content[:length] for length in rng.integers(100, len(content) - 1, NUM_CUTS)]
    passed: dict[str, list[int]] = {"autosam3d": [0, 0], "nibabel": [0, 0], "SimpleITK": [0, 0]}
    path = folder / "hurt.nii.gz"
    readers = {
        "autosam3d": (lambda: read_ct(path), (AutoSam3dError,)),
        "nibabel": (lambda: np.asarray(nib.load(path).dataobj), (OSError, EOFError, ValueError, _zlib_error())),  # type: ignore[attr-defined]
        "SimpleITK": (lambda: sitk.ReadImage(str(path)), (RuntimeError,)),
    }
    for number, hurt in enumerate(damaged):
        path.write_bytes(hurt)
        for reader, (read, errors) in readers.items():
            try:
                read()
                passed[reader][number >= NUM_FLIPS] += 1
            except errors:
                pass
    return {reader: (flips, cuts) for reader, (flips, cuts) in passed.items()}


def _zlib_error() -> type[Exception]:
    import zlib

    return zlib.error


def _write_scan(path: Path, shape: tuple[int, int, int]) -> None:
    import nibabel as nib

    rng = np.random.default_rng(0)
    x, y = (np.linspace(-1, 1, n) for n in shape[:2])
    body = (x[:, None] ** 2 + y**2 < 0.5)[..., None]
    hu = (np.where(body, 40, -1000) + rng.normal(0, 15, shape)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-0.8, -0.8, 1.5, 1])), path)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
