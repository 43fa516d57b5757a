"""`bench`: its stages are the pipeline's, its baseline is MONAI's, and its figures belong to one run."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

import autosam3d.studies.bench.bench as bench_module
import autosam3d.studies.bench.monai as monai_module
from autosam3d.geometry.patches import grid_starts
from autosam3d.geometry.preprocess import plan_grid
from autosam3d.inference.pipeline import SegmentOptions, segment_with
from autosam3d.io import read_ct, write_ct
from autosam3d.scans.open_model import ModelWish, open_model
from autosam3d.studies.bench.bench import contenders, summary
from autosam3d.studies.bench.meter import Meter
from autosam3d.volume import Volume
from command_line import mini_model, run
from mini_run import affine_of, blobs


def scan(folder: Path) -> Path:
    write_ct(folder / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    return folder / "ct.nii.gz"


def test_the_stages_one_by_one_are_segment(tmp_path: Path) -> None:
    model, volume, meter = open_model(mini_model(), ModelWish(device="cpu")), read_ct(scan(tmp_path)), Meter()
    tiling = model.recipe.inference
    labels, windows = bench_module._by_stages(volume, model, tiling, meter)
    assert np.array_equal(labels, segment_with(volume, model, SegmentOptions(tiling=tiling)).labels)
    assert windows > 1 and set(meter.seconds) == {"resample", "model", "stitch", "restore"}
    assert all(seconds > 0 for seconds in meter.seconds.values())


def test_monais_way_gives_the_same_labels_where_its_windows_are_ours(tmp_path: Path) -> None:
    """With two windows per axis both walk the same grid."""
    pytest.importorskip("monai")
    model, volume = open_model(mini_model(), ModelWish(device="cpu")), read_ct(scan(tmp_path))
    own, _ = bench_module._by_stages(volume, model, model.recipe.inference, Meter())
    loaded, predict = bench_module._contender(mini_model(), monai_module.CROPPED, 1)
    assert predict is not None
    theirs, calls = monai_module.monai_way(volume, loaded, predict, model.recipe.inference, Meter(), crop=True)
    assert calls == 8 and float(np.mean(own == theirs)) > 0.995  # a random network: near ties


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7, 0.75])
@pytest.mark.parametrize("shape", [(16, 20, 33), (40, 16, 64), (50, 47, 100)])
def test_monais_windows_start_where_monai_lays_them(shape: tuple[int, ...], overlap: float) -> None:
    data = pytest.importorskip("monai.data.utils")
    patch = (16, 16, 32)
    step = tuple(max(1, int(p * (1 - overlap))) for p in patch)
    slices = data.dense_patch_slices(shape, patch, step)
    assert monai_module.monai_starts(shape, patch, overlap) == [tuple(s.start for s in axes) for axes in slices]
    assert len(slices) == len(grid_starts(shape, patch, overlap))


def test_monais_users_have_no_crop_to_the_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    volume, seen = read_ct(scan(tmp_path)), []
    monkeypatch.setattr(monai_module, "plan_grid", lambda v, spec: seen.append(spec.crop_to_body) or plan_grid(v, spec))
    loaded, predict = bench_module._contender(mini_model(), monai_module.BASELINE, 1)
    assert predict is not None
    for crop in (False, True):
        monai_module.monai_way(volume, loaded, predict, loaded.recipe.inference, Meter(), crop)
    assert seen == [False, loaded.recipe.preprocess.crop_to_body]


def test_a_meter_adds_up_and_keeps_the_largest_peak() -> None:
    meter = Meter()
    for size in (1, 40 << 20):
        with meter.stage("x"):
            block = np.ones(size, np.uint8)
            assert block.sum() == size
    assert meter.seconds["x"] > 0
    if meter.peak_mib:  # Linux
        with meter.stage("y"):
            pass
        assert meter.peak_mib["x"] > meter.peak_mib["y"] - 1


def test_every_contender_is_measured_and_told(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    path = scan(tmp_path)
    if "torch" not in contenders(mini_model()):
        pytest.fail("a checkpoint runs on PyTorch")
    rows = {name: bench_module._measure(mini_model(), path, name, None, 1, tmp_path)
            for name in ("torch", *monai_module.BASELINES)}
    bench_module._share_of_peak(rows)
    for name, row in rows.items():
        row |= {"labels_equal": 1.0}
        assert 0 < row["matrix_peak_share"] < 5 and row["whole_seconds"] > 0, name
    table = summary({"rows": rows})
    assert len(table.splitlines()) == 7 and "monai takes" in table and "monai_cropped takes" in table
    assert "1.0x" in table
    json.dumps(rows)


def test_a_bench_without_a_scan_is_refused(tmp_path: Path) -> None:
    done = run("bench", mini_model(), tmp_path / "none.nii.gz", "--no-baseline")
    assert done.code == 3 and "Traceback" not in done.err
    run("bench", tmp_path / "none", scan(tmp_path)).demand_error("NO_MODEL", 4)


@pytest.mark.slow
def test_a_whole_bench_compares_labels_at_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    # Processes of their own as ever, but from one that has imported torch and MONAI once for all four.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autosam3d.studies.bench.bench", "autosam3d.checkpoints.checkpoint",
                                    "autosam3d.models.autosam.network", "monai.inferers.utils"])
    monkeypatch.setattr(bench_module.multiprocessing, "get_context", lambda way: context)
    result = bench_module.bench(mini_model(), scan(tmp_path), ["torch"], overlap=0.25, threads=1)
    rows = result["rows"]
    assert list(rows) == ["torch", *monai_module.BASELINES] and result["settings"] == {"overlap": 0.25, "threads": 1}
    assert rows["torch"]["labels_equal"] == rows["torch"]["organ_labels_equal"] == 1
    assert rows["monai_cropped"]["same_windows_labels_equal"] > 0.995
    assert 0 < rows["monai_cropped"]["organ_same_windows_labels_equal"] <= 1
    assert "with its windows where MONAI lays them" in summary(result)


def test_agreement_counts_organs_apart() -> None:
    one, other = np.array([0, 0, 0, 0, 0, 0, 1, 2]), np.array([0, 0, 0, 0, 0, 1, 1, 1])
    assert bench_module._agreement(one, other, "x") == {"x": 0.75, "organ_x": 1 / 3}
    assert bench_module._agreement(0 * one, 0 * other, "x") == {"x": 1.0, "organ_x": 1.0}
