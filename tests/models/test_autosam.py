"""The network as a whole: shapes, sizes, ablations, batch, precision, freezing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.autosam.sam_weights import freeze_sam, frozen_names
from autosam3d.models.spec import AutoSamSpec

SMALL: dict[str, Any] = {
    "num_outputs": 3, "vit": "vit_tiny", "patch_size": (32, 32, 32), "attn_window": (4, 4, 4), "adapter_dim": 12,
    "neck_dim": 16, "prompt_dim": 4, "head_dim": 8,
}


def build(**changes: Any) -> AutoSam:
    """A small model with adapters and tables that are not at their zero start, so that nothing hides."""
    torch.manual_seed(0)
    model = AutoSam(AutoSamSpec(**(SMALL | changes)))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("adapter.up", "rel_pos", "depth_embed")):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (32, 32, 32)),
        ({}, (16, 48, 20)),  # not what it was built for, and no multiple of the window
        ({}, (4, 4, 4)),  # one token
        ({"scale": (1, 4, 4), "patch_size": (32, 32, 32)}, (48, 32, 16)),
        ({"scale": (16, 2, 8), "patch_size": (5, 32, 16)}, (5, 32, 16)),
        ({"scale": (16, 16, 16), "patch_size": (6, 7, 5)}, (6, 7, 5)),
        ({"scale": (1, 1, 1), "patch_size": (64, 64, 64)}, (64, 32, 48)),
        ({"fuse_stride": 1, "full_res_refine": True}, (16, 24, 16)),
        ({"global_blocks": (1, 3)}, (32, 24, 40)),
        ({"depth_embed": False, "adapter_dim": 0, "sam_norm": True, "prompt_residual": True}, (16, 16, 16)),
        ({"prompt_generator": False, "aggregation": False, "adapter_act": "gelu"}, (16, 16, 16)),
    ],
)
def test_any_grid_gives_logits_of_the_cts_shape(changes: dict[str, Any], shape: tuple[int, int, int]) -> None:
    model = build(**changes)
    logits = model(torch.rand(2, 1, *shape))
    assert logits.shape == (2, 3, *shape)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 30, 32, 32), (1, 2, 32, 32, 32), (1, 32, 32, 32), (1, 1, 0, 32, 32)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of \(4, 4, 4\)"):
        build()(torch.rand(shape))


def test_a_batch_is_its_samples() -> None:
    model = build().double()
    ct = torch.rand(2, 1, 32, 32, 32, dtype=torch.float64)
    together = model(ct)
    alone = torch.cat([model(ct[:1]), model(ct[1:])])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_two_runs_are_bit_identical() -> None:
    ct = torch.rand(1, 1, 32, 32, 32)
    runs = []
    for _ in range(2):
        model = build()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ct)
        logits.float().square().mean().backward()
        runs.append([logits.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_autocast_stays_close_and_keeps_gradients() -> None:
    model = build()
    ct = torch.rand(1, 1, 32, 32, 32)
    weight = torch.randn(1, 3, 32, 32, 32)

    def run(enabled: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(ct)
        (logits.float() * weight).sum().backward()
        parts = {
            part: torch.cat([p.grad.flatten() for n, p in model.named_parameters() if part in n and p.grad is not None])
            for part in ("image_encoder", "necks", "apg", "decoder")
        }
        return logits.detach().float(), parts

    (exact, exact_grads), (rounded, rounded_grads) = run(False), run(True)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    for part, gradient in exact_grads.items():
        assert torch.nn.functional.cosine_similarity(rounded_grads[part], gradient, 0) > 0.9, part


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 kernels: "
                    "those that PyTorch takes instead know one memory format")
def test_no_layer_leaves_channels_last() -> None:
    """A copy to another memory format and back costs more than most layers here."""
    model = build()
    strays: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 5 and output.shape[1] > 1 and not (
                output.is_contiguous(memory_format=torch.channels_last_3d) or (output.is_contiguous()
                and name.startswith("image_encoder"))
            ):
                strays.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 1, 32, 32, 32))
    assert strays == []


def test_prompt_generator_reads_the_deepest_stage() -> None:
    model = build()
    seen: dict[str, Tensor] = {}
    model.necks["3"].register_forward_hook(lambda _m, _i, output: seen.update(f4=output))
    model.apg.register_forward_hook(lambda _m, inputs, output: seen.update(prompt_in=inputs[0], prompt=output))
    model.decoder.register_forward_hook(lambda _m, inputs, _o: seen.update(prompt_out=inputs[1]))
    model.image_encoder.blocks[-1].register_forward_hook(lambda _m, _i, output: seen.update(last=output))
    model.necks["3"].register_forward_pre_hook(lambda _m, inputs: seen.update(neck_in=inputs[0]))
    model(torch.rand(1, 1, 32, 32, 32))
    assert seen["prompt_in"] is seen["f4"]
    assert seen["prompt_out"] is seen["prompt"]
    assert seen["neck_in"] is seen["last"]


def test_ablations_remove_what_they_say() -> None:
    names = {name.split(".")[0] for name, _ in build(prompt_generator=False).named_parameters()}
    assert names == {"image_encoder", "necks", "decoder"}
    model = build(aggregation=False)
    assert list(model.necks) == ["3"]
    assert len(model.decoder.heads) == 1
    assert model.decoder.fuse.weight.shape[1] == 8 + 1


def test_frozen_tensors_do_not_move() -> None:
    model = build()
    freeze_sam(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(torch.rand(1, 1, 32, 32, 32)).square().mean().backward()
    optimizer.step()
    frozen = set(frozen_names(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
        assert torch.equal(parameter, before[name]) == (name in frozen), name


def test_frozen_list_is_the_papers() -> None:
    with torch.device("meta"):
        model = AutoSam(AutoSamSpec(num_outputs=14))
    frozen = frozen_names(model)
    assert len(frozen) == 3 + 12 * (4 + 2 + 4)
    assert sum(p.numel() for name, p in model.named_parameters() if name in set(frozen)) == 88_776_960
    assert not [name for name in frozen if any(part in name for part in ("norm", "adapter", "rel_pos_d", "depth"))]


def test_checkpointing_gives_the_same_logits_and_gradients() -> None:
    ct = torch.rand(1, 1, 32, 32, 32)
    results = []
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing)
        logits = model(ct)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_state_dict_holds_parameters_only() -> None:
    """No mask, index or position buffer goes into a checkpoint."""
    model = build()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
