"""The settings of a program that runs for long: a YAML file, ``--set KEY=VALUE`` over it, options of the command line
over both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter

from autosam3d.errors import RecipeError
from autosam3d.recipes.sources import read_yaml_file
from autosam3d.recipes.typed_tree import typed, with_overrides
from autosam3d.recipes.yaml_text import parse_yaml

T = TypeVar("T")


def _as_words(value: Any) -> Any:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a word or a list of words, got {value!r}")
    return tuple(words)


Words = Annotated[tuple[str, ...], BeforeValidator(_as_words)]
"""A list of words; one word stands for a list of one."""


def read_settings(
    kind: type[T], file: str | Path | None, overrides: Iterable[str] = (),
    options: Mapping[str, tuple[str, Any]] | None = None, *, guide: str,
) -> T:
    """Settings from a file, ``--set`` and options; what stands nowhere has the default of `kind`.

    Args:
        kind: a frozen dataclass without required fields that forbids extra keys.
        file: YAML; an empty one changes nothing.
        overrides: ``KEY.PATH=VALUE``; they win over the file.
        options: name of an option to (KEY.PATH, its value, None where it was not given); they win over both.
        guide: the page with an example of such a file, for messages.

    Raises:
        RecipeError: the file cannot be read as YAML; UNKNOWN_KEY, BAD_VALUE with the file, ``--set`` or option at
            fault; OVERRIDE, one that is none, or an option and ``--set`` with different values for one key.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = parse_yaml(read_yaml_file(Path(file), "settings"), str(file), f"see the example in {guide}")
    origins: dict[str, str] = {}
    given: dict[str, tuple[str, Any]] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        with_overrides(tree, [override])
        origins[key] = "--set"
        given[key] = (f"--set {override}", _value_at(tree, key))
    for name, (key, wish) in (options or {}).items():
        value = _plain(wish)
        if value is None:
            continue
        if key in given and given[key][1] != value:
            raise RecipeError("OVERRIDE", f"{name} {wish}", f"expected one value for {key}, got another by "
                              f"{given[key][0]}", "leave one of the two out")
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[last] = value
        origins[key] = name
    return typed(TypeAdapter(kind), tree, file if file is not None else "settings", origins=origins)


def split_overrides(overrides: Iterable[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """``KEY.PATH=VALUE`` whose first key is one of `own`, and the others, which are a recipe's."""
    mine, others = [], []
    for override in overrides:
        first = override.partition("=")[0].strip().partition(".")[0]
        (mine if first in own else others).append(override)
    return mine, others


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return node


def _plain(value: Any) -> Any:
    """As YAML would have it; None for an option that was not given, be it a list."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value] or None
    return fspath(value) if isinstance(value, PathLike) else value
