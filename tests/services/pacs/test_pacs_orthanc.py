"""Beside a real Orthanc: a study in, SEG and RTSTRUCT out, the right side right, each once whatever is killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
pytest.importorskip("requests", reason="the pacs extra is not installed")

import driver
import highdicom
import make_dicom as bad
import pydicom
from orthanc import Orthanc, running_orthanc

from autosam3d.services.pacs.ledger import Ledger

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture
def study(orthanc: Orthanc, tmp_path: Path) -> Path:
    """An asymmetric phantom, alone in the archive: a bright organ right and front, a smaller one left and back."""
    orthanc.clear()
    folder = phantom(tmp_path / "ct")
    orthanc.send(folder)
    return folder


def phantom(folder: Path) -> Path:
    """Rows run to the patient's left, columns to the back: a small column is the right side."""
    folder.mkdir()
    hu = np.full((bad.NUM_SLICES, bad.ROWS, bad.COLUMNS), -900, np.int16)
    hu[:, 2:-2, 2:-2] = 20
    hu[3:9, 4:9, 4:9] = 500  # right, front, large
    hu[5:8, 12:15, 17:20] = 250  # left, back, small
    for index in range(bad.NUM_SLICES):
        bad.save(bad.make_slice(index, hu[index], 3.0 * index), folder / f"{index:03d}.dcm")
    return folder


def run(orthanc: Orthanc, state: Path, moment: str = "") -> int:
    return subprocess.run([sys.executable, str(HERE / "driver.py"), orthanc.dicomweb, str(state), moment], timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def demand_right_sides(orthanc: Orthanc) -> None:
    (seg,), (rtstruct,) = orthanc.objects("SEG"), orthanc.objects("RTSTRUCT")
    seg = highdicom.seg.segread(io.BytesIO(seg))
    names = {segment.SegmentNumber: segment.SegmentLabel for segment in seg.SegmentSequence}
    assert sorted(names.values()) == ["Left kidney", "Right kidney"]
    volume = seg.get_volume(combine_segments=True)
    centres = {}
    for number, name in names.items():
        voxels = np.argwhere(volume.array == number)
        centres[name] = volume.map_indices_to_reference(voxels).mean(axis=0)
        assert len(voxels) == (150 if name == "Right kidney" else 27)
    # Patient coordinates of DICOM grow to the left and to the back.
    np.testing.assert_allclose(centres["Right kidney"], (-20.5 + 6 * 2.0, -30.25 + 6 * 2.5, 5.5 * 3), atol=1e-6)
    np.testing.assert_allclose(centres["Left kidney"], (-20.5 + 18 * 2.0, -30.25 + 13 * 2.5, 6 * 3), atol=1e-6)
    ds = pydicom.dcmread(io.BytesIO(rtstruct))
    labels = {roi.ROINumber: roi.ROIName for roi in ds.StructureSetROISequence}
    for item in ds.ROIContourSequence:
        points = np.concatenate([np.array(c.ContourData, float).reshape(-1, 3) for c in item.ContourSequence])
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        np.testing.assert_allclose(middle, centres[labels[item.ReferencedROINumber]], atol=1e-3)


def test_a_study_comes_back_with_its_results_once(orthanc: Orthanc, study: Path, tmp_path: Path) -> None:
    assert run(orthanc, tmp_path / "state") == 0
    demand_right_sides(orthanc)
    assert run(orthanc, tmp_path / "state") == 0  # nothing is new
    assert run(orthanc, tmp_path / "another state") == 0  # whose memory is lost: the same objects
    demand_right_sides(orthanc)
    assert not list((tmp_path / "state" / "jobs").iterdir())


@pytest.mark.parametrize("moment", driver.MOMENTS)
def test_killed_at_any_step_each_result_is_there_once(moment: str, orthanc: Orthanc, study: Path, tmp_path: Path
                                                      ) -> None:
    assert run(orthanc, tmp_path / "state", moment) == -signal.SIGKILL
    num_before = len(orthanc.objects("SEG")), len(orthanc.objects("RTSTRUCT"))
    assert num_before == {"fetched": (0, 0), "segmented": (0, 0), "seg stored": (1, 0), "both stored": (1, 1)}[moment]
    assert run(orthanc, tmp_path / "state") == 0
    demand_right_sides(orthanc)
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite", read_only=True)
    (job,) = ledger.jobs()
    assert job.state == "done" and job.num == bad.NUM_SLICES
    ledger.close()


def test_a_series_that_has_grown_is_done_again(orthanc: Orthanc, study: Path, tmp_path: Path) -> None:
    assert run(orthanc, tmp_path / "state") == 0
    hu = np.full((bad.ROWS, bad.COLUMNS), 20, np.int16)
    bad.save(bad.make_slice(12, hu, 36.0), study / "more.dcm")
    orthanc.send(study)
    assert run(orthanc, tmp_path / "state") == 0
    assert len(orthanc.objects("SEG")) == len(orthanc.objects("RTSTRUCT")) == 2


def test_a_scan_that_is_refused_is_told_and_not_tried_again(orthanc: Orthanc, study: Path, tmp_path: Path,
                                                            capfd: pytest.CaptureFixture[str]) -> None:
    path = study / "005.dcm"
    ds = pydicom.dcmread(path)
    orthanc.clear()
    path.unlink()
    assert ds.PatientName == "Doe^Jane"
    orthanc.send(study)
    assert run(orthanc, tmp_path / "state") == 6
    assert run(orthanc, tmp_path / "state") == 0
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite", read_only=True)
    (job,) = ledger.jobs()
    assert (job.state, job.code, job.attempts) == ("dead", "MISSING_SLICES", 1)
    ledger.close()
    told = capfd.readouterr().err
    assert "MISSING_SLICES" in told
    for secret in ("Doe", "4711", bad.SERIES_UID, "1.2.3 "):
        assert secret not in told
    assert orthanc.objects("SEG") == []
