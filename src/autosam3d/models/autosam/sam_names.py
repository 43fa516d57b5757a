"""The tensors of a whole 2D SAM: conversion of their names to transformers' names, and the sizes of the network.

Original names (``image_encoder.blocks.0.attn.qkv.weight``; MedSAM's files too) become those of transformers'
``SamModel``. Numbers are not changed. `sam_weights` converts the encoder's tensors for the 3D encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autosam3d.errors import CheckpointError

REMEDY = "give a file such as sam_vit_b_01ec64.pth or medsam_vit_b.pth"
POSITIONS = "shared_image_embedding.positional_embedding"
"""The frequencies of the position code of prompts and image, one table under two names in transformers."""
POSITIONS_TWIN = "prompt_encoder.shared_embedding.positional_embedding"

_WRAPPERS = ("module.", "sam.", "model.")
_PREPROCESSING = ("pixel_mean", "pixel_std")

_STRANGERS = {
    "MobileSAM (its encoder is a TinyViT)": re.compile(
        r"image_encoder\.(layers\.\d+\.(conv|blocks|downsample)|patch_embed\.seq)\b"
    ),
    "EfficientSAM (its encoder has no relative positions)": re.compile(r"image_encoder\.blocks\.\d+\.mlp\.fc[12]\b"),
    "EfficientViT-SAM or RepViT-SAM": re.compile(r"image_encoder\.(backbone|features|stages)\."),
    "SAM 2": re.compile(r"(image_encoder\.trunk|vision_encoder\.backbone)\."),
}

_HEAD = r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers"
_DOWN, _UP = r"^prompt_encoder\.mask_downscaling", r"^mask_decoder\.output_upscaling"
_ORIGINAL_TO_HF = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", POSITIONS),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (_DOWN + r"\.0\.", "prompt_encoder.mask_embed.conv1."),
    (_DOWN + r"\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (_DOWN + r"\.3\.", "prompt_encoder.mask_embed.conv2."),
    (_DOWN + r"\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (_DOWN + r"\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm([1-4])\.", r"\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (_UP + r"\.0\.", "mask_decoder.upscale_conv1."),
    (_UP + r"\.1\.", "mask_decoder.upscale_layer_norm."),
    (_UP + r"\.3\.", "mask_decoder.upscale_conv2."),
    (_HEAD + r"\.0\.", r"\1.proj_in."),
    (_HEAD + r"\.1\.", r"\1.layers.0."),
    (_HEAD + r"\.2\.", r"\1.proj_out."),
))
"""The first match counts. *Source*: parameter names of segment-anything's ``Sam`` and transformers' ``SamModel``."""


@dataclass(frozen=True)
class SamSizes:
    """The sizes of a SAM, read from its tensors."""

    image_size: int
    """Pixels a side of what the encoder reads."""
    token_size: int
    """Pixels a side of a ViT patch."""
    embed_dim: int
    num_blocks: int
    num_heads: int
    mlp_dim: int
    attn_window: int
    global_blocks: tuple[int, ...]
    neck_dim: int
    mask_channels: int
    decoder_layers: int
    decoder_mlp_dim: int
    decoder_downsample: int
    """How much narrower the decoder's cross attention is than its tokens."""
    num_multimask: int
    iou_hidden_dim: int


def refuse_strangers(names: Iterable[str], where: str) -> None:
    """Refuse another network of the SAM family by its name.

    Raises:
        CheckpointError: MISMATCH.
    """
    bare = [unwrap(name) for name in names]
    for title, pattern in _STRANGERS.items():
        if any(pattern.match(name) for name in bare):
            raise CheckpointError("MISMATCH", where, f"expected the original SAM or MedSAM, got {title}", REMEDY)


def unwrap(name: str) -> str:
    """The name without prefixes of DataParallel and enclosing modules."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def whole_sam(state: Mapping[str, Tensor], where: str = "SAM weights") -> dict[str, Tensor]:
    """All tensors of a SAM under transformers' names, the position table under both of its names, float32.

    Raises:
        CheckpointError: MISMATCH; another network, both namings mixed, a part that is not there, a name twice.
    """
    refuse_strangers(state, where)
    bare = [unwrap(name) for name in state]
    original = any(name.startswith("image_encoder.") for name in bare)
    if original and any(name.startswith("vision_encoder.") for name in bare):
        raise _mismatch(where, "got the original names and those of transformers in one file")
    parts = ("image_encoder." if original else "vision_encoder.", "prompt_encoder.", "mask_decoder.")
    lacking = [part[:-1] for part in parts if not any(name.startswith(part) for name in bare)]
    if lacking:
        raise _mismatch(where, f"got none of {', '.join(lacking)}")
    found: dict[str, Tensor] = {}
    for name, tensor in zip(bare, state.values(), strict=True):
        if name in _PREPROCESSING:
            continue
        new = _renamed(name) if original else name
        if new in found:
            raise _mismatch(where, f"got {new} twice")
        found[new] = tensor.float()
    return _with_both_positions(found, where)


def read_sizes(state: Mapping[str, Tensor], where: str = "SAM weights") -> SamSizes:
    """The sizes of a `whole_sam`. The decoder's heads cannot be read off; every SAM has 8.

    Raises:
        CheckpointError: MISMATCH, a tensor that tells a size is absent, or the blocks contradict each other.
    """
    positions = _shape(state, "vision_encoder.pos_embed", 4, where)
    patch = _shape(state, "vision_encoder.patch_embed.projection.weight", 4, where)
    grid, dim = positions[1], positions[3]
    blocks = _count(state, "vision_encoder.layers.")
    rows = [_shape(state, f"vision_encoder.layers.{i}.attn.rel_pos_h", 2, where) for i in range(blocks)]
    head_dim = rows[0][1] if rows else 0
    if not head_dim or dim % head_dim or any(row[1] != head_dim for row in rows):
        raise _mismatch(where, f"got {dim} channels and relative positions of {head_dim}")
    windows = {(row[0] + 1) // 2 for row in rows if row[0] != 2 * grid - 1}
    if len(windows) > 1:
        raise _mismatch(where, f"got attention windows of {sorted(windows)} tokens")
    narrow = _shape(state, "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight", 2, where)
    return SamSizes(
        image_size=grid * patch[3], token_size=patch[3], embed_dim=dim, num_blocks=blocks, num_heads=dim // head_dim,
        mlp_dim=_shape(state, "vision_encoder.layers.0.mlp.lin1.weight", 2, where)[0],
        attn_window=windows.pop() if windows else grid,
        global_blocks=tuple(i for i, row in enumerate(rows) if row[0] == 2 * grid - 1),
        neck_dim=_shape(state, "vision_encoder.neck.conv1.weight", 4, where)[0],
        mask_channels=_shape(state, "prompt_encoder.mask_embed.conv2.weight", 4, where)[0],
        decoder_layers=_count(state, "mask_decoder.transformer.layers."),
        decoder_mlp_dim=_shape(state, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2, where)[0],
        decoder_downsample=max(1, narrow[1] // max(1, narrow[0])),
        num_multimask=_shape(state, "mask_decoder.mask_tokens.weight", 2, where)[0] - 1,
        iou_hidden_dim=_shape(state, "mask_decoder.iou_prediction_head.proj_in.weight", 2, where)[0],
    )


def _renamed(name: str) -> str:
    for pattern, new in _ORIGINAL_TO_HF:
        renamed, hits = pattern.subn(new, name)
        if hits:
            return renamed
    return name


def _with_both_positions(found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Add the second name of the position table: safetensors keeps only one name of a shared tensor."""
    tables = [found[name] for name in (POSITIONS, POSITIONS_TWIN) if name in found]
    if len(tables) == 2 and not torch.equal(*tables):
        raise _mismatch(where, "got two different position tables, one for prompts and one for the image")
    if tables:
        found[POSITIONS] = found[POSITIONS_TWIN] = tables[0]
    return found


def _shape(state: Mapping[str, Tensor], name: str, axes: int, where: str) -> tuple[int, ...]:
    if name not in state:
        raise _mismatch(where, f"got no {name}")
    if state[name].dim() != axes or not state[name].numel():
        raise _mismatch(where, f"got {name} of shape {tuple(state[name].shape)}")
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _mismatch(where: str, fault: str) -> CheckpointError:
    return CheckpointError("MISMATCH", where, f"expected a whole SAM (encoder, prompt encoder, mask decoder), {fault}",
                           REMEDY)
