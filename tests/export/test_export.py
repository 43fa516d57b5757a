"""Export: what the folder holds, what it proves, and that nothing is written where the proof fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autosam3d.checkpoints.exported import open_export
from autosam3d.checkpoints.targets import TARGETS, demand_exportable
from autosam3d.errors import AutoSam3dError, CheckpointError, MissingExtraError, UsageError
from autosam3d.export.export import export_model
from autosam3d.export.golden import load_golden
from autosam3d.export.onnx_graph import onnx_model, with_half_weights
from autosam3d.export.parity import Ran, measure_parity
from autosam3d.export.verify import verify_export
from autosam3d.models.spec import AutoSamSpec, ResUnetSpec, SwinUnetrSpec
from command_line import contents
from exports import LABELS, SIZE, Convolutions, copied, edit, loaded, mini_export, torch_logits


class Cancelling(Convolutions):
    """What float16 cannot say: a small difference of large weights."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.linspace(1000.2, 1000.4, 3 * 512))

    def forward(self, ct: Tensor) -> Tensor:
        return super().forward(ct) + 40 * (self.large.view(3, -1).mean(1) - 1000).view(1, 3, 1, 1, 1)


def test_the_folder_holds_all_that_others_need() -> None:
    folder = mini_export()
    assert {p.name for p in folder.iterdir()} == {
        "model.json", "model.onnx", "openvino.xml", "openvino.bin", "golden.npz", "certificate.json", "certificate.md",
    }
    meta = json.loads((folder / "model.json").read_text())
    use = meta["use"]
    assert use["hu_window"] == [-160.0, 240.0] and use["patch"] == [16, 16, 16] and use["overlap"] == 0.25
    assert [(e["value"], e["name"]) for e in use["labels"]] == list(enumerate(LABELS))
    assert use["labels"][1]["snomed"] == "9846003" and use["labels"][1]["rgb"] == [205, 80, 140]
    assert use["side_pairs"] == [["right_kidney", "left_kidney"]] and use["air"] == -2.0
    assert meta["trained_weights_sha256"] == "ab" * 32 and meta["metrics"] == {"val_dice": 0.5}
    assert 0 < meta["memory"]["openvino"] < 1 << 30 and 0 < meta["memory"]["onnxruntime"] < 1 << 30
    assert str(folder) not in (folder / "model.json").read_text()


def test_the_certificate_compares_all_backends_and_names_what_was_not_seen() -> None:
    certificate = json.loads((mini_export() / "certificate.json").read_text())
    rows = {row["backend"]: row for row in certificate["backends"]}
    assert list(rows) == ["pytorch", "onnxruntime", "openvino"]
    assert all(row["within_bounds"] and row["logit_share"] < 1e-5 for row in rows.values())
    assert certificate["bounds"] == {"logit_share": 1e-3, "equal_share": 0.9998, "dice": 0.99,
                                     "dice_judged_from_voxels": 100}
    shown = {name for name, count in rows["pytorch"]["reference_voxels"].items() if count}
    assert shown | set(certificate["organs_not_shown"]) == set(LABELS[1:])
    text = (mini_export() / "certificate.md").read_text()
    assert all(backend in text for backend in rows)


def test_the_golden_case_is_what_torch_says() -> None:
    export = open_export(mini_export())
    golden = load_golden(export.path("golden.npz"), export.recipe)
    logits = torch_logits(Convolutions(), golden.ct)
    np.testing.assert_array_equal(golden.labels, logits.argmax(1))
    np.testing.assert_allclose(golden.logits, logits[..., ::2, ::2, ::2], atol=golden.step)


def test_the_graph_is_static_self_contained_and_stores_large_weights_as_float16() -> None:
    graph = onnx.load(mini_export() / "model.onnx")
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.graph.input,
                                                                                   *graph.graph.output)}
    assert shapes == {"ct": [1, 1, *SIZE], "logits": [1, 3, *SIZE], "probs": [1, 3, *SIZE]}
    stored = {tuple(t.dims): numpy_helper.to_array(t) for t in graph.graph.initializer}
    assert stored[(8, 8, 3, 3, 3)].dtype == np.float16 and stored[(8, 1, 3, 3, 3)].dtype == np.float32
    np.testing.assert_array_equal(stored[(8, 8, 3, 3, 3)], Convolutions().body[2].weight.detach().numpy())
    assert {p.key: p.value for p in graph.metadata_props} == {"labels": json.dumps(LABELS)}


def test_equal_constants_are_stored_once() -> None:
    network = Convolutions()
    network.body[2].weight.data[:] = 0.5
    network.body.append(nn.Conv3d(8, 8, 3, padding=1))
    network.body[4].weight.data[:] = 0.5
    graph = onnx_model(network.eval(), SIZE)
    assert sum(tuple(t.dims) == (8, 8, 3, 3, 3) for t in graph.graph.initializer) == 1


def test_weights_that_float16_cannot_hold_stay() -> None:
    network = Cancelling()
    network.large.data[0] = 1e6
    rounded = with_half_weights(network)
    assert torch.equal(rounded.get_parameter("large"), network.large)
    network.large.data[0] = 1000.2
    assert with_half_weights(network).get_parameter("large")[0] == 1000.0
    assert network.large[0] == torch.tensor(1000.2)  # the network itself is left alone


def test_a_model_that_rounding_changes_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of the labels are equal, needed") as caught:
        export_model(loaded(Cancelling()), tmp_path / "export")
    assert caught.value.code == "PARITY"
    assert contents(tmp_path) == {}


def test_only_an_export_is_ever_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError) as caught:
            export_model(loaded(), folder, overwrite=overwrite)
        assert caught.value.code == "OUTPUT_EXISTS"
    assert contents(tmp_path) == {"export": None, "export/thesis.txt": b"years of work"}
    (folder / "thesis.txt").unlink()
    folder.rmdir()
    copied(tmp_path)
    with pytest.raises(UsageError, match="--overwrite"):
        export_model(loaded(), folder)
    edit(folder, lambda meta: meta.update(metrics={"val_dice": 0.1}))
    export_model(loaded(), folder, overwrite=True)
    assert json.loads((folder / "model.json").read_text())["metrics"] == {"val_dice": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_failure_in_between_leaves_the_old_export_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path)
    before = contents(tmp_path)

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autosam3d.export.export.measure_cost", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_model(loaded(), folder, overwrite=True)
    assert contents(tmp_path) == before


def test_without_the_extra_the_remedy_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        export_model(loaded(), tmp_path / "export")
    assert caught.value.remedy == 'pip install "autosam3d[export]"' and not (tmp_path / "export").exists()


# ------------------------------------------------------------------------------------------------ parity


def test_parity_by_hand() -> None:
    export = open_export(mini_export())
    golden = load_golden(export.path("golden.npz"), export.recipe)
    logits = torch_logits(Convolutions(), golden.ct)

    def parity(logits: np.ndarray):
        return measure_parity(Ran(backend="b", version="1", threads=1, seconds=1, logits=logits), golden, LABELS[1:])

    assert not parity(logits).faults() and parity(logits).flipped == 0
    high = logits + 0.002 * golden.scale  # all alike: labels stay
    assert [f.split()[0] for f in parity(high).faults()] == ["logits"]
    flipped = logits.copy()
    z, y, x = np.argwhere(golden.labels[0] == 1)[:9].T
    flipped[0, 2, z, y, x] = flipped[0].max() + 1
    found = parity(flipped)
    assert found.flipped == 9 and found.equal_share == pytest.approx(1 - 9 / golden.labels.size)
    ours = np.where(golden.labels == 1, 1, 0).sum()
    assert found.dice["right_kidney"] == pytest.approx(2 * (ours - 9) / (2 * ours - 9))
    assert "labels are equal" in " ".join(found.faults())
    assert parity(np.full_like(logits, np.nan)).faults()


# ------------------------------------------------------------------------------------------------ verify


def test_verify_runs_again_what_was_certified() -> None:
    result = verify_export(mini_export(), 1)
    assert [row.backend for row in result.rows] == ["onnxruntime", "openvino"] and not result.faults
    assert len(result.files) == 6


@pytest.mark.parametrize("name", ["model.onnx", "openvino.xml", "openvino.bin", "golden.npz", "certificate.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_verify_refuses_a_file_that_is_not_what_it_was(tmp_path: Path, name: str, damage: str) -> None:
    folder = copied(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(CheckpointError) as caught:
        verify_export(folder, 1)
    assert caught.value.code == ("HASH" if damage == "flip" else "CORRUPT") and name in caught.value.where


# ------------------------------------------------------------------------------------------------ targets


def test_students_go_everywhere_and_the_teacher_to_two_runtimes() -> None:
    for spec in (SwinUnetrSpec(num_outputs=3), ResUnetSpec(num_outputs=3)):
        demand_exportable(spec, TARGETS)
    teacher = AutoSamSpec(num_outputs=3)
    demand_exportable(teacher)
    for target in set(TARGETS) - {"onnxruntime", "openvino", "onnxruntime-web-wasm"}:
        with pytest.raises(UsageError) as caught:
            demand_exportable(teacher, [target])
        assert "swin_unetr" in caught.value.remedy
    with pytest.raises(AutoSam3dError, match="expected one of onnxruntime"):
        demand_exportable(teacher, ["abacus"])
