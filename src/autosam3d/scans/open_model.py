"""From what the user named to a model that segments: a run folder, a packed model, an export, or nothing at all.

torch is imported only where a checkpoint is to be run or exported.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autosam3d.checkpoints.exported import (
    BACKENDS,
    INT8,
    Export,
    installed_backends,
    load_exported,
    no_int8,
    open_export,
)
from autosam3d.checkpoints.model_file import find_checkpoint, packaged_model, read_meta, recipe_of
from autosam3d.checkpoints.weight_sizes import network_bytes
from autosam3d.errors import AutoSam3dError, CheckpointError, ResourceError, UsageError
from autosam3d.io.files import write_text_atomic
from autosam3d.io.memory import demand_ram
from autosam3d.scans.backend import fastest_backend, wished_backend
from autosam3d.scans.batch import SourcedModel
from autosam3d.user_folders import cache_folder
from autosam3d.version import __version__

if TYPE_CHECKING:
    from autosam3d.checkpoints.checkpoint import LoadedModel

_log = logging.getLogger(__name__)

_STUDENTS = ("swin_unetr", "res_unet")
"""Networks that were made to be exported: it takes them half a minute."""
_TORCH_BYTES = 200 << 20
"""Of importing it: 205 MiB with PyTorch 2.13 for CPUs."""
_GPU_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/kfd")


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
    if read_meta(json_path).get("kind") == "export":
        if backend == "torch":
            raise UsageError("BACKEND", "torch", "expected a checkpoint for PyTorch, got an export",
                             "name the run folder, or another backend")
        return _run_export(open_export(json_path), backend, wish)
    if backend == "auto" and (model := _run_student(json_path, wish)) is not None:
        return model
    if backend in ("auto", "torch"):
        return _load_trained(json_path, wish, wish.device)
    if backend == INT8:  # it takes scans to make it
        raise no_int8(json_path)
    if backend not in BACKENDS:
        raise UsageError("BACKEND", backend, "expected an export for it, got a checkpoint",
                         f"autosam3d export {path or json_path.parent} FOLDER --target {backend}, then name FOLDER")
    return _run_kept(json_path, backend, wish) or _run_export(_make_export(json_path, wish), backend, wish)


def kept_export(path: Path | None) -> Export | None:
    """The exported form of a model, where it is one or where `open_model` has made it one; nothing is made now.

    Raises:
        CheckpointError: NO_MODEL, or a broken model.
    """
    json_path = find_checkpoint(path) if path is not None else packaged_model()
    return open_export(json_path) if read_meta(json_path).get("kind") == "export" else _kept_export(json_path)


def _run_export(export: Export, backend: str, wish: ModelWish) -> SourcedModel:
    _demand_cpu(wish)
    return load_exported(export, fastest_backend(export, wish.threads) if backend == "auto" else backend, wish.threads)


def _demand_cpu(wish: ModelWish) -> None:
    if wish.device not in ("auto", "cpu"):
        raise UsageError("DEVICE", wish.device, "expected auto or cpu: the runtimes of exports run on the CPU here",
                         "leave the device out, or run a checkpoint with --backend torch")


def _run_student(json_path: Path, wish: ModelWish) -> SourcedModel | None:
    """A student's checkpoint as its export, for a user who wished nothing; None where PyTorch is to run it.

    Whatever goes wrong on this way, PyTorch is there.
    """
    meta = read_meta(json_path)
    # A teacher would take minutes to export, and is seldom run twice on a CPU.
    if meta.get("kind") != "model" or recipe_of(meta, json_path).model.network not in _STUDENTS:
        return None
    if not installed_backends() or wish.device not in ("auto", "cpu") or (wish.device == "auto" and _has_gpu()):
        return None
    try:
        folder = _export_folder(json_path)
    except ResourceError as error:
        _log.warning("%s: it cannot be kept as an export (%s); PyTorch runs it", json_path, error.fault)
        return None
    refused = folder.with_name(f"{folder.name}.refused")
    try:
        if (model := _run_kept(json_path, "auto", wish)) is not None:
            return model
        if refused.exists() or not _can_export(wish):
            return None
        return _run_export(_make_export(json_path, wish), "auto", wish)
    except (AutoSam3dError, RuntimeError, ImportError) as error:
        fault = error.fault if isinstance(error, AutoSam3dError) else f"{type(error).__name__}: {error}".splitlines()[0]
        _log.warning("%s: it cannot be run as an export (%s); PyTorch runs it", json_path, fault)
        if isinstance(error, CheckpointError):
            with contextlib.suppress(AutoSam3dError, OSError):  # only saves the next run the attempt
                refused.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(refused, f"{fault}\n")
        return None


def may_use_gpu(device: str) -> bool:
    """Whether PyTorch could run a model on a GPU; a cheap question, which is answered with yes where in doubt."""
    if device != "auto":
        return device != "cpu"
    return any(Path(driver).exists() for driver in _GPU_DRIVERS) or shutil.which("nvidia-smi") is not None


def _has_gpu() -> bool:
    """Whether PyTorch would take one; it is asked only where a driver is there, because the question takes a second."""
    if not may_use_gpu("auto"):
        return False
    from autosam3d.inference.torch_runtime import pick_device

    return pick_device("auto") != "cpu"


def _can_export(wish: ModelWish) -> bool:
    if wish.max_ram_bytes is not None:  # an export takes memory of its own
        return False
    from autosam3d.export import packages

    return not packages.missing_packages()


def _run_kept(json_path: Path, backend: str, wish: ModelWish) -> SourcedModel | None:
    """A checkpoint's export in the user's cache, ready to segment; None where there is none that is whole."""
    _demand_cpu(wish)
    if (export := _kept_export(json_path)) is None:
        return None
    try:
        return _run_export(export, backend, wish)
    except CheckpointError as error:
        if error.code != "HASH":
            raise
        _log.info("%s: %s; it is made again", error.where, error.fault)
        return None


def _kept_export(json_path: Path) -> Export | None:
    """The export of a checkpoint in the user's cache, if its files have their sizes; who loads one compares its hash.
    """
    try:
        export = open_export(_export_folder(json_path))
        for name in export.meta["files"]:
            export.locate(name)
    except (CheckpointError, ResourceError, OSError):
        return None
    return export if export.meta.get("trained_weights_sha256") == _weights_sha256(json_path) else None


def _export_folder(json_path: Path) -> Path:
    return cache_folder() / "exports" / f"{_weights_sha256(json_path)[:32]}-{__version__}"


def _weights_sha256(json_path: Path) -> str:
    return str(read_meta(json_path)["weights"].get("sha256"))


def _make_export(json_path: Path, wish: ModelWish) -> Export:
    """The export of a checkpoint, made now in the user's cache in the place of whatever lies there."""
    folder = _export_folder(json_path)
    _log.warning("%s: exporting it once to %s, which takes half a minute for a student and minutes for a teacher; the "
                 "next runs begin at once", json_path, folder)
    model = _load_trained(json_path, wish, "cpu")
    from autosam3d.export.export import export_model

    # The cache is ours: whatever lies there and is not a whole export of this model makes room.
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.unlink()
    made = export_model(model, folder, threads=wish.threads, overwrite=True)
    if made.organs_not_shown:
        _log.info("the parity of that export was shown on a phantom, which has no %s", ", ".join(made.organs_not_shown))
    return open_export(folder)


def _load_trained(json_path: Path, wish: ModelWish, device: str) -> LoadedModel:
    if wish.max_ram_bytes is not None:
        demand_model_ram(json_path, wish.max_ram_bytes)
    import torch

    from autosam3d.checkpoints.checkpoint import load_model
    from autosam3d.inference.torch_runtime import pick_device

    torch.set_num_threads(wish.threads)
    return load_model(json_path, sam=wish.sam, device=pick_device(device))


def demand_model_ram(json_path: Path, max_ram_bytes: int) -> None:
    """Refuse to load a checkpoint whose weights alone do not fit, and torch; neither is loaded.

    Args:
        json_path: of a checkpoint.
        max_ram_bytes: the limit for the whole process.

    Raises:
        ResourceError: MEMORY.
        CheckpointError: the JSON is none of a model.
    """
    meta = read_meta(json_path)
    own_bytes = network_bytes(json_path, meta, recipe_of(meta, json_path))
    # The tensors of the files (this one, and SAM's where it is apart) and the network that they are copied into.
    size = meta["weights"].get("bytes")
    file_bytes = max(size if isinstance(size, int) else 0, own_bytes)
    torch_bytes = 0 if "torch" in sys.modules else _TORCH_BYTES
    demand_ram(own_bytes + file_bytes + torch_bytes, json_path, max_ram_bytes, work="loading the model",
               remedy="take a smaller model or a machine with more memory")
