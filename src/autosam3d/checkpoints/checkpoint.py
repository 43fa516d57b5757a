"""Models on disk: one JSON that says what it is, one safetensors file that holds the numbers, joined by SHA-256.

The JSON (`model_file`) holds the SHA-256 of the weight file and of its own content.
The weight file carries its own hash in its name and is written first; replacing the JSON is the one moment at
which the new checkpoint exists. Whoever is killed in between leaves the old one whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autosam3d.checkpoints.model_file import find_checkpoint, meta_text, packaged_model, read_meta, recipe_of, sealed
from autosam3d.checkpoints.sam_files import read_sam_state
from autosam3d.checkpoints.tensor_file import read_tensors, tensors_sha256, write_tensors
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.inference.out_of_memory import memory_named
from autosam3d.io.files import sha256_of, write_bytes_atomic, write_text_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.room import demand_room
from autosam3d.models.autosam.sam_weights import freeze_sam, frozen_names, load_sam
from autosam3d.models.build import build_network
from autosam3d.models.side_outputs import without_side_outputs
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import names_text

if TYPE_CHECKING:
    from autosam3d.inference.predictor import Predictor

_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class SamSource:
    """Which SAM file the frozen weights came from."""

    source: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: `meta` is the JSON, `tensors` the weights (and more, for a training state)."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to segment, with the recipe it was trained by."""

    recipe: Recipe
    """Organs (`recipe.labels`), preprocessing, windows and network."""
    network: nn.Module
    """In eval mode; windows [B, 1, D, H, W] to logits [B, K, D, H, W]."""
    device: torch.device
    """Where the network lies."""
    sha256: str
    """Of the weight file."""
    metrics: Mapping[str, Any]
    """What was measured when the checkpoint was written, such as ``val_dice``."""

    def __repr__(self) -> str:
        """One line without weights."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return (f"LoadedModel(recipe {self.recipe.name}, {self.recipe.model.network} with {parameters:,} parameters on "
                f"{self.device}, {names_text(self.recipe.labels.organs)})")

    @property
    def runtime(self) -> str:
        """Name and version of what runs it."""
        return f"torch {torch.__version__}"

    @property
    def predictor(self) -> Predictor:
        """The network as the pipeline runs it; always the same object, which learns what fits into memory."""
        return self._predictor

    @cached_property
    def _predictor(self) -> Predictor:
        from autosam3d.inference.torch_runtime import TorchPredictor

        return TorchPredictor(self.network, self.recipe.model.patch_size, self.device, self.recipe.train.precision)


def save_checkpoint(
    json_path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, previous: Path | None = None
) -> None:
    """Write `tensors` and `meta` so that at any moment `json_path` names a complete checkpoint or none.

    Weight files that the folder's JSONs no longer name are removed afterwards.

    Args:
        previous: where the JSON that is replaced goes on living, unless it names the same weights: two names of one
            weight file are no safety.

    Raises:
        ResourceError: the disk is full or not writable; the old checkpoint is untouched.
    """
    folder, stem = json_path.parent, json_path.stem
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = tensors_sha256(plain)
    weights = folder / f"{stem}-{digest[:16]}.safetensors"
    write_tensors(weights, plain)
    entry = {"file": weights.name, "sha256": digest, "bytes": weights.stat().st_size}
    whole = sealed({**meta, "weights": entry})
    try:
        if previous is not None and json_path.exists():
            before = json_path.read_bytes()
            if weights.name.encode() not in before:
                write_bytes_atomic(previous, before)
        write_text_atomic(json_path, meta_text(whole))
    finally:  # also where the JSON does not fit on the disk: then the new weights are those that nothing names
        remove_unnamed_weights(folder, stem)


def read_checkpoint(json_path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: CORRUPT, HASH, VERSION, MODEL_PATH or NONFINITE.
    """
    meta = read_meta(json_path)
    if meta.get("kind") == "export":
        raise CheckpointError("KIND", json_path, "expected a checkpoint for PyTorch, got an export",
                              "name the run folder that it was exported from")
    entry = meta["weights"]
    name = entry.get("file", "")
    if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
        raise CheckpointError("MODEL_PATH", json_path, f"expected a weight file beside it, got {name!r}",
                              "do not edit model files")
    path = json_path.parent / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError("CORRUPT", json_path, f"its weight file {name} is missing",
                              "copy the JSON and the .safetensors file together")
    if path.stat().st_size != entry.get("bytes"):
        raise CheckpointError("CORRUPT", path, f"expected {entry.get('bytes')} bytes, got {path.stat().st_size}",
                              "copy the file again")
    if sha256_of(path) != entry.get("sha256"):
        raise CheckpointError("HASH", path, "its SHA-256 is not the one that its JSON names", "copy the file again")
    tensors = read_tensors(path)
    for tensor_name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError("NONFINITE", path, f"{tensor_name} holds values that are not finite",
                                  "use an earlier checkpoint")
    return Checkpoint(meta, tensors)


def load_model(
    path: str | Path | None = None, *, sam: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """A trained model, ready to segment.

    Args:
        path: a run folder (its best checkpoint is taken), or a checkpoint's JSON; None takes the model of the package.
        sam: where the SAM file lies now, for a model that was trained on frozen SAM weights and does not carry
            them; default: where it lay in training.
        device: where the network goes; "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        The network in eval mode with the recipe it was trained by.

    Raises:
        CheckpointError: the file is broken, of another format, or does not fit the network that it describes; KIND of
            an export, which `checkpoints.exported.load_exported` runs.
        ResourceError: MEMORY, it does not fit.
    """
    json_path = find_checkpoint(Path(path)) if path is not None else packaged_model()
    with memory_named(json_path, "loading the model", "take a smaller model, or a device with more memory"):
        return _load(json_path, sam, torch.device(device))


def _load(json_path: Path, sam: str | Path | None, device: torch.device) -> LoadedModel:
    checkpoint = read_checkpoint(json_path)
    recipe = recipe_of(checkpoint.meta, json_path)
    tensors = checkpoint.tensors
    if checkpoint.meta.get("kind") == "training":
        section = "average." if any(n.startswith("average.") for n in tensors) else "model."
        tensors = without_side_outputs(
            {n.removeprefix(section): t for n, t in tensors.items() if n.startswith(section)})
    sam_entry = checkpoint.meta.get("sam") if checkpoint.meta.get("contains") != "all" else None
    with torch.device("meta"):
        # Without memory, so that a recipe of absurd sizes is refused before anything is allocated for it.
        skeleton = build_network(recipe.model)
    expected = set(skeleton.state_dict()) - set(frozen_names(skeleton) if sam_entry else ())
    demand_fit(skeleton, tensors, expected, json_path)
    network = build_network(recipe.model)
    if sam_entry:
        attach_sam(network, SamSource(**sam_entry), sam)
    load_strictly(network, tensors, expected, json_path)
    network.to(device).eval()
    return LoadedModel(recipe, network, device, checkpoint.meta["weights"]["sha256"],
                       checkpoint.meta.get("metrics", {}))


def pack_model(path: str | Path, destination: Path, *, sam: str | Path | None = None, half: bool = False) -> Path:
    """Write a model with all its weights, SAM's frozen ones too, to ``destination/model.json``; returns that path.

    With `half` the weights are stored as float16, rounded; they are computed with as float32 all the same. A tensor
    that float16 cannot hold stays as it is.

    Raises:
        UsageError: OUTPUT_EXISTS, another model lies there; OUTPUT_PATH.
        ResourceError: NOT_WRITABLE, or the disk is full.
        CheckpointError: as `load_model`.
    """
    source = find_checkpoint(Path(path))
    meta = read_meta(source)
    out = destination / "model.json"
    if out.exists() and not _is_model(out, meta):
        raise UsageError("OUTPUT_EXISTS", out, "expected a new folder, it holds another model", "name another folder")
    size = meta["weights"].get("bytes")
    if meta.get("kind") != "training" and isinstance(size, int):
        demand_room(destination, size // 2 if half else size)
    model = load_model(source, sam=sam)
    make_folder(destination)
    kept = {key: meta[key] for key in ("recipe", "sam", "teacher", "epoch", "metrics", "torch") if key in meta}
    state = model.network.state_dict()
    if half:
        state = {name: _halved(tensor) for name, tensor in state.items()}
    save_checkpoint(out, state, {**kept, "kind": "model", "contains": "all"})
    return out


def _is_model(path: Path, meta: Mapping[str, Any]) -> bool:
    """Whether the packed model at `path` was made from the same training as `meta` tells of."""
    try:
        there = read_meta(path)
    except CheckpointError:
        return False
    return all(there.get(key) == meta.get(key) for key in ("recipe", "epoch", "metrics"))


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if bool(torch.isfinite(half).all()) else tensor


def attach_sam(
    network: nn.Module, expected: SamSource | None, source: str | Path | None, *, freeze: bool = True
) -> SamSource:
    """Load SAM's weights into `network` and freeze them; checks the file's hash where `expected` gives one.

    Raises:
        CheckpointError: NO_SAM, HASH, or the file does not fit the network.
        ValueError: neither a source nor a recorded one.
    """
    where = source if source is not None else (expected.source if expected else None)
    if where is None:
        raise ValueError("attach_sam: expected a source or a recorded one")
    try:
        state, digest = read_sam_state(where)
    except CheckpointError as error:
        if source is not None or error.code != "NO_SAM":
            raise
        raise CheckpointError("NO_SAM", where, "the SAM weights that the model was trained on are not there any more",
                              "name the place where they lie now: --sam PATH") from None
    if expected and digest != expected.sha256:
        raise CheckpointError("HASH", where, f"expected the SAM file with SHA-256 {expected.sha256[:16]}..., "
                              f"got {digest[:16]}...", "name the SAM file that the model was trained on: --sam PATH")
    load_sam(network, state, str(where))
    if freeze:
        freeze_sam(network)
    # As an absolute path, so that the model loads from any working directory; a hub id stays what it is.
    return SamSource(str(Path(where).resolve() if Path(where).exists() else where), digest)


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], expected: set[str], where: Path) -> None:
    """Copy `tensors` into `network`; exactly the names in `expected`, each of the right shape.

    Raises:
        CheckpointError: as `demand_fit`; the network is untouched then.
    """
    demand_fit(network, tensors, expected, where)
    own = network.state_dict()
    with torch.no_grad():
        for name in expected:
            own[name].copy_(tensors[name])


def demand_fit(network: nn.Module, tensors: Mapping[str, Tensor], expected: set[str], where: Path) -> None:
    """Check that `tensors` are exactly the `expected` ones of `network`, each of its shape.

    Raises:
        CheckpointError: MISMATCH, with the first three names at fault.
    """
    own = network.state_dict()
    faults = [f"missing {n}" for n in sorted(expected - set(tensors))]
    faults += [f"unexpected {n}" for n in sorted(set(tensors) - expected)]
    faults += [
        f"{n} has shape {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in sorted(expected & set(tensors)) if tensors[n].shape != own[n].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError("MISMATCH", where, f"its weights do not fit its recipe: {', '.join(faults[:3])}{more}",
                              "use the recipe that it was trained with")


def remove_unnamed_weights(folder: Path, stem: str) -> None:
    """Delete the weight files called `stem` that no JSON of the folder names: those of before, and those of a process
    that was killed before it had written their JSON. Where a JSON is damaged none is deleted: it may be its own."""
    named = set()
    for json_path in folder.glob("*.json"):
        try:
            named.add(json.loads(json_path.read_text("utf-8"))["weights"]["file"])
        except (OSError, ValueError):
            return
        except (KeyError, TypeError):
            continue
    for path in folder.glob(f"{stem}-*.safetensors"):
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
