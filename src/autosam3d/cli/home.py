"""What the command line sets in its environment: a home for who has none, a place for matplotlib's list of fonts."""

from __future__ import annotations

import contextlib
import getpass
import os
from pathlib import Path

from autosam3d.user_folders import cache_of_home, may_be_made, temporary_home


def settle_home() -> None:
    """Put a name and a temporary home in the places of those that the user lacks, as in containers.

    Libraries ask for either as they are imported, and fail (MONAI, NNCF) or write into a folder that is literally named
    ``~`` (Hugging Face's hub). A home that is there and may not be written stays: what lies in it, such as weights, is
    still found. matplotlib, which MONAI imports, keeps its list of fonts in this package's cache.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    # Path.is_dir raises where it may not look.
    if not (os.path.isabs(home) and (os.path.isdir(home) or may_be_made(Path(home)))):  # noqa: PTH112, PTH117
        with contextlib.suppress(OSError):
            os.environ["HOME"] = str(temporary_home())
    if (cache := cache_of_home()) is not None:
        os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))
