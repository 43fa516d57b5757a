"""Full disks: refused before the work where that can be known, and told with path, bytes needed and bytes free."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.checkpoints.checkpoint import pack_model
from autosam3d.checkpoints.exported import open_export
from autosam3d.errors import ResourceError
from autosam3d.export.export import export_model
from autosam3d.export.web import write_web_folder
from autosam3d.io.folders import make_folder, staged_folder
from autosam3d.io.lock_file import hold_folder
from autosam3d.io.room import demand_room, free_bytes, room_named, write_error
from command_line import mini_model, run
from exports import loaded, mini_export
from mini_run import affine_of, blobs


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Inside, no file may grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 100 bytes left; what the tests share is made before."""
    mini_export()
    mini_model()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))


def test_room_is_asked_for_in_bytes(full: None, tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") == 100
    demand_room(tmp_path, 100)
    with pytest.raises(ResourceError) as caught:
        demand_room(tmp_path / "not" / "there", 5000)
    assert (caught.value.code, caught.value.exit_code) == ("NO_SPACE", 5)
    assert caught.value.fault == "at least 5000 bytes needed (4.9 KiB), 100 bytes free (100 bytes)"


def test_long_work_is_refused_before_it_begins(full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Any:
        pytest.fail("the work was begun")

    monkeypatch.setattr("autosam3d.export.export._write_graphs", never)
    monkeypatch.setattr("autosam3d.checkpoints.checkpoint.load_model", never)
    monkeypatch.setattr("shutil.copytree", never)
    model = mini_model()
    for name, work in (
        ("export", lambda to: export_model(loaded(), to)),
        ("web", lambda to: write_web_folder(open_export(mini_export()), to)),
        ("packed", lambda to: pack_model(model, to)),
    ):
        with pytest.raises(ResourceError) as caught:
            work(tmp_path / name)
        assert caught.value.code == "NO_SPACE" and caught.value.where == str(tmp_path / name), name
        assert "bytes needed" in caught.value.fault and "100 bytes free" in caught.value.fault
        assert not (tmp_path / name).exists()


def test_a_disk_that_fills_inside_a_staged_folder_is_named(tmp_path: Path) -> None:
    export = open_export(mini_export())
    with pytest.raises(ResourceError) as caught, at_most(1000), staged_folder(tmp_path / "a") as stage:
        (stage / "file").write_bytes(bytes(5000))
    assert caught.value.code == "NO_SPACE" and caught.value.where == str(tmp_path / "a")
    assert "bytes needed" in caught.value.fault and "bytes free" in caught.value.fault
    with pytest.raises(ResourceError) as caught, at_most(1000):
        write_web_folder(export, tmp_path / "web")  # many files are copied in one call
    assert caught.value.code == "NO_SPACE" and caught.value.where == str(tmp_path / "web")
    assert "file too large" in caught.value.fault and len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_other_faults_inside_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), room_named(tmp_path):
        (tmp_path / "none").read_bytes()


def test_a_lock_that_cannot_be_signed_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, at_most(0), hold_folder(tmp_path, "train.lock"):
        pytest.fail("it was held")
    assert caught.value.code == "NO_SPACE" and caught.value.where == str(tmp_path)
    with hold_folder(tmp_path, "train.lock"):
        assert str(os.getpid()) in (tmp_path / "train.lock").read_text()


def test_a_folder_that_cannot_be_made_for_lack_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full_disk)
    with pytest.raises(ResourceError, match="bytes free") as caught:
        make_folder(tmp_path / "a")
    assert caught.value.code == "NO_SPACE"


def test_the_number_of_a_fault_is_found_below_a_library_s_own() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as inner:
            raise OSError("With tag (3006, 0050) got exception") from inner
    except OSError as outer:
        error = write_error(outer, Path("/o.dcm"), written=36864, size_bytes=50_000)
    assert error.code == "NO_SPACE" and error.fault.startswith("50000 bytes needed, ")
    assert error.fault.endswith("(no space left on device)")


def test_evaluate_writes_its_report_and_its_scores_or_neither(tmp_path: Path) -> None:
    for folder in ("pred", "truth"):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(blobs(0)[1].T.astype(np.uint8), affine_of()), tmp_path / folder / "a.nii.gz")
    words = ("evaluate", tmp_path / "pred", tmp_path / "truth", "--out", tmp_path / "out")
    line = run(*words, limits={"FSIZE": 8192}).demand_error("NO_SPACE", 5)
    assert f"{tmp_path / 'out' / 'report.html'}: " in line and "bytes needed" in line and "bytes free" in line
    assert not list((tmp_path / "out").iterdir())
    run(*words).demand_ok()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "scores.csv", "scores.json"]


def test_segment_refuses_a_full_disk_before_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosam3d.checkpoints.checkpoint import load_model
    from autosam3d.io import write_ct
    from autosam3d.scans.batch import segment_batch
    from autosam3d.scans.jobs import check_inputs
    from autosam3d.volume import Volume

    write_ct(tmp_path / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    model = load_model(mini_model())
    monkeypatch.setattr("autosam3d.scans.batch.begin_segment", lambda *_: pytest.fail("the work was begun"))
    size = blobs(0)[0].size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size - 1))
    result = segment_batch(check_inputs(tmp_path / "ct.nii.gz", tmp_path / "o.nii"), model)
    assert result.failed[0].error.code == "NO_SPACE" and f"{size} bytes needed" in result.failed[0].error.fault
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(ResourceError) as caught:
        segment_batch(check_inputs(tmp_path / "ct.nii.gz", tmp_path / "o.nii.gz"), model)
    assert caught.value.code == "NO_SPACE" and not list(tmp_path.glob("o*"))
