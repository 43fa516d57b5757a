"""Cache entries on disk: as versions before wrote them, and none that a killed or failing writer left."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autosam3d.data.entries import Entry, open_entry, open_or_build
from autosam3d.errors import ResourceError

ARRAYS = {"voxels": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "labels": np.eye(3, dtype=np.uint8)}


def entry_in(folder: Path, names: tuple[str, ...] = ("voxels", "labels"), info: str = "info") -> Entry:
    return Entry(folder / f"{info}.json", {name: folder / f"{name}.npy" for name in names})


def read(entry: Entry, facts: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    return {name: entry.map(name) for name in entry.array_paths}, facts["spacing_mm"]


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
    assert spacing_mm == [3.0, 2.0, 2.0] and all(np.array_equal(arrays[name], ARRAYS[name]) for name in names)
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
