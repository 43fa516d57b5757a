"""SAM's weights under both namings, every size, and every way in which a file can be the wrong one."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import Tensor

from autosam3d.errors import CheckpointError
from autosam3d.models.autosam.attention import resize_table
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.autosam.sam_weights import convert_sam_state, frozen_names, load_sam
from autosam3d.models.spec import VITS, AutoSamSpec

transformers = pytest.importorskip("transformers")

TINY = AutoSamSpec(
    num_outputs=3, vit="vit_tiny", patch_size=(32, 32, 32), attn_window=(6, 8, 4), adapter_dim=6, neck_dim=8,
    prompt_dim=2, head_dim=4, global_blocks=(1,),
)
_HF_TO_ORIGINAL = [
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.blocks\.(\d+)\.layer_norm([12])\.", r".blocks.\1.norm\2."),
    (r"\.neck\.conv1\.", ".neck.0."), (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."), (r"\.neck\.layer_norm2\.", ".neck.3."),
]


def sam_config(name: str) -> object:
    vit = VITS[name]
    return transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=vit.embed_dim, num_hidden_layers=vit.num_blocks, num_attention_heads=vit.num_heads,
            image_size=16 * vit.pretrain_grid, global_attn_indexes=list(vit.taps), mlp_dim=4 * vit.embed_dim,
        )
    )


@cache
def hf_state(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """A whole SamModel's tensors, random, under transformers' names."""
    torch.manual_seed(3)
    with torch.device(device):
        model = transformers.SamModel(sam_config(name))
    state = dict(model.state_dict())
    if device == "cpu":
        state = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}
    return state


def original_state(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """The same under segment-anything's names, as far as the encoder goes."""
    renamed = {}
    for key, value in hf_state(name, device).items():
        if key.startswith("vision_encoder."):
            for pattern, replacement in _HF_TO_ORIGINAL:
                key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def test_both_namings_give_identical_weights() -> None:
    loaded = []
    for state in (hf_state("vit_tiny"), original_state("vit_tiny")):
        torch.manual_seed(0)
        model = AutoSam(TINY)
        assert load_sam(model, state) == 3 + 14 * 4
        loaded.append(model.state_dict())
    for name, tensor in loaded[0].items():
        assert torch.equal(tensor, loaded[1][name]), name


@pytest.mark.parametrize("prefix", ["module.", "sam.", "module.sam.", "model."])
def test_wrappers_names_are_seen_through(prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in original_state("vit_tiny").items()}
    for name, tensor in convert_sam_state(wrapped, TINY).items():
        assert torch.equal(tensor, convert_sam_state(original_state("vit_tiny"), TINY)[name])


def test_every_tensor_arrives_where_it_belongs() -> None:
    state = original_state("vit_tiny")
    model = AutoSam(TINY)
    fresh = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_sam(model, state)
    for name, parameter in model.named_parameters():
        if ".rel_pos_" in name:
            continue
        assert torch.equal(parameter, state[name] if name in state else fresh[name]), name
    tables = {axis: state[f"image_encoder.blocks.0.attn.rel_pos_{axis}"] for axis in "hw"}
    zero = VITS["vit_tiny"].pretrain_grid - 1  # the row of offset 0
    attention = model.image_encoder.blocks[0].attn
    assert torch.equal(attention.rel_pos_h, tables["h"][zero - 7 : zero + 8])  # window 8: offsets -7..7
    assert torch.equal(attention.rel_pos_w, tables["w"][zero - 3 : zero + 4])  # window 4: offsets -3..3
    mean = (tables["h"] + tables["w"]) / 2
    torch.testing.assert_close(attention.rel_pos_d, mean[zero - 5 : zero + 6])  # window 6
    whole_grid = model.image_encoder.blocks[1].attn
    assert [t.shape[0] for t in (whole_grid.rel_pos_d, whole_grid.rel_pos_h, whole_grid.rel_pos_w)] == [15, 15, 15]


def test_interp_squeezes_the_tables() -> None:
    spec = AutoSamSpec(**(vars(TINY) | {"rel_pos_resize": "interp"}))
    state = original_state("vit_tiny")
    name = "image_encoder.blocks.2.attn.rel_pos_h"
    assert torch.equal(convert_sam_state(state, spec)[name], resize_table(state[name], 8, "interp"))


def test_half_precision_files_become_float32() -> None:
    state = {name: tensor.half() for name, tensor in original_state("vit_tiny").items()}
    assert {tensor.dtype for tensor in convert_sam_state(state, TINY).values()} == {torch.float32}


@pytest.mark.parametrize(("vit", "num_used"), [("vit_b", 171), ("vit_l", 3 + 14 * 24), ("vit_h", 3 + 14 * 32)])
@pytest.mark.parametrize("names", [hf_state, original_state])
def test_real_sizes_load_by_name_and_shape(vit: str, num_used: int, names: object) -> None:
    """On the meta device: every name and shape of transformers' published configurations has its place."""
    spec = AutoSamSpec(num_outputs=14, vit=vit, global_blocks=(2,))
    with torch.device("meta"):
        model = AutoSam(spec)
    state = names(vit, "meta")  # type: ignore[operator]
    assert load_sam(model, state) == num_used
    assert set(frozen_names(model)) <= set(convert_sam_state(state, spec))


def test_wrong_size_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"expected vit_b .*got vit_l \(1024 channels, 24 blocks\)") as caught:
        convert_sam_state(original_state("vit_l", "meta"), AutoSamSpec(num_outputs=14))
    assert caught.value.code == "MISMATCH"
    assert "model.vit=vit_l" in caught.value.remedy


def test_all_faults_are_listed_at_once_and_the_model_is_untouched() -> None:
    state = dict(original_state("vit_tiny"))
    state["image_encoder.blocks.1.attn.qkv.weigth"] = state.pop("image_encoder.blocks.1.attn.qkv.weight")
    state["image_encoder.blocks.2.norm1.bias"] = torch.zeros(95)
    state["lora_a"] = torch.zeros(3)
    model = AutoSam(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_sam(model, state)
    assert caught.value.code == "MISMATCH"
    for part in (
        "1 missing: blocks.1.attn.qkv.weight", "2 unexpected: lora_a, blocks.1.attn.qkv.weigth",
        "1 wrong shape: blocks.2.norm1.bias is (95,), not (96,)",
    ):
        assert part in caught.value.fault
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_same_tensor_twice_is_refused() -> None:
    state = original_state("vit_tiny") | {"vision_encoder.pos_embed": torch.zeros(1, 16, 16, 96)}
    with pytest.raises(CheckpointError, match="a second time"):
        convert_sam_state(state, TINY)


def test_swapped_table_lengths_are_refused() -> None:
    """A table of a window (27 rows) where a whole-grid one belongs: another model, however well it would resize."""
    state = original_state("vit_tiny") | {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(27, 32)}
    with pytest.raises(CheckpointError, match=r"rel_pos_h is \(27, 32\), not "):
        convert_sam_state(state, TINY)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("image_encoder.patch_embed.seq.0.c.weight", "MobileSAM"),
        ("module.image_encoder.layers.1.blocks.0.attn.qkv.weight", "MobileSAM"),
        ("image_encoder.blocks.0.mlp.fc1.weight", "EfficientSAM"),
        ("image_encoder.backbone.stages.0.op_list.0.weight", "EfficientViT-SAM"),
        ("image_encoder.trunk.blocks.0.attn.qkv.weight", "SAM 2"),
    ],
)
def test_other_sams_are_refused_by_name(name: str, title: str) -> None:
    with pytest.raises(CheckpointError, match=title) as caught:
        convert_sam_state({name: torch.zeros(1)}, TINY)
    assert caught.value.code == "MISMATCH"


def test_nothing_of_sam_lists_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"59 missing: pos_embed, .* and 39 more; 1 unexpected: conv1.weight"):
        convert_sam_state({"conv1.weight": torch.zeros(3)}, TINY)
