"""Cutting and stitching: nothing is left out, nothing is counted twice, ones stay ones."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import _get_scan_interval

from autosam3d.geometry import patches
from autosam3d.geometry.patches import (
    Stitcher,
    Tiling,
    gaussian_importance,
    grid_starts,
    pad_to,
    stitch,
    unpad,
    unpad_slabs,
)

Size = tuple[int, int, int]
SIZES = st.tuples(*[st.integers(1, 12)] * 3)


def stitch_whole(windows, stitcher: Stitcher) -> np.ndarray:
    return np.concatenate(list(stitch(windows, stitcher)), axis=1)


def window_at(array: np.ndarray, start: Size, size: Size) -> np.ndarray:
    return array[(..., *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]


# ------------------------------------------------------------------------------------------------ grid


@given(patch_size=SIZES, more=st.tuples(*[st.integers(0, 25)] * 3), overlap=st.floats(0, 0.95))
def test_grid_covers_everything_once_in_order(patch_size: Size, more: Size, overlap: float) -> None:
    shape = tuple(p + m for p, m in zip(patch_size, more, strict=True))
    starts = grid_starts(shape, patch_size, overlap)
    assert starts == sorted(set(starts))
    for n, p, axis in zip(shape, patch_size, zip(*starts, strict=True), strict=True):
        axis = sorted(set(axis))
        assert axis[0] == 0 and axis[-1] == n - p
        gaps = np.diff(axis)
        step = max(1, int(p * (1 - overlap) + 1e-6))
        assert len(gaps) == 0 or (gaps.max() <= step and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(128, 128, 128), (294, 400, 400), (129, 255, 131)])
def test_grid_has_as_many_patches_as_monai(shape: Size, overlap: float) -> None:
    size = (128, 128, 128)
    interval = _get_scan_interval(shape, size, 3, [overlap] * 3)
    assert len(grid_starts(shape, size, overlap)) == len(dense_patch_slices(shape, size, interval))


def test_grid_of_the_paper() -> None:
    assert len(grid_starts((294, 400, 400), (128, 128, 128), 0.75)) == 7 * 10 * 10


@pytest.mark.parametrize(("shape", "overlap"), [((7, 8, 8), 0.5), ((8, 8, 8), 1.0), ((8, 8, 8), -0.1)])
def test_grid_refuses_what_it_cannot_do(shape: Size, overlap: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        grid_starts(shape, (8, 8, 8), overlap)


# ------------------------------------------------------------------------------------------------ importance


@pytest.mark.parametrize("size", [(1, 1, 1), (8, 8, 8), (5, 16, 32)])
def test_importance_is_positive_symmetric_and_highest_in_the_middle(size: Size) -> None:
    weights = gaussian_importance(size)
    assert weights.shape == size and weights.dtype == np.float32
    assert weights.min() >= 1e-3 and weights.max() == 1
    np.testing.assert_array_equal(weights, np.flip(weights))
    assert weights[tuple(n // 2 for n in size)] == 1


def test_importance_is_nearly_that_of_monai() -> None:
    # MONAI centres an even patch half a voxel off; an odd one agrees.
    ours = gaussian_importance((9, 17, 33))
    theirs = compute_importance_map((9, 17, 33), mode="gaussian", sigma_scale=0.125).numpy()
    np.testing.assert_allclose(ours, theirs / theirs.max(), atol=1e-6)


# ------------------------------------------------------------------------------------------------ padding


@given(shape=SIZES, size=SIZES)
def test_unpad_undoes_pad(shape: Size, size: Size) -> None:
    ct = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    padded, padding = pad_to(ct, size, fill=-7.0)
    assert padded.shape == tuple(max(n, s) for n, s in zip(shape, size, strict=True))
    np.testing.assert_array_equal(unpad(padded, padding), ct)
    assert np.count_nonzero(padded == -7.0) == padded.size - ct.size
    slabs = (padded[None, z : z + 3] for z in range(0, padded.shape[0], 3))
    np.testing.assert_array_equal(np.concatenate(list(unpad_slabs(slabs, padding, padded.shape)), axis=1)[0], ct)


# ------------------------------------------------------------------------------------------------ stitching


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("importance", ["gaussian", "constant"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stitching_ones_returns_ones(overlap: float, importance: str, dtype: type) -> None:
    shape, size = (20, 17, 33), (8, 8, 16)
    stitcher = Stitcher(shape, 1, size, Tiling(importance=importance).weights(size), dtype=dtype)
    ones = np.ones((1, *size), np.float16)
    result = stitch_whole(((ones, start) for start in grid_starts(shape, size, overlap)), stitcher)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.ones((1, *shape), np.float32))


@settings(max_examples=40, deadline=None)
@given(
    patch_size=SIZES, more=st.tuples(*[st.integers(0, 14)] * 3), overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    gaussian=st.booleans(), seed=st.integers(0, 99),
)
def test_rolling_equals_adding_up_the_whole(
    patch_size: Size, more: Size, overlap: float, gaussian: bool, seed: int
) -> None:
    shape = tuple(p + m for p, m in zip(patch_size, more, strict=True))
    rng = np.random.default_rng(seed)
    weights = gaussian_importance(patch_size) if gaussian else np.ones(patch_size, np.float32)
    starts = grid_starts(shape, patch_size, overlap)
    probs = [rng.random((3, *patch_size), np.float32) for _ in starts]
    sums, total = np.zeros((3, *shape)), np.zeros(shape)
    for start, p in zip(starts, probs, strict=True):
        window_at(sums, start, patch_size)[...] += p * weights
        window_at(total, start, patch_size)[...] += weights
    stitcher = Stitcher(shape, 3, patch_size, weights if gaussian else None)
    result = stitch_whole(zip(probs, starts, strict=True), stitcher)
    np.testing.assert_allclose(result, sums / total, rtol=2e-5)


def test_float16_input_is_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    shape, size = (10, 9, 8), (4, 4, 4)
    starts = grid_starts(shape, size, 0.75)
    probs = [rng.random((2, *size)).astype(np.float16) for _ in starts]
    results = [
        stitch_whole(zip([p.astype(kind) for p in probs], starts, strict=True), Stitcher(shape, 2, size))
        for kind in (np.float16, np.float32)
    ]
    np.testing.assert_array_equal(*results)


def test_sums_on_disk_and_in_half_precision(tmp_path) -> None:
    rng = np.random.default_rng(0)
    shape, size = (23, 12, 11), (8, 8, 8)
    starts = grid_starts(shape, size, 0.75)
    probs = [rng.random((2, *size), np.float32) for _ in starts]
    importance = gaussian_importance(size)

    def run(**options) -> np.ndarray:
        return stitch_whole(zip(probs, starts, strict=True), Stitcher(shape, 2, size, importance, **options))

    whole = run()
    np.testing.assert_array_equal(run(scratch=tmp_path), whole)
    assert list(tmp_path.iterdir()) == []
    assert np.abs(run(dtype=np.float16) - whole).max() < 5e-3


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="blocks are reserved in another way")
def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patches.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Stitcher((8, 8, 8), 2, (4, 4, 4), scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_slices() -> None:
    import tracemalloc

    peaks = []
    for depth in (32, 320):
        shape, size = (depth, 24, 24), (16, 16, 16)
        ones = np.ones((4, *size), np.float16)
        tracemalloc.start()
        for slab in stitch(((ones, start) for start in grid_starts(shape, size, 0.5)), Stitcher(shape, 4, size)):
            assert slab.shape[1] <= 8
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_windows_out_of_order_or_place_are_refused() -> None:
    stitcher = Stitcher((12, 8, 8), 1, (4, 8, 8))
    ones = np.ones((1, 4, 8, 8), np.float32)
    stitcher.add(ones, (0, 0, 0))
    with pytest.raises(ValueError, match="z = 0"):
        stitcher.add(ones, (2, 0, 0))  # slices 0 and 1 were not taken out
    assert sum(slab.shape[1] for slab in stitcher.finished(2)) == 2
    with pytest.raises(ValueError, match="z = 2"):
        stitcher.add(ones, (0, 0, 0))
    with pytest.raises(ValueError, match="inside"):
        stitcher.add(ones, (2, 1, 0))
    with pytest.raises(ValueError, match="shape"):
        stitcher.add(ones[:, :3], (2, 0, 0))
    with pytest.raises(ValueError, match="no"):
        list(stitcher.finished())  # nothing covers slices 4 to 11


def test_importance_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Stitcher((8, 8, 8), 1, (4, 4, 4), np.zeros((4, 4, 4)))
