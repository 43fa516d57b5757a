"""A DICOM application entity: its title, host and port."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autosam3d.errors import UsageError

_MAX_TITLE = 16
_PLACE = re.compile(r"(?P<title>.*)@(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Destination:
    """The application entity that results are sent to."""

    title: str
    host: str
    port: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.title}@{self.host}:{self.port}"


def demand_title(title: str) -> None:
    """Check that a text is a valid AE title.

    Raises:
        UsageError: AE_TITLE.
    """
    # *Source*: DICOM PS3.5 section 6.2, value representation AE.
    if not (0 < len(title) <= _MAX_TITLE and title == title.strip() and title.isascii() and title.isprintable()
            and "\\" not in title):
        raise UsageError("AE_TITLE", "AE title", f"expected 1 to {_MAX_TITLE} letters, digits and signs without a "
                         "backslash", "correct it")


def parse_destination(text: str) -> Destination:
    """Parse ``AE@HOST:PORT``.

    Raises:
        UsageError: SEND_TO, AE_TITLE.
    """
    found = _PLACE.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65_536:
        raise UsageError("SEND_TO", "--send-to", "expected AE@HOST:PORT, such as ORTHANC@127.0.0.1:4242", "write it so")
    demand_title(found["title"])
    return Destination(found["title"], found["host"].strip("[]"), int(found["port"]))
