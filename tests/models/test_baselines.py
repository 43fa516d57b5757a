"""nnU-Net's network and UNETR: MONAI's function and the paper's counts, under our interface."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.unetr import UNETR
from torch import Tensor, nn

from autosam3d.errors import MissingExtraError
from autosam3d.models.baselines.monai import NnUnet, Unetr
from autosam3d.models.build import build_network
from autosam3d.models.parameters import count_parameters
from autosam3d.models.spec import NetworkSpec, NnFormerSpec, NnUnetSpec, SwinUnetrSpec, UnetrSpec

NNUNET = NnUnetSpec(num_outputs=3, patch_size=(16, 32, 32), channels=(4, 6, 8, 10, 12),
                    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
UNETR_SIZE = {"feature_size": 4, "hidden_dim": 12, "mlp_dim": 24, "num_heads": 3}
UNETR_16 = UnetrSpec(num_outputs=3, patch_size=(16, 32, 32), **UNETR_SIZE)  # type: ignore[arg-type]
UNETR_8 = UnetrSpec(num_outputs=3, patch_size=(16, 24, 8), token_size=8, **UNETR_SIZE)  # type: ignore[arg-type]
SMALL = [NNUNET, UNETR_16, UNETR_8]


def seeded(spec: NetworkSpec, side_outputs: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return build_network(spec, side_outputs)


def logits_of(output: Tensor | list[Tensor]) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


# ---- method.md, section 2: what the paper's Table 1 counts ----


@pytest.mark.parametrize(
    ("spec", "total"),
    [
        (NnUnetSpec(num_outputs=16), 31_189_872), (NnUnetSpec(num_outputs=14), 31_189_806),
        (UnetrSpec(num_outputs=16), 93_029_840), (UnetrSpec(num_outputs=14), 93_029_806),
        (SwinUnetrSpec(num_outputs=16, feature_size=48), 62_187_394),
        (SwinUnetrSpec(num_outputs=14, feature_size=48), 62_187_296),
        (SwinUnetrSpec(num_outputs=16, feature_size=24), 15_703_354),
        (SwinUnetrSpec(num_outputs=16, feature_size=12), 4_078_246),
    ],
)
def test_counts_of_the_baselines(spec: NetworkSpec, total: int) -> None:
    assert count_parameters(spec).total == total


@pytest.mark.parametrize(("num_outputs", "total"), [(16, 150_140_232), (14, 150_054_210)])
def test_count_of_nnformer_has_the_outputs_of_deep_supervision(num_outputs: int, total: int) -> None:
    spec = NnFormerSpec(num_outputs=num_outputs)
    assert count_parameters(spec, side_outputs=True).total == total
    # Two transposed convolutions from 384 and 768 channels to the outputs, kernel 2x4x4.
    assert total - count_parameters(spec).total == (384 + 768) * num_outputs * 32 + 2 * num_outputs


# ---- parity with MONAI ----


def monai_dynunet(**more: object) -> DynUNet:
    torch.manual_seed(1)
    return DynUNet(3, 1, 3, [3] * 5, NNUNET.strides, NNUNET.strides[1:], filters=NNUNET.channels, **more)  # type: ignore[arg-type]


def test_nnunet_is_monais() -> None:
    plain, ours = monai_dynunet(), seeded(NNUNET)
    ours.load_state_dict({n: t for n, t in plain.state_dict().items() if not n.startswith("skip_layers.")})
    ct = torch.randn(2, 1, 32, 32, 48)
    torch.testing.assert_close(ours(ct), plain(ct))


def test_side_outputs_of_nnunet_are_monais_before_it_enlarges_them() -> None:
    plain, ours = monai_dynunet(deep_supervision=True, deep_supr_num=2), seeded(NNUNET, side_outputs=True)
    own = plain.state_dict()
    ours.load_state_dict({n.replace("deep_supervision_heads.", "side_outputs."): t for n, t in own.items()
                          if not n.startswith("skip_layers.")})
    ct = torch.randn(1, 1, 16, 32, 32)
    outputs = ours(ct)
    assert [tuple(o.shape[2:]) for o in outputs] == [(16, 32, 32), (16, 16, 16), (8, 8, 8)]
    enlarged = torch.stack([F.interpolate(o, (16, 32, 32)) for o in outputs], 1)
    torch.testing.assert_close(enlarged, plain(ct))


def test_unetr_is_monais() -> None:
    torch.manual_seed(1)
    plain = UNETR(1, 3, (16, 32, 32), feature_size=4, hidden_size=12, mlp_dim=24, num_heads=3, proj_type="perceptron")
    ours = seeded(UNETR_16)
    ours.load_state_dict(plain.state_dict())
    ct = torch.randn(2, 1, 16, 32, 32)
    torch.testing.assert_close(ours(ct), plain(ct))


# ---- laws ----


@pytest.mark.parametrize("spec", SMALL, ids=["nnunet", "unetr", "unetr_8"])
def test_a_batch_is_its_samples(spec: NetworkSpec) -> None:
    model, ct = seeded(spec).double().eval(), torch.randn(2, 1, *spec.patch_size, dtype=torch.float64)
    with torch.no_grad():
        both, apart = model(ct), torch.cat([model(ct[:1]), model(ct[1:])])
    assert both.shape == (2, 3, *spec.patch_size)
    torch.testing.assert_close(both, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SMALL, ids=["nnunet", "unetr", "unetr_8"])
def test_every_weight_that_is_trained_learns(spec: NetworkSpec) -> None:
    model = seeded(spec, side_outputs=spec.network == "nnunet")
    sum(o.square().sum() for o in logits_of(model(torch.randn(1, 1, *spec.patch_size)))).backward()  # type: ignore[union-attr]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    # What DDP would wait for in vain: MONAI's ViT carries a norm that it never calls.
    assert all("norm_cross_attn" in name for name in frozen)
    assert len(frozen) == (24 if spec.network == "unetr" else 0)


@pytest.mark.parametrize("spec", SMALL, ids=["nnunet", "unetr", "unetr_8"])
def test_ddp_waits_for_no_weight_in_vain(spec: NetworkSpec, tmp_path: Path) -> None:
    """DDP refuses a second step where a trained weight had no part in the first, with one process as with many."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(seeded(spec, side_outputs=spec.network == "nnunet"))
        for _ in range(2):
            sum(o.square().mean() for o in logits_of(wrapped(torch.randn(1, 1, *spec.patch_size)))).backward()  # type: ignore[union-attr]
    finally:
        torch.distributed.destroy_process_group()


def test_side_outputs_are_for_training_alone() -> None:
    model, ct = seeded(NNUNET, side_outputs=True), torch.randn(1, 1, 16, 32, 32)
    assert isinstance(model(ct), list)
    finished = seeded(NNUNET)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("side_outputs.")}
    finished.load_state_dict(own)
    model.eval()
    torch.testing.assert_close(model(ct), finished.eval()(ct))
    with pytest.raises(ValueError, match="side_outputs"):
        build_network(UNETR_16, side_outputs=True)


def test_gradients_in_bf16_over_a_depth_of_two() -> None:
    """PyTorch's own kernel reads memory there that nobody wrote; see `models.conv`."""
    layer = seeded(NNUNET).bottleneck.conv2.conv  # type: ignore[union-attr]
    maps = torch.randn(2, 12, 2, 4, 4)
    gradients = []
    for low in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            result = layer(maps)
        assert result.dtype == (torch.bfloat16 if low else torch.float32)
        result.float().square().mean().backward()
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0.02 * float(gradients[0].abs().max()))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(NNUNET, (1, 1, 12, 32, 32)), (NNUNET, (1, 2, 16, 32, 32)), (NNUNET, (1, 16, 32, 32)),
     (UNETR_16, (1, 1, 32, 32, 32)), (UNETR_8, (1, 1, 16, 24, 16))],
)
def test_other_shapes_are_refused(spec: NetworkSpec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        seeded(spec)(torch.zeros(shape))


def test_without_monai_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "monai"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "autosam3d.models.baselines.monai")
    with pytest.raises(MissingExtraError) as caught:
        build_network(NNUNET)
    assert caught.value.exit_code == 2 and "monai" in caught.value.fault and "[baselines]" in caught.value.remedy
    assert build_network(NnFormerSpec(num_outputs=2, patch_size=(8, 8, 8), embed_dim=4, num_heads=(1, 1),
                                      attn_windows=(2, 2)))  # written here: no extra is needed


def test_classes_are_ours() -> None:
    assert isinstance(seeded(NNUNET), NnUnet) and isinstance(seeded(UNETR_8), Unetr)
    assert seeded(NNUNET).spec is NNUNET and seeded(UNETR_8).spec is UNETR_8


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: NnUnetSpec(num_outputs=3, strides=((1, 1, 1),) * 5), "strides"),
        (lambda: NnUnetSpec(num_outputs=3, strides=((2, 2, 2),) * 6), "strides"),
        (lambda: NnUnetSpec(num_outputs=3, channels=(8, 8), strides=((1, 1, 1),) * 2), "channels"),
        (lambda: NnUnetSpec(num_outputs=3, patch_size=(32, 32, 32)), "patch_size"),  # one voxel deep down
        (lambda: NnUnetSpec(num_outputs=3, patch_size=(48, 64, 64)), "patch_size"),
        (lambda: UnetrSpec(num_outputs=3, token_size=4), "token_size"),
        (lambda: UnetrSpec(num_outputs=3, patch_size=(24, 32, 32)), "patch_size"),
        (lambda: UnetrSpec(num_outputs=3, num_heads=5), "num_heads"),
        (lambda: NnFormerSpec(num_outputs=3, token_size=(3, 4, 4)), "token_size"),
        (lambda: NnFormerSpec(num_outputs=3, patch_size=(128, 126, 128)), "patch_size"),
        (lambda: NnFormerSpec(num_outputs=3, num_heads=(5, 12, 24, 48)), "num_heads"),
        (lambda: NnFormerSpec(num_outputs=3, attn_windows=(4, 4)), "attn_windows"),
        (lambda: NnFormerSpec(num_outputs=3, embed_dim=0), "embed_dim"),
    ],
)
def test_numbers_that_make_no_network_are_refused(make, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        make()
