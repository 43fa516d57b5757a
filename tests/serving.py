"""Scans as they are sent to a service: small, of both kinds, and a zip."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.io import write_ct
from autosam3d.volume import Volume


def phantom_ct(path: Path, shape: tuple[int, int, int] = (40, 48, 56), spacing_mm: float = 4.0) -> Path:
    """A warm blob with two halves in air: the small export finds all its labels there."""
    z, y, x = np.indices(shape, np.float32)
    far = sum(((axis / (n - 1) - 0.5) / 0.42) ** 2 for axis, n in zip((z, y, x), shape, strict=True))
    voxels = np.where(far < 1, 40 + 200 * np.sin(x / 5) * np.cos(y / 4), -1000).astype(np.float32)
    write_ct(path, Volume(voxels, np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])))
    return path


def dicom_folder(folder: Path, change: Any = None, **more: Any) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parent / "badinput"))
    from make_dicom import series

    folder.mkdir(exist_ok=True)
    return series(change, **more)(folder)


def zipped(folder: Path, path: Path, prefix: str = "study/series/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, prefix + file.name)
    return path


def dicom_zip(folder: Path, change: Any = None, **more: Any) -> Path:
    return zipped(dicom_folder(folder, change, **more), folder.with_suffix(".zip"))
