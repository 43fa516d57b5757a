"""Folders in, scores and files out: pairing, grids, names, means, and what is written."""

from __future__ import annotations

import csv
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autosam3d.errors import UsageError, VolumeError
from autosam3d.evaluation.evaluate import _values, case_name, evaluate_folder, read_pair, write_csv, write_json
from autosam3d.evaluation.metrics import ABSENT_RULE, OrganScore
from autosam3d.evaluation.scores import CaseResult, Evaluation, organ_scores, read_json
from autosam3d.evaluation.statistics import estimate
from autosam3d.io import read_segmentation, write_segmentation
from autosam3d.labels import LabelMap
from command_line import run

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
ORGANS = LabelMap(organs=("liver", "spleen"))


def label_map(left: int = 0) -> np.ndarray:
    """uint8 in the file's order (x, y, z): two boxes, the first one moved by `left` voxels."""
    labels = np.zeros((24, 20, 14), np.uint8)
    labels[4 + left : 12 + left, 5:15, 3:10] = 1
    labels[17:21, 5:15, 3:10] = 2
    return labels


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    truth, predictions = tmp_path / "data" / "labelsTs", tmp_path / "predictions"
    for i in range(3):
        save(truth / f"case_{i}.nii.gz", label_map())
        save(predictions / f"case_{i}.nii.gz", label_map(left=i))
    return predictions, truth


def test_a_folder_is_scored_case_by_case(folders):
    seen = []
    result = evaluate_folder(*folders, labels=ORGANS, tolerances_mm=(1, 2), progress=lambda *step: seen.append(step))
    assert [case.name for case in result.cases] == ["case_0", "case_1", "case_2"]
    assert [[s.dice for s in case.scores] for case in result.cases] == [[1, 1], [7 / 8, 1], [6 / 8, 1]]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    summary = result.summary()
    assert summary.dice is not None
    assert summary.dice.mean == pytest.approx((1 + 15 / 16 + 7 / 8) / 3)
    assert summary.dice.low <= summary.dice.mean <= summary.dice.high
    assert result.cases[1].spacing_mm == (3, 2, 2)
    assert summary.organs[0].dice.mean == pytest.approx(7 / 8)
    assert "3 cases: Dice 0.9375" in str(summary)


def test_two_files_are_one_case_whatever_their_names(folders, tmp_path):
    predictions, truth = folders
    result = evaluate_folder(predictions / "case_2.nii.gz", truth / "case_1.nii.gz", labels=ORGANS)
    assert [case.name for case in result.cases] == ["case_1"]
    assert result.cases[0].dice == pytest.approx(7 / 8)
    assert result.summary().dice.low is None
    with pytest.raises(UsageError, match="two files or two folders"):
        evaluate_folder(predictions, truth / "case_1.nii.gz")
    with pytest.raises(VolumeError, match="got nothing"):
        evaluate_folder(tmp_path / "absent", truth)


def test_the_axes_of_the_file_do_not_matter(folders):
    """The same voxels stored in another order and direction are the same segmentation."""
    predictions, truth = folders
    turned = nib.as_closest_canonical(nib.load(truth / "case_0.nii.gz")).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIL")))
    nib.save(turned, predictions / "case_0.nii.gz")
    assert evaluate_folder(*folders, labels=ORGANS).cases[0].dice == 1


def test_names_pair_as_nnunet_writes_them(folders):
    predictions, _ = folders
    (predictions / "case_0.nii.gz").rename(predictions / "case_0_0000.nii.gz")
    assert len(evaluate_folder(*folders, labels=ORGANS).cases) == 3
    assert [case_name(n) for n in ("a.nii", "b_0000.NII.GZ", "c.d_0001.nii.gz")] == ["a", "b", "c.d_0001"]
    save(predictions / "case_0.nii", label_map())
    with pytest.raises(UsageError, match="one file for a case") as caught:
        evaluate_folder(*folders, labels=ORGANS)
    assert caught.value.code == "DUP_CASE"


def test_missing_and_extra_predictions_are_listed(folders):
    predictions, _ = folders
    (predictions / "case_1.nii.gz").rename(predictions / "other.nii.gz")
    result = evaluate_folder(*folders, labels=ORGANS)
    assert (result.missing, result.extra) == (("case_1",), ("other",))
    summary = result.summary()
    assert summary.dice.mean == pytest.approx((1 + 7 / 8) / 2)
    assert summary.dice_missing_as_zero == pytest.approx((1 + 7 / 8) / 3)
    assert "1 case without a prediction" in str(summary)
    for path in predictions.iterdir():
        path.rename(predictions / f"x{path.name}")
    with pytest.raises(VolumeError) as caught:
        evaluate_folder(*folders, labels=ORGANS)
    assert caught.value.code == "NO_PAIRS"


@pytest.mark.parametrize(
    ("labels", "affine", "code"),
    [
        (label_map()[:-1], AFFINE, "SHAPE"),
        (label_map(), AFFINE + 0.2 * np.eye(4, k=3), "AFFINE_MISMATCH"),
        (np.where(label_map() == 2, 3, label_map()).astype(np.uint8), AFFINE, "LABEL_RANGE"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(folders, labels, affine, code):
    predictions, _ = folders
    save(predictions / "case_1.nii.gz", labels, affine)
    with pytest.raises(VolumeError, match="case_1") as caught:
        evaluate_folder(*folders, labels=ORGANS)
    assert caught.value.code == code


def test_an_affine_that_differs_by_rounding_is_the_same_grid(folders):
    predictions, _ = folders
    save(predictions / "case_1.nii.gz", label_map(), AFFINE + 1e-4 * np.eye(4, k=3))
    assert evaluate_folder(*folders, labels=ORGANS).cases[1].dice == 1


@pytest.mark.parametrize("ending", [".seg.nrrd", ".mha"])
def test_truth_may_be_of_another_format(folders, ending):
    truth = folders[1]
    image = sitk.ReadImage(str(truth / "case_0.nii.gz"))
    sitk.WriteImage(image, str(truth / f"case_0{ending}"), useCompression=True)
    (truth / "case_0.nii.gz").unlink()
    result = evaluate_folder(*folders, labels=ORGANS)
    assert (result.cases[0].name, result.cases[0].dice, len(result.cases)) == ("case_0", 1, 3)


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_a_grid_that_lies_a_hundredth_of_a_voxel_off_is_taken_and_the_number_said(folders, share):
    """Headers round: 3.0003 mm for 3, an origin by a fiftieth of a millimetre."""
    predictions, _ = folders
    moved = AFFINE.copy()
    moved[0, 3] += share * np.linalg.norm(AFFINE[:3, :3], axis=0).min()
    save(predictions / "case_1.nii.gz", label_map(), moved)
    case = evaluate_folder(*folders, labels=ORGANS).cases[1]
    assert case.dice == 1
    (warning,) = case.warnings
    assert warning == f"prediction: its grid lies {share:.2g} voxels off that of the truth; it is taken as the same"


def test_beyond_a_twentieth_of_a_voxel_the_number_is_said(folders):
    predictions, _ = folders
    moved = AFFINE.copy()
    moved[0, 3] += 0.3 * np.linalg.norm(AFFINE[:3, :3], axis=0).min()
    save(predictions / "case_1.nii.gz", label_map(), moved)
    with pytest.raises(VolumeError, match=r"0\.3 voxels off \(up to 0\.05 would be taken\)"):
        evaluate_folder(*folders, labels=ORGANS)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_dataset_json_may_have_a_byte_order_mark(folders, encoding):
    _, truth = folders
    index = json.dumps({"labels": {"background": 0, "Leber größer": 1, "spleen": 2}}, ensure_ascii=False)
    (truth.parent / "dataset.json").write_text(index, encoding)
    assert evaluate_folder(*folders).organs == {1: "Leber größer", 2: "spleen"}


def test_organs_come_from_dataset_json_or_are_numbers(folders):
    _, truth = folders
    assert evaluate_folder(*folders).organs == {1: "label 1", 2: "label 2"}
    index = truth.parent / "dataset.json"
    index.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    assert evaluate_folder(*folders).organs == {1: "liver", 2: "spleen"}
    index.write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    assert evaluate_folder(*folders).organs == {1: "liver", 2: "spleen"}
    index.write_text(json.dumps({"labels": {"whole": [1, 2]}}))
    with pytest.raises(VolumeError, match="one number for each organ"):
        evaluate_folder(*folders)


def test_the_organs_given_beat_a_dataset_json_that_cannot_be_used(folders):
    _, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 2]}}))
    result = evaluate_folder(*folders, labels=ORGANS)
    assert [case.dice for case in result.cases] == pytest.approx([1, 15 / 16, 7 / 8])
    assert any("dataset.json is not used" in warning for warning in result.warnings)


@pytest.mark.parametrize("given", [{1: "aorta", 2: "stomach"}, None])
def test_sides_that_share_no_organ_are_refused(folders, given):
    predictions, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    if given is None:
        write_segmentation(predictions / "case_0.nii.gz", read_segmentation(predictions / "case_0.nii.gz"),
                           LabelMap(organs=("aorta", "stomach")))
    with pytest.raises(VolumeError, match=r"aorta, stomach\), got liver, spleen") as caught:
        evaluate_folder(*folders, labels=given)
    assert caught.value.code == "LABELS"


def test_truth_without_organs_is_said(folders, caplog):
    _, truth = folders
    save(truth / "case_1.nii.gz", np.zeros_like(label_map()))
    result = evaluate_folder(*folders, labels=ORGANS)
    assert "the truth of 1 case shows none of the organs: case_1" in result.warnings
    assert "the truth of 1 case shows none of the organs: case_1" in caplog.text


def test_a_tolerance_that_is_named_twice_is_one(folders):
    result = evaluate_folder(*folders, labels=ORGANS, tolerances_mm=(2, 1, 2.0, 1))
    assert result.tolerances_mm == (2.0, 1.0)
    assert [len(score.nsd) for score in result.cases[0].scores] == [2, 2]


def test_sides_with_names_are_matched_by_name_not_by_number(folders):
    _, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Spleen": 1, "liver": 2}}))
    for i in range(3):
        save(truth / f"case_{i}.nii.gz", np.array([0, 2, 1], np.uint8)[label_map()])
    result = evaluate_folder(*folders, labels=ORGANS)
    assert [case.dice for case in result.cases] == pytest.approx([1, 15 / 16, 7 / 8])
    prediction, true = read_pair(result.cases[0], result.organs)
    np.testing.assert_array_equal(prediction.labels, true.labels)


def test_organs_that_the_truth_does_not_draw_are_not_false_positives(folders):
    _, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    for i in range(3):
        save(truth / f"case_{i}.nii.gz", (label_map() == 1).astype(np.uint8))
    result = evaluate_folder(*folders, labels=ORGANS)
    assert result.organs == {1: "liver"}
    assert result.summary().num_false_positives == 0
    assert any("spleen" in warning for warning in result.warnings)


def test_annotated_json_keeps_unknown_truth_out(folders):
    _, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    (truth.parent / "annotated.json").write_text(json.dumps({"case_1": ["liver"]}))
    save(truth / "case_1.nii.gz", (label_map() == 1).astype(np.uint8))
    result = evaluate_folder(*folders)
    assert [s.organ for s in result.cases[1].scores] == ["liver"]
    assert result.cases[1].not_annotated == ("spleen",)
    assert result.summary().num_false_positives == 0


def test_a_declared_ignore_label_counts_for_nobody(folders):
    _, truth = folders
    (truth.parent / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}}))
    labels = label_map()
    labels[12:14] = 3  # where the third prediction spills over
    save(truth / "case_2.nii.gz", labels)
    result = evaluate_folder(*folders)
    assert result.organs == {1: "liver", 2: "spleen"}
    assert result.cases[2].scores[0].dice == pytest.approx(2 * 6 / (6 + 8))


def test_scans_are_found_beside_the_truth_or_where_said(folders, tmp_path):
    _, truth = folders
    scan = save(truth.parent / "imagesTs" / "case_1_0000.nii.gz", label_map())
    assert [case.ct_path for case in evaluate_folder(*folders, labels=ORGANS).cases] == [None, scan, None]
    elsewhere = save(tmp_path / "ct" / "case_0.nii.gz", label_map())
    result = evaluate_folder(*folders, labels=ORGANS, ct_folder=tmp_path / "ct")
    assert [case.ct_path for case in result.cases] == [elsewhere, None, None]
    with pytest.raises(VolumeError, match="folder of scans"):
        evaluate_folder(*folders, labels=ORGANS, ct_folder=tmp_path / "absent")


def organ_score(
    organ: str, status: str = "scored", dice: float | None = 0.5, hd95_mm: float | None = 2.0
) -> OrganScore:
    nsd = () if dice is None else (dice,)
    return OrganScore(label={"liver": 1, "spleen": 2}[organ], organ=organ, status=status, dice=dice, nsd=nsd,
                      hd95_mm=hd95_mm, truth_ml=10.0, prediction_ml=12.0)


def evaluation(*cases: tuple[OrganScore, ...]) -> Evaluation:
    return Evaluation(
        cases=tuple(CaseResult(name=f"c{i}", scores=scores, shape=(9, 9, 9), spacing_mm=(1, 1, 1),
                               prediction_path=Path("p"), truth_path=Path("t")) for i, scores in enumerate(cases)),
        organs={1: "liver", 2: "spleen"}, tolerances_mm=(1.0,), predictions=Path("p"), truth=Path("t"),
    )


def test_means_go_over_organs_first_and_cases_then():
    summary = evaluation(
        (organ_score("liver", dice=0.9), organ_score("spleen", dice=0.5)),
        (organ_score("liver", dice=0.1),),
    ).summary()
    assert summary.dice.mean == pytest.approx((0.7 + 0.1) / 2)  # not (0.9 + 0.5 + 0.1) / 3
    assert [organ.dice.mean for organ in summary.organs] == pytest.approx([0.5, 0.5])


def test_missed_organs_weigh_on_dice_and_false_positives_on_nothing():
    summary = evaluation(
        (organ_score("liver", dice=0.8, hd95_mm=4.0), organ_score("spleen", "missed", 0.0, math.inf)),
        (organ_score("liver", dice=0.6, hd95_mm=2.0), organ_score("spleen", "false_positive", None, None)),
    ).summary()
    assert summary.dice.mean == pytest.approx((0.4 + 0.6) / 2)
    assert summary.hd95_mm.mean == pytest.approx(3.0)
    assert (summary.num_missed_organs, summary.num_false_positives, summary.false_positive_ml) == (1, 1, 12.0)
    spleen = summary.organs[1]
    assert (spleen.num_in_truth, spleen.num_missed, spleen.num_false_positive, spleen.hd95_mm) == (1, 1, 1, None)


def test_bootstrap_interval():
    """Of a normal sample it is near the textbook interval; it is the same in every run; one case has none."""
    values = np.random.default_rng(4).normal(0.8, 0.05, 200)
    found = estimate(list(values))
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)
    assert estimate(list(values)) == found
    assert estimate([0.3, math.nan]) == estimate([0.3])
    assert estimate([0.3]).low is None
    assert estimate([]) is None
    assert (estimate([0.5] * 4).low, estimate([0.5] * 4).high) == (0.5, 0.5)


def test_csv_has_one_row_for_each_organ_of_each_case(tmp_path):
    scores = evaluation(
        (organ_score("liver"), organ_score("spleen", "missed", 0.0, math.inf)),
        (organ_score("spleen", "false_positive", None, None),),
    )
    write_csv(scores, tmp_path / "scores.csv")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [(r["case"], r["organ"], r["status"]) for r in rows] == [
        ("c0", "liver", "scored"), ("c0", "spleen", "missed"), ("c1", "spleen", "false_positive")]
    assert (float(rows[0]["dice"]), float(rows[0]["nsd_1mm"]), float(rows[0]["volume_error_percent"])) == (0.5, 0.5, 20)
    assert math.isinf(float(rows[1]["hd95_mm"]))
    assert (rows[2]["dice"], rows[2]["nsd_1mm"], rows[2]["prediction_ml"]) == ("", "", "12.000000")


def test_json_round_trip(folders, tmp_path):
    result = evaluate_folder(*folders, labels=ORGANS, tolerances_mm=(1.0, 2.0))
    missed = replace(result.cases[0], scores=(organ_score("liver", "missed", 0.0, math.inf),
                                              organ_score("spleen", "false_positive", None, None)))
    for some in (result, replace(result, cases=(missed,), missing=("x",), tolerances_mm=(1.0,))):
        write_json(some, tmp_path / "scores.json")
        assert read_json(tmp_path / "scores.json") == some
    tree = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert tree["rules"]["absent_organs"] == ABSENT_RULE
    assert tree["settings"]["bootstrap"] == {"level": 0.95, "resamples": 10000, "seed": 0}
    assert set(tree["versions"]) >= {"autosam3d", "numpy", "scipy"}
    assert tree["summary"]["num_missed_organs"] == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "autosam3d-evaluation", "version": 99}', "null"])
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(VolumeError) as caught:
        read_json(tmp_path / "scores.json")
    assert caught.value.code == "EVALUATION"


def without_orientation(path: Path) -> None:
    """Leave the spacing, and neither of the two transforms."""
    image = nib.load(path)
    image.header.set_qform(None, 0)
    image.header.set_sform(None, 0)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)


def test_files_that_segment_reads_with_an_option_are_evaluated_with_it(folders, tmp_path):
    """Truth, prediction and CT without orientation: refused as they are, all three read with --assume-ras."""
    predictions, truth = folders
    ct = np.where(label_map() > 0, 60, -900).astype(np.int16)
    for i in range(3):
        for path in (predictions / f"case_{i}.nii.gz", truth / f"case_{i}.nii.gz",
                     save(truth.with_name("imagesTs") / f"case_{i}_0000.nii.gz", ct)):
            without_orientation(path)
    out = tmp_path / "out"
    line = run("evaluate", predictions, truth, "--out", out, cwd=tmp_path).demand_error("NO_ORIENTATION", 3)
    assert "--assume-ras" in line and not out.exists()
    done = run("evaluate", predictions, truth, "--out", out, "--assume-ras", cwd=tmp_path)
    assert done.code == 0 and "3 cases: Dice 0.9375" in done.out
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg") == 9 and "window -160 to 240 HU" in page and "could not be read" not in page
    done = run("evaluate", predictions, truth, "--prefer", "bogus", cwd=tmp_path)
    assert "--prefer bogus" in done.demand_error("USAGE", 2)


def test_force_and_prefer_reach_the_readers_of_an_evaluation(folders, tmp_path):
    for folder in folders:
        save(folder / "case_0.nii.gz", label_map(), np.diag([2.0, 2.0, 25.0, 1.0]))
    assert "--force" in run("evaluate", *folders, "--out", tmp_path / "a").demand_error("SPACING", 3)
    assert run("evaluate", *folders, "--out", tmp_path / "a", "--force").code == 0
    for folder in folders:
        image = nib.load(save(folder / "case_0.nii.gz", label_map()))
        image.header.set_qform(AFFINE, 1)
        image.header.set_sform(np.diag([-2.0, 2.0, 3.0, 1.0]), 1)  # turned round, unlike the qform
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), folder / "case_0.nii.gz")
    done = run("evaluate", *folders, "--out", tmp_path / "b")
    assert done.code == 3 and "--prefer" in done.err
    assert run("evaluate", *folders, "--out", tmp_path / "b", "--prefer", "qform").code == 0


@pytest.mark.parametrize("shape", [(30, 40, 50), (0, 4, 4), (3, 0, 2)])
def test_values_of_a_label_map_are_found_without_room_for_all_voxels(shape):
    labels = np.random.default_rng(0).choice([0, 3, 250], shape).astype(np.uint8)
    assert list(_values(labels)) == sorted(set(labels.ravel().tolist()))
    labels = np.zeros((400, 64, 64), np.uint8)
    tracemalloc.start()
    _values(labels)
    assert tracemalloc.get_traced_memory()[1] < 400 * 64 * 64
    tracemalloc.stop()


def test_real_truth_against_itself_is_perfect(real_data, tmp_path):
    truth = real_data / "Dataset501_OpenKBP" / "labelsTs"
    path = sorted(truth.glob("*.nii.gz"))[0]
    result = evaluate_folder(path, path)
    assert list(result.organs.values()) == ["brainstem", "spinal_cord", "parotid_right", "parotid_left", "mandible"]
    assert result.summary().dice.mean == 1
    assert all(score.truth_ml > 1 for score in result.cases[0].scores)


def test_scores_by_case_and_organ_are_what_the_files_say(folders, tmp_path):
    """For paired tests: organs of the truth with a missed one as 0, no false positive, from the JSON as from memory."""
    predictions, truth = folders
    missed, false = label_map(), label_map()
    missed[missed == 2] = 0
    save(predictions / "case_1.nii.gz", missed)
    false[false == 1] = 0
    save(truth / "case_2.nii.gz", false)
    result = evaluate_folder(predictions, truth, labels=ORGANS, tolerances_mm=(1, 2))
    write_json(result, tmp_path / "scores.json")
    dice = organ_scores(result, "dice")
    assert dice == {("case_0", "liver"): 1, ("case_0", "spleen"): 1, ("case_1", "liver"): 1, ("case_1", "spleen"): 0,
                    ("case_2", "spleen"): 1}
    assert organ_scores(read_json(tmp_path / "scores.json"), "dice") == dice
    nsd = organ_scores(result, "nsd", 2)
    assert nsd[("case_1", "spleen")] == 0 and set(nsd) == set(dice)
    with pytest.raises(UsageError, match="expected an evaluation with NSD at 5 mm, got one at 1, 2"):
        organ_scores(result, "nsd", 5)
