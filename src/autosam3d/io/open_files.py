"""How many files a process may have open at once: asked for before the work, and named where it is reached."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from autosam3d.errors import ResourceError

_AT_LIMIT = {errno.EMFILE, errno.ENFILE}
# What torch and safetensors, which pass words on and no number, say of the same.
_WORDS = re.compile(r"too many open files|\(os error (?:23|24)\)", re.IGNORECASE)


def at_limit(error: BaseException) -> bool:
    """Whether an error says that this process, or the machine, has as many files open as it may."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _AT_LIMIT
    return isinstance(error, (OSError, RuntimeError)) and _WORDS.search(str(error)) is not None


def limit_reached(where: str | Path) -> ResourceError:
    """The error for a file that could not be opened because of the limit: nothing is wrong with the file."""
    limit = _limits()[0]
    many = "" if limit is None else f" of {limit}"
    return ResourceError("OPEN_FILES", where, f"cannot be opened: this process has reached its limit{many} open files",
                         "raise it (`ulimit -n 4096`) and give the same command again")


def demand_open_files(needed: int, where: str, remedy: str) -> None:
    """Raise this process's limit of open files to `needed`, as far as the system lets it.

    Args:
        where: what needs them, for a message.
        remedy: beside raising the limit.

    Raises:
        ResourceError: OPEN_FILES, the system's own limit is lower.
    """
    soft, hard = _limits()
    if soft is None or soft >= needed:
        return
    if hard is not None and hard < needed:
        raise ResourceError("OPEN_FILES", where, f"expected that {needed} files may be open, got a limit of {hard}",
                            f"raise it (`ulimit -n {needed}`), or {remedy}")
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, resource.RLIM_INFINITY if hard is None else hard))


def _limits() -> tuple[int | None, int | None]:
    """The limit and how far it may be raised; None for none, and where the platform has no such thing."""
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    soft, hard = (None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    return soft, hard
