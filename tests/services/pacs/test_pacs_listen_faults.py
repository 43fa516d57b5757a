"""What senders do wrong, and what the listener answers: nothing of a patient told, nothing left, and it goes on."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
pytest.importorskip("pynetdicom", reason="the pacs extra is not installed")

import make_dicom as bad
import pydicom
from orthanc import free_port
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
)
from senders import HOST, Cutting, demand_dcmtk, echo, send, store_bytes
from test_pacs_orthanc import phantom

from autosam3d.errors import UsageError
from autosam3d.io import read_ct
from autosam3d.services.pacs import incoming as incoming_module
from autosam3d.services.pacs.arrivals import Arrivals, forget_failed, look
from autosam3d.services.pacs.destination import Destination, parse_destination
from autosam3d.services.pacs.faults import ArchiveError
from autosam3d.services.pacs.incoming import Incoming, RoomLimits, hash_of
from autosam3d.services.pacs.ledger import DEAD, DONE, FETCHED, Ledger
from autosam3d.services.pacs.listener import ListenSettings, listening
from autosam3d.services.pacs.receiving import ConnectionLimits, networks
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.pacs.service import ArchiveService
from autosam3d.services.pacs.sinks import DimseSink
from autosam3d.services.pacs.state_folder import StateFolder
from autosam3d.services.pacs.troubles import Troubles

LIMITS = RoomLimits(max_object_bytes=300_000, max_objects=12, max_series=3, min_free_bytes=1 << 20)
FIRST = f"{bad.SERIES_UID}.1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Incoming]]:
    demand_dcmtk()
    incoming = Incoming(tmp_path_factory.mktemp("incoming"), LIMITS)
    settings = ListenSettings(ae_title="LISTENER", port=0, allow_ae=("SCANNER",),
                              limits=ConnectionLimits(pdu_seconds=1.0, idle_seconds=3.0))
    with listening(settings, incoming) as (_, port):
        yield port, incoming


@pytest.fixture
def port(place: tuple[int, Incoming], caplog: pytest.LogCaptureFixture) -> Iterator[int]:
    """Of a listener that has nothing yet; afterwards it must be alive, clean and discreet."""
    port, incoming = place
    for key in list(incoming._series):
        incoming.drop(key)
    with caplog.at_level(logging.DEBUG):
        yield port
    assert echo(port) == 0
    for _ in range(100):
        if not list((incoming.folder / "receiving").iterdir()):
            break
        time.sleep(0.05)
    assert not list((incoming.folder / "receiving").iterdir())
    assert not any(secret in caplog.text for secret in ("Doe", "4711", bad.SERIES_UID))


def data_set(change: Callable[[pydicom.Dataset], object] = lambda ds: None, size: int = 20, implicit: bool = False
             ) -> bytes:
    """A slice as it goes over the network."""
    ds = bad.make_slice(0, np.zeros((size, size), np.int16), 0.0)
    with pydicom.config.disable_value_validation():
        change(ds)
    content = pydicom.filebase.DicomBytesIO()
    content.is_little_endian, content.is_implicit_VR = True, implicit
    pydicom.filewriter.write_dataset(content, pydicom.Dataset(ds))
    return content.getvalue()


def nested(levels: int) -> bytes:
    """(0009,1010) sequences of undefined length, one in the other, before the UIDs that are asked for."""
    begin = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    content = data_set()
    at = content.index(b"\x10\x00\x10\x00PN")  # PatientName
    return content[:at] + begin * levels + content[at:]


def set_to(**values: object) -> Callable[[pydicom.Dataset], object]:
    return lambda ds: [setattr(ds, name, value) for name, value in values.items()]


BROKEN = {
    "no DICOM": (bytes(range(256)) * 8, 0xC000),
    "cut in its pixels": (data_set()[:-1], 0xC000),
    "cut in its header": (data_set()[:200], 0xC000),
    "no pixels": (data_set(lambda ds: delattr(ds, "PixelData")), 0xC000),
    "no series": (data_set(lambda ds: delattr(ds, "SeriesInstanceUID")), 0xC000),
    "series that is no UID": (data_set(set_to(SeriesInstanceUID="../../Doe")), 0xC000),
    "nested deeply": (nested(10_000), 0xC000),
    "another class": (data_set(set_to(SOPClassUID=MRImageStorage)), 0xA900),
    "another instance": (data_set(set_to(SOPInstanceUID="1.2.9")), 0xA900),
    "another modality": (data_set(set_to(Modality="MR")), 0xA900),
    "too large": (data_set(size=512), 0xA700),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_refused(fault: str, port: int, place: tuple[int, Incoming]) -> None:
    content, status = BROKEN[fault]
    assert store_bytes(port, content, CTImageStorage, FIRST, ExplicitVRLittleEndian) == status
    assert place[1]._series == {}
    assert store_bytes(port, data_set(), CTImageStorage, FIRST, ExplicitVRLittleEndian) == 0


def test_an_object_again_is_the_same_or_refused(port: int, place: tuple[int, Incoming]) -> None:
    args = CTImageStorage, FIRST, ExplicitVRLittleEndian
    assert store_bytes(port, data_set(), *args) == 0
    assert store_bytes(port, data_set(), *args) == 0
    assert store_bytes(port, data_set(set_to(PatientID="Doe-4712")), *args) == 0x0111
    assert store_bytes(port, data_set(implicit=True), CTImageStorage, FIRST, ImplicitVRLittleEndian) == 0x0111
    (path,) = place[1].folder.rglob("*.dcm")
    ds = pydicom.dcmread(path)
    assert ds.PatientID == "Doe-4711" and ds.file_meta.MediaStorageSOPInstanceUID == FIRST
    assert path.name == f"{hash_of(FIRST)}.dcm" and path.stat().st_mode & 0o777 == 0o600


def test_compressed_slices_are_read_as_they_came(port: int, place: tuple[int, Incoming], tmp_path: Path) -> None:
    series = phantom(tmp_path / "ct")
    for path in series.iterdir():
        ds = pydicom.dcmread(path)
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
        ds.save_as(tmp_path / "jls.dcm")
        (tmp_path / "jls.dcm").rename(tmp_path / "ct" / path.name)
    assert send(port, series, "-xt") == 0
    assert (place[1].folder / hash_of(bad.SERIES_UID)).is_dir()
    got = read_ct(place[1].folder / hash_of(bad.SERIES_UID))
    phantom(tmp_path / "plain")
    np.testing.assert_array_equal(got.voxels_hu, read_ct(tmp_path / "plain").voxels_hu)
    path = next((place[1].folder / hash_of(bad.SERIES_UID)).iterdir())
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLSLossless


def test_more_than_there_may_be(port: int, place: tuple[int, Incoming], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    def store(series: str, instance: str) -> int | None:
        content = data_set(set_to(SeriesInstanceUID=series, SOPInstanceUID=instance))
        return store_bytes(port, content, CTImageStorage, instance, ExplicitVRLittleEndian)

    assert [store(f"1.9.{n}", f"1.8.{n}") for n in range(4)] == [0, 0, 0, 0xA700]
    for n in range(7):
        one = next((place[1].folder / hash_of("1.9.0")).iterdir())
        place[1].put(Path(shutil.copy(one, tmp_path / "x")), "1.9.0", f"1.5.{n}")
    assert [store("1.9.0", f"1.7.{n}") for n in range(5)] == [0] * 4 + [0xA700]
    monkeypatch.setattr(incoming_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert store("1.9.1", "1.6.1") == 0xA700


def test_who_is_not_known_or_asks_for_another(port: int, tmp_path: Path) -> None:
    assert echo(port, calling="STRANGER") != 0
    assert echo(port, called="ANOTHER") != 0
    path = tmp_path / "mr"
    path.mkdir()
    ds = bad.make_slice(0, np.zeros((20, 20), np.int16), 0.0)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    bad.save(ds, path / "0.dcm")
    assert send(port, path) != 0
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    bad.save(ds, path / "0.dcm")
    assert send(port, path) == 0


@pytest.mark.parametrize("content", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(6),
    b"\x01\x00\xff\xff\xff\xff" + bytes(999),
    b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x02", b"\x01\x00\x00\x00\x00\x44" + bytes(68), b"\x05\x00", b"",
    b"\x02\x00\x00\x00\x00\x04Doe^",
])
def test_garbage_on_the_port(content: bytes, port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection((HOST, port)) as sock:
        sock.sendall(content)
        sock.settimeout(5)
        try:
            while sock.recv(4096):
                pass
        except TimeoutError:
            pytest.fail("the connection is held")
        except ConnectionResetError:
            pass
    assert echo(port) == 0
    assert capfd.readouterr().err == ""


def test_a_connection_that_ends_inside_an_object(port: int, place: tuple[int, Incoming], tmp_path: Path) -> None:
    path = tmp_path / "ct"
    path.mkdir()
    bad.save(bad.make_slice(0, np.zeros((300, 400), np.int16), 0.0), path / "0.dcm")
    assert send(Cutting(port, 150_000).port, path) != 0
    assert place[1]._series == {}
    assert send(port, path) == 0
    assert len(place[1].objects(hash_of(bad.SERIES_UID))) == 1


def test_commands_without_end_and_orders_of_other_services(port: int) -> None:
    """A command that grows for ever, and a query on a context of images with a data set that does."""
    from pynetdicom import AE
    from pynetdicom.pdu_primitives import P_DATA

    for head, piece in ((b"", b"\x01" + bytes(8000)), (None, b"\x00" + bytes(8000))):
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(CTImageStorage)
        association = entity.associate(HOST, port, ae_title="LISTENER")
        assert association.is_established
        if head is None:
            elements = [(0x0002, b"1.2.840.10008.5.1.4.1.1.2\0"), (0x0100, struct.pack("<H", 0x0020)),
                        (0x0110, struct.pack("<H", 1)), (0x0700, bytes(2)), (0x0800, struct.pack("<H", 1))]
            head = b"\x03" + b"".join(struct.pack("<HHI", 0, tag, len(value)) + value for tag, value in elements)
            pieces = [head, *[piece] * 50, b"\x02"]
        else:
            pieces = [piece] * 50
        for one in pieces:
            if association.is_established:
                pdata = P_DATA()
                pdata.presentation_data_value_list.append((1, one))
                association.dul.send_pdu(pdata)
        for _ in range(100):
            if not association.is_established:
                break
            time.sleep(0.05)
        assert not association.is_established
        association.abort()


def test_an_address_that_cannot_be_had(port: int, tmp_path: Path) -> None:
    for change, code in (({"port": port}, "PORT_IN_USE"), ({"host": "0.0.0.0"}, "NO_CALLERS"),
                         ({"host": "192.0.2.1", "allow_ae": ("A",)}, "ADDRESS"), ({"ae_title": "X" * 17}, "AE_TITLE"),
                         ({"host": "no.such.host.invalid", "allow_ae": ("A",)}, "ADDRESS")):
        with pytest.raises(UsageError) as caught, \
                listening(ListenSettings(**({"ae_title": "LISTENER", "port": 0} | change)), Incoming(tmp_path)):
            pass
        assert caught.value.code == code
    limits = ConnectionLimits(allow_from=networks(["192.0.2.0/24"]))
    with listening(ListenSettings(ae_title="LISTENER", port=0, limits=limits), Incoming(tmp_path)) as (_, other):
        assert echo(other) != 0
    for text in ("ORTHANC", "A@B", "A@B:0", "A@B:99999", "@B:1", "A\\B@C:1"):
        with pytest.raises(UsageError):
            parse_destination(text)
    assert parse_destination("A B@[::1]:104") == Destination("A B", "::1", 104)


def test_an_archive_that_does_not_take_a_result(port: int, tmp_path: Path) -> None:
    ds = bad.make_slice(0, np.zeros((20, 20), np.int16), 0.0)
    bad.save(ds, tmp_path / "ct.dcm")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    bad.save(ds, tmp_path / "mr.dcm")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.Modality = "MR"
    bad.save(ds, tmp_path / "lie.dcm")
    for name, title, to, code in (("ct", "ANOTHER", port, "SERVER_REFUSED"), ("mr", "LISTENER", port, "SERVER_REFUSED"),
                                  ("lie", "LISTENER", port, "NOT_STORED"), ("ct", "X", free_port(), "SERVER_DOWN")):
        with pytest.raises(ArchiveError) as caught:
            DimseSink(Destination(title, HOST, to), "SCANNER").put(tmp_path / f"{name}.dcm")
        assert caught.value.code == code and caught.value.retry
    DimseSink(Destination("LISTENER", HOST, port), "SCANNER").put(tmp_path / "ct.dcm")
    with pytest.raises(ArchiveError) as caught:
        sink = DimseSink(Destination("LISTENER", HOST, port), "SCANNER")
        ds.Modality, ds.PatientID = "CT", "Doe-4713"
        ds.PixelData = bytes(20 * 20 * 2 * 400)
        ds.Rows = ds.Columns = 400
        bad.save(ds, tmp_path / "large.dcm")
        sink.put(tmp_path / "large.dcm")
    assert caught.value.code == "SERVER_FULL"


class NoSegmenter:
    def segment(self, series: Path, folder: Path) -> list[Path]:
        (folder / "a").write_bytes(b"a")
        return [folder / "a"]


class NoSink:
    def put(self, path: Path) -> None: ...


def test_a_stray_file_between_the_series_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"of a desktop")
    (tmp_path / "00ff").mkdir()
    incoming = Incoming(tmp_path)
    assert set(incoming._series) == {"00ff"} and incoming_module.num_series(tmp_path) == 1
    assert (tmp_path / ".DS_Store").read_bytes() == b"of a desktop"


def test_what_is_taken_up_and_what_is_forgotten(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    for folder in (state.incoming, state.path / "jobs"):
        folder.mkdir(parents=True)
    clock = [0.0]
    incoming = Incoming(state.incoming, clock=lambda: clock[0])
    ledger = Ledger(state.ledger)
    service = ArchiveService(state, ledger, NoSegmenter(), NoSink(), None, now=lambda: clock[0])
    how = Arrivals(rule=Rule(min_slices=3), model="m", settings="s", settle_seconds=10, keep_seconds=100,
                   keep_failed_days=1)

    def put(series: str, instance: str, **values: object) -> None:
        ds = bad.make_slice(0, np.zeros((20, 20), np.int16), 0.0)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = series, instance
        set_to(**values)(ds)
        bad.save(ds, tmp_path / "x.dcm")
        path, file = incoming.open()
        with file:
            file.write((tmp_path / "x.dcm").read_bytes())
        incoming.put(path, series, instance)

    for n in range(3):
        put("1.1", f"1.1.{n}")
        put("1.2", f"1.2.{n}", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        put("1.3", f"1.3.{n}", StudyInstanceUID=f"1.2.{n}")
    put("1.4", "1.4.0", NumberOfFrames=3, SOPClassUID=EnhancedCTImageStorage, PixelData=bytes(2400))
    put("1.6", "1.6.0", NumberOfFrames=999_999, SOPClassUID=EnhancedCTImageStorage, PixelData=bytes(1600))
    assert look(service, incoming, how, Troubles()) == 0  # they may still grow
    clock[0] = 9.0
    put("1.1", "1.1.3")
    clock[0] = 11.0
    assert look(service, incoming, how, Troubles()) == 1  # frames are slices
    clock[0] = 20.0
    assert look(service, incoming, how, Troubles()) == 1
    assert {job.series: job.num for job in ledger.jobs()} == {"1.1": 4, "1.4": 1}
    # While one waits it keeps its files; what nobody needs goes.
    clock[0] = 500.0
    look(service, incoming, how, Troubles())
    assert {path.name for path in state.incoming.iterdir()} == {"receiving", hash_of("1.1"), hash_of("1.4")}
    while service.work_once():
        pass
    assert {job.state for job in ledger.jobs()} == {DONE}
    look(service, incoming, how, Troubles())
    assert [path.name for path in state.incoming.iterdir()] == ["receiving"]
    # Given up, its images are kept for a while; once they are gone, sending it again begins anew.
    for n in range(3):
        put("1.5", f"1.5.{n}")
    clock[0] = 600.0
    assert look(service, incoming, how, Troubles()) == 1
    service.segmenter = None  # type: ignore[assignment]
    job = ledger.due(clock[0], 1.0)
    assert job is not None
    job = ledger.fail(service._step(job), UsageError("BAD", "", "", ""), None, clock[0])
    assert job.state == DEAD and len(list(state.series(job.id).iterdir())) == 3
    service.sweep()
    assert state.series(job.id).is_dir()
    clock[0] += 86_401.0
    forget_failed(service, how)
    look(service, incoming, how, Troubles())
    assert not state.job(job.id).exists() and not (state.incoming / hash_of("1.5")).exists()
    assert ledger.requeue(None, clock[0]) == 1
    service.segmenter = NoSegmenter()
    assert ledger.get(job.id).state == FETCHED  # type: ignore[union-attr]
    assert service.work_once() and ledger.get(job.id).code == "LOST"  # type: ignore[union-attr]
    for n in range(3):
        put("1.5", f"1.5.{n}")
    clock[0] += 10.0
    assert look(service, incoming, how, Troubles()) == 1 and service.work_once()
    assert ledger.get(job.id).state == DONE  # type: ignore[union-attr]
    ledger.close()
