"""Which runtime is the fastest here for a model: measured once, kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

from autosam3d.checkpoints.exported import PACKAGE_OF, RUNTIMES, Export, installed_backends
from autosam3d.checkpoints.machine import cpu_name
from autosam3d.checkpoints.probe import measure_cost
from autosam3d.errors import AutoSam3dError, MissingExtraError, ResourceError, UsageError
from autosam3d.io.files import write_text_atomic
from autosam3d.user_folders import cache_folder
from autosam3d.version import __version__

_log = logging.getLogger(__name__)

VARIABLE = "AUTOSAM3D_BACKEND"
"""Environment variable that names a backend for all runs that do not name one themselves."""
CHOICES = ("auto", "torch", *RUNTIMES)
_MAX_BYTES = 1 << 16


def wished_backend(option: str) -> str:
    """What was asked for: the option, else the environment's, else "auto".

    Raises:
        UsageError: BACKEND, no such one.
    """
    wish = option if option != "auto" else os.environ.get(VARIABLE, "") or "auto"
    if wish not in CHOICES:
        where = f"--backend {wish}" if option != "auto" else f"{VARIABLE}={wish}"
        raise UsageError("BACKEND", where, f"expected {', '.join(CHOICES)}", "name one of these")
    return wish


def fastest_backend(export: Export, threads: int) -> str:
    """The runtime to take for an export on this machine with `threads`; INT8 never, which is to be named.

    Where several are installed, each runs a few windows in a process of its own, once; the answer is kept in the
    user's cache until the model, a version, the processor or the number of threads changes. A cache that is broken or
    cannot be written only costs the measurement.

    Raises:
        MissingExtraError: none is installed.
    """
    names = installed_backends(export)
    if not names:
        raise MissingExtraError("MISSING_EXTRA", export.folder, "expected onnxruntime or openvino, got neither",
                                'pip install "autosam3d[fast]"')
    if len(names) == 1:
        return names[0]
    key = _key(export, names, threads)
    path = _answer_path(key)
    known = None if path is None else _read(path, key)
    if known in names:
        return known
    costs = {name: cost.seconds for name in names if (cost := measure_cost(export.folder, name, threads)) is not None}
    if not costs:
        return names[-1]  # loading it will say what is wrong
    best = min(costs, key=costs.__getitem__)
    measured = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in costs.items())
    _log.info("runtimes measured, a window takes: %s", measured)
    with contextlib.suppress(AutoSam3dError, OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps({"key": key, "fastest": best, "seconds": costs}, indent=1) + "\n")
    return best


def _key(export: Export, names: list[str], threads: int) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(PACKAGE_OF[name]) for name in names}
    return {"model_sha256": export.sha256, "versions": versions, "cpu": cpu_name(), "threads": threads,
            "autosam3d": __version__}


def _answer_path(key: dict[str, Any]) -> Path | None:
    """Where the answer is kept; None where there is no place for it at all."""
    with contextlib.suppress(ResourceError):
        return cache_folder() / f"backend-{_digest(key)}.json"
    return None


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> str | None:
    """The answer that is kept, None where there is none for exactly this question."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_BYTES:
            content = json.loads(path.read_text("utf-8"))
            if isinstance(content, dict) and content.get("key") == key and isinstance(content.get("fastest"), str):
                return content["fastest"]
    return None
