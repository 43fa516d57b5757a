"""The crops of a step: the same on every machine, with any number of processes, after every restart."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autosam3d.data.cache import cache_cases
from autosam3d.data.crops import CropDataset, CropLoader, StepSampler, demand_files_for
from autosam3d.data.folder import Case, open_dataset
from autosam3d.errors import ResourceError
from mini_run import SHAPE, case_in_memory, mini_recipe, write_mini_dataset

PLAIN = {"augment__flip_prob": 0.0, "augment__rotate90_prob": 0.0, "augment__scale_prob": 0.0,
         "augment__shift_prob": 0.0, "augment__affine_prob": 0.0}


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def cases(dataset_folder: Path) -> tuple[Case, ...]:
    return open_dataset(dataset_folder, mini_recipe()).train


def items(dataset: CropDataset, ranks: int, batch: int, epoch: int = 0, first_step: int = 0) -> list[list[tuple]]:
    """For each step the items of all ranks."""
    samplers = [StepSampler(dataset, batch, rank, ranks) for rank in range(ranks)]
    for sampler in samplers:
        sampler.epoch, sampler.first_step = epoch, first_step
    return [[item for part in step for item in part] for step in zip(*samplers, strict=True)]


@pytest.mark.parametrize("per_volume", [1, 3])
def test_the_crops_of_a_step_are_the_same_for_any_number_of_processes(cases: tuple[Case, ...], tmp_path: Path,
                                                                     per_volume: int) -> None:
    recipe = mini_recipe(sampling__patches_per_volume=per_volume)
    dataset = CropDataset(cache_cases(cases, recipe, tmp_path), recipe)
    for epoch in (0, 5):
        alone = items(dataset, 1, 6, epoch)
        assert items(dataset, 2, 3, epoch) == alone and items(dataset, 3, 2, epoch) == alone
    again = CropDataset(cache_cases(cases, recipe, tmp_path), recipe)
    for item in alone[0]:
        one, other = dataset[item], again[item]
        assert list(one) == ["voxels", "labels"] == list(other)
        assert all(np.array_equal(one[name].numpy(), other[name].numpy()) for name in one)


def test_an_epoch_shows_every_case_equally_often_and_fills_up_from_its_start() -> None:
    recipe = mini_recipe(sampling__patches_per_volume=2)
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(5)], recipe)
    flat = [item for step in items(dataset, 1, 4, epoch=3) for item in step]
    assert len(dataset) == 10 and len(flat) == 12
    assert np.bincount([case for _, _, case in flat[:10]]).tolist() == [2] * 5
    assert [case for _, _, case in flat[10:]] == [case for _, _, case in flat[:2]]
    assert [position for _, position, _ in flat] == list(range(12))  # a repeated case is another crop
    orders = {tuple(dataset.order(epoch)) for epoch in range(6)}
    assert len(orders) > 4 and dataset.order(2).tolist() == dataset.order(2).tolist()


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_a_resumed_epoch_goes_on_where_it_stopped(first_step: int) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(5)], mini_recipe())
    assert items(dataset, 1, 2, 4, first_step) == items(dataset, 1, 2, 4)[first_step:]
    sampler = StepSampler(dataset, 2)
    sampler.first_step = first_step
    assert len(sampler) == len(list(sampler)) == 3 - first_step


def test_batches_are_the_items_in_order_with_and_without_workers(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe()
    dataset = CropDataset(cache_cases(cases, recipe, tmp_path), recipe)
    expected = [[dataset[item] for item in step] for step in items(dataset, 1, 2)]
    for workers in (0, 2):
        batches = list(CropLoader(dataset, StepSampler(dataset, 2), workers, pin_memory=False))
        assert len(batches) == len(expected)
        for batch, step in zip(batches, expected, strict=True):
            voxels, labels = batch["voxels"], batch["labels"]
            assert voxels.shape == (2, 1, 16, 16, 16) and str(voxels.dtype) == "torch.float32"
            assert labels.shape == (2, 16, 16, 16) and str(labels.dtype) == "torch.uint8"
            for i, one in enumerate(step):
                assert np.array_equal(voxels[i].numpy(), one["voxels"].numpy())
                assert np.array_equal(labels[i].numpy(), one["labels"].numpy())


def test_a_fault_while_cutting_reaches_the_training(monkeypatch: Any) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(4)], mini_recipe())
    monkeypatch.setattr(CropDataset, "_start", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        list(CropLoader(dataset, StepSampler(dataset, 2), 0, pin_memory=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_ours_keeps_its_parts_on_the_way_from_a_worker(workers: int, monkeypatch: Any) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(4)], mini_recipe())
    error = ResourceError("OPEN_FILES", "voxels.npy", "too many", "raise it")
    monkeypatch.setattr(CropDataset, "_start", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ResourceError) as caught, CropLoader(dataset, StepSampler(dataset, 2), workers, False) as loader:
        list(loader)
    assert (caught.value.code, str(caught.value)) == ("OPEN_FILES", "voxels.npy: too many; raise it")
    assert not multiprocessing.active_children()  # although the traceback holds the loader: else no exit would end


def test_the_open_files_of_workers_are_asked_for_first(monkeypatch: Any) -> None:
    monkeypatch.setattr("autosam3d.io.open_files._limits", lambda: (256, 256))
    demand_files_for(0)
    demand_files_for(8)
    with pytest.raises(ResourceError, match=r"train\.num_workers: expected that 368 files may be open, got a limit of "
                       "256") as caught:
        demand_files_for(16)
    assert caught.value.code == "OPEN_FILES"


def test_workers_live_through_the_epochs_and_through_signals_to_the_group(monkeypatch: Any) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(4)], mini_recipe())

    def marked(_: CropDataset, item: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return {"pid": torch.tensor(os.getpid()), "item": torch.tensor(item)}

    monkeypatch.setattr(CropDataset, "__getitem__", marked)
    sampler = StepSampler(dataset, 2)
    loader = CropLoader(dataset, sampler, 2, pin_memory=False)
    workers = []
    for epoch, first_step in ((0, 1), (1, 0), (2, 0)):
        sampler.epoch, sampler.first_step = epoch, first_step
        batches = list(loader)
        steps = items(dataset, 1, 2, epoch, first_step)
        assert [batch["item"].tolist() for batch in batches] == [[list(item) for item in step] for step in steps]
        workers.append({pid for batch in batches for pid in batch["pid"].tolist()})
    assert os.getpid() not in workers[1] and len(workers[1]) == 2
    assert workers[0] < workers[1] == workers[2]


def starts_of(dataset: CropDataset, count: int) -> np.ndarray:
    """First voxel (z, y, x) of `count` crops of the first case, whose voxels are their own index."""
    flat = [int(dataset[(0, position, 0)]["voxels"][0, 0, 0, 0]) for position in range(count)]
    return np.column_stack(np.unravel_index(flat, dataset.cases[0].voxels.shape))


def test_the_share_of_crops_on_organs_is_kept() -> None:
    # One organ voxel in a corner: only crops that were centred on it, or the few that fall there, start at 0, 0, 0.
    case = case_in_memory((64, 64, 64))
    np.asarray(case.labels)[8, 8, 8] = case.organ_voxels[8, 0] = 1
    for share in (0.0, 0.3, 1.0):
        recipe = mini_recipe(sampling__foreground_share=share, **PLAIN)
        starts = starts_of(CropDataset([case], recipe), 800)
        on_organ = np.mean((starts == 0).all(axis=1))
        by_chance = (9 / 64) ** 3
        assert on_organ == pytest.approx(share + (1 - share) * by_chance, abs=0.055 if 0 < share < 1 else 0.01)


def test_crops_lie_inside_and_reach_every_border() -> None:
    recipe = mini_recipe(sampling__foreground_share=0.0, **PLAIN)
    starts = starts_of(CropDataset([case_in_memory()], recipe), 800)
    assert (starts.min(axis=0) == 0).all() and (starts.max(axis=0) == np.array(SHAPE) - 16).all()


def test_crops_on_an_organ_hold_its_voxel(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe(sampling__foreground_share=1.0)
    dataset = CropDataset(cache_cases(cases, recipe, tmp_path), recipe)
    for position in range(40):
        assert dataset[(0, position, position % 4)]["labels"].any()


def test_balanced_organs_are_drawn_alike_however_small() -> None:
    case = case_in_memory((40, 40, 40), organs={1: 4000, 2: 4})
    counts = {}
    for balance in (False, True):
        recipe = mini_recipe(sampling__foreground_share=1.0, sampling__balance_organs=balance, **PLAIN)
        dataset = CropDataset([case], recipe)
        small = np.argwhere(case.labels == 2)
        starts = starts_of(dataset, 400)
        near = [(np.clip(small - 8, 0, 24) == start).all(axis=1).any() for start in starts]
        counts[balance] = np.mean(near)
    assert counts[False] < 0.1 and counts[True] == pytest.approx(0.5, abs=0.13)


def test_a_scan_smaller_than_a_crop_is_filled_with_air() -> None:
    recipe = mini_recipe(**PLAIN)
    case = case_in_memory((9, 16, 30), organs={1: 5})
    voxels, labels = (t.numpy() for t in CropDataset([case], recipe)[(0, 0, 0)].values())
    inside = voxels[0, 3:12]
    assert (inside[:, :, 1:] - inside[:, :, :-1] == 1).all()  # the scan as it is, in the middle
    air = recipe.preprocess.air
    assert air == -2.0 and (voxels[0, :3] == air).all() and (voxels[0, 12:] == air).all()
    assert not labels[:3].any() and not labels[12:].any()


def test_with_an_affine_margin_borders_are_still_reached_and_air_lies_beyond() -> None:
    # A turned crop at the border of the scan looks beyond it. It must not be pushed inwards: the outermost organs
    # would never be seen, although they are at inference.
    with_margin, without = (
        starts_of(CropDataset([case_in_memory()], mini_recipe(**PLAIN | {"augment__affine_prob": probability})), 300)
        for probability in (1e-12, 0.0)
    )
    assert np.array_equal(with_margin, without)
    turned = mini_recipe(**PLAIN | {"augment__affine_prob": 1.0, "augment__rotate_degrees": 45.0})
    case = replace(case_in_memory(), voxels=np.ones(SHAPE, np.float32))
    crops = [CropDataset([case], turned)[(0, position, 0)]["voxels"].numpy() for position in range(20)]
    assert min(c.min() for c in crops) == turned.preprocess.air and max(c.max() for c in crops) == 1


def test_the_cache_is_never_written_through(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe(**PLAIN)
    [entry] = cache_cases(cases[:1], recipe, tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / entry.key).iterdir()}
    voxels, labels = CropDataset([entry], recipe)[(0, 0, 0)].values()
    voxels += 1
    labels += 1
    assert {p.name: p.read_bytes() for p in (tmp_path / entry.key).iterdir()} == before


def test_crops_say_which_organs_were_looked_for_once_one_case_is_partly_drawn() -> None:
    recipe = mini_recipe(**PLAIN)
    whole, part = case_in_memory(organs={1: 9, 2: 9}), replace(case_in_memory(organs={2: 9}), drawn=frozenset({2}))
    assert "groups" not in CropDataset([whole, whole], recipe)[(0, 0, 0)]
    dataset = CropDataset([whole, part], recipe)
    np.testing.assert_array_equal(dataset[(0, 0, 0)]["groups"].numpy(), np.eye(3, dtype=bool))
    np.testing.assert_array_equal(dataset[(0, 0, 1)]["groups"].numpy(), [[1, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_every_second_batch_holds_a_fully_drawn_case_while_labels_alone_teach() -> None:
    cases = [case_in_memory(organs={1: 9})] + [replace(case_in_memory(), drawn=frozenset({1}))] * 11
    recipe = mini_recipe(train__batch_size=2)
    for epoch in range(5):
        order = CropDataset(cases, recipe).order(epoch)
        assert all(0 in order[start : start + 4] for start in range(0, 12, 4))
