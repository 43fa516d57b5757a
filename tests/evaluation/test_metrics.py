"""Closed forms, laws, and parity with MONAI and surface-distance where those two are right."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist
from surface_distance import lookup_tables

from autosam3d.evaluation import surfaces
from autosam3d.evaluation.metrics import OrganScore, dice_per_label, evaluate_case
from autosam3d.evaluation.surfaces import surface_distances, surfel_areas_mm2
from autosam3d.labels import LabelMap

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.9, 1.4), (0.7, 2.5, 2.5)]
ONE = {1: "organ"}


def blob(seed: int, shape: tuple[int, int, int] = (22, 26, 24), smooth: float = 2.0, margin: int = 2) -> np.ndarray:
    """A ragged random mask, empty within `margin` of the border."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    mask = field > 0.4 * field.std()
    inner = tuple(slice(margin, n - margin) for n in shape)
    out = np.zeros(shape, bool)
    out[inner] = mask[inner]
    return out


def score(prediction: np.ndarray, truth: np.ndarray, spacing_mm=(1.0, 1.0, 1.0), tolerances_mm=(1.0,)) -> OrganScore:
    (only,) = evaluate_case(prediction.astype(np.uint8), truth.astype(np.uint8), spacing_mm, ONE, tolerances_mm)
    return only


def tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None].float()


# ------------------------------------------------------------------------------------------------- closed forms


def test_two_cubes_with_a_gap_of_3_mm():
    n = 10
    truth, prediction = np.zeros((14, 14, 30), bool), np.zeros((14, 14, 30), bool)
    truth[2:12, 2:12, 2:12] = True
    prediction[2:12, 2:12, 15:25] = True
    face = (n - 1) ** 2 + 4 * (n - 1) * math.sqrt(0.5) + 4 * math.sqrt(3) / 8
    whole = 6 * (n - 1) ** 2 + 12 * (n - 1) * math.sqrt(0.5) + 8 * math.sqrt(3) / 8
    surfaces = surface_distances(prediction, truth, (1, 1, 1))
    assert surfaces.truth_mm2.sum() == pytest.approx(whole, rel=1e-12)
    assert surfaces.nsd(2.99) == 0
    assert surfaces.nsd(3) == pytest.approx(face / whole, rel=1e-12)
    assert surfaces.hausdorff_mm(100) == 13
    result = score(prediction, truth)
    assert (result.dice, result.status, result.truth_ml, result.volume_error_ml) == (0, "scored", 1.0, 0.0)


def test_a_cube_moved_by_one_thick_slice_of_3_mm():
    """10 x 10 x 10 voxels of 3 x 1 x 1 mm, moved along z: side walls coincide but for their ends."""
    truth = np.zeros((16, 14, 14), bool)
    truth[2:12, 2:12, 2:12] = True
    prediction = np.roll(truth, 1, axis=0)
    rim = 36 * math.hypot(1.5, 0.5) + 4 * 0.5 * math.sqrt(0.25**2 + 2 * 0.75**2)
    wall = 9 * (36 * 3 + 4 * 3 * math.sqrt(0.5))
    whole = 2 * (81 + rim) + wall
    result = score(prediction, truth, (3, 1, 1), (0.0, 0.99, 1.0, 3.0))
    assert result.nsd == pytest.approx([(wall + rim) / whole] * 2 + [(wall + rim + 32) / whole, 1.0], rel=1e-12)
    assert result.dice == pytest.approx(0.9)
    assert result.hd95_mm == 3


def test_volume_error_has_a_sign_and_a_percentage():
    truth, prediction = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    truth[2:7, 2:7, 2:7] = True
    prediction[2:7, 2:7, 2:6] = True
    result = score(prediction, truth, (2, 1, 4))
    assert result.truth_ml == pytest.approx(125 * 8 / 1000)
    assert result.volume_error_ml == pytest.approx(-25 * 8 / 1000)
    assert result.volume_error_percent == pytest.approx(-20)


def test_equal_masks_are_perfect_even_at_tolerance_0():
    result = score(blob(1), blob(1), (2, 1, 1), (0.0, 1.0))
    assert (result.dice, result.nsd, result.hd95_mm) == (1.0, (1.0, 1.0), 0.0)


# ------------------------------------------------------------------------------------------------- absent organs


def test_absent_organs_follow_the_written_rule():
    shape, labels = (12, 12, 12), LabelMap(organs=("both", "missed", "invented", "neither"))
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    truth[2:5, 2:5, 2:5] = prediction[2:5, 2:5, 2:5] = 1
    truth[6:9, 2:5, 2:5] = 2
    prediction[6:9, 6:9, 6:10] = 3
    scores = {s.organ: s for s in evaluate_case(prediction, truth, (1, 1, 1), labels, (1.0, 2.0))}
    assert list(scores) == ["both", "missed", "invented"]
    missed, invented = scores["missed"], scores["invented"]
    assert (missed.status, missed.dice, missed.nsd, missed.hd95_mm) == ("missed", 0.0, (0.0, 0.0), math.inf)
    assert (invented.status, invented.dice, invented.nsd, invented.hd95_mm) == ("false_positive", None, (), None)
    assert invented.prediction_ml == pytest.approx(0.036)
    assert invented.volume_error_percent is None


def test_nothing_anywhere_scores_nothing():
    empty = np.zeros((5, 6, 7), np.uint16)
    assert evaluate_case(empty, empty, (1, 1, 1), ONE) == []


def test_labels_that_nobody_named_are_ignored():
    truth = np.zeros((9, 9, 9), np.uint16)
    truth[2:5, 2:5, 2:5], truth[6, 6, 6] = 300, 7
    (only,) = evaluate_case(truth, truth, (1, 1, 1), {300: "big number"})
    assert (only.label, only.dice) == (300, 1.0)


@pytest.mark.parametrize(
    ("prediction", "spacing_mm", "tolerances_mm", "word"),
    [
        (np.zeros((3, 3, 4), np.uint8), (1, 1, 1), (1,), "shape"),
        (np.zeros((3, 3, 3), np.float32), (1, 1, 1), (1,), "integer"),
        (np.zeros((3, 3, 3), np.uint8), (1, 0, 1), (1,), "spacing_mm"),
        (np.zeros((3, 3, 3), np.uint8), (1, 1, 1), (-1,), "tolerances_mm"),
    ],
)
def test_a_callers_mistakes_are_value_errors(prediction, spacing_mm, tolerances_mm, word):
    with pytest.raises(ValueError, match=word):
        evaluate_case(prediction, np.zeros((3, 3, 3), np.uint8), spacing_mm, ONE, tolerances_mm)


def test_dice_per_label_agrees_with_the_case_scores():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 4, (9, 9, 9), np.uint8), rng.integers(0, 5, (9, 9, 9), np.uint8)
    quick = dice_per_label(prediction, truth, 5)
    slow = {s.label: s.dice for s in evaluate_case(prediction, truth, (1, 1, 1), {k: str(k) for k in range(1, 5)})}
    np.testing.assert_allclose(quick[:3], [slow[k] for k in (1, 2, 3)], rtol=1e-12)
    assert slow[4] is None
    assert np.isnan(quick[3])


# ------------------------------------------------------------------------------------------------- laws


@settings(max_examples=15, deadline=None)
@given(seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), spacing_mm=st.sampled_from(SPACINGS))
def test_truth_and_prediction_may_trade_places(seeds, spacing_mm):
    a, b = (blob(seed) for seed in seeds)
    one, other = score(a, b, spacing_mm, (1.0, 2.5)), score(b, a, spacing_mm, (1.0, 2.5))
    assert (one.dice, one.hd95_mm) == (other.dice, other.hd95_mm)
    assert one.nsd == pytest.approx(other.nsd, rel=1e-12)
    assert one.volume_error_ml == pytest.approx(-other.volume_error_ml)


@settings(max_examples=10, deadline=None)
@given(seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), move=st.tuples(*[st.integers(-2, 2)] * 3))
def test_scores_do_not_depend_on_the_place(seeds, move):
    a, b = (blob(seed) for seed in seeds)
    moved = (np.roll(m, move, axis=(0, 1, 2)) for m in (a, b))
    assert score(*moved, (2.0, 1.0, 0.8), (1.0, 2.0)) == score(a, b, (2.0, 1.0, 0.8), (1.0, 2.0))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_axes_may_be_permuted_with_their_spacing_and_flipped(axes):
    a, b, spacing_mm = blob(5), blob(6), (3.0, 0.9, 1.4)
    turned = [np.flip(m.transpose(axes), 0) for m in (a, b)]
    one, other = score(a, b, spacing_mm), score(*turned, tuple(spacing_mm[i] for i in axes))
    assert other.nsd == pytest.approx(one.nsd, rel=1e-9)
    assert other.hd95_mm == pytest.approx(one.hd95_mm, rel=1e-9)


def test_spacing_and_tolerance_scale_together():
    a, b = blob(7), blob(8)
    one, double = score(a, b, (3.0, 0.9, 1.4), (1.7,)), score(a, b, (6.0, 1.8, 2.8), (3.4,))
    assert double.nsd == pytest.approx(one.nsd, rel=1e-9)
    assert double.hd95_mm == pytest.approx(2 * one.hd95_mm, rel=1e-9)


def test_an_organ_that_touches_the_border_is_closed_there():
    """No surface may be lost at the edge of the scan."""
    whole = np.ones((8, 8, 8), bool)
    inside = np.pad(whole, 3)
    np.testing.assert_array_equal(surface_distances(whole, whole, (1, 2, 3)).truth_mm2,
                                  surface_distances(inside, inside, (1, 2, 3)).truth_mm2)


def test_distances_are_those_of_brute_force_on_both_ways_of_finding_them(monkeypatch):
    a, b, spacing_mm = blob(9), blob(10), (3.0, 0.9, 1.4)
    corners = []
    for mask in (a, b):
        at = surfaces._surfels(mask, surfel_areas_mm2(spacing_mm))[0]
        corners.append(np.stack(np.unravel_index(at, [n + 1 for n in mask.shape]), 1) * spacing_mm)
    expected = cdist(*corners).min(1)
    for voxels_per_query in (0, 10**9):
        monkeypatch.setattr(surfaces, "_VOXELS_PER_QUERY", voxels_per_query)
        np.testing.assert_allclose(surface_distances(a, b, spacing_mm).prediction_mm, expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_surfel_areas_equal_the_table_of_surface_distance(spacing_mm):
    theirs = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    np.testing.assert_allclose(surfel_areas_mm2(spacing_mm), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize("margin", [0, 2])
def test_parity_with_monai_and_surface_distance(spacing_mm, margin):
    for seed in range(4):
        truth, prediction = blob(seed, margin=margin), blob(seed + 100, margin=margin) | blob(seed, smooth=3)
        ours = score(prediction, truth, spacing_mm, (0.5, 2.0))
        surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing_mm)
        for tolerance_mm, nsd in zip((0.5, 2.0), ours.nsd, strict=True):
            assert nsd == pytest.approx(
                surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance_mm), abs=1e-9)
            monai = compute_surface_dice(tensor(prediction), tensor(truth), [tolerance_mm], include_background=True,
                                         spacing=spacing_mm, use_subvoxels=True)
            assert nsd == pytest.approx(monai.item(), abs=1e-5)
        assert ours.hd95_mm == pytest.approx(surface_distance.compute_robust_hausdorff(surfaces, 95), abs=1e-9)
        assert ours.dice == pytest.approx(DiceMetric()(tensor(prediction), tensor(truth)).item(), abs=1e-6)


def test_hd95_of_monai_is_another_definition():
    """MONAI takes voxels of the mask's inner border, all of one weight: near ours, within a voxel, but not the same."""
    for seed in range(4):
        a, b = blob(seed), blob(seed + 50)
        monai = compute_hausdorff_distance(tensor(a), tensor(b), include_background=True, percentile=95).item()
        assert score(a, b).hd95_mm == pytest.approx(monai, abs=math.sqrt(3))


def test_what_the_others_do_with_empty_masks():
    """MONAI punishes a missed organ but forgives an invented one silently (NaN); surface-distance breaks (NumPy 2)."""
    some, empty = blob(3), np.zeros((22, 26, 24), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert DiceMetric()(tensor(empty), tensor(some)).item() == 0
        assert math.isnan(DiceMetric()(tensor(some), tensor(empty)).item())
        with pytest.raises(AttributeError, match="Inf"):
            surface_distance.compute_surface_distances(some, empty, (1, 1, 1))
    assert score(empty, some).status == "missed"
    assert score(some, empty).status == "false_positive"
    assert surface_distances(empty, some, (1, 1, 1)).hausdorff_mm() == math.inf
    assert surface_distances(empty, some, (1, 1, 1)).nsd(1) == 0
    assert math.isnan(surface_distances(empty, empty, (1, 1, 1)).nsd(1))


def test_spacing_in_the_order_of_the_file_would_give_other_numbers():
    """The usual mistake, nibabel's (x, y, z) spacing for an array [z, y, x], is no small one."""
    a, b = blob(11), blob(12)
    assert score(a, b, (5.0, 1.0, 1.0)).hd95_mm != pytest.approx(score(a, b, (1.0, 1.0, 5.0)).hd95_mm, rel=0.05)
