"""The documents name what there is, and the environment is the one the project is tested in."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest

import autosam3d

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted(p.relative_to(REPO / "src/autosam3d") for p in (REPO / "src/autosam3d").rglob("*.py"))


PAGE = (REPO / "ARCHITECTURE.md").read_text("utf-8")
TABLE = re.findall(r"^\| `([a-z]+)/` \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
ROOMS = {path.parts[0] for path in SOURCES if len(path.parts) > 1}
NOT_ROOMS = {"badinput", "web", "soak"}
"""Of tests/: what is about all rooms, or about none."""


def test_architecture_lists_every_room_with_its_door_sign() -> None:
    assert sorted(room for room, _, _ in TABLE) == sorted(ROOMS)
    for room, sign, _ in TABLE:
        first = ast.get_docstring(ast.parse((REPO / f"src/autosam3d/{room}/__init__.py").read_text("utf-8")))
        assert first is not None and first.partition("\n")[0] == sign, room


def test_one_may_start_where_architecture_says() -> None:
    for room, _, start in TABLE:
        files = re.findall(r"`([^`]+)`", start)
        assert files, room
        for name in files:
            assert (REPO / "src/autosam3d" / room / name).is_file(), f"{room}/{name}"


def test_architecture_is_short_and_so_is_the_top_level() -> None:
    assert PAGE.count("\n") <= 120
    assert len([path for path in SOURCES if len(path.parts) == 1]) <= 8


def test_architecture_states_the_contract_of_the_rooms() -> None:
    contract = configparser.ConfigParser()
    contract.read(REPO / ".importlinter")
    rooms = contract["importlinter:contract:rooms"]
    (told,) = re.findall(r"^(`cli` > .*?)\.$", PAGE, re.MULTILINE | re.DOTALL)
    assert [layer.strip(" `\n") for layer in told.split(">")] == rooms["layers"].split("\n")[1:]
    assert {name for layer in rooms["layers"].split("\n") for name in layer.split(" | ") if name} == {
        *ROOMS, "axes", "errors", "labels", "user_folders", "version", "volume"}


def test_tests_have_the_same_rooms() -> None:
    rooms = {path.relative_to(REPO / "tests").parts[0] for path in (REPO / "tests").glob("*/**/test_*.py")}
    assert rooms - NOT_ROOMS == ROOMS


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "web/README.md", "docs/python-api.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    """A name in backticks that ends like a source file lies in the package, in a room, or in the repository."""
    named = re.findall(r"`([\w./-]+\.(?:py|ts|js|yaml|md))(?::\d+)?`", (REPO / document).read_text("utf-8"))
    roots = [REPO, *(REPO / "src/autosam3d").glob("*/"), REPO / "src/autosam3d", REPO / "web", REPO / "web/src",
             REPO / "web/src/core", REPO / "web/src/page", REPO / "web/test"]
    for name in named:
        assert any((root / name).is_file() for root in roots), f"{document} names {name}"


def test_modules_and_names_that_documents_name_exist() -> None:
    modules = {".".join(("autosam3d", *path.with_suffix("").parts)) for path in SOURCES} | {"autosam3d"}
    for document in [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "web/README.md"]:
        for name in re.findall(r"`(autosam3d(?:\.\w+)+)`", document.read_text("utf-8")):
            package, _, last = name.rpartition(".")
            known = name in modules or (package == "autosam3d" and last in {*autosam3d.__all__, "__all__"})
            assert known or (REPO / "src" / Path(*name.split("."))).is_dir(), f"{document.name} names {name}"


def test_the_browsers_core_has_its_counterparts_named() -> None:
    text = (REPO / "web/README.md").read_text("utf-8")
    for file in (REPO / "web/src/core").glob("*.ts"):
        assert f"`{file.name}`" in text, file.name


def test_every_recipe_is_in_the_readme() -> None:
    text = (REPO / "README.md").read_text("utf-8")
    for recipe in (REPO / "src/autosam3d/recipes").glob("*.yaml"):
        assert f"`{recipe.stem}`" in text


def test_readme_links_and_pictures_exist() -> None:
    for document in REPO.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
            assert (REPO / target).exists(), f"{document.name} points to {target}"


def test_no_unsafe_calls() -> None:
    unsafe = re.compile(r"pickle\.load|weights_only=False|allow_pickle=True|extractall|yaml\.unsafe|\beval\(|\bexec\(|"
                        r"shell=True|except Exception|except:")
    hits = [f"{path}: {line.strip()}" for path in SOURCES
            for line in (REPO / "src/autosam3d" / path).read_text("utf-8").splitlines() if unsafe.search(line)
            and not line.strip().startswith("#")]
    assert [h for h in hits if ".eval()" not in h] == []


def test_torchvision_is_not_beside_a_cpu_torch() -> None:
    """Its CUDA build breaks torch's operators; it must not slip in through another package."""
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    import torch

    assert "+cpu" not in torch.__version__ or "torchvision" not in names
