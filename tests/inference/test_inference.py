"""The whole way, with predictors that know the answer: what goes in as labels must come out on the scan's grid."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import CheckpointError, ResourceError
from autosam3d.geometry.patches import Tiling
from autosam3d.geometry.preprocess import HuWindow, Preprocess
from autosam3d.inference import memory
from autosam3d.inference import pipeline as inference
from autosam3d.inference.memory import estimate_ram_bytes
from autosam3d.inference.mirror import MirrorPredictor
from autosam3d.inference.pipeline import SegmentOptions, label_prepared
from autosam3d.inference.predictor import Predictor
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.volume import Volume

Size = tuple[int, int, int]
LABELS = LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
# Both organs border on background only in value, so a blurred border never looks like the other organ.
HU_OF_LABEL = np.array([0.0, 100.0, -100.0])


@dataclass
class Oracle:
    """Softmax over the distance of each voxel's HU to that of each label; `answer` replaces it."""

    patch_size: Size = (8, 10, 12)
    num_outputs: int = 3
    answer: Callable[[np.ndarray], np.ndarray] | None = None
    calls: int = 0

    def predict(self, patches: np.ndarray) -> np.ndarray:
        assert patches.dtype == np.float32 and patches.shape[1:] == (1, *self.patch_size)
        self.calls += 1
        if self.answer is not None:
            return self.answer(patches)
        score = -np.abs(patches - HU_OF_LABEL[None, :, None, None, None] / 100) * 20
        probs = np.exp(score - score.max(1, keepdims=True))
        return (probs / probs.sum(1, keepdims=True)).astype(np.float32)

    def activation_bytes(self, batch_size: int) -> int:
        return 1000 * batch_size


@dataclass
class Model:
    recipe: Recipe
    predictor: Predictor
    sha256: str = "0" * 64


def make_recipe(spacing_mm: tuple[float, float, float] | None = None, crop: bool = False) -> Recipe:
    phantom = load_recipe("phantom")
    spec = Preprocess(
        spacing_mm=spacing_mm, hu_window=HuWindow(low_hu=-200, high_hu=200), subtract_hu=0, divide_hu=100,
        crop_to_body=crop,
    )
    augment = replace(phantom.augment, flip_prob=0.5, flip_axes=("z", "y", "x"))
    return replace(phantom, labels=LABELS, preprocess=spec, model=replace(phantom.model, num_outputs=3),
                   augment=augment, inference=Tiling(overlap=0.5))


def oblique(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """An affine with tilted axes, columns (x, y, z)."""
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing_mm[::-1])
    affine[:3, 3] = (-31, 12, 407)
    return affine


def make_scan(labels: np.ndarray, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    return Volume(voxels_hu=HU_OF_LABEL[labels].astype(np.float32), affine=oblique(spacing_mm))


def make_balls(shape: Size, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """One organ on each side, the right one larger."""
    z, y, x = np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(shape, spacing_mm, strict=True)), indexing="ij")
    size = [n * s for n, s in zip(shape, spacing_mm, strict=True)]
    labels = np.zeros(shape, np.uint8)
    for label, (fz, fy, fx), radius in ((1, (0.5, 0.45, 0.72), 0.2), (2, (0.4, 0.5, 0.25), 0.15)):
        distance = (z - fz * size[0]) ** 2 + (y - fy * size[1]) ** 2 + (x - fx * size[2]) ** 2
        labels[distance < (radius * min(size)) ** 2] = label
    return labels


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("shape", [(17, 23, 29), (1, 31, 13), (5, 3, 2), (8, 10, 12), (41, 10, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.6])
@pytest.mark.parametrize("importance", ["gaussian", "constant"])
def test_native_spacing_gives_the_labels_back_exactly(shape: Size, overlap: float, importance: str) -> None:
    labels = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    scan = make_scan(labels, (3.0, 0.8, 0.9))
    tiling = Tiling(overlap=overlap, importance=importance)
    result = inference.segment(scan, Model(make_recipe(), Oracle()), tiling=tiling)
    np.testing.assert_array_equal(result.labels, labels)
    assert result.labels.dtype == np.uint8
    assert result.affine is scan.affine and result.source is scan.source
    assert result.organs == {1: "right_kidney", 2: "left_kidney"}


@pytest.mark.parametrize("spacing_mm", [(5.0, 0.9, 0.9), (1.0, 1.0, 1.0), (0.7, 2.5, 1.1)])
@pytest.mark.parametrize("crop", [False, True])
def test_resampled_organs_come_back_in_place(spacing_mm: tuple[float, float, float], crop: bool) -> None:
    shape = tuple(round(70 / s) for s in spacing_mm)
    labels = make_balls(shape, spacing_mm)  # type: ignore[arg-type]
    result = inference.segment(make_scan(labels, spacing_mm), Model(make_recipe((1.5, 1.5, 1.5), crop), Oracle()))
    for label in (1, 2):
        true, found = labels == label, result.labels == label
        dice = 2 * (true & found).sum() / (true.sum() + found.sum())
        apart = np.subtract(*(np.argwhere(m).mean(0) * spacing_mm for m in (true, found)))
        # A tenth or so of a prepared voxel: the oracle is sure of itself, so borders fall on whole voxels.
        assert dice > 0.93 and np.abs(apart).max() < 0.2, (label, dice, apart)


def test_left_and_right_never_trade_places() -> None:
    labels = make_balls((24, 30, 36), (2.0, 2.0, 2.0))
    result = inference.segment(make_scan(labels, (2.0, 2.0, 2.0)), Model(make_recipe((1.7, 2.3, 2.9)), Oracle()))
    right, left = (np.argwhere(result.labels == k).mean(0) for k in (1, 2))
    assert right[2] > left[2] and right[0] > left[0]  # x grows to the right, and the right one lies higher here


def test_outside_the_body_is_background_and_cropping_changes_nothing() -> None:
    labels = np.zeros((40, 60, 60), np.uint8)
    labels[12:28, 25:35, 25:35] = 1
    hu = HU_OF_LABEL[labels].astype(np.float32)
    body = np.zeros(labels.shape, bool)
    body[5:35, 15:45, 15:45] = True
    scan = Volume(voxels_hu=np.where(body, hu, -1000).astype(np.float32), affine=np.diag([3.0, 3.0, 3.0, 1.0]))

    def above_air(patches: np.ndarray) -> np.ndarray:
        organ = (patches[:, 0] > 0.5).astype(np.float32)
        return np.stack([1 - organ, organ, 0 * organ], axis=1)

    oracles = [Oracle(answer=above_air) for _ in range(2)]
    results = [inference.segment(scan, Model(make_recipe(crop=crop), oracle)).labels
               for crop, oracle in zip((True, False), oracles, strict=True)]
    np.testing.assert_array_equal(results[0], labels)
    np.testing.assert_array_equal(results[1], labels)
    assert oracles[0].calls < oracles[1].calls


def test_batches_do_not_change_the_labels() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (20, 40, 44)).astype(np.uint8)

    def run(**options) -> tuple[np.ndarray, int]:
        oracle = Oracle(patch_size=(8, 8, 8))
        return inference.segment(make_scan(labels), Model(make_recipe(), oracle), **options).labels, oracle.calls

    (plain, calls), (batched, fewer) = run(), run(batch_size=7)
    np.testing.assert_array_equal(plain, batched)
    assert fewer == -(-calls // 7)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_equal_windows_are_predicted_once_and_the_probabilities_are_the_same_bit_for_bit(batch_size: int) -> None:
    """Air, and a second value throughout, around a ball; compared with a walk that never looks for equal windows."""
    random = np.random.default_rng(0)
    voxels = np.full((24, 40, 44), -2.0, np.float32)
    voxels[:, :, 30:] = 0.7
    voxels[6:18, 6:20, 8:20] = random.normal(size=(12, 14, 12))
    kernel = random.normal(size=3).astype(np.float32)

    def any_network(patches: np.ndarray) -> np.ndarray:
        """Sees its whole window, and where in it a voxel lies."""
        field = patches[:, 0] + np.cos(np.arange(8, dtype=np.float32)) * patches.mean((1, 2, 3, 4))[:, None, None, None]
        score = np.sin(field[:, None] * kernel[None, :, None, None, None] * 3)
        return np.exp(score) / np.exp(score).sum(1, keepdims=True)

    def run() -> tuple[np.ndarray, list[int]]:
        sizes: list[int] = []

        def answer(patches: np.ndarray) -> np.ndarray:
            sizes.append(len(patches))
            return np.concatenate([any_network(patch[None]) for patch in patches])

        plan = replace(estimate_ram_bytes(voxels.shape, voxels.shape, 3, (8, 8, 8), 0), batch_size=batch_size)  # type: ignore[arg-type]
        walk = inference._Walk(Oracle(patch_size=(8, 8, 8), answer=answer), Tiling(overlap=0.5), -2.0, plan)
        return np.concatenate(list(walk.slabs(voxels, None)), 1), sizes

    once, sizes = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_is_blank", lambda crop: False)
        each, all_sizes = run()
    np.testing.assert_array_equal(once, each)
    assert once.dtype == each.dtype == np.float32 and len(np.unique(once)) > 1000
    assert sum(all_sizes) == 5 * 9 * 10 and sum(sizes) < 0.7 * sum(all_sizes)


def test_progress_counts_the_windows() -> None:
    seen: list[tuple[int, int]] = []
    oracle = Oracle()
    labels = np.random.default_rng(2).integers(0, 3, (16, 20, 24)).astype(np.uint8)
    inference.segment(make_scan(labels), Model(make_recipe(), oracle),
                      progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, oracle.calls) for i in range(1, oracle.calls + 1)] and oracle.calls == 27


def test_a_stopped_run_leaves_no_thread() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inference.segment(make_scan(np.zeros((16, 20, 24), np.uint8)), Model(make_recipe(), Oracle()), progress=stop)
    assert not [t for t in threading.enumerate() if t.name.startswith("predict")]


def test_a_scan_may_go_before_its_windows_are_predicted() -> None:
    recipe, oracle, scan = make_recipe((2.0, 1.6, 1.8)), Oracle(), make_scan(make_balls((16, 40, 40), (2.0, 1.0, 1.0)))
    expected = inference.segment(scan, Model(recipe, oracle))
    gone = weakref.ref(scan)
    finish = inference.begin_segment(scan, Model(recipe, oracle), SegmentOptions())
    del scan
    assert gone() is None
    found = finish(None)
    assert found.labels.any() and np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.affine, expected.affine)


def test_label_prepared_is_segment_without_resampling() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (9, 25, 14)).astype(np.uint8)
    voxels = (HU_OF_LABEL[labels] / 100).astype(np.float32)
    np.testing.assert_array_equal(label_prepared(voxels, Oracle(), Tiling(overlap=0.25)), labels)


# ------------------------------------------------------------------------------------------------ mirrors


def by_gradient(patches: np.ndarray) -> np.ndarray:
    """Right or left by the sign of the product of the three slopes: every mirror swaps the sides."""
    slope = np.prod(np.gradient(patches[:, 0], axis=(1, 2, 3)), axis=0)
    probs = np.stack([np.abs(slope) <= 1e-6, slope > 1e-6, slope < -1e-6], axis=1)
    return probs.astype(np.float32)


def test_tta_of_an_equivariant_predictor_changes_nothing() -> None:
    scan = Volume(voxels_hu=np.random.default_rng(0).uniform(-200, 200, (9, 21, 25)).astype(np.float32),
                  affine=oblique((2.0, 1.0, 1.0)))
    oracle = Oracle(answer=by_gradient)
    plain = inference.segment(scan, Model(make_recipe(), oracle))
    calls = oracle.calls
    mirrored = inference.segment(scan, Model(make_recipe(), oracle), tta=True)
    np.testing.assert_array_equal(plain.labels, mirrored.labels)
    assert oracle.calls - calls == 8 * calls
    assert len(np.unique(plain.labels)) > 1


def test_tta_averages_over_the_axes_of_the_recipe() -> None:
    recipe = make_recipe()
    recipe = replace(recipe, augment=replace(recipe.augment, flip_axes=("x",)))
    patches = np.random.default_rng(0).random((2, 1, 4, 5, 6), np.float32)

    def answer(p: np.ndarray) -> np.ndarray:
        weight = np.arange(p[:, 0].size, dtype=np.float32).reshape(p[:, 0].shape)
        return np.stack([p[:, 0], weight, p[:, 0] * weight], axis=1)

    predictor = MirrorPredictor(Oracle(patch_size=(4, 5, 6), answer=answer), recipe)
    other = answer(patches[..., ::-1])[..., ::-1][:, [0, 2, 1]]
    np.testing.assert_allclose(predictor.predict(patches), (answer(patches) + other) / 2, rtol=1e-6)
    assert predictor.activation_bytes(1) > Oracle().activation_bytes(1)


def test_tta_without_mirrors_in_training_is_the_plain_prediction(caplog) -> None:
    recipe = make_recipe()
    recipe = replace(recipe, augment=replace(recipe.augment, flip_prob=0.0))
    oracle = Oracle(answer=by_gradient)
    patches = np.random.default_rng(0).random((1, 1, 8, 10, 12), np.float32)
    np.testing.assert_array_equal(MirrorPredictor(oracle, recipe).predict(patches), by_gradient(patches))
    assert oracle.calls == 1 and "not trained on mirror images" in caplog.text


# ------------------------------------------------------------------------------------------------ memory and faults


@pytest.fixture
def no_process(monkeypatch) -> None:
    """Plans hold what a scan takes, without the program."""
    monkeypatch.setattr(inference, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory, "_FIRST_USE_BYTES", 0)


def test_too_little_memory_is_refused_with_the_numbers(no_process, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_lives_in_memory", lambda folder: True)
    scan = make_scan(np.zeros((40, 50, 60), np.uint8))
    oracle = Oracle()
    with pytest.raises(ResourceError) as caught:
        inference.segment(scan, Model(make_recipe(), oracle), max_ram_bytes=1 << 20)
    assert caught.value.code == "MEMORY" and oracle.calls == 0
    assert "40 x 50 x 60" in caught.value.where
    # Scan 469 KiB, prepared 469, half sums 188, slabs 422, labels 117, two windows 30: 1.66 MiB and a tenth.
    assert caught.value.fault == ("needs 1.8 MiB of memory at least, 0 bytes of them for the program itself, "
                                  "1.0 MiB are allowed")


def test_less_memory_means_smaller_batches_then_half_sums_then_the_disk(no_process, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_lives_in_memory", lambda folder: False)
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: str(tmp_path))
    labels = np.random.default_rng(0).integers(0, 3, (40, 50, 60)).astype(np.uint8)
    scan = make_scan(labels)
    plans = []
    wish = estimate_ram_bytes((40, 50, 60), (40, 50, 60), 3, (8, 10, 12), 4000, 4)
    single = estimate_ram_bytes((40, 50, 60), (40, 50, 60), 3, (8, 10, 12), 1000, 1)
    half = replace(single, accumulator=single.accumulator // 2)
    disk = replace(single, accumulator=single.accumulator // 8)
    totals = [plan.total for plan in (wish, single, half, disk)]
    assert totals == sorted(totals, reverse=True)
    fit = inference.fit_memory
    monkeypatch.setattr(inference, "fit_memory", lambda *a: plans.append(fit(*a)) or plans[-1])
    for allowed in totals:
        result = inference.segment(scan, Model(make_recipe(), Oracle()), batch_size=4, max_ram_bytes=allowed)
        np.testing.assert_array_equal(result.labels, labels)
        assert any("half precision" in w for w in result.warnings) == plans[-1].half
    assert [(p.batch_size, p.half, p.scratch) for p in plans] == [
        (4, False, None), (1, False, None), (1, True, None), (1, False, tmp_path)
    ]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ResourceError, match="at least"):
        inference.segment(scan, Model(make_recipe(), Oracle()), max_ram_bytes=totals[-1] - 1)


def test_free_memory_is_asked_where_no_limit_is_given(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_ram_bytes", lambda: 100)
    monkeypatch.setattr(memory, "_lives_in_memory", lambda folder: True)
    with pytest.raises(ResourceError, match="are free"):
        inference.segment(make_scan(np.zeros((40, 50, 60), np.uint8)), Model(make_recipe(), Oracle()))


def test_no_room_on_the_disk_is_named(no_process, tmp_path, monkeypatch) -> None:
    def full(*args: object, **options: object) -> None:
        if options.get("scratch"):
            raise OSError(28, "No space left on device")
        raise AssertionError("expected sums on disk")

    monkeypatch.setattr(memory, "_lives_in_memory", lambda folder: False)
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(inference, "Stitcher", full)
    plan = estimate_ram_bytes((40, 50, 60), (40, 50, 60), 3, (8, 10, 12), 1000, 1)
    allowed = replace(plan, accumulator=plan.accumulator // 8).total
    scan = make_scan(np.zeros((40, 50, 60), np.uint8))
    with pytest.raises(ResourceError) as caught:
        inference.segment(scan, Model(make_recipe(), Oracle()), max_ram_bytes=allowed)
    assert caught.value.code == "NO_SPACE" and "No space left" in caught.value.fault


def test_the_plan_bounds_what_is_really_taken(no_process) -> None:
    import tracemalloc

    scan = make_scan(np.zeros((64, 96, 96), np.uint8))
    oracle = Oracle(patch_size=(32, 32, 32), answer=lambda p: np.repeat(p * 0 + np.float32(1 / 3), 3, axis=1))
    recipe = make_recipe((1.5, 0.8, 0.8))
    options = SegmentOptions()
    undo = inference.plan_grid(scan, recipe.preprocess)
    plan = inference.plan_memory(undo, oracle, options)
    tracemalloc.start()
    inference.segment_with(scan, Model(recipe, oracle), options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 * (plan.total - plan.scan) < peak < plan.total - plan.scan


def test_a_network_that_returns_nan_is_refused() -> None:
    broken = Oracle(answer=lambda p: np.full((len(p), 3, *p.shape[2:]), np.nan, np.float32))
    with pytest.raises(CheckpointError, match="NaN"):
        inference.segment(make_scan(np.zeros((9, 12, 14), np.uint8)), Model(make_recipe(), broken))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        SegmentOptions(batch_size=0)
    with pytest.raises(ValueError, match="max_ram_bytes"):
        SegmentOptions(max_ram_bytes=0)


def test_memory_file_systems_are_told_from_disks() -> None:
    if Path("/dev/shm").is_dir():
        assert memory._lives_in_memory(Path("/dev/shm"))
    assert not memory._lives_in_memory(Path("/proc"))
