"""Stores results in the archive, by STOW-RS or by C-STORE, each object once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autosam3d.io.dicom.identity import identify
from autosam3d.services.pacs.destination import Destination
from autosam3d.services.pacs.dicomweb import DicomWeb
from autosam3d.services.pacs.faults import ArchiveError

# It may take an archive a moment until its index lists a stored object.
_LOOKS = 5
_LOOK_SECONDS = 1.0


class Sink(Protocol):
    """Stores results."""

    def put(self, path: Path) -> None:
        """Store one DICOM object. Storing it twice leaves one object, since equal objects have equal UIDs.

        Raises:
            ArchiveError
        """
        ...


@dataclass(frozen=True)
class DicomWebSink:
    """Stores by STOW-RS what QIDO-RS does not find; it counts as stored once QIDO-RS finds it."""

    archive: DicomWeb

    def put(self, path: Path) -> None:
        who = identify(path, path.name)
        if self.archive.has(who.study, who.series, who.instance):
            return  # stored by a process that was killed afterwards
        self.archive.store(who.study, path, who.instance)
        for look in range(_LOOKS):
            if self.archive.has(who.study, who.series, who.instance):
                return
            if look + 1 < _LOOKS:
                time.sleep(_LOOK_SECONDS)
        raise ArchiveError("NOT_STORED", self.archive.name, "it accepted the result but does not find it",
                           "look at the archive")


@dataclass(frozen=True)
class DimseSink:
    """Stores by C-STORE, which cannot ask first what is there. After a kill a stored object may be sent again; it has
    the same UID and the same bytes, so the archive keeps one object."""

    destination: Destination
    calling: str
    """Our AE title."""

    def put(self, path: Path) -> None:
        from autosam3d.services.pacs.sending import send  # only this sink needs pynetdicom

        send(path, identify(path, path.name), self.destination, self.calling)
