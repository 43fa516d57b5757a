"""Cached cases: nothing stale, nothing damaged, the same on every machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autosam3d.data.cache import KEY_BYTES, cache_cases, demand_organs, open_cached
from autosam3d.data.entries import StoredArray
from autosam3d.data.folder import Case, open_dataset
from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.io import read_ct, write_ct, write_segmentation
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Segmentation, Volume
from mini_run import LABELS, SHAPE, affine_of, blobs, case_in_memory, mini_recipe, write_mini_dataset


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def cases(dataset_folder: Path) -> tuple[Case, ...]:
    return open_dataset(dataset_folder, mini_recipe()).train


def test_what_is_cached_is_what_preprocessing_gives(cases: tuple[Case, ...], tmp_path: Path) -> None:
    recipe = mini_recipe()
    [entry] = cache_cases(cases[:1], recipe, tmp_path)
    hu, labels = blobs(0)
    assert entry.voxels.dtype == np.float16 and entry.voxels.shape == SHAPE and entry.spacing_mm == (3.0, 2.0, 2.0)
    expected = (np.clip(np.rint(hu), -160, 240) - 40) / 100
    np.testing.assert_allclose(entry.voxels, expected, atol=2e-3)
    assert np.array_equal(entry.labels, labels)
    assert entry.organ_voxels.tolist() == [[np.sum(plane == 1), np.sum(plane == 2)] for plane in labels]


def test_a_second_start_reads_the_cache(cases: tuple[Case, ...], tmp_path: Path, monkeypatch: Any) -> None:
    recipe = mini_recipe()
    first = cache_cases(cases, recipe, tmp_path)
    monkeypatch.setattr("autosam3d.data.cache.read_ct", lambda *_: pytest.fail("the scan was read again"))
    progress: list[tuple[int, int]] = []
    second = cache_cases(cases, recipe, tmp_path, lambda done, total: progress.append((done, total)))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.voxels, other.voxels) and np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.organ_voxels, other.organ_voxels)
        assert (one.name, one.spacing_mm, one.key) == (other.name, other.spacing_mm, other.key)
    assert progress == [(i, 4) for i in range(5)]


@pytest.mark.parametrize("name", ["voxels.npy", "labels.npy", "organ_voxels.npy", "info.json"])
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
    assert ("damaged in the cache" in caplog.text) == (name != "info.json" or damage != "absent")


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

    monkeypatch.setattr("autosam3d.data.entries.np.save", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_cases(cases[:1], mini_recipe(), tmp_path)
    monkeypatch.undo()
    [entry] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    assert np.array_equal(entry.labels, blobs(0)[1])
    assert sorted(p.name for p in (tmp_path / entry.key).iterdir()) == [
        "info.json", "labels.npy", "organ_voxels.npy", "voxels.npy"]


def test_what_another_process_checked_is_opened_but_not_read(cases: tuple[Case, ...], tmp_path: Path,
                                                             monkeypatch: Any) -> None:
    [made] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    assert len(bytes.fromhex(made.key)) == KEY_BYTES
    for function in ("entries._crc_of_file", "cache.sha256_of", "cache._build"):
        monkeypatch.setattr(f"autosam3d.data.{function}", lambda *_: pytest.fail("the work was done again"))
    opened = open_cached(tmp_path, made.key, cases[0])
    assert (opened.name, opened.key, opened.spacing_mm) == (made.name, made.key, made.spacing_mm)
    for name in ("voxels", "labels", "organ_voxels"):
        assert np.array_equal(getattr(opened, name), getattr(made, name))
    assert isinstance(opened.voxels, StoredArray) and isinstance(opened.labels, StoredArray)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pickle_inside(path: Path) -> None:
    np.save(path, np.array([os.getpid, {}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(("name", "damage"), [
    ("info.json", Path.unlink), ("info.json", shorten), ("voxels.npy", Path.unlink), ("voxels.npy", shorten),
    ("labels.npy", lambda path: np.save(path, np.zeros((3, 3, 3), np.uint8))), ("organ_voxels.npy", pickle_inside),
    ("labels.npy", lambda path: np.save(path, np.zeros(SHAPE, np.float32))),
])
def test_an_entry_that_is_not_what_was_checked_is_not_opened(cases: tuple[Case, ...], tmp_path: Path, name: str,
                                                             damage: Any) -> None:
    [made] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    damage(tmp_path / made.key / name)
    with pytest.raises(ResourceError) as caught:
        open_cached(tmp_path, made.key, cases[0])
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
    assert caught.value.code == "NO_TRUTH"


def test_an_absent_scan_and_an_unwritable_cache(cases: tuple[Case, ...], tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        cache_cases([replace(cases[0], image_path=tmp_path / "absent.nii.gz")], mini_recipe(), tmp_path / "cache")
    assert caught.value.code == "UNREADABLE"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--cache") as failed:
        cache_cases(cases[:1], mini_recipe(), tmp_path / "file" / "cache")
    assert failed.value.code == "OUTPUT_PATH" and failed.value.exit_code == 2


def test_a_set_without_an_organ_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    both, one, none = (case_in_memory(organs=o) for o in ({1: 5, 2: 5}, {1: 5}, {}))
    recipe, here = mini_recipe(), Path("data")
    for chosen, code in (([one, one], "ABSENT_ORGAN"), ([both, none, none], "EMPTY_LABELS"), ([none], "EMPTY_LABELS")):
        with pytest.raises(VolumeError) as caught:
            demand_organs(chosen, recipe, here)
        assert caught.value.code == code
    with pytest.raises(VolumeError, match="none of left_kidney"):
        demand_organs([one], recipe, here)
    demand_organs([both], recipe, here)
    assert not caplog.records
    demand_organs([both, none], recipe, here)
    assert "1 training cases show no organ" in caplog.text


def test_a_label_file_in_other_numbers_is_renumbered(tmp_path: Path) -> None:
    labels = blobs(0)[1]
    case = broken_case(tmp_path, np.array([0, 40, 9], np.uint8)[labels], affine_of(), {0: 0, 40: 1, 9: 2})
    [entry] = cache_cases([case], mini_recipe(), tmp_path / "cache")
    assert np.array_equal(entry.labels, labels)


def test_info_is_plain_json(cases: tuple[Case, ...], tmp_path: Path) -> None:
    [entry] = cache_cases(cases[:1], mini_recipe(), tmp_path)
    info = json.loads((tmp_path / entry.key / "info.json").read_text())
    assert info["entry"]["spacing_mm"] == [3.0, 2.0, 2.0]
    assert set(info["entry"]["crc"]) == {"voxels", "labels", "organ_voxels"}
