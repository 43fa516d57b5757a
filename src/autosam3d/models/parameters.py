"""The number of parameters of a network and of its parts, counted without allocating them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autosam3d.models.autosam.sam_weights import frozen_names
from autosam3d.models.build import build_network
from autosam3d.models.spec import VITS, AutoSamSpec, NetworkSpec

_TABLES = ("depth_embed", "rel_pos_d")


@dataclass(frozen=True, kw_only=True)
class ParameterReport:
    """Counts of one network; of an AutoSAM with SAM's weights frozen."""

    parts: dict[str, int]
    """Tuned part to count, in the order of the forward pass; `depth_embed` and `rel_pos_d` are lookup tables."""
    paper_counted: int
    """Convolutions, adapters, norms: what the paper's 26.53M counts. The lookup tables are left out."""
    tuned: int
    """Everything that is trained, lookup tables included."""
    frozen: int
    total: int
    tuned_full_tables: int
    """`tuned`, if the depth tables had as many rows as SAM's (27 or 127), as in the public code; here they are
    stored only as far as the attention window reads them."""
    frozen_full_tables: int
    """`frozen` with SAM's own tables of 27 or 127 rows."""


def count_parameters(spec: NetworkSpec, side_outputs: bool = False) -> ParameterReport:
    """Count on the meta device: no memory, no time, any size of SAM.

    With `side_outputs` those of deep supervision count, too, which exist in training only.
    """
    with torch.device("meta"):
        model = build_network(spec, side_outputs)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    frozen = set(frozen_names(model))
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        if name not in frozen:
            parts[_part(name)] = parts.get(_part(name), 0) + size
    tuned = sum(parts.values())
    if not isinstance(spec, AutoSamSpec):
        return ParameterReport(parts=parts, paper_counted=tuned, tuned=tuned, frozen=0, total=tuned,
                               tuned_full_tables=tuned, frozen_full_tables=0)
    vit = VITS[spec.vit]
    head_dim = vit.embed_dim // vit.num_heads
    full_rows = sum(
        2 * (vit.pretrain_grid if index in vit.taps else vit.pretrain_window) - 1 for index in range(vit.num_blocks)
    )
    stored = {axis: sum(n for name, n in sizes.items() if name.endswith(f"rel_pos_{axis}")) for axis in "dhw"}
    return ParameterReport(
        parts=parts,
        paper_counted=tuned - sum(parts.get(table, 0) for table in _TABLES),
        tuned=tuned,
        frozen=sum(sizes[name] for name in frozen),
        total=sum(sizes.values()),
        tuned_full_tables=tuned - stored["d"] + full_rows * head_dim,
        frozen_full_tables=sum(sizes[name] for name in frozen) - stored["h"] - stored["w"] + 2 * full_rows * head_dim,
    )


def _part(name: str) -> str:
    if not name.startswith("image_encoder."):
        return {"apg": "prompt_generator"}.get(name.split(".")[0], name.split(".")[0])
    for key, part in (("depth_proj", "depth_proj"), ("adapter", "adapters"), ("norm", "norms")):
        if key in name:
            return part
    return name.split(".")[-1]
