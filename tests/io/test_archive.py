"""Zips: what they hold comes out whole, and nothing of what they ask for beyond that happens."""

from __future__ import annotations

import errno
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.io import read_ct
from autosam3d.io.dicom.archive import ZipLimits, unpack_zip, unpacked_scan
from command_line import contents, run
from exports import mini_export
from serving import dicom_folder, phantom_ct, zipped

NAMES = ("..", "../x", "a/../../x", "/etc/x", "\\x", "..\\x", "C:\\x", "c:x", "a\\..\\x", "//host/x")
TAKEN = ("a/CON", "nul.", "-rf", "%2e%2e%2fx", "a" * 5000, "\u202excod.mcd", "a b;c|d", "x\r\nSet-Cookie: y", "~/x",
         "$HOME")


def _zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def _refusal(path: Path, limits: ZipLimits | None = None) -> str:
    """The code, after it was made sure that nothing is left outside the scratch folder, nor the folder itself."""
    before = contents(path.parent)
    with (pytest.raises((VolumeError, ResourceError)) as error,
          unpacked_scan(path, path.parent / "scratch", limits)):
        pass
    assert contents(path.parent) == before
    assert error.value.fault and error.value.remedy
    return error.value.code


def test_a_series_is_read_as_from_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    folder = dicom_folder(tmp_path / "series")
    (folder / "series/DICOMDIR").write_bytes(b"x") if (folder / "series").is_dir() else None
    path = zipped(folder, tmp_path / "doe.zip")
    with unpacked_scan(path) as scan:
        assert (scan.name, scan.stat().st_mode & 0o777, scan.parent.stat().st_mode & 0o777) == ("doe", 0o700, 0o700)
        volume = read_ct(scan)
    assert not scan.parent.exists()
    assert np.array_equal(volume.voxels_hu, read_ct(folder).voxels_hu)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_one_nifti_in_a_zip_is_that_file(name: str, tmp_path: Path) -> None:
    ct = phantom_ct(tmp_path / name)
    path = _zip(tmp_path / "ct.zip", (name, ct.read_bytes()), ("__MACOSX/._ct.nii", b"x"))
    with unpacked_scan(path) as scan:
        assert np.array_equal(read_ct(scan).voxels_hu, read_ct(ct).voxels_hu)


def test_what_is_no_zip_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "scan.zip").write_bytes(b"no zip")
    for path in (tmp_path, tmp_path / "scan.zip", tmp_path / "nowhere"):
        with unpacked_scan(path) as scan:
            assert scan == path


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.filename = name
    assert _refusal(_zip(tmp_path / "x.zip", (info, b"canary"))) == "ARCHIVE_PATH"


@pytest.mark.parametrize("name", TAKEN)
def test_odd_names_name_nothing(name: str, tmp_path: Path) -> None:
    with unpacked_scan(_zip(tmp_path / "x.zip", (name, b"1"), ("b", b"2"))) as scan:
        assert [p.name for p in sorted(scan.iterdir())] == ["000001", "000002"]


@pytest.mark.parametrize("mode", [0o120777, 0o020600, 0o010600, 0o140600])
def test_links_and_devices_are_refused(mode: int, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.create_system, info.external_attr = 3, mode << 16
    assert _refusal(_zip(tmp_path / "x.zip", (info, b"/etc/passwd"))) == "ARCHIVE_LINK"


def _encrypted(path: Path) -> Path:
    data = bytearray(_zip(path, ("x", b"content")).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def _cut(path: Path) -> Path:
    path.write_bytes(_zip(path, ("x", bytes(range(256)) * 100)).read_bytes()[:-30])
    return path


def _flipped(path: Path) -> Path:
    data = bytearray(_zip(path, ("x", bytes(range(256)) * 100), method=zipfile.ZIP_STORED).read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    return path


def _forged_size(path: Path) -> Path:
    """The list says ten bytes, the file inflates to a megabyte."""
    data = bytearray(_zip(path, ("x", bytes(1 << 20))).read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, 10)
    path.write_bytes(data)
    return path


def _many(path: Path) -> Path:
    return _zip(path, *((f"{i}", b"") for i in range(20_001)), method=zipfile.ZIP_STORED)


def _overlapping(path: Path) -> Path:
    """All entries of the list point to one file: small packed, large unpacked."""
    data = _zip(path, ("x", bytes(8 << 20))).read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, tail, count = data[start:end], bytearray(data[end:]), 1000
    struct.pack_into("<HHL", tail, 8, count, count, count * len(entry))
    path.write_bytes(data[:start] + entry * count + tail)
    return path


@pytest.mark.parametrize(("make", "code"), [
    (_encrypted, "ARCHIVE_ENCRYPTED"), (_cut, "ARCHIVE_DAMAGED"), (_flipped, "ARCHIVE_DAMAGED"),
    (_forged_size, "ARCHIVE_DAMAGED"), (_many, "ARCHIVE_SIZE"), (_overlapping, "ARCHIVE_SIZE"),
    (lambda path: _zip(path, ("x", bytes(200 << 20))), "ARCHIVE_SIZE"),
    (lambda path: _zip(path, ("x", b"1"), method=zipfile.ZIP_LZMA), "ARCHIVE_DAMAGED"),
    (lambda path: _zip(path), "NO_SCANS"),
    (lambda path: _zip(path, ("DICOMDIR", b"../../x"), (".hidden", b"")), "NO_SCANS"),
])
def test_hostile_zips(make: Callable[[Path], Path], code: str, tmp_path: Path) -> None:
    assert _refusal(make(tmp_path / "x.zip")) == code


def test_limits_are_counted_not_believed(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", ("a", bytes(3000)), ("b", bytes(3000)), method=zipfile.ZIP_STORED)
    assert _refusal(path, ZipLimits(member_bytes=2999)) == "ARCHIVE_SIZE"
    assert _refusal(path, ZipLimits(total_bytes=5999)) == "ARCHIVE_SIZE"
    assert _refusal(path, ZipLimits(members=1)) == "ARCHIVE_SIZE"
    assert _refusal(path, ZipLimits(directory_bytes=90)) == "ARCHIVE_SIZE"
    assert len(unpack_zip(path, tmp_path, ZipLimits(total_bytes=6000))) == 2


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _zip(tmp_path / "x.zip", ("a", bytes(3000)))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError) as error, unpacked_scan(path, tmp_path / "scratch"):
        pass
    assert error.value.code == "NO_SPACE" and not (tmp_path / "scratch").exists()


def test_the_command_line_takes_a_zip(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    folder = dicom_folder(tmp_path / "series")
    path = zipped(folder, tmp_path / "case7.zip")
    env = {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    how = ("--backend", "onnxruntime", "--threads", "1")
    run("segment", mini_export(), path, tmp_path / "out", *how, env=env).demand_ok()
    run("segment", mini_export(), folder, tmp_path / "same.nii.gz", *how, env=env).demand_ok()
    assert (tmp_path / "out/case7.nii.gz").read_bytes() == (tmp_path / "same.nii.gz").read_bytes()
    run("segment", mini_export(), path, tmp_path / "seg.dcm", "--format", "seg", *how, env=env).demand_ok()
    again = run("segment", mini_export(), path, tmp_path / "out", *how, env=env).demand_ok()
    assert "skipped 1" in again.out
    bad = _encrypted(tmp_path / "bad.zip")
    run("segment", mini_export(), bad, tmp_path / "bad.nii.gz", *how, env=env).demand_error("ARCHIVE_ENCRYPTED", 3)
    assert list((tmp_path / "tmp").glob("autosam3d*")) == [] and not (tmp_path / "bad.nii.gz").exists()
