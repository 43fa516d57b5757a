"""Scans that nobody labelled, and several teachers: who speaks of what, what is left out, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import command_line
from autosam3d.data.cache import cache_cases
from autosam3d.data.case import Case
from autosam3d.data.crops import CropDataset
from autosam3d.data.datasets import open_datasets
from autosam3d.data.unlabelled import with_unlabelled
from autosam3d.errors import CheckpointError, UsageError, VolumeError
from autosam3d.io import write_ct
from autosam3d.recipes.recipe import Recipe, recipe_from_dict
from autosam3d.training.teacher import agreement, cache_probabilities, load_teacher
from autosam3d.training.train import train
from autosam3d.volume import Volume
from mini_run import affine_of, blobs, mini_recipe, write_mini_dataset, write_recipe


def student(**distill: object) -> Recipe:
    return recipe_from_dict(mini_recipe(train__epochs=1, model__adapter_dim=4).as_dict()
                            | {"distill": {"loss": "dice_ce", **distill}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, two teachers, and three scans without labels, one of which is a training case."""
    folder = tmp_path_factory.mktemp("unlabelled")
    data = write_mini_dataset(folder / "data")
    for seed in (0, 1):
        recipe = mini_recipe(train__epochs=1, train__seed=seed)
        train(recipe, open_datasets([data], recipe), folder / f"teacher{seed}", device="cpu",
              cache_dir=folder / "cache")
    for seed in (50, 51):
        (folder / "scans" / f"p{seed}").mkdir(parents=True)
        write_ct(folder / f"scans/p{seed}/ct.nii.gz", Volume(blobs(seed)[0], affine_of()))
    shutil.copy(data / "imagesTr/c0_0000.nii.gz", folder / "scans/again.nii.gz")
    return folder


def test_the_command_learns_from_labels_and_from_what_two_teachers_say_of_other_scans(folder: Path) -> None:
    write_recipe(folder / "student.yaml", student(min_agreement=0.0001))
    arguments = ["distill", folder / "teacher0", "--teacher", folder / "teacher1", "--student", folder / "student.yaml",
                 "--data", folder / "data", "--unlabelled", folder / "scans", "--device", "cpu", "--threads", "1",
                 "--cache", folder / "cache"]
    done = command_line.run(*arguments, "--out", folder / "run")
    assert done.code == 0, done.err
    teaching = json.loads((folder / "run/teaching.json").read_text())
    assert len(teaching["teacher"]["members"]) == 2 and teaching["loss"] == "dice_ce"
    steps = (folder / "run/log.csv").read_text().splitlines()
    assert len(steps) - 1 == (4 + 2) // 2  # four labelled cases and two others in pairs; the copy of c0 counts once
    with (folder / "run/left_out.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == []
    done = command_line.run(*arguments, "--out", folder / "strict", "--set", "distill.min_agreement=1")
    assert done.code == 0, done.err
    with (folder / "strict/left_out.csv").open() as file:
        left_out = {row["case"]: float(row["agreement"]) for row in csv.DictReader(file)}
    assert set(left_out) == {"p50", "p51"} and all(0 <= value < 1 for value in left_out.values())


def test_crops_of_a_scan_without_labels_say_that_nothing_is_known_and_fall_where_teachers_look(folder: Path) -> None:
    recipe = student(**{"lambda": 0.5})
    teacher = load_teacher([folder / "teacher0", folder / "teacher1"], recipe, sam=None, device="cpu")
    case = Case("p50", folder / "scans/p50/ct.nii.gz", None, drawn=frozenset())
    cached = cache_cases([case], recipe, folder / "cache")
    [alone] = cache_probabilities(cached, load_teacher(folder / "teacher0", recipe, sam=None, device="cpu"), recipe,
                                  folder / "cache")
    [other] = cache_probabilities(cached, load_teacher(folder / "teacher1", recipe, sam=None, device="cpu"), recipe,
                                  folder / "cache")
    [both] = cache_probabilities(cached, teacher, recipe, folder / "cache")
    assert alone.probs is not None and other.probs is not None and both.probs is not None
    mean = (np.asarray(alone.probs, np.float32) + np.asarray(other.probs, np.float32)) / 2
    assert np.abs(np.asarray(both.probs) - mean).max() <= 0.5
    assert alone.agreement is None and both.agreement is not None and 0 <= both.agreement <= 1
    assert both.organs_of_teacher and both.organ_voxels.shape == (both.voxels.shape[0], 3)
    crop = CropDataset([both], recipe)[(0, 0, 0)]
    assert crop["groups"].numpy().tolist() == [[True] * 3, [False] * 3, [False] * 3]


def test_the_mirror_image_is_a_voter_with_its_sides_turned_back(folder: Path) -> None:
    recipe = student(teacher_mirror=True)
    teacher = load_teacher(folder / "teacher0", recipe, sam=None, device="cpu")
    voxels = blobs(60)[0]
    symmetric = np.maximum(voxels, voxels[..., ::-1])
    write_ct(folder / "symmetric.nii.gz", Volume(symmetric, affine_of()))
    cached = cache_cases([Case("s", folder / "symmetric.nii.gz", None, drawn=frozenset())], recipe, folder / "cache")
    [said] = cache_probabilities(cached, teacher, recipe, folder / "cache")
    probs = np.asarray(said.probs).astype(int)
    # Of a body that is its own mirror image the right organ is the left one turned, whatever the teacher sees.
    assert np.abs(probs[0] - probs[1][..., ::-1]).max() <= 1 and said.agreement is not None


def test_agreement_is_the_mean_dice_of_pairs() -> None:
    one, two = np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8)
    one[0, :2], two[0, 1:3], two[1, 0] = 1, 1, 2
    assert agreement([one], 3) is None and agreement([one * 0, one * 0], 3) == 1
    assert agreement([one, two], 3) == pytest.approx((0.5 + 0) / 2)
    assert agreement([one, one, two], 3) == pytest.approx((1 + 0.5 + 0 + 0.5 + 0) / 5)


def test_scans_that_are_known_already(folder: Path) -> None:
    recipe = mini_recipe()
    cases = open_datasets([folder / "data"], recipe)
    scan = folder / "scans/p50/ct.nii.gz"
    found = with_unlabelled(cases, {"again": folder / "scans/again.nii.gz", "p50": scan, "twice": scan, "c1": scan})
    assert [case.name for case in found.train] == [*(case.name for case in cases.train), "p50"]
    with pytest.raises(VolumeError, match="in no other part"):
        with_unlabelled(cases, {"x": cases.val[0].image_path})
    with pytest.raises(VolumeError, match="no training case already"):
        with_unlabelled(cases, {"again": folder / "scans/again.nii.gz"})
    another = folder / "scans/p51/ct.nii.gz"
    assert with_unlabelled(cases, {"c1": another}).train[-1].name == "unlabelled/c1"


def test_what_teachers_and_scans_must_not_be(folder: Path) -> None:
    with pytest.raises(UsageError, match="different teachers"):
        load_teacher([folder / "teacher0", folder / "teacher0"], student(), sam=None, device="cpu")
    tree = student().as_dict()
    tree["labels"] = {"organs": [*tree["labels"]["organs"], "spleen"], "side_pairs": tree["labels"]["side_pairs"]}
    tree["model"].pop("num_outputs")
    with pytest.raises(CheckpointError, match="spleen"):
        load_teacher([folder / "teacher0", folder / "teacher1"], recipe_from_dict(tree), sam=None, device="cpu")
    write_recipe(folder / "plain.yaml", student())
    common = ["distill", folder / "teacher0", "--student", folder / "plain.yaml", "--data", folder / "data", "--device",
              "cpu", "--out", folder / "never"]
    for words, code, expected in (
        (["--unlabelled", folder / "scans", "--set", "distill.lambda=1"], 2, "UNLABELLED"),
        (["--unlabelled", folder / "none"], 2, "UNLABELLED"), (["--unlabelled", folder / "teacher0"], 3, "NO_DICOM"),
        (["--set", "distill.min_agreement=0.5"], 2, "ONE_VOTER"),
    ):
        done = command_line.run(*common, *words)
        assert done.code == code and f"error[{expected}]" in done.err.splitlines()[-1], done.err
