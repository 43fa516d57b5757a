"""Where results go: into the archive by STOW-RS or by C-STORE, each object once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autosam3d.io.dicom.identity import identify
from autosam3d.services.pacs.destination import Destination
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.faults import ArchiveError

# An archive may take a moment until its index names what it has taken.
_LOOKS = 5
_LOOK_SECONDS = 1.0


class Sink(Protocol):
    """What takes results."""

    def put(self, path: Path) -> None:
        """Store one DICOM object, once: equal objects have equal UIDs.

        Raises:
            ArchiveError
        """
        ...


@dataclass(frozen=True)
class DicomWebSink:
    """Stores by STOW-RS what QIDO-RS does not find, and believes it stored when QIDO-RS finds it."""

    archive: DicomWeb

    def put(self, path: Path) -> None:
        who = identify(path, path.name)
        if self.archive.has(who.study, who.series, who.instance):
            return  # a process that was killed had come this far
        self.archive.store(who.study, path, who.instance)
        for look in range(_LOOKS):
            if self.archive.has(who.study, who.series, who.instance):
                return
            if look + 1 < _LOOKS:
                time.sleep(_LOOK_SECONDS)
        raise ArchiveError("NOT_STORED", self.archive.name, "it took the result and does not find it",
                           "look at the archive")


@dataclass(frozen=True)
class DimseSink:
    """Stores by C-STORE. Nothing can be asked before: a process that was killed after an object was stored sends it
    again, with the same UID and the same bytes, and it is the same object."""

    destination: Destination
    calling: str
    """Our AE title."""

    def put(self, path: Path) -> None:
        from autosam3d.services.pacs.sending import send  # the other sink is there without pynetdicom

        send(path, identify(path, path.name), self.destination, self.calling)
