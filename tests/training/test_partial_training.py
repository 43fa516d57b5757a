"""Training where not every organ was looked for in every case, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

import command_line
from autosam3d.checkpoints.checkpoint import read_checkpoint
from autosam3d.io import read_segmentation, write_segmentation
from autosam3d.volume import Segmentation
from mini_run import LABELS, TRAIN, VAL, mini_recipe, write_mini_dataset, write_recipe


def test_a_partly_drawn_dataset_trains_and_unknown_organs_have_no_score(tmp_path: Path) -> None:
    data = write_mini_dataset(tmp_path / "data")
    first, second = LABELS.organs
    drawn = {name: [first, second] for name in (*TRAIN, *VAL)}
    drawn[TRAIN[1]], drawn[VAL[0]], drawn[VAL[1]] = [second], [first], [first]
    for name, organs in drawn.items():
        if second not in organs:
            path = data / "labelsTr" / f"{name}.nii.gz"
            truth = read_segmentation(path)
            labels = np.where(truth.labels == LABELS.index(second), 0, truth.labels)
            write_segmentation(path, Segmentation(labels, truth.affine), LABELS)
    (data / "annotated.json").write_text(json.dumps(drawn))
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=1, train__batch_size=2))
    done = command_line.run("train", recipe, "--data", data, "--out", tmp_path / "run", "--device", "cpu",
                            "--threads", "1")
    assert done.code == 0, done.err
    with (tmp_path / "run/validation.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row[first] and row[second] == "" and float(row["dice_mean"]) == float(row[first])
    sources = read_checkpoint(tmp_path / "run/best.json").meta["cases"]
    assert sources == {first: {"data": 3}, second: {"data": 4}}

    (data / "annotated.json").write_text(json.dumps(drawn | {name: [first] for name in TRAIN}))
    done = command_line.run("train", recipe, "--data", data, "--out", tmp_path / "other", "--device", "cpu")
    assert done.code == 3 and done.err.splitlines()[-1].startswith("error[ABSENT_ORGAN]") and second in done.err
