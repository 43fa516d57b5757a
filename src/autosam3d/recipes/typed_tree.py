"""From plain values, as a YAML file and ``--set KEY=VALUE`` have them, to a frozen dataclass: every key known, every
value of its type, every number finite; a fault is one line that names the place and the key."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autosam3d.errors import RecipeError
from autosam3d.recipes.yaml_text import parse_yaml

T = TypeVar("T")

Unions = Mapping[str, tuple[str, tuple[str, ...]]]
"""Sections that have several forms: section to (the key that names the form, the forms)."""


def demand(ok: bool, field_name: str, wish: str, got: object) -> None:
    """A check of a dataclass's ``__post_init__``, which `typed` turns into a fault at the key.

    Raises:
        ValueError: ``FIELD: expected WISH, got GOT``.
    """
    if not ok:
        raise ValueError(f"{field_name}: expected {wish}, got {got!r}")


def with_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` itself, after ``key.path=value`` overrides.

    Raises:
        RecipeError: one that is none.
    """
    for override in overrides:
        _apply_override(tree, override)
    return tree


def typed(
    adapter: TypeAdapter[T], tree: Mapping[str, Any], where: object, *, origins: Mapping[str, str] | None = None,
    unions: Unions | None = None,
) -> T:
    """`tree` as what `adapter` makes of it.

    Args:
        where: names the source of the values in messages.
        origins: dotted path to the source of what lies there, where that is not `where`.
        unions: sections that have several forms.

    Raises:
        RecipeError: UNKNOWN_KEY (with the nearest known one), MISSING_KEY, BAD_VALUE.
    """
    def place(path: str) -> str:
        at = path
        while at and at not in (origins or {}):
            at = at.rpartition(".")[0]
        return f"{(origins or {}).get(at, where)}: {path}"

    for path, value in _numbers(tree):
        if not math.isfinite(value):
            raise RecipeError("BAD_VALUE", place(path), f"expected a finite number, got {value}", "correct the value")
    try:
        return adapter.validate_json(json.dumps(tree, allow_nan=True), strict=True)
    except ValidationError as error:
        code, path, fault, remedy = _explain(error, adapter, unions or {})
        raise RecipeError(code, place(path) if path else str(where), fault, remedy) from None


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float below `node` with its dotted path."""
    if isinstance(node, float):
        yield path, node
    elif isinstance(node, (Mapping, list, tuple)):
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, child in items:
            yield from _numbers(child, f"{path}.{key}" if path else str(key))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError("OVERRIDE", f"--set {override}", "expected KEY.PATH=VALUE",
                          "write for example train.epochs=3")
    value = parse_yaml(f"value: {text}", f"--set {override}")["value"]
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError("OVERRIDE", f"--set {override}", f"{part} is a value, not a section", "shorten the path")
        node = child
    node[parts[-1]] = value


def _explain(error: ValidationError, adapter: TypeAdapter[Any], unions: Unions) -> tuple[str, str, str, str]:
    """(code, path, fault, remedy) from pydantic's list: a typo with the nearest key if there is one, else the first
    fault."""
    faults = error.errors(include_url=False)
    for fault in faults:
        section = str(fault["loc"][0]) if fault["loc"] else ""
        if section in unions and fault["loc"][1:2] and fault["loc"][1] in unions[section][1]:
            fault["loc"] = (section, *fault["loc"][2:])  # without the tag of the union
    first = next((f for f in faults if f["type"] == "unexpected_keyword_argument"), faults[0])
    path = ".".join(str(p) for p in first["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        *section_path, key = [str(p) for p in first["loc"]]
        near = difflib.get_close_matches(key, _known_keys(adapter, section_path), 1)
        remedy = f"did you mean {'.'.join([*section_path, near[0]])}?" if near else "remove it"
        return "UNKNOWN_KEY", path, f"no such key{more}", remedy
    if first["type"] in ("missing", "missing_argument"):
        return "MISSING_KEY", path, f"expected a value, got none{more}", "add the key"
    if first["type"] == "union_tag_invalid":
        key, forms = unions[path]
        got = first.get("ctx", {}).get("tag")
        return ("BAD_VALUE", f"{path}.{key}", f"expected one of {', '.join(forms)}, got {got}{more}",
                "correct the value")
    return "BAD_VALUE", *_bad_value(path, first, more), "correct the value"


def _bad_value(path: str, fault: Any, more: str) -> tuple[str, str]:
    """The path of the value at fault and what is wrong with it."""
    message = fault["msg"].removeprefix("Value error, ")
    own_check = re.match(r"([a-z_.0-9]+): (?=expected)", message)  # a check of ours starts with the field at fault
    if own_check:
        message = message[own_check.end() :]
        if path.rpartition(".")[2] != own_check[1]:
            path = f"{path}.{own_check[1]}" if path else own_check[1]
    elif "expected" not in message:
        message = f"{message[0].lower()}{message[1:]}, got {fault.get('input')!r}"
    message = message if len(message) <= 300 else f"{message[:297]}..."
    return path, f"{message}{more}"


def _known_keys(adapter: TypeAdapter[Any], section: list[str]) -> list[str]:
    """Keys that the schema allows below `section`, in any of its variants."""
    schema = adapter.json_schema()

    def variants(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if "$ref" in node:
            yield from variants(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
            return
        yield node
        for child in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from variants(child)

    nodes = list(variants(schema))
    for part in section:
        nodes = [v for node in nodes if part in node.get("properties", {}) for v in variants(node["properties"][part])]
    return [key for node in nodes for key in node.get("properties", {})]
