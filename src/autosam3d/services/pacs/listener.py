"""A storage SCP: takes CT images by C-STORE and answers success only when they are on disk.

*Source*: DICOM PS3.4 annex B (storage, its statuses in B.2.3) and annex A (verification).
"""

from __future__ import annotations

import contextlib
import logging
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from autosam3d.errors import UsageError, VolumeError
from autosam3d.io.dicom.header import CT_IMAGE, MULTIFRAME_CT
from autosam3d.io.dicom.identity import DicomIdentity, identify_image
from autosam3d.io.dicom.syntaxes import readable_syntaxes
from autosam3d.io.dicom.tags import quiet_pydicom
from autosam3d.services.addresses import cannot_listen, is_loopback, no_such_address
from autosam3d.services.pacs.destination import demand_title
from autosam3d.services.pacs.incoming import Incoming, OtherObjectError, OutOfRoomError, is_no_room
from autosam3d.services.pacs.receiving import MAX_PDU_BYTES, ConnectionLimits, Received, Server, quiet_network

# isort: split
# After `receiving`, whose import error says what to install where pynetdicom is absent.
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

_log = logging.getLogger(__name__)

SUCCESS, NO_ROOM, NOT_OF_CLASS, NOT_UNDERSTOOD, DUPLICATE = 0x0000, 0xA700, 0xA900, 0xC000, 0x0111
_VERIFICATION = "1.2.840.10008.1.1"
_IMAGES = (CT_IMAGE, *MULTIFRAME_CT)
_MAX_COMMENT = 64
_STOP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """The address to listen on, and who may send."""

    ae_title: str
    host: str = "127.0.0.1"
    port: int = 11112
    allow_ae: tuple[str, ...] = ()
    """Calling AE titles that are accepted; empty accepts all, and needs a loopback address."""
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        for title in (self.ae_title, *self.allow_ae):
            demand_title(title)
        if not is_loopback(self.host) and not self.allow_ae:
            raise UsageError("NO_CALLERS", f"--host {self.host}", "expected --allow-ae: other machines can reach this "
                             "address, and DICOM asks for no password", "name the AE titles that may send, and with "
                             "allow_from their addresses, or listen on 127.0.0.1")


@contextlib.contextmanager
def listening(settings: ListenSettings, incoming: Incoming) -> Iterator[tuple[str, int]]:
    """Inside, images that are sent go into `incoming`; yields (host, port).

    Raises:
        UsageError: PORT_IN_USE, ADDRESS.
    """
    entity = AE(ae_title=settings.ae_title)
    entity.maximum_pdu_size = MAX_PDU_BYTES
    entity.maximum_associations = settings.limits.max_associations
    entity.acse_timeout = entity.dimse_timeout = settings.limits.pdu_seconds
    entity.network_timeout = settings.limits.idle_seconds
    entity.require_called_aet = True
    entity.require_calling_aet = list(settings.allow_ae)
    entity.add_supported_context(_VERIFICATION)
    for image in _IMAGES:
        entity.add_supported_context(image, readable_syntaxes())
    with quiet_network(), quiet_pydicom():
        server = _server(entity, settings, incoming)
        thread = threading.Thread(target=server.serve_forever, name="AcceptorServer", daemon=True)
        thread.start()
        try:
            yield server.server_address[:2]
        finally:
            _stop(server)


def _server(entity: AE, settings: ListenSettings, incoming: Incoming) -> Server:
    host = settings.host.strip("[]")
    address = (host, settings.port, 0, 0) if ":" in host else (host, settings.port)
    try:
        return entity.make_server(address, server_class=Server, incoming=incoming, limits=settings.limits,
                                  evt_handlers=[(evt.EVT_C_STORE, _store, [incoming])])  # type: ignore[return-value]
    except OSError as error:
        if error.errno is None or error.errno < 0:  # the host name is not known
            raise no_such_address(settings.host, error) from None
        raise cannot_listen(settings.host, settings.port, error) from None


def _stop(server: Server) -> None:
    """Take no more connections and abort the open ones, which tells their senders that objects were not stored."""
    socketserver.BaseServer.shutdown(server)
    server.server_close()
    ends = [threading.Thread(target=assoc.abort, daemon=True) for assoc in server.active_associations]
    for end in ends:
        end.start()
    deadline = time.monotonic() + _STOP_SECONDS
    for end in ends:
        end.join(max(0.0, deadline - time.monotonic()))


def _store(event: Any, incoming: Incoming) -> Dataset:
    """Answer one C-STORE request, after its object is on disk or was refused."""
    status, comment = _take(event, incoming)
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:_MAX_COMMENT]
        _log.warning("an object was not taken (0x%04X): %s", status, comment)
    return answer


def _take(event: Any, incoming: Incoming) -> tuple[int, str]:
    received: Received | None = event.request._dataset_path
    if received is None:
        return NOT_UNDERSTOOD, "there is no data set"
    path = received.finish()
    if path is None:
        if received.no_room:
            return NO_ROOM, f"too much, or no room: {received.no_room}"
        return NOT_UNDERSTOOD, "it could not be written"
    try:
        image = identify_image(path, "an object")
        fault = _mismatch(image, event)
        if fault:
            path.unlink(missing_ok=True)
            return NOT_OF_CLASS, fault
        incoming.put(path, image.series, image.instance)
    except VolumeError as error:
        path.unlink(missing_ok=True)
        return NOT_UNDERSTOOD, f"{error.code}: {error.fault}"
    except OtherObjectError:
        return DUPLICATE, "another object with this UID was received before"
    except OutOfRoomError as error:
        return NO_ROOM, f"too much, or no room: {error}"
    except OSError as error:
        return (NO_ROOM, "no room: disk") if is_no_room(error) else (NOT_UNDERSTOOD, "it could not be written")
    return SUCCESS, ""


def _mismatch(image: DicomIdentity, event: Any) -> str:
    request = event.request
    if image.sop_class != event.context.abstract_syntax or image.sop_class != request.AffectedSOPClassUID:
        return "the data set is of another SOP class than the request says"
    if image.instance != request.AffectedSOPInstanceUID:
        return "the data set is of another instance than the request says"
    if image.modality != "CT":
        return "its modality is not CT"
    return ""
