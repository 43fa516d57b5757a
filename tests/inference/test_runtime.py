"""The PyTorch predictor: probabilities, memory, devices."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autosam3d.errors import ResourceError, UsageError
from autosam3d.inference.torch_runtime import TorchPredictor, bf16_in_hardware, pick_device
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.build import build_network
from autosam3d.models.spec import AutoSamSpec, SwinUnetrSpec
from autosam3d.models.students import swin_attention

SIZE = (6, 8, 10)


def make_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.Dropout(0.5), nn.ReLU(), nn.Conv3d(5, 3, 1))


class Hungry(nn.Module):
    """Fits `limit` patches; beyond it fails as `error` says."""

    def __init__(self, limit: int, error: Exception) -> None:
        super().__init__()
        self.limit, self.error, self.sizes = limit, error, []

    def forward(self, ct: Tensor) -> Tensor:
        self.sizes.append(len(ct))
        if len(ct) > self.limit:
            raise self.error
        return torch.cat([ct, -ct], dim=1)


def make_patches(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 1, *SIZE)).astype(np.float32)


def test_probabilities_are_the_softmax_in_eval_mode() -> None:
    network = make_network()
    predictor = TorchPredictor(network, SIZE, "cpu", "fp32", num_outputs=3)
    patches = make_patches(2)
    probs = predictor.predict(patches)
    assert probs.dtype == np.float32 and probs.shape == (2, 3, *SIZE) and not network.training
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    with torch.no_grad():
        expected = network(torch.from_numpy(patches)).softmax(1)
    np.testing.assert_array_equal(probs, expected.numpy())
    np.testing.assert_allclose(predictor.predict(patches[1:]), probs[1:], atol=1e-6)


def test_bf16_autocast_is_near_and_still_float32() -> None:
    patches = make_patches(1)
    fp32, bf16 = (
        TorchPredictor(make_network(), SIZE, "cpu", p, num_outputs=3).predict(patches) for p in ("fp32", "bf16")
    )
    assert bf16.dtype == np.float32 and 0 < np.abs(fp32 - bf16).max() < 0.05
    expected = "bf16" if bf16_in_hardware("cpu") else "fp32"
    assert TorchPredictor(make_network(), SIZE, "cpu", "auto", num_outputs=3).precision == expected


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError("9 GiB"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved(error: Exception) -> None:
    network = Hungry(2, error)
    predictor = TorchPredictor(network, SIZE, num_outputs=2)
    patches = make_patches(7)
    np.testing.assert_allclose(predictor.predict(patches)[:, 0], 1 / (1 + np.exp(-2 * patches[:, 0])), rtol=1e-5)
    assert network.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    network.sizes.clear()
    predictor.predict(patches[:2])
    assert network.sizes == [1, 1]  # what was learnt is kept
    with pytest.raises(ResourceError) as caught:
        TorchPredictor(Hungry(0, error), SIZE, num_outputs=2).predict(patches)
    assert caught.value.code == "MEMORY" and str(SIZE) in caught.value.fault


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        TorchPredictor(Hungry(0, RuntimeError("mat1 and mat2 shapes")), SIZE, num_outputs=2).predict(make_patches(1))


def test_logits_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected logits"):
        TorchPredictor(make_network(), SIZE, num_outputs=4).predict(make_patches(1))


def test_activations_are_counted_without_being_computed() -> None:
    """At the widest the input (1 channel), the first convolution (5) and its ReLU (5) live at once."""
    size = (64, 64, 64)
    voxels = 4 * 64**3
    predictor = TorchPredictor(make_network(), size, "cpu", "fp32", num_outputs=3)
    one, four = predictor.activation_bytes(1), predictor.activation_bytes(4)
    assert 2 * 10 * voxels <= one <= 2 * 13 * voxels and four == 4 * one


def test_activations_are_counted_in_the_precision_that_is_used() -> None:
    """In bf16 the casts of the input are counted, and the results of the convolutions take half the room."""
    size = (64, 64, 64)
    low, high = (TorchPredictor(make_network(), size, "cpu", p, num_outputs=3).activation_bytes(1)
                 for p in ("bf16", "fp32"))
    assert 0.45 * high < low < 0.9 * high


def test_of_a_loops_equal_steps_one_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run does one step of each loop over maps: two products for each of the eight blocks."""
    products = []
    monkeypatch.setattr(swin_attention._MixOnCpu, "MAX_MAP", 1)
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: products.append(a.shape) or out)
    size = (32, 32, 64)
    network = build_network(SwinUnetrSpec(num_outputs=3, patch_size=size, feature_size=12))
    held = TorchPredictor(network, size, "cpu", "fp32").activation_bytes(1)
    voxels = 4 * 32 * 32 * 64
    assert 2 * 36 * voxels < held < 2 * 150 * voxels  # at the widest 24 channels in, 12 out at full size, copies
    assert len(products) == 16


def test_a_network_that_cannot_be_counted_counts_as_nothing() -> None:
    class Branching(nn.Module):
        def forward(self, ct: Tensor) -> Tensor:
            return torch.cat([ct, ct if ct.mean() > 0 else -ct], dim=1)  # asks for a value

    assert TorchPredictor(Branching(), SIZE, num_outputs=2).activation_bytes(1) == 0


def test_num_outputs_and_size_of_the_projects_own_network() -> None:
    spec = AutoSamSpec(num_outputs=3, vit="vit_tiny", patch_size=(32, 32, 32), adapter_dim=16, neck_dim=32,
                       prompt_dim=2, head_dim=16, attn_window=(4, 4, 4))
    predictor = TorchPredictor(AutoSam(spec), (32, 32, 32))
    assert predictor.num_outputs == 3
    probs = predictor.predict(np.zeros((1, 1, 32, 32, 32), np.float32))
    assert probs.shape == (1, 3, 32, 32, 32) and np.isfinite(probs).all()
    assert predictor.activation_bytes(1) > 4 * 3 * 32**3


def test_devices_that_are_not_there_are_named() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for wish in (f"cuda:{torch.cuda.device_count()}", "gpu", "meta"):
        with pytest.raises(UsageError) as caught:
            pick_device(wish)
        assert caught.value.code == "DEVICE" and caught.value.where == wish


def test_precision_is_checked() -> None:
    with pytest.raises(ValueError, match="fp16"):
        TorchPredictor(make_network(), SIZE, "cpu", "fp16", num_outputs=3)


def test_the_way_of_a_scan_needs_no_torch() -> None:
    code = ("import sys, autosam3d.inference.pipeline, autosam3d.scans.batch, autosam3d.inference.torch_runtime; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
