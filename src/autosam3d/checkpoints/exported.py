"""A folder that `autosam3d export` wrote: its files checked by their hashes, its network run without torch."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autosam3d.checkpoints.model_file import find_checkpoint, read_meta, recipe_of
from autosam3d.checkpoints.targets import MOBILE
from autosam3d.errors import CheckpointError, MissingExtraError, UsageError
from autosam3d.inference.onnx_file import MAX_ONNX_BYTES
from autosam3d.inference.predictor import Predictor
from autosam3d.io.files import open_regular, readable, sha256_of
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import names_text

ONNX, OPENVINO = ("model.onnx",), ("openvino.xml", "openvino.bin")
INT8 = "openvino-int8"
"""Another network than the trained one, within the bounds of `parity`: run only where it is named."""
OPENVINO_INT8 = ("openvino_int8.xml", "openvino_int8.bin")
FILES_OF = {"onnxruntime": ONNX, "openvino": OPENVINO, INT8: OPENVINO_INT8, "litert": (MOBILE["litert"],),
            "executorch": (MOBILE["executorch"],)}
"""Backend to the files that it reads."""
BACKENDS = ("onnxruntime", "openvino")
"""What every export holds, and of which "auto" takes the faster."""
RUNTIMES = tuple(FILES_OF)
PACKAGE_OF = {"onnxruntime": "onnxruntime", "openvino": "openvino", INT8: "openvino", "litert": "ai_edge_litert",
              "executorch": "executorch"}
EXTRA_OF = {name: "mobile" if name in MOBILE else "fast" for name in RUNTIMES}
NOT_RUN_HERE = "not run on this platform"
"""What is said of a target that only another system can run."""
_AGAIN = "export the model again, or copy the whole folder again"


class ExportPredictor(Predictor, Protocol):
    """A predictor that says what it is."""

    name: str

    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class Export:
    """The JSON of an export folder, checked; the other files are checked as they are asked for."""

    folder: Path
    meta: dict[str, Any]
    recipe: Recipe

    @property
    def sha256(self) -> str:
        """Of the ONNX file, which stands for the model in all its forms."""
        return self.meta["weights"]["sha256"]

    def has(self, name: str) -> bool:
        return name in self.meta["files"]

    def locate(self, name: str) -> Path:
        """A file of the folder, after its size was compared; its bytes are not read.

        Raises:
            CheckpointError: MODEL_PATH, CORRUPT or MODEL_TOO_LARGE.
        """
        size_bytes, path = self._listed(name).get("bytes"), self.folder / name
        inner = Path(name)
        if inner.is_absolute() or ".." in inner.parts:
            raise CheckpointError("MODEL_PATH", path, "expected a file of the folder, got a way out of it", _AGAIN)
        if any(p.is_symlink() for p in (path, *path.parents[: len(inner.parts) - 1])):
            raise CheckpointError("MODEL_PATH", path, "expected a file of the folder, got a link", _AGAIN)
        if not path.is_file():
            raise CheckpointError("CORRUPT", path, "the file is missing", _AGAIN)
        size = path.stat().st_size
        if size != size_bytes:
            raise CheckpointError("CORRUPT", path, f"expected {size_bytes} bytes, got {size}", _AGAIN)
        if size > MAX_ONNX_BYTES:
            raise CheckpointError("MODEL_TOO_LARGE", path, f"expected at most 2 GiB, got {size} bytes",
                                  "take another model")
        return path

    def path(self, name: str) -> Path:
        """A file of the folder, after its size and SHA-256 were compared.

        Raises:
            CheckpointError: as `locate`, or HASH.
        """
        path = self.locate(name)
        self._demand_sha256(name, sha256_of(path))
        return path

    def content(self, name: str) -> bytes:
        """The very bytes of a file that were hashed: one that is exchanged in between is refused.

        Raises:
            CheckpointError: as `path`.
        """
        path = self.locate(name)
        with open_regular(path) as file, readable(path):
            content = file.read()
        self._demand_sha256(name, hashlib.sha256(content).hexdigest())
        return content

    def _listed(self, name: str) -> Mapping[str, Any]:
        entry = self.meta["files"].get(name)
        if not isinstance(entry, Mapping):
            raise CheckpointError("CORRUPT", self.folder / "model.json", f"expected an entry for {name}, got none",
                                  _AGAIN)
        return entry

    def _demand_sha256(self, name: str, sha256: str) -> None:
        if sha256 != self._listed(name).get("sha256"):
            raise CheckpointError("HASH", self.folder / name, "its SHA-256 is not the one that model.json names",
                                  _AGAIN)

    def activation_bytes(self, backend: str) -> int:
        value = self.meta.get("memory", {}).get(backend, 0)
        return value if isinstance(value, int) and 0 <= value < 1 << 50 else 0


@dataclass(frozen=True)
class ExportedModel:
    """An exported network ready to segment, with the recipe it was trained by."""

    recipe: Recipe
    predictor: ExportPredictor
    sha256: str
    """Of the weights that were trained, as of the checkpoint; of an INT8 network its own."""
    metrics: Mapping[str, Any]

    def __repr__(self) -> str:
        """One line without weights."""
        return (f"ExportedModel(recipe {self.recipe.name}, {self.recipe.model.network} on {self.runtime}, "
                f"{names_text(self.recipe.labels.organs)})")

    @property
    def backend(self) -> str:
        return self.predictor.name

    @property
    def runtime(self) -> str:
        """Name and version of what runs it."""
        return f"{self.predictor.name} {self.predictor.version}"


def is_export(path: Path) -> bool:
    """Whether `path` is the folder, or the JSON, of an export; a broken model is not, and loading it says why."""
    try:
        return read_meta(find_checkpoint(path)).get("kind") == "export"
    except CheckpointError:
        return False


def open_export(path: Path) -> Export:
    """The folder (or its model.json) of an export.

    Raises:
        CheckpointError: NO_MODEL, KIND, or the JSON is broken.
    """
    json_path = find_checkpoint(path)
    meta = read_meta(json_path)
    if meta.get("kind") != "export":
        raise CheckpointError("KIND", json_path, f"expected an exported model, got a {str(meta.get('kind'))[:40]} "
                              "checkpoint", "name the folder that `autosam3d export` wrote")
    if not isinstance(meta.get("files"), dict) or meta["files"].get("model.onnx") != _entry(meta["weights"]):
        raise CheckpointError("CORRUPT", json_path, "expected `files` with the model.onnx that `weights` names", _AGAIN)
    return Export(json_path.parent, meta, recipe_of(meta, json_path))


def installed_backends(export: Export | None = None, names: Sequence[str] = BACKENDS) -> list[str]:
    """Those of `names` whose runtime this Python has, and that `export` has files for."""
    return [name for name in names if importlib.util.find_spec(PACKAGE_OF[name]) is not None
            and (export is None or export.has(FILES_OF[name][0]))]


def not_run(export: Export) -> dict[str, str]:
    """The targets that `export` has files for and that no runtime here can judge, each with the reason."""
    reasons = {name: f"{PACKAGE_OF[name]} is not installed" for name in RUNTIMES
               if export.has(FILES_OF[name][0]) and importlib.util.find_spec(PACKAGE_OF[name]) is None}
    if any(name.startswith(f"{MOBILE['coreml']}/") for name in export.meta["files"]):
        reasons["coreml"] = NOT_RUN_HERE
    return reasons


def load_exported(path: Path | Export, backend: str, threads: int, *, output: str = "probs") -> ExportedModel:
    """An exported network, ready to run.

    Args:
        path: the folder.
        backend: one of `RUNTIMES`.
        threads: CPU threads.
        output: what its predictor gives: "probs", or "logits" for comparisons.

    Raises:
        CheckpointError: the folder is broken, its network has other classes than its recipe, or KIND.
        MissingExtraError: the runtime is not installed.
        UsageError: BACKEND, no such one, or one that the folder was not exported for.
    """
    if backend not in RUNTIMES:
        raise UsageError("BACKEND", backend, f"expected one of {', '.join(RUNTIMES)}", "name one of these")
    export = path if isinstance(path, Export) else open_export(path)
    if backend == INT8 and not export.has(OPENVINO_INT8[0]):
        raise no_int8(export.folder)
    if backend not in BACKENDS and not export.has(FILES_OF[backend][0]):
        raise UsageError("BACKEND", backend, f"{export.folder} holds no {FILES_OF[backend][0]}",
                         f"export the model again with --target {backend}")
    if importlib.util.find_spec(PACKAGE_OF[backend]) is None:
        raise MissingExtraError("MISSING_EXTRA", backend, f"expected the package {PACKAGE_OF[backend]}, got none",
                                f'pip install "autosam3d[{EXTRA_OF[backend]}]"')
    recipe, memory, name = export.recipe, export.activation_bytes(backend), FILES_OF[backend][0]
    form = (recipe.model.patch_size, ["background", *recipe.labels.organs], threads, memory, output)
    # Each file is read and hashed once, and only those of this backend.
    if backend == "onnxruntime":
        from autosam3d.inference.onnx_runtime import OnnxPredictor

        predictor: ExportPredictor = OnnxPredictor(export.content(name), export.folder / name, *form)
    elif backend == "litert":
        from autosam3d.inference.litert_runtime import LitertPredictor

        predictor = LitertPredictor(export.content(name), export.folder / name, *form)
    elif backend == "executorch":
        from autosam3d.inference.executorch_runtime import ExecutorchPredictor

        predictor = ExecutorchPredictor(export.content(name), export.folder / name, *form)
    else:
        from autosam3d.inference.openvino_runtime import OpenVinoPredictor

        xml, _ = (export.path(name) for name in FILES_OF[backend])
        predictor = OpenVinoPredictor(xml, *form, name=backend)
    return ExportedModel(recipe, predictor, _identity(export, backend), export.meta.get("metrics", {}))


def _identity(export: Export, backend: str) -> str:
    """What tells the model from others: its trained weights, whose every float32 form says the same, or INT8's own."""
    if backend == INT8:
        return export.meta["files"][OPENVINO_INT8[1]]["sha256"]
    return str(export.meta.get("trained_weights_sha256") or export.sha256)


def no_int8(where: Path) -> UsageError:
    """The refusal of a model that has no INT8 network."""
    return UsageError("BACKEND", where, f"expected an export that was made with --int8 for {INT8}, got a model without",
                      "export it with --int8 SCANS, or name another backend")


def _entry(weights: Mapping[str, Any]) -> dict[str, Any] | None:
    return {"sha256": weights.get("sha256"), "bytes": weights.get("bytes")} if weights.get("file") == ONNX[0] else None
