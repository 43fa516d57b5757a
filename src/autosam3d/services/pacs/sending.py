"""A storage SCU: one result to an archive by C-STORE.

*Source*: DICOM PS3.4 annex B.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from autosam3d.io.dicom.identity import DicomIdentity
from autosam3d.io.dicom.tags import DAMAGE, quiet_pydicom
from autosam3d.services.pacs.destination import Destination
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.receiving import quiet_network

# isort: split
# After `receiving`, whose import error says what to install where pynetdicom is absent.
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
_SUCCESS, _DUPLICATE, _NO_ROOM = 0x0000, 0x0111, 0xA7
# Stored, but incomplete or changed. *Source*: DICOM PS3.4 section B.2.3.
_WARNINGS = (0xB000, 0xB006, 0xB007)


def send(path: Path, who: DicomIdentity, destination: Destination, calling: str) -> None:
    """Store one object.

    Args:
        path: of its file.
        who: what it is.
        destination: where it goes.
        calling: our AE title.

    Raises:
        ArchiveError: SERVER_DOWN, SERVER_REFUSED, NOT_STORED, SERVER_FULL; all may succeed later.
    """
    entity = AE(ae_title=calling)
    entity.connection_timeout = _CONNECT_SECONDS
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = _ANSWER_SECONDS
    # A context for each syntax, so that an archive that accepts only one of them can say which.
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        entity.add_requested_context(who.sop_class, syntax)
    with quiet_network(), quiet_pydicom():
        try:
            association = entity.associate(destination.host, destination.port, ae_title=destination.title)
            _demand_association(association, destination)
            status = _status(association, path, destination)
            association.release()
        except OSError:  # the host name is not known
            raise _down(destination) from None
        finally:
            # Its threads would keep a process alive that was asked to stop.
            for left in entity.active_associations:
                left.abort()
    if status in _WARNINGS:
        _log.warning("%s: it stored a result with warning 0x%04X: it may have changed it", destination.name, status)
    elif status >> 8 == _NO_ROOM:
        raise ArchiveError("SERVER_FULL", destination.name, f"it has no room for the result (0x{status:04X})",
                           "look at the archive; it will be tried again")
    elif status not in (_SUCCESS, _DUPLICATE):
        raise ArchiveError("NOT_STORED", destination.name, f"it did not store the result (0x{status:04X})",
                           "look at the archive; it will be tried again")


def _demand_association(association: Any, destination: Destination) -> None:
    if association.is_rejected:
        raise ArchiveError("SERVER_REFUSED", destination.name, "it refuses the association", "make our AE title and "
                           "address known to it, and check its own AE title")
    if not association.is_established:
        if association.rejected_contexts:
            raise ArchiveError("SERVER_REFUSED", destination.name, "it does not take objects of this kind",
                               "let the archive accept Segmentation and RT Structure Set Storage")
        raise _down(destination)


def _status(association: Any, path: Path, destination: Destination) -> int:
    try:
        answer = association.send_c_store(pydicom.dcmread(path))
    except (RuntimeError, *DAMAGE):  # the connection was lost, or no context was accepted
        answer = None
    status = None if answer is None else answer.get("Status")
    if not isinstance(status, int):
        raise _down(destination)
    return status


def _down(destination: Destination) -> ArchiveError:
    return ArchiveError("SERVER_DOWN", destination.name, "it cannot be reached, or ends the connection",
                        "check its address, and whether it runs")
