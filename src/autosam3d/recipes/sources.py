"""Where a recipe's text comes from: the package by name, or a file; and a dataset's recipe with another network.

``recipes/NAME.yaml`` is one dataset's whole recipe. ``recipes/models/NAME.yaml`` is a preset, one method to train:
its network, its optimiser, and the settings of training that belong to it.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from autosam3d.errors import RecipeError
from autosam3d.recipes.yaml_text import parse_yaml

MAX_RECIPE_BYTES = 1 << 20
_MAX_NAME = 64
_PRESET_SECTIONS = ("about", "model", "optim", "train")


def recipe_names() -> list[str]:
    """The recipes that the package carries."""
    return _names(_recipes())


def preset_names() -> list[str]:
    """The presets for ``--model`` that the package carries."""
    return _names(_recipes().joinpath("models"))


def preset_about(name: str) -> str:
    """One line."""
    return str(_read_preset(name)[0].get("about", ""))


def read_recipe_text(source: str | Path) -> tuple[str, str]:
    """A recipe's YAML and how to call its source.

    Raises:
        RecipeError: NO_RECIPE, RECIPE_UNREADABLE, RECIPE_TOO_LARGE, ENCODING.
    """
    return _read_text(source, _recipes(), "NO_RECIPE", "recipe")


def with_model(recipe: Mapping[str, Any], preset: str | Path) -> dict[str, Any]:
    """A dataset's recipe, as its YAML has it, with the network and the optimiser of a preset.

    Labels, preprocessing, crops' sampling, augmentation and inference stay the dataset's, and so do the keys of
    ``train`` that the preset does not name. Nothing is distilled.

    Raises:
        RecipeError: NO_PRESET, or a preset that is none.
    """
    method, where = _read_preset(preset)
    unknown = sorted(str(key) for key in set(method) - {*_PRESET_SECTIONS})
    if unknown:
        raise RecipeError("UNKNOWN_KEY", f"{where}: {unknown[0]}", "no such key in a model preset",
                          f"remove it: a preset has {', '.join(_PRESET_SECTIONS)}")
    for section in ("model", "optim", "train"):
        if not isinstance(method.get(section), dict):
            raise RecipeError("MISSING_KEY", f"{where}: {section}", "expected a section of keys, got none",
                              "add it; the presets of the package have it")
    stem = Path(preset).stem
    name = str(recipe.get("name", ""))
    train = recipe.get("train", {})
    if not isinstance(train, Mapping):
        raise RecipeError("BAD_VALUE", "recipe: train", f"expected a section of keys, got {train!r}",
                          "correct the value")
    merged = {key: value for key, value in recipe.items() if key != "distill"}
    merged |= {
        "name": f"{name[: max(1, _MAX_NAME - 1 - len(stem))]}_{stem}",
        "about": f"{method.get('about', stem)}; data of {name}",
        "model": method["model"], "optim": method["optim"], "train": {**train, **method["train"]},
    }
    return merged


def _read_preset(preset: str | Path) -> tuple[dict[str, Any], str]:
    text, where = _read_text(preset, _recipes().joinpath("models"), "NO_PRESET", "model preset")
    return parse_yaml(text, where), where


def _recipes() -> Traversable:
    return resources.files("autosam3d.recipes")


def _names(folder: Traversable) -> list[str]:
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def _read_text(source: str | Path, folder: Traversable, code: str, kind: str) -> tuple[str, str]:
    path = Path(source)
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml"):
        names = _names(folder)
        # Before any file: a folder that happens to have the name of a recipe, such as its dataset's, is not meant.
        if source in names:
            return folder.joinpath(f"{source}.yaml").read_text("utf-8"), source
        # os.path.exists, unlike Path.exists, also says no to a name that no file system could hold.
        if not os.path.exists(path):  # noqa: PTH110
            near = difflib.get_close_matches(source, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the package has {', '.join(names)}"
            raise RecipeError(code, source, f"no {kind} of this name and no such file", hint)
    return read_yaml_file(path, kind), str(path)


def read_yaml_file(path: Path, kind: str) -> str:
    """The text of a file that a user named, at most `MAX_RECIPE_BYTES` of it.

    Args:
        kind: what the file is called in messages.

    Raises:
        RecipeError: RECIPE_UNREADABLE, RECIPE_TOO_LARGE, ENCODING.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError("RECIPE_UNREADABLE", path, "expected a file, got something else", f"name a {kind} file")
        if status.st_size > MAX_RECIPE_BYTES:
            raise RecipeError("RECIPE_TOO_LARGE", path, f"expected at most 1 MiB of YAML, got {status.st_size} bytes",
                              f"name a {kind} file")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError("RECIPE_UNREADABLE", path, f"cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError:
        raise RecipeError("ENCODING", path, "expected UTF-8 text", "save the file as UTF-8") from None
