"""Random changes to a crop: what they may do, and what they must never do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosam3d.data.augment import Crop, affine_margin, augment, random_affine
from autosam3d.labels import LabelMap
from autosam3d.recipes.settings import Augment

LABELS = LabelMap(organs=("liver", "right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
NOTHING = Augment(flip_prob=0, rotate90_prob=0, scale_prob=0, shift_prob=0, affine_prob=0, noise_prob=0)


def crop(shape: tuple[int, int, int] = (6, 8, 8), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=shape).astype(np.float32), random.integers(0, 4, shape, dtype=np.uint8)


def apply(spec: Augment, voxels: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return augment(Crop(voxels, labels), spec, LABELS, np.random.default_rng(seed))[:2]


def test_nothing_asked_nothing_done() -> None:
    voxels, labels = crop()
    same, same_labels = apply(NOTHING, voxels, labels)
    assert np.array_equal(same, voxels) and np.array_equal(same_labels, labels)


@pytest.mark.parametrize(("name", "axis"), [("z", 0), ("y", 1), ("x", 2)])
def test_a_flip_mirrors_one_axis_and_swaps_sides(name: str, axis: int) -> None:
    voxels, labels = crop()
    flipped, flipped_labels = apply(replace(NOTHING, flip_prob=1, flip_axes=(name,)), voxels, labels)  # type: ignore[arg-type]
    assert np.array_equal(flipped, np.flip(voxels, axis))
    assert np.array_equal(flipped_labels, np.flip(np.array([0, 1, 3, 2], np.uint8)[labels], axis))


def test_two_flips_are_half_a_turn_and_swap_nothing() -> None:
    voxels, labels = crop()
    turned, turned_labels = apply(replace(NOTHING, flip_prob=1, flip_axes=("y", "x")), voxels, labels)
    assert np.array_equal(turned, np.rot90(voxels, 2, (1, 2)))
    assert np.array_equal(turned_labels, np.rot90(labels, 2, (1, 2)))


def handed(voxels: np.ndarray) -> np.ndarray:
    """Right kidney where the image is right-handed, left where it is left-handed: the sign of a triple product of
    gradients, which any turn keeps and any mirror changes."""
    v = voxels.astype(np.float64)
    steep = sum(g**2 for g in np.gradient(v))
    curved = sum(np.gradient(g, axis=axis) for axis, g in enumerate(np.gradient(v)))
    rows = np.stack([np.stack(np.gradient(f), -1) for f in (v, steep, curved)], -1)
    return np.where(np.linalg.det(rows) > 0, LABELS.index("right_kidney"), LABELS.index("left_kidney")).astype(np.uint8)


def test_whatever_is_turned_or_mirrored_labels_keep_what_handedness_says() -> None:
    """A network that tells right from left by the shape of the body is never told two things of one image."""
    voxels, _ = crop((8, 8, 8))
    spec, images = replace(NOTHING, flip_prob=0.5, rotate90_prob=0.5), set()
    for seed in range(200):
        turned, labels = apply(spec, voxels, handed(voxels), seed)
        assert np.array_equal(labels, handed(turned)), seed
        images.add(turned.tobytes())
    assert len(images) == 16  # every symmetry of a square prism


def test_flipping_twice_is_the_identity() -> None:
    spec = replace(NOTHING, flip_prob=1)
    voxels, labels = crop()
    again, again_labels = apply(spec, *apply(spec, voxels, labels))
    assert np.array_equal(again, voxels) and np.array_equal(again_labels, labels)


def test_a_right_organ_stays_on_the_right() -> None:
    # x grows to the patient's right: the right kidney has the larger x in every scan, also in its mirror image.
    labels = np.zeros((4, 4, 10), np.uint8)
    labels[..., 7:9], labels[..., 1:3] = LABELS.index("right_kidney"), LABELS.index("left_kidney")
    _, mirrored = apply(replace(NOTHING, flip_prob=1, flip_axes=("x",)), np.zeros(labels.shape, np.float32), labels)
    right, left = (np.argwhere(mirrored == LABELS.index(f"{side}_kidney"))[:, 2].mean() for side in ("right", "left"))
    assert right > left


def test_quarter_turns_keep_z_and_sides_and_turn_both_alike() -> None:
    voxels, _ = crop()
    labels = (voxels > 0).astype(np.uint8) * 2
    seen = set()
    for seed in range(40):
        turned, turned_labels = apply(replace(NOTHING, rotate90_prob=1), voxels, labels, seed)
        turns = [k for k in (1, 2, 3) if np.array_equal(turned, np.rot90(voxels, k, (1, 2)))]
        assert len(turns) == 1 and np.array_equal(turned_labels, (turned > 0) * 2)
        seen.update(turns)
    assert seen == {1, 2, 3}


def test_a_crop_that_is_not_square_gets_half_turns_only() -> None:
    voxels, labels = crop((4, 6, 8))
    for seed in range(10):
        turned, _ = apply(replace(NOTHING, rotate90_prob=1), voxels, labels, seed)
        assert np.array_equal(turned, np.rot90(voxels, 2, (1, 2)))


def test_intensity_changes_leave_labels_alone_and_stay_in_range() -> None:
    voxels = np.ones((6, 8, 8), np.float32)
    labels = crop()[1]
    spec = replace(NOTHING, scale_prob=1, scale_range=0.1, shift_prob=1, shift_range=0.2)
    levels = []
    for seed in range(200):
        changed, same_labels = apply(spec, voxels, labels, seed)
        assert np.array_equal(same_labels, labels) and np.ptp(changed) == 0
        levels.append(float(changed.flat[0]))
    assert 0.7 <= min(levels) < 0.8 and 1.2 < max(levels) <= 1.3
    assert np.mean(levels) == pytest.approx(1, abs=0.02)


def test_noise_has_its_deviation() -> None:
    voxels, labels = np.zeros((20, 30, 30), np.float32), np.zeros((20, 30, 30), np.uint8)
    noisy, _ = apply(replace(NOTHING, noise_prob=1, noise_std=0.05), voxels, labels)
    assert noisy.std() == pytest.approx(0.05, rel=0.05) and noisy.mean() == pytest.approx(0, abs=0.002)


def test_probabilities_are_kept() -> None:
    voxels, labels = crop()
    spec = replace(NOTHING, flip_prob=0.3, flip_axes=("z",))
    flips = sum(not np.array_equal(apply(spec, voxels, labels, seed)[0], voxels) for seed in range(1000))
    assert 240 < flips < 360  # four standard deviations


def test_the_generator_alone_decides() -> None:
    spec = Augment(flip_prob=0.5, rotate90_prob=0.5, scale_prob=0.5, shift_prob=0.5, noise_prob=0.5)
    voxels, labels = crop()
    keep = voxels.copy(), labels.copy()
    one, other = apply(spec, voxels, labels, 7), apply(spec, voxels, labels, 7)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({apply(spec, voxels, labels, seed)[0].tobytes() for seed in range(20)}) > 10
    assert np.array_equal(voxels, keep[0]) and np.array_equal(labels, keep[1])  # the cache must not change


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_types_shapes_and_labels_are_those_that_came_in(seed: int) -> None:
    spec = Augment(flip_prob=0.5, rotate90_prob=0.5, scale_prob=0.5, shift_prob=0.5, noise_prob=0.5)
    voxels, labels = crop((5, 7, 7), seed)
    labels = np.where(labels == 1, 0, labels).astype(np.uint8)  # no liver: it must not appear
    out, out_labels = apply(spec, voxels, labels, seed)
    assert out.shape == voxels.shape and out.dtype == np.float32 and out.flags.c_contiguous
    assert out_labels.shape == labels.shape and out_labels.dtype == np.uint8 and out_labels.flags.c_contiguous
    assert set(np.unique(out_labels)) <= {0, 2, 3}


AFFINE = replace(NOTHING, affine_prob=1.0)
PATCH = (8, 12, 16)


def affine(spec: Augment, voxels: np.ndarray, labels: np.ndarray, seed: int = 0,
           spacing_mm: tuple[float, float, float] = (3, 1, 1)) -> tuple[np.ndarray, np.ndarray]:
    return random_affine(Crop(voxels, labels), PATCH, spacing_mm, spec, np.random.default_rng(seed))[:2]


def with_margin(spec: Augment, spacing_mm: tuple[float, float, float] = (3, 1, 1)) -> tuple[int, int, int]:
    z, y, x = (p + 2 * m for p, m in zip(PATCH, affine_margin(PATCH, spacing_mm, spec), strict=True))
    return z, y, x


def middle(array: np.ndarray) -> np.ndarray:
    return array[tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(array.shape, PATCH, strict=True))]


def test_without_affine_no_margin_is_read() -> None:
    assert affine_margin(PATCH, (3, 1, 1), NOTHING) == (0, 0, 0)


def test_affine_that_does_not_happen_is_the_middle() -> None:
    spec = replace(AFFINE, affine_prob=1e-9)
    voxels, labels = crop(with_margin(spec))
    out, out_labels = affine(spec, voxels, labels)
    assert np.array_equal(out, middle(voxels)) and np.array_equal(out_labels, middle(labels))


@pytest.mark.parametrize("degrees", [0.0, 10.0, 90.0])
def test_no_angle_and_no_zoom_is_the_identity_whatever_the_margin(degrees: float) -> None:
    shape = with_margin(replace(AFFINE, rotate_degrees=degrees))
    voxels, labels = crop(shape)
    out, out_labels = affine(replace(AFFINE, rotate_degrees=0, zoom_range=0), voxels, labels)
    assert np.array_equal(out, middle(voxels)) and np.array_equal(out_labels, middle(labels))


@pytest.mark.parametrize("spacing_mm", [(3.0, 1.0, 1.0), (1.0, 2.0, 0.5), (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("degrees", [0.0, 10.0, 45.0, 90.0, 180.0])
@pytest.mark.parametrize("zoom", [0.0, 0.3])
def test_the_margin_is_enough(spacing_mm: tuple[float, float, float], degrees: float, zoom: float) -> None:
    spec = replace(AFFINE, rotate_degrees=degrees, zoom_range=zoom)
    shape = with_margin(spec, spacing_mm)
    # Coordinates as voxel values: linear interpolation gives them back exactly, unless an edge was repeated.
    coordinates = np.indices(shape).astype(np.float64)
    rim = np.ones(shape, np.uint8)
    rim[1:-1, 1:-1, 1:-1] = 0
    for seed in range(12):
        out = [affine(spec, axis, rim, seed, spacing_mm) for axis in coordinates]
        assert not out[0][1].any()  # the outermost voxels are never needed
        for values, _ in out:
            assert np.abs(np.diff(values, 2, axis=2)).max() < 1e-9  # straight lines stay straight


@pytest.mark.parametrize("spacing_mm", [(3.0, 1.0, 1.0), (2.0, 1.5, 0.75)])
def test_a_turn_keeps_distances_in_millimetres(spacing_mm: tuple[float, float, float]) -> None:
    spec = replace(AFFINE, rotate_degrees=40, zoom_range=0)
    coordinates = np.indices(with_margin(spec, spacing_mm)).astype(np.float64)
    labels = np.zeros(coordinates.shape[1:], np.uint8)
    for seed in range(5):
        source_mm = np.stack([affine(spec, c * mm, labels, seed, spacing_mm)[0]
                              for c, mm in zip(coordinates, spacing_mm, strict=True)], axis=-1)
        target_mm = np.moveaxis(np.indices(PATCH), 0, -1) * np.array(spacing_mm)
        picked = np.random.default_rng(seed).integers(0, np.prod(PATCH), (50, 2))
        a, b = (source_mm.reshape(-1, 3)[picked[:, i]] for i in (0, 1))
        c, d = (target_mm.reshape(-1, 3)[picked[:, i]] for i in (0, 1))
        np.testing.assert_allclose(np.linalg.norm(a - b, axis=1), np.linalg.norm(c - d, axis=1), atol=1e-9)
        assert not np.allclose(source_mm - source_mm[0, 0, 0], target_mm)  # and it did turn


def test_image_and_labels_turn_together_and_no_label_is_invented() -> None:
    spec = replace(AFFINE, rotate_degrees=30, zoom_range=0.2)
    labels = np.zeros(with_margin(spec), np.uint8)
    z, y, x = (n // 2 for n in labels.shape)
    labels[z - 3 : z + 3, y - 5 : y + 3, x - 6 : x + 4] = 3
    labels[z - 1 : z + 1, y - 2 : y + 2, x - 2 : x + 2] = 1
    for seed in range(10):
        out, out_labels = affine(spec, (labels == 3).astype(np.float32), labels, seed)
        assert set(np.unique(out_labels)) == {0, 1, 3}
        # The nearest of eight neighbours weighs an eighth or more.
        assert (out_labels == 3)[out > 7 / 8].all() and not (out_labels == 3)[out < 1 / 8].any()


def test_affine_is_drawn_from_the_generator() -> None:
    voxels, labels = crop(with_margin(AFFINE))
    assert np.array_equal(affine(AFFINE, voxels, labels, 5)[0], affine(AFFINE, voxels, labels, 5)[0])
    assert not np.array_equal(affine(AFFINE, voxels, labels, 5)[0], affine(AFFINE, voxels, labels, 6)[0])


def test_which_organs_were_looked_for_is_mirrored_with_the_labels() -> None:
    spec = replace(NOTHING, flip_prob=1, flip_axes=("x",))
    right = LABELS.groups((LABELS.index("right_kidney"),))
    left = LABELS.groups((LABELS.index("left_kidney"),))
    turned = augment(Crop(*crop(), None, right), spec, LABELS, np.random.default_rng(0))
    assert turned.groups is not None
    np.testing.assert_array_equal(turned.groups, left)
    kept = augment(Crop(*crop(), None, right), replace(spec, flip_axes=("x", "y")), LABELS, np.random.default_rng(0))
    assert kept.groups is not None
    np.testing.assert_array_equal(kept.groups, right)
