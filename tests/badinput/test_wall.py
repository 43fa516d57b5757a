"""The wall: bad scans, label maps, names and folders against the real command line.

Whatever comes in: one line ``error[CODE] where: fault; remedy`` on stderr, the right exit code, no traceback, and
nothing in the output folder that was not there before. The tables of `make_nifti` and `make_dicom` say what is wrong
with each file; the number in a name is the row of the catalogue of bad inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import make_dicom
import make_nifti
import nibabel as nib
import numpy as np
import pytest

from command_line import contents, mini_model, run, unchanged

# A folder is looked through before anything is read: what the reader itself would say of it is not reached.
FOUND_BEFORE_READING = {
    "02_folder": "NO_SCANS", "45_empty_folder": "NO_SCANS", "45_no_dicom": "CRC",  # its scan.nii.gz is tried
}
# Row of the catalogue to what makes it a bomb: these must end within this much processor time and memory.
BOMBS = ("10_bomb", "11_claims_terabytes", "12_forged_size", "61_deflated_bomb", "62_nested", "63_forged")
SMALL = "smaller than the model's window"  # row 41, which a series of twelve slices is
BOMB_CPU_SECONDS, BOMB_BYTES = 15, 500 << 20


@pytest.fixture
def old_output(tmp_path: Path) -> Path:
    """An output folder with results of another day, under the very names that a new result would take."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("ct.nii.gz", "series.nii.gz", "gone.nii.gz", "ct.json", "notes.txt"):
        (out / name).write_bytes(b"of another day")
    return out


def folder_for(tmp_path: Path) -> Path:
    folder = tmp_path / "scan"
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------ files and series


@pytest.mark.parametrize("name", make_nifti.BROKEN)
def test_a_broken_nifti_is_refused(name: str, tmp_path: Path, old_output: Path) -> None:
    maker, code, exit_code = make_nifti.BROKEN[name]
    path = maker(folder_for(tmp_path))
    refuse_scan(name, path, code, exit_code, old_output)


@pytest.mark.parametrize("name", make_dicom.BROKEN)
def test_a_broken_series_is_refused_and_names_no_patient(name: str, tmp_path: Path, old_output: Path) -> None:
    maker, code, exit_code = make_dicom.BROKEN[name]
    path = maker(folder_for(tmp_path))
    assert "Doe" not in refuse_scan(name, path, code, exit_code, old_output)


def refuse_scan(name: str, path: Path, code: str, exit_code: int, out: Path) -> str:
    """Returns all of stderr."""
    is_bomb = name.startswith(BOMBS)
    idle = run("--version").peak_bytes if is_bomb else 0
    with unchanged(out):
        done = run("segment", mini_model(), path, out, "--overwrite",
                   limits={"CPU": BOMB_CPU_SECONDS} if is_bomb else None)
    line = done.demand_error(FOUND_BEFORE_READING.get(name, code), exit_code)
    assert str(path) in line
    assert done.warnings == []
    assert not is_bomb or done.peak_bytes < idle + BOMB_BYTES
    return done.err


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_odd_scans_go_through_with_warnings_that_name_them(kind: str, tmp_path: Path) -> None:
    """All of a table in one folder, so that each warning must say whose it is."""
    odd = make_nifti.ODD if kind == "nifti" else make_dicom.ODD
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    paths = {}
    for name, (maker, _) in odd.items():
        made = maker(folder_for(tmp_path / name))
        paths[name] = scans / (name + "".join(made.suffixes))
        shutil.move(made, paths[name])
    done = run("segment", mini_model(), scans, out).demand_ok()
    assert sorted(done.out.splitlines()) == sorted(f"wrote {out / name}.nii.gz" for name in odd)
    assert "Doe" not in done.err
    for name, (_, words) in odd.items():
        report = json.loads((out / f"{name}.report.json").read_text("utf-8"))
        assert report["status"] == "finished"
        said = [line for line in done.warnings if f"{paths[name]}: " in line]
        assert [line.rpartition(f"{paths[name]}: ")[2] for line in said] == report["warnings"], name
        odd_ones = [line for line in said if SMALL not in line]
        assert bool(odd_ones) == (words is not None) and (words or "") in "".join(odd_ones), name
        if kind == "nifti" and not name.startswith("07"):  # nibabel believes the file's name
            assert nib.load(out / f"{name}.nii.gz").shape == nib.load(paths[name]).shape[:3]
    assert len(done.warnings) == sum(line.count(str(scans)) for line in done.warnings)
    endings = (".nii.gz", ".json", ".labels.txt", ".ctbl", ".report.json")
    assert set(contents(out)) == {name + end for name in odd for end in endings} | {"batch.jsonl"}


@pytest.mark.parametrize("form", ["nifti", "seg", "rtstruct"])
def test_52_53_leaning_and_uneven_series_become_every_form_with_a_warning(form: str, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    for name, maker, words in (("tilted", make_dicom.TILTED, "tilted by 13.5 degrees"),
                               ("uneven", make_dicom.UNEVEN, "resampled to 3 mm")):
        path = maker(folder_for(tmp_path / name))
        output = tmp_path / name / ("out.nii.gz" if form == "nifti" else "out.dcm")
        done = run("segment", mini_model(), path, output, "--format", form).demand_ok()
        assert any(words in line for line in done.warnings) and output.is_file()


# ------------------------------------------------------------------------------------------------ label maps


@pytest.fixture
def true_labels(tmp_path: Path) -> Path:
    labels = np.zeros(make_nifti.SHAPE, np.uint8)
    labels[4:9, 5:9, 5:9], labels[12:16, 5:9, 5:9] = 1, 2
    path = tmp_path / "truth.nii.gz"
    path.write_bytes(make_nifti.pack(make_nifti.nifti_bytes(labels)))
    return path


@pytest.mark.parametrize("side", ["prediction", "truth"])
@pytest.mark.parametrize("name", [*make_nifti.BROKEN_LABELS, "04_cut_at_half", "06_flipped_bit", "19_sform_nan"])
def test_a_broken_label_map_is_not_scored(
    name: str, side: str, tmp_path: Path, true_labels: Path, old_output: Path
) -> None:
    maker, code, exit_code = (make_nifti.BROKEN_LABELS | make_nifti.BROKEN)[name]
    path = maker(folder_for(tmp_path))
    pair = (path, true_labels) if side == "prediction" else (true_labels, path)
    with unchanged(old_output):
        line = run("evaluate", *pair, "--out", old_output).demand_error(code, exit_code)
    assert str(path) in line


def test_predictions_that_do_not_fit_their_truth_are_not_scored(tmp_path: Path, true_labels: Path) -> None:
    other = np.zeros((24, 20, 17), np.uint8)
    other[3, 3, 3] = 1
    (tmp_path / "shape.nii.gz").write_bytes(make_nifti.pack(make_nifti.nifti_bytes(other)))
    (tmp_path / "moved.nii.gz").write_bytes(
        make_nifti.pack(make_nifti.nifti_bytes(other[:, :, :16], srow_x=(2, 0, 0, 1)))
    )
    (tmp_path / "empty").mkdir()
    for prediction, truth, code, exit_code in (
        ("shape.nii.gz", "truth.nii.gz", "SHAPE", 3), ("moved.nii.gz", "truth.nii.gz", "AFFINE_MISMATCH", 3),
        ("truth.nii.gz", "empty", "FILE_AND_FOLDER", 2), ("empty", "empty", "NO_PAIRS", 3),
        ("none", "none", "UNREADABLE", 3),
    ):
        done = run("evaluate", tmp_path / prediction, tmp_path / truth, "--out", tmp_path / "scores")
        done.demand_error(code, exit_code)
    assert not (tmp_path / "scores").exists()


# ------------------------------------------------------------------------------------------------ paths and names


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


def add_scan(folder: Path, *names: str, seed: int = 0) -> Path:
    """Good scans; returns the last."""
    for name in names:
        raw = make_nifti.nifti_bytes(make_nifti.ct_array(seed=seed))
        (folder / name).write_bytes(make_nifti.pack(raw) if name.endswith(".gz") else raw)
    return folder / names[-1]


Same = Callable[[Path], tuple[Path, Path]]


@pytest.mark.parametrize(("paths", "code"), [
    (lambda f: (f / "a.nii.gz", f / "a.nii.gz"), "SAME_PATH"),
    (lambda f: (f / "a.nii.gz", f), "SAME_PATH"),
    (lambda f: (f, f), "SAME_PATH"),
    (lambda f: (f, f / "../scans"), "SAME_PATH"),
    (lambda f: (f / "a.nii.gz", f / "link.nii.gz"), "SAME_PATH"),
    (lambda f: (f / "a.nii.gz", f / "a.mha"), "OUTPUT_NAME"),
    (lambda f: (f, f / "one.nii.gz"), "OUTPUT_NAME"),
    (lambda f: (f / "a.nii.gz", f / "a.nii.gz/below"), "OUTPUT_PATH"),
    (lambda f: (f / "a.nii.gz", f / ("y" * 248 + ".nii.gz")), "OUTPUT_NAME"),
    (lambda f: (f / "a.nii.gz", f / ("y" * 5000)), "PATH"),
], ids=["file", "its_folder", "folder", "detour", "link", "ending", "many_in_one", "below_a_file", "too_long", "5000"])
def test_43_an_output_that_cannot_be_is_refused(paths: Same, code: str, scans: Path, tmp_path: Path) -> None:
    add_scan(scans, "a.nii.gz", "b.nii")
    (scans / "link.nii.gz").symlink_to("a.nii.gz")
    if code == "SAME_PATH":
        (scans / "link.nii.gz").unlink()
        (scans / "link.nii.gz").hardlink_to(scans / "a.nii.gz")
    source, output = paths(scans)
    with unchanged(tmp_path):
        run("segment", mini_model(), source, output, "--overwrite").demand_error(code, 2)


def test_43_an_output_that_exists_is_kept_unless_asked(scans: Path, tmp_path: Path) -> None:
    scan, out = add_scan(scans, "a.nii.gz"), tmp_path / "out"
    out.mkdir()
    (out / "a.nii.gz").write_bytes(b"someone's work")
    with unchanged(out):
        line = run("segment", mini_model(), scan, out).demand_error("OUTPUT_EXISTS", 2)
    assert "--overwrite" in line
    run("segment", mini_model(), scan, out, "--overwrite").demand_ok()
    assert nib.load(out / "a.nii.gz").shape == make_nifti.SHAPE


@pytest.mark.parametrize("names", [
    ("a.nii", "a.nii.gz"), ("a.nii.gz", "A.nii.gz"), ("a.nii.gz", "a_0000.nii.gz"), ("\u00e9.nii", "e\u0301.nii"),
    ("STRASSE.nii", "straße.nii"),
], ids=["endings", "case", "channel", "composed", "folded"])
def test_44_two_scans_of_one_name_are_refused_before_any_work(
    names: tuple[str, str], scans: Path, tmp_path: Path
) -> None:
    add_scan(scans, *names)
    run("segment", mini_model(), scans, tmp_path / "out").demand_error("DUP_CASE", 2)
    assert not (tmp_path / "out").exists()


def test_44_odd_names_travel_and_do_nothing_else(scans: Path, tmp_path: Path) -> None:
    """One folder with them all: each becomes an output of the same name, shown in one harmless line."""
    names = [
        "-rf.nii.gz", "two  blanks.nii.gz", "é ü.nii.gz", "[bold]x.nii.gz", "$(touch canary).nii.gz", "a\nb.nii.gz",
        "\x1b[31mred.nii.gz", "\u202egnp.nii.gz", os.fsdecode(b"\xff\xfe.nii.gz"), "x" * 240 + ".nii.gz",
    ]
    add_scan(scans, *names)
    (scans / ".hidden.nii.gz").write_bytes(b"never looked at")
    (scans / "circle").symlink_to("circle")
    out = tmp_path / "out"
    run("segment", mini_model(), scans, out, cwd=tmp_path).demand_ok()
    assert {p.name for p in out.glob("*.nii.gz")} == set(names)
    assert not list(tmp_path.rglob("canary"))
    rows = [json.loads(row) for row in (out / "batch.jsonl").read_text("utf-8").splitlines()]
    assert {row["case"] for row in rows} == {name.removesuffix(".nii.gz") for name in names}


@pytest.mark.parametrize("bars", [False, True], ids=["file", "terminal"])
def test_44_names_in_messages_cannot_write_lines_of_their_own(bars: bool, scans: Path, tmp_path: Path) -> None:
    name = "a\nerror[FAKE] b: c; d\x1b[2J\r.nii.gz"
    (scans / name).write_bytes(b"<html>")
    done = run("segment", mini_model(), scans / name, tmp_path / "out", env={"FORCE_COLOR": "1"} if bars else None)
    assert done.code == 3 and "\x1b[2J" not in done.err
    lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in done.err.splitlines()]  # the bars' own colours
    assert [line[:16] for line in lines if line.lstrip("\r").startswith("error[")] == ["error[NOT_NIFTI]"]
    assert lines[-1].startswith("error[")


def test_44_a_leading_dash_is_an_option_unless_a_path_says_otherwise(scans: Path, tmp_path: Path) -> None:
    add_scan(scans, "-a.nii.gz")
    run("segment", mini_model(), "-a.nii.gz", tmp_path / "out", cwd=scans).demand_error("USAGE", 2)
    run("segment", "--", mini_model(), "-a.nii.gz", tmp_path / "out", cwd=scans).demand_ok()
    done = run("segment", mini_model(), "./-a.nii.gz", tmp_path / "out", cwd=scans).demand_ok()
    assert "skipped 1" in done.out


LONG = "x" * 5000


@pytest.mark.parametrize("arguments", [
    ("segment", "MODEL", LONG, "out"), ("segment", LONG, "SCAN", "out"), ("info", LONG + ".json"), ("info", LONG),
    ("pack", LONG, "out"), ("pack", "MODEL", LONG), ("evaluate", LONG, "SCAN"), ("evaluate", "SCAN", LONG),
    ("train", "phantom", "--data", LONG), ("train", LONG, "--data", "."), ("phantom", LONG), ("demo", LONG),
    ("prepare", "btcv", LONG, "out"),
], ids=lambda arguments: "_".join(a[:6] for a in arguments))
def test_44_a_name_longer_than_any_file_system_has_is_one_short_line(
    arguments: tuple[str, ...], scans: Path, tmp_path: Path
) -> None:
    scan = add_scan(scans, "a.nii.gz")
    filled = [{"MODEL": mini_model(), "SCAN": scan}.get(a, a) for a in arguments]
    with unchanged(tmp_path):
        done = run(*filled, cwd=tmp_path)
    line = done.demand_error(done.err[6:].partition("]")[0], done.code)
    assert done.code in (2, 3, 5) and len(line) < 700


# ------------------------------------------------------------------------------------------------ rows 41 and 42


def test_41_few_slices_only_by_force_and_the_shape_is_kept(scans: Path, tmp_path: Path) -> None:
    raw = make_nifti.nifti_bytes(make_nifti.ct_array((24, 20, 3)), srow_z=(0, 0, 8, 0))
    (scans / "thin.nii").write_bytes(raw)
    line = run("segment", mini_model(), scans / "thin.nii", tmp_path / "out").demand_error("FEW_SLICES", 3)
    assert "--force" in line
    done = run("segment", mini_model(), scans / "thin.nii", tmp_path / "out", "--force").demand_ok()
    for words in ("accepted by force", SMALL):
        assert any(words in warning for warning in done.warnings)
    assert nib.load(tmp_path / "out/thin.nii.gz").shape == (24, 20, 3)


@pytest.mark.parametrize("gib", ["1e-12", "1e-5", "5e-4"])
def test_42_too_little_memory_is_refused_with_both_numbers(gib: str, scans: Path, tmp_path: Path) -> None:
    scan = add_scan(scans, "a.nii.gz")
    line = run("segment", mini_model(), scan, tmp_path / "out", "--max-ram", gib).demand_error("MEMORY", 5)
    assert " needs " in line and ("KiB" in line or "bytes" in line)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ folders with some bad


def test_a_folder_with_bad_scans_gives_the_good_ones_and_names_the_bad(scans: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("a.nii.gz", "c.nii.gz", "e_0000.nii")):
        add_scan(scans, name, seed=number)
    for name, case in (("b.nii.gz", "06_flipped_bit"), ("d.nii.gz", "39_windowed")):
        shutil.move(make_nifti.BROKEN[case][0](tmp_path), scans / name)
    (scans / "gone.nii.gz").symlink_to("nowhere")
    out = tmp_path / "out"
    done = run("segment", mini_model(), scans, out)
    assert done.code == 6
    assert done.out.splitlines() == [f"wrote {out / name}.nii.gz" for name in ("a", "c", "e")]
    reported = [line for line in done.err.splitlines() if line.startswith("error[")]
    assert [line.partition(":")[0] for line in reported] == [
        f"error[CRC] {scans / 'b.nii.gz'}", f"error[NOT_HU] {scans / 'd.nii.gz'}",
        f"error[UNREADABLE] {scans / 'gone.nii.gz'}", f"error[FAILED_CASES] {out}",
    ]
    assert all(line.startswith(("error[", "WARNING: ")) for line in done.err.splitlines())
    rows = [json.loads(row) for row in (out / "batch.jsonl").read_text("utf-8").splitlines()]
    assert [row.get("code", row["status"]) for row in rows] == ["written", "CRC", "written", "NOT_HU", "written",
                                                                "UNREADABLE"]
    assert len(list(out.iterdir())) == 3 * 5 + 1

    images = {p: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    (scans / "gone.nii.gz").unlink()
    again = run("segment", mini_model(), scans, out)
    assert again.code == 6 and again.out == "skipped 3 that were finished before\n"
    assert images == {p: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}


def test_a_scan_that_went_bad_does_not_stop_the_second_run(scans: Path, tmp_path: Path) -> None:
    add_scan(scans, "a.nii.gz", "b.nii.gz")
    run("segment", mini_model(), scans, tmp_path / "out").demand_ok()
    (scans / "a.nii.gz").unlink()
    os.mkfifo(scans / "a.nii.gz")
    add_scan(scans, "c.nii.gz", seed=3)
    done = run("segment", mini_model(), scans, tmp_path / "out")
    assert done.code == 6 and "error[NOT_A_FILE]" in done.err
    assert "c.nii.gz" in done.out and "skipped 1" in done.out
