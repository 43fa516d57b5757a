"""Files are whole or absent: every way to fail leaves the old content and no temporary file."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.io import memory
from autosam3d.io.files import (
    FileToWrite,
    atomic_write,
    atomic_write_all,
    open_regular,
    readable,
    remove_stale_temporaries,
    sha256_of,
    temporary_beside,
    write_bytes_atomic,
    write_text_atomic,
)
from autosam3d.io.inflate import ByteStream
from autosam3d.io.memory import available_ram_bytes, demand_ram, resident_bytes, size_text


def test_written_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old\r\n")
    write_bytes_atomic(path, "neu ü\n".encode())
    assert path.read_bytes() == b"neu \xc3\xbc\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("stage", ["write", "verify"])
def test_any_failure_keeps_the_old_and_leaves_nothing(stage: str, failure: type, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path and temporary.name.startswith(".a.txt.tmp-")
        temporary.write_text("new")
        if stage == "write":
            raise failure

    def verify(temporary: Path) -> None:
        assert temporary.read_text() == "new" and path.read_text() == "old"
        raise failure

    with pytest.raises(failure):
        atomic_write(path, write, verify)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_of_several_files_none_appears_before_all_are_complete(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise ValueError("second")

    def write(temporary: Path) -> None:
        temporary.write_text("new")

    with pytest.raises(ValueError, match="second"):
        atomic_write_all([FileToWrite(tmp_path / "1", write), FileToWrite(tmp_path / "2", fail)])
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_text_atomic(path, "x")
    assert path.read_text() == "x" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("make", "code"), [("no_folder/a", "OUTPUT_PATH"), ("file/a", "OUTPUT_PATH"),
                                            ("folder", "OUTPUT_PATH"), ("x" * 300, "OUTPUT_PATH")])
def test_an_impossible_place_is_a_usage_error(make: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        write_text_atomic(tmp_path / make, "x")
    assert caught.value.code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is POSIX")
def test_full_disk_leaves_nothing_keeps_the_old_and_says_the_bytes(tmp_path: Path) -> None:
    """A file-size limit acts as a full disk does: the write stops in the middle."""
    program = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from pathlib import Path
        from autosam3d.errors import AutoSam3dError
        from autosam3d.io import write_ct, write_segmentation
        from autosam3d.io.files import write_bytes_atomic
        from autosam3d.labels import LabelMap
        from autosam3d.volume import Segmentation, Volume

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        folder = Path(sys.argv[1])
        noise = np.random.default_rng(0).integers(0, 250, (40, 40, 40)).astype(np.uint8)
        affine = np.diag([2.0, 2, 2, 1])
        for write in (
            lambda: write_segmentation(folder / "a.nii.gz", Segmentation(noise, affine), LabelMap(organs=("liver",))),
            lambda: write_segmentation(folder / "b.nii", Segmentation(noise, affine), LabelMap(organs=("liver",))),
            lambda: write_ct(folder / "c.nii.gz", Volume(noise.astype(np.float32), affine)),
            lambda: write_bytes_atomic(folder / "d.bin", noise.tobytes()),
        ):
            try:
                write()
            except AutoSam3dError as error:
                print(error.exit_code, error.code, error)
    """)
    for name in ("a.nii.gz", "a.json", "d.bin"):
        (tmp_path / name).write_text("old")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 4 and run.stderr == ""
    for line, name in zip(lines, ("a.nii.gz", "b.nii", "c.nii.gz", "d.bin"), strict=True):
        assert line.startswith(f"5 NO_SPACE {tmp_path / name}") and "bytes free" in line and "bytes needed" in line
    assert "64000 bytes needed" in lines[3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.nii.gz", "d.bin"]
    assert {p.read_text() for p in tmp_path.iterdir()} == {"old"}


def test_read_only_folder_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(temporary: Path) -> None:
        raise PermissionError(13, "Permission denied", str(temporary))

    with pytest.raises(ResourceError) as caught:
        atomic_write(tmp_path / "a", refuse)
    assert caught.value.code == "NOT_WRITABLE" and caught.value.where == str(tmp_path / "a")


def test_only_the_temporaries_of_dead_writers_are_swept(tmp_path: Path) -> None:
    names: list[str] = []

    def write(temporary: Path) -> None:
        temporary.write_text("x")
        names.append(temporary.name)

    atomic_write(tmp_path / "a", write)
    mine = tmp_path / names[0]
    dead = tmp_path / names[0].replace(f"-{os.getpid()}-", "-4194999-")  # beyond the largest process number
    for path in (mine, dead, tmp_path / ".a.tmp-4194999-otherhost1234"):
        path.write_text("x")
    assert remove_stale_temporaries(tmp_path) == [dead]
    assert mine.exists() and not dead.exists() and len(list(tmp_path.iterdir())) == 3


def test_a_process_of_our_number_before_us_is_dead(tmp_path: Path) -> None:
    """In a container that is started again, the next process has the same number on the same host."""
    mine = temporary_beside(tmp_path / "a")
    before = mine.with_name(mine.name[:-16] + "0123456789abcdef")
    for path in (mine, before):
        path.write_text("x")
    assert remove_stale_temporaries(tmp_path) == [before] and mine.exists()


def test_a_folder_that_was_being_replaced_comes_back_and_a_half_made_one_goes(tmp_path: Path) -> None:
    def of_the_dead(name: str) -> Path:
        path = temporary_beside(tmp_path / name)
        return path.with_name(path.name.replace(f"-{os.getpid()}-", "-4194999-"))

    for name, ending in (("export", ""), ("export", ".old"), ("whole", ".old")):
        folder = of_the_dead(name)
        folder = folder.with_name(folder.name + ending)
        folder.mkdir()
        (folder / "model.onnx").write_text(name + ending)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/model.onnx").write_text("new")
    assert len(remove_stale_temporaries(tmp_path)) == 2
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("*.onnx")} == {"export": "export.old", "whole": "new"}


def test_the_first_write_into_a_folder_sweeps_it(tmp_path: Path) -> None:
    stray = temporary_beside(tmp_path / "b")
    stray = stray.with_name(stray.name.replace(f"-{os.getpid()}-", "-4194999-"))
    stray.write_text("x")
    write_text_atomic(tmp_path / "a", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev"])
def test_devices_are_not_opened(path: str) -> None:
    with pytest.raises(VolumeError) as caught:
        open_regular(path)
    assert caught.value.code == "NOT_A_FILE"


def test_a_null_byte_in_a_path_is_unreadable() -> None:
    with pytest.raises(VolumeError) as caught:
        sha256_of("a\0b")
    assert caught.value.code == "UNREADABLE"


def test_stream_reads_what_gzip_reads(tmp_path: Path) -> None:
    content = os.urandom(3_000_000) + bytes(2_000_000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content, 1))
    with ByteStream(path) as stream:
        got = stream.read_upto(7) + stream.read_upto(2_500_000) + stream.read_upto(1 << 23)
        stream.finish(len(content))
    assert got == content


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes text only")
@pytest.mark.parametrize("raw", [b"\xff\xfe.txt", "\u00e4".encode() * 120, b"\xff" * 240])
def test_names_that_are_no_text_or_long_can_be_written(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(raw)
    write_text_atomic(path, "a")
    assert [os.fsencode(p.name) for p in tmp_path.iterdir()] == [raw] and path.read_text() == "a"


def test_memory_is_known_and_demanded() -> None:
    available = available_ram_bytes()
    assert available is not None and available > 1 << 20
    with pytest.raises(ResourceError, match=r"needs .* are free"):
        demand_ram(available * 2, "x")


def test_a_limit_is_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    held = resident_bytes()
    assert 20 << 20 < held < 64 << 30
    big = np.ones(256 << 20, np.uint8)
    assert abs(resident_bytes() - held - big.size) < 64 << 20
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1000)
    demand_ram(22, "x", 1022)
    with pytest.raises(ResourceError, match=r"needs 1022 bytes of memory, 1000 bytes of them .* 1021 bytes are "):
        demand_ram(22, "x", 1021)


def test_where_the_system_tells_less_the_peak_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(self)

    held = resident_bytes()
    monkeypatch.setattr(Path, "read_text", no_file)
    assert held * 0.9 < resident_bytes() < 64 << 30


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_a_disk_or_network_that_fails_is_no_bad_input(number: str, tmp_path: Path) -> None:
    """Row 92: exit code 5, so that who works by exit codes tries again."""
    fault = getattr(errno, number)
    with pytest.raises(ResourceError) as caught, readable(tmp_path):
        raise OSError(fault, os.strerror(fault))
    assert (caught.value.code, caught.value.exit_code) == ("IO", 5) and os.strerror(fault).lower() in str(caught.value)
