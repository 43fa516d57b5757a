"""Distillation: what lambda means, what the teacher's cache promises, and who may teach whom."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autosam3d.training.teacher as teacher_module
from autosam3d.checkpoints.checkpoint import LoadedModel, load_model
from autosam3d.data.augment import Crop, augment, random_affine
from autosam3d.data.cache import cache_cases, with_background, without_background
from autosam3d.data.crops import CropDataset
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.models.spec import ResUnetSpec, SwinUnetrSpec
from autosam3d.recipes.recipe import Recipe, load_recipe, recipe_from_dict
from autosam3d.recipes.settings import Augment, Distillation
from autosam3d.recipes.sources import preset_names
from autosam3d.training.distill import student_of, student_recipe
from autosam3d.training.losses import dice_ce_loss, teacher_mse
from autosam3d.training.run import Observer
from autosam3d.training.teacher import Teacher, cache_probabilities, load_teacher
from autosam3d.training.train import TeacherSource, TrainResult, train
from mini_run import LABELS, log_rows, mini_recipe, weights_of, write_mini_dataset

TEACHER = mini_recipe(train__epochs=2)
# A vit_tiny narrower than its teacher: a student whose step takes milliseconds.
STUDENT = mini_recipe(train__epochs=2, model__adapter_dim=4, model__head_dim=4)


def student(**settings: Any) -> Recipe:
    names = {"label_weight": "lambda"}
    tree = STUDENT.as_dict() | {"distill": {names.get(key, key): value for key, value in settings.items()}}
    return recipe_from_dict(tree)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def cases(folder: Path) -> CaseSet:
    return open_dataset(write_mini_dataset(folder / "data"), TEACHER)


@pytest.fixture(scope="module")
def teacher(folder: Path, cases: CaseSet) -> Path:
    train(TEACHER, cases, folder / "teacher", device="cpu", cache_dir=folder / "cache")
    return folder / "teacher"


@pytest.fixture(scope="module")
def start(folder: Path, cases: CaseSet, teacher: Path) -> Callable[..., TrainResult]:
    def start(recipe: Recipe, run: Path, **options: Any) -> TrainResult:
        settings: dict[str, Any] = {"teacher": TeacherSource(teacher), "device": "cpu", "cache_dir": folder / "cache"}
        return train(recipe, cases, run, **(settings | options))

    return start


# ---- what lambda means ----


def test_lambda_one_is_plain_training(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    start(STUDENT, tmp_path / "plain", teacher=None)
    start(student(label_weight=1.0), tmp_path / "distilled", teacher=TeacherSource("no such file"))
    assert weights_of(tmp_path / "plain", "last") == weights_of(tmp_path / "distilled", "last")
    assert log_rows(tmp_path / "plain") == log_rows(tmp_path / "distilled")


@pytest.mark.parametrize("probs", ["cache", "live"])
def test_lambda_zero_never_looks_at_labels(
    probs: str, start: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the loss nor for where crops fall: with all labels gone the weights are the same."""
    recipe = student(label_weight=0.0, teacher_probs=probs)
    start(recipe, tmp_path / "true")

    def blind(cases: Any, *args: Any) -> Any:
        found = cache_cases(cases, *args)
        return [replace(c, labels=np.zeros_like(c.labels), organ_voxels=0 * c.organ_voxels) for c in found]

    monkeypatch.setattr("autosam3d.training.cases.cache_cases", blind)
    monkeypatch.setattr("autosam3d.training.train.demand_organs", lambda *_: None)
    start(recipe, tmp_path / "blind")
    assert weights_of(tmp_path / "true", "last") == weights_of(tmp_path / "blind", "last")


def test_the_loss_is_the_weighted_sum(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    observer = Observer(on_step=lambda done, total, values: rows.append(dict(values)))
    start(student(label_weight=0.3), tmp_path / "run", observer=observer)
    teaching = json.loads((tmp_path / "run/teaching.json").read_text())
    assert (teaching["loss"], teaching["lambda"], list(teaching["gradient_norm"])) == ("mse", 0.3, ["start", "end"])
    for norms in teaching["gradient_norm"].values():
        assert norms["teacher_per_label"] == pytest.approx(norms["teacher"] / norms["labels"]) and norms["teacher"] > 0
    for row in rows:
        expected = 0.3 * (row["dice_loss"] + row["ce_loss"]) + 0.7 * row["teacher_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows and all(row["teacher_loss"] > 0 for row in rows)


def test_mse_in_closed_form() -> None:
    logits = torch.log(torch.tensor([0.2, 0.3, 0.5])).view(1, 3, 1, 1, 1).requires_grad_()
    probs = torch.tensor([0.1, 0.3, 0.6]).view(1, 3, 1, 1, 1)
    assert float(teacher_mse(logits, probs).detach()) == pytest.approx((0.01 + 0.01) / 3, rel=1e-5)
    assert float(teacher_mse(logits, probs, "class_sum").detach()) == pytest.approx(0.02, rel=1e-5)
    # By hand: d/dz_j of the mean of (p_i - t_i)^2 is 2/3 * p_j * ((p_j - t_j) - sum_i p_i (p_i - t_i)).
    teacher_mse(logits, probs).backward()
    p, d = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.0, -0.1])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.flatten(), 2 / 3 * p * (d - (p * d).sum()), rtol=1e-4, atol=1e-7)


def test_a_perfect_student_has_no_teacher_loss() -> None:
    logits = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert float(teacher_mse(logits, logits.softmax(1))) == 0
    assert float(dice_ce_loss(logits, logits.argmax(1)).total) > 0


# ---- live and cached ----


def test_live_probabilities_are_those_of_the_teachers_network(
    start: Callable[..., TrainResult], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = teacher_module.Teacher.probabilities

    def watch(self: Any, voxels: torch.Tensor) -> torch.Tensor:
        seen.append((voxels.clone(), own(self, voxels)))
        return seen[-1][1]

    monkeypatch.setattr(teacher_module.Teacher, "probabilities", watch)
    start(student(teacher_probs="live"), tmp_path / "run")
    network = load_model(teacher).network
    with torch.inference_mode():
        for voxels, probs in seen:
            torch.testing.assert_close(network(voxels).softmax(1), probs, rtol=1e-5, atol=1e-6)
    assert len(seen) == 4


def test_the_cache_holds_what_the_teacher_says(cases: CaseSet, teacher: Path, folder: Path) -> None:
    recipe = student(teacher_overlap=0.0)
    loaded_teacher = load_teacher(teacher, recipe, sam=None, device="cpu")
    plain = cache_cases(cases.train, recipe, folder / "cache")
    case = cache_probabilities(plain, loaded_teacher, recipe, folder / "cache")[0]
    assert case.probs is not None
    # One window in the corner, as the network sees it; with overlap 0 windows of 16 in a scan of 24 still meet at 8.
    corner = np.ascontiguousarray(case.voxels[None, None, :16, :16, :16], np.float32)
    probs = loaded_teacher.models[0].predictor.predict(corner)[0]
    kept = with_background(case.probs[:, :8, :8, :8])
    assert np.abs(kept - probs[:, :8, :8, :8]).max() < 0.51 / 255 * recipe.labels.num_outputs


def test_quantised_probabilities_stay_probabilities() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 5, 5, 5)) * 6
    probs = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    back = with_background(without_background(probs))
    assert np.abs(back.sum(0) - 1).max() < 1e-6 and back.min() >= 0
    assert np.abs(back - probs).max() <= 0.5 / 255 * 6
    crowded = with_background(np.full((5, 1, 1, 1), 60, np.uint8))
    assert crowded[0].item() == 0 and crowded.sum() == pytest.approx(1)


def test_probabilities_move_with_the_labels() -> None:
    """Whatever geometry is drawn, one-hot probabilities stay the one-hot labels (affine: where it does not blend)."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, (9, 8, 8), dtype=np.uint8)
    voxels = random.normal(size=labels.shape).astype(np.float32)
    one_hot = np.eye(3, dtype=np.float32)[labels].transpose(3, 0, 1, 2)
    spec = Augment(flip_prob=0.5, rotate90_prob=0.5, scale_prob=0.5, shift_prob=0.5, noise_prob=0.5)
    for seed in range(40):
        crop = augment(Crop(voxels, labels, one_hot), spec, LABELS, np.random.default_rng(seed))
        assert crop.probs is not None
        assert np.array_equal(crop.probs.argmax(0), crop.labels)
        bare = augment(Crop(voxels, labels), spec, LABELS, np.random.default_rng(seed))
        assert np.array_equal(bare.voxels, crop.voxels) and np.array_equal(bare.labels, crop.labels)
    smooth = np.zeros((30, 30, 30), np.uint8)
    smooth[8:20, 9:21, 10:22] = 1
    hot = np.eye(3, dtype=np.float32)[smooth].transpose(3, 0, 1, 2)
    turn = Augment(affine_prob=1.0, rotate_degrees=20.0, zoom_range=0.1)
    moved = random_affine(Crop(smooth.astype(np.float32), smooth, hot), (20, 20, 20), (3.0, 1.0, 2.0), turn,
                          np.random.default_rng(1))
    assert moved.probs is not None and moved.labels.any() and not np.array_equal(moved.labels, smooth[5:25, 5:25, 5:25])
    sure = moved.probs.max(0) > 0.9
    assert np.array_equal(moved.probs.argmax(0)[sure], moved.labels[sure]) and sure.mean() > 0.8
    np.testing.assert_allclose(moved.probs[1], moved.voxels, atol=1e-6)


def test_a_second_student_asks_no_teacher(
    start: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(student(label_weight=0.5), tmp_path / "first")
    monkeypatch.setattr(teacher_module, "_build", lambda *_: pytest.fail("asked the teacher again"))
    start(student(label_weight=0.2), tmp_path / "second")
    start(student(label_weight=0.0, mse_reduction="class_sum"), tmp_path / "third")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_cut, damage_bit])
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], None], suffix: str, cases: CaseSet, teacher: Path, folder: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = student()
    loaded_teacher = load_teacher(teacher, recipe, sam=None, device="cpu")
    plain = cache_cases(cases.train[:2], recipe, tmp_path)
    whole = [np.array(case.probs) for case in cache_probabilities(plain, loaded_teacher, recipe, tmp_path)]
    victim = next((tmp_path / plain[1].key).glob(f"teacher-*.{suffix}"))
    damage(victim)
    again = cache_probabilities(plain, loaded_teacher, recipe, tmp_path)
    assert f"the teacher's probabilities of {plain[1].name}: damaged in the cache" in caplog.text
    assert all(np.array_equal(case.probs, probs) for case, probs in zip(again, whole, strict=True))


def test_a_killed_cache_goes_on_after_the_last_whole_case(
    cases: CaseSet, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = student()
    loaded_teacher = load_teacher(teacher, recipe, sam=None, device="cpu")
    plain = cache_cases(cases.train, recipe, tmp_path)
    windows: list[int] = []

    def kill_in_the_third_case(done: int, total: int) -> None:
        windows.append(done)
        if windows.count(1) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_probabilities(plain, loaded_teacher, recipe, tmp_path, watch=kill_in_the_third_case)
    built: list[str] = []
    own = teacher_module._build
    monkeypatch.setattr(teacher_module, "_build", lambda *args: built.append(args[1].name) or own(*args))
    cache_probabilities(plain, loaded_teacher, recipe, tmp_path)
    assert built == [case.name for case in plain[2:]]


def test_crops_carry_probabilities_of_the_same_place(cases: CaseSet, teacher: Path, folder: Path) -> None:
    recipe = replace(student(), augment=Augment(flip_prob=0.5, scale_prob=0, affine_prob=0, rotate90_prob=0.5))
    loaded_teacher = load_teacher(teacher, recipe, sam=None, device="cpu")
    plain = cache_cases(cases.train, recipe, folder / "cache")
    # A teacher who knows the truth.
    perfect = [replace(case, probs=np.stack([(np.asarray(case.labels) == k) * np.uint8(255) for k in (1, 2)]))
               for case in plain]
    dataset = CropDataset(perfect, recipe)
    for position in range(12):
        crop = dataset[(0, position, position % 4)]
        labels, probs = crop["labels"], crop["probs"]
        assert torch.equal(probs.argmax(0).to(torch.uint8), labels)
    assert loaded_teacher.origin["recipe"] == "mini"


# ---- who may teach whom ----


def test_a_student_resumes_with_its_own_teacher_only(
    start: Callable[..., TrainResult], cases: CaseSet, folder: Path, tmp_path: Path
) -> None:
    recipe = student()
    run = tmp_path / "run"
    stopped: list[int] = []

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, values: Any) -> None:
        if done == 2:
            stopped.append(done)
            raise Killed

    with pytest.raises(Killed):
        start(recipe, run, observer=Observer(on_step=kill))
    other = folder / "other_teacher"
    train(mini_recipe(train__epochs=1, train__seed=1), cases, other, device="cpu", cache_dir=folder / "cache")
    with pytest.raises(UsageError) as caught:
        start(recipe, run, teacher=TeacherSource(other))
    assert caught.value.code == "OTHER_TEACHER"
    start(recipe, run)
    start(recipe, tmp_path / "whole")
    assert stopped and weights_of(run, "last") == weights_of(tmp_path / "whole", "last")
    meta = json.loads((run / "best.json").read_text())
    assert meta["teacher"]["sha256"] == json.loads((folder / "teacher" / "best.json").read_text())["weights"]["sha256"]


def test_distilling_without_a_teacher_is_refused(start: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        start(student(), tmp_path / "run", teacher=None)
    assert caught.value.code == "NO_TEACHER"


def test_a_teacher_of_other_organs_is_refused_with_both_lists(teacher: Path) -> None:
    tree = student().as_dict()
    tree["labels"] = {"organs": ["right_kidney", "left_kidney", "spleen"]}
    del tree["model"]["num_outputs"]
    with pytest.raises(CheckpointError) as caught:
        load_teacher(teacher, recipe_from_dict(tree), sam=None, device="cpu")
    assert caught.value.code == "MISMATCH"
    assert "4 classes, background, right_kidney, left_kidney, spleen; got one of 3, background, right_kidney, " \
           "left_kidney" in caught.value.fault


def test_a_teacher_with_other_preprocessing_is_refused(teacher: Path) -> None:
    tree = student().as_dict()
    tree["preprocess"]["hu_window"]["high_hu"] = 250.0
    with pytest.raises(CheckpointError, match=r"preprocess\.hu_window"):
        load_teacher(teacher, recipe_from_dict(tree), sam=None, device="cpu")


# ---- students' recipes ----


def test_students_take_everything_but_the_network_from_their_teacher(teacher: Path) -> None:
    tiny, small, edge = (student_recipe(teacher, name) for name in ("tiny", "small", "edge"))
    assert tiny.model == SwinUnetrSpec(num_outputs=3, patch_size=(32, 32, 32), feature_size=12)
    assert small.model == SwinUnetrSpec(num_outputs=3, patch_size=(32, 32, 32), feature_size=24)
    assert edge.model == ResUnetSpec(num_outputs=3, patch_size=(32, 32, 32))
    for recipe in (tiny, small, edge):
        assert recipe.distill == Distillation(loss="dice_ce")
        for section in ("labels", "dataset", "preprocess", "sampling", "augment", "train", "inference"):
            assert getattr(recipe, section) == getattr(TEACHER, section)
        assert recipe.optim == replace(TEACHER.optim, head_lr=10.0)
    in_the_papers_size = load_recipe("btcv")
    assert student_of(in_the_papers_size, "small").optim == in_the_papers_size.optim
    changed = student_recipe(teacher, "tiny", ["distill.lambda=0.2", "train.epochs=7"])
    assert changed.distill == Distillation(label_weight=0.2, loss="dice_ce") and changed.train.epochs == 7


@pytest.mark.parametrize("preset", preset_names())
def test_any_network_of_ours_may_teach(preset: str) -> None:
    """Deep supervision stays with the teacher: no student has coarser outputs."""
    recipe = load_recipe("openkbp", model=preset)
    for name in ("tiny", "edge"):
        taught = student_of(recipe, name)
        assert not taught.train.deep_supervision and taught.distill == Distillation(loss="dice_ce")
        assert taught.optim.head_lr == (recipe.optim.head_lr if not preset.endswith("2core") else 10.0)


@pytest.mark.parametrize(("network", "deep"), [
    ({"network": "nnformer", "patch_size": [16, 16, 16], "token_size": [2, 2, 2], "embed_dim": 4,
      "num_heads": [1, 2], "attn_windows": [4, 4]}, True),
    ({"network": "unetr", "patch_size": [16, 16, 16], "feature_size": 4, "hidden_dim": 12, "mlp_dim": 12,
      "num_heads": 2}, False),
])
def test_teachers_of_other_kinds_teach(tmp_path: Path, cases: CaseSet, network: dict[str, Any], deep: bool) -> None:
    tree = mini_recipe(train__epochs=1).as_dict()
    tree["model"], tree["train"]["deep_supervision"] = network, deep
    train(recipe_from_dict(tree), cases, tmp_path / "teacher", device="cpu", cache_dir=tmp_path / "cache")
    taught = student_recipe(tmp_path / "teacher", "edge", ["train.epochs=1"])
    result = train(taught, cases, tmp_path / "student", teacher=TeacherSource(tmp_path / "teacher"), device="cpu",
                   cache_dir=tmp_path / "cache")
    assert result.best_dice is not None and "teacher_loss" in log_rows(tmp_path / "student")[0]


def test_a_teacher_of_one_crop_size_says_so_when_it_is_asked_live() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, voxels: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("The size of tensor a (8) must match the size of tensor b (27)")

    network = Fixed()
    asked = Teacher((LoadedModel(TEACHER, network, torch.device("cpu"), "0", {}),))
    with pytest.raises(CheckpointError, match="teacher_probs=cache"):
        asked.probabilities(torch.zeros(1, 1, 32, 32, 32))
    with pytest.raises(RuntimeError, match="must match"):
        asked.probabilities(torch.zeros(1, 1, *TEACHER.model.patch_size))
