"""A SAM of random weights small enough for tests, written in the names of segment-anything and of transformers."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from autosam3d.models.autosam.sam_names import POSITIONS, POSITIONS_TWIN, SamSizes
from autosam3d.studies.slicewise.model import SliceSam, random_sam

SIZES = SamSizes(
    image_size=64, token_size=8, embed_dim=16, num_blocks=3, num_heads=2, mlp_dim=40, attn_window=3,
    global_blocks=(1,), neck_dim=32, mask_channels=8, decoder_layers=2, decoder_mlp_dim=48, decoder_downsample=2,
    num_multimask=3, iou_hidden_dim=24,
)

# Written by hand, the other way round than the package reads it.
_TO_ORIGINAL = (
    ("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    ("prompt_encoder.mask_embed.conv1.", "prompt_encoder.mask_downscaling.0."),
    ("prompt_encoder.mask_embed.layer_norm1.", "prompt_encoder.mask_downscaling.1."),
    ("prompt_encoder.mask_embed.conv2.", "prompt_encoder.mask_downscaling.3."),
    ("prompt_encoder.mask_embed.layer_norm2.", "prompt_encoder.mask_downscaling.4."),
    ("prompt_encoder.mask_embed.conv3.", "prompt_encoder.mask_downscaling.6."),
    ("mask_decoder.upscale_conv1.", "mask_decoder.output_upscaling.0."),
    ("mask_decoder.upscale_layer_norm.", "mask_decoder.output_upscaling.1."),
    ("mask_decoder.upscale_conv2.", "mask_decoder.output_upscaling.3."),
    ("vision_encoder.patch_embed.projection.", "image_encoder.patch_embed.proj."),
    ("vision_encoder.neck.conv1.", "image_encoder.neck.0."),
    ("vision_encoder.neck.layer_norm1.", "image_encoder.neck.1."),
    ("vision_encoder.neck.conv2.", "image_encoder.neck.2."),
    ("vision_encoder.neck.layer_norm2.", "image_encoder.neck.3."),
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.", "image_encoder."),
)


def original_name(name: str) -> str:
    """The name in segment-anything of a tensor of transformers' SamModel."""
    if name.startswith("mask_decoder."):
        head = re.fullmatch(r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.(.*)", name)
        if head:
            for new, old in (("proj_in", "layers.0"), ("layers.0", "layers.1"), ("proj_out", "layers.2")):
                if head[2].startswith(new + "."):
                    return f"{head[1]}.{old}.{head[2].removeprefix(new + '.')}"
        if ".transformer." in name:
            return name.replace("layer_norm_final_attn", "norm_final_attn").replace(".layer_norm", ".norm")
    for new, old in _TO_ORIGINAL:
        if name.startswith(new):
            name = old + name.removeprefix(new)
            break
    return name.replace(".layer_norm", ".norm") if name.startswith("image_encoder.blocks.") else name


def states(seed: int = 0, sizes: SamSizes = SIZES) -> tuple[SliceSam, dict[str, Tensor], dict[str, Tensor]]:
    """The model, its tensors under transformers' names, and under the original ones."""
    sam = random_sam(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sam.network.named_parameters():
            if "positional" not in name:  # every tensor is a value of its own, biases and norms too
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    hf = {name: tensor.clone() for name, tensor in sam.network.state_dict().items()}
    original = {original_name(name): tensor for name, tensor in hf.items() if name != POSITIONS_TWIN}
    return sam, hf, original


def write_pth(path: Path, seed: int = 0) -> Path:
    """As SAM and MedSAM are handed round."""
    torch.save(states(seed)[2], path)
    return path


def write_hf(folder: Path, seed: int = 0) -> Path:
    """As the hub lays it out, with the position table once."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in states(seed)[1].items() if name != POSITIONS}
    save_file(state, folder / "model.safetensors")
    return folder
