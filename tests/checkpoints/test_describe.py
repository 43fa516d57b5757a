"""What `autosam3d info` says is what is true of the recipe or model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autosam3d.checkpoints.checkpoint import save_checkpoint
from autosam3d.checkpoints.describe import describe_model, describe_parameters, describe_recipe
from autosam3d.errors import CheckpointError
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.parameters import count_parameters
from autosam3d.recipes.recipe import load_recipe, recipe_names
from command_line import mini_model, run
from mini_run import mini_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_described(name: str) -> None:
    recipe = load_recipe(name)
    text = describe_recipe(recipe)
    for organ in recipe.labels.organs:
        assert organ in text
    window = recipe.preprocess.hu_window
    assert f"{window.low_hu:g}..{window.high_hu:g} HU" in text
    assert f"{recipe.train.epochs} epochs" in text and recipe.dataset.title in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_papers_count_is_told_to_the_digit() -> None:
    text = describe_parameters(load_recipe("amos_ct"))
    assert "tuned, as the paper counts  26,530,944  without the tables depth_embed and rel_pos_d\n" in text
    assert "tuned, tables in full       26,601,856  with both, rel_pos_d in 27/127 rows as SAM has\n" in text


def test_parts_sum_to_what_is_tuned() -> None:
    recipe = mini_recipe()
    text = describe_parameters(recipe)
    parts = [int(line.split()[-1].replace(",", "")) for line in text.splitlines() if line.startswith("  ")]
    total = sum(p.numel() for p in AutoSam(recipe.model).parameters())
    report = count_parameters(recipe.model)
    assert sum(parts) == report.tuned and report.tuned + report.frozen == total
    for number in (report.tuned, report.frozen, total):
        assert f"{number:,}" in text


def test_spacing_and_pairs_are_said_or_said_to_be_absent() -> None:
    text = describe_recipe(mini_recipe())
    assert "the scan's own (z, y, x)" in text and "right_kidney - left_kidney" in text
    other = describe_recipe(mini_recipe(preprocess__spacing_mm=[3.0, 1.5, 1.5], labels__side_pairs=[]))
    assert "3 x 1.5 x 1.5 mm" in other and "no pairs" in other


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    recipe = mini_recipe()
    meta = {"kind": "model", "contains": "all", "recipe": recipe.as_dict(), "epoch": 1,
            "sam": {"source": "sam_vit_b.pth", "sha256": "ab" * 32},
            "metrics": {"val_dice": 0.81234, "val_dice_per_organ": {"right_kidney": 0.9, "left_kidney": None}}}
    save_checkpoint(tmp_path / "best.json", AutoSam(recipe.model).state_dict(), meta)
    return tmp_path


def test_a_model_is_described(model_folder: Path) -> None:
    text = describe_model(model_folder)
    assert "after 2 of 3 epochs" in text and "ab" * 32 in text and "sam_vit_b.pth" in text
    assert "Dice 0.8123 (right_kidney 0.900)" in text
    assert describe_recipe(mini_recipe()) in text


def test_a_training_state_without_validation_is_described(tmp_path: Path) -> None:
    meta = {"kind": "training", "contains": "all", "recipe": mini_recipe().as_dict(), "epoch": 3, "sam": None,
            "metrics": {}}
    save_checkpoint(tmp_path / "last.json", {"model.a": torch.zeros(1)}, meta)
    text = describe_model(tmp_path)
    assert "after 3 of 3 epochs" in text and "trained from scratch" in text and "validation" not in text


def test_a_changed_json_is_not_described(model_folder: Path) -> None:
    path = model_folder / "best.json"
    path.write_text(path.read_text().replace('"low_hu": -160.0', '"low_hu": -150.0'))
    with pytest.raises(CheckpointError) as caught:
        describe_model(model_folder)
    assert caught.value.code == "HASH"


def test_info_takes_a_folder_without_a_model_for_the_recipe_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "openkbp").mkdir()
    (tmp_path / "openkbp/dataset.json").write_text("{}")
    assert run("info", "openkbp", cwd=tmp_path).demand_ok().out.startswith("openkbp: ")
    (tmp_path / "phantom").symlink_to(mini_model())
    assert "model checkpoint of autosam3d" in run("info", "phantom", cwd=tmp_path).demand_ok().out
    (tmp_path / "runs").mkdir()
    assert "best.json" in run("info", "runs", cwd=tmp_path).demand_error("NO_MODEL", 4)
