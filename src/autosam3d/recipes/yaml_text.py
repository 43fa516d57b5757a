"""YAML as recipes are written in it: plain values only, read as YAML 1.2 has them, each key once.

This is the only module that knows YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from autosam3d.errors import RecipeError


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses aliases (bombs), tags, deep nesting and doubled keys."""

    MAX_NESTING = 32
    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=self.peek_event().start_mark)
        self._level += 1
        if self._level > self.MAX_NESTING:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {self.MAX_NESTING} levels",
                                       problem_mark=self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int)):
                raise yaml.MarkedYAMLError(problem="expected a plain key", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Plain scalars as YAML 1.2 has them. PyYAML's own rules, of 1.1, read 5e-4 as text, 010 as eight, 12:30 as 750,
# `no` as false and 2001-01-01 as a date.
_UniqueKeyLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
     r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
):
    _UniqueKeyLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes text that this reader or one of YAML 1.1 would take for something else, such as the case id 0038."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + _UniqueKeyLoader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_UniqueKeyLoader.yaml_implicit_resolvers}
    }


def parse_yaml(text: str, where: str, settings_remedy: str | None = None) -> dict[str, Any]:
    """A mapping of plain values.

    Args:
        where: names the text in messages.
        settings_remedy: of settings, which may all be left out, what to do where the text is no mapping; None for a
            recipe.

    Raises:
        RecipeError: YAML, with the line at fault.
    """
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError("YAML", where, f"not readable as plain YAML: {problem}{place}", "correct that line") from None
    if tree is None and settings_remedy is not None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError("YAML", where, f"expected a mapping of sections, got {type(tree).__name__}",
                          settings_remedy or "start from a recipe of the package: autosam3d info btcv --yaml")
    return tree


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Text that `parse_yaml` reads back as the same values."""
    return yaml.dump(tree, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True, width=110)
