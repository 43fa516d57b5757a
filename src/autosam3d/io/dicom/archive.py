"""Unpacks a zip of DICOM slices into a temporary folder: checked, within limits, under names of our own."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autosam3d.errors import ResourceError, VolumeError
from autosam3d.io.files import open_regular, readable
from autosam3d.io.folders import temporary_folder
from autosam3d.io.memory import size_text

_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_CHUNK = 1 << 20
# End of central directory, its form for large archives, and the pointer to that. *Source*: PKWARE APPNOTE 4.3.14-16.
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1 | 0x40
_UNIX, _DOS_DIRECTORY = 3, 0x10
_AGAIN = "pack the slices of one series again as a plain zip"


@dataclass(frozen=True, kw_only=True)
class ZipLimits:
    """Limits on an archive's content."""

    members: int = 20_000
    directory_bytes: int = 8 << 20
    """Of the list of members, which is held in memory."""
    member_bytes: int = 512 << 20
    """Of one file, unpacked."""
    total_bytes: int = 4 << 30
    """Of all files, unpacked."""
    ratio: float = 100.0
    """Largest unpacked size divided by packed size; a CT's slices reach 2 to 20."""
    ratio_from_bytes: int = 64 << 20
    """The ratio is not checked below this unpacked size."""


def is_zip(path: Path) -> bool:
    """Whether a file begins like a zip; False where it cannot be read, which its reader will report."""
    with contextlib.suppress(VolumeError, ResourceError), open_regular(path) as file:
        return file.read(4) in _MAGIC
    return False


@contextlib.contextmanager
def unpacked_scan(path: Path, scratch: Path | None = None, limits: ZipLimits | None = None) -> Iterator[Path]:
    """Yields `path` itself, or for a zip its unpacked content: a folder of slices, or the one NIfTI file in it.

    Args:
        path: of a scan in any form.
        scratch: a new folder for the files, removed at the end; None takes one in the system's folder for temporary
            files. Only its owner can read it.

    Raises:
        VolumeError: ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED, ARCHIVE_LINK, ARCHIVE_PATH, ARCHIVE_SIZE; NO_SCANS.
        ResourceError: NO_SPACE or IO.
    """
    if path.is_dir() or not is_zip(path):
        yield path
        return
    if scratch is None:
        with temporary_folder("zip") as base:
            yield _unpacked(path, base / _stem(path), limits)
        return
    try:
        scratch.mkdir(mode=0o700)
        yield _unpacked(path, scratch / "scan", limits)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpacked(path: Path, folder: Path, limits: ZipLimits | None) -> Path:
    folder.mkdir(mode=0o700)
    return _one_scan(unpack_zip(path, folder, limits or ZipLimits()), folder)


def unpack_zip(path: Path, folder: Path, limits: ZipLimits) -> list[Path]:
    """Write the files of an archive into `folder`, one after the other as ``000001`` and so on, in the order of their
    names.

    Names in the archive are only checked, never used as paths. The sizes that it claims may refuse it; the real sizes
    are counted while it is unpacked.

    Raises:
        As `unpacked_scan`.
    """
    with open_regular(path) as file, readable(path):
        size = os.fstat(file.fileno()).st_size
        _demand_small_directory(file, size, path, limits)
        try:
            with zipfile.ZipFile(file) as archive:
                members = _checked(archive.infolist(), path, size, limits)
                return _write_all(archive, members, path, folder, size, limits)
        # ValueError and NotImplementedError: names and versions that the module does not take.
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError,
                RuntimeError) as error:
            raise VolumeError("ARCHIVE_DAMAGED", path, f"the zip cannot be read ({type(error).__name__})",
                              _AGAIN) from None


def _demand_small_directory(file: BinaryIO, size: int, path: Path, limits: ZipLimits) -> None:
    """Check the size of the list of members before the zip module reads all of it into memory."""
    tail_size = min(size, _END.size + 0xFFFF + _LOCATOR.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\x05\x06")
    damaged = VolumeError("ARCHIVE_DAMAGED", path, "expected a whole zip, got one without a proper end",
                          "copy it again, or " + _AGAIN)
    if at < 0 or at + _END.size > len(tail):
        raise damaged
    *_, count, directory_bytes, _, comment_bytes = _END.unpack_from(tail, at)
    # Refuse an archive that different programs could read differently.
    if at + _END.size + comment_bytes != len(tail):
        raise damaged
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        _, _, offset, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if offset + _END64.size > size:
            raise damaged
        file.seek(offset)
        end64 = file.read(_END64.size)
        if len(end64) < _END64.size or not end64.startswith(b"PK\x06\x06"):
            raise damaged
        *_, count, directory_bytes, _ = _END64.unpack(end64)
    if count > limits.members:
        raise _too_large(path, f"{count} files", f"{limits.members}")
    if directory_bytes > limits.directory_bytes:
        raise _too_large(path, f"a list of files of {size_text(directory_bytes)}", size_text(limits.directory_bytes))
    file.seek(0)


def _checked(members: list[zipfile.ZipInfo], path: Path, size: int, limits: ZipLimits) -> list[zipfile.ZipInfo]:
    """The files among the members, sorted by name, without hidden files and DICOMDIR."""
    if len(members) > limits.members:
        raise _too_large(path, f"{len(members)} files", f"{limits.members}")
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise VolumeError("ARCHIVE_ENCRYPTED", path, "the zip is encrypted", "pack it again without a password")
        mode = member.external_attr >> 16
        if member.create_system == _UNIX and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise VolumeError("ARCHIVE_LINK", path, "expected plain files, got a link or a device", _AGAIN)
        _demand_inner(member.orig_filename, path)
        if member.compress_type not in _METHODS:
            raise VolumeError("ARCHIVE_DAMAGED", path, f"expected files stored or deflated, got method "
                              f"{member.compress_type}", _AGAIN)
        if member.file_size > limits.member_bytes:
            raise _too_large(path, f"a file of {size_text(member.file_size)}", size_text(limits.member_bytes))
    files = [m for m in members if not m.is_dir() and not m.external_attr & _DOS_DIRECTORY and _is_seen(m.filename)]
    _demand_total(sum(m.file_size for m in files), path, size, limits)
    return sorted(files, key=lambda member: member.filename)


def _demand_inner(name: str, path: Path) -> None:
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name):
        raise VolumeError("ARCHIVE_PATH", path, "expected names inside the zip, got one that leads out of it", _AGAIN)


def _is_seen(name: str) -> bool:
    parts = name.split("/")
    return parts[-1].upper() != "DICOMDIR" and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _demand_total(total: int, path: Path, size: int, limits: ZipLimits) -> None:
    if total > limits.total_bytes:
        raise _too_large(path, f"{size_text(total)} unpacked", size_text(limits.total_bytes))
    if total > limits.ratio_from_bytes and total > limits.ratio * size:
        raise _too_large(path, f"{size_text(total)} in {size_text(size)}", f"{limits.ratio:g} times its size")


def _too_large(path: Path, got: str, most: str) -> VolumeError:
    return VolumeError("ARCHIVE_SIZE", path, f"expected at most {most}, the zip holds {got}",
                       "pack one series and nothing else")


def _write_all(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], path: Path, folder: Path, size: int,
               limits: ZipLimits) -> list[Path]:
    paths, total = [], 0
    for number, member in enumerate(members, start=1):
        target = folder / f"{number:06d}"
        written = 0
        with archive.open(member) as packed, _room(folder), target.open("xb") as file:
            while chunk := packed.read(_CHUNK):
                written += len(chunk)
                total += len(chunk)
                if written > limits.member_bytes:
                    raise _too_large(path, "a larger file", size_text(limits.member_bytes))
                _demand_total(total, path, size, limits)
                file.write(chunk)
        paths.append(target)
    return paths


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ResourceError("NO_SPACE" if full else "IO", folder,
                            f"the zip cannot be unpacked there ({(error.strerror or 'write error').lower()})",
                            "free some space, or name another folder in TMPDIR") from None


def _one_scan(files: list[Path], folder: Path) -> Path:
    """The folder, or where it holds one NIfTI file, that file under a name with its ending."""
    if not files:
        raise VolumeError("NO_SCANS", folder, "expected DICOM slices in the zip, got no file", _AGAIN)
    if len(files) > 1:
        return folder
    with files[0].open("rb") as file:
        head = file.read(352)
    packed = head.startswith(b"\x1f\x8b")
    if packed or head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return files[0].rename(folder / f"{folder.name}{'.nii.gz' if packed else '.nii'}")
    return folder


def _stem(path: Path) -> str:
    """The archive's name without its ending, which names the case."""
    stem = path.name[:-4] if path.name.lower().endswith(".zip") else path.name
    return stem.strip(". ") or "scan"
