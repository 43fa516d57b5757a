"""The ONNX predictor: the same numbers as torch, and files of strangers refused before a runtime sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from autosam3d.errors import CheckpointError
from autosam3d.inference.onnx_file import demand_self_contained
from autosam3d.inference.onnx_runtime import OnnxPredictor
from exports import LABELS, SIZE, Convolutions, make_patches, mini_export, torch_logits

WHERE = Path("model.onnx")


def content() -> bytes:
    return (mini_export() / "model.onnx").read_bytes()


def changed(change: Callable[[onnx.ModelProto], object]) -> bytes:
    graph = onnx.load_model_from_string(content())
    change(graph)
    return graph.SerializeToString()


@pytest.mark.parametrize("threads", [1, 2])
def test_probabilities_and_logits_are_torchs(threads: int) -> None:
    patches = make_patches(3)
    expected = torch_logits(Convolutions(), patches)
    logits = OnnxPredictor(content(), WHERE, SIZE, LABELS, threads, output="logits").predict(patches)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    predictor = OnnxPredictor(content(), WHERE, SIZE, LABELS, threads)
    probs = predictor.predict(patches)
    assert probs.dtype == np.float32 and probs.shape == (3, 3, *SIZE)
    # A softmax moves by at most half of what its logits move by (its Jacobian is p (1 - p) and -p q), and kernels of
    # other processors move these by up to 1e-5.
    np.testing.assert_allclose(probs, np.exp(expected) / np.exp(expected).sum(1, keepdims=True), atol=5e-6)
    np.testing.assert_array_equal(predictor.predict(patches[1:2]), probs[1:2])  # a batch is a loop


def test_results_stay_what_they_are_when_the_next_window_is_predicted() -> None:
    predictor, patches = OnnxPredictor(content(), WHERE, SIZE, LABELS, 1), make_patches(2)
    first = predictor.predict(patches[:1])
    kept = first.copy()
    predictor.predict(patches[1:])
    np.testing.assert_array_equal(first, kept)


def test_windows_that_are_views_are_read_right() -> None:
    predictor, patches = OnnxPredictor(content(), WHERE, SIZE, LABELS, 1), make_patches(1)
    turned = patches.transpose(0, 1, 4, 3, 2)
    np.testing.assert_array_equal(predictor.predict(turned), predictor.predict(np.ascontiguousarray(turned)))


def test_memory_is_foreseen_for_the_first_call_and_held_afterwards() -> None:
    predictor = OnnxPredictor(content(), WHERE, SIZE, LABELS, 1, 12345)
    assert predictor.activation_bytes(1) == 12345
    predictor.predict(make_patches(1))
    assert predictor.activation_bytes(1) == 0


def test_the_skeleton_is_read_without_onnx() -> None:
    facts = demand_self_contained(content(), WHERE)
    assert facts.opset == 18 and json.loads(facts.notes["labels"]) == LABELS


# ------------------------------------------------------------------------------------------------ strangers


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = graph.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        tensor.ClearField("raw_data")

    return change


def in_attribute(graph: onnx.ModelProto) -> None:
    """External data where nobody looks: in a constant node."""
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    graph.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def in_sparse(graph: onnx.ModelProto) -> None:
    sparse = graph.graph.sparse_initializer.add()
    sparse.values.external_data.add(key="location", value="../secret")


def with_branch(graph: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "b", [], [])
    graph.graph.node.append(helper.make_node("If", ["ct"], ["unused"], then_branch=branch, else_branch=branch))


def foreign(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("EPContext", ["ct"], ["unused"], domain="com.microsoft",
                                             ep_cache_context="/etc/passwd"))


@pytest.mark.parametrize("change", [
    external("weights.bin"), external("/etc/passwd"), external("../../etc/passwd"), in_attribute, in_sparse,
    with_branch, foreign, lambda graph: graph.functions.add(name="f", domain="d"),
], ids=["external", "absolute", "upwards", "attribute", "sparse", "branch", "foreign", "function"])
def test_what_is_not_whole_in_itself_is_refused(change: Callable[[onnx.ModelProto], object]) -> None:
    with pytest.raises(CheckpointError) as caught:
        OnnxPredictor(changed(change), WHERE, SIZE, LABELS, 1)
    assert caught.value.code == "UNSAFE"


@pytest.mark.parametrize("version", [9, 17, 24])
def test_another_opset_is_refused(version: int) -> None:
    def change(graph: onnx.ModelProto) -> None:
        graph.opset_import[0].version = version

    with pytest.raises(CheckpointError, match=f"expected opset 18 to 23, got {version}"):
        OnnxPredictor(changed(change), WHERE, SIZE, LABELS, 1)


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -1, -100])
def test_a_part_of_a_file_is_refused(cut: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        OnnxPredictor(content()[:cut], WHERE, SIZE, LABELS, 1)
    assert caught.value.code == "CORRUPT"


def test_noise_never_crashes_the_reader() -> None:
    random = np.random.default_rng(0)
    whole = np.frombuffer(content(), np.uint8)
    for _ in range(200):
        noisy = whole.copy()
        noisy[random.integers(0, 600, 3)] = random.integers(0, 256, 3)
        try:
            demand_self_contained(noisy.tobytes(), WHERE)
        except CheckpointError as error:
            assert error.code in ("CORRUPT", "UNSAFE", "OPSET")


def test_another_network_is_refused_with_both_lists() -> None:
    with pytest.raises(CheckpointError) as caught:
        OnnxPredictor(content(), WHERE, SIZE, ["background", "spleen"], 1)
    assert caught.value.fault == ("expected a network of 2 classes, background, spleen; got one of 3, background, "
                                  "right_kidney, left_kidney")
    nameless = changed(lambda graph: graph.ClearField("metadata_props"))
    with pytest.raises(CheckpointError, match="got one of unnamed classes"):
        OnnxPredictor(nameless, WHERE, SIZE, LABELS, 1)
    with pytest.raises(CheckpointError, match=r"expected ct .*\(1, 1, 8, 16, 16\)") as caught:
        OnnxPredictor(content(), WHERE, (8, 16, 16), LABELS, 1)
    assert caught.value.code == "MISMATCH"
