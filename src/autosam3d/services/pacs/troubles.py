"""Studies and series that could not be looked at: each is told once, passed over, and tried again later and later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from autosam3d.errors import AutoSam3dError
from autosam3d.services.pacs.ledger import Retry

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trouble:
    tries: int
    not_before: float
    code: str


@dataclass
class Troubles:
    """What is put off, by a name that identifies no patient. It is kept in memory: after a restart all are tried."""

    retry: Retry = field(default_factory=Retry)
    _of: dict[str, _Trouble] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._of)

    def puts_off(self, name: str, now: float) -> bool:
        """Whether it is not yet time to look at `name` again."""
        found = self._of.get(name)
        # A time later than the longest delay was set before the clock was set back.
        return found is not None and now < found.not_before <= now + self.retry.most_seconds

    def failed(self, name: str, error: AutoSam3dError, now: float) -> None:
        """Record a failure; told unless it is the same as the last one."""
        before = self._of.get(name)
        tries = 1 if before is None else before.tries + 1
        seconds = self.retry.delay(min(tries, 30))
        self._of[name] = _Trouble(tries, now + seconds, error.code)
        if before is None or before.code != error.code:
            _log.warning("%s: passed over: %s: %s; it is tried again in %.0f s, and the others go on", name, error.code,
                         error.fault, seconds)

    def well(self, name: str) -> None:
        """Record that `name` could be looked at."""
        if self._of.pop(name, None) is not None:
            _log.warning("%s: it can be looked at again", name)
