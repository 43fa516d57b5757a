"""Outlines of masks: exact areas, exact fillings by every rule that readers have, holes that stay holes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from autosam3d.io.dicom.outlines import filled, outlines


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _winding(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often an outline runs around each pixel's centre, counted along the other axis than `filled` does."""
    x1, y1 = outline.T
    x2, y2 = np.roll(outline, -1, axis=0).T
    rows, columns = np.mgrid[: shape[0], : shape[1]][..., None]
    forth, back = (x1 <= columns) & (columns < x2), (x2 <= columns) & (columns < x1)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = y1 + (columns - x1) * (y2 - y1) / (x2 - x1) < rows
    return ((forth & above).astype(int) - (back & above).astype(int)).sum(axis=-1)


def _masks() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    masks = [np.ones((1, 1), bool), np.eye(4, dtype=bool), np.ones((3, 5), bool), np.zeros((3, 4), bool)]
    nested = np.zeros((13, 17), bool)
    nested[1:12, 1:16], nested[3:10, 3:14], nested[5:8, 5:12], nested[6, 7] = True, False, True, False
    masks.append(nested)
    for density in (0.1, 0.5, 0.8, 0.95):
        masks += [rng.random(rng.integers(2, 24, 2)) < density for _ in range(8)]
        masks += [ndimage.gaussian_filter(rng.random((30, 21)), 1.5) > np.float64(0.45 + 0.1 * density)]
    return masks


@pytest.mark.parametrize("mask", _masks())
def test_every_rule_of_filling_gives_the_mask_back(mask: np.ndarray) -> None:
    found = outlines(mask)
    assert len(found) == ndimage.label(mask)[1]  # one piece, one outline: holes are part of it
    assert sum(map(_area, found)) == pytest.approx(mask.sum())
    zeros = np.zeros(mask.shape, int)
    np.testing.assert_array_equal(sum((filled(o, mask.shape).astype(int) for o in found), zeros), mask)  # XOR and OR
    np.testing.assert_array_equal(np.abs(sum((_winding(o, mask.shape) for o in found), zeros)), mask)


def test_outlines_run_along_borders_not_centres() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    (outline,) = outlines(mask)
    assert {tuple(p) for p in outline.tolist()} == {(1.5, 0.5), (4.5, 0.5), (4.5, 2.5), (1.5, 2.5)}


def test_a_channel_meets_no_centre_and_no_corner() -> None:
    mask = np.ones((5, 5), bool)
    mask[2, 2] = False
    (outline,) = outlines(mask)
    assert sorted({y for _, y in outline.tolist()} - {-0.5, 1.5, 2.5, 4.5}) == [1.75]


def test_filled_clips_what_lies_outside() -> None:
    square = np.array([(-3.0, -3), (1.5, -3), (1.5, 9), (-3, 9)])
    np.testing.assert_array_equal(filled(square, (3, 4)), [[1, 1, 0, 0]] * 3)
