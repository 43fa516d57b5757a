"""Folders of scans: nothing is overwritten unasked, nothing is done twice, one bad scan does not stop the rest."""

from __future__ import annotations

import json
import os
import re
import sys
import tracemalloc
import unicodedata
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.geometry.patches import Tiling
from autosam3d.geometry.preprocess import HuWindow, Preprocess
from autosam3d.inference.pipeline import SegmentOptions
from autosam3d.io import ReadOptions, output_formats, read_ct, read_segmentation, write_ct, write_segmentation
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.scans import batch
from autosam3d.scans.batch import segment_batch
from autosam3d.scans.jobs import BatchJob, check_inputs
from autosam3d.scans.outputs import Output
from autosam3d.volume import Segmentation, Volume
from killed import demand_killed, die

LABELS = LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))


class Oracle:
    """Background below 20 HU, left kidney from 20 to 60, right kidney above 60."""

    patch_size = (8, 16, 16)
    num_outputs = 3

    def predict(self, patches: np.ndarray) -> np.ndarray:
        p = patches[:, 0]
        return np.stack([p < 0.2, p >= 0.6, (p >= 0.2) & (p < 0.6)], axis=1).astype(np.float32)

    def activation_bytes(self, batch_size: int) -> int:
        return 0


@dataclass
class Model:
    recipe: Recipe
    sha256: str = "a" * 64
    runtime: str = "torch 0"
    asked: int = field(default=0)

    @property
    def predictor(self) -> Oracle:
        self.asked += 1
        return Oracle()


class Watch:
    def __init__(self) -> None:
        self.scans: list[tuple[int, int, str]] = []
        self.windows = 0

    def on_scan(self, done: int, total: int, name: str) -> None:
        self.scans.append((done, total, name))

    def on_window(self, done: int, total: int) -> None:
        self.windows += 1


@pytest.fixture
def model() -> Model:
    phantom = load_recipe("phantom")
    spec = Preprocess(spacing_mm=None, hu_window=HuWindow(low_hu=-100, high_hu=100), subtract_hu=0, divide_hu=100)
    return Model(replace(phantom, labels=LABELS, preprocess=spec, model=replace(phantom.model, num_outputs=3),
                         inference=Tiling(overlap=0.0)))


def write_scan(path: Path, seed: int = 0) -> None:
    """A trunk in air with the right kidney (80 HU) at positive x and the left one (40 HU) at negative x."""
    rng = np.random.default_rng(seed)
    hu = np.full((16, 40, 44), -1000, np.float32)
    hu[:, 8:32, 6:38] = rng.integers(-20, 10, (16, 24, 32))
    hu[5:11, 14:22, 26:34] = 80
    hu[4:9, 14:22, 10:16] = 40
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    affine[:3, 3] = (-107.5, -90, -40)
    write_ct(path, Volume(voxels_hu=hu, affine=affine))


def write_scans(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        write_scan(folder / name, seed)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------ which scans


def test_a_folder_may_mix_formats_of_one_volume(tmp_path, caplog) -> None:
    for name in ("a.nrrd", "b.mha", "c.mhd", "c.raw", "d_0000.nii.gz", "e.seg.nrrd", "notes.txt"):
        (tmp_path / "scans" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "scans" / name).touch()
    assert [(j.name, j.source.name) for j in check_inputs(tmp_path / "scans", tmp_path / "out")] == [
        ("a", "a.nrrd"), ("b", "b.mha"), ("c", "c.mhd"), ("d", "d_0000.nii.gz")]
    assert "e.seg.nrrd" not in caplog.text and ".seg.nrrd files are label maps; they are passed over" in caplog.text


def test_a_file_a_folder_of_files_and_folders_of_dicom(tmp_path) -> None:
    scans = write_scans(tmp_path / "scans", "b_0000.nii.gz", "a.nii")
    (scans / "notes.txt").write_text("x")
    out = tmp_path / "out"
    assert check_inputs(scans / "a.nii", out / "seg.nii.gz") == [
        BatchJob("a", scans / "a.nii", Output(out / "seg.nii.gz"))]
    assert check_inputs(scans / "a.nii", out) == [
        BatchJob("a", scans / "a.nii", Output(out / "a.nii.gz"))]
    assert [(j.name, j.output.path.name) for j in check_inputs(scans, out)] == [("a", "a.nii.gz"), ("b", "b.nii.gz")]
    for series in ("s1", "s2/deep"):
        (tmp_path / "dicom" / series).mkdir(parents=True)
        (tmp_path / "dicom" / series / "1.dcm").write_bytes(b"x")
    (tmp_path / "dicom" / "empty").mkdir()
    assert [j.name for j in check_inputs(tmp_path / "dicom", out)] == ["s1", "s2"]
    assert check_inputs(tmp_path / "dicom" / "s1", out)[0].output.path == out / "s1.nii.gz"
    # Outputs inside the source folder are no scans of the next run.
    assert [j.name for j in check_inputs(tmp_path / "dicom", tmp_path / "dicom" / "s2")] == ["s1"]
    assert not out.exists()


def test_every_scan_below_a_folder_is_found_whatever_lies_beside(tmp_path, caplog) -> None:
    """As downloads and datasets have them: lists and licences at the top, a folder a case, files at two levels."""
    out, root = tmp_path / "out", tmp_path / "in"

    def names() -> list[str]:
        return [job.name for job in check_inputs(root, out)]

    for case in ("case1", "case2/study/series"):
        (root / case).mkdir(parents=True)
        (root / case / "IM0").write_bytes(bytes(128) + b"DICM" + bytes(10))  # no ending, as archives have it
    for stray in ("metadata.csv", "LICENSE", "Thumbs.db", ".DS_Store"):
        (root / stray).write_text("x")
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(10))
    (root / "documents").mkdir()
    (root / "documents" / "readme.txt").write_text("x" * 200)
    assert names() == ["case1", "case2"] and caplog.text == ""
    write_scans(root / "case3", "ct.nii.gz")
    write_scans(root / "case3" / "segmentations", "liver.nii.gz", "spleen.nii.gz")
    write_scans(root / "site" / "a", "ct.nii.gz")
    write_scans(root / "site" / "b", "one_0000.nii.gz", "two.nii")
    write_scans(root, "top.nii.gz")
    found = check_inputs(root, out)
    assert [job.name for job in found] == ["top", "case1", "case2", "case3", "site_a", "site_b_one", "site_b_two"]
    assert found[3].source == root / "case3" / "ct.nii.gz" and found[3].output.path == out / "case3.nii.gz"
    assert caplog.text.count("WARNING") == 1 and "segmentations: a folder of label maps" in caplog.text
    # A series with results below it is one series; the results are named.
    write_scans(root / "case1" / "results", "organs.nii.gz")
    assert "case1" in names() and "case1: it holds a DICOM series; image files in folders below" in caplog.text
    # What was written into the input before is no scan.
    write_scans(root / "done", "case1.nii.gz")
    assert [job.name for job in check_inputs(root, root / "done")] == [job.name for job in found]
    (root / "case4").mkdir()
    write_scans(root / "case4", "ct.nii.gz")
    (root / "case4.nii.gz").write_bytes(b"x")
    with pytest.raises(UsageError) as caught:
        check_inputs(root, out)
    assert caught.value.code == "DUP_CASE"


def test_nothing_to_segment(tmp_path) -> None:
    with pytest.raises(VolumeError, match="no such"):
        check_inputs(tmp_path / "absent.nii.gz", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError) as caught:
        check_inputs(tmp_path / "empty", tmp_path / "out")
    assert caught.value.code == "NO_SCANS"


@pytest.mark.parametrize(
    ("names", "output"),
    [(["a.nii", "b.nii"], "seg.nii.gz"), (["a.nii"], "seg.mha")],
)
def test_an_output_name_that_cannot_hold_the_labels(tmp_path, names: list[str], output: str) -> None:
    scans = write_scans(tmp_path / "scans", *names)
    with pytest.raises(UsageError) as caught:
        check_inputs(scans if len(names) > 1 else scans / names[0], tmp_path / output)
    assert caught.value.code == "OUTPUT_NAME"


def test_the_scan_is_never_the_output(tmp_path) -> None:
    scans = write_scans(tmp_path / "scans", "a.nii.gz", "b.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(scans / "a.nii.gz")
    os.link(scans / "a.nii.gz", tmp_path / "hard.nii.gz")
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"x")
    for source, output in (
        (scans / "a.nii.gz", scans / "a.nii.gz"), (scans / "a.nii.gz", scans), (scans, scans),
        (scans, scans / ".." / "scans"), (tmp_path / "link.nii.gz", scans / "a.nii.gz"),
        (scans / "a.nii.gz", tmp_path / "hard.nii.gz"), (series, series), (series, series / "seg.nii.gz"),
    ):
        with pytest.raises(UsageError) as caught:
            check_inputs(source, output)
        assert caught.value.code == "SAME_PATH", (source, output)


@pytest.mark.parametrize(
    "names",
    [("a.nii", "a.nii.gz"), ("a.nii.gz", "A.nii.gz"), ("a.nii.gz", "a_0000.nii.gz"),
     (unicodedata.normalize("NFC", "Müller.nii"), unicodedata.normalize("NFD", "Müller.nii"))],
)
def test_names_that_are_one_on_some_disk_are_refused(tmp_path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes the two names for one")
    with pytest.raises(UsageError) as caught:
        check_inputs(tmp_path, tmp_path / "out")
    assert caught.value.code == "DUP_CASE"


# ------------------------------------------------------------------------------------------------ the work


def test_a_batch_reports_and_is_taken_up(tmp_path, model: Model) -> None:
    scans, out = write_scans(tmp_path / "scans", "a.nii.gz", "b.nii.gz", "c_0000.nii"), tmp_path / "out"
    watch = Watch()
    first = segment_batch(check_inputs(scans, out), model, progress=watch)
    assert [p.name for p in first.written] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"] and first.total == 3
    assert first.output == out and not first.skipped and not first.failed and model.asked == 3
    assert watch.scans == [(0, 3, "a"), (1, 3, "b"), (2, 3, "c"), (3, 3, "")] and watch.windows > 3
    report = json.loads((out / "a.report.json").read_text())
    assert report["status"] == "finished" and report["model_sha256"] == model.sha256
    assert report["runtime"] == "torch 0"
    assert report["volumes_ml"] == {"right_kidney": 6 * 8 * 8 * 0.125, "left_kidney": 5 * 8 * 6 * 0.125}
    assert report["settings"]["overlap"] == 0.0
    assert str(tmp_path) not in json.dumps(report)
    before = contents(out)
    second = segment_batch(check_inputs(scans, out), model)
    assert second.skipped == first.written and not second.written and model.asked == 3
    after = contents(out)
    assert before.pop("batch.jsonl") != after.pop("batch.jsonl") and before == after
    # One output lost: only that one is made again, the same bytes.
    (out / "b.nii.gz").unlink()
    third = segment_batch(check_inputs(scans, out), model)
    assert [p.name for p in third.written] == ["b.nii.gz"] and len(third.skipped) == 2
    assert (out / "b.nii.gz").read_bytes() == before["b.nii.gz"]


def test_a_bad_scan_is_reported_and_the_rest_is_done(tmp_path, model: Model) -> None:
    scans, out = write_scans(tmp_path / "scans", "a.nii.gz", "z.nii.gz"), tmp_path / "out"
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "m.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = segment_batch(check_inputs(scans, out), model)
    assert [p.name for p in result.written] == ["a.nii.gz", "z.nii.gz"]
    assert [(f.job.name, f.error.code) for f in result.failed] == [("m", "TRUNCATED")]
    assert not list(out.glob("m*"))
    lines = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]
    assert [(line["case"], line["status"]) for line in lines] == [("a", "written"), ("m", "failed"), ("z", "written")]
    assert lines[1]["code"] == "TRUNCATED" and str(tmp_path) not in str(lines)


def test_memory_that_runs_out_is_a_failed_case_and_a_bug_is_not(tmp_path, model: Model, monkeypatch) -> None:
    scans = write_scans(tmp_path / "scans", "a.nii.gz", "b.nii.gz")

    def run_out(*_: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(batch, "begin_segment", run_out)
    result = segment_batch(check_inputs(scans, tmp_path / "out"), model)
    assert {type(f.error) for f in result.failed} == {ResourceError} and len(result.failed) == 2
    assert "9 GiB" in result.failed[0].error.fault
    monkeypatch.setattr(batch, "begin_segment", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segment_batch(check_inputs(scans, tmp_path / "out"), model)


@pytest.mark.parametrize("change", ["other model", "other settings", "other scan", "edited labels", "not ours"])
def test_an_output_that_is_not_this_one_stays_unless_asked(tmp_path, model: Model, change: str) -> None:
    scans, out = write_scans(tmp_path / "scans", "a.nii.gz", "b.nii.gz"), tmp_path / "out"
    options = SegmentOptions()
    segment_batch(check_inputs(scans, out), model, segment_options=options)
    if change == "other model":
        model.sha256 = "b" * 64
    elif change == "other settings":
        options = SegmentOptions(tta=True)
    elif change == "other scan":
        write_scan(scans / "b.nii.gz", seed=99)
    elif change == "edited labels":
        (out / "b.nii.gz").write_bytes((out / "a.nii.gz").read_bytes() + b"\0")
    else:
        (out / "b.report.json").write_text("[]")
    before, asked = contents(out), model.asked
    with pytest.raises(UsageError) as caught:
        segment_batch(check_inputs(scans, out), model, segment_options=options)
    assert caught.value.code == "OUTPUT_EXISTS" and contents(out) == before and model.asked == asked
    result = segment_batch(check_inputs(scans, out), model, segment_options=options, overwrite=True)
    assert out / "b.nii.gz" in result.written
    assert read_segmentation(out / "b.nii.gz").labels.max() == 2
    assert len(segment_batch(check_inputs(scans, out), model, segment_options=options).skipped) == 2


def test_a_run_killed_between_output_and_report_goes_on(tmp_path, model: Model, monkeypatch) -> None:
    write_scan(tmp_path / "a.nii.gz")
    jobs = check_inputs(tmp_path / "a.nii.gz", tmp_path / "out")
    write = output_formats.write_segmentation

    def killed(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(output_formats, "write_segmentation", killed)
    with pytest.raises(KeyboardInterrupt):
        segment_batch(jobs, model)
    assert json.loads(jobs[0].output.report.read_text())["status"] == "writing"
    monkeypatch.undo()
    assert segment_batch(jobs, model).written == [jobs[0].output.path]  # no --overwrite needed
    assert segment_batch(jobs, model).skipped == [jobs[0].output.path]


def test_an_overwrite_killed_before_it_replaces_leaves_a_foreign_file_protected(
    tmp_path, model: Model, monkeypatch
) -> None:
    write_scan(tmp_path / "a.nii.gz")
    jobs = check_inputs(tmp_path / "a.nii.gz", tmp_path / "out")
    foreign = jobs[0].output.path
    foreign.parent.mkdir()
    foreign.write_bytes(b"a person's work")
    with monkeypatch.context() as patch:
        patch.setattr(output_formats, "write_segmentation", die)
        demand_killed(lambda: segment_batch(jobs, model, overwrite=True))
    assert json.loads(jobs[0].output.report.read_text())["status"] == "writing"
    with pytest.raises(UsageError) as caught:
        segment_batch(jobs, model)
    assert caught.value.code == "OUTPUT_EXISTS" and foreign.read_bytes() == b"a person's work"
    assert segment_batch(jobs, model, overwrite=True).written == [foreign]


def test_a_failed_write_leaves_nothing(tmp_path, model: Model, monkeypatch) -> None:
    write_scan(tmp_path / "a.nii.gz")
    jobs = check_inputs(tmp_path / "a.nii.gz", tmp_path / "out")

    def full(*_: object) -> None:
        raise ResourceError("NO_SPACE", "out", "the disk is full", "free some")

    monkeypatch.setattr(output_formats, "write_segmentation", full)
    assert segment_batch(jobs, model).failed[0].error.code == "NO_SPACE"
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_folder_that_cannot_be_is_refused_before_the_work(tmp_path, model: Model) -> None:
    write_scan(tmp_path / "a.nii.gz")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AutoSam3dError) as caught:
        segment_batch(check_inputs(tmp_path / "a.nii.gz", tmp_path / "file" / "deep" / "seg.nii.gz"), model)
    assert caught.value.code == "OUTPUT_PATH" and model.asked == 0


def test_a_scan_smaller_than_a_window_is_warned_of_in_its_report(tmp_path, model, caplog) -> None:
    """Row 41 of the catalogue: it is padded, segmented, and keeps its shape."""
    scans = write_scans(tmp_path / "scans", "large.nii.gz")
    small = read_ct(scans / "large.nii.gz")
    write_ct(scans / "narrow.nii.gz", replace(small, voxels_hu=small.voxels_hu[:, :, 22:34], source=None))
    segment_batch(check_inputs(scans, tmp_path / "out"), model)
    warnings = {name: json.loads((tmp_path / "out" / f"{name}.report.json").read_text())["warnings"]
                for name in ("large", "narrow")}
    assert warnings["large"] == []
    assert any("smaller than the model's window (16 x 28 x 12 of 8 x 16 x 16 voxels, " in w for w in warnings["narrow"])
    assert "smaller than the model's window" in caplog.text
    assert read_segmentation(tmp_path / "out/narrow.nii.gz").shape == (16, 40, 12)


def test_the_scan_is_let_go_before_labels_are_written(tmp_path, model, monkeypatch) -> None:
    scans = write_scans(tmp_path / "scans", "a.nii.gz")
    alive: list[weakref.ref] = []

    def read(*args: object) -> Volume:
        volume = read_ct(*args)
        alive.append(weakref.ref(volume.voxels_hu))
        return volume

    def write(*args: object) -> None:
        assert alive[-1]() is None
        write_segmentation(*args)

    monkeypatch.setattr(batch, "read_ct", read)
    monkeypatch.setattr(output_formats, "write_segmentation", write)
    result = segment_batch(check_inputs(scans, tmp_path / "out"), model)
    assert not result.failed and len(alive) == 1


def test_volumes_are_counted_without_room_for_all_voxels(tmp_path, model) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (300, 64, 64)).astype(np.uint8)
    run = batch._Batch(model, ReadOptions(), SegmentOptions(), False)
    tracemalloc.start()
    volumes = run._findings(Segmentation(labels, np.diag([10.0, 10.0, 10.0, 1.0])))["volumes_ml"]
    assert tracemalloc.get_traced_memory()[1] < labels.size
    tracemalloc.stop()
    assert volumes == {name: float(np.count_nonzero(labels == i)) for i, name in LABELS.by_index.items()}


@pytest.mark.parametrize("name", ["seg", "seg-labelmap", "rtstruct"])
def test_series_become_dicom_objects_and_nothing_tells_whose_they_are(tmp_path, model: Model, name, caplog) -> None:
    highdicom = pytest.importorskip("highdicom", reason="the dicom extra is not installed")
    sys.path.insert(0, str(Path(__file__).parents[1] / "badinput"))
    import make_dicom

    for case in ("one", "two"):
        (tmp_path / "in" / case).mkdir(parents=True)
        make_dicom.series()(tmp_path / "in" / case)
    form = output_formats.output_format(name, tmp_path / "out")
    jobs = check_inputs(tmp_path / "in", tmp_path / "out", form)
    ending = form.ending_in_folder
    assert [job.output.path.name for job in jobs] == [f"one{ending}", f"two{ending}"]
    with caplog.at_level("DEBUG"):
        result = segment_batch(jobs, model)
    assert result.written == [job.output.path for job in jobs], [f.error for f in result.failed]
    assert segment_batch(jobs, model).skipped == result.written
    truth = segment_of(jobs[0].source, model)
    if ending == ".seg.dcm":
        seg = highdicom.seg.segread(jobs[0].output.path)
        found = {seg.get_segment_description(n).segment_label:
                 np.count_nonzero(seg.get_volume(segment_numbers=[n]).array) for n in seg.segment_numbers}
        assert found == {"Right kidney": np.count_nonzero(truth == 1), "Left kidney": np.count_nonzero(truth == 2)}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    stems = [f"one{ending.removesuffix('.dcm')}", f"two{ending.removesuffix('.dcm')}"]
    assert names == {f"{s}{e}" for s in stems for e in (".dcm", ".report.json")} | {"batch.jsonl"}
    told = caplog.text + "".join(p.read_text() for p in (tmp_path / "out").glob("*.json*"))
    assert not any(text in told for text in ("Doe", make_dicom.SERIES_UID))
    assert re.search(r"(?<![\w.])4711(?![\w.])", told) is None  # alone: hashes and UIDs hold any digits


def test_all_forms_of_one_scan_lie_side_by_side_and_each_is_skipped_the_second_time(tmp_path, model: Model) -> None:
    pytest.importorskip("highdicom", reason="the dicom extra is not installed")
    sys.path.insert(0, str(Path(__file__).parents[1] / "badinput"))
    import make_dicom

    (tmp_path / "in").mkdir()
    make_dicom.series()(tmp_path / "in")
    out = tmp_path / "out"
    outputs = {"organs.nii.gz": output_formats.NIFTI, "organs.nii": output_formats.NIFTI,
               "organs.dcm": output_formats.SEG, "organs.map.dcm": output_formats.SEG_LABELMAP,
               "organs.rtstruct.dcm": output_formats.RTSTRUCT}
    for preview in (True, False):
        for name, form in outputs.items():
            result = segment_batch(check_inputs(tmp_path / "in", out / name, form), model, preview=preview)
            assert (result.written if preview else result.skipped) == [out / name], [f.error for f in result.failed]
    reports = {"organs.report.json": "organs.nii.gz", "organs.nii.report.json": "organs.nii",
               "organs.seg.report.json": "organs.dcm", "organs.map.seg.report.json": "organs.map.dcm",
               "organs.rtstruct.report.json": "organs.rtstruct.dcm"}
    assert {p.name: json.loads(p.read_text())["output"] for p in out.glob("*.report.json")} == reports
    pictures = {f"{name.removesuffix('.report.json')}.png" for name in reports}
    tables = {"organs.json", "organs.labels.txt", "organs.ctbl"}
    assert {p.name for p in out.iterdir()} == {*outputs, *reports, *pictures, *tables}


def segment_of(source: Path, model: Model) -> np.ndarray:
    from autosam3d.inference.pipeline import begin_segment

    return begin_segment(read_ct(source), model, SegmentOptions())(None).labels


def test_output_formats_that_cannot_be(tmp_path) -> None:
    pytest.importorskip("highdicom", reason="the dicom extra is not installed")
    write_scan(tmp_path / "a.nii.gz")
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "slice").touch()
    for name, source, output, code in (
            (None, "series", "a.dcm", "FORMAT"), ("foo", "series", "out", "FORMAT"),
            ("seg", "series", "b.nii.gz", "OUTPUT_NAME"), ("nifti", "a.nii.gz", "b.dcm", "OUTPUT_NAME"),
            ("seg", "a.nii.gz", "b.dcm", "FORMAT")):
        with pytest.raises(UsageError) as caught:
            check_inputs(tmp_path / source, tmp_path / output, output_formats.output_format(name, tmp_path / output))
        assert (caught.value.code, caught.value.exit_code) == (code, 2)


def test_a_missing_extra_is_said_before_the_work(tmp_path, monkeypatch) -> None:
    for module in ("autosam3d.io.dicom.seg", "autosam3d.io.dicom.rtstruct"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UsageError, match=r'autosam3d\[dicom\]') as caught:
        output_formats.output_format("rtstruct", tmp_path / "out")
    assert caught.value.code == "MISSING_EXTRA"


def test_a_report_names_an_acquisition_only_where_one_was_chosen(tmp_path, model: Model) -> None:
    """Reports of versions that knew no acquisitions stay those of the same output."""
    write_scan(tmp_path / "scan.nii.gz")
    jobs = check_inputs(tmp_path / "scan.nii.gz", tmp_path / "out.nii.gz")
    segment_batch(jobs, model)
    reading = json.loads((tmp_path / "out.report.json").read_text())["settings"]["reading"]
    assert set(reading) == {"prefer", "assume_ras", "intensity_offset", "volume_index", "series", "force"}
    assert segment_batch(jobs, model).skipped == [tmp_path / "out.nii.gz"]
    with pytest.raises(UsageError):
        segment_batch(jobs, model, read_options=ReadOptions(acquisition=2))
