"""T17 on the command line: what a scan says of its patient turns up in no output, message, log or temporary file."""

from __future__ import annotations

import logging
import shutil
import traceback
from pathlib import Path

import canaries
import make_dicom
import pytest
from make_nifti import BROKEN as BROKEN_NIFTI

from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.errors import AutoSam3dError
from autosam3d.io import read_ct
from autosam3d.services.workers.scan import ScanJob, segment_scan
from command_line import mini_model, run

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

FORMS = ("nifti", "seg", "seg-labelmap", "rtstruct", "json", "csv")
# A failure of each kind, one code word each; none of them may need its makers' own texts.
FAILURES = [
    "46_cut_in_pixels", "46_cut_in_header", "47_two_missing", "48_place_taken_twice", "49_one_uid_two_places",
    "50_two_patients", "51_half_across", "52_shifted_sideways", "53_very_uneven",
    "55_no_pixel_spacing", "56_two_coordinates", "57_no_rescale", "58_mixed_size", "59_unknown_syntax",
    "60_broken_fragments", "61_deflated_bomb", "62_nested", "63_forged_length", "63_forged_rows", "64_enhanced",
    "65_mr", "66_colour", "69_bad_number", "35_constant",
]
BROKEN_FILES = {
    "cut": (lambda raw: raw[: len(raw) // 2], "TRUNCATED"),
    "flipped": (lambda raw: raw[:-2000] + bytes([raw[-2000] ^ 4]) + raw[-1999:], "CRC"),
    "letter": (lambda raw: f"<html>Dear {canaries.NIFTI['comment']}, ".encode() * 40, "NOT_NIFTI"),
    "trailing": (lambda raw: raw + canaries.NIFTI["comment"].encode(), "TRAILING"),
}


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    canaries.marked_slices(monkeypatch)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Folders that a command is told to put its files into, and where it would put others."""
    names = {name: tmp_path / name for name in ("scans", "out", "TMPDIR", "XDG_CACHE_HOME", "HOME", "here")}
    for path in names.values():
        path.mkdir()
    return names


def demand_silence(told: str, *folders: Path) -> None:
    assert canaries.found_in(told) == set()
    assert canaries.found_below(*folders) == {}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_twenty_failures_of_series_tell_nothing(places: dict[str, Path], tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    """In one command with all that can be said switched on, beside one sound series; then each with its traceback and
    whatever any library logs."""
    scans, out = places["scans"], places["out"]
    for name in ["00_good", *FAILURES]:
        maker, *_ = {**make_dicom.BROKEN, **make_dicom.ODD}[name]
        (tmp_path / name).mkdir()
        shutil.move(canaries.renamed(maker(tmp_path / name)), scans / name)
    env = {name: str(path) for name, path in places.items() if name.isupper()}
    done = run("--debug", "-v", "segment", mini_model(), scans, out, env=env, cwd=places["here"])
    assert done.code == 6
    codes = [line.partition("]")[0][6:] for line in done.err.splitlines() if line.startswith("error[")]
    assert sorted(codes) == sorted(["FAILED_CASES", *(make_dicom.BROKEN[name][1] for name in FAILURES)])
    assert (out / "00_good.nii.gz").is_file()
    demand_silence(done.out + done.err, *(path for name, path in places.items() if name != "scans"))
    caplog.clear()  # of what pydicom says while the test writes them
    told = []
    with caplog.at_level(logging.DEBUG):
        for name in FAILURES:
            with pytest.raises(AutoSam3dError) as caught:
                read_ct(scans / name)
            told += traceback.format_exception(caught.value)
    demand_silence("".join(told) + caplog.text)


def test_no_failure_of_a_nifti_tells_anything(places: dict[str, Path]) -> None:
    whole = canaries.nifti()
    (places["scans"] / "sound.nii.gz").write_bytes(whole)
    for name, (spoil, _) in BROKEN_FILES.items():
        (places["scans"] / f"{name}.nii.gz").write_bytes(spoil(whole))
    make_dicom.save(make_dicom.make_slice(0, make_dicom.hu_array()[0], 0.0), places["scans"] / canaries.DICOM["slice"])
    env = {name: str(path) for name, path in places.items() if name.isupper()}
    done = run("--debug", "-v", "segment", mini_model(), places["scans"], places["out"], "--preview", env=env,
               cwd=places["here"])
    assert done.code == 6 and (places["out"] / "sound.nii.gz").is_file()
    for name, (_, code) in BROKEN_FILES.items():
        assert f"error[{code}] {places['scans'] / name}.nii.gz" in done.err
    demand_silence(done.out + done.err, *(path for name, path in places.items() if name != "scans"))


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_every_form_of_a_result_and_the_log_at_its_loudest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a zip, with a zip's comment and members; DICOM objects carry the tags of the list alone."""
    path, folder = tmp_path / "scan.zip", tmp_path / "result"
    path.write_bytes(canaries.zipped(canaries.renamed(make_dicom.series()(tmp_path))))
    folder.mkdir()
    model = load_model(mini_model())
    with caplog.at_level(logging.DEBUG):
        result = segment_scan(ScanJob(source=path, folder=folder, forms=FORMS), model)
    assert set(result.files) == set(FORMS) and not result.refused
    for form in ("seg", "seg-labelmap", "rtstruct"):
        canaries.demand_carried_alone(result.files[form].read_bytes())
        result.files[form].unlink()
    demand_silence(caplog.text + repr(result), folder)


@pytest.mark.parametrize("name", ["03_vanished", "02_folder"])
def test_a_path_that_was_given_is_told_as_it_was_given(name: str, tmp_path: Path) -> None:
    """The one exception: who names a file on the command line is told of it under that name."""
    folder = tmp_path / canaries.DICOM["folder"]
    folder.mkdir()
    path = BROKEN_NIFTI[name][0](folder)
    with pytest.raises(AutoSam3dError) as caught:
        read_ct(path)
    assert canaries.found_in(str(caught.value)) == {"folder"}
