"""Recipes: every one of the package loads, and a wrong one is refused in one line that names the key."""

import os
from pathlib import Path

import pytest

from autosam3d.errors import RecipeError
from autosam3d.recipes.recipe import Recipe, dump_recipe, load_recipe, recipe_from_dict, recipe_names
from autosam3d.recipes.sources import MAX_RECIPE_BYTES

ALL = ["amos_ct", "btcv", "ct_org", "openkbp", "openkbp_tiny", "openkbp_vit_b", "pelvic", "phantom"]
PAPER = ["amos_ct", "btcv", "ct_org", "pelvic"]


@pytest.fixture(scope="module")
def base() -> str:
    return dump_recipe(load_recipe("phantom"))


@pytest.fixture
def recipe_file(tmp_path: Path, base: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(base)
    return path


def refused(source: str | Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_happens_to_have_a_recipes_name_does_not_hide_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        (tmp_path / "openkbp").mkdir()
    else:
        (tmp_path / "openkbp").write_text("name: other")
    assert load_recipe("openkbp").name == "openkbp"
    # A path is meant as one, and so is a name that ends as YAML files do.
    (tmp_path / "openkbp.yaml").write_text(dump_recipe(load_recipe("phantom")))
    assert load_recipe("openkbp.yaml").name == "phantom"
    assert refused("./openkbp").code in ("RECIPE_UNREADABLE", "MISSING_KEY")


def test_a_folder_that_is_no_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert refused("runs").code == "RECIPE_UNREADABLE"


def test_the_package_has_its_recipes() -> None:
    assert set(ALL) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_of_the_package_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.num_outputs == len(recipe.labels.organs) + 1
    window = recipe.preprocess.hu_window
    low = (window.low_hu - recipe.preprocess.subtract_hu) / recipe.preprocess.divide_hu
    high = (window.high_hu - recipe.preprocess.subtract_hu) / recipe.preprocess.divide_hu
    assert -10 < low < high < 10


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_of_the_package_is_complete_and_says_what_it_reached(name: str) -> None:
    text = Path(__file__).parents[2].joinpath(f"src/autosam3d/recipes/{name}.yaml").read_text()
    for section in ("labels", "dataset", "preprocess", "model", "sampling", "augment", "optim", "train", "inference"):
        assert f"\n{section}:\n" in text
    head = text.split("\nname:")[0]
    assert "#   autosam3d " in head  # the command
    assert "# Result: " in head


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_papers_numbers(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.vit == "vit_b" and recipe.model.patch_size == (128, 128, 128)
    assert recipe.model.token_grid == (32, 32, 32) and recipe.model.adapter_dim == 384
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.optim.warmup_epochs) == (200, 1, 5)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.momentum) == (5e-4, 1e-5, 0.9)
    assert recipe.inference.overlap == 0.75


@pytest.mark.parametrize(
    ("name", "spacing", "window", "range_after", "probabilities"),
    [
        ("btcv", (1.5, 1, 1), (-125, 275), (0, 1), (0.1, 0.1, 0.2, 0.0)),
        ("amos_ct", (1.5, 1, 1), (-991, 362), (-1041 / 141, 312 / 141), (0.1, 0.1, 0.2, 0.0)),
        ("ct_org", (2, 2, 2), (-1000, 1000), (-1, 1), (0.5, 0.5, 0.1, 0.1)),
        ("pelvic", (1.5, 1.5, 1.5), (-50, 150), (0, 1), (0.3, 0.2, 0.1, 0.1)),
    ],
)
def test_preprocessing_and_augmentation_of_appendix_7_2(
    name: str, spacing: tuple, window: tuple, range_after: tuple, probabilities: tuple
) -> None:
    recipe = load_recipe(name)
    spec, augment = recipe.preprocess, recipe.augment
    assert spec.spacing_mm == spacing  # (z, y, x)
    assert (spec.hu_window.low_hu, spec.hu_window.high_hu) == window
    reached = tuple((hu - spec.subtract_hu) / spec.divide_hu for hu in window)
    assert reached == pytest.approx(range_after)
    got = (augment.flip_prob, augment.rotate90_prob, augment.scale_prob, augment.shift_prob)
    assert got == probabilities


def test_organ_orders_of_the_datasets() -> None:
    assert load_recipe("btcv").labels.index("portal_and_splenic_veins") == 10
    amos = load_recipe("amos_ct").labels
    assert (amos.index("inferior_vena_cava"), amos.index("pancreas"), amos.index("prostate_or_uterus")) == (9, 10, 15)
    ct_org = load_recipe("ct_org").dataset.download
    assert ct_org is not None and ct_org.label_values == {
        1: "liver", 2: "bladder", 3: "lungs", 4: "kidneys", 5: "bone", 6: "background"
    }
    assert len(ct_org.test_ids) == 19
    assert load_recipe("openkbp").labels.organs == load_recipe("openkbp_vit_b").labels.organs


@pytest.mark.parametrize("name", recipe_names())
def test_yaml_and_dict_round_trips(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert recipe_from_dict(recipe.as_dict()) == recipe


def test_digest_follows_settings_not_their_writing(recipe_file: Path) -> None:
    recipe = load_recipe("phantom")
    assert load_recipe(recipe_file).digest() == recipe.digest()
    assert len(recipe.digest()) == 64
    other = load_recipe("phantom", ["train.epochs=999"])
    assert other.digest() != recipe.digest()
    assert other.digest("preprocess", "model") == recipe.digest("preprocess", "model")
    assert len({load_recipe(name).digest() for name in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.epochs=3", lambda r: r.train.epochs == 3),
        ("optim.lr=5e-4", lambda r: r.optim.lr == 5e-4),
        ("optim.lr=.5", lambda r: r.optim.lr == 0.5),
        ("optim.lr= 1e-3 # a remark", lambda r: r.optim.lr == 1e-3),
        ("preprocess.spacing_mm=null", lambda r: r.preprocess.spacing_mm is None),
        ("preprocess.spacing_mm=[3, 2, 1]", lambda r: r.preprocess.spacing_mm == (3, 2, 1)),
        ("model.checkpointing=true", lambda r: r.model.checkpointing is True),
        ("name=2001-01-01", lambda r: r.name == "2001-01-01"),
        ("name=no", lambda r: r.name == "no"),
        ("dataset.background_organs=[heart]", lambda r: r.dataset.background_organs == ("heart",)),
    ],
)
def test_overrides(override: str, read) -> None:
    assert read(load_recipe("phantom", [override]))


def test_later_override_wins_and_the_recipe_of_the_package_stays() -> None:
    assert load_recipe("phantom", ["train.epochs=3", "train.epochs=4"]).train.epochs == 4
    assert isinstance(load_recipe("phantom"), Recipe) and load_recipe("phantom").train.epochs != 4


@pytest.mark.parametrize("override", ["=3", "train.epochs", "train..epochs=3", ".=3", "train.epochs.x=3", ""])
def test_override_that_is_no_override(override: str) -> None:
    assert refused("phantom", override).code == "OVERRIDE"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("trian.epochs=3", "did you mean train?"),
        ("train.epoch=3", "did you mean train.epochs?"),
        ("preprocess.hu_window.low=3", "did you mean preprocess.hu_window.low_hu?"),
        ("model.patchsize=3", "did you mean model.patch_size?"),
        ("dataset.download={image: a, labels: b, case_pattern: (x)}", "did you mean dataset.download.images?"),
        ("zzz=3", "remove it"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, remedy: str) -> None:
    error = refused("phantom", override)
    assert (error.code, error.remedy) == ("UNKNOWN_KEY", remedy)
    assert error.where.startswith(f"phantom: {override.split('.')[0].split('=')[0]}")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        # wrong type, null, bool for a number, a number with a fraction
        ("train.epochs=abc", "train.epochs"), ("train.epochs=null", "train.epochs"),
        ("train.epochs=", "train.epochs"), ("train.epochs=true", "train.epochs"), ("train.epochs=3.0", "train.epochs"),
        ("optim.lr=true", "optim.lr"), ("optim.lr='1e-3'", "optim.lr"),
        ("model.checkpointing=1", "model.checkpointing"),
        ("model.checkpointing=yes", "model.checkpointing"), ("name=5", "name"), ("train=null", "train"),
        ("labels=null", "labels"), ("model=[]", "model"), ("labels.organs=liver", "labels.organs"),
        ("labels.organs=[1, 2]", "labels.organs.0"), ("preprocess.hu_window=5", "preprocess.hu_window"),
        ("model.patch_size=32", "model.patch_size"), ("model.patch_size=[32, 64]", "model.patch_size.2"),
        # what YAML 1.1 would read as numbers
        ("train.epochs=010", "train.epochs"), ("train.epochs=12:30", "train.epochs"),
        ("train.epochs=2001-01-01", "train.epochs"), ("train.epochs=0x10", "train.epochs"),
        # not finite
        ("optim.lr=.nan", "optim.lr"), ("optim.lr=.inf", "optim.lr"), ("train.epochs=1e400", "train.epochs"),
        ("optim.clip_norm=.inf", "optim.clip_norm"), ("augment.noise_std=.nan", "augment.noise_std"),
        ("preprocess.spacing_mm=[1, 1, .nan]", "preprocess.spacing_mm.2"),
        # out of range, before any data is touched
        ("model.patch_size=[-16, 64, 64]", "model.patch_size"), ("model.patch_size=[0, 64, 64]", "model.patch_size"),
        ("model.patch_size=[30, 64, 64]", "model.patch_size"), ("model.vit=vit_x", "model.vit"),
        ("model.scale=[3, 3, 3]", "model.scale"), ("model.num_outputs=5", "model.num_outputs"),
        ("inference.overlap=1", "inference.overlap"), ("inference.overlap=-.1", "inference.overlap"),
        ("train.val_overlap=1.0", "train.val_overlap"), ("train.batch_size=0", "train.batch_size"),
        ("train.num_workers=1000", "train.num_workers"), ("train.seed=-1", "train.seed"),
        ("optim.lr=-1e-3", "optim.lr"), ("optim.lr=0", "optim.lr"), ("optim.momentum=1", "optim.momentum"),
        ("optim.schedule=cosine", "optim.schedule"), ("augment.flip_prob=1.5", "augment.flip_prob"),
        ("augment.flip_axes=[w]", "augment.flip_axes.0"), ("augment.scale_range=-1", "augment.scale_range"),
        ("augment.rotate_degrees=720", "augment.rotate_degrees"), ("dataset.val_share=1", "dataset.val_share"),
        ("dataset.fold=-1", "dataset.fold"), ("preprocess.divide_hu=0", "preprocess.divide_hu"),
        ("preprocess.hu_window.low_hu=500", "preprocess.hu_window"), ("labels.organs=[]", "labels.organs"),
        ("labels.organs=[a, a]", "labels.organs"), ("labels.side_pairs=[[a, b]]", "labels.side_pairs"),
        ("name=a/../b", "name"), ("name=''", "name"), ('about="a\\nb"', "about"),
        ("dataset.download={images: ../a, labels: b, case_pattern: (x)}", "dataset.download.images"),
        ("dataset.download={images: a, labels: b, case_pattern: '('}", "dataset.download.case_pattern"),
        ("dataset.download={images: a, labels: b, case_pattern: x}", "dataset.download.case_pattern"),
        ("dataset.download={images: a, labels: b, case_pattern: (x), label_values: {1: foo}}",
         "dataset.download.label_values"),
        ("dataset.download={images: a, labels: b, case_pattern: (x), label_values: {-1: liver}}",
         "dataset.download.label_values"),
    ],
)
def test_bad_value_names_its_key(override: str, path: str) -> None:
    error = refused("phantom", override)
    assert error.code in ("BAD_VALUE", "MISSING_KEY")
    assert error.where.endswith(f": {path}")


def test_missing_section_and_misspelt_section(recipe_file: Path, base: str) -> None:
    recipe_file.write_text(base.replace("labels:", "lables:", 1))
    assert refused(recipe_file).remedy == "did you mean labels?"
    recipe_file.write_text(base.replace("about:", "# about:", 1))
    assert refused(recipe_file).code == "MISSING_KEY"


@pytest.mark.parametrize(
    "extra",
    [
        "name: again", "x: !!python/object/apply:os.system ['touch CANARY']", "x: !!python/name:os.system",
        "x: !!binary aGk=", "x: !!set {a, b}", "x: !!int ''", "x: !!bool x", "x: !!timestamp x", "x: &a 1\ny: *a",
        "x: {<<: 1, <<: 2}", "\tx: 1", "? [1]\n: 2", "1.5: 1", "~: 1", "---\na: 1", "x: [1", "%YAML 9.9",
    ],
)
def test_yaml_that_is_more_than_plain_values(
    extra: str, recipe_file: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    recipe_file.write_text(f"{base}\n{extra}\n")
    assert refused(recipe_file).code == "YAML"
    assert not Path("CANARY").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[1]", "5", "~", "a: " + "[" * 100_000, "a: " + "[" * 100_000 + "]" * 100_000, "{a: " * 100_000,
        "- " * 100_000 + "x", "? " * 100_000, "\n".join(" " * i + "a:" for i in range(200)),
        "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [{'*a, ' * 9}1]\n" for i in range(9)),
        "x: " + "9" * 5000, 'name: "\\ud800"',
    ],
    ids=range(13),
)
def test_hostile_yaml(text: str, recipe_file: Path) -> None:
    recipe_file.write_text(text)
    assert refused(recipe_file).code in ("YAML", "BAD_VALUE")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"name: \xff\xfe", "ENCODING"), (b"name: \x00", "YAML"), (b"name: \x07", "YAML"),
        ("name: x".encode("utf-16"), "ENCODING"), (b"#" * (MAX_RECIPE_BYTES + 1), "RECIPE_TOO_LARGE"),
    ],
    ids=["invalid", "nul", "bell", "utf16", "large"],
)
def test_bytes_that_are_no_recipe(content: bytes, code: str, recipe_file: Path) -> None:
    recipe_file.write_bytes(content)
    assert refused(recipe_file).code == code


def test_a_hundred_megabytes_are_not_read(recipe_file: Path) -> None:
    os.truncate(recipe_file, 100 << 20)
    assert refused(recipe_file).code == "RECIPE_TOO_LARGE"


def test_windows_line_ends_and_byte_order_mark_are_fine(recipe_file: Path, base: str) -> None:
    recipe_file.write_bytes(b"\xef\xbb\xbf" + base.replace("\n", "\r\n").encode())
    assert load_recipe(recipe_file) == load_recipe("phantom")


def test_sources_that_are_no_file(tmp_path: Path) -> None:
    assert refused("btvc").remedy == "did you mean btcv?"
    assert refused(tmp_path / "none.yaml").code == "RECIPE_UNREADABLE"
    assert refused(tmp_path).code == "RECIPE_UNREADABLE"
    assert refused("a" * 500).code == "NO_RECIPE"
    os.mkfifo(tmp_path / "pipe.yaml")
    assert refused(tmp_path / "pipe.yaml").code == "RECIPE_UNREADABLE"
