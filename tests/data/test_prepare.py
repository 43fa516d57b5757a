"""Every download layout becomes a folder that training reads, every broken case is named, and nothing is done twice."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autosam3d import io
from autosam3d.data import download as prepare
from autosam3d.data.download import PrepareReport, prepare_dataset
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.data.phantom import make_phantom
from autosam3d.errors import AutoSam3dError, BatchError, UsageError, VolumeError
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.volume import Segmentation, Volume

ANY_LABELS = LabelMap(organs=tuple(f"value_{i}" for i in range(1, 20)))
BTCV_IDS = ("0001", "0010", "0021", "0034", "0035", "0036", "0037", "0038", "0039", "0040")


@pytest.fixture(scope="module")
def scan() -> Volume:
    return make_phantom(0, (10, 22, 22), (20.0, 14.0, 14.0))[0]


@pytest.fixture
def write(scan: Volume) -> Callable[..., None]:
    """Writes case number `case` as scan and label map; organs 1..num_values stand in the label map."""

    def write_case(case: int, image: Path | None, label: Path | None, num_values: int) -> None:
        voxels = scan.voxels_hu.copy()
        voxels.flat[0] = -900 - case  # no two scans alike
        labels = np.zeros(scan.shape, np.uint8)
        labels[2 : 2 + num_values // 8 + 1, 5, 5:13].flat[:num_values] = np.arange(1, num_values + 1)
        if image:
            image.parent.mkdir(parents=True, exist_ok=True)
            io.write_ct(image, Volume(voxels, scan.affine, scan.source))
        if label:
            label.parent.mkdir(parents=True, exist_ok=True)
            io.write_segmentation(label, Segmentation(labels, scan.affine, scan.source), ANY_LABELS)
            for side_car in label.parent.glob("*"):
                if not side_car.name.endswith(".nii.gz"):
                    side_car.unlink()

    return write_case


@pytest.fixture
def btcv(tmp_path: Path, write: Callable[..., None]) -> Path:
    root = tmp_path / "download"
    for case in BTCV_IDS:
        raw = root / "RawData/Training"
        write(int(case), raw / f"img/img{case}.nii.gz", raw / f"label/label{case}.nii.gz", 13)
    write(61, root / "RawData/Testing/img/img0061.nii.gz", None, 0)
    return root


def btcv_recipe(*overrides: str) -> Recipe:
    return load_recipe("btcv", ["dataset.download.num_cases=10", *overrides])


def prepared(recipe: Recipe, source: Path, destination: Path) -> tuple[PrepareReport, CaseSet]:
    report = prepare_dataset(recipe, source, destination)
    cases = open_dataset(destination, recipe)
    for case in (*cases.train, *cases.val, *cases.test):
        assert io.read_ct(case.image_path).shape == (10, 22, 22)
        assert case.label_path is not None
        assert io.read_segmentation(case.label_path).labels.max() == len(recipe.labels.organs)
    return report, cases


def refused(error: type[AutoSam3dError], recipe: Recipe, source: Path, destination: Path) -> AutoSam3dError:
    with pytest.raises(error) as caught:
        prepare_dataset(recipe, source, destination)
    assert "\n" not in str(caught.value)
    return caught.value


def test_btcv_as_synapse_gives_it(btcv: Path, tmp_path: Path) -> None:
    ticks = []
    recipe = btcv_recipe()
    report = prepare_dataset(recipe, btcv, tmp_path / "out", progress=lambda done, total: ticks.append((done, total)))
    assert ticks[0] == (0, 10) and ticks[-1] == (10, 10)
    assert (report.num_train, report.num_val, report.num_test) == (4, 0, 6)
    assert report.cases_with["spleen"] == (4, 6) and len(report.cases_with) == 13
    cases = open_dataset(tmp_path / "out", recipe)
    assert [case.name for case in cases.test] == [f"btcv_{i}" for i in BTCV_IDS[4:]]
    index = json.loads((tmp_path / "out/dataset.json").read_text())
    assert index["labels"]["portal_and_splenic_veins"] == 10 and index["numTraining"] == 4
    assert "4 training, 0 validation, 6 test" in report.summary() and "spleen" in report.summary()


def test_any_level_of_the_download_will_do(btcv: Path, tmp_path: Path) -> None:
    report, cases = prepared(btcv_recipe(), btcv / "RawData/Training", tmp_path / "out")
    assert (report.num_train, len(cases.test)) == (4, 6)


def test_unchanged_files_are_linked_not_written_anew(btcv: Path, tmp_path: Path) -> None:
    prepare_dataset(btcv_recipe(), btcv, tmp_path / "out")
    source = btcv / "RawData/Training/img/img0001.nii.gz"
    assert (tmp_path / "out/imagesTr/btcv_0001_0000.nii.gz").samefile(source)
    assert not list((tmp_path / "out").rglob(".*"))


def test_files_are_copied_where_links_cannot_be(
    btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    prepared(btcv_recipe(), btcv, tmp_path / "out")
    source, copy = btcv / "RawData/Training/img/img0001.nii.gz", tmp_path / "out/imagesTr/btcv_0001_0000.nii.gz"
    assert not copy.samefile(source) and copy.read_bytes() == source.read_bytes()


def test_amos_keeps_ct_and_tests_on_the_validation_folder(tmp_path: Path, write: Callable[..., None]) -> None:
    root = tmp_path / "amos22"
    for part, ids in (("Tr", (1, 4, 410, 507, 600)), ("Va", (8, 13, 590))):
        for case in ids:
            name = f"amos_{case:04}.nii.gz"
            write(case, root / f"images{part}" / name, root / f"labels{part}" / name, 15)
    write(2, root / "imagesTs/amos_0002.nii.gz", None, 0)
    report, cases = prepared(load_recipe("amos_ct", ["dataset.download.num_cases=5"]), tmp_path, tmp_path / "out")
    assert [case.name for case in cases.train] == ["amos_ct_0001", "amos_ct_0004", "amos_ct_0410"]
    assert [case.name for case in cases.test] == ["amos_ct_0008", "amos_ct_0013"]
    assert report.cases_with["prostate_or_uterus"] == (3, 2)


def test_ct_org_drops_the_brain_and_takes_the_papers_subset(tmp_path: Path, write: Callable[..., None]) -> None:
    root = tmp_path / "OrganSegmentations"
    ids = (*range(19), 19, 20, 99, 100)
    for case in ids:
        # The brain, value 6, is in few scans only.
        write(case, root / f"volume-{case}.nii.gz", root / f"labels-{case}.nii.gz", 6 if case in (3, 20) else 5)
    recipe = load_recipe("ct_org", ["dataset.download.num_cases=22"])
    report, cases = prepared(recipe, tmp_path, tmp_path / "out")
    assert [case.name for case in cases.train] == ["ct_org_19", "ct_org_20", "ct_org_99"]
    assert len(cases.test) == 19 and report.cases_with == dict.fromkeys(recipe.labels.organs, (3, 19))
    with_brain, without = tmp_path / "out/labelsTr/ct_org_20.nii.gz", tmp_path / "out/labelsTr/ct_org_19.nii.gz"
    assert not with_brain.samefile(root / "labels-20.nii.gz") and without.samefile(root / "labels-19.nii.gz")
    before, after = io.read_segmentation(root / "labels-20.nii.gz"), io.read_segmentation(with_brain)
    np.testing.assert_array_equal(after.labels, np.where(before.labels == 6, 0, before.labels))
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-5)
    assert after.source is not None and before.source is not None and after.source.shape == before.source.shape


def test_ct_orgs_official_split_is_three_overrides_away(tmp_path: Path, write: Callable[..., None]) -> None:
    for case in (0, 20, 21, 139):
        write(case, tmp_path / f"in/volume-{case}.nii.gz", tmp_path / f"in/labels-{case}.nii.gz", 5)
    recipe = load_recipe("ct_org", [
        "dataset.download.id_range=null", "dataset.download.num_cases=4", 'dataset.download.test_ids=["0", "20"]',
    ])
    _, cases = prepared(recipe, tmp_path / "in", tmp_path / "out")
    assert [case.name for case in cases.train] == ["ct_org_139", "ct_org_21"]
    assert [case.name for case in cases.test] == ["ct_org_0", "ct_org_20"]


def test_validation_cases_by_id_or_by_share(btcv: Path, tmp_path: Path) -> None:
    report, cases = prepared(btcv_recipe('dataset.download.val_ids=["0010"]'), btcv, tmp_path / "ids")
    assert report.num_val == 1 and [case.name for case in cases.val] == ["btcv_0010"]
    report, cases = prepared(btcv_recipe("dataset.val_share=0.5"), btcv, tmp_path / "share")
    assert (report.num_train, report.num_val) == (2, 2)


def test_a_second_call_does_nothing_again(btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_dataset(btcv_recipe(), btcv, tmp_path / "out")
    monkeypatch.setattr("autosam3d.data.download._prepare_case", None)
    assert prepare_dataset(btcv_recipe(), btcv, tmp_path / "out") == first


def test_an_interrupted_call_is_taken_up(btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, done = prepare._prepare_case, []

    def stops_after_three(job, recipe, destination):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.name)
        return whole(job, recipe, destination)

    monkeypatch.setattr(prepare, "_prepare_case", stops_after_three)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(btcv_recipe(), btcv, tmp_path / "out")
    assert not (tmp_path / "out/dataset.json").exists()  # nobody trains on a part
    with pytest.raises(VolumeError):
        open_dataset(tmp_path / "out", btcv_recipe())

    # One finished file is lost and one source is replaced meanwhile: just these are done again.
    (tmp_path / "out/labelsTr/btcv_0001.nii.gz").unlink()
    os.utime(btcv / "RawData/Training/img/img0010.nii.gz", ns=(1, 1))
    done.clear()
    monkeypatch.setattr(prepare, "_prepare_case",
                        lambda job, *rest: (done.append(job.name), whole(job, *rest))[1])
    assert prepare_dataset(btcv_recipe(), btcv, tmp_path / "out").num_train == 4
    assert done == [f"btcv_{i}" for i in BTCV_IDS if i not in ("0021",)]


def test_other_folders_are_left_alone(btcv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert refused(UsageError, btcv_recipe(), btcv, out).code == "OUTPUT_EXISTS"
    assert list(out.iterdir()) == [out / "thesis.txt"]
    prepare_dataset(btcv_recipe(), btcv, tmp_path / "btcv")
    other = btcv_recipe('dataset.download.test_ids=["0040"]')
    assert refused(UsageError, other, btcv, tmp_path / "btcv").code == "OUTPUT_EXISTS"
    (tmp_path / "btcv/prepare.json").write_text("[")
    assert refused(UsageError, btcv_recipe(), btcv, tmp_path / "btcv").code == "OUTPUT_EXISTS"
    (tmp_path / "file").write_text("x")
    with pytest.raises(AutoSam3dError):
        prepare_dataset(btcv_recipe(), btcv, tmp_path / "file")


def test_what_is_not_the_download(btcv: Path, tmp_path: Path) -> None:
    assert refused(UsageError, load_recipe("pelvic"), btcv, tmp_path / "out").code == "NO_DOWNLOAD"
    for recipe, source in ((btcv_recipe(), tmp_path / "none"), (load_recipe("amos_ct"), btcv),
                           (btcv_recipe(), btcv / "RawData/Testing")):
        error = refused(VolumeError, recipe, source, tmp_path / "out")
        assert error.code == "DATASET" and recipe.dataset.layout.split()[0] in error.remedy
    assert not (tmp_path / "out").exists()


def test_missing_cases_are_counted_and_named(btcv: Path, tmp_path: Path) -> None:
    raw = btcv / "RawData/Training"
    error = refused(VolumeError, load_recipe("btcv"), btcv, tmp_path / "out")
    assert error.code == "MISSING_CASES" and "expected 30 cases, got 10" in error.fault
    (raw / "label/label0010.nii.gz").unlink()
    error = refused(VolumeError, btcv_recipe(), btcv, tmp_path / "out")
    assert error.code == "PAIRING" and "0010" in error.fault
    (raw / "img/img0010.nii.gz").unlink()
    assert refused(VolumeError, btcv_recipe(), btcv, tmp_path / "out").code == "MISSING_CASES"
    for path in (raw / "label/label0036.nii.gz", raw / "img/img0036.nii.gz"):
        path.unlink()
    error = refused(VolumeError, btcv_recipe("dataset.download.num_cases=null"), btcv, tmp_path / "out")
    assert error.code == "MISSING_CASES" and "0036" in error.fault


def test_two_files_for_one_case(btcv: Path, tmp_path: Path) -> None:
    again = btcv / "copy/img0001.nii.gz"
    again.parent.mkdir()
    again.write_bytes(b"x")
    assert refused(VolumeError, btcv_recipe(), btcv, tmp_path / "out").code == "DUPLICATE_FILE"


def _change_labels(path: Path, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
    image = nib.load(path)
    np.asanyarray(image.dataobj)
    nib.save(change(image), path)  # type: ignore[arg-type]


def _three_mm_aside(affine: np.ndarray) -> np.ndarray:
    moved = affine.copy()
    moved[0, 3] += 3
    return moved


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("SHAPE", lambda i: nib.Nifti1Image(np.asarray(i.dataobj)[:, :, :-1], i.affine)),
        ("AFFINE_MISMATCH", lambda i: nib.Nifti1Image(np.asarray(i.dataobj), _three_mm_aside(i.affine))),
        ("LABEL_RANGE", lambda i: nib.Nifti1Image(np.asarray(i.dataobj) + np.uint8(1), i.affine)),
        ("LABEL_FLOAT", lambda i: nib.Nifti1Image(np.asarray(i.dataobj) * np.float32(0.5), i.affine)),
    ],
    ids=["shape", "affine", "range", "float"],
)
def test_a_broken_case_is_named_and_the_others_are_kept(
    code: str, change: Callable, btcv: Path, tmp_path: Path
) -> None:
    broken = btcv / "RawData/Training/label/label0021.nii.gz"
    whole = broken.read_bytes()
    _change_labels(broken, change)
    error = refused(BatchError, btcv_recipe(), btcv, tmp_path / "out")
    assert error.exit_code == 6 and "1 of 10 cases" in error.fault and "label0021" in error.fault
    journal = json.loads((tmp_path / "out/prepare.json").read_text())
    assert len(journal["cases"]) == 9 and not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(VolumeError) as caught:
        recipe = btcv_recipe()
        assert recipe.dataset.download is not None
        jobs = prepare._find_jobs(recipe, recipe.dataset.download, btcv)
        prepare._prepare_case(next(job for job in jobs if job.name == "btcv_0021"), recipe, tmp_path / "out")
    assert caught.value.code == code
    broken.write_bytes(whole)
    assert prepare_dataset(btcv_recipe(), btcv, tmp_path / "out").num_train == 4


def test_labels_in_another_axis_order_are_the_same_labels(btcv: Path, tmp_path: Path) -> None:
    path = btcv / "RawData/Training/label/label0021.nii.gz"
    before = io.read_segmentation(path)
    _change_labels(path, lambda image: image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])))
    prepare_dataset(btcv_recipe(), btcv, tmp_path / "out")
    after = io.read_segmentation(tmp_path / "out/labelsTr/btcv_0021.nii.gz")
    np.testing.assert_array_equal(after.labels, before.labels)


def test_one_scan_twice_is_noticed_by_its_voxels(btcv: Path, tmp_path: Path) -> None:
    raw = btcv / "RawData/Training/img"
    scan = io.read_ct(raw / "img0001.nii.gz")
    (raw / "img0040.nii.gz").unlink()
    io.write_ct(raw / "img0040.nii.gz", Volume(scan.voxels_hu, scan.affine))  # another file, the same patient
    error = refused(VolumeError, btcv_recipe(), btcv, tmp_path / "out")
    assert error.code in ("DUPLICATE_SCAN", "AFFINE_MISMATCH") and "btcv_0001" in error.fault


def test_an_organ_that_is_nowhere_and_empty_label_maps(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    for case in BTCV_IDS:
        write(int(case), tmp_path / f"in/img{case}.nii.gz", tmp_path / f"in/label{case}.nii.gz", 12)
    error = refused(VolumeError, btcv_recipe(), tmp_path / "in", tmp_path / "out")
    assert error.code == "ABSENT_ORGAN" and "left_adrenal_gland" in error.fault
    write(1, None, tmp_path / "in/label0001.nii.gz", 13)
    write(10, None, tmp_path / "in/label0010.nii.gz", 0)
    report = prepare_dataset(btcv_recipe(), tmp_path / "in", tmp_path / "out")
    assert any("no test case shows left_adrenal_gland" in warning for warning in report.warnings)
    assert any("btcv_0010" in warning and "background everywhere" in warning for warning in report.warnings)
    for case in ("0021", "0034"):
        write(int(case), None, tmp_path / f"in/label{case}.nii.gz", 0)
    assert "got none in 3 of 4" in refused(VolumeError, btcv_recipe(), tmp_path / "in", tmp_path / "out").fault
