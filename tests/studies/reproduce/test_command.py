"""Every table and figure end to end on blobs: plan, train, segment, score, table; then what goes wrong on the way."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autosam3d.cli import reproduce as cli_reproduce
from autosam3d.errors import AutoSam3dError
from autosam3d.io import read_ct, read_segmentation, write_ct, write_segmentation
from autosam3d.studies.reproduce import runner, study
from autosam3d.studies.reproduce.cost import TrainingCost
from autosam3d.volume import Segmentation, Volume
from command_line import load_once, run, warm, write_model
from made_once import made_once
from mini_run import LABELS, affine_of, blobs, mini_recipe, write_mini_dataset, write_recipe
from on_disk import demand_as_told
from tiny_sam import SIZES, states

SMALL = ("--set", "model.patch_size=[32,32,32]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with two test cases, a recipe, and the folder of all runs, which the tests here share."""
    folder = tmp_path_factory.mktemp("reproduce")
    data = write_mini_dataset(folder / "data")
    for part in ("imagesTs", "labelsTs"):
        (data / part).mkdir()
    for seed in (8, 9):
        hu, labels = blobs(seed)
        write_ct(data / "imagesTs" / f"t{seed}_0000.nii.gz", Volume(hu, affine_of()))
        write_segmentation(data / "labelsTs" / f"t{seed}.nii.gz", Segmentation(labels, affine_of()), LABELS)
    write_recipe(folder / "mini.yaml", mini_recipe(preprocess__spacing_mm=[3.0, 2.0, 2.0]))
    return folder


@functools.cache
def _student() -> Path:
    """A network that differs from Table 4's students in its weights only."""
    student = {"network": "swin_unetr", "patch_size": [32, 32, 32], "feature_size": 12}
    return made_once("reproduced_student", lambda folder: write_model(folder, model=student))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sequence[str]]]:
    """Stages are forked from a process that has everything imported; a step costs what the test says."""
    called: list[Sequence[str]] = []

    def call(self: Any, planned: Any, command: Sequence[str], worker: Any) -> str | None:
        called.append(command)
        done = run(*command, seconds=240, env={"OMP_NUM_THREADS": "1", "AUTOSAM3D_BACKEND": "torch"})
        (planned.folder / "log.txt").write_text(done.out + done.err)
        return None if done.code == 0 else done.err.splitlines()[-1]

    monkeypatch.setattr(runner._Work, "_call", call)
    monkeypatch.setattr(study, "measure_training", lambda recipe, device, threads: TrainingCost(0.5, 0.1, 1 << 28, "x"))
    yield called


def reproduce(place: Path, target: str, **how: Any) -> Path:
    """The command itself, in this process; the folder of its files."""
    given: dict[str, Any] = {
        "target": target, "data": [place / "data"], "out": place / "out", "dataset": str(place / "mini.yaml"),
        "size": "2core", "budget": 0.02, "seeds": "0", "plan_only": False, "sam": None,
        "nnunet_python": None, "overrides": [SMALL[1]], "devices": "cpu", "threads": 1,
    }
    cli_reproduce.reproduce(**(given | how))
    return place / "out"


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    first = next(iter(rows[0]))
    return {row[first]: row for row in rows}


@pytest.mark.slow
def test_table1_from_nothing_and_again(place: Path, at_once: list, capsys: pytest.CaptureFixture[str]) -> None:
    load_once("autosam3d.models.baselines.monai")  # MONAI
    out = reproduce(place, "table1")
    rows = rows_of(out / "table1.csv")
    assert [*rows] == ["nnU-Net", "nnFormer", "UNETR", "SwinUNETR", "AutoSAM Adapter"]
    assert all(any("not run" not in v and "mDice" in k for k, v in row.items()) for row in rows.values())
    for ending in ("md", "tex", "html"):
        assert (out / f"table1.{ending}").stat().st_size > 500
    assert (out / "table1_tests.csv").is_file()
    stages = [command[0] for command in at_once]
    assert stages == ["train", "segment", "evaluate"] * 5
    done = json.loads((out / "mini" / "unetr_2core_s0" / "done.json").read_text())
    assert done["budget_minutes"] == 0.02 and done["seed"] == 0
    before = (out / "table1.csv").read_bytes()
    at_once.clear()
    reproduce(place, "table1")  # all runs are there
    assert at_once == [] and (out / "table1.csv").read_bytes() == before
    assert "finished already" in capsys.readouterr().err
    reproduce(place, "fig3")  # of the same runs
    assert at_once == []
    demand_figure(out, "fig3")
    demand_as_told("The folder of reproduce", out, *(f"TABLE.{ending}" for ending in ("md", "csv", "tex", "html")),
                   "TABLE_tests.csv", "FIGURE.svg", "FIGURE.png", "DATASET/RUN/recipe.yaml", "DATASET/RUN/run/**")


def demand_figure(out: Path, name: str) -> None:
    assert all((out / f"{name}.{ending}").stat().st_size > 200 for ending in ("png", "svg", "md"))


@pytest.mark.soak
def test_table3_table4_and_figure_4_share_what_is_there(place: Path, at_once: list) -> None:
    warm(_student())
    out = reproduce(place, "table3")
    assert [*rows_of(out / "table3.csv")] == ["AutoSAM Adapter", "without APG", "without MLAM", "without both"]
    trained = {Path(str(command[1])).parent.name for command in at_once if command[0] == "train"}
    assert trained >= {"autosam_2core_no_apg_s0", "autosam_2core_no_mlam_s0", "autosam_2core_no_apg_no_mlam_s0"}
    at_once.clear()
    reproduce(place, "table4")
    assert [*rows_of(out / "table4.csv")] == [f"λ = {weight:g}" for weight in (0, 0.2, 0.5, 0.8, 1)]
    assert {command[0] for command in at_once} == {"distill", "segment", "evaluate"}
    at_once.clear()
    reproduce(place, "fig4")
    assert {Path(str(command[3])).parent.name for command in at_once if command[0] == "distill"} == {
        "student_small_2core_lambda0.5_s0", "student_small_2core_lambda1_s0"}
    demand_figure(out, "fig4")


@pytest.mark.slow
def test_table2_and_figure_1_with_a_sam_of_random_weights(place: Path, at_once: list, tmp_path: Path) -> None:
    data, skimage = _finer(place / "data", tmp_path / "data"), pytest.importorskip("skimage")
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    sam, out = str(tmp_path / "sam.pth"), tmp_path / "out"
    torch.save(states(sizes=replace(SIZES, image_size=128, token_size=16))[2], sam)
    reproduce(place, "table2", data=[data], out=out, sam=sam)
    rows = (out / "table2.csv").read_text().splitlines()
    rows = list(csv.reader(row for row in rows if not row.startswith("#")))[1:]
    prompted = [row[2] for row in rows if row[0] != "AutoSAM Adapter"]
    assert len(rows) == 7 and prompted == ["yes"] * 6 and not any("not run" in row[3] for row in rows)
    assert [row[0] for row in rows[4:]] == [f"{name}, boxes for prompts" for name in ("SAM", "MedSAM", "MedSAM")]
    assert "without SAM's weights" in (out / "table2.md").read_text()
    assert "--sam" not in next(command for command in at_once if command[0] == "train")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("astronaut.png", "coffee.png", "camera.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, pictures)
    reproduce(place, "fig1", data=[data], out=out, sam=sam,
              overrides=[SMALL[1], f"study.photographs={{ADE20K: {pictures}, COCO 2017: {pictures}}}"])
    demand_figure(out, "fig1")
    assert "3 ADE20K, 3 COCO 2017" in (out / "fig1.md").read_text()


def _finer(data: Path, into: Path) -> Path:
    """The dataset with voxels half as wide: organs large enough that SAM's tuning asks for them."""
    shutil.copytree(data, into)
    for path in into.rglob("*.nii.gz"):
        affine = affine_of((3.0, 1.0, 1.0))
        if path.parent.name.startswith("images"):
            write_ct(path, Volume(read_ct(path).voxels_hu.repeat(2, 1).repeat(2, 2), affine))
        else:
            labels = read_segmentation(path).labels.repeat(2, 1).repeat(2, 2)
            write_segmentation(path, Segmentation(labels, affine), LABELS)
    return into


def test_a_figure_without_a_finished_run_is_not_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "stages", lambda *given: [("training", ["train", "none", "--data", "none"])])
    for target in ("fig3", "fig4"):
        with pytest.raises(AutoSam3dError, match="5 of 5 runs failed"):
            reproduce(place, target, out=tmp_path / "out")
    assert not [*(tmp_path / "out").glob("fig*")]


def test_the_plan_of_figure_1_embeds_nothing(place: Path, tmp_path: Path) -> None:
    reproduce(place, "fig1", plan_only=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failed_run_stops_no_other(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_once("autosam3d.models.baselines.monai")
    real = runner.stages

    def broken(run: Any, *rest: Any) -> Any:
        return real(run, *rest) if run.spec.row == "unetr" else [("training", ["train", "none", "--data", "none"])]

    monkeypatch.setattr(runner, "stages", broken)
    with pytest.raises(AutoSam3dError) as caught:
        reproduce(place, "table1", out=tmp_path / "out")
    assert (caught.value.exit_code, caught.value.where) == (6, "mini/nnunet_2core_s0")
    assert "4 of 5 runs failed: error[" in caught.value.fault
    rows = rows_of(tmp_path / "out" / "table1.csv")
    assert "not run" in rows["nnU-Net"].values() and "not run" not in rows["UNETR"].values()


def test_a_student_of_a_failed_teacher_fails_with_its_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "stages", lambda *given: [("training", ["train", "none", "--data", "none"])])
    with pytest.raises(AutoSam3dError, match="6 of 6 runs failed"):
        reproduce(place, "table4", out=tmp_path / "out")
    assert {*rows_of(tmp_path / "out" / "table4.csv")["λ = 0.5"].values()} >= {"not run"}
    text = (tmp_path / "out" / "table4.md").read_text("utf-8")
    assert "distillation (small variants)" in text
    assert "Every network trained here from scratch is a small variant" in text
    assert "Student: SwinUNETR Tiny; the paper's is SwinUNETR Small." in text


def test_the_plan_alone_writes_no_run(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reproduce(place, "table4", plan_only=True, out=tmp_path / "out")
    text = capsys.readouterr().out
    assert "student_tiny_2core_lambda0.2_s0" in text and "to do" in text and "0.2 GiB" in text
    assert [p.name for p in (tmp_path / "out" / "mini").iterdir()] == ["costs.json"]


def test_a_run_of_another_recipe_in_the_way(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "out" / "mini" / "unetr_2core_s0"
    other.mkdir(parents=True)
    write_recipe(other / "recipe.yaml", mini_recipe())
    with pytest.raises(AutoSam3dError, match="it holds a run of another recipe") as caught:
        reproduce(place, "table1", out=tmp_path / "out")
    assert caught.value.code == "OTHER_RUN" and [p.name for p in other.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("change, code", [
    ({"target": "table5"}, "USAGE"), ({"size": "large"}, "USAGE"), ({"budget": 0.0}, "BUDGET"),
    ({"seeds": "0;1"}, "SEEDS"), ({"seeds": "1,1"}, "SEEDS"), ({"overrides": ["study.student=huge"]}, "BAD_VALUE"),
    ({"target": "table2"}, "USAGE"), ({"target": "fig1"}, "USAGE"), ({"devices": "tpu"}, "USAGE"),
    ({"devices": "cuda:97"}, "DEVICE"), ({"dataset": "no_such"}, "NO_RECIPE"),
])
def test_what_cannot_be_meant_is_refused(place: Path, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    with pytest.raises(AutoSam3dError) as caught:
        reproduce(place, **({"target": "table1", "out": tmp_path / "out"} | change))
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert not (tmp_path / "out").exists()


def test_datasets_that_cannot_be_reproduced_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AutoSam3dError, match="into the dataset"):
        reproduce(place, "table1", out=place / "data" / "out")
    bare = tmp_path / "bare"
    shutil.copytree(place / "data", bare)
    (bare / "labelsTs" / "t8.nii.gz").unlink()
    with pytest.raises(AutoSam3dError, match="got none for t8"):
        reproduce(place, "table1", data=[bare])
    shutil.rmtree(bare / "imagesTs")
    shutil.rmtree(bare / "labelsTs")
    with pytest.raises(AutoSam3dError, match="expected test cases, got none"):
        reproduce(place, "table1", data=[bare])
    with pytest.raises(AutoSam3dError) as caught:
        reproduce(place, "fig3", data=[Path(f"{place / 'mini.yaml'}={place / 'data'}"), bare])
    assert caught.value.code == "USAGE"


def test_epochs_fill_the_budget_and_the_warm_up_keeps_its_share() -> None:
    recipe = mini_recipe(train__epochs=20, optim__warmup_epochs=5)
    cost = TrainingCost(0.5, 0.1, 1, "x")
    within = study._within(recipe, 1.0, cost, num_train=4)  # 2 steps an epoch, 1 s
    assert within.train.epochs == 60 and within.optim.warmup_epochs == 15 and within.train.validate_every == 20
    assert study._within(recipe, 0.001, cost, 4).train.epochs == 1
    assert study._within(recipe, 0.001, cost, 4).optim.warmup_epochs == 0
