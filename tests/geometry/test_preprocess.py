"""Both grids cover the same space: what the way there does to a label, the way back undoes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autosam3d.geometry.preprocess import (
    Box,
    HuWindow,
    Preprocess,
    Undo,
    find_body,
    plan_grid,
    prepare_ct,
    prepare_labels,
)
from autosam3d.geometry.restore import SlabRestorer, restore_labels
from autosam3d.volume import Volume

Size = tuple[int, int, int]


def make_spec(spacing_mm: tuple[float, float, float] | None, crop: bool = False, low: float = -1000.0) -> Preprocess:
    return Preprocess(
        spacing_mm=spacing_mm, hu_window=HuWindow(low_hu=low, high_hu=1000.0), subtract_hu=50.0, divide_hu=141.0,
        crop_to_body=crop,
    )


def make_volume(voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    return Volume(voxels_hu=voxels.astype(np.float32), affine=np.diag([*spacing_mm[::-1], 1.0]))


def make_patient(shape: Size = (40, 120, 130), spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)) -> np.ndarray:
    """Air, an elliptic trunk with two lungs, and a table below its back (low y)."""
    z, y, x = (np.arange(n) * mm for n, mm in zip(shape, spacing_mm, strict=True))
    y0, x0 = y.mean(), x.mean()
    hu = np.full(shape, -1000.0, np.float32)
    trunk = ((y[:, None] - y0) / 100) ** 2 + ((x - x0) / 150) ** 2 < 1
    lung = ((y[:, None] - y0) / 60) ** 2 + ((np.abs(x - x0) - 75) / 50) ** 2 < 1
    hu[:, trunk] = 40
    hu[np.ix_(z < z.mean(), *map(np.arange, shape[1:]))] = np.where(lung, -850.0, hu[0])
    hu[:, 14:16, 10:-10] = 100  # a table shell 6 mm thick, 22 mm below the skin
    return hu


# ------------------------------------------------------------------------------------------------ body


def test_body_leaves_out_the_table_and_keeps_the_trunk() -> None:
    hu = make_patient()
    box = find_body(hu, (3.0, 3.0, 3.0))
    trunk = np.argwhere(hu[-1, 25:] == 40)
    assert (box.start[0], box.stop[0]) == (0, 40)
    assert 16 <= box.start[1] <= 25 + trunk[:, 0].min() - 3 and box.stop[1] >= 25 + trunk[:, 0].max() + 3
    assert box.start[2] <= trunk[:, 1].min() - 3 and box.stop[2] >= trunk[:, 1].max() + 3
    assert np.prod(box.shape) < 0.85 * hu.size


@pytest.mark.parametrize("background_hu", [-1000.0, -1024.0, -3024.0])
@pytest.mark.parametrize("spacing_mm", [(5.0, 0.7, 0.7), (1.0, 4.0, 4.0), (0.4, 0.4, 0.4), (20.0, 9.0, 9.0)])
def test_body_box_holds_every_body_voxel(background_hu: float, spacing_mm: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(3)
    shape = (29, 61, 67)
    hu = np.full(shape, background_hu, np.float32)
    start = [int(n * 0.3) for n in shape]
    stop = [int(n * 0.7) for n in shape]
    hu[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 30
    box = find_body(hu + rng.normal(0, 20, shape).astype(np.float32), spacing_mm)
    assert all(a <= b for a, b in zip(box.start, start, strict=True))
    assert all(a >= b for a, b in zip(box.stop, stop, strict=True))


def test_body_is_the_whole_volume_where_there_is_none() -> None:
    assert find_body(np.full((7, 9, 11), -1000.0), (1, 1, 1)) == Box((0, 0, 0), (7, 9, 11))


def test_body_is_the_whole_volume_inside_the_patient() -> None:
    rng = np.random.default_rng(0)
    inside = rng.normal(40, 30, (20, 50, 60)).astype(np.float32)
    assert find_body(inside, (2, 1, 1)).shape == (20, 50, 60)
    assert find_body(inside[:1], (2, 1, 1)).shape == (1, 50, 60)


def test_body_keeps_a_lung_that_the_field_of_view_cuts_open() -> None:
    hu = np.full((40, 90, 90), -850.0, np.float32)
    hu[:, :, :30] = 40  # mediastinum on one side, no chest wall on the other
    assert find_body(hu, (2.5, 2.5, 2.5)).shape == hu.shape


def test_body_keeps_both_legs() -> None:
    hu = np.full((60, 80, 120), -1000.0, np.float32)
    hu[:, 30:60, 15:40] = 40
    hu[:, 30:60, 80:100] = 40
    box = find_body(hu, (2.5, 2.5, 2.5))
    assert box.start[2] <= 15 and box.stop[2] >= 100


# ------------------------------------------------------------------------------------------------ there


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 17), st.integers(1, 19), st.integers(1, 23)),
    spacing_mm=st.tuples(*[st.floats(0.4, 6.0)] * 3),
    target_mm=st.tuples(*[st.floats(0.5, 4.0)] * 3),
)
def test_resampling_equals_torch(shape: Size, spacing_mm: tuple, target_mm: tuple) -> None:
    hu = np.random.default_rng(1).uniform(-900, 900, shape)
    volume = make_volume(hu, spacing_mm)
    prepared = prepare_ct(volume, make_spec(target_mm))
    new = tuple(max(1, round(n * s / t)) for n, s, t in zip(shape, volume.spacing_mm, target_mm, strict=True))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(hu)[None, None], size=new, mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(prepared.voxels * 141 + 50, expected[0, 0].numpy(), atol=2e-3)
    assert prepared.voxels.dtype == np.float32 and prepared.undo.prepared_shape == new
    # The extents coincide exactly.
    np.testing.assert_allclose(
        np.array(prepared.spacing_mm) * new, np.array(shape) * volume.spacing_mm, rtol=1e-12
    )


def test_native_spacing_is_the_identity() -> None:
    hu = np.random.default_rng(2).integers(-900, 900, (7, 11, 13)).astype(np.float32)
    prepared = prepare_ct(make_volume(hu, (2.5, 0.7, 0.7)), make_spec(None))
    np.testing.assert_array_equal(prepared.voxels, (hu - np.float32(50)) / np.float32(141))
    assert prepared.spacing_mm == pytest.approx((2.5, 0.7, 0.7), rel=1e-6)


def test_padding_and_metal_do_not_bleed_into_their_neighbours() -> None:
    hu = np.zeros((1, 1, 8), np.float32)
    hu[..., 0], hu[..., 7] = -3024, 30000
    mild = hu.clip(-1024, 3071)
    spec = make_spec((1.0, 1.0, 0.7))
    np.testing.assert_array_equal(
        prepare_ct(make_volume(hu, (1, 1, 1)), spec).voxels, prepare_ct(make_volume(mild, (1, 1, 1)), spec).voxels
    )


def test_window_and_normalisation_and_air() -> None:
    spec = Preprocess(spacing_mm=None, hu_window=HuWindow(low_hu=-125, high_hu=275), subtract_hu=-125, divide_hu=400,
                      crop_to_body=False)
    voxels = prepare_ct(make_volume(np.array([[[-1000.0, -125, 75, 275, 900]]]), (1, 1, 1)), spec).voxels
    np.testing.assert_allclose(voxels[0, 0], [0, 0, 0.5, 1, 1])
    assert spec.air == 0.0
    assert make_spec(None, low=-2000.0).air == pytest.approx((-1024 - 50) / 141)


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 1, 1), (13, 1, 6)])
@pytest.mark.parametrize("target_mm", [(1.0, 1.0, 1.0), (0.6, 2.3, 1.5), (3.7, 0.9, 3.1)])
def test_labels_lie_where_the_image_lies(shape: Size, target_mm: tuple) -> None:
    labels = np.random.default_rng(0).integers(0, 9, shape).astype(np.int16)
    undo = plan_grid(make_volume(labels, (2.0, 1.0, 1.5)), make_spec(target_mm))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].double(), size=undo.prepared_shape, mode="nearest-exact"
    )
    prepared = prepare_labels(labels, undo)
    assert prepared.dtype == np.uint8
    np.testing.assert_array_equal(prepared, expected[0, 0].numpy())


def test_labels_that_cannot_be_meant_are_refused() -> None:
    undo = Undo((2, 2, 2), Box((0, 0, 0), (2, 2, 2)), (2, 2, 2))
    with pytest.raises(ValueError, match="300"):
        prepare_labels(np.full((2, 2, 2), 300), undo)
    with pytest.raises(ValueError, match="shape"):
        prepare_labels(np.zeros((2, 2, 3), np.uint8), undo)


# ------------------------------------------------------------------------------------------------ and back


def restore_with_torch(probs: np.ndarray, undo: Undo) -> np.ndarray:
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(probs).double()[None], size=undo.box.shape, mode="trilinear", align_corners=False
    )
    labels = np.zeros(undo.native_shape, np.uint8)
    labels[undo.box.slices] = whole[0].argmax(0).numpy()
    return labels


@settings(max_examples=30, deadline=None)
@given(
    box_shape=st.tuples(*[st.integers(1, 21)] * 3), prepared_shape=st.tuples(*[st.integers(1, 19)] * 3),
    slab=st.integers(1, 7), seed=st.integers(0, 99), half=st.booleans(),
)
def test_restoring_equals_argmax_of_the_whole(box_shape: Size, prepared_shape: Size, slab: int, seed: int, half: bool):
    rng = np.random.default_rng(seed)
    # Smooth probabilities with much background, as networks give them.
    logits = rng.normal(0, 3, (4, *prepared_shape))
    logits[0] += 3
    probs = np.exp(logits) / np.exp(logits).sum(0)
    probs = probs.astype(np.float16 if half else np.float32)
    corner = tuple(rng.integers(0, 4, 3))
    stop = tuple(int(a + b) for a, b in zip(corner, box_shape, strict=True))
    undo = Undo(tuple(int(b + 2) for b in stop), Box(tuple(map(int, corner)), stop), prepared_shape)  # type: ignore[arg-type]
    slabs = (probs[:, z : z + slab] for z in range(0, prepared_shape[0], slab))
    np.testing.assert_array_equal(restore_labels(slabs, undo, 4), restore_with_torch(probs, undo))


def test_equal_probabilities_go_to_the_lowest_label() -> None:
    undo = Undo((9, 8, 7), Box((0, 0, 0), (9, 8, 7)), (4, 5, 3))
    assert restore_labels([np.full((3, 4, 5, 3), 1 / 3, np.float32)], undo, 3).max() == 0
    probs = np.full((3, 4, 5, 3), 0.45, np.float32)
    probs[0] = 0.1
    assert np.all(restore_labels([probs], undo, 3) == 1)


def test_native_grid_gives_the_argmax_itself() -> None:
    labels = np.random.default_rng(5).integers(0, 4, (6, 7, 8))
    probs = np.eye(4, dtype=np.float16)[:, labels]
    undo = Undo((6, 7, 8), Box((0, 0, 0), (6, 7, 8)), (6, 7, 8))
    np.testing.assert_array_equal(restore_labels([probs], undo, 4), labels)


@pytest.mark.parametrize("native_mm", [(1.0, 1.0, 1.0), (5.0, 0.6, 0.6), (0.8, 2.1, 1.3)])
def test_a_ball_survives_the_way_there_and_back(native_mm: tuple[float, float, float]) -> None:
    size_mm = np.array([60.0, 60.0, 60.0])
    shape = tuple(int(n) for n in np.round(size_mm / native_mm))
    centers = np.meshgrid(*((np.arange(n) + 0.5) * mm for n, mm in zip(shape, native_mm, strict=True)), indexing="ij")
    distance = np.sqrt(sum((c - m) ** 2 for c, m in zip(centers, (31.0, 28.0, 30.0), strict=True)))
    labels = (distance < 18).astype(np.uint8)
    undo = plan_grid(make_volume(labels, native_mm), make_spec((1.5, 1.5, 1.5)))
    probs = np.eye(2, dtype=np.float32)[:, prepare_labels(labels, undo)]
    back = restore_labels([probs], undo, 2)
    assert back.shape == labels.shape
    # Only voxels within one voxel diagonal of the surface may change, and the centroid stays.
    assert np.all(np.abs(distance[back != labels] - 18) < np.linalg.norm(np.maximum(native_mm, 1.5)))
    moved = [abs(c[labels == 1].mean() - c[back == 1].mean()) for c in centers]
    assert max(moved) < 0.15


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_way_there_and_back_commutes_with_mirrors(axis: int) -> None:
    """So it favours no direction: half a voxel lost on either way would show as twice that."""
    rng = np.random.default_rng(11)
    # Odd sizes: no prepared centre falls on the border of two native voxels, where nearest must choose a side.
    shape, native_mm = (17, 41, 33), (2.5, 1.0, 1.2)
    volume = make_volume(rng.uniform(-900, 900, shape), native_mm)
    mirrored = make_volume(np.flip(volume.voxels_hu, axis), native_mm)
    spec = make_spec((1.5, 1.5, 1.5))
    ct, ct_mirrored = (prepare_ct(v, spec).voxels for v in (volume, mirrored))
    np.testing.assert_allclose(np.flip(ct_mirrored, axis), ct, atol=1e-4)
    undo = plan_grid(volume, spec)
    labels = ndimage.zoom(rng.integers(0, 3, (4, 6, 6)), np.array(shape) / (4, 6, 6), order=0).astype(np.uint8)
    there, there_mirrored = prepare_labels(labels, undo), prepare_labels(np.flip(labels, axis), undo)
    np.testing.assert_array_equal(np.flip(there_mirrored, axis), there)
    probs = rng.random((3, *undo.prepared_shape), np.float32)
    back, back_mirrored = (restore_labels([p], undo, 3) for p in (probs, np.flip(probs, axis + 1)))
    np.testing.assert_array_equal(np.flip(back_mirrored, axis), back)


def test_restorer_counts_its_slices() -> None:
    undo = Undo((4, 4, 4), Box((0, 0, 0), (4, 4, 4)), (3, 2, 2))
    restorer = SlabRestorer(undo, 2)
    restorer.add(np.ones((2, 2, 2, 2), np.float32))
    with pytest.raises(ValueError, match="got 2"):
        restorer.finish()
    with pytest.raises(ValueError, match="got more"):
        restorer.add(np.ones((2, 2, 2, 2), np.float32))
    with pytest.raises(ValueError, match="slab"):
        restorer.add(np.ones((3, 1, 2, 2), np.float32))


def test_real_scan_body_and_round_trip(real_data) -> None:
    """On head-and-neck planning CTs: all organs lie in the body box, and come back nearly unchanged.

    Cases 151 and 203 were cut to a region by their makers: the lower slices hold only a block around the cord.
    """
    from autosam3d.io import read_ct, read_segmentation

    scores = []
    for case in ("kbp_001", "kbp_004", "kbp_151", "kbp_203"):
        image_path = next(real_data.glob(f"Dataset50*/images*/{case}_0000.nii.gz"))
        volume = read_ct(image_path)
        labels = read_segmentation(
            next(image_path.parents[1].glob(f"labels*/{case}.nii.gz"))
        ).labels
        box = find_body(volume.voxels_hu, volume.spacing_mm)
        inside = np.zeros(labels.shape, bool)
        inside[box.slices] = True
        assert not labels[~inside].any()
        undo = plan_grid(volume, make_spec((2.0, 2.0, 2.0), crop=True))
        probs = np.eye(8, dtype=np.float16)[:, prepare_labels(labels, undo)]
        back = restore_labels([probs], undo, 8)
        both = (labels > 0) & (back == labels)
        scores.append(2 * both.sum() / ((labels > 0).sum() + (back > 0).sum()))
    assert min(scores) > 0.97
