"""Converts 2D SAM weights for the 3D encoder: names, shapes and the tables that must be resized. No files here.

Accepts the original names (``image_encoder.blocks.0.attn.qkv.weight``, also MedSAM's files, also behind ``module.``)
and those of transformers' ``SamModel`` (``vision_encoder.layers.0.attn.qkv.weight``). Everything is checked: a
tensor that is missing, left over or of a wrong shape is an error, and all of them are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autosam3d.errors import CheckpointError
from autosam3d.models.autosam.attention import resize_table
from autosam3d.models.autosam.sam_names import refuse_strangers, unwrap
from autosam3d.models.spec import VITS, AutoSamSpec, VitSpec

_PREFIX = "image_encoder."
_NOT_ENCODER = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "pixel_mean", "pixel_std")

_FROM_HF = {
    ("patch_embed", "projection"): ("patch_embed", "proj"),
    ("layers",): ("blocks",),
    ("layer_norm1",): ("norm1",),
    ("layer_norm2",): ("norm2",),
}
"""Whole path parts only: as substrings "norm" and "layers" would also hit names that are right already."""

_FROZEN = re.compile(
    r"image_encoder\.(pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|blocks\.\d+\.(attn\.((qkv|proj)\.(weight|bias)|rel_pos_[hw])|mlp\.lin[12]\.(weight|bias)))"
)
"""Parameters that keep SAM's values. *Source*: paper section 3.2, which tunes convolutions, adapters, norms and depth
tables."""

def convert_sam_state(
    state: Mapping[str, Tensor], spec: AutoSamSpec, where: str = "SAM weights"
) -> dict[str, Tensor]:
    """SAM's tensors under the names and in the shapes of `AutoSam(spec)`, float32.

    Beside SAM's own tensors the result holds ``rel_pos_d`` of each block, the mean of its two 2D tables. SAM's neck,
    prompt encoder and mask decoder are not used.

    Args:
        where: the name of the state in errors, for example its file.

    Raises:
        CheckpointError: code MISMATCH; another architecture or size, or tensors missing, unexpected, of wrong shape.
    """
    refuse_strangers(state, where)
    vit = VITS[spec.vit]
    found, unexpected = _encoder_tensors(state)
    _refuse_other_size(found, spec, where)
    expected = _expected_shapes(vit)
    missing = [name for name in expected if name not in found]
    unexpected += [name for name in found if name not in expected]
    wrong = [
        f"{name} is {tuple(found[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if missing or unexpected or wrong:
        faults = [_list("missing", missing), _list("unexpected", unexpected), _list("wrong shape", wrong)]
        raise CheckpointError(
            "MISMATCH", where, f"expected SAM's image encoder ({spec.vit}); " + "; ".join(f for f in faults if f),
            "give an unchanged SAM or MedSAM file",
        )
    converted = {_PREFIX + name: found[name].float() for name in expected if ".rel_pos_" not in name}
    for index in range(vit.num_blocks):
        window = spec.token_grid if index in spec.global_blocks else spec.attn_window
        tables = [found[f"blocks.{index}.attn.rel_pos_{axis}"].float() for axis in "hw"]
        attn = f"{_PREFIX}blocks.{index}.attn.rel_pos_"
        converted[attn + "h"] = resize_table(tables[0], window[1], spec.rel_pos_resize)
        converted[attn + "w"] = resize_table(tables[1], window[2], spec.rel_pos_resize)
        converted[attn + "d"] = resize_table((tables[0] + tables[1]) / 2, window[0], spec.rel_pos_resize)
    return converted


@torch.no_grad()
def load_sam(model: nn.Module, state: Mapping[str, Tensor], where: str = "SAM weights") -> int:
    """Fill an `AutoSam`'s encoder with SAM's weights; returns how many of SAM's tensors were used (171 for ViT-B).

    Raises:
        CheckpointError: as `convert_sam_state`; the model is untouched then.
    """
    spec = model.spec
    assert isinstance(spec, AutoSamSpec)
    converted = convert_sam_state(state, spec, where)
    parameters = dict(model.named_parameters())
    # Invariants: every converted tensor has a parameter, and no frozen parameter keeps random values.
    assert set(frozen_names(model)) <= converted.keys() <= parameters.keys()
    assert all(parameters[name].shape == tensor.shape for name, tensor in converted.items())
    for name, tensor in converted.items():
        parameters[name].copy_(tensor)
    used = sum(not name.endswith("rel_pos_d") for name in converted)
    assert used == len(_expected_shapes(VITS[spec.vit]))
    return used


def freeze_sam(model: nn.Module) -> None:
    """Freeze every parameter that holds a tensor of SAM's 2D encoder, except its norms, which are tuned."""
    frozen = set(frozen_names(model))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def frozen_names(model: nn.Module) -> list[str]:
    """The parameters that `freeze_sam` freezes, in the model's order."""
    return [name for name, _ in model.named_parameters() if _FROZEN.fullmatch(name)]


def _encoder_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The image encoder's tensors under original names without prefix, its neck left out; and unknown names."""
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for full_name, tensor in state.items():
        name = unwrap(full_name)
        if name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        elif name.startswith("vision_encoder."):
            name = _from_hf(name.removeprefix("vision_encoder."))
        elif name.startswith(_NOT_ENCODER):
            continue
        else:
            unexpected.append(full_name)
            continue
        if name.startswith("neck."):
            continue
        if name in found:
            unexpected.append(f"{full_name} (a second time)")
        found[name] = tensor
    return found, unexpected


def _from_hf(name: str) -> str:
    parts = tuple(name.split("."))
    for theirs, ours in _FROM_HF.items():
        for start in range(len(parts) - len(theirs) + 1):
            if parts[start : start + len(theirs)] == theirs:
                parts = parts[:start] + ours + parts[start + len(theirs) :]
                break
    return ".".join(parts)


def _refuse_other_size(found: Mapping[str, Tensor], spec: AutoSamSpec, where: str) -> None:
    """Refuse a whole SAM of another size by its name, instead of listing hundreds of tensors."""
    if "pos_embed" not in found:
        return
    dim = found["pos_embed"].shape[-1]
    num_blocks = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    vit = VITS[spec.vit]
    if dim == vit.embed_dim:
        return
    names = [name for name, other in VITS.items() if (other.embed_dim, other.num_blocks) == (dim, num_blocks)]
    size = names[0] if names else "an unknown size"
    raise CheckpointError(
        "MISMATCH", where,
        f"expected {spec.vit} ({vit.embed_dim} channels, {vit.num_blocks} blocks), "
        f"got {size} ({dim} channels, {num_blocks} blocks)",
        f"set model.vit={size} or give a {spec.vit} file" if names else f"give a {spec.vit} file",
    )


def _expected_shapes(vit: VitSpec) -> dict[str, tuple[int, ...]]:
    """Name to shape of SAM's image encoder without its neck. *Source*: segment-anything's released weights."""
    dim, hidden, patch = vit.embed_dim, int(vit.embed_dim * vit.mlp_ratio), vit.pretrain_patch
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, vit.pretrain_grid, vit.pretrain_grid, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for index in range(vit.num_blocks):
        # SAM attends over its whole grid in the tapped blocks and in windows elsewhere.
        rows = 2 * (vit.pretrain_grid if index in vit.taps else vit.pretrain_window) - 1
        linear = {
            "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.lin1": (hidden, dim), "mlp.lin2": (dim, hidden),
        }
        block = {f"{part}.{kind}": (dim,) for part in ("norm1", "norm2") for kind in ("weight", "bias")}
        block |= {f"{part}.weight": shape for part, shape in linear.items()}
        block |= {f"{part}.bias": shape[:1] for part, shape in linear.items()}
        block |= {f"attn.rel_pos_{axis}": (rows, dim // vit.num_heads) for axis in "hw"}
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _list(title: str, names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {title}: {', '.join(names[:most])}{more}"
