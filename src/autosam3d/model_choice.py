"""From what the user named to a model that segments: a run folder, a packed model, an export, or nothing at all.

torch is imported only where a checkpoint is to be run or exported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from autosam3d.backend import cache_folder, fastest_backend, wished_backend
from autosam3d.batch import SourcedModel
from autosam3d.errors import CheckpointError, ResourceError, UsageError
from autosam3d.exported import BACKENDS, INT8, Export, installed_backends, load_exported, no_int8, open_export
from autosam3d.memory import demand_model_ram
from autosam3d.model_file import find_checkpoint, packaged_model, read_meta, recipe_of

_log = logging.getLogger(__name__)

_STUDENTS = ("swin_unetr", "res_unet")
"""Networks that were made to be exported: it takes them half a minute."""


@dataclass(frozen=True, kw_only=True)
class ModelWish:
    """How a model is to be run."""

    backend: str = "auto"
    device: str = "auto"
    threads: int = 1
    sam: str | None = None
    max_ram_bytes: int | None = None


def open_model(path: Path | None, wish: ModelWish) -> SourcedModel:
    """The model at `path`, ready to segment; None takes the one of the package.

    An export is run by the backend that was wished for, else by the fastest one here. A checkpoint is exported once,
    into the user's cache, where another backend than PyTorch is named, and also where nothing is named, the network is
    a student, no GPU would run it, and what an export needs is installed. Else PyTorch runs it.

    Raises:
        CheckpointError: NO_MODEL, or a broken model.
        UsageError: BACKEND or DEVICE, which the model cannot be run on.
        MissingExtraError: the backend is not installed.
    """
    backend = wished_backend(wish.backend)
    json_path = find_checkpoint(path) if path is not None else packaged_model()
    if wish.max_ram_bytes is not None:
        demand_model_ram(json_path, wish.max_ram_bytes)
    if read_meta(json_path).get("kind") == "export":
        if backend == "torch":
            raise UsageError("BACKEND", "torch", "expected a checkpoint for PyTorch, got an export",
                             "name the run folder, or another backend")
        return _run_export(open_export(json_path), backend, wish)
    if backend == "auto" and (export := _export_of_student(json_path, wish)) is not None:
        return _run_export(export, "auto", wish)
    if backend in ("auto", "torch"):
        import torch

        from autosam3d.checkpoint import load_model
        from autosam3d.runtime import pick_device

        torch.set_num_threads(wish.threads)
        return load_model(json_path, sam=wish.sam, device=pick_device(wish.device))
    if backend == INT8:  # it takes scans to make it
        raise no_int8(json_path)
    if backend not in BACKENDS:
        raise UsageError("BACKEND", backend, "expected an export for it, got a checkpoint",
                         f"autosam3d export {path or json_path.parent} FOLDER --target {backend}, then name FOLDER")
    _demand_cpu(wish)
    return _run_export(_cached_export(json_path, wish), backend, wish)


def _run_export(export: Export, backend: str, wish: ModelWish) -> SourcedModel:
    _demand_cpu(wish)
    return load_exported(export, fastest_backend(export, wish.threads) if backend == "auto" else backend, wish.threads)


def _demand_cpu(wish: ModelWish) -> None:
    if wish.device not in ("auto", "cpu"):
        raise UsageError("DEVICE", wish.device, "expected auto or cpu: the runtimes of exports run on the CPU here",
                         "leave the device out, or run a checkpoint with --backend torch")


def _export_of_student(json_path: Path, wish: ModelWish) -> Export | None:
    """The export of a checkpoint for which the user wished nothing; None where PyTorch is to run it."""
    if wish.device not in ("auto", "cpu") or not installed_backends():
        return None
    if (export := _kept_export(json_path)) is not None:
        return export
    meta = read_meta(json_path)
    # A teacher would take minutes to export, and is seldom run twice on a CPU.
    if meta.get("kind") != "model" or recipe_of(meta, json_path).model.network not in _STUDENTS:
        return None
    if wish.max_ram_bytes is not None:  # an export takes memory of its own
        return None
    from autosam3d.export import missing_packages

    if missing_packages():
        return None
    if wish.device == "auto":
        from autosam3d.runtime import pick_device

        if pick_device("auto") != "cpu":
            return None
    try:
        return _cached_export(json_path, wish)
    except CheckpointError as error:
        if error.code != "PARITY":
            raise
        _log.warning("%s: %s; PyTorch runs it", json_path, error.fault)
        return None
    except ResourceError as error:
        _log.warning("%s: it cannot be exported (%s); PyTorch runs it", json_path, error.fault)
        return None


def _kept_export(json_path: Path) -> Export | None:
    """The export of a checkpoint in the user's cache, if it is whole."""
    weights = str(read_meta(json_path)["weights"].get("sha256"))
    try:
        export = open_export(_export_folder(weights))
        for name in export.meta["files"]:
            export.path(name)
    except CheckpointError:
        return None
    return export if export.meta.get("trained_weights_sha256") == weights else None


def _export_folder(weights_sha256: str) -> Path:
    return cache_folder() / "exports" / weights_sha256[:32]


def _cached_export(json_path: Path, wish: ModelWish) -> Export:
    """The export of a checkpoint in the user's cache, made now where there is none that is whole."""
    if (export := _kept_export(json_path)) is not None:
        return export
    folder = _export_folder(str(read_meta(json_path)["weights"].get("sha256")))
    _log.warning("%s: exporting it once to %s; the next runs begin at once", json_path, folder)
    import torch

    from autosam3d.checkpoint import load_model
    from autosam3d.export import export_model

    torch.set_num_threads(wish.threads)
    export_model(load_model(json_path, sam=wish.sam), folder, threads=wish.threads, overwrite=True)
    return open_export(folder)
