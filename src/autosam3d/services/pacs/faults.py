"""What can go wrong between us and an archive, and whether it is worth another try."""

from __future__ import annotations

from pathlib import Path

from autosam3d.errors import ResourceError


class ArchiveError(ResourceError):
    """The archive did not do what it was asked; `where` names it by host and port, never by a patient's numbers."""

    def __init__(self, code: str, where: str | Path, fault: str, remedy: str, *, retry: bool = True) -> None:
        super().__init__(code, where, fault, remedy)
        self.retry = retry
        """Whether the same request may succeed later."""
