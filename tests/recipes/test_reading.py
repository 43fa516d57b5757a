"""A recipe's section `reading`: what a dataset leaves open is answered once, for training and for the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.data.cache import cache_cases
from autosam3d.data.download import prepare_dataset
from autosam3d.data.folder import open_dataset
from autosam3d.errors import AutoSam3dError, UsageError, VolumeError
from autosam3d.inference.pipeline import SegmentOptions, segment_with
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.nifti.write import write_array
from autosam3d.io.options import AskedBy
from autosam3d.recipes.reading import Reading
from autosam3d.recipes.recipe import load_recipe, recipe_from_dict
from badinput import make_nifti as bad
from command_line import run, warm, write_model
from mini_run import affine_of, blobs, mini_recipe, write_mini_dataset, write_recipe


def stored_as(folder: Path, change: Any) -> Path:
    """A mini dataset whose scans are `change` of the HU [z, y, x], as float32, with any header."""
    write_mini_dataset(folder)
    for path in sorted((folder / "imagesTr").iterdir()):
        write_array(path, np.asarray(change(read_ct(path).voxels_hu), np.float32).T, affine_of())
    return folder


def from_zero(hu: np.ndarray) -> np.ndarray:
    return hu + 1024


def windowed(hu: np.ndarray) -> np.ndarray:
    return np.clip((hu + 160) / 400 * 255, 0, 255)


def cached(folder: Path, cache: Path, **reading: Any) -> list[np.ndarray]:
    recipe = mini_recipe(reading=reading)
    return [np.array(case.voxels) for case in cache_cases(open_dataset(folder, recipe).train, recipe, cache)]


# What a command can answer: an option of its own, a key of its recipe, a field of the request, or nothing.
@pytest.mark.parametrize(("asked_by", "force", "offset", "volume", "series"), [
    ("segment", "--force", "--intensity-offset -1024", "--volume K", "--series"),
    ("recipe", "--set reading.force=true", "--set reading.intensity_offset=-1024", "--set reading.volume=K", None),
    ("request", "force=true", "intensity_offset=-1024", "volume=K", "series="),
    ("library", "ReadOptions(force=True)", "ReadOptions(intensity_offset=-1024)", "ReadOptions(volume_index='K')",
     "ReadOptions(series="),
    ("evaluate", "--force", None, None, None), ("nobody", None, None, None, None),
])
def test_a_remedy_names_only_what_who_asked_can_do(
    tmp_path: Path, asked_by: AskedBy, force: str | None, offset: str | None, volume: str | None, series: str | None
) -> None:
    options = ReadOptions(asked_by=asked_by)
    thin = tmp_path / "thin.nii.gz"
    write_array(thin, bad.ct_array()[:, :, :4], np.diag([2, 2, 8, 1]))
    two = tmp_path / "two.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([bad.ct_array()] * 2, -1), np.diag([2, 2, 2, 1])), two)
    zero = tmp_path / "zero.nii.gz"
    write_array(zero, (bad.ct_array() + 1024).clip(0), np.diag([2, 2, 2, 1]))
    for path, code, answer in ((thin, "FEW_SLICES", force), (zero, "NOT_HU", offset), (two, "NDIM", volume)):
        with pytest.raises(VolumeError) as caught:
            read_ct(path, options)
        assert caught.value.code == code
        if answer is not None:
            assert answer in caught.value.remedy
        else:
            assert "--" not in caught.value.remedy and "reading." not in caught.value.remedy
    told = options.remedy("series", "U", "use one folder a series")
    assert (series in told) if series else (told == "use one folder a series")


def test_a_set_that_is_stored_from_0_becomes_the_same_numbers(tmp_path: Path) -> None:
    hu, zero = stored_as(tmp_path / "hu", lambda hu: hu), stored_as(tmp_path / "zero", from_zero)
    with pytest.raises(VolumeError) as caught:
        cached(zero, tmp_path / "cache")
    assert caught.value.code == "NOT_HU" and "--set reading.intensity_offset=-1024" in caught.value.remedy
    for a, b in zip(cached(hu, tmp_path / "cache"), cached(zero, tmp_path / "cache", intensity_offset=-1024),
                    strict=True):
        np.testing.assert_array_equal(a, b)


def test_raw_numbers_are_taken_as_they_are_and_not_from_the_cache_of_others(tmp_path: Path) -> None:
    """Window 0..255, minus 40, by 100: not one number of the HU set."""
    folder = stored_as(tmp_path / "raw", windowed)
    with pytest.raises(VolumeError) as caught:
        cached(folder, tmp_path / "cache")
    assert caught.value.code == "NOT_HU" and "--set reading.intensity=raw" in caught.value.remedy
    recipe = mini_recipe(reading={"intensity": "raw"}, preprocess__hu_window={"low_hu": 0.0, "high_hu": 255.0},
                         preprocess__crop_to_body=True)
    case = cache_cases(open_dataset(folder, recipe).train[:1], recipe, tmp_path / "cache")[0]
    stored = np.asarray(nib.load(folder / "imagesTr/c0_0000.nii.gz").dataobj, np.float32).T  # type: ignore[attr-defined]
    np.testing.assert_array_equal(case.voxels, ((stored - np.float32(40)) / np.float32(100)).astype(np.float16))
    with pytest.raises(VolumeError) as caught:
        cached(stored_as(tmp_path / "hu", lambda hu: hu), tmp_path / "cache", intensity="raw")
    assert caught.value.code == "IS_HU" and "--set reading.intensity=hu" in caught.value.remedy


@pytest.mark.parametrize(("scan", "is_hu"), [
    (bad.ct_array().astype(float), True), (bad.ct_array().clip(-1000, 400).astype(float), True),
    (bad.ct_array() + 1024.0, False), (windowed(bad.ct_array().astype(float)), False),
    (bad.ct_array() / 1000.0, False), (np.abs(bad.ct_array()) * 7.0, False), (bad.ct_array() * 40.0, False),
])
def test_every_scan_is_of_one_scale_and_refused_as_the_other(tmp_path: Path, scan: np.ndarray, is_hu: bool) -> None:
    path = tmp_path / "scan.nii.gz"
    write_array(path, scan.astype(np.float32), np.diag([2, 2, 2, 1]))
    codes = {}
    for intensity in ("hu", "raw"):
        try:
            codes[intensity] = read_ct(path, ReadOptions(intensity=intensity)).intensity
        except AutoSam3dError as error:
            codes[intensity] = error.code
    assert codes == ({"hu": "hu", "raw": "IS_HU"} if is_hu else {"hu": "NOT_HU", "raw": "raw"})


def test_nan_of_a_raw_scan_becomes_its_lowest_number(tmp_path: Path) -> None:
    array = (bad.ct_array() + 2048).astype(np.float32)
    array[0, 0, :5] = np.nan
    write_array(tmp_path / "a.nii.gz", array, np.diag([2, 2, 2, 1]))
    volume = read_ct(tmp_path / "a.nii.gz", ReadOptions(intensity="raw"))
    np.testing.assert_array_equal(volume.voxels_hu.T, np.nan_to_num(array, nan=float(np.nanmin(array))))
    assert any("the lowest number" in warning for warning in volume.warnings)


def test_a_model_asks_for_the_scale_that_it_was_trained_on(tmp_path: Path) -> None:
    """The command takes the model's own answers; each kind of scan goes to its model and is refused by the other."""
    hu = blobs(0)[0].T
    scans = {"hu": hu, "zero": hu + 1024, "raw": windowed(hu)}
    for name, array in scans.items():
        write_array(tmp_path / f"{name}.nii.gz", array, affine_of())
    models = {name: write_model(tmp_path / f"model_{name}", reading=reading) for name, reading in
              (("hu", {}), ("zero", {"intensity_offset": -1024}), ("raw", {"intensity": "raw"}))}
    warm(models["hu"])
    told = json.loads((models["raw"] / "best.json").read_text())["recipe"]["reading"]
    assert told["intensity"] == "raw"

    def segmented(model: str, scan: str, *options: object) -> Any:
        return run("segment", models[model], tmp_path / f"{scan}.nii.gz", tmp_path / f"{model}_{scan}.nii.gz",
                   "--overlap", 0, *options)

    for name in models:
        segmented(name, name).demand_ok()
    labels = {name: np.asarray(nib.load(tmp_path / f"{name}_{name}.nii.gz").dataobj) for name in ("hu", "zero")}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(labels["hu"], labels["zero"])
    segmented("raw", "hu").demand_error("IS_HU", 3)
    segmented("hu", "raw").demand_error("NOT_HU", 3)
    assert "--intensity-offset 0" in segmented("zero", "hu").demand_error("NOT_HU", 3)
    segmented("zero", "hu", "--intensity-offset", 0).demand_ok()
    line = segmented("raw", "raw", "--intensity-offset", -1024).demand_error("INTENSITY", 2)
    assert "--intensity-offset -1024" in line


def test_a_volume_that_was_read_as_the_other_scale_is_refused(tmp_path: Path) -> None:
    from autosam3d.checkpoints.checkpoint import load_model

    write_array(tmp_path / "hu.nii.gz", blobs(0)[0].T, affine_of())
    volume = read_ct(tmp_path / "hu.nii.gz")
    raw = load_model(write_model(tmp_path / "model", reading={"intensity": "raw"}))
    with pytest.raises(UsageError, match=r"ReadOptions\(intensity='raw'\)") as caught:
        segment_with(volume, raw, SegmentOptions())
    assert caught.value.code == "INTENSITY"
    segment_with(replace(volume, intensity="raw"), raw, SegmentOptions())


def test_train_says_what_it_can_do_and_does_it(tmp_path: Path) -> None:
    data = stored_as(tmp_path / "data", from_zero)
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=1))
    line = run("train", recipe, "--data", data, "--out", tmp_path / "run").demand_error("NOT_HU", 3)
    assert "--set reading.intensity_offset=-1024" in line and " --intensity-offset" not in line
    done = run("train", recipe, "--data", data, "--out", tmp_path / "run2", "--set", "reading.intensity_offset=-1024")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run2/best.json").read_text())["recipe"]["reading"]["intensity_offset"] == -1024


def test_truth_without_orientation_is_read_as_the_recipe_says(tmp_path: Path) -> None:
    data = write_mini_dataset(tmp_path / "data")
    for path in sorted(data.rglob("*.nii.gz")):
        image = nib.load(path)
        image.set_sform(None, 0)  # type: ignore[attr-defined]
        image.set_qform(None, 0)  # type: ignore[attr-defined]
        nib.save(image, path)
    with pytest.raises(VolumeError) as caught:
        cached(data, tmp_path / "cache")
    assert caught.value.code == "NO_ORIENTATION" and "--set reading.assume_ras=true" in caught.value.remedy
    assert len(cached(data, tmp_path / "cache", assume_ras=True)) == 4
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(reading={"assume_ras": True}))
    labels = data / "labelsTr"
    assert "--assume-ras" in run("evaluate", labels, labels, "--out", tmp_path / "a").demand_error("NO_ORIENTATION", 3)
    done = run("evaluate", labels, labels, "--out", tmp_path / "b", "--recipe", recipe)
    assert done.code == 0, done.err


def test_a_4d_set_trains_on_one_volume_and_its_3d_labels_stay_3d(tmp_path: Path) -> None:
    data = write_mini_dataset(tmp_path / "data")
    plain = cached(data, tmp_path / "cache")
    for path in sorted((data / "imagesTr").iterdir()):
        image = nib.load(path)
        array = np.asarray(image.dataobj)  # type: ignore[attr-defined]
        nib.save(nib.Nifti1Image(np.stack([array[::-1], array], -1), image.affine), path)  # type: ignore[attr-defined]
    with pytest.raises(VolumeError) as caught:
        cached(data, tmp_path / "cache")
    assert caught.value.code == "NDIM" and "--set reading.volume=K" in caught.value.remedy
    for a, b in zip(plain, cached(data, tmp_path / "cache", volume=1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_prepare_stores_what_training_reads_the_same(tmp_path: Path) -> None:
    """A file that is written anew is as it was stored, so that the offset is added once, and raw fractions stay."""
    data = write_mini_dataset(tmp_path / "data")
    download = {"images": "imagesTr/*.nii", "labels": "labelsTr/*.nii.gz", "case_pattern": r"c(\d)"}
    for name, change, reading in (("zero", from_zero, {"intensity_offset": -1024}),
                                  ("raw", lambda hu: windowed(hu) / 255, {"intensity": "raw"})):
        recipe = mini_recipe(reading=reading, dataset__download=download)
        for path in sorted((data / "imagesTr").glob("*.nii.gz")):
            hu = np.rint(read_ct(path).voxels_hu)
            write_array(path.with_suffix(""), np.asarray(change(hu), np.float32).T, affine_of())
        prepare_dataset(recipe, data, tmp_path / name)
        before = read_ct(data / "imagesTr/c0_0000.nii", recipe.reading.options())
        after = read_ct(tmp_path / name / "imagesTr/mini_0_0000.nii.gz", recipe.reading.options())
        np.testing.assert_array_equal(before.voxels_hu, after.voxels_hu)


def test_what_is_given_wins_and_the_rest_is_the_models() -> None:
    model = Reading(prefer="qform", intensity_offset=-1024, volume=1, acquisition=7)
    merged = model.answers(ReadOptions(prefer="sform", acquisition=2))
    assert (merged.prefer, merged.offset, merged.volume_index, merged.acquisition) == ("sform", -1024, 1, 2)
    assert model.answers(ReadOptions(intensity_offset=0)).offset == 0
    assert Reading().answers(ReadOptions()).as_settings() == ReadOptions().as_settings()


def test_a_recipe_without_the_section_has_the_digest_that_it_had() -> None:
    tree = load_recipe("btcv").as_dict()
    assert tree.pop("reading")["intensity"] == "hu"
    before = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    assert recipe_from_dict(tree).digest() == before != load_recipe("btcv", ["reading.force=true"]).digest()


@pytest.mark.parametrize(("override", "named"), [
    ("reading.intensity=mr", "intensity"), ("reading.volume=-1", "volume"), ("reading.intensity_offset=.nan", "offset"),
    ("reading.scale=2", "scale"),
])
def test_settings_that_cannot_be_meant(override: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("btcv", [override])
    assert named in str(caught.value)
    with pytest.raises(UsageError, match="0 with the intensity raw"):
        load_recipe("btcv", ["reading.intensity=raw", "reading.intensity_offset=-1024"])
