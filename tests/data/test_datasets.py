"""Several datasets, partly drawn: which organ is known in which case, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autosam3d.data.case import Case
from autosam3d.data.datasets import open_datasets, organ_counts
from autosam3d.data.folder import CaseSet, open_dataset, write_index
from autosam3d.errors import UsageError, VolumeError
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, recipe_from_dict
from mini_run import mini_recipe

ORGANS = ("liver", "right_kidney", "left_kidney")


def recipe(data: list[dict[str, Any]] | None = None, **labels: Any) -> Recipe:
    tree = mini_recipe().as_dict()
    tree["model"].pop("num_outputs")
    tree["labels"] = {"organs": list(ORGANS), "side_pairs": [["right_kidney", "left_kidney"]], **labels}
    tree["dataset"]["background_organs"] = []
    tree["dataset"]["val_share"] = 0.0
    return recipe_from_dict(tree | ({"data": data} if data else {}))


def make(folder: Path, cases: str, organs: tuple[str, ...] = ORGANS, val: str = "", scans: str | None = None) -> Path:
    """A dataset whose files hold their names; `scans` are those that have an image, all by default."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name in cases:
        (folder / "labelsTr" / f"{name}.nii.gz").write_text(f"truth {name} {folder.name}")
    for name in cases if scans is None else scans:
        (folder / "imagesTr" / f"{name}_0000.nii.gz").write_text(f"scan {name}")
    write_index(folder, LabelMap(organs=organs), [c for c in cases if c not in val], list(val), "test")
    change(folder, numTraining=len(cases if scans is None else scans))
    return folder


def change(folder: Path, **keys: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def by_name(cases: CaseSet) -> dict[str, Case]:
    return {case.name: case for case in (*cases.train, *cases.val)}


def refused(folders: list[str | Path], plan: Recipe, code: str, *words: str) -> None:
    with pytest.raises((VolumeError, UsageError)) as caught:
        open_datasets(folders, plan)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_one_fully_drawn_dataset_is_what_it_always_was(tmp_path: Path) -> None:
    folder = make(tmp_path / "one", "abc", val="c")
    assert open_datasets([folder], recipe()) == open_dataset(folder, recipe())


def test_annotated_json_says_what_is_known_in_each_case(tmp_path: Path) -> None:
    folder = make(tmp_path / "one", "abcd")
    listed = {"a": list(ORGANS), "b": ["liver"], "c": ["left_kidney", "liver"], "d": []}
    (folder / "annotated.json").write_text(json.dumps(listed))
    cases = by_name(open_datasets([folder], recipe()))
    assert cases["a"].drawn is None and cases["a"].label_table == {0: 0, 1: 1, 2: 2, 3: 3}
    assert cases["b"].drawn == {1} and cases["b"].label_table == {0: 0, 1: 1, 2: 0, 3: 0}
    assert cases["c"].drawn == {1, 3}
    assert "d" not in cases  # nothing was looked for: it cannot teach
    (folder / "annotated.json").rename(tmp_path / "list.json")
    change(folder, present=listed)
    assert by_name(open_datasets([folder], recipe())) == cases
    change(folder, present=["liver"])
    assert {case.drawn for case in open_datasets([folder], recipe()).train} == {frozenset({1})}
    with pytest.raises(VolumeError, match="expected every organ drawn in every case"):
        open_dataset(folder, recipe())


@pytest.mark.parametrize(("listed", "words"), [
    ({"a": ["liver"]}, ("case b", "got none")), ({"a": ["liver"], "b": ["livre"]}, ("case b", "livre", "write liver")),
    ({"a": "liver", "b": []}, ("a list of organs for each case",)), (7, ("a list of organs for each case",)),
    ({"a": [1], "b": []}, ("a list of organs for each case",)),
])
def test_lists_that_say_something_else(tmp_path: Path, listed: Any, words: tuple[str, ...]) -> None:
    folder = make(tmp_path / "one", "ab")
    (folder / "annotated.json").write_text(json.dumps(listed))
    refused([folder], recipe(), "PARTIAL_LABELS", "annotated.json", *words)


def test_what_a_dataset_does_not_draw_is_unknown_in_it(tmp_path: Path) -> None:
    livers, all_of_them = make(tmp_path / "livers", "ab", ("liver",)), make(tmp_path / "whole", "bc", val="c")
    (livers / "imagesTr" / "b_0000.nii.gz").write_text("another scan of the same name")
    cases = open_datasets([livers, all_of_them], recipe())
    assert [(case.name, case.drawn, case.source) for case in (*cases.train, *cases.val)] == [
        ("a", {1}, "livers"), ("livers/b", {1}, "livers"), ("whole/b", None, "whole"), ("c", None, "whole")]
    assert organ_counts(cases.train, recipe(), "") == {
        "liver": {"livers": 2, "whole": 1}, "right_kidney": {"whole": 1}, "left_kidney": {"whole": 1}}
    assert cases.folders == (livers, all_of_them)


def test_names_of_a_dataset_are_mapped_and_its_weight_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "one", "a", ("hepar", "kidney_r", "spleen"))
    plan = recipe([{"name": "mine", "weight": 2.5,
                    "organs": {"hepar": "liver", "kidney_r": "right_kidney", "spleen": "background"}}])
    [case] = open_datasets([f"mine={folder}"], plan).train
    assert case.label_table == {0: 0, 1: 1, 2: 2, 3: 0} and case.drawn == {1, 2} and case.weight == 2.5
    assert open_datasets([folder], plan).train == (case,)
    plan = recipe([{"name": "mine", "path": str(folder), "drawn": ["hepar"],
                    "organs": {"hepar": "liver", "kidney_r": "right_kidney", "spleen": "background"}}])
    [case] = open_datasets([], plan).train
    assert case.drawn == {1} and case.label_table == {0: 0, 1: 1, 2: 0, 3: 0}


def test_kidneys_drawn_as_one_are_a_super_class(tmp_path: Path) -> None:
    folder = make(tmp_path / "one", "a", ("liver", "kidneys"))
    plan = recipe([{"name": "one"}], super_classes={"kidneys": ["right_kidney", "left_kidney"]})
    [case] = open_datasets([folder], plan).train
    assert case.label_table == {0: 0, 1: 1, 2: 4} and case.drawn == {1, 4}
    change(folder, labels={"background": 0, "kidneys": 1, "right_kidney": 2})
    refused([folder], plan, "LABELS", "case a", "kidneys", "right_kidney")


def test_a_label_map_without_a_scan_adds_its_organs_to_the_scan_of_another_dataset(tmp_path: Path) -> None:
    scans = make(tmp_path / "scans", "abc", ("liver",), val="c")
    more = make(tmp_path / "more", "abcd", scans="d")
    (more / "annotated.json").write_text(json.dumps({"a": list(ORGANS), "b": ["liver"], "c": list(ORGANS), "d": []}))
    cases = open_datasets([scans, more], recipe())
    found = by_name(cases)
    assert found["a"].drawn is None and found["a"].label_path == more / "labelsTr/a.nii.gz"
    assert found["a"].image_path == scans / "imagesTr/a_0000.nii.gz"
    assert found["b"].drawn == {1} and found["b"].label_path == scans / "labelsTr/b.nii.gz"
    assert [case.name for case in cases.val] == ["c"] and found["c"].drawn is None
    (scans / "imagesTr/b_0000.nii.gz").unlink()
    (scans / "labelsTr/b.nii.gz").unlink()
    (scans / "splits_final.json").unlink()
    change(scans, numTraining=2)
    refused([scans, more], recipe(), "PAIRING", "1, the first of them b")


def test_label_maps_of_one_scan_that_each_draw_their_own_are_refused(tmp_path: Path) -> None:
    scans = make(tmp_path / "scans", "a", ("liver",))
    more = make(tmp_path / "more", "ab", ("right_kidney",), scans="b")
    refused([scans, more], recipe(), "LABELS", "case a", "scans", "more")


def test_what_the_datasets_must_not_be(tmp_path: Path) -> None:
    one, copy = make(tmp_path / "one", "ab", val="b"), make(tmp_path / "copy", "bc")
    refused([one, copy], recipe(), "LEAK", "the same file as")
    spleens = make(tmp_path / "spleens", "d", ("spleen",))
    refused([one, spleens], recipe(), "LABELS", "organs: {spleen: ORGAN or background}")
    refused([f"two={one}"], recipe(), "DATA", "two=")
    refused([f"tow={one}"], recipe([{"name": "two"}]), "DATA", f"write two={one}")
    refused([one, copy], recipe([{"name": "two"}]), "DATA", "NAME=FOLDER for each")
    refused([], recipe([{"name": "two"}]), "DATA", "--data two=FOLDER")
    refused([], recipe(), "DATA", "--data FOLDER")
    refused([one], recipe([{"name": "one", "organs": {"livre": "liver"}}]), "LABELS", "livre", "write liver")
    refused([one], recipe([{"name": "one", "drawn": ["livre"]}]), "PARTIAL_LABELS", "livre")
    refused([one], recipe([{"name": "one", "organs": {"right_kidney": "background", "left_kidney": "right_kidney",
                                                      "liver": "right_kidney"}}]), "LABELS", "for the same")
    refused([one], recipe([{"name": "one", "organs": dict.fromkeys(ORGANS, "background")}]), "LABELS", "liver")


def test_real_partly_drawn_cases(tmp_path: Path) -> None:
    real = Path(__file__).resolve().parents[2] / "../shared/data"
    if not real.is_dir():
        pytest.skip("the real scans are not here")
    tree = mini_recipe().as_dict()
    tree["model"].pop("num_outputs")
    organs = ["brainstem", "spinal_cord", "parotid_right", "parotid_left", "mandible", "esophagus", "larynx"]
    tree["labels"] = {"organs": organs, "side_pairs": [["parotid_right", "parotid_left"]]}
    plan = recipe_from_dict(tree)
    cases = open_datasets([real / "Dataset501_OpenKBP", real / "Dataset502_OpenKBPPartial"], plan)
    assert (len(cases.train), len(cases.val), len(cases.test)) == (170, 33, 20)
    counts = organ_counts(cases.train, plan, "")
    assert counts["mandible"] == {"Dataset501_OpenKBP": 98, "Dataset502_OpenKBPPartial": 14}
    assert counts["esophagus"] == {"Dataset501_OpenKBP": 36, "Dataset502_OpenKBPPartial": 20}
    assert sum(case.drawn is None for case in cases.train) == 30
