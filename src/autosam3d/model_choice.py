"""From what the user named to a model that segments: a run folder, a packed model, an export, or nothing at all.

torch is imported only where a checkpoint is to be run or exported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from autosam3d.backend import cache_folder, fastest_backend, wished_backend
from autosam3d.batch import SourcedModel
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.exported import BACKENDS, Export, load_exported, open_export
from autosam3d.memory import demand_model_ram
from autosam3d.model_file import find_checkpoint, read_meta

_log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / "weights" / "openkbp_tiny"
"""The model that comes with the package."""


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

    An export is run by the backend that was wished for, else by the fastest one here. A checkpoint is run by PyTorch,
    unless another backend is named: then it is exported once, into the user's cache.

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
    if backend in ("auto", "torch"):
        import torch

        from autosam3d.checkpoint import load_model
        from autosam3d.runtime import pick_device

        torch.set_num_threads(wish.threads)
        return load_model(json_path, sam=wish.sam, device=pick_device(wish.device))
    if backend not in BACKENDS:
        raise UsageError("BACKEND", backend, "expected an export for it, got a checkpoint",
                         f"autosam3d export {path or json_path.parent} FOLDER --target {backend}, then name FOLDER")
    _demand_cpu(wish)
    return _run_export(_cached_export(json_path, wish), backend, wish)


def packaged_model() -> Path:
    """The JSON of the model that comes with the package.

    Raises:
        CheckpointError: NO_MODEL, this installation has none.
    """
    if not (PACKAGED / "model.json").is_file():
        raise CheckpointError("NO_MODEL", "autosam3d", "no model was named, and this installation carries none",
                              "name a model: autosam3d segment MODEL INPUT OUTPUT")
    return PACKAGED / "model.json"


def _run_export(export: Export, backend: str, wish: ModelWish) -> SourcedModel:
    _demand_cpu(wish)
    return load_exported(export, fastest_backend(export, wish.threads) if backend == "auto" else backend, wish.threads)


def _demand_cpu(wish: ModelWish) -> None:
    if wish.device not in ("auto", "cpu"):
        raise UsageError("DEVICE", wish.device, "expected auto or cpu: the runtimes of exports run on the CPU here",
                         "leave the device out, or run a checkpoint with --backend torch")


def _cached_export(json_path: Path, wish: ModelWish) -> Export:
    """The export of a checkpoint in the user's cache, made now where there is none that is whole."""
    weights = str(read_meta(json_path)["weights"].get("sha256"))
    folder = cache_folder() / "exports" / weights[:32]
    try:
        export = open_export(folder)
        if export.meta.get("trained_weights_sha256") == weights:
            return export
    except CheckpointError:
        pass
    _log.warning("%s: exporting it once to %s; the next runs begin at once", json_path, folder)
    import torch

    from autosam3d.checkpoint import load_model
    from autosam3d.export import export_model

    torch.set_num_threads(wish.threads)
    export_model(load_model(json_path, sam=wish.sam), folder, threads=wish.threads, overwrite=True)
    return open_export(folder)
