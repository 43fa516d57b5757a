"""What a model is, as its JSON says it: found, checked against its own hash, its recipe read. No torch here.

Checkpoints and exports share the scheme: ``format``, ``kind``, ``recipe``, ``weights`` (file, SHA-256, bytes) and the
SHA-256 of all of it. A wrong HU window does as much harm as a wrong weight, so no changed byte goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autosam3d.errors import CheckpointError, RecipeError
from autosam3d.recipes.recipe import Recipe, recipe_from_dict
from autosam3d.version import __version__

log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parents[1] / "weights" / "openkbp_tiny"
"""The model that comes with the package."""
FORMAT_VERSION = 1
MAX_JSON_BYTES = 4 << 20


def find_checkpoint(path: Path) -> Path:
    """The JSON that `path` means: itself, or the best (else the packed, else the last) checkpoint of a folder.

    Raises:
        CheckpointError: NO_MODEL.
    """
    if path.is_dir():
        for name in ("best.json", "model.json", "last.json"):
            if (path / name).is_file():
                if name == "last.json":
                    log.warning("%s: no best checkpoint yet, taking the last training state", path)
                return path / name
        raise CheckpointError("NO_MODEL", path, "expected a model folder with best.json or model.json, found neither",
                              "name the folder that `autosam3d train` wrote")
    if not path.exists():
        raise CheckpointError("NO_MODEL", path, "no such file or folder",
                              "name the folder that `autosam3d train` wrote")
    if path.suffix != ".json":
        raise CheckpointError("NO_MODEL", path, "expected a model folder or its .json file",
                              "name the folder that `autosam3d train` wrote")
    return path


def packaged_model() -> Path:
    """The JSON of the model that comes with the package.

    Raises:
        CheckpointError: NO_MODEL, this installation has none.
    """
    if not (PACKAGED / "model.json").is_file():
        raise CheckpointError("NO_MODEL", "autosam3d", "no model was named, and this installation carries none",
                              "name a model: autosam3d segment MODEL INPUT OUTPUT")
    return PACKAGED / "model.json"


def read_meta(json_path: Path) -> dict[str, Any]:
    """The JSON of a model, checked for its shape and version but not against its weights.

    Raises:
        CheckpointError: CORRUPT, UNREADABLE, VERSION or HASH.
    """
    try:
        if json_path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError("CORRUPT", json_path, "expected a model's JSON of at most 4 MiB",
                                  "name the folder that `autosam3d train` wrote")
        if json_path.exists() and not json_path.is_file():
            raise CheckpointError("CORRUPT", json_path, "expected a file, got something else",
                                  "name the folder that `autosam3d train` wrote")
        meta = json.loads(json_path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError("MODEL_UNREADABLE", json_path, f"cannot be read ({error.strerror})",
                              "check the path") from None
    except (ValueError, RecursionError):
        raise CheckpointError("CORRUPT", json_path, "expected a model's JSON, got something else or a part of one",
                              "copy the file again or use another checkpoint") from None
    if not isinstance(meta, dict) or not all(isinstance(meta.get(key), dict) for key in ("weights", "recipe")):
        raise CheckpointError("CORRUPT", json_path, "expected a model's JSON with `recipe` and `weights`",
                              "name the folder that `autosam3d train` wrote")
    if meta.get("format") != FORMAT_VERSION:
        raise CheckpointError("VERSION", json_path, f"expected format {FORMAT_VERSION}, got {meta.get('format')!r}",
                              "upgrade autosam3d")
    if meta.get("sha256") != content_sha256(meta):
        raise CheckpointError("HASH", json_path, "its content is not what its own SHA-256 says",
                              "copy the file again; do not edit model files")
    return meta


def recipe_of(meta: Mapping[str, Any], json_path: Path) -> Recipe:
    """The recipe inside a model's JSON.

    Raises:
        CheckpointError: MISMATCH, the recipe is not valid in this version.
    """
    try:
        return recipe_from_dict(meta["recipe"], json_path)
    except RecipeError as error:
        key = str(error.where).removeprefix(str(json_path)).removeprefix(": ")
        fault = f"{key}: {error.fault}" if key else error.fault
        raise CheckpointError("MISMATCH", json_path, f"its recipe is not valid here: {fault}",
                              "use the version of autosam3d that wrote it") from None


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as it goes into the file: with the format, our version and the hash of its content."""
    whole = {"format": FORMAT_VERSION, "autosam3d": __version__, **meta}
    whole = json.loads(json.dumps(whole))  # as it will be read: keys are text, tuples are lists
    whole["sha256"] = content_sha256(whole)
    return whole


def meta_text(whole: Mapping[str, Any]) -> str:
    """The JSON file of a `sealed` meta."""
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def content_sha256(meta: Mapping[str, Any]) -> str:
    """Of everything in a model's JSON but this hash itself, however it is laid out."""
    content = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
