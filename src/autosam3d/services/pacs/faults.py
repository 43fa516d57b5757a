"""Failures of an archive, and whether another try may succeed."""

from __future__ import annotations

from pathlib import Path

from autosam3d.errors import ResourceError


class ArchiveError(ResourceError):
    """The archive did not do what it was asked to. `where` is its host and port and never names a patient."""

    def __init__(self, code: str, where: str | Path, fault: str, remedy: str, *, retry: bool = True) -> None:
        super().__init__(code, where, fault, remedy)
        self.retry = retry
        """Whether the same request may succeed later."""
