"""What the command line does before it does anything: help and version, without a heavy import."""

from __future__ import annotations

import subprocess
import sys

import pytest


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
