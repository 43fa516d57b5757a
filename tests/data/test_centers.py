"""Where crops on organs are centred: on every organ voxel with the same chance, or on every organ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from autosam3d.data.cache import cache_cases
from autosam3d.data.centers import count_organs, draw_center
from autosam3d.data.crops import CropDataset
from autosam3d.data.folder import Case
from autosam3d.io import write_ct, write_segmentation
from autosam3d.volume import Segmentation, Volume
from mini_run import LABELS, affine_of, case_in_memory, mini_recipe

SIZES = {1: 30_000, 2: 600, 3: 6_000}
DRAWS = 6_000


def scattered(sizes: dict[int, int], shape: tuple[int, int, int] = (40, 36, 44)) -> np.ndarray:
    """Labels [z, y, x] with that many voxels of each organ, more of them towards the head."""
    labels = np.zeros(shape, np.uint8)
    random = np.random.default_rng(0)
    lift = np.linspace(1, 3, shape[0])[:, None, None] * random.random(shape)
    places = np.argsort(-lift, axis=None)
    places[: sum(sizes.values())] = random.permutation(places[: sum(sizes.values())])
    for organ, size in sizes.items():
        labels.flat[places[:size]], places = organ, places[size:]
    return labels


def drawn(labels: np.ndarray, balance: bool, draws: int = DRAWS) -> np.ndarray:
    counts = count_organs(labels.__getitem__, len(labels), max(SIZES))
    random = np.random.default_rng(1)
    return np.array([draw_center(counts, labels.__getitem__, random, balance_organs=balance) for _ in range(draws)])


def test_planes_are_counted() -> None:
    labels = scattered(SIZES)
    counts = count_organs(labels.__getitem__, len(labels), 4)
    assert counts.dtype == np.int32 and counts.shape == (40, 4)
    assert counts.tolist() == [[int((plane == organ).sum()) for organ in (1, 2, 3, 4)] for plane in labels]


def test_every_organ_voxel_has_the_same_chance() -> None:
    labels = scattered(SIZES)
    centers = drawn(labels, balance=False)
    organs = labels[tuple(centers.T)]
    assert organs.min() > 0
    truth = np.array(list(SIZES.values()))
    got = np.bincount(organs, minlength=4)[1:]
    assert chisquare(got, truth / truth.sum() * DRAWS).pvalue > 0.01
    # Where at most 4000 voxels an organ are known, the largest is drawn as often as another: the test can fail.
    capped = np.minimum(truth, 4000)
    assert chisquare(got, capped / capped.sum() * DRAWS).pvalue < 1e-9
    for axis in range(3):  # and within the scan they lie as the voxels do
        places = np.argwhere(labels)[:, axis]
        expected = np.bincount(places) / len(places) * DRAWS
        assert chisquare(np.bincount(centers[:, axis], minlength=len(expected)), expected).pvalue > 0.01
    assert len(np.unique(centers, axis=0)) > 0.9 * DRAWS  # none is drawn more often for want of others


def test_balanced_organs_have_the_same_chance_and_so_have_the_voxels_of_each() -> None:
    labels = scattered(SIZES)
    centers = drawn(labels, balance=True)
    organs = labels[tuple(centers.T)]
    assert chisquare(np.bincount(organs, minlength=4)[1:]).pvalue > 0.01
    hits = np.zeros(labels.shape, int)
    np.add.at(hits, tuple(centers.T), 1)
    assert chisquare(hits[labels == 2]).pvalue > 0.01


def test_an_organ_that_is_absent_is_never_drawn() -> None:
    labels = scattered({1: 5, 3: 7})
    for balance in (False, True):
        seen = np.zeros(labels.shape, bool)
        seen[tuple(drawn(labels, balance, 300).T)] = True
        assert np.array_equal(seen, labels > 0)


@pytest.mark.parametrize("balance", [False, True])
def test_crops_of_a_cached_case_follow_the_true_counts(balance: bool, tmp_path: Path) -> None:
    """From files to crops: the larger organ has 45 times the voxels of the other and over 4000."""
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:, :, 20:33] = 1
    labels[8:16, 10:18, 2:9] = 2
    write_ct(tmp_path / "c.nii.gz", Volume(np.float32(100) * labels - 50, affine_of()))
    write_segmentation(tmp_path / "l.nii.gz", Segmentation(labels, affine_of()), LABELS)
    recipe = mini_recipe(sampling__foreground_share=1.0, sampling__balance_organs=balance)
    [case] = cache_cases([Case("c", tmp_path / "c.nii.gz", tmp_path / "l.nii.gz")], recipe, tmp_path / "cache")
    centers = [CropDataset([case], recipe)._start(case, np.random.default_rng(seed)) for seed in range(2000)]
    on_large = np.sum([x >= 12 for _, _, x in centers])  # a crop of 16 that is centred on organ 1 begins at 12 or later
    share = 0.5 if balance else 20_800 / (20_800 + 448)
    assert chisquare([on_large, 2000 - on_large], [2000 * share, 2000 * (1 - share)]).pvalue > 0.01


def test_small_organs_are_drawn_as_from_a_list_of_their_voxels() -> None:
    """The same random numbers pick the same voxel as in a list in the order of organ, z, y, x: what was measured with
    lists stays measured."""
    case = case_in_memory(organs={1: 300, 2: 20})
    rows = np.concatenate([np.argwhere(case.labels == organ) for organ in (1, 2)])
    for seed in range(200):
        center = draw_center(case.organ_voxels, case.organs_in_plane, np.random.default_rng(seed), balance_organs=False)
        assert list(center) == rows[np.random.default_rng(seed).integers(len(rows))].tolist()
