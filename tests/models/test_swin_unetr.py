"""The student is MONAI's SwinUNETR in function, gradients and weights, in an order of work that runtimes follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autosam3d.inference.openvino_runtime import openvino_core
from autosam3d.models.build import build_network
from autosam3d.models.instance_norm import norm_leaky
from autosam3d.models.pointwise import double
from autosam3d.models.spec import SwinUnetrSpec
from autosam3d.models.students import swin_attention
from autosam3d.models.students.swin_attention import WindowAttention, mix_windows, widen
from autosam3d.models.students.swin_cut import Cut
from autosam3d.models.students.swin_unetr import SwinUnetr
from exports import PACKAGED, packaged_export

SwinUNETR = pytest.importorskip("monai.networks.nets.swin_unetr").SwinUNETR


def pair(feature_size: int, num_outputs: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Any, SwinUnetr]:
    """MONAI's network and ours with the same weights; biases and tables far from their start."""
    torch.manual_seed(0)
    theirs = SwinUNETR(in_channels=1, out_channels=num_outputs, feature_size=feature_size, use_v2=False).to(dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("relative_position_bias_table", "bias")):
                parameter.normal_(0, 0.5)
    ours = build_network(SwinUnetrSpec(num_outputs=num_outputs, patch_size=(32, 32, 32), feature_size=feature_size))
    assert isinstance(ours, SwinUnetr)
    ours.to(dtype).load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


# ---- MONAI's function ----


@pytest.mark.parametrize(("feature_size", "shape"), [
    pytest.param(12, (1, 1, 64, 64, 64), marks=pytest.mark.soak), (12, (2, 1, 96, 32, 64)), (24, (1, 1, 32, 64, 32)),
    (48, (1, 1, 32, 32, 64)),
])
def test_outputs_are_monais(feature_size: int, shape: tuple[int, ...]) -> None:
    theirs, ours = pair(feature_size)
    ct = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ct)
        torch.testing.assert_close(ours(ct), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_outputs_and_gradients_are_monais_in_double_precision() -> None:
    """Sizes whose grids need padding, seams on some axes only, and windows smaller than 7."""
    theirs, ours = pair(12, dtype=torch.float64)
    ct = torch.randn(1, 1, 32, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(1, 4, 32, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    outputs = {}
    for name, network in (("theirs", theirs), ("ours", ours)):
        outputs[name] = network(ct)
        (outputs[name] * weights).sum().backward()
    torch.testing.assert_close(outputs["ours"], outputs["theirs"], rtol=1e-9, atol=1e-9)
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        expected, scale = parameter.grad, float(parameter.grad.abs().max())
        apart = float((own[name].grad - expected).abs().max())  # type: ignore[operator]
        assert apart < 1e-8 * scale + 1e-9, name


def test_weights_go_both_ways() -> None:
    theirs, ours = pair(12)
    index = {name: buffer for name, buffer in theirs.state_dict().items() if name.endswith("relative_position_index")}
    assert set(ours.state_dict()) == set(theirs.state_dict()) - set(index)  # constants are not kept
    again = SwinUNETR(in_channels=1, out_channels=4, feature_size=12, use_v2=False)
    again.load_state_dict(ours.state_dict() | index, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder1"):
        ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if not n.startswith("encoder1")})


@pytest.mark.parametrize(("feature_size", "num_outputs", "count"), [
    (12, 14, 4_078_220), (24, 14, 15_703_304), (48, 14, 62_187_296),
    (12, 16, 4_078_246), (24, 16, 15_703_354), (48, 16, 62_187_394),
])
def test_counts_of_the_paper(feature_size: int, num_outputs: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(SwinUnetrSpec(num_outputs=num_outputs, feature_size=feature_size))
    assert sum(p.numel() for p in network.parameters()) == count


# ---- the rewrites, each against the literal form ----


@pytest.mark.parametrize("grid", [(16, 16, 16), (16, 32, 8), (7, 14, 21), (5, 16, 4)])
def test_windows_come_back_where_they_were(grid: tuple[int, int, int]) -> None:
    tokens = torch.randn(2, *grid, 3)
    cut = Cut.of(grid, shifted=True)
    assert torch.equal(cut.merge(cut.split(tokens)), tokens)


def test_seam_channels_are_the_mask() -> None:
    """Two tokens on different sides of a seam lose 100 for each seam; the same query's constant falls out."""
    cut = Cut.of((14, 14, 7), shifted=True)
    heads, windows, n = 2, 4, 343
    q, k = (torch.randn(windows, heads, n, 4, dtype=torch.float64) for _ in range(2))
    seams = cut.seams(windows, q)
    wide_q, wide_k = widen(q, k, seams)
    mask = -100.0 * (seams[:, None, :, None] != seams[:, None, None]).double().sum(-1)
    plain = torch.softmax(q @ k.transpose(-1, -2) + mask, -1)
    torch.testing.assert_close(torch.softmax(wide_q @ wide_k.transpose(-1, -2), -1), plain, rtol=1e-9, atol=1e-12)
    assert seams.any() and not seams.all()


@pytest.mark.parametrize("grid", [(16, 16, 16), (8, 20, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_cpu_kernel_is_the_definition(grid: tuple[int, int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(6, 3, shifted).double()
    tokens = torch.randn(2, *grid, 6, dtype=torch.float64, requires_grad=True)
    (fast := attention(tokens)).square().sum().backward()
    grads = [tokens.grad.clone(), *(p.grad.clone() for p in attention.parameters())]  # type: ignore[union-attr]
    attention.zero_grad()
    tokens.grad = None
    cut = Cut.of(grid, shifted)
    qkv = attention.qkv(cut.split(tokens))
    q, k, v = qkv.view(len(qkv), -1, 9, 2).transpose(1, 2).split(3, 1)
    q = q * 2**-0.5
    if any(cut.shift):
        q, k = widen(q, k, cut.seams(len(qkv), q))
    n = qkv.shape[1]
    mixed = mix_windows(q, k, v, attention.bias(n)).transpose(1, 2).reshape(len(qkv), n, 6)
    slow = cut.merge(attention.proj(mixed))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    slow.square().sum().backward()
    for mine, expected in zip(grads, [tokens.grad, *(p.grad for p in attention.parameters())], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("entries", [1, 3 * 343**2, 10 * 343**2])  # of one head, or all windows of some heads
def test_few_maps_at_a_time_change_nothing(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(12, 6, shifted=True).double()
    tokens = torch.randn(2, 14, 8, 7, 12, dtype=torch.float64, requires_grad=True)
    inputs = [tokens, *attention.parameters()]

    def both() -> list[torch.Tensor]:
        mixed = attention(tokens)
        return [mixed, *torch.autograd.grad(mixed.square().sum(), inputs)]

    whole = both()
    monkeypatch.setattr(swin_attention._MixOnCpu, "MAX_MAP", entries)
    for got, wanted in zip(both(), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_bfloat16_is_as_close_as_bfloat16_allows() -> None:
    """Under autocast, as in training: the largest part, the maps of attention, is computed in float32."""
    _, ours = pair(12)
    ct = torch.randn(1, 1, 32, 32, 32)
    gradients = []
    for low in (False, True):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = ours(ct)
        logits.float().square().mean().backward()
        gradients.append((logits.float().detach(), torch.cat([p.grad.flatten() for p in ours.parameters()])))  # type: ignore[union-attr]
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_chunks_of_an_exported_graph_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(12)
    ct = torch.randn(1, 1, 32, 64, 32)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # the form that exported graphs have
    with torch.no_grad():
        whole = ours(ct)
        monkeypatch.setattr(WindowAttention, "MAX_MAP", 1)
        torch.testing.assert_close(ours(ct), whole, rtol=1e-5, atol=1e-5)


def test_the_forms_that_are_exported_are_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(12, dtype=torch.float64)
    ct = torch.randn(1, 1, 32, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(ct)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(ours(ct), expected, rtol=1e-9, atol=1e-9)  # whole windows, for phones
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        torch.testing.assert_close(ours(ct), expected, rtol=1e-9, atol=1e-9)  # each side of a seam by itself


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(16, 16, 9), (4, 8, 8), (8, 8, 8), (7, 7, 7), (14, 7, 3), (2, 4, 4)])
def test_sides_of_seams_one_by_one_are_the_windows(
    grid: tuple[int, int, int], shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(12, 3, shifted).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    tokens = torch.randn(1, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = attention(tokens)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        monkeypatch.setattr(WindowAttention, "MAX_SIDE_MAP", 3 * 343**2)  # a few windows at a time
        torch.testing.assert_close(attention(tokens), expected, rtol=1e-12, atol=1e-12)


def test_doubling_is_the_transposed_convolution() -> None:
    x, weight = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64), torch.randn(5, 7, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(double(x, weight), F.conv_transpose3d(x, weight, stride=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", [0.01, 1.0])
def test_the_norm_is_pytorchs(slope: float) -> None:
    x = (torch.randn(2, 5, 6, 7, 9, dtype=torch.float64) * 3 + 50).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    weights = torch.randn_like(x)
    results = []
    for form in (lambda t: norm_leaky(t, slope), lambda t: F.leaky_relu(F.instance_norm(t), slope)):
        x.grad = None
        y = form(x)
        (y * weights).sum().backward()
        results.append((y.detach(), x.grad.clone()))  # type: ignore[union-attr]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)


def test_a_batch_is_its_samples_and_checkpointing_changes_nothing() -> None:
    _, ours = pair(12)
    ct = torch.randn(2, 1, 32, 32, 64)
    both = ours(ct)
    torch.testing.assert_close(both, torch.cat([ours(ct[:1]), ours(ct[1:])]), rtol=1e-4, atol=1e-4)
    grads = []
    for on in (False, True):
        for stage in (ours.swinViT.layers1, ours.swinViT.layers2, ours.swinViT.layers3, ours.swinViT.layers4):
            stage[0].checkpointing = on  # type: ignore[assignment]
        ours.zero_grad()
        ours(ct[:1]).square().mean().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_another_shape_is_refused() -> None:
    _, ours = pair(12)
    with pytest.raises(ValueError, match="multiples of 32"):
        ours(torch.zeros(1, 1, 48, 32, 32))
    for settings in ({"feature_size": 16}, {"patch_size": (32, 32, 48)}):
        with pytest.raises(ValueError, match="expected"):
            SwinUnetrSpec(num_outputs=3, **settings)  # type: ignore[arg-type]


# ---- export ----


@pytest.fixture(scope="module")
def exported() -> tuple[Any, np.ndarray, np.ndarray]:
    """The graph of the packaged model, a crop, and the logits that PyTorch has for it."""
    onnx = pytest.importorskip("onnx")
    from autosam3d.checkpoints.checkpoint import load_model

    graph = onnx.load(packaged_export() / "model.onnx")
    ours = load_model(PACKAGED)
    ct = torch.randn(1, 1, *ours.recipe.model.patch_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return graph, ct.numpy(), ours.network(ct).numpy()


def test_onnx_runtime_says_the_same(exported: tuple[Any, np.ndarray, np.ndarray]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    graph, ct, expected = exported
    (logits,) = runtime.InferenceSession(graph.SerializeToString()).run(["logits"], {"ct": ct})
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_graph_has_only_operators_of_its_row_in_the_table_of_targets(
    exported: tuple[Any, np.ndarray, np.ndarray]
) -> None:
    """No transposed or grouped convolution, which WebGPU lacks, and no tensor of more than five axes, as on phones."""
    import onnx

    graph = exported[0]
    turns = [a.ints for node in graph.graph.node if node.op_type == "Transpose" for a in node.attribute]
    assert turns and max(map(len, turns)) <= 5
    assert not {"ConvTranspose", "Einsum", "Resize"} & {node.op_type for node in graph.graph.node}
    groups = [a.i for node in graph.graph.node if node.op_type == "Conv" for a in node.attribute if a.name == "group"]
    assert set(groups) <= {1}
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    assert max(len(v.type.tensor_type.shape.dim) for v in inferred.value_info) <= 5


def test_openvino_says_the_same(exported: tuple[Any, np.ndarray, np.ndarray]) -> None:
    pytest.importorskip("openvino")
    graph, ct, expected = exported
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", settings)
    np.testing.assert_allclose(compiled(ct)[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_openvino_makes_one_kernel_of_a_chunk_of_attention(exported: tuple[Any, np.ndarray, np.ndarray]) -> None:
    """Softmax by itself means maps of tokens x tokens in memory: 1.4 times the seconds at 96^3."""
    pytest.importorskip("openvino")
    core = openvino_core()
    compiled = core.compile_model(core.read_model(exported[0].SerializeToString()), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32"})
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    assert kinds.count("Softmax") == 1  # of the classes
