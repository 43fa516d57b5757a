"""Presets: a dataset's recipe with another network, where only what belongs to the method changes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from autosam3d.errors import RecipeError
from autosam3d.models.spec import AutoSamSpec, NetworkSpec, NnFormerSpec, NnUnetSpec, SwinUnetrSpec, UnetrSpec
from autosam3d.recipes.recipe import dump_recipe, load_recipe, recipe_names
from autosam3d.recipes.settings import Optim
from autosam3d.recipes.sources import preset_names, with_model
from autosam3d.recipes.yaml_text import parse_yaml

PAPER: dict[str, NetworkSpec] = {
    "nnunet": NnUnetSpec(num_outputs=6), "nnformer": NnFormerSpec(num_outputs=6), "unetr": UnetrSpec(num_outputs=6),
    "swinunetr": SwinUnetrSpec(num_outputs=6, feature_size=48, patch_size=(128, 128, 128), checkpointing=True),
    "swinunetr_small": SwinUnetrSpec(num_outputs=6, feature_size=24, patch_size=(128, 128, 128)),
    "swinunetr_tiny": SwinUnetrSpec(num_outputs=6, feature_size=12, patch_size=(128, 128, 128)),
    "autosam": AutoSamSpec(num_outputs=6, checkpointing=True),
}
SMALL = ["autosam_2core", "nnformer_2core", "nnunet_2core", "swinunetr_2core", "unetr_2core"]
FOLDER = Path(__file__).parents[2] / "src/autosam3d/recipes/models"


def refused(preset: str | Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe("openkbp", overrides, preset)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return caught.value


def test_the_package_has_its_presets() -> None:
    assert preset_names() == sorted([*PAPER, *SMALL])
    assert not set(preset_names()) & set(recipe_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_complete_and_says_whence_it_is(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    head = text.split("\nabout:")[0]
    assert "# Source: " in head and "# Result: " in head and f"train RECIPE --model {name} " in head
    tree = parse_yaml(text, name)
    assert set(tree) == {"about", "model", "optim", "train"}
    assert set(tree["optim"]) == {field.name for field in fields(Optim)}
    assert {"deep_supervision", "dice_weight", "ce_weight"} <= set(tree["train"])
    spec = load_recipe("openkbp", model=name).model
    assert set(tree["model"]) == {field.name for field in fields(spec)} - {"num_outputs"}


@pytest.mark.parametrize("name", preset_names())
def test_the_data_stay_the_datasets(name: str) -> None:
    plain, other = load_recipe("openkbp").as_dict(), load_recipe("openkbp", model=name).as_dict()
    assert other["name"] == f"openkbp_{name}"
    for section in ("labels", "dataset", "preprocess", "sampling", "augment", "inference"):
        assert other[section] == plain[section]
    changed = {key for key in plain["train"] if plain["train"][key] != other["train"][key]}
    assert changed <= {"deep_supervision"}


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_papers_sizes(name: str) -> None:
    assert load_recipe("openkbp", model=name).model == PAPER[name]


@pytest.mark.parametrize("name", recipe_names())
def test_every_dataset_goes_with_every_preset(name: str, tmp_path: Path) -> None:
    for preset in preset_names():
        recipe = load_recipe(name, ["optim.warmup_epochs=0"], preset)
        assert recipe.distill is None and recipe.model.num_outputs == len(recipe.labels.organs) + 1
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_published_training() -> None:
    for name in ("nnunet", "nnformer"):
        recipe = load_recipe("btcv", model=name)
        optim = recipe.optim
        assert (optim.optimizer, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 0.01, 0.99, True)
        assert (optim.weight_decay, optim.schedule, optim.clip_norm) == (3e-5, "poly", 12.0)
        assert recipe.train.deep_supervision
    for name in ("unetr", "swinunetr", "swinunetr_small", "swinunetr_tiny"):
        recipe = load_recipe("btcv", model=name)
        optim = recipe.optim
        assert (optim.optimizer, optim.lr, optim.weight_decay) == ("adamw", 1e-4, 1e-5)
        assert optim.schedule == "warmup_cosine" and not recipe.train.deep_supervision
    for section in ("model", "optim"):
        assert load_recipe("btcv", model="autosam").as_dict()[section] == load_recipe("btcv").as_dict()[section]
    assert load_recipe("openkbp", model="autosam_2core").optim == load_recipe("openkbp").optim


def test_small_baselines_are_trained_as_our_students_are() -> None:
    student = load_recipe("openkbp_tiny").optim
    for name in set(SMALL) - {"autosam_2core"}:
        recipe = load_recipe("openkbp", model=name)
        assert replace(recipe.optim, lr=student.lr, decay_all=student.decay_all) == student
        assert recipe.train.deep_supervision == (name in ("nnunet_2core", "nnformer_2core"))


def test_small_presets_take_one_crop() -> None:
    assert {load_recipe("openkbp", model=name).model.patch_size for name in SMALL} == {(32, 64, 64)}


def test_a_students_recipe_is_not_distilled_with_another_network() -> None:
    assert load_recipe("openkbp_tiny").distill is not None
    assert load_recipe("openkbp_tiny", model="nnunet_2core").distill is None


def test_overrides_come_last() -> None:
    recipe = load_recipe("openkbp", ["optim.lr=0.5", "model.channels=[4, 4, 4, 4, 4]"], "nnunet_2core")
    assert recipe.optim.lr == 0.5 and recipe.model.channels == (4, 4, 4, 4, 4)  # type: ignore[union-attr]


def test_a_long_name_is_cut_so_that_it_stays_one() -> None:
    tree = parse_yaml(dump_recipe(load_recipe("openkbp")), "openkbp") | {"name": "x" * 64}
    assert len(with_model(tree, "nnunet_2core")["name"]) == 64


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "nnunet_2core.yaml").read_text().replace("lr: 2e-3", "lr: 2e-2", 1))
    recipe = load_recipe("openkbp", model=path)
    assert recipe.optim.lr == 2e-2 and recipe.name == "openkbp_mine"


def test_a_preset_that_is_not_there_names_the_nearest() -> None:
    error = refused("nnunet_2cor")
    assert (error.code, error.remedy) == ("NO_PRESET", "did you mean nnunet_2core?")
    assert "swinunetr_tiny" in refused("zzz").remedy


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("model: {network: nnunet}\noptim: {}\n", "MISSING_KEY", "train"),
        ("model: 5\noptim: {}\ntrain: {}\n", "MISSING_KEY", "model"),
        ("model: {network: nnunet}\noptim: {}\ntrain: {}\nlabels: {}\n", "UNKNOWN_KEY", "labels"),
        ("model: {network: nope}\noptim: {}\ntrain: {}\n", "BAD_VALUE", "model.network"),
        ("model: {network: nnunet, chanels: [8]}\noptim: {}\ntrain: {}\n", "UNKNOWN_KEY", "model.chanels"),
        ("model: {network: unetr}\noptim: {}\ntrain: {deep_supervision: true}\n", "BAD_VALUE",
         "train.deep_supervision"),
        ("model: [\n", "YAML", "mine.yaml"),
        ("- 1\n", "YAML", "mine.yaml"),
    ],
)
def test_a_wrong_preset_is_refused_in_a_line(text: str, code: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    error = refused(path)
    assert error.code == code and error.where.endswith(where)


def test_a_datasets_recipe_is_no_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(load_recipe("phantom")))
    assert refused(path).code == "UNKNOWN_KEY"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.optimizer=adam", "optim.optimizer"), ("optim.momentum=0", "optim.nesterov"),
        ("optim.warmup_epochs=3", "optim.warmup_epochs"), ("optim.nesterov=1", "optim.nesterov"),
        ("model.strides=[[1, 1, 1]]", "model.strides"), ("model.patch_size=[30, 64, 64]", "model.patch_size"),
    ],
)
def test_bad_values_name_their_keys(override: str, key: str) -> None:
    error = refused("nnunet", override)
    assert error.code == "BAD_VALUE" and error.where.endswith(f": {key}")


def test_only_sgd_has_nesterov() -> None:
    with pytest.raises(RecipeError, match="nesterov"):
        load_recipe("openkbp", ["optim.nesterov=true"])
