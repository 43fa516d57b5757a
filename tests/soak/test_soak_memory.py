"""T9: scans of 512 x 512 x 600 and 768 x 768 x 768 voxels in 3 GiB of address space: done, or refused in words."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import make_nifti
import nibabel as nib
import numpy as np
import pytest

from autosam3d.checkpoints.checkpoint import LoadedModel
from autosam3d.export.export import export_model
from exports import Convolutions, loaded
from mini_run import environment, mini_recipe

LIMIT = 3 << 30
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address spaces are limited on Linux")
# What a program does that loads a scan as its library gives it.
_CONTROL = "import sys, nibabel as nib; print(nib.load(sys.argv[1]).get_fdata().mean())"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks at the scan in windows of 128 mm, so that it is the scan that takes the memory."""
    small = loaded(Convolutions())
    model = LoadedModel(mini_recipe(preprocess__spacing_mm=[8.0, 8.0, 8.0]), small.network, small.device, small.sha256,
                        small.metrics)
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(model, folder)
    return folder


@pytest.mark.parametrize("shape", [(512, 512, 600), (768, 768, 768)], ids=lambda shape: "x".join(map(str, shape)))
def test_a_large_scan_is_done_or_refused(shape: tuple[int, int, int], export: Path, tmp_path: Path,
                                         figures: Callable[..., None]) -> None:
    scan = tmp_path / "ct.nii"
    write_scan(scan, shape)
    began = time.monotonic()
    done = limited("-m", "autosam3d", "segment", export, scan, tmp_path / "out.nii.gz", "--backend", "onnxruntime",
                   "--threads", "1", "--max-ram", "3")
    seconds = time.monotonic() - began
    assert "Traceback" not in done.stderr and "MemoryError" not in done.stderr, done.stderr
    if done.returncode == 0:
        told = "segmented"
        image = nib.load(tmp_path / "out.nii.gz")
        assert image.shape == shape  # type: ignore[attr-defined]
    else:
        assert done.returncode == 5, done.stderr
        told = done.stderr.splitlines()[-1].partition(": ")[2].replace(str(scan), "")
        assert done.stderr.splitlines()[-1].startswith("error[MEMORY]") and " needs " in told
        assert not (tmp_path / "out.nii.gz").exists() and seconds < 60
    control = limited("-c", _CONTROL, scan)
    if shape == (768, 768, 768):
        assert "MemoryError" in control.stderr
    figures("T9", f"{' x '.join(map(str, shape))} voxels of int16 in 3 GiB of address space",
            f"{told}, {seconds:.0f} s",
            f"nibabel's get_fdata: {'MemoryError' if control.returncode else 'read'}")


def write_scan(path: Path, shape: tuple[int, int, int]) -> None:
    """Plane by plane: a body in air, with a bright half."""
    plane = np.full(shape[:2], -1000, np.int16)
    plane[shape[0] // 6 : -shape[0] // 6, shape[1] // 6 : -shape[1] // 6] = 40
    plane[shape[0] // 2 : shape[0] // 2 + 40, shape[1] // 2 : shape[1] // 2 + 40] = 300
    header = make_nifti.nifti_bytes(dim=(3, *shape, 1, 1, 1, 1), srow_x=(0.8, 0, 0, 0), srow_y=(0, 0.8, 0, 0),
                                    srow_z=(0, 0, 0.8, 0), pixdim=(1, 0.8, 0.8, 0.8, 1, 1, 1, 1))[:352]
    with path.open("wb") as file:
        file.write(header)
        for index in range(shape[2]):
            file.write((plane + index % 7).astype("<i2").tobytes("F"))


def limited(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=900,
                          env=environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)))
