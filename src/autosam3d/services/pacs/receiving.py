"""One connection to the C-STORE listener: received bytes are counted, timed, and streamed to disk.

pynetdicom implements the state machine of DICOM PS3.8 and the messages of PS3.7. Its own reception of data has no
limits, holds objects in memory and leaves files behind where a connection breaks, so the bytes of objects are taken out
of the stream here, before pynetdicom sees them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from autosam3d.errors import MissingExtraError, UsageError
from autosam3d.io.dicom.tags import DAMAGE
from autosam3d.services.pacs.incoming import Incoming, OutOfRoomError, is_no_room
from autosam3d.services.room import NoRoomError, Place

try:
    from pynetdicom import _config
    from pynetdicom.association import Association
    from pynetdicom.dimse import DIMSEServiceProvider
    from pynetdicom.dimse_messages import C_STORE_RQ
    from pynetdicom.pdu_primitives import P_DATA
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer
except ImportError:
    raise MissingExtraError("MISSING_EXTRA", "DICOM network", "it needs pynetdicom, which is not installed",
                            'pip install "autosam3d[pacs]"') from None

# isort: split
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID

MAX_PDU_BYTES = 1 << 17
"""Maximum PDU length that senders are told; a request for an association may be longer."""
_MOST_PDU_BYTES = 2 * MAX_PDU_BYTES
_MAX_COMMAND_BYTES = 1 << 14
_MAX_WAITING_MESSAGES = 4
_CHUNK_BYTES = 1 << 16
_PREAMBLE = bytes(128) + b"DICM"
# Control header of a fragment. *Source*: DICOM PS3.8 annex E.2.
_IS_COMMAND, _IS_LAST = 1, 2
# The state machine's event for an invalid PDU, which ends the association. *Source*: DICOM PS3.8 section 9.2.
_BROKEN = "Evt19"


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits on one connection, and on all of them together."""

    max_associations: int = 8
    idle_seconds: float = 60.0
    pdu_seconds: float = 30.0
    """From a PDU's first byte to its last."""
    object_seconds: float = 600.0
    allow_from: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    """Networks whose machines may connect; empty allows all."""


@dataclass
class Received:
    """One object that is being received."""

    path: Path | None
    """None where it could not be written."""
    file: BinaryIO | None
    since: float
    num_bytes: int = 0
    no_room: str = ""
    """What is full or over its limit; empty where nothing is."""
    fault: str = ""
    """Another reason why it was not written; empty where there is none."""
    place: Place | None = None
    """Its room on the disk; None before it is given one."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, data: bytes, max_bytes: int) -> None:
        with self.lock:
            self.num_bytes += len(data)
            if self.file is None:
                return
            try:
                if self.num_bytes > max_bytes:
                    raise OutOfRoomError("one object")
                if self.place is not None:
                    self.place.need(len(data))
                self.file.write(data)
                if self.place is not None:
                    self.place.wrote(len(data))
            except OutOfRoomError as error:
                self._give_up(no_room=str(error))
            except NoRoomError:
                self._give_up(no_room="disk")
            except OSError as error:
                self._give_up(no_room="disk" if is_no_room(error) else "", fault="disk")

    def finish(self) -> Path | None:
        """Flush the file to disk and hand it over; None where that failed."""
        with self.lock:
            if self.file is not None:
                try:
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    self.file.close()
                    path, self.path, self.file = self.path, None, None
                    self._give_up()
                    return path
                except OSError as error:
                    self._give_up(no_room="disk" if is_no_room(error) else "", fault="disk")
            return None

    def discard(self) -> None:
        with self.lock:
            self._give_up()

    def _give_up(self, no_room: str = "", fault: str = "") -> None:
        self.no_room, self.fault = self.no_room or no_room, self.fault or fault
        with contextlib.suppress(OSError):  # closing writes what is left
            if self.file is not None:
                self.file.close()
        with contextlib.suppress(OSError):
            if self.path is not None:
                self.path.unlink(missing_ok=True)
        self.path = self.file = None
        if self.place is not None:
            self.place.close()


class Intake(DIMSEServiceProvider):
    """Messages of one association; the bytes of objects go to disk, and pynetdicom sees an empty data set."""

    def __init__(self, assoc: Association, incoming: Incoming, limits: ConnectionLimits) -> None:
        super().__init__(assoc)
        self._incoming, self._limits = incoming, limits
        self._objects: list[Received] = []
        self._now: Received | None = None
        self._command_bytes = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        try:
            for context_id, data in primitive.presentation_data_value_list:
                one = P_DATA()
                one.presentation_data_value_list.append((context_id, self._without_object(context_id, data)))
                super().receive_primitive(one)
        except DAMAGE:
            # Not raised: that would end the connection's thread with a traceback that shows what was sent.
            self.dul.event_queue.put(_BROKEN)

    def discard(self) -> None:
        """After the association has ended: delete the objects that were not put into a series."""
        for received in self._objects:
            received.discard()
        self._objects.clear()

    def _without_object(self, context_id: int, data: bytes) -> bytes:
        if data[0] & _IS_COMMAND:
            self._command_bytes += len(data)
            if self._command_bytes > _MAX_COMMAND_BYTES or self.msg_queue.qsize() >= _MAX_WAITING_MESSAGES:
                raise ValueError("more than any message needs")
            return data
        self._command_bytes = 0
        if isinstance(self.message, C_STORE_RQ):
            if self._now is None:
                self._now = self._begin(context_id)
                self.message._data_set_path = self._now  # type: ignore[assignment]
            self._now.write(data[1:], self._incoming.limits.max_object_bytes)
            if time.monotonic() - self._now.since > self._limits.object_seconds:
                raise ValueError("too slow")
            if data[0] & _IS_LAST:
                self._now = None
        return data[:1]

    def _begin(self, context_id: int) -> Received:
        self._objects = [one for one in self._objects if one.path is not None]
        received = Received(None, None, time.monotonic())
        self._objects.append(received)
        try:
            received.place = self._incoming.room.place()
            received.path, received.file = self._incoming.open()
            self._write_head(received.file, context_id)
        except NoRoomError:
            received.no_room = "disk"
        except OSError as error:
            received.no_room, received.fault = "disk" if is_no_room(error) else "", "disk"
        return received

    def _write_head(self, file: BinaryIO, context_id: int) -> None:
        """Write the part of a DICOM file before its data set. *Source*: DICOM PS3.10 section 7.1."""
        assert self.message is not None
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = self.message.command_set.AffectedSOPClassUID
        meta.MediaStorageSOPInstanceUID = self.message.command_set.AffectedSOPInstanceUID
        meta.TransferSyntaxUID = self.assoc._accepted_cx[context_id].transfer_syntax[0]
        meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
        head = DicomBytesIO(_PREAMBLE)
        head.seek(0, os.SEEK_END)
        write_file_meta_info(head, meta, enforce_standard=True)
        file.write(head.getvalue())


class Server(ThreadedAssociationServer):
    """Accepts a limited number of connections from the allowed networks; prints no tracebacks."""

    daemon_threads = True

    def __init__(self, *args: Any, incoming: Incoming, limits: ConnectionLimits, **how: Any) -> None:
        self.incoming, self.limits = incoming, limits
        super().__init__(*args, request_handler=_Handler, **how)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        # Connections without an association count, too: each has threads.
        if len(self.active_associations) >= 2 * self.limits.max_associations:
            return False
        allowed = self.limits.allow_from
        return not allowed or any(ipaddress.ip_address(client_address[0]) in network for network in allowed)

    def handle_error(self, request: Any, client_address: Any) -> None: ...


class _Handler(RequestHandler):
    server: Server

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        limits = self.server.limits
        self.request.settimeout(limits.pdu_seconds)
        assert assoc.dul.socket is not None
        assoc.dul.socket.recv = _capped(self.request, limits.pdu_seconds)  # type: ignore[method-assign]
        assoc.dul.daemon = True
        intake = Intake(assoc, self.server.incoming, limits)
        assoc.dimse = intake
        run = assoc.run

        def run_and_discard() -> None:
            try:
                run()
            finally:
                intake.discard()

        assoc.run = run_and_discard  # type: ignore[method-assign]
        return assoc


def _capped(sock: Any, seconds: float) -> Callable[[int], bytearray]:
    """A `recv` that reads exactly so many bytes, fewer where the connection ends; limited in time and length."""

    def receive(num_bytes: int) -> bytearray:
        if num_bytes > _MOST_PDU_BYTES:
            raise OSError("a PDU is longer than allowed")
        content, deadline = bytearray(), time.monotonic() + seconds
        while len(content) < num_bytes:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            piece = sock.recv(min(_CHUNK_BYTES, num_bytes - len(content)))
            if not piece:
                break
            content += piece
        sock.settimeout(seconds)
        return content

    return receive


@contextlib.contextmanager
def quiet_network() -> Iterator[None]:
    """Silence pynetdicom, which logs UIDs and tracebacks, and those of its threads that end with an exception."""
    logger, hook = logging.getLogger("pynetdicom"), threading.excepthook
    level, _config.LOG_HANDLER_LEVEL = logger.level, "none"
    logger.setLevel(logging.CRITICAL + 1)

    def ended(args: Any) -> None:
        # Its threads are known by their classes or by their names.
        if not _is_of_network(args.thread):
            hook(args)

    threading.excepthook = ended
    try:
        yield
    finally:
        threading.excepthook = hook
        logger.setLevel(level)


def networks(texts: Sequence[str]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Parse addresses and networks such as 10.1.2.3 and 10.1.0.0/16.

    Raises:
        UsageError: ADDRESS.
    """
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError:
        raise UsageError("ADDRESS", "allow_from", "expected addresses or networks, such as 10.1.2.3 or 10.1.0.0/16",
                         "write them so") from None


def _is_of_network(thread: threading.Thread | None) -> bool:
    return thread is not None and (type(thread).__module__.startswith("pynetdicom") or "Acceptor" in thread.name)
