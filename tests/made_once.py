"""What is dear to make and only read afterwards: made by one process of the tests, for all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock  # torch needs it, so it is there


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` writes at the path it is given. Who comes while another makes it waits; read-only, please.

    The folder lies in what tests/conftest.py keeps for one run of the tests, all workers of pytest-xdist together.
    """
    place = Path(os.environ["AUTOSAM3D_TESTS"]) / name
    with FileLock(f"{place}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent) as half:
                make(Path(half) / "made")
                (Path(half) / "made").rename(place)
    return place
