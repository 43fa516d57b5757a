"""Cache entries on disk: as versions before wrote them, and none that a killed or failing writer left."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autosam3d.data.entries import Entry, StoredArray, open_entry, open_or_build
from autosam3d.errors import ResourceError

ARRAYS = {"voxels": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "labels": np.eye(3, dtype=np.uint8)}


def entry_in(folder: Path, names: tuple[str, ...] = ("voxels", "labels"), info: str = "info") -> Entry:
    return Entry(folder / f"{info}.json", {name: folder / f"{name}.npy" for name in names})


def read(entry: Entry, facts: Mapping[str, Any]) -> tuple[dict[str, StoredArray], Any]:
    return {name: entry.stored(name) for name in entry.array_paths}, facts["spacing_mm"]


def no_build() -> None:
    pytest.fail("the entry was built again")


@pytest.mark.parametrize("names", [("voxels", "labels"), ("voxels",)])
def test_the_layout_is_that_of_the_versions_before(names: tuple[str, ...], tmp_path: Path) -> None:
    """Several arrays have a checksum each by name, as cached cases; a single one has it bare, as a teacher's."""
    old = tmp_path / "old"
    old.mkdir()
    sums = {}
    for name in names:
        np.save(old / f"{name}.npy", ARRAYS[name])
        sums[name] = zlib.crc32((old / f"{name}.npy").read_bytes())
    inner = {"spacing_mm": [3.0, 2.0, 2.0], "crc": sums if len(names) > 1 else sums[names[0]]}
    outer = {"entry": inner, "crc": zlib.crc32(json.dumps(inner, sort_keys=True).encode())}
    (old / "info.json").write_text(json.dumps(outer))

    arrays, spacing_mm = open_or_build(entry_in(old, names), read, no_build, "one of before")
    assert spacing_mm == [3.0, 2.0, 2.0]
    assert all(np.array_equal(np.asarray(arrays[name]), ARRAYS[name]) for name in names)
    new = entry_in(tmp_path / "new", names)
    new.write(ARRAYS, {"spacing_mm": (3.0, 2.0, 2.0)})
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == {
        p.name: p.read_bytes() for p in old.iterdir()}


def test_an_entry_counts_only_once_its_json_is_there(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    entry.write(ARRAYS, {"spacing_mm": 1})
    entry.info_path.unlink()
    with pytest.raises(ResourceError) as caught:
        open_entry(entry, read)
    assert caught.value.code == "CACHE"
    built: list[int] = []

    def build() -> None:
        built.append(1)
        entry.write(ARRAYS, {"spacing_mm": 2})

    assert open_or_build(entry, read, build, "it")[1] == 2 and built == [1]
    assert open_or_build(entry, read, no_build, "it")[1] == open_entry(entry, read)[1] == 2


def test_what_the_reader_refuses_is_built_again_and_never_twice(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    entry.write(ARRAYS, {"spacing_mm": 1})
    built: list[int] = []

    def refuse(entry: Entry, facts: Mapping[str, Any]) -> None:
        raise ValueError("arrays of another shape")

    with pytest.raises(ResourceError, match="does not read back"):
        open_or_build(entry, refuse, lambda: built.append(1), "it")
    assert built == [1]


def highest_open_file() -> int:
    return max(int(path.name) for path in Path("/proc/self/fd").iterdir())


@contextmanager
def open_files_left(count: int) -> Iterator[None]:
    """Inside, this process may open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free; below it all are taken
    os.close(free)
    with contextlib.ExitStack() as stack:
        for number in range(free, highest := highest_open_file() + 1):
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))  # fill the gaps
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + count, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_entry_keeps_a_file_open(tmp_path: Path) -> None:
    entries = [entry_in(tmp_path / str(i)) for i in range(40)]
    for entry in entries:
        entry.write(ARRAYS, {"spacing_mm": 1})
    with open_files_left(4):
        opened = [open_or_build(entry, read, no_build, "it")[0] for entry in entries]
        opened += [open_entry(entry, read)[0] for entry in entries]
        for arrays in opened:
            assert np.array_equal(arrays["voxels"][1:, :, 2], ARRAYS["voxels"][1:, :, 2])
            assert np.array_equal(np.asarray(arrays["labels"]), ARRAYS["labels"])


def test_a_limit_of_open_files_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = entry_in(tmp_path)
    entry.write(ARRAYS, {"spacing_mm": 1})
    arrays, _ = open_entry(entry, read)
    for work in (lambda: open_or_build(entry, read, no_build, "it"), lambda: open_entry(entry, read),
                 lambda: arrays["voxels"][0], lambda: np.asarray(arrays["labels"])):
        with open_files_left(0), pytest.raises(ResourceError, match=r"limit of [0-9]+ open files") as caught:
            work()
        assert caught.value.code == "OPEN_FILES" and "ulimit -n" in caught.value.remedy
    assert not caplog.records and np.array_equal(arrays["voxels"][0], ARRAYS["voxels"][0])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]),
                                    lambda path: np.save(path, np.zeros((3, 3), np.float16))])
def test_an_array_that_went_while_it_was_used_is_named(damage: Any, tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    entry.write(ARRAYS, {"spacing_mm": 1})
    arrays, _ = open_entry(entry, read)
    damage(entry.array_paths["voxels"])
    with pytest.raises(ResourceError) as caught:
        arrays["voxels"][0]
    assert caught.value.code == "CACHE" and caught.value.where == str(entry.array_paths["voxels"])
