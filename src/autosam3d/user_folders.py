"""The user's own folders: where this package keeps what it can make again, and what `serve` has to remember."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import sys
import tempfile
from pathlib import Path

from autosam3d.errors import ResourceError

_log = logging.getLogger(__name__)

_STAND_IN = "no-home"


def cache_folder() -> Path:
    """The user's cache of this package, whether it exists or not; a temporary one where the user has none.

    Raises:
        ResourceError: NOT_WRITABLE, not even a temporary folder can be made.
    """
    return _usable(_named_cache(), "cache", "XDG_CACHE_HOME")


def cache_of_home() -> Path | None:
    """The user's cache of this package, None where `cache_folder` would be a temporary one; nothing is said or made."""
    folder = _named_cache()
    return folder if folder is not None and may_be_made(folder) else None


def state_folder() -> Path:
    """Where services of this package keep their state, whether it exists or not; a temporary one where the user has no
    home.

    Raises:
        ResourceError: NOT_WRITABLE, not even a temporary folder can be made.
    """
    home = _home()
    return _usable(_in_home("XDG_STATE_HOME", home and home / ".local" / "state" / "autosam3d"), "state",
                   "XDG_STATE_HOME")


def temporary_home() -> Path:
    """A home for the processes of a user who has none; where a cache is asked for, it counts as none.

    Raises:
        OSError: no temporary folder can be made.
    """
    return _own_temporary(_STAND_IN)


def may_be_made(folder: Path) -> bool:
    """Whether a folder is there to be written in, or can be made below what is."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:  # a folder above may not even be looked into
        return False


def _named_cache() -> Path | None:
    return _in_home("XDG_CACHE_HOME", _cache_in(_home()))


def _in_home(variable: str, default: Path | None) -> Path | None:
    """Below what the environment names, else the default. *Source*: the XDG Base Directory Specification, by which a
    path that is not absolute counts as none."""
    base = os.environ.get(variable, "")
    return Path(base) / "autosam3d" if Path(base).is_absolute() else default


def _home() -> Path | None:
    """None where neither HOME nor the list of users names one: a uid without a name, as containers have."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home raises where there is none
    return home if home.is_absolute() and not _is_stand_in(home) else None


def _is_stand_in(home: Path) -> bool:
    """Whether this process, or the one that started it, has made `home` up."""
    return home.name == _STAND_IN and home.parent.name.startswith("autosam3d-")


def _cache_in(home: Path | None) -> Path | None:
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "autosam3d" / "Cache"
    if home is None:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "autosam3d"
    return home / "AppData" / "Local" / "autosam3d" / "Cache" if sys.platform == "win32" else (
        home / ".cache" / "autosam3d")


def _usable(folder: Path | None, what: str, variable: str) -> Path:
    if folder is not None and may_be_made(folder):
        return folder
    return _temporary(what, variable, "there is no home folder" if folder is None else f"{folder} cannot be written")


@functools.cache
def _temporary(what: str, variable: str, why: str) -> Path:
    """This user's own folder among the temporary files, the same one for every run; said once a process."""
    try:
        folder = _own_temporary(what)
    except OSError as error:
        raise ResourceError("NOT_WRITABLE", what, f"{why}, and no temporary folder can be made ({error.strerror})",
                            f"set {variable} to a folder that may be written") from None
    _log.warning("the %s is %s, because %s; set %s to keep it elsewhere", what, folder, why, variable)
    return folder


@functools.cache
def _own_temporary(name: str) -> Path:
    """A folder of this user alone among the temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"autosam3d-{user}"
    if not _is_private(folder):
        folder = Path(tempfile.mkdtemp(prefix="autosam3d-"))  # someone else has taken the name: one that nobody knows
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def _is_private(folder: Path) -> bool:
    """Makes the folder, or finds it to be this user's alone: a model is run from it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not hasattr(os, "getuid"):
        return folder.is_dir()
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
