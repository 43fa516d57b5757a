"""How long a scan will take: announced as soon as it is known, where it is long."""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)

_LONG_SECONDS = 600.0


class Duration:
    """Counts what windows take and says once what all of them will.

    The first call of a predictor prepares things, so the second one is the measure.

    Args:
        name: of the scan, for the message.
        num_windows: that the predictor will see.
    """

    def __init__(self, name: str, num_windows: int) -> None:
        self._name, self._left, self._calls = name, num_windows, 0

    def add(self, num_windows: int, seconds: float) -> None:
        """One call of the predictor is done."""
        self._calls += 1
        self._left -= num_windows
        if self._calls != 2:
            return
        each = seconds / num_windows
        level = logging.WARNING if each * self._left >= _LONG_SECONDS else logging.INFO
        _log.log(level, "%s: %d more windows of %.2g s each, which takes %s; a smaller overlap takes fewer", self._name,
                 self._left, each, duration_text(each * self._left))


def duration_text(seconds: float) -> str:
    """5000 -> "about 83 minutes"."""
    for unit, size, most in (("seconds", 1.0, 120.0), ("minutes", 60.0, 7200.0), ("hours", 3600.0, 172800.0)):
        if seconds < most:
            return f"about {seconds / size:.2g} {unit}" if seconds / size < 10 else f"about {seconds / size:.0f} {unit}"
    return f"about {seconds / 86400:.0f} days"
