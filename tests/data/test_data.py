"""Cached cases and the crops of a step: nothing stale, nothing damaged, the same on every machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autosam3d.data.cache import (
    KEY_BYTES,
    CachedCase,
    CropDataset,
    CropLoader,
    StepSampler,
    cache_cases,
    demand_organs,
    open_cached,
)
from autosam3d.data.folder import Case, open_dataset
from autosam3d.errors import AutoSam3dError, ResourceError, VolumeError
from autosam3d.io import read_ct, write_ct, write_segmentation
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Segmentation, Volume
from mini_run import LABELS, SHAPE, affine_of, blobs, mini_recipe, write_mini_dataset

PLAIN = {"augment__flip_prob": 0.0, "augment__rotate90_prob": 0.0, "augment__scale_prob": 0.0,
         "augment__shift_prob": 0.0, "augment__affine_prob": 0.0}


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def cases(dataset_folder: Path) -> tuple[Case, ...]:
    return open_dataset(dataset_folder, mini_recipe()).train


def case_in_memory(shape: tuple[int, int, int] = SHAPE, organs: dict[int, int] | None = None,
                   seed: int = 0) -> CachedCase:
    """Voxels that are their own flat index; `organs` gives the number of voxels of each label."""
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    places = np.random.default_rng(seed).permutation(labels.size)
    for label, count in (organs or {}).items():
        labels.flat[places[:count]], places = label, places[count:]
    centers = np.column_stack([labels[labels > 0], np.argwhere(labels)]).astype(np.int32)
    return CachedCase("memory", voxels, labels, centers, (3.0, 2.0, 2.0), "key")


# ---- the cache ----


def test_what_is_cached_is_what_preprocessing_gives(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe()
    [entry] = cache_cases(cases[:1], recipe, tmp_path)
    hu, labels = blobs(0)
    assert entry.voxels.dtype == np.float16 and entry.voxels.shape == SHAPE and entry.spacing_mm == (3.0, 2.0, 2.0)
    expected = (np.clip(np.rint(hu), -160, 240) - 40) / 100
    np.testing.assert_allclose(entry.voxels, expected, atol=2e-3)
    assert np.array_equal(entry.labels, labels)
    organ, z, y, x = entry.centers.T
    assert np.array_equal(labels[z, y, x], organ) and len(organ) == np.count_nonzero(labels)


def test_a_second_start_reads_the_cache(cases: tuple[Case, ...], tmp_path: Path, monkeypatch: Any) -> None:
    recipe = mini_recipe()
    first = cache_cases(cases, recipe, tmp_path)
    monkeypatch.setattr("autosam3d.data.cache.read_ct", lambda *_: pytest.fail("the scan was read again"))
    progress: list[tuple[int, int]] = []
    second = cache_cases(cases, recipe, tmp_path, lambda done, total: progress.append((done, total)))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.voxels, other.voxels) and np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.centers, other.centers)
        assert (one.name, one.spacing_mm, one.key) == (other.name, other.spacing_mm, other.key)
    assert progress == [(i, 4) for i in range(5)]


@pytest.mark.parametrize("name", ["voxels.npy", "labels.npy", "centers.npy", "info.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "absent", "nested", "noise"])
def test_a_damaged_entry_is_made_again(cases: tuple[Case, ...], tmp_path: Path, name: str, damage: str,
                                       caplog: pytest.LogCaptureFixture) -> None:
    recipe = mini_recipe()
    [good] = cache_cases(cases[:1], recipe, tmp_path)
    whole = {path.name: path.read_bytes() for path in (tmp_path / good.key).iterdir()}
    path = tmp_path / good.key / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.touch()
    elif damage == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(content)))
    elif damage == "nested":
        path.write_text("[" * 100000)
    with caplog.at_level(logging.WARNING):
        [again] = cache_cases(cases[:1], recipe, tmp_path)
    assert np.array_equal(again.voxels, good.voxels) and np.array_equal(again.labels, good.labels)
    assert {p.name: p.read_bytes() for p in (tmp_path / good.key).iterdir()} == whole
    assert ("is damaged" in caplog.text) == (name != "info.json" or damage != "absent")


def test_an_altered_spacing_is_noticed(cases: tuple[Case, ...], tmp_path: Path) -> None:
    [good] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    info = tmp_path / good.key / "info.json"
    info.write_text(info.read_text().replace("3.0", "5.0", 1))
    [again] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    assert again.spacing_mm == (3.0, 2.0, 2.0)


def test_what_a_killed_writer_left_is_swept_and_replaced(cases: tuple[Case, ...], tmp_path: Path,
                                                         monkeypatch: Any) -> None:
    real, calls = np.save, []

    def killed(file: Any, array: np.ndarray) -> None:
        calls.append(1)
        file.write(b"half of it")
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(file, array)

    monkeypatch.setattr("autosam3d.data.cache.np.save", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_cases(cases[:1], mini_recipe(), tmp_path)
    monkeypatch.undo()
    [entry] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    assert np.array_equal(entry.labels, blobs(0)[1])
    assert sorted(p.name for p in (tmp_path / entry.key).iterdir()) == [
        "centers.npy", "info.json", "labels.npy", "voxels.npy"]


def test_what_another_process_checked_is_opened_but_not_read(cases: tuple[Case, ...], tmp_path: Path,
                                                             monkeypatch: Any) -> None:
    [made] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    assert len(bytes.fromhex(made.key)) == KEY_BYTES
    for function in ("crc_of_file", "sha256_of", "_build_entry"):
        monkeypatch.setattr(f"autosam3d.data.cache.{function}", lambda *_: pytest.fail("the work was done again"))
    opened = open_cached(tmp_path, made.key, made.name)
    assert (opened.name, opened.key, opened.spacing_mm) == (made.name, made.key, made.spacing_mm)
    for name in ("voxels", "labels", "centers"):
        assert np.array_equal(getattr(opened, name), getattr(made, name))
    assert isinstance(opened.voxels, np.memmap) and isinstance(opened.labels, np.memmap)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pickle_inside(path: Path) -> None:
    np.save(path, np.array([os.getpid, {}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(("name", "damage"), [
    ("info.json", Path.unlink), ("info.json", shorten), ("voxels.npy", Path.unlink), ("voxels.npy", shorten),
    ("labels.npy", lambda path: np.save(path, np.zeros((3, 3, 3), np.uint8))), ("centers.npy", pickle_inside),
    ("labels.npy", lambda path: np.save(path, np.zeros(SHAPE, np.float32))),
])
def test_an_entry_that_is_not_what_was_checked_is_not_opened(cases: tuple[Case, ...], tmp_path: Path, name: str,
                                                             damage: Any) -> None:
    [made] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    damage(tmp_path / made.key / name)
    with pytest.raises(ResourceError) as caught:
        open_cached(tmp_path, made.key, made.name)
    assert caught.value.code == "CACHE"


def test_the_key_follows_settings_and_content(cases: tuple[Case, ...], tmp_path: Path) -> None:
    def key(case: Case, recipe: Recipe) -> str:
        return cache_cases([case], recipe, tmp_path / "cache")[0].key

    base = key(cases[0], mini_recipe())
    assert key(cases[0], mini_recipe(train__epochs=7, optim__lr=1e-5, sampling__foreground_share=0.1)) == base
    assert key(replace(cases[0], name="renamed"), mini_recipe()) == base
    changed = [
        key(cases[0], mini_recipe(preprocess__hu_window={"low_hu": -160.0, "high_hu": 241.0})),
        key(cases[0], mini_recipe(preprocess__spacing_mm=[3.0, 2.0, 2.5])),
        key(cases[0], mini_recipe(preprocess__crop_to_body=True)),
        key(replace(cases[0], label_table={0: 0, 1: 2, 2: 1}), mini_recipe()),
        key(cases[1], mini_recipe()),
        key(replace(cases[0], label_path=cases[1].label_path), mini_recipe()),
    ]
    assert len({base, *changed}) == 7


def test_a_changed_file_is_a_new_entry(dataset_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset_folder, copy)
    case = open_dataset(copy, mini_recipe()).train[0]
    [before] = cache_cases([case], mini_recipe(), tmp_path / "cache")
    volume = read_ct(case.image_path)
    write_ct(case.image_path, Volume(volume.voxels_hu + 10, volume.affine))
    [after] = cache_cases([case], mini_recipe(), tmp_path / "cache")
    assert after.key != before.key and not np.array_equal(after.voxels, before.voxels)


def broken_case(folder: Path, labels: np.ndarray, affine: np.ndarray, table: dict[int, int] | None = None) -> Case:
    write_ct(folder / "c_0000.nii.gz", Volume(blobs(0)[0], affine_of()))
    write_segmentation(folder / "c.nii.gz", Segmentation(labels, affine), LABELS)
    return Case("c", folder / "c_0000.nii.gz", folder / "c.nii.gz", table)


def test_labels_that_do_not_belong_to_the_scan_are_refused(tmp_path: Path) -> None:
    labels = blobs(0)[1]
    moved = affine_of()
    moved[0, 3] += 1
    seven = labels.copy()
    seven[0, 0, 0] = 7
    for code, wrong, affine in (
        ("SHAPE", labels[:-1], affine_of()), ("AFFINE_MISMATCH", labels, moved),
        ("AFFINE_MISMATCH", labels, affine_of((3, 2, 2.1))), ("LABEL_RANGE", seven, affine_of()),
    ):
        with pytest.raises(VolumeError) as caught:
            cache_cases([broken_case(tmp_path, wrong, affine)], mini_recipe(), tmp_path / "cache")
        assert caught.value.code == code and "c.nii.gz" in caught.value.where
    with pytest.raises(VolumeError) as caught:
        cache_cases([Case("c", tmp_path / "c_0000.nii.gz", None)], mini_recipe(), tmp_path / "cache")
    assert caught.value.code == "NO_LABELS"


def test_an_absent_scan_and_an_unwritable_cache(cases: tuple[Case, ...], tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        cache_cases([replace(cases[0], image_path=tmp_path / "absent.nii.gz")], mini_recipe(), tmp_path / "cache")
    assert caught.value.code == "UNREADABLE"
    (tmp_path / "file").touch()
    with pytest.raises(AutoSam3dError) as failed:
        cache_cases(cases[:1], mini_recipe(), tmp_path / "file" / "cache")
    assert isinstance(failed.value, ResourceError) and failed.value.exit_code == 5


def test_a_set_without_an_organ_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    both, one, none = (case_in_memory(organs=o) for o in ({1: 5, 2: 5}, {1: 5}, {}))
    recipe, here = mini_recipe(), Path("data")
    for chosen, code in (([one, one], "NO_ORGAN"), ([both, none, none], "EMPTY_LABELS"), ([none], "EMPTY_LABELS")):
        with pytest.raises(VolumeError) as caught:
            demand_organs(chosen, recipe, here)
        assert caught.value.code == code
    with pytest.raises(VolumeError, match="none of left_kidney"):
        demand_organs([one], recipe, here)
    demand_organs([both], recipe, here)
    assert not caplog.records
    demand_organs([both, none], recipe, here)
    assert "1 training cases show no organ" in caplog.text


# ---- crops ----


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
        for one, other in zip(dataset[item], again[item], strict=True):
            assert np.array_equal(one.numpy(), other.numpy())


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
        for (voxels, labels), step in zip(batches, expected, strict=True):
            assert voxels.shape == (2, 1, 16, 16, 16) and str(voxels.dtype) == "torch.float32"
            assert labels.shape == (2, 16, 16, 16) and str(labels.dtype) == "torch.uint8"
            for i, (one_voxels, one_labels) in enumerate(step):
                assert np.array_equal(voxels[i].numpy(), one_voxels.numpy())
                assert np.array_equal(labels[i].numpy(), one_labels.numpy())


def test_a_fault_while_cutting_reaches_the_training(monkeypatch: Any) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(4)], mini_recipe())
    monkeypatch.setattr(CropDataset, "_start", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        list(CropLoader(dataset, StepSampler(dataset, 2), 0, pin_memory=False))


def test_workers_live_through_the_epochs_and_through_signals_to_the_group(monkeypatch: Any) -> None:
    dataset = CropDataset([case_in_memory(organs={1: 9}) for _ in range(4)], mini_recipe())

    def marked(_: CropDataset, item: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return torch.tensor(os.getpid()), torch.tensor(item)

    monkeypatch.setattr(CropDataset, "__getitem__", marked)
    sampler = StepSampler(dataset, 2)
    loader = CropLoader(dataset, sampler, 2, pin_memory=False)
    workers = []
    for epoch, first_step in ((0, 1), (1, 0), (2, 0)):
        sampler.epoch, sampler.first_step = epoch, first_step
        batches = list(loader)
        assert [b.tolist() for _, b in batches] == [[list(i) for i in step] for step in items(dataset, 1, 2, epoch,
                                                                                              first_step)]
        workers.append({pid for pids, _ in batches for pid in pids.tolist()})
    assert os.getpid() not in workers[1] and len(workers[1]) == 2
    assert workers[0] < workers[1] == workers[2]


def starts_of(dataset: CropDataset, count: int) -> np.ndarray:
    """First voxel (z, y, x) of `count` crops of the first case, whose voxels are their own index."""
    flat = [int(dataset[(0, position, 0)][0][0, 0, 0, 0]) for position in range(count)]
    return np.column_stack(np.unravel_index(flat, dataset.cases[0].voxels.shape))


def test_the_share_of_crops_on_organs_is_kept() -> None:
    # One organ voxel in a corner: only crops that were centred on it, or the few that fall there, start at 0, 0, 0.
    case = case_in_memory((64, 64, 64))
    case.labels[8, 8, 8] = 1
    case = replace(case, centers=np.array([[1, 8, 8, 8]], np.int32))
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
        assert dataset[(0, position, position % 4)][1].any()


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
    voxels, labels = (t.numpy() for t in CropDataset([case], recipe)[(0, 0, 0)])
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
    crops = [CropDataset([case], turned)[(0, position, 0)][0].numpy() for position in range(20)]
    assert min(c.min() for c in crops) == turned.preprocess.air and max(c.max() for c in crops) == 1


def test_the_cache_is_never_written_through(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe(**PLAIN)
    [entry] = cache_cases(cases[:1], recipe, tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / entry.key).iterdir()}
    voxels, labels = CropDataset([entry], recipe)[(0, 0, 0)]
    voxels += 1
    labels += 1
    assert {p.name: p.read_bytes() for p in (tmp_path / entry.key).iterdir()} == before


def test_a_label_file_in_other_numbers_is_renumbered(tmp_path: Path) -> None:
    labels = blobs(0)[1]
    case = broken_case(tmp_path, np.array([0, 40, 9], np.uint8)[labels], affine_of(), {0: 0, 40: 1, 9: 2})
    [entry] = cache_cases([case], mini_recipe(), tmp_path / "cache")
    assert np.array_equal(entry.labels, labels)


def test_info_is_plain_json(cases: tuple[Case, ...], tmp_path: Path) -> None:
    [entry] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    info = json.loads((tmp_path / entry.key / "info.json").read_text())
    assert info["entry"]["spacing_mm"] == [3.0, 2.0, 2.0]
    assert set(info["entry"]["crc"]) == {"voxels", "labels", "centers"}
