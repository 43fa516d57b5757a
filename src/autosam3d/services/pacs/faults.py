"""Failures of an archive, and whether another try may succeed."""

from __future__ import annotations

from pathlib import Path

from autosam3d.errors import ResourceError

_OF_ALL = ("SERVER_DOWN", "TLS", "AUTH")


class ArchiveError(ResourceError):
    """The archive did not do what it was asked to. `where` is its host and port and never names a patient."""

    def __init__(self, code: str, where: str | Path, fault: str, remedy: str, *, retry: bool = True,
                 partial: bool = False) -> None:
        super().__init__(code, where, fault, remedy)
        self.retry = retry
        """Whether the same request may succeed later."""
        self.partial = partial
        """Whether all entries of a list came but for some that cannot be used."""

    @property
    def may_be_away(self) -> bool:
        """Whether the archive as a whole may be out of reach, and not only what was asked for."""
        return self.code in _OF_ALL
