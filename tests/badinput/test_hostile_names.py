"""T13 without a service: 62 hostile names as members of archives, as names of scans, as UIDs and patient numbers."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import make_dicom
import pytest
from hostile_names import NAMES

from autosam3d.errors import AutoSam3dError, VolumeError
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.dicom.archive import unpacked_scan
from autosam3d.scans.jobs import check_inputs
from command_line import contents

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

from autosam3d.io.dicom.identity import identify
from autosam3d.io.dicom.source import read_source_series
from autosam3d.services.pacs.ledger import job_id


def test_members_of_archives_lead_nowhere(tmp_path: Path) -> None:
    """Each is refused, or unpacked under a number."""
    num_refused = 0
    for number, name in enumerate(NAMES):
        path, scratch = tmp_path / f"{number}.zip", tmp_path / "scratch"
        info = zipfile.ZipInfo("x")
        info.filename = name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, b"canary")
            archive.writestr("sound", b"canary")
        before = contents(tmp_path)
        try:
            with unpacked_scan(path, scratch) as scan:
                assert {p.name for p in scan.rglob("*")} <= {"000001", "000002"}
                new = contents(tmp_path).keys() - before.keys()
                assert new <= {"scratch", "scratch/scan", "scratch/scan/000001", "scratch/scan/000002"}
        except VolumeError as error:
            assert error.code in ("ARCHIVE_PATH", "ARCHIVE_DAMAGED"), (name, error)
            num_refused += 1
        assert contents(tmp_path) == before, name
    assert 10 < num_refused < len(NAMES) - 20


def test_scans_of_such_names_become_outputs_beside_each_other(tmp_path: Path) -> None:
    """Where a file can have the name at all; both as a file and as a folder of slices."""
    out = tmp_path / "out"
    made = 0
    for number, name in enumerate(NAMES):
        for ending in (".nii.gz", ""):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            path = folder / (name + ending)
            try:
                if "/" in name or "\0" in name or name in (".", ".."):
                    continue
                if ending:
                    path.write_bytes(b"x")
                else:
                    path.mkdir()
                    (path / "1.dcm").write_bytes(b"x")
            except OSError:  # too long
                continue
            try:
                jobs = check_inputs(path, out)
            except AutoSam3dError as error:
                assert error.exit_code in (2, 3)
                continue
            made += 1
            assert [job.output.path.parent for job in jobs] == [out]
            assert os.path.normpath(jobs[0].output.path) == str(jobs[0].output.path)
    assert made > 60 and not out.exists()


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_uids_and_patient_numbers_are_no_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A series is read whatever it calls itself; an object that would carry such a UID is refused, and no message has
    the name in it."""
    for number, name in enumerate(NAMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = name.replace("\\", "/")  # which parts several values
        uid = text.encode("ascii", "ignore").decode() or "x"
        tags = {"SpecificCharacterSet": "ISO_IR 192", "PatientID": text, "AccessionNumber": text, "StudyID": text,
                "StudyInstanceUID": uid, "SeriesInstanceUID": uid}
        make_dicom.series(make_dicom._set(**tags), num_slices=8)(folder)
        before = contents(folder)
        caplog.clear()
        volume = read_ct(folder)
        with pytest.raises(VolumeError) as caught:
            read_source_series(folder, volume.source, ReadOptions())
        assert caught.value.code in ("TAG_INVALID", "TAG_MISSING")
        with pytest.raises(VolumeError) as refused:
            identify(folder / "series" / "slice000.dcm", "a file")
        assert refused.value.code == "TAG_INVALID" and refused.value.where == "a file"
        told = caplog.text + str(refused.value) + str(caught.value).replace(str(tmp_path), "")
        assert len(name) < 4 or name not in told
        assert contents(folder) == before
        assert len(job_id(name, "", "")) == 16 and job_id(name, "", "").isalnum()
