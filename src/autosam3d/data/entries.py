"""Cache entries: arrays on disk, and a JSON beside them that is written last and holds their checksums.

Whatever is killed in between, an entry is whole or does not count; one that is cut or altered is built again. The
names are the caller's: made of everything that could change the arrays, so that an entry is never out of date.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autosam3d.errors import ResourceError
from autosam3d.io.files import atomic_write, remove_stale_temporaries, write_text_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.open_files import at_limit, limit_reached

log = logging.getLogger(__name__)

T = TypeVar("T")
# What reading a damaged entry can raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError)


@dataclass(frozen=True)
class StoredArray:
    """An array in a ``.npy`` file that is open only while a part of it is read: a map would keep a file open as long as
    it lives, and a training has two or three for each of its cases."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of that part, read from the file.

        Raises:
            ResourceError: CACHE, the file is not what it was; OPEN_FILES.
        """
        try:
            array = np.load(self.path, mmap_mode="r")
            if (array.shape, array.dtype) != (self.shape, self.dtype):
                raise ValueError(f"{self.path}: another array")
            return np.array(array[index])
        except _DAMAGE as error:
            if at_limit(error):
                raise limit_reached(self.path) from None
            raise ResourceError("CACHE", self.path, "expected the cache entry that was checked at the start, got none "
                                "or another one", "leave the --cache folder alone while a training uses it, and give "
                                "the same command again") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Entry:
    """Where an entry lies; its files need not exist."""

    info_path: Path
    """``{"entry": {FACTS, "crc": ...}, "crc": of that}``; the inner crc is that of the array, or where there are
    several a dictionary of theirs."""
    array_paths: Mapping[str, Path]
    """Name of an array to its ``.npy`` file."""

    def write(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write the arrays, then what makes them count.

        Args:
            arrays: one for each of `array_paths`.
            facts: kept with them, as JSON has it.

        Raises:
            UsageError: OUTPUT_PATH. ResourceError: NOT_WRITABLE, NO_SPACE or IO.
        """
        folder = self.info_path.parent
        make_folder(folder, remedy="name another folder with --cache")
        remove_stale_temporaries(folder)
        for name, path in self.array_paths.items():
            atomic_write(path, lambda staged, name=name: save_array(staged, arrays[name]),
                         size_bytes=arrays[name].nbytes)
        entry = {**facts, "crc": self._checksums()}
        write_text_atomic(self.info_path, json.dumps({"entry": entry, "crc": _crc_of(entry)}))

    def stored(self, name: str) -> StoredArray:
        """The array `name`, of which only the header is read."""
        path = self.array_paths[name]
        array = np.load(path, mmap_mode="r")
        return StoredArray(path, array.shape, array.dtype)

    def load(self, name: str) -> np.ndarray:
        """The array `name`, read into memory."""
        return np.load(self.array_paths[name])

    def _facts(self) -> dict[str, Any]:
        info = json.loads(self.info_path.read_text("utf-8"))
        if info["crc"] != _crc_of(info["entry"]):
            raise ValueError(f"{self.info_path}: not what its checksum says")
        return info["entry"]

    def _checksums(self) -> int | dict[str, int]:
        sums = {name: _crc_of_file(path) for name, path in self.array_paths.items()}
        return sums if len(sums) > 1 else next(iter(sums.values()))


Read = Callable[[Entry, Mapping[str, Any]], T]
"""From an entry and its facts to what the caller makes of it; a ValueError says that the arrays are none of its own."""


def open_or_build(entry: Entry, read: Read[T], build: Callable[[], None], what: str) -> T:
    """The entry as `read` gives it, after every byte was checked; built first where it is absent, cut or altered.

    Args:
        build: is to `write` the entry.
        what: the entry is called in a message.

    Raises:
        ResourceError: CACHE, what was just written does not read back; OPEN_FILES; and what `build` raises.
    """
    found = _open_checked(entry, read, what)
    if found is None:
        build()
        found = _open_checked(entry, read, what)
    if found is None:
        raise ResourceError("CACHE", entry.info_path, "a cache entry that was just written does not read back",
                            "check the disk, or name another folder with --cache")
    return found


def open_entry(entry: Entry, read: Read[T]) -> T:
    """The entry, which another process of this run has just checked: its arrays are not read again.

    Raises:
        ResourceError: CACHE, it is not there or not what an entry is; OPEN_FILES.
    """
    try:
        return read(entry, entry._facts())
    except _DAMAGE as error:
        if at_limit(error):
            raise limit_reached(entry.info_path) from None
        raise ResourceError("CACHE", entry.info_path, "expected the cache entry that another process of this run has "
                            "checked, got none or a damaged one", "let all processes of a machine see the same --cache "
                            "folder, and leave it alone while they train") from None


def save_array(path: Path, array: np.ndarray) -> None:
    """As ``.npy``, under exactly this name."""
    with path.open("wb") as file:  # given a path, numpy would put .npy behind the temporary name
        np.save(file, array)


def _open_checked(entry: Entry, read: Read[T], what: str) -> T | None:
    if not entry.info_path.exists():
        return None
    try:
        facts = entry._facts()
        if facts["crc"] == entry._checksums():
            return read(entry, facts)
    except _DAMAGE as error:
        if at_limit(error):
            raise limit_reached(entry.info_path) from None
    log.warning("%s: damaged in the cache, made again", what)
    return None


def _crc_of(entry: Any) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def _crc_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
