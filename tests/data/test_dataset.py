"""A dataset folder is understood as it is, or refused with what was expected."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autosam3d.data.folder import CaseSet, held_out, index_description, open_dataset, write_index
from autosam3d.errors import VolumeError
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe

ORGANS = ("liver", "spleen", "aorta")
REAL = Path(__file__).resolve().parents[2] / "../shared/data"


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("pelvic", [f"labels.organs=[{', '.join(ORGANS)}]", "dataset.val_share=0", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a, b, c for training, d for validation, e and f for testing. No file is opened, so each holds its own name."""
    root = tmp_path / "data"
    for part, names in (("Tr", "abcd"), ("Ts", "ef")):
        (root / f"images{part}").mkdir(parents=True)
        (root / f"labels{part}").mkdir()
        for name in names:
            (root / f"images{part}" / f"{name}_0000.nii.gz").write_text(f"scan {name}")
            (root / f"labels{part}" / f"{name}.nii.gz").write_text(f"truth {name}")
    write_index(root, LabelMap(organs=ORGANS), ["a", "b", "c"], ["d"], description="test")
    return root


def names(cases: CaseSet) -> tuple[str, str, str]:
    return tuple("".join(case.name for case in part) for part in (cases.train, cases.val, cases.test))  # type: ignore


def change(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    tree = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def refused(folder: Path, recipe: Recipe | None = None) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        open_dataset(folder, recipe or small_recipe())
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    return caught.value


def test_reads_the_layout(folder: Path) -> None:
    cases = open_dataset(folder, small_recipe())
    assert names(cases) == ("abc", "d", "ef")
    first = cases.train[0]
    assert first.image_path == folder / "imagesTr/a_0000.nii.gz" and first.label_path == folder / "labelsTr/a.nii.gz"
    assert first.label_table == {0: 0, 1: 1, 2: 2, 3: 3}
    assert cases.warnings == ()
    assert index_description(folder) == "test" and index_description(folder / "imagesTr") is None


def test_test_cases_may_lack_truth_or_be_absent(folder: Path) -> None:
    shutil.rmtree(folder / "labelsTs")
    cases = open_dataset(folder, small_recipe())
    assert [case.label_path for case in cases.test] == [None, None]
    shutil.rmtree(folder / "imagesTs")
    assert open_dataset(folder, small_recipe()).test == ()


def test_order_of_labels_follows_the_recipe_by_name(folder: Path) -> None:
    change(folder, "dataset.json", labels={"background": 0, "Aorta": 7, "liver": 2, "spleen": 1})
    case = open_dataset(folder, small_recipe()).train[0]
    assert case.label_table == {0: 0, 7: 3, 2: 1, 1: 2}


def test_surplus_organ_is_background_only_where_the_recipe_says_so(folder: Path) -> None:
    change(folder, "dataset.json", labels={"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "left-kidney": 4})
    error = refused(folder)
    assert error.code == "LABELS" and "dataset.background_organs" in error.remedy
    recipe = small_recipe("dataset.background_organs=[left_kidney]")
    assert open_dataset(folder, recipe).train[0].label_table == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}


def test_label_mismatch_shows_both_lists(folder: Path) -> None:
    change(folder, "dataset.json", labels={"background": 0, "liver": 1, "spleen": 2})
    error = refused(folder)
    assert error.code == "LABELS"
    assert "['liver', 'spleen', 'aorta']" in error.fault and "['liver', 'spleen']" in error.fault


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": [1, 2], "spleen": 2, "aorta": 3},  # regions
        {"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "ignore": 4},
        {"background": 0, "liver": 1, "spleen": 1, "aorta": 3},
        {"background": 0, "liver": 0, "spleen": 2, "aorta": 3},
        {"background": 1, "liver": 2, "spleen": 3, "aorta": 4},
        {"background": 0, "liver": True, "spleen": 2, "aorta": 3},
        {"background": 0, "liver": -1, "spleen": 2, "aorta": 3},
        {"background": 0, "liver": "1", "spleen": 2, "aorta": 3},
    ],
)
def test_labels_that_are_not_one_number_an_organ(labels: dict, folder: Path) -> None:
    change(folder, "dataset.json", labels=labels)
    assert refused(folder).code == "LABELS"


_PLAIN = {"background": 0, "liver": 1, "spleen": 2, "aorta": 3}


@pytest.mark.parametrize(
    ("labels", "fault", "remedy"),
    [
        (_PLAIN | {"liver": "1"}, 'got the text "1" for "liver"', "write 1 without quotation marks"),
        (_PLAIN | {"liver": "one"}, 'got the text "one" for "liver"', "write its number"),
        (_PLAIN | {"liver": 1.0}, 'got the fraction 1.0 for "liver"', "write 1 without a decimal point"),
        (_PLAIN | {"liver": 1.5}, 'got the fraction 1.5 for "liver"', "write its number"),
        (_PLAIN | {"liver": True}, 'got true for "liver"', "write its number"),
        (_PLAIN | {"liver": None}, 'got nothing for "liver"', "write its number"),
        (_PLAIN | {"liver": [1, 2]}, 'got a region of several numbers for "liver"', "export plain labels"),
        ({"Background": 0, "liver": 1, "spleen": 2, "aorta": 3}, 'in lower case, got "Background"',
         'write "background": 0'),
    ],
)
def test_slips_in_labels_are_named(labels: dict, fault: str, remedy: str, folder: Path) -> None:
    change(folder, "dataset.json", labels=labels)
    error = refused(folder)
    assert error.code == "LABELS" and fault in error.fault and error.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("keys", "fault", "remedy"),
    [
        ({"file_ending": "nii.gz"}, 'expected file_ending ".nii.gz", got "nii.gz", without its dot',
         'write "file_ending": ".nii.gz"'),
        ({"file_ending": ".NII.GZ"}, 'expected file_ending ".nii.gz", got ".NII.GZ", spelt otherwise',
         'write "file_ending": ".nii.gz"'),
        ({"file_ending": None}, "got none", "write how the names of the images end"),
        ({"file_ending": ".png"}, "got '.png'", "convert the files"),
        ({"channel_names": None}, "got none", 'write "channel_names"'),
        ({"channel_names": ["CT"]}, "got ['CT']", "keep the CT channel only"),
    ],
)
def test_slips_in_other_keys_are_named(keys: dict, fault: str, remedy: str, folder: Path) -> None:
    change(folder, "dataset.json", **keys)
    error = refused(folder)
    assert error.code == "DATASET" and fault in error.fault and error.remedy.startswith(remedy)


def test_a_key_that_version_1_has_left_is_no_harm(folder: Path) -> None:
    before = names(open_dataset(folder, small_recipe()))
    change(folder, "dataset.json", modality={"0": "CT"})
    assert names(open_dataset(folder, small_recipe())) == before
    change(folder, "dataset.json", channel_names=None)
    index = json.loads((folder / "dataset.json").read_text())
    index.pop("channel_names", None)
    (folder / "dataset.json").write_text(json.dumps(index))
    assert "version 1" in refused(folder).fault


@pytest.mark.parametrize(
    ("content", "fault", "remedy"),
    [
        ({"train": ["a"], "val": ["b"]}, "got one fold without the list around it", "put it in brackets"),
        ("a", "expected a list of folds, got a text", "write it"),
        ([["a"]], "in fold 0, got a list", "write each fold as"),
        ([{"train": "abc", "val": []}], "a list train of case names in fold 0, got a text", "correct the file"),
        ([{"train": ["a"]}], "a list val of case names in fold 0, got none", "correct the file"),
        ([{"train": [1], "val": []}], "got other values in it", "correct the file"),
        ([], "expected a fold 0, got 0 folds", "name another fold"),
        ([{"train": ["a_0000"], "val": []}], "got a_0000", "write the names of cases, without _0000"),
        ([{"train": ["a_0000.nii.gz"], "val": []}], "got a_0000.nii.gz", "write the names of cases, without _0000.nii"),
    ],
)
def test_slips_in_splits_are_named(content: Any, fault: str, remedy: str, folder: Path) -> None:
    (folder / "splits_final.json").write_text(json.dumps(content))
    error = refused(folder)
    assert error.code == "SPLITS" and fault in error.fault and error.remedy.startswith(remedy)


@pytest.mark.parametrize(
    "keys",
    [
        {"labels": {"0": "background", "1": "liver"}}, {"labels": None}, {"labels": [1]},
        {"channel_names": {"0": "CT", "1": "PET"}}, {"channel_names": None}, {"file_ending": ".png"},
        {"file_ending": None}, {"numTraining": 40},
    ],
)
def test_other_layouts(keys: dict, folder: Path) -> None:
    change(folder, "dataset.json", **keys)
    assert refused(folder).code == "DATASET"


@pytest.mark.parametrize("missing", ["", "dataset.json", "imagesTr", "labelsTr"])
def test_missing_parts_name_the_layout_and_the_way_to_it(missing: str, folder: Path) -> None:
    path = folder / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    error = refused(folder, load_recipe("btcv"))
    assert error.code == "DATASET"
    assert "autosam3d prepare btcv" in error.remedy and "img0001.nii.gz" in error.remedy
    error = refused(folder)
    assert "imagesTr/CASE_0000.nii.gz" in error.remedy and "prepare" not in error.remedy


@pytest.mark.parametrize("content", ["{", "[]", "5", "\x00", "[" * 100_000, ""])
def test_dataset_json_that_is_none(content: str, folder: Path) -> None:
    (folder / "dataset.json").write_text(content)
    assert refused(folder).code == "DATASET"


def test_scan_without_truth_and_truth_without_scan(folder: Path) -> None:
    (folder / "labelsTr/b.nii.gz").rename(folder / "labelsTr/z.nii.gz")
    assert "z" in refused(folder).fault
    (folder / "labelsTr/z.nii.gz").unlink()
    error = refused(folder)
    assert error.code == "PAIRING" and "labelsTr" in error.remedy
    (folder / "imagesTr/b_0000.nii.gz").unlink()
    change(folder, "dataset.json", numTraining=3)
    assert refused(folder).code == "SPLITS"  # which still names b


@pytest.mark.parametrize("name", ["g_0001.nii.gz", "g.nii.gz", "_0000.nii.gz"])
def test_other_channels_and_names(name: str, folder: Path) -> None:
    (folder / "imagesTr" / name).write_text("x")
    assert refused(folder).code == "DATASET"


def test_files_beside_the_images_do_not_matter(folder: Path) -> None:
    for name in ("labelsTr/a.json", "labelsTr/a.labels.txt", "imagesTr/.a_0000.nii.gz", "imagesTr/README"):
        (folder / name).write_text("x")
    assert names(open_dataset(folder, small_recipe())) == ("abc", "d", "ef")


def test_names_that_differ_in_case_only(folder: Path) -> None:
    (folder / "imagesTr/A_0000.nii.gz").write_text("other")
    (folder / "labelsTr/A.nii.gz").write_text("other")
    assert "A, a" in refused(folder).fault or "a, A" in refused(folder).fault


def test_same_name_in_training_and_test(folder: Path) -> None:
    for part in ("images", "labels"):
        end = "_0000.nii.gz" if part == "images" else ".nii.gz"
        (folder / f"{part}Ts/a{end}").write_text("another file")
    assert refused(folder).code == "LEAK"


@pytest.mark.parametrize(
    ("other", "code"), [("imagesTs/e", "LEAK"), ("imagesTr/d", "LEAK"), ("imagesTr/b", "DUPLICATE_SCAN")]
)
def test_one_scan_under_two_names(other: str, code: str, folder: Path) -> None:
    (folder / f"{other}_0000.nii.gz").write_text("scan a")
    error = refused(folder)
    assert error.code == code and "a (train)" in error.fault


def test_splits(folder: Path) -> None:
    path = folder / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["c", "b"], "val": []}]))
    cases = open_dataset(folder, small_recipe())
    assert names(cases) == ("a", "b", "ef")
    assert "2 of 4 cases" in cases.warnings[0]
    assert names(open_dataset(folder, small_recipe("dataset.fold=1"))) == ("bc", "", "ef")
    assert "got 2 folds" in refused(folder, small_recipe("dataset.fold=2")).fault


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_json(folder: Path, encoding: str) -> None:
    """As editors and shells on Windows write them."""
    path = folder / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]), encoding)
    index = folder / "dataset.json"
    index.write_text(index.read_text("utf-8"), encoding)
    assert names(open_dataset(folder, small_recipe())) == ("a", "b", "ef")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([{"train": ["a", "zz"], "val": []}], "SPLITS"), ([{"train": ["a"], "val": ["a"]}], "LEAK"),
        ([{"train": ["a", "a"], "val": []}], "LEAK"), ([{"train": [], "val": ["a"]}], "SPLITS"), ([], "SPLITS"),
        ([{"train": "abc", "val": []}], "SPLITS"), ([{"train": ["a"]}], "SPLITS"), ({"train": ["a"]}, "SPLITS"),
        ([["a"]], "SPLITS"), ([{"train": [1], "val": []}], "SPLITS"),
    ],
)
def test_splits_that_cannot_be_meant(content: Any, code: str, folder: Path) -> None:
    (folder / "splits_final.json").write_text(json.dumps(content))
    assert refused(folder).code == code


def test_without_splits_the_share_decides_the_same_way_everywhere(folder: Path) -> None:
    (folder / "splits_final.json").unlink()
    assert names(open_dataset(folder, small_recipe())) == ("abcd", "", "ef")
    cases = open_dataset(folder, small_recipe("dataset.val_share=0.3"))
    assert names(cases) == ("abc", "d", "ef")  # by SHA-256 of the name, on every machine


def test_held_out_is_stable_in_size_and_choice() -> None:
    cohort = [f"case_{i}" for i in range(100)]
    chosen = held_out(cohort, 0.1)
    assert len(chosen) == 10 and chosen == held_out(reversed(cohort), 0.1)
    assert set(held_out(cohort, 0.05)) < set(chosen)
    assert len(set(chosen) & set(held_out(cohort[:-1], 0.1))) >= 9  # one case less changes one case at most
    assert held_out(["a"], 0.5) == [] and held_out(cohort, 0.0) == []
    assert len(held_out(["a", "b"], 0.99)) == 1


def test_no_training_cases(folder: Path) -> None:
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        path.unlink()
    assert refused(folder).code == "DATASET"


def test_partial_annotation_is_refused(folder: Path) -> None:
    (folder / "annotated.json").write_text("{}")
    assert refused(folder).code == "PARTIAL_LABELS"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CT data set is not on this machine")
def test_real_head_and_neck_dataset() -> None:
    cases = open_dataset(REAL / "Dataset501_OpenKBP", load_recipe("openkbp"))
    assert [len(part) for part in (cases.train, cases.val, cases.test)] == [98, 16, 20]
    assert cases.train[0].label_table == {value: value for value in range(6)}
    assert refused(REAL / "Dataset502_OpenKBPPartial", load_recipe("openkbp")).code == "PARTIAL_LABELS"
