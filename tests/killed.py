"""A process that is killed in the middle of its work, for tests of what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

_KILLED = 9


def die(*_: Any, **__: Any) -> NoReturn:
    """End this process as SIGKILL does: nothing is cleaned up, no handler runs."""
    os._exit(_KILLED)


def demand_killed(work: Callable[[], Any]) -> None:
    """Do `work` in a child of this process, which must come to `die`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _KILLED
