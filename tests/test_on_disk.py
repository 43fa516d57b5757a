"""docs/on-disk.md against folders that are really made.

The folders that take long to make are looked at by the tests that make them anyway: that of `serve` in
services/serve/test_lifecycle.py, nnU-Net's run folder in studies/nnunet/test_nnunet.py, reproduce's folder in
studies/reproduce/test_command.py, a tuning of SAM in studies/slicewise/test_slicewise_tuning.py, the user's cache in
checkpoints/test_exported.py.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from autosam3d.data.folder import open_dataset
from autosam3d.io import ReadOptions
from autosam3d.io.output_formats import RTSTRUCT, SEG, OutputFormat
from autosam3d.scans.batch import segment_batch
from autosam3d.scans.jobs import check_inputs
from autosam3d.services.pacs.incoming import Incoming
from autosam3d.services.pacs.ledger import Ledger
from autosam3d.services.pacs.state_folder import hold_state_folder
from autosam3d.training.train import TeacherSource, train
from exports import loaded, mini_export
from mini_run import mini_recipe, write_mini_dataset
from on_disk import demand_as_told, rows_of

_SIDE_FILES = ("CASE.nii.gz", "CASE.json", "CASE.labels.txt", "CASE.ctbl", "CASE.report.json", "CASE.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("on_disk") / "data")


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    recipe = mini_recipe(train__epochs=1, train__validate_every=1)
    train(recipe, open_dataset(data, recipe), data.parent / "run")
    return data.parent / "run"


def test_a_run_folder(trained: Path) -> None:
    demand_as_told("A run folder", trained, "best.json", "best-HASH.safetensors", "previous.json", "cache/KEY/**")


def test_entries_of_the_cache(trained: Path, data: Path) -> None:
    title = "An entry of the cache of a dataset"
    entries = [*(trained / "cache").iterdir()]
    assert len(entries) == 6
    for entry in entries:
        demand_as_told(title, entry)
    recipe = mini_recipe(train__epochs=1, train__validate_every=1, distill={"teacher_overlap": 0.0})
    train(recipe, open_dataset(data, recipe), data.parent / "student", cache_dir=trained / "cache",
          teacher=TeacherSource(trained))
    taught = {path.parent for path in (trained / "cache").glob("*/teacher-*.json")}
    assert len(taught) == 4, "the teacher is asked about the cases that are trained on"
    for entry in taught:
        demand_as_told(title, entry, "teacher-HASH.npy", "teacher-HASH.json")
    demand_as_told("A run folder", data.parent / "student", "best.json", "best-HASH.safetensors", "previous.json",
                   "teaching.json")


def test_an_export_folder() -> None:
    demand_as_told("An export folder", mini_export())


def test_outputs_of_one_scan_and_of_several(data: Path, tmp_path: Path) -> None:
    model = loaded()
    segment_batch(check_inputs(data / "imagesTr/c0_0000.nii.gz", tmp_path / "one/organs.nii.gz"), model, preview=True)
    demand_as_told("Outputs of segment", tmp_path / "one", *_SIDE_FILES)
    segment_batch(check_inputs(data / "imagesTr", tmp_path / "many"), model)
    demand_as_told("Outputs of segment", tmp_path / "many", *_SIDE_FILES[:-1], "batch.jsonl")


@pytest.mark.parametrize(("form", "name"), [(SEG, "seg"), (RTSTRUCT, "rtstruct")])
def test_outputs_of_a_series(form: OutputFormat, name: str, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="needs the extra dicom")
    from serving import dicom_folder

    series = dicom_folder(tmp_path / "series")
    segment_batch(check_inputs(series, tmp_path / "out", form), loaded(), read_options=ReadOptions(force=True))
    demand_as_told("Outputs of segment", tmp_path / "out", f"CASE.{name}.dcm", f"CASE.{name}.report.json")


def test_the_folder_of_pacs(tmp_path: Path) -> None:
    with hold_state_folder(tmp_path / "state") as state, contextlib.closing(Ledger(state.ledger)):
        incoming = Incoming(state.incoming)
        held = ["incoming/receiving/OBJECT.dcm", "incoming/SERIES/OBJECT.dcm"]
        path, file = incoming.open()
        with file:
            file.write(b"one object")
        demand_as_told("The folder of pacs", tmp_path / "state", held[0])
        assert incoming.put(path, "1.2.3", "1.2.3.4")
        state.fresh(state.series("0" * 8)).joinpath("000001.dcm").write_bytes(b"one object")
        demand_as_told("The folder of pacs", tmp_path / "state", held[1], "jobs/ID/**")


def test_rows_without_a_file_and_files_without_a_row_are_found(tmp_path: Path) -> None:
    (tmp_path / "info.json").touch()
    with pytest.raises(AssertionError, match="rows without a file"):
        demand_as_told("An entry of the cache of a dataset", tmp_path)
    for name in (*rows_of("An entry of the cache of a dataset"), "stray.npy"):
        (tmp_path / name).touch()
    with pytest.raises(AssertionError, match="files that the page does not name"):
        demand_as_told("An entry of the cache of a dataset", tmp_path)
