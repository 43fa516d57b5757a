"""Worker processes: their results are those of `segment`, and nothing that ends one harms its owner."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autosam3d.checkpoints.exported import load_exported
from autosam3d.errors import AutoSam3dError, CheckpointError, ResourceError, UsageError, VolumeError
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation, write_ct
from autosam3d.services.workers.messages import WorkerSettings
from autosam3d.services.workers.scan import FORMS, ScanJob, segment_scan
from autosam3d.services.workers.worker import JobCancelled, Worker, WorkerDied, WorkerTimeout
from exports import mini_export
from serving import dicom_folder, dicom_zip, phantom_ct


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    pytest.importorskip("onnxruntime")
    worker = Worker(WorkerSettings(model=mini_export(), backend="onnxruntime", threads=1))
    yield worker
    worker.close()


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    return phantom_ct(tmp_path / "doe_jane.nii.gz")


def _job(source: Path, folder: Path, *forms: str, **more: object) -> ScanJob:
    folder.mkdir(exist_ok=True)
    return ScanJob(source=source, folder=folder, forms=forms or ("nifti", "json"), **more)  # type: ignore[arg-type]


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_nifti_has_the_labels_of_segment(worker: Worker, ct: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = worker.segment(_job(ct, tmp_path / "out", "nifti", "json", "csv", "seg"),
                            lambda *step: told.append(step))
    ours = segment(read_ct(ct), load_exported(mini_export(), "onnxruntime", 1))
    assert np.array_equal(read_segmentation(result.files["nifti"]).labels, ours.labels)
    assert [stage for i, (stage, *_) in enumerate(told) if i == 0 or told[i - 1][0] != stage] == [
        "reading", "segmenting", "writing"]
    windows = [(done, total) for stage, done, total in told if stage == "segmenting"]
    assert windows[-1][0] == windows[-1][1] == len(windows) - 1 > 1
    assert (result.refused["seg"].code, result.from_dicom) == ("FORMAT", False)
    volumes = json.loads(result.files["json"].read_text())
    for organ in volumes["organs"]:
        assert organ["voxels"] == int((ours.labels == organ["label"]).sum())
    lines = result.files["csv"].read_text().splitlines()
    assert lines[0] == "label,organ,voxels,volume_ml"
    assert lines[1:] == [f"{o.label},{o.organ},{o.voxels},{o.volume_ml:.3f}" for o in result.organs]
    assert "doe_jane" not in json.dumps(volumes) + "".join(map(str, result.refused.values()))


@pytest.mark.parametrize("make", [dicom_folder, dicom_zip])
def test_one_segmentation_makes_all_forms_of_a_series(worker: Worker, make: Callable[[Path], Path],
                                                      tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    import highdicom
    import pydicom

    source = make(tmp_path / "series")
    result = worker.segment(_job(source, tmp_path / "out", *FORMS))
    assert result.refused == {} and set(result.files) == set(FORMS) and result.from_dicom
    labels = read_segmentation(result.files["nifti"]).labels
    assert labels.any()
    seg = highdicom.seg.segread(result.files["seg"])
    assert int((seg.get_volume(combine_segments=True).array > 0).sum()) == int((labels > 0).sum())
    assert pydicom.dcmread(result.files["rtstruct"]).Modality == "RTSTRUCT"
    assert not [name for name in _names(tmp_path / "out") if name.startswith(".")]


def test_a_worker_killed_in_a_scan_is_replaced(worker: Worker, ct: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once(stage: str, done: int, total: int) -> None:
        if stage == "segmenting" and not killed and worker.pid is not None:
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    result = worker.segment(_job(ct, tmp_path / "out"), kill_once)
    assert killed and worker.pid not in (None, *killed)
    assert read_segmentation(result.files["nifti"]).labels.any()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_that_keeps_dying_is_told_and_leaves_nothing(worker: Worker, dicom: Path, number: signal.Signals,
                                                              tmp_path: Path) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if stage == "segmenting":
            os.kill(worker.pid or 0, number)

    with pytest.raises(WorkerDied, match=number.name) as error:
        worker.segment(_job(dicom, tmp_path / "out"), kill, retries=0)
    assert (error.value.code, error.value.exit_code, error.value.where) == ("WORKER_DIED", 5, "scan")
    assert _names(tmp_path / "out") == []
    assert worker.segment(_job(dicom, tmp_path / "out")).files["nifti"].is_file()


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    pytest.importorskip("pydicom")
    return dicom_zip(tmp_path / "series")


def test_one_killed_while_it_is_idle_costs_no_scan(worker: Worker, ct: Path, tmp_path: Path) -> None:
    worker.start()
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert worker.segment(_job(ct, tmp_path / "out"), retries=1).files["nifti"].is_file()
    assert worker.pid != pid


def test_cancel_ends_the_scan_at_once(worker: Worker, ct: Path, tmp_path: Path) -> None:
    assert not worker.cancel()
    begun = threading.Event()
    ended: list[BaseException] = []

    def work() -> None:
        try:
            worker.segment(_job(ct, tmp_path / "out"), lambda stage, *_: begun.set() or time.sleep(0.2))
        except JobCancelled as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    assert worker.cancel()
    thread.join(10)
    assert not thread.is_alive() and len(ended) == 1 and _names(tmp_path / "out") == []
    assert worker.segment(_job(ct, tmp_path / "out")).files["nifti"].is_file()


def test_an_end_between_two_answers_is_no_fault(ct: Path, tmp_path: Path) -> None:
    worker = Worker(WorkerSettings(model=mini_export(), backend="onnxruntime"))

    def close(*told: object) -> None:
        closer = threading.Thread(target=worker.close)
        closer.start()
        closer.join()

    with pytest.raises(JobCancelled):
        worker.segment(_job(ct, tmp_path / "out"), close)
    assert worker.pid is None and not (tmp_path / "out" / "labels.nii.gz").exists()


def test_where_no_thread_or_process_can_be_begun(ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan fails by name, no process is forgotten, and the next scan is done."""
    pytest.importorskip("onnxruntime")
    worker = Worker(WorkerSettings(model=mini_export(), backend="onnxruntime", threads=1))

    def refuse(*args: object, **how: object) -> None:
        raise RuntimeError("can't start new thread") if not how else BlockingIOError(11, "no more processes")

    with contextlib.closing(worker):
        for kind, name, at_work in ((threading.Timer, "start", False), (subprocess, "Popen", False),
                                    (threading.Timer, "start", True)):
            if at_work:
                worker.start()
            with monkeypatch.context() as refusing, pytest.raises(ResourceError) as caught:
                refusing.setattr(kind, name, refuse)
                worker.segment(_job(ct, tmp_path / "a", "nifti"))
            assert caught.value.code == "NO_PROCESS" and worker.pid is None and worker._process is None
        assert worker.segment(_job(ct, tmp_path / "b", "nifti")).files


def test_a_scan_that_takes_too_long_is_given_up(ct: Path, tmp_path: Path) -> None:
    worker = Worker(WorkerSettings(model=mini_export(), backend="onnxruntime", job_seconds=0.01))
    try:
        worker.start()
        with pytest.raises(WorkerTimeout, match="more time"):
            worker.segment(_job(ct, tmp_path / "out"))
    finally:
        worker.close()
    assert worker.pid is None
    with pytest.raises(JobCancelled):
        worker.segment(_job(ct, tmp_path / "out"))


def test_memory_is_limited(tmp_path: Path) -> None:
    """What can be foreseen is refused by the plan."""
    big = tmp_path / "big.nii"
    write_ct(big, read_ct(phantom_ct(tmp_path / "ct.nii.gz", (220, 220, 220), spacing_mm=1.0)))
    worker = Worker(WorkerSettings(model=mini_export(), backend="onnxruntime", max_ram_bytes=230 << 20))
    try:
        with pytest.raises(ResourceError, match="are allowed") as error:
            worker.segment(_job(big, tmp_path / "out"))
        assert error.value.code == "MEMORY" and "big.nii" not in str(error.value)
        assert worker.segment(_job(phantom_ct(tmp_path / "small.nii.gz"), tmp_path / "out")).files
    finally:
        worker.close()


def test_the_limit_holds_where_nothing_was_foreseen() -> None:
    code = ("import numpy as np\nfrom autosam3d.services.workers.child import _limit_address_space, _memory_named\n"
            "from autosam3d.services.workers.messages import WorkerSettings\n_limit_address_space(300 << 20)\n"
            "with _memory_named(WorkerSettings(max_ram_bytes=300 << 20)): np.ones(4 << 30, np.uint8)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ResourceError: scan: memory has run out, 300.0 MiB are allowed" in done.stderr


def test_bad_scans_are_refused_without_names(worker: Worker, ct: Path, tmp_path: Path) -> None:
    cut = tmp_path / "doe_cut.nii.gz"
    cut.write_bytes(ct.read_bytes()[:-100])
    letter = tmp_path / "doe_letter.nii"
    letter.write_text("Doe^Jane is ill" * 100)
    pid = (worker.start(), worker.pid)[1]
    for path, code in ((cut, "TRUNCATED"), (letter, "NOT_NIFTI"), (tmp_path / "doe_nowhere", "UNREADABLE")):
        with pytest.raises(VolumeError) as error:
            worker.segment(_job(path, tmp_path / "out"))
        assert error.value.code == code and error.value.where == "scan"
        assert "doe" not in str(error.value).lower() and str(tmp_path) not in str(error.value)
    with pytest.raises(UsageError, match="NIfTI file"):
        worker.segment(_job(ct, tmp_path / "out", "seg"))
    assert _names(tmp_path / "out") == [] and worker.pid == pid


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    worker = Worker(WorkerSettings(model=tmp_path / "nothing"))
    with pytest.raises(CheckpointError) as error:
        worker.start()
    assert error.value.where == "model" and worker.pid is None


def test_the_process_ends_with_its_owner(tmp_path: Path) -> None:
    code = ("import os, signal, sys\nfrom pathlib import Path\n"
            "from autosam3d.services.workers.messages import WorkerSettings\n"
            "from autosam3d.services.workers.worker import Worker\n"
            f"worker = Worker(WorkerSettings(model=Path({str(mini_export())!r}), backend='onnxruntime'))\n"
            "worker.start()\nprint(worker.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{pid}/cmdline").exists() and Path(
            f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.05)
    assert time.monotonic() < end, "the worker outlived its owner"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_form_that_a_scan_cannot_have_is_refused_beside_the_others(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from make_dicom import _set

    model = load_exported(mini_export(), "onnxruntime", 1)
    folder = dicom_folder(tmp_path / "series", _set(3, SOPInstanceUID="not a uid"))
    result = segment_scan(_job(folder, tmp_path / "out", "nifti", "seg", "rtstruct"), model)
    assert set(result.files) == {"nifti"} and set(result.refused) == {"seg", "rtstruct"}
    assert isinstance(result.refused["seg"], AutoSam3dError)
    assert nib.load(result.files["nifti"]).shape == (24, 20, 12)  # type: ignore[attr-defined]
