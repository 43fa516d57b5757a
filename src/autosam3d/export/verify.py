"""An export checked where it lies: every file by its hash, every runtime of this machine by the golden case."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from autosam3d.checkpoints.exported import INT8, RUNTIMES, installed_backends, load_exported, not_run, open_export
from autosam3d.errors import MissingExtraError
from autosam3d.export.golden import load_golden
from autosam3d.export.parity import Parity, Ran, measure_parity


@dataclass(frozen=True)
class Verified:
    """What was found."""

    files: list[str]
    """Those whose SHA-256 is right; all, else `verify_export` raises."""
    rows: list[Parity]
    not_run: dict[str, str]
    """Targets of the folder that were not run here, each with the reason."""
    certified: str
    """Date and machine of the certificate."""

    @property
    def faults(self) -> list[str]:
        return [f"{row.backend} {row.version}: {fault}" for row in self.rows for fault in row.faults()]


def verify_export(folder: Path, threads: int) -> Verified:
    """Check all hashes and run the golden case on each installed runtime; torch is not needed.

    INT8 is judged by its own bounds.

    Raises:
        CheckpointError: a file is missing, altered or not what it claims.
        MissingExtraError: no runtime is installed.
    """
    export = open_export(folder)
    files = sorted(export.meta["files"])
    for name in files:
        export.path(name)
    golden = load_golden(export.path("golden.npz"), export.recipe)
    backends = installed_backends(export, RUNTIMES)
    if not backends:
        raise MissingExtraError("MISSING_EXTRA", folder, "expected onnxruntime or openvino, got neither",
                                'pip install "autosam3d[fast]"')
    rows = []
    for backend in backends:
        predictor = load_exported(export, backend, threads, output="logits").predictor
        started = time.perf_counter()
        logits = predictor.predict(golden.ct)
        ran = Ran(backend=backend, version=predictor.version, threads=threads, seconds=time.perf_counter() - started,
                  logits=logits, int8=backend == INT8)
        rows.append(measure_parity(ran, golden, export.recipe.labels.organs))
    date, machine = (str(export.meta.get(key, "unknown")) for key in ("date", "machine"))
    return Verified(files, rows, not_run(export), f"{date}, {machine}")
