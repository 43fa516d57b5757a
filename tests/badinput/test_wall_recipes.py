"""The wall: recipes, settings and reading options against the real command line (rows 25 to 50, 79 to 83, 89).

What is wrong with a recipe is said before any data is touched: no run folder appears.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import make_dicom
import make_field
import make_nifti
import nibabel as nib
import numpy as np
import pytest

from autosam3d.recipes.recipe import dump_recipe
from command_line import mini_model, run, unchanged, write_model
from mini_run import mini_recipe, write_mini_dataset, write_recipe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("data") / "blobs")


# ------------------------------------------------------------------------------------------------ rows 79 to 83


@pytest.mark.parametrize(("override", "code", "words"), [
    ("optim.lrr=1", "UNKNOWN_KEY", "did you mean optim.lr?"),
    ("optimm.lr=1", "UNKNOWN_KEY", "did you mean optim?"),
    ("model.network=unet", "BAD_VALUE", "model.network"),
    ("train.epochs=many", "BAD_VALUE", "train.epochs"),
    ("train.epochs=null", "BAD_VALUE", "train.epochs"),
    ("train.epochs=true", "BAD_VALUE", "train.epochs"),
    ("train.epochs=1.5", "BAD_VALUE", "train.epochs"),
    ("train.epochs=-3", "BAD_VALUE", "train.epochs"),
    ("optim.lr=.nan", "BAD_VALUE", "optim.lr"),
    ("optim.lr=.inf", "BAD_VALUE", "optim.lr"),
    ("optim.lr=-1e-3", "BAD_VALUE", "optim.lr"),
    ("train.batch_size=0", "BAD_VALUE", "train.batch_size"),
    ("train.batch_size=1000000000", "BAD_VALUE", "train.batch_size"),
    ("sampling.patches_per_volume=1000000000000", "BAD_VALUE", "sampling.patches_per_volume"),
    ("train.num_workers=1000", "BAD_VALUE", "train.num_workers"),
    ("inference.overlap=1.0", "BAD_VALUE", "inference.overlap"),
    ("model.patch_size=[16, 0, 16]", "BAD_VALUE", "model.patch_size"),
    ("model.patch_size=[16, -16, 16]", "BAD_VALUE", "model.patch_size"),
    ("model.patch_size=[16, 17, 16]", "BAD_VALUE", "model.patch_size"),
    ("model.attn_window=[99999999999999999999999, 1, 1]", "BAD_VALUE", "model.attn_window"),
    ("model={network: swin_unetr, patch_size: [48, 48, 48]}", "BAD_VALUE", "multiples of 32"),
    ("model={network: res_unet, patch_size: [16, 16, 16]}", "BAD_VALUE", "multiples of 32"),
    ("distill.lambda=1.5", "BAD_VALUE", "distill.lambda"),
    ("distill={label_weight: 1.0}", "UNKNOWN_KEY", "distill.label_weight"),
    ("train.seed=!!python/object:os.system x", "YAML", ""),
    ("no_equals_sign", "OVERRIDE", "KEY.PATH=VALUE"),
])
def test_79_to_81_an_override_that_cannot_be(
    override: str, code: str, words: str, tmp_path: Path, dataset: Path
) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    done = run("train", recipe, "--data", dataset, "--out", tmp_path / "run", "--set", override)
    line = done.demand_error(code, 2) if code != "YAML" else done.demand_error(done.err[6:].partition("]")[0], 2)
    assert words in line
    assert not (tmp_path / "run").exists()


TEXT = dump_recipe(mini_recipe())


@pytest.mark.parametrize("content", [
    TEXT.replace("name: mini", "name: mini\nname: other").encode(),
    (TEXT + "more: !!python/object/apply:os.system ['touch canary']\n").encode(),
    (TEXT + "a: &a [x]\nb: [*a, *a]\n").encode(),
    TEXT.encode() + b"more: \xff\xfe\n",
    b"[" * 100_000,
    b"",
    b"just text",
], ids=["key_twice", "python_tag", "anchors", "not_utf8", "nested", "empty", "text"])
def test_80_and_82_a_file_that_is_no_recipe(content: bytes, tmp_path: Path, dataset: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_bytes(content)
    for arguments in (("train", path, "--data", dataset, "--out", tmp_path / "run"), ("info", "--yaml", path)):
        done = run(*arguments, cwd=tmp_path, limits={"CPU": 15})
        done.demand_error(done.err[6:].partition("]")[0], 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini.yaml"]


def test_82_a_hundred_megabytes_are_not_read(tmp_path: Path, dataset: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.touch()
    os.truncate(path, 100 << 20)
    done = run("train", path, "--data", dataset, "--out", tmp_path / "run", limits={"CPU": 10})
    done.demand_error("RECIPE_TOO_LARGE", 2)


@pytest.mark.parametrize("device", ["cuda:7", "cuda:99", "cuda:200", "cuda:-1", "tpu", "cuda:1:2"])
def test_83_a_device_that_is_absent(device: str, tmp_path: Path, dataset: Path) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    scan = make_nifti.ODD["00_good"][0](tmp_path)
    for arguments in (("segment", mini_model(), scan, tmp_path / "out"),
                      ("train", recipe, "--data", dataset, "--out", tmp_path / "run")):
        done = run(*arguments, "--device", device)
        done.demand_error(done.err[6:].partition("]")[0], 2)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("place", ["", "imagesTr", "new/run"])
def test_a_run_is_not_written_into_its_dataset(place: str, tmp_path: Path, dataset: Path) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    with unchanged(dataset):
        run("train", recipe, "--data", dataset, "--out", dataset / place).demand_error("SAME_PATH", 2)


def test_a_case_whose_name_is_no_text_is_like_any_other(tmp_path: Path) -> None:
    data = write_mini_dataset(tmp_path / "blobs")
    (data / "splits_final.json").unlink()
    strange = os.fsdecode(b"\xff")
    (data / "imagesTr/c0_0000.nii.gz").rename(data / "imagesTr" / f"{strange}_0000.nii.gz")
    (data / "labelsTr/c0.nii.gz").rename(data / "labelsTr" / f"{strange}.nii.gz")
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=1, dataset__val_share=0.3))
    assert run("train", recipe, "--data", data, "--out", tmp_path / "run").code == 0


# ------------------------------------------------------------------------------------------------ row 89


def test_89_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, dataset: Path) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe(train__epochs=8, train__save_every_steps=1,
                                                              optim__schedule="constant", optim__warmup_epochs=0))
    done = run("train", recipe, "--data", dataset, "--out", tmp_path / "run", "--set", "optim.lr=1e30")
    assert done.code == 4 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error[NONFINITE] ")
    assert (tmp_path / "run/last.json").is_file()


# ------------------------------------------------------------------------------------------------ distill


def test_a_student_of_a_broken_or_another_teacher(tmp_path: Path, dataset: Path) -> None:
    out = tmp_path / "run"
    run("distill", tmp_path / "none", "--data", dataset, "--out", out).demand_error("NO_MODEL", 4)
    run("distill", mini_model(), "--data", dataset, "--out", out, "--student", "tinny").demand_error("NO_RECIPE", 2)
    plain = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    run("distill", mini_model(), "--data", dataset, "--out", out, "--student", plain).demand_error("NO_DISTILL", 2)
    run("train", plain, "--data", dataset, "--out", out, "--set", "distill.lambda=0.5").demand_error("NO_TEACHER", 2)
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, labels__organs=["right_kidney", "left_kidney", "spleen"])
    plain.write_text(dump_recipe(mini_recipe()) + "distill: {lambda: 0.5}\n")
    line = run("distill", other, "--data", dataset, "--out", out, "--student", plain).demand_error("MISMATCH", 4)
    assert "right_kidney, left_kidney; got one of 4, background, right_kidney, left_kidney, spleen" in line
    assert not list(out.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------ files


def test_files_beside_an_output_are_not_replaced_unasked(tmp_path: Path) -> None:
    scan, out = make_nifti.ODD["00_good"][0](tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "ct.json").write_text("a side-car of another tool")
    with unchanged(out):
        run("segment", mini_model(), scan, out / "ct.nii.gz").demand_error("OUTPUT_EXISTS", 2)
    run("segment", mini_model(), scan, out / "ct.nii.gz", "--overwrite").demand_ok()
    assert "skipped 1" in run("segment", mini_model(), scan, out / "ct.nii.gz").demand_ok().out


def test_a_packed_model_is_not_replaced_by_another(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "model.json").write_text("{}")
    with unchanged(packed):
        run("pack", mini_model(), packed).demand_error("OUTPUT_EXISTS", 2)


def test_dicom_files_beside_nifti_files_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    series = make_dicom.ODD["00_good"][0](folder)
    for slice_path in series.iterdir():
        slice_path.rename(folder / slice_path.name)
    series.rmdir()
    make_nifti.ODD["00_good"][0](folder)
    done = run("segment", mini_model(), folder, tmp_path / "out").demand_ok()
    assert any("are passed over" in warning for warning in done.warnings)


def test_a_ct_is_no_label_map(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    values = np.random.default_rng(0).integers(0, 4000, make_nifti.SHAPE).astype(np.uint16)
    path.write_bytes(make_nifti.pack(make_nifti.nifti_bytes(values)))
    run("evaluate", path, path, "--out", tmp_path / "scores").demand_error("NOT_LABELS", 3)
    assert not (tmp_path / "scores").exists()


# ------------------------------------------------------------------------------------------------ reading options


def scan_file(folder: Path, array: np.ndarray | None = None, **fields: Any) -> Path:
    path = folder / "ct.nii.gz"
    path.write_bytes(make_nifti.pack(make_nifti.nifti_bytes(array, **fields)))
    return path


def test_25_prefer_chooses_between_two_transforms(tmp_path: Path) -> None:
    turned: dict[str, Any] = {"qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 1}
    scan = scan_file(tmp_path, **turned)
    run("segment", mini_model(), scan, tmp_path / "no").demand_error("AFFINE_CONFLICT", 3)
    affines = {}
    for name in ("sform", "qform"):
        run("segment", mini_model(), scan, tmp_path / name, "--prefer", name).demand_ok()
        affines[name] = nib.load(tmp_path / name / "ct.nii.gz").header
    assert np.array_equal(affines["sform"].get_sform(), affines["qform"].get_sform())  # the file's own, both times


def test_26_assume_ras(tmp_path: Path) -> None:
    scan = scan_file(tmp_path, sform_code=0, qform_code=0)
    line = run("segment", mini_model(), scan, tmp_path / "no").demand_error("NO_ORIENTATION", 3)
    assert "--assume-ras" in line
    run("segment", mini_model(), scan, tmp_path / "out", "--assume-ras").demand_ok()


def test_32_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    array = np.stack([make_nifti.ct_array(seed=0), make_nifti.ct_array(seed=1)], -1)
    scan = scan_file(tmp_path, array)
    assert "--volume" in run("segment", mini_model(), scan, tmp_path / "no").demand_error("NDIM", 3)
    run("segment", mini_model(), scan, tmp_path / "out", "--volume", 1).demand_ok()
    assert nib.load(tmp_path / "out/ct.nii.gz").shape == make_nifti.SHAPE
    run("segment", mini_model(), scan, tmp_path / "no", "--volume", 2).demand_error("VOLUME_INDEX", 2)


def test_38_an_intensity_offset(tmp_path: Path) -> None:
    scan = scan_file(tmp_path, (make_nifti.ct_array() + 1024).clip(0).astype(np.uint16))
    assert "--intensity-offset" in run("segment", mini_model(), scan, tmp_path / "no").demand_error("NOT_HU", 3)
    run("segment", mini_model(), scan, tmp_path / "out", "--intensity-offset", "-1024").demand_ok()
    for value in ("nan", "1e300", "inf"):
        run("segment", mini_model(), scan, tmp_path / "no", "--intensity-offset", value).demand_error("USAGE", 2)


def test_50_one_of_two_acquisitions(tmp_path: Path) -> None:
    first = make_dicom._set(AcquisitionNumber=4)
    series = make_field.second_pass(1.5, first=first, AcquisitionNumber=7)(tmp_path)
    assert "--acquisition" in run("segment", mini_model(), series, tmp_path / "no.nii.gz").demand_error(
        "ACQUISITION_CHOICE", 2)
    run("segment", mini_model(), series, tmp_path / "out.nii.gz", "--acquisition", 7).demand_ok()
    assert nib.load(tmp_path / "out.nii.gz").shape == (make_dicom.COLUMNS, make_dicom.ROWS, make_dicom.NUM_SLICES)


def test_42_a_scan_larger_than_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """512 x 512 x 3000 voxels as a file with a hole: 1.5 GB that nobody has to write."""
    scan = tmp_path / "large.nii"
    scan.write_bytes(make_nifti.nifti_bytes(dim=(3, 512, 512, 3000, 1, 1, 1, 1))[:352])
    os.truncate(scan, 352 + 2 * 512 * 512 * 3000)
    done = run("segment", mini_model(), scan, tmp_path / "out", "--max-ram", "2", "--force", limits={"CPU": 10})
    assert str(scan) in done.demand_error("MEMORY", 5)
    assert not (tmp_path / "out").exists()
