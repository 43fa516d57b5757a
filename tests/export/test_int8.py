"""INT8: its bounds by hand, what is refused, that a refusal leaves nothing, and nncf itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autosam3d.checkpoints.exported import INT8, installed_backends, load_exported, open_export
from autosam3d.errors import CheckpointError, MissingExtraError, UsageError
from autosam3d.export import int8
from autosam3d.export.export import export_model
from autosam3d.export.int8 import Scans, demand_int8, read_scans
from autosam3d.export.parity import OrganDice, compare_labels, int8_faults, judged_int8, mean_int8_dice
from autosam3d.export.verify import verify_export
from autosam3d.geometry.preprocess import prepare_ct
from autosam3d.inference.openvino_runtime import openvino_core
from autosam3d.inference.pipeline import segment
from autosam3d.io import DEFAULTS, write_ct
from autosam3d.scans.backend import fastest_backend, wished_backend
from autosam3d.scans.open_model import ModelWish, open_model
from autosam3d.volume import Volume
from command_line import contents, run, write_model
from exports import LABELS, Convolutions, accept, copied, edit, loaded, mini_export
from made_once import made_once
from mini_run import affine_of, blobs, environment

GOLDEN = 9
"""Seed of the scan of the golden case."""


def volume(seed: int) -> Volume:
    return Volume(np.round(blobs(seed)[0]), affine_of())  # as a file keeps it


def prepared(*seeds: int) -> list[np.ndarray]:
    return [prepare_ct(volume(seed), loaded().recipe.preprocess).voxels for seed in seeds]


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Four scans a, b, c, d."""
    paths = [tmp_path / "scans" / f"{name}.nii.gz" for name in "abcd"]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        write_ct(path, volume(seed))
    return paths


def pretend(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """Take the network of another export for the INT8 one, so that no test of the way around it needs nncf."""

    def quantised(exact: Path, folder: Path, way: str, *args: object) -> Path:
        for suffix in (".xml", ".bin"):
            shutil.copy(source.with_suffix(suffix), folder / f"{way}{suffix}")
        return folder / f"{way}.xml"

    monkeypatch.setattr(int8, "_quantised", quantised)


@pytest.fixture(scope="module")
def made_with_int8() -> Path:
    """An export whose INT8 network is the float32 one."""
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, mini_export() / "openvino.xml")
        return made_once("int8", lambda folder: export_model(
            loaded(), folder, ct=volume(GOLDEN), int8=Scans(prepared(0), prepared(1, 2))))


@pytest.fixture
def with_int8(made_with_int8: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return copied(tmp_path, made_with_int8)


# ------------------------------------------------------------------------------------------------ bounds


def of(dice: float, reference: int = 1000, own: int = 1000) -> OrganDice:
    return OrganDice(dice, reference, own)


def test_dice_of_shifted_cubes() -> None:
    """A cube of 10 voxels an edge, one voxel aside: nine tenths are shared. Organs nowhere have no Dice."""
    truth, labels = np.zeros((2, 20, 20, 20), np.uint8)
    truth[5:15, 5:15, 5:15] = 1
    labels[5:15, 5:15, 6:16] = 1
    found = compare_labels(labels, truth, ["liver", "spleen"])
    assert found == {"liver": OrganDice(0.9, 1000, 1000), "spleen": OrganDice(None, 0, 0)}


@pytest.mark.parametrize("liver, spleen, words", [
    (1.0, 0.98, []), (0.99, 0.99, []), (1.0, 0.9799, ["mean Dice"]), (0.9899, 0.9899, ["mean Dice"]),
    (1.0, 0.969, ["mean Dice", "Dice of spleen"]),
    (0.5, float("nan"), ["mean Dice", "Dice of liver", "Dice of spleen"]),
])
def test_the_bounds_are_on_the_mean_and_on_the_worst(liver: float, spleen: float, words: list[str]) -> None:
    faults = int8_faults([{"liver": of(liver), "spleen": of(spleen)}])
    assert [fault.split(" of the organs")[0].split(" against")[0] for fault in faults] == words
    assert all("needed 0.99" in f if f.startswith("mean") else "needed 0.97" in f for f in faults)


def test_the_worst_of_any_scan_counts_and_the_mean_is_of_organs() -> None:
    good, bad = {"liver": of(1.0), "spleen": of(1.0)}, {"liver": of(0.969)}
    assert int8_faults([good] * 9 + [bad]) == ["Dice of liver against float32 is 0.9690, needed 0.97"]
    assert mean_int8_dice(judged_int8([good, bad])) == pytest.approx((1.969 / 2 + 1) / 2)


def test_organs_below_100_voxels_are_not_judged_unless_int8_alone_sees_them() -> None:
    assert not int8_faults([{"liver": of(1.0), "spleen": of(0.2, 99, 99)}])
    assert "Dice of spleen" in " ".join(int8_faults([{"liver": of(1.0), "spleen": of(0.0, 0, 100)}]))
    assert "no organ of 100 voxels is shown" in int8_faults([{"liver": of(1.0, 99, 99)}])[0]
    assert "no organ of 100 voxels is shown" in int8_faults([])[0]


# ------------------------------------------------------------------------------------------------ scans


def test_every_other_scan_calibrates_and_the_golden_one_judges(scans: list[Path]) -> None:
    recipe = loaded().recipe
    a, b, c, d = prepared(0, 1, 2, 3)

    def same(found: Scans, calibrating: list[np.ndarray], judging: list[np.ndarray]) -> bool:
        return all(len(x) == len(y) and all(map(np.array_equal, x, y)) for x, y in (
            (found.calibrating, calibrating), (found.judging, judging)))

    assert same(read_scans(scans, recipe, DEFAULTS, volume(GOLDEN)), [a, c], [b, d])
    assert same(read_scans(scans, recipe, DEFAULTS, volume(0)), [b, d], [a, c])
    assert same(read_scans(scans[:2], recipe, DEFAULTS, volume(0)), [b], [a])


def test_one_scan_under_two_names_is_refused(scans: list[Path]) -> None:
    shutil.copy(scans[0], scans[1])
    with pytest.raises(UsageError, match=r"got the one of .*a\.nii\.gz again") as caught:
        read_scans(scans, loaded().recipe, DEFAULTS, volume(GOLDEN))
    assert caught.value.code == "SAME_SCAN"


def test_calibrating_windows_are_of_the_scan_and_show_its_organs() -> None:
    recipe, (scan,) = loaded().recipe, prepared(0)
    windows = int8._calibrating_windows([scan], [blobs(0)[1]], recipe)
    assert all(window.shape == (1, 16, 16, 16) and window.dtype == np.float32 for window in windows)
    cut = {np.ascontiguousarray(scan[z : z + 16, y : y + 16, x : x + 16]).tobytes()
           for z in range(9) for y in range(11) for x in range(13)}
    assert all(window.tobytes() in cut for window in windows) and 2 <= len(windows) <= 24
    assert max(window.max() for window in windows) == scan.max()  # inside the brighter ball


# ------------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_judged_is_refused_before_any_work(scans: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for paths, has_ct, code in ((scans[:1], True, "TOO_FEW"), ([], True, "TOO_FEW"), (scans, False, "NO_CT")):
        with pytest.raises(UsageError) as caught:
            demand_int8(paths, has_ct)
        assert caught.value.code == code
    with pytest.raises(MissingExtraError) as missing:
        demand_int8(scans, True)
    assert missing.value.remedy == 'pip install "autosam3d[int8]"'


def test_the_command_line_refuses_with_one_line(tmp_path: Path, scans: list[Path]) -> None:
    before = contents(tmp_path)
    one = ("export", tmp_path / "none", tmp_path / "export", "--ct", scans[0], "--int8", scans[1])
    assert "expected two scans or more, got 1" in run(*one).demand_error("TOO_FEW", 2)
    expected = ("NO_MODEL", 4) if importlib.util.find_spec("nncf") else ("MISSING_EXTRA", 2)
    run(*one, "--int8", tmp_path / "absent.nii.gz").demand_error(*expected)
    run("export", tmp_path / "none", tmp_path / "export", "--int8", tmp_path / "scans").demand_error("NO_CT", 2)
    (tmp_path / "empty").mkdir()
    run("export", tmp_path / "none", tmp_path / "export", "--int8", tmp_path / "empty").demand_error("NO_SCANS", 3)
    (tmp_path / "empty").rmdir()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_network_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    pretend(monkeypatch, mini_export(1) / "openvino.xml")
    folder = copied(tmp_path, mini_export(1)) if overwrite else tmp_path / "export"
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"Dice of \w+_kidney against float32 is 0\.\d+, needed 0\.97") as caught:
        export_model(loaded(), folder, ct=volume(GOLDEN), int8=Scans(prepared(0), prepared(1)), overwrite=overwrite)
    assert (caught.value.code, caught.value.exit_code, caught.value.where) == ("INT8", 4, str(folder))
    assert contents(tmp_path) == before


def test_bold_int8_is_left_where_it_is_out_of_bounds_or_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`weights` is the float32 network here, `activations` another one, or none; both are said to be fast."""
    exact, other = (export / "openvino.xml" for export in (mini_export(), mini_export(1)))
    made = {"weights": exact, "activations": other}

    def quantised(at: Path, folder: Path, way: str, *args: object) -> Path:
        if made[way] is None:
            raise KeyError("a node that nncf does not find")
        return made[way]

    monkeypatch.setattr(int8, "_quantised", quantised)
    seconds = {exact: 1.0, other: 0.5}
    monkeypatch.setattr(int8._Judge, "cpu_seconds", lambda self, xml, window: seconds.get(xml, 1.0))
    for case, way, ratio in (("worse", "weights", 1.0), ("none", "weights", 1.0), ("same", "activations", 0.5)):
        if case == "none":
            made["activations"] = None  # type: ignore[assignment]
        if case == "same":
            twin = tmp_path / "twin.xml"
            for suffix in (".xml", ".bin"):
                shutil.copy(exact.with_suffix(suffix), twin.with_suffix(suffix))
            made["activations"], seconds[twin] = twin, 0.5
        stage = tmp_path / case
        shutil.copytree(mini_export(), stage)
        found = int8.write_int8(stage, loaded().recipe, Scans(prepared(0), prepared(1)), 1)
        assert (found.way, found.time_ratio) == (way, ratio)
        assert not int8_faults(found.scans) and (stage / "openvino_int8.bin").is_file()


# ------------------------------------------------------------------------------------------------ in use


def test_the_folder_says_what_int8_is_and_auto_never_takes_it(with_int8: Path) -> None:
    export = open_export(with_int8)
    assert {"openvino_int8.xml", "openvino_int8.bin"} <= set(export.meta["files"])
    assert export.meta["use"]["openvino_int8"]["files"] == ["openvino_int8.xml", "openvino_int8.bin"]
    told = json.loads((with_int8 / "certificate.json").read_text())["int8"]
    assert told["mean_dice"] == 1 and told["judging_scans"] == 2 and told["calibrating_scans"] == 1
    assert told["bounds"] == {"mean_dice": 0.99, "worst_dice": 0.97, "dice_judged_from_voxels": 100}
    text = (with_int8 / "certificate.md").read_text()
    assert told["organs_not_judged"] == ["right_kidney"] and "so not judged: right_kidney" in text
    assert "Judged on 2 whole scans" in text and "openvino-int8 |" in text and "| left_kidney | 1.0000 |" in text
    assert INT8 not in installed_backends(export) and fastest_backend(export, 1) != INT8
    assert wished_backend(INT8) == INT8


def exchange(source: Path, place: Path) -> None:
    """Another file in its place: OpenVINO may hold the old one mapped."""
    shutil.copy(source, place.with_name("new"))
    place.with_name("new").replace(place)


def test_verify_judges_int8_by_its_own_bounds(with_int8: Path, tmp_path: Path) -> None:
    assert [(row.backend, row.int8) for row in verify_export(with_int8, 1).rows] == [
        ("onnxruntime", False), ("openvino", False), (INT8, True)]
    # Other logits and the same labels: a fault of a float32 runtime, and none of INT8.
    import openvino

    graph = openvino_core().read_model(with_int8 / "openvino_int8.xml")
    head = [op for op in graph.get_ordered_ops() if op.get_type_name() == "Convolution"][-1]
    followers = list(head.output(0).get_target_inputs())
    scaled = openvino.opset13.multiply(head.output(0), openvino.opset13.constant(np.float32(1.01)))
    for follower in followers:
        follower.replace_source_output(scaled.output(0))
    openvino.save_model(graph, tmp_path / "scaled.xml", compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        exchange(tmp_path / f"scaled{suffix}", with_int8 / f"openvino_int8{suffix}")
    accept(with_int8, "openvino_int8.xml", "openvino_int8.bin")
    row = verify_export(with_int8, 1).rows[-1]
    assert row.logit_share > 1e-3 and not row.faults()
    # Another network: its organs are named.
    for suffix in (".xml", ".bin"):
        exchange(mini_export(1) / f"openvino{suffix}", with_int8 / f"openvino_int8{suffix}")
    accept(with_int8, "openvino_int8.xml", "openvino_int8.bin")
    assert "against float32 is 0." in run("verify", with_int8).demand_error("PARITY", 4)


def test_a_part_of_the_int8_files_is_refused(with_int8: Path) -> None:
    content = (with_int8 / "openvino_int8.bin").read_bytes()
    (with_int8 / "openvino_int8.bin").write_bytes(content[:-1])
    run("verify", with_int8).demand_error("CORRUPT", 4)
    (with_int8 / "openvino_int8.bin").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_exported(with_int8, INT8, 1)


def test_int8_runs_where_it_is_named(with_int8: Path, scans: list[Path], tmp_path: Path) -> None:
    model = load_exported(with_int8, INT8, 1)
    assert model.backend == INT8
    np.testing.assert_array_equal(segment(volume(3), model).labels, segment(volume(3), loaded()).labels)
    run("segment", with_int8, scans[0], tmp_path / "out.nii.gz", "--backend", INT8).demand_ok()
    assert "openvino-int8" in run("verify", with_int8).demand_ok().out


def test_a_model_without_int8_says_so(tmp_path: Path) -> None:
    for model in (mini_export(), write_model(tmp_path)):
        with pytest.raises(UsageError, match="expected an export that was made with --int8") as caught:
            open_model(model, ModelWish(backend=INT8))
        assert caught.value.code == "BACKEND"


def test_memory_of_int8_is_in_the_json(with_int8: Path) -> None:
    assert set(open_export(with_int8).meta["memory"]) == {"onnxruntime", "openvino", INT8}
    edit(with_int8, lambda meta: meta["memory"].update({INT8: "much"}))
    assert load_exported(with_int8, INT8, 1).predictor.activation_bytes(1) == 0


# ------------------------------------------------------------------------------------------------ nncf


@pytest.mark.slow
def test_nncf_makes_both_ways_reports_to_nobody_and_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own: under pytest, nncf would stay silent by itself."""
    pytest.importorskip("nncf", reason="the extra int8 is not installed")
    code = (
        "import pathlib, sys\n"
        "import numpy as np\n"
        "calls = []\n"
        "watched = ('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen')\n"
        "sys.addaudithook(lambda name, args: calls.append((name, args)) if name in watched else None)\n"
        "from autosam3d.export import int8\n"
        "from autosam3d.checkpoints.exported import open_export\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "recipe = open_export(folder).recipe\n"
        "windows = list(np.random.default_rng(0).normal(size=(4, 1, 16, 16, 16)).astype(np.float32))\n"
        "for way in ('weights', 'activations'):\n"
        "    int8._quantised(folder / 'openvino.xml', pathlib.Path(sys.argv[2]), way, windows, recipe)\n"
        "from nncf.telemetry.decorator import telemetry\n"
        "assert type(telemetry).__name__ == 'MagicMock', telemetry\n"
        "assert not [c for c in calls if c[0].startswith('socket')], calls\n"
    )
    done = subprocess.run([sys.executable, "-c", code, mini_export(), tmp_path], capture_output=True, text=True,
                          timeout=280, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    core = openvino_core()
    kinds = {way: {op.get_element_type().get_type_name() for op in core.read_model(tmp_path / f"{way}.xml").get_ops()
                   if op.get_type_name() == "Constant"} for way in ("weights", "activations")}
    assert "i8" in kinds["weights"] and kinds["activations"] & {"i8", "u8"}
    rounded = [op for op in core.read_model(tmp_path / "activations.xml").get_ops()
               if op.get_type_name() == "FakeQuantize"]
    assert rounded  # the middle convolution; the first and the last stay


@pytest.mark.slow
def test_nncf_from_scans_to_a_verified_export(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="the extra int8 is not installed")
    network = Convolutions(3)
    result = export_model(loaded(network), tmp_path / "export", ct=volume(GOLDEN),
                          int8=Scans(prepared(0, 1), prepared(2, 3)))
    assert result.int8 is not None and not int8_faults(result.int8.scans)
    assert set(judged_int8(result.int8.scans)) <= set(LABELS[1:])
    assert not verify_export(tmp_path / "export", 1).faults
    labels = segment(volume(4), load_exported(tmp_path / "export", INT8, 1)).labels
    expected = segment(volume(4), loaded(network)).labels
    assert 0.98 < np.mean(labels == expected) < 1  # the same organs, and yet another network
