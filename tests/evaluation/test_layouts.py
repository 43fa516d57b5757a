"""Where label maps may lie: in one folder, a folder a case, and a mask file an organ, on either side."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autosam3d.errors import UsageError, VolumeError
from autosam3d.evaluation.evaluate import evaluate_folder, read_pair
from autosam3d.evaluation.report import write_evaluation
from autosam3d.evaluation.scores import Evaluation

ORGANS = {1: "liver", 2: "spleen"}
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def labels_of(case: int, shift: int = 0) -> np.ndarray:
    """A liver of 4 x 8 x 8 voxels and a spleen of 4 x 4 x 4, both moved by `shift` voxels of the x axis."""
    labels = np.zeros((20, 16, 12), np.uint8)
    labels[2 + shift : 6 + shift, 2:10, 2:10] = 1
    labels[12 + shift : 16 + shift, 2 + case : 6 + case, 2:6] = 2
    return labels


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), path)


def write(root: Path, layout: str, shift: int = 0) -> Path:
    for case in range(3):
        labels, name = labels_of(case, shift), f"s{case}"
        match layout:
            case "flat":
                save(root / f"{name}.nii.gz", labels)
            case "folders":
                save(root / name / "seg.nii.gz", labels)
                save(root / name / "ct.nii.gz", labels * 7)
            case "deep":
                save(root / name / "labels" / "combined.nii.gz", labels)
            case "segmentations":
                save(root / name / "ct.nii.gz", labels * 7)
                for value, organ in ORGANS.items():
                    save(root / name / "segmentations" / f"{organ}.nii.gz", (labels == value) * 255)
            case "masks":
                for value, organ in ORGANS.items():
                    save(root / name / f"{organ}.nii.gz", labels == value)
    return root


def scores(result: Evaluation) -> dict[tuple[str, str], float | None]:
    return {(case.name, score.organ): score.dice for case in result.cases for score in case.scores}


@pytest.mark.parametrize("truth", ["flat", "folders", "deep", "segmentations", "masks"])
@pytest.mark.parametrize("prediction", ["flat", "folders", "segmentations", "masks"])
def test_every_layout_gives_the_same_scores(prediction: str, truth: str, tmp_path: Path) -> None:
    predictions = write(tmp_path / "predictions", prediction, shift=1)
    result = evaluate_folder(predictions, write(tmp_path / "truth", truth), labels=ORGANS)
    # Moved by one of four voxels: three of four are shared.
    assert scores(result) == {(f"s{c}", organ): pytest.approx(0.75) for c in range(3) for organ in ORGANS.values()}
    assert not result.missing and not result.extra


def test_masks_name_their_organs_themselves(tmp_path: Path) -> None:
    truth = write(tmp_path / "truth", "segmentations")
    predictions = write(tmp_path / "predictions", "masks", shift=1)
    for path in (predictions / "s1/spleen.nii.gz", truth / "s2/segmentations/spleen.nii.gz"):
        path.unlink()
    result = evaluate_folder(predictions, truth)
    assert [case.scores[0].organ for case in result.cases] == ["liver"] * 3
    found = scores(result)
    assert found["s0", "spleen"] == pytest.approx(0.75)
    assert found["s1", "spleen"] == 0  # other cases have such a mask, so this one was not found
    assert ("s2", "spleen") not in found  # nobody has drawn it there
    (tmp_path / "out").mkdir()
    write_evaluation(result, tmp_path / "out")
    assert "no picture" not in (tmp_path / "out/report.html").read_text()
    assert result.cases[0].ct_path == truth / "s0/ct.nii.gz"


def test_one_case_on_each_side_may_be_called_anything(tmp_path: Path) -> None:
    truth = write(tmp_path / "truth", "segmentations") / "s0/segmentations"
    file = write(tmp_path / "flat", "flat", shift=1) / "s0.nii.gz"
    masks = write(tmp_path / "predictions", "masks", shift=1) / "s0"
    for prediction in (file, masks):
        result = evaluate_folder(prediction, truth, labels=ORGANS)
        assert [score.dice for score in result.cases[0].scores] == [pytest.approx(0.75)] * 2, prediction
        assert len(result.cases) == 1
    with pytest.raises(UsageError, match="two files or two folders"):
        evaluate_folder(file, tmp_path / "flat", labels=ORGANS)


def test_a_mask_holds_one_value_and_lies_on_the_grid_of_the_others(tmp_path: Path) -> None:
    truth = write(tmp_path / "truth", "segmentations")
    predictions = write(tmp_path / "predictions", "flat")
    save(truth / "s1/segmentations/spleen.nii.gz", labels_of(1))
    with pytest.raises(VolumeError, match="values 1, 2") as caught:
        evaluate_folder(predictions, truth, labels=ORGANS)
    assert caught.value.code == "NOT_MASK" and caught.value.where == str(truth / "s1/segmentations/spleen.nii.gz")
    save(truth / "s1/segmentations/spleen.nii.gz", labels_of(1) == 2, AFFINE + np.eye(4, k=3))
    with pytest.raises(VolumeError) as caught:
        evaluate_folder(predictions, truth, labels=ORGANS)
    assert caught.value.code == "AFFINE_MISMATCH"
    save(truth / "s1/segmentations/spleen.nii.gz", labels_of(1) == 1)
    result = evaluate_folder(predictions, truth, labels=ORGANS)
    assert "truth: 256 voxels are in several masks and count for the last of them by name" in result.cases[1].warnings


def test_pictures_of_nested_truth_have_the_numbers_of_dataset_json(tmp_path: Path) -> None:
    truth = write(tmp_path / "data/labelsTr", "folders")
    for path in truth.rglob("seg.nii.gz"):
        save(path, np.array([0, 2, 1], np.uint8)[np.asarray(nib.load(path).dataobj).astype(int)])
    (tmp_path / "data/dataset.json").write_text('{"labels": {"background": 0, "spleen": 1, "liver": 2}}')
    result = evaluate_folder(write(tmp_path / "predictions", "flat"), truth, labels=ORGANS)
    assert set(scores(result).values()) == {1.0}
    prediction, true = read_pair(result.cases[0], result.organs, truth_folder=truth)
    np.testing.assert_array_equal(prediction.labels, true.labels)


def test_folders_of_cases_are_no_folders_of_masks(tmp_path: Path) -> None:
    for root, shift in (("truth", 0), ("predictions", 1)):
        for site in ("north", "south"):
            for case in range(2):
                save(tmp_path / root / site / f"{site[0]}{case}.nii.gz", labels_of(case, shift))
    result = evaluate_folder(tmp_path / "predictions", tmp_path / "truth", labels=ORGANS)
    assert [case.name for case in result.cases] == ["north_n0", "north_n1", "south_s0", "south_s1"]
    assert [score.dice for case in result.cases for score in case.scores] == [pytest.approx(0.75)] * 8
