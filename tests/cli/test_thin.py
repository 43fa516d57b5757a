"""The command line is thin: few options a command, short functions, and nothing else prints or exits."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from autosam3d.cli.main import app
from autosam3d.cli.moved import MOVED, remedy_for
from autosam3d.recipes.reading import Reading
from autosam3d.studies.nnunet.run import NnunetPlan
from autosam3d.studies.reproduce.wish import StudyKeys
from autosam3d.studies.slicewise.run import TuneSettings
from autosam3d.studies.slicewise.settings import SegmentKeys

SRC = Path(__file__).resolve().parents[2] / "src/autosam3d"
MOST_OPTIONS, MOST_LINES = 12, 60
# Processes that are started to speak over stdout, and end by their own exit code.
SPEAKERS = {"checkpoints/probe.py", "services/workers/child.py", "studies/nnunet/nnunet_trainer.py",
            "studies/reproduce/cost.py"}


def commands(command: Any, name: str = "") -> dict[str, Any]:
    """Every command by what is typed behind ``autosam3d``; a group counts as the command that it is by itself."""
    found = {name: command} if name else {}
    for word, below in getattr(command, "commands", {}).items():
        found |= commands(below, f"{name} {word}".strip())
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_a_dozen_options_at_most(name: str) -> None:
    options = [p.name for p in COMMANDS[name].params if p.param_type_name == "option" and p.name != "help"]
    assert len(options) <= MOST_OPTIONS or name == "segment", options


def test_the_count_sees_all_commands() -> None:
    assert {"train", "segment", "serve", "pacs", "pacs listen", "slicewise tune", "reproduce"} <= set(COMMANDS)
    assert len([p for p in COMMANDS["segment"].params if p.param_type_name == "option"]) > MOST_OPTIONS


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From its first statement behind the docstring to its end: signatures of commands are options."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_of_the_command_line_are_short() -> None:
    for path in (SRC / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert lines_of(node) <= MOST_LINES, f"{path.name}: {node.name}"


def words_that_print_or_exit(tree: ast.AST) -> list[str]:
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    exits = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    found = [c for c in calls if c in ("print", "sys.exit", "exit", "quit", "os._exit")
             or re.match(r"typer\.(echo|secho|Exit|Abort)$|sys\.(stdout|stderr)\.write$", c)]
    return found + [e for e in exits if "SystemExit" in e]


def test_only_the_command_line_prints_and_exits() -> None:
    hits = {}
    for path in SRC.rglob("*.py"):
        place = path.relative_to(SRC).as_posix()
        if not place.startswith("cli/") and place not in SPEAKERS:
            hits[place] = words_that_print_or_exit(ast.parse(path.read_text("utf-8")))
    assert {place: found for place, found in hits.items() if found} == {}
    assert words_that_print_or_exit(ast.parse("print(1)\nraise SystemExit(2)\nsys.stderr.write('')")) != []
    assert all((SRC / place).is_file() for place in SPEAKERS)


def keys_below(kind: Any, above: str) -> set[str]:
    found = set()
    for field in fields(kind):
        inner = field.default_factory if isinstance(field.default_factory, type) else None
        found |= keys_below(inner, f"{above}{field.name}.") if is_dataclass(inner) else {above + field.name}
    return found


def test_who_types_an_old_option_is_told_a_key_that_there_is() -> None:
    kinds = {"slicewise tune": (TuneSettings, "tune."), "slicewise segment": (SegmentKeys, ""),
             "nnunet": (NnunetPlan, ""), "reproduce": (StudyKeys, "study.")}
    for command, (kind, above) in kinds.items():
        recipes = keys_below(Reading, "reading.") if command.startswith("slicewise") else set()
        assert set(MOVED[command][0].values()) <= keys_below(kind, above) | recipes
    for command, (keys, _) in MOVED.items():
        now = {name for p in COMMANDS[command].params for name in (*p.opts, *p.secondary_opts)}
        assert not set(keys) & now, "an option that there is"
        assert remedy_for(command, "--never") is None
    assert remedy_for("nnunet", "--no-tta") == "write --set tta=false, see autosam3d nnunet --help"
