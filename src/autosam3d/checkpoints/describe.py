"""What `autosam3d info` says about a recipe or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autosam3d.checkpoints.model_file import find_checkpoint, read_meta, recipe_of
from autosam3d.models.parameters import count_parameters
from autosam3d.models.spec import VITS, AutoSamSpec, NnFormerSpec, NnUnetSpec, SwinUnetrSpec, UnetrSpec
from autosam3d.recipes.recipe import Recipe

_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def describe_recipe(recipe: Recipe) -> str:
    """Organs, preprocessing, sampling and both parameter sums of a recipe, as text."""
    spec, pre, model, optim = recipe.dataset, recipe.preprocess, recipe.model, recipe.optim
    spacing = "the scan's own" if pre.spacing_mm is None else " x ".join(f"{s:g}" for s in pre.spacing_mm) + " mm"
    window = pre.hu_window
    lines = [
        f"{recipe.name}: {recipe.about}",
        f"dataset      {spec.title} <{spec.url}>",
        "organs       " + ", ".join(f"{i} {name}" for i, name in recipe.labels.by_index.items()),
        "left/right   " + (", ".join(f"{r} - {left}" for r, left in recipe.labels.side_pairs) or "no pairs"),
        f"spacing      {spacing} (z, y, x)",
        f"intensity    clip {window.low_hu:g}..{window.high_hu:g} HU, minus {pre.subtract_hu:g}, "
        f"over {pre.divide_hu:g}",
        f"crops        {_by(model.patch_size)} voxels, {recipe.sampling.patches_per_volume} per case and epoch, "
        f"{recipe.sampling.foreground_share:.0%} on an organ",
        f"training     {recipe.train.epochs} epochs, batch {recipe.train.batch_size}, "
        f"{_OPTIMIZERS[optim.optimizer]} {optim.lr:g}, {optim.schedule}"
        f"{', deep supervision' if recipe.train.deep_supervision else ''}",
        f"windows      overlap {recipe.inference.overlap:g}, {recipe.inference.importance}",
        "",
        f"model        {describe_network(recipe)}",
        describe_parameters(recipe),
        "",
        "folder layout",
        *("  " + line for line in spec.layout.strip().splitlines()),
    ]
    return "\n".join(lines)


def describe_network(recipe: Recipe) -> str:
    """The kind of network, in a line."""
    model = recipe.model
    if isinstance(model, AutoSamSpec):
        return f"AutoSAM Adapter on {model.vit}, tokens of {_by(model.token_size)} voxels, grid {_by(model.token_grid)}"
    if isinstance(model, SwinUnetrSpec):
        size = {12: " (Tiny)", 24: " (Small)"}.get(model.feature_size, "")
        return f"SwinUNETR, feature size {model.feature_size}{size}"
    if isinstance(model, NnUnetSpec):
        return f"nnU-Net's network, {len(model.channels)} stages of {', '.join(map(str, model.channels))} channels"
    if isinstance(model, UnetrSpec):
        return f"UNETR, tokens of {model.token_size} voxels, width {model.hidden_dim}, features {model.feature_size}"
    if isinstance(model, NnFormerSpec):
        return (f"nnFormer, tokens of {_by(model.token_size)} voxels, {len(model.num_heads)} stages from width "
                f"{model.embed_dim}, windows {', '.join(map(str, model.attn_windows))}")
    return f"residual U-Net, channels {', '.join(map(str, model.channels))}"


def describe_parameters(recipe: Recipe) -> str:
    """Parameters per part, and their sum; of an AutoSAM the sums as the paper counts them, with tables as long as
    SAM's, and as stored."""
    report = count_parameters(recipe.model)
    if not isinstance(recipe.model, AutoSamSpec):
        lines = [f"parameters                  {report.total:,}"]
        if recipe.train.deep_supervision:
            trained = count_parameters(recipe.model, side_outputs=True).total
            lines.append(f"in training                 {trained:,}  with the outputs of deep supervision")
        return "\n".join(lines)
    vit = VITS[recipe.model.vit]
    edges = {vit.pretrain_grid if index in vit.taps else vit.pretrain_window for index in range(vit.num_blocks)}
    rows = "/".join(str(2 * edge - 1) for edge in sorted(edges))
    width = max(len(name) for name in report.parts)
    lines = [f"  {name:{width}}  {count:>13,}" for name, count in report.parts.items()]
    return "\n".join([
        "parameters (with frozen SAM weights)",
        *lines,
        f"tuned, as the paper counts  {report.paper_counted:,}  without the tables depth_embed and rel_pos_d",
        f"tuned, tables in full       {report.tuned_full_tables:,}  with both, rel_pos_d in {rows} rows as SAM has",
        f"tuned, as stored            {report.tuned:,}  with both, rel_pos_d cut to the rows that are read",
        f"frozen                      {report.frozen:,}",
        f"total                       {report.total:,}",
    ])


def describe_cases(organ_cases: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line an organ: in how many training cases of which dataset it was looked for."""
    width = max(map(len, organ_cases), default=0)
    lines = [f"  {organ:{width}}  " + (", ".join(f"{count} of {name}" for name, count in sources.items()) or "none")
             for organ, sources in organ_cases.items()]
    return ["training cases", *lines] if lines else []


def describe_model(path: Path) -> str:
    """What a checkpoint is: its epoch, figures, SAM file and recipe."""
    json_path = find_checkpoint(path)
    meta = read_meta(json_path)
    recipe = recipe_of(meta, json_path)
    if meta["kind"] == "export":
        return "\n".join([*_export_lines(meta, json_path), "", describe_recipe(recipe)])
    sam = meta.get("sam")
    # A model is kept inside its last epoch, from 0; a training state counts the epochs that are done.
    epochs = meta["epoch"] + (meta["kind"] == "model")
    lines = [
        f"{json_path}: {meta['kind']} checkpoint of autosam3d {meta['autosam3d']}, after {epochs} of "
        f"{recipe.train.epochs} epochs",
        f"weights      {meta['weights']['bytes'] / 1e6:.1f} MB, SHA-256 {meta['weights']['sha256']}",
        f"SAM          {sam['source']}, SHA-256 {sam['sha256']}" if sam else "SAM          none: trained from scratch",
    ]
    dice = meta.get("metrics", {}).get("val_dice")
    if dice is not None:
        organs = meta["metrics"]["val_dice_per_organ"]
        shown = ", ".join(f"{name} {d:.3f}" for name, d in organs.items() if d is not None)
        lines.append(f"validation   Dice {dice:.4f} ({shown})")
    lines += describe_cases(meta.get("cases") or {})
    return "\n".join([*lines, "", describe_recipe(recipe)])


def _export_lines(meta: dict[str, Any], json_path: Path) -> list[str]:
    files = ", ".join(f"{name} {entry['bytes'] / 1e6:.1f} MB" for name, entry in meta["files"].items())
    return [
        f"{json_path}: export of autosam3d {meta['autosam3d']}, {meta['date']}",
        f"files        {files}",
        f"model        SHA-256 {meta['weights']['sha256']}, of weights {meta['trained_weights_sha256']}",
    ]


def _by(triple: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in triple)
