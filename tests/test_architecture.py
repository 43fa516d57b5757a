"""The documents name what there is, and the environment is the one the project is tested in."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted(p.relative_to(REPO / "src/autosam3d") for p in (REPO / "src/autosam3d").rglob("*.py"))


def test_architecture_lists_every_room() -> None:
    text = (REPO / "ARCHITECTURE.md").read_text("utf-8")
    rooms = set(re.findall(r"^\| `([a-z]+)/` \|", text, re.MULTILINE))
    assert rooms == {p.parts[0] for p in SOURCES if len(p.parts) > 1}
    assert text.count("\n") <= 120
    assert len([p for p in SOURCES if len(p.parts) == 1]) <= 8


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


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["segment", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """What keeps `autosam3d --help` under a second: neither torch nor scipy nor pydantic is loaded for it.

    Some versions of Typer load pydantic themselves to read arguments; what a command without any code of ours
    loads is not counted.
    """
    code = (
        "import sys, typer\n"
        "from typing import Annotated\n"
        "bare = typer.Typer(rich_markup_mode=None, add_completion=False)\n"
        "@bare.command()\n"
        "def one(n: Annotated[int, typer.Option(min=0)] = 0): pass\n"
        "@bare.command()\n"
        "def two(): pass\n"
        "sys.stdout, stdout = open('/dev/null', 'w'), sys.stdout\n"
        "try: bare(['one', '--help'], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        "sys.stdout = stdout\n"
        "typers_own = set(sys.modules)\n"
        "sys.argv = ['autosam3d', *sys.argv[1:]]\n"
        "from autosam3d.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as leave: code = leave.code\n"
        "loaded = set(sys.modules) - typers_own\n"
        "heavy = {'pydantic', 'torch', 'scipy', 'monai', 'nibabel', 'matplotlib'} & loaded\n"
        "heavy |= {'autosam3d.recipes.recipe'} & loaded\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_torchvision_is_not_beside_a_cpu_torch() -> None:
    """Its CUDA build breaks torch's operators; it must not slip in through another package."""
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    import torch

    assert "+cpu" not in torch.__version__ or "torchvision" not in names
