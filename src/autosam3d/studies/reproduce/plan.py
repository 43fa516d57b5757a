"""Which runs a table or a figure of the paper needs. Pure: no file is opened, nothing is trained.

*Source*: the rows are those of the paper's Tables 1 to 4 and Figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autosam3d.errors import UsageError
from autosam3d.studies.reproduce.paper import LAMBDAS, lambda_key

Target = Literal["table1", "table2", "table3", "table4", "fig1", "fig3", "fig4"]
StudySize = Literal["paper", "2core"]

TARGETS: tuple[Target, ...] = ("table1", "table2", "table3", "table4", "fig1", "fig3", "fig4")
BASELINES: Mapping[str, str] = {
    "nnunet": "nnunet", "nnformer": "nnformer", "unetr": "unetr", "swin_unetr": "swinunetr",
}
"""The paper's four, in its order: row of the table to preset."""
OURS = "autosam"
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no_apg": {"model.prompt_generator": False},
    "no_mlam": {"model.aggregation": False},
    "no_apg_no_mlam": {"model.prompt_generator": False, "model.aggregation": False},
}
"""Table 3, beside the whole model."""
MORE_ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "without adapters": {"model.adapter_dim": 0},
    "without depth embedding": {"model.depth_embed": False},
    "relative positions interpolated": {"model.rel_pos_resize": "interp"},
    "image fused at the other resolution": {"model.fuse_stride": None},
    "overlap 0.5 instead of the recipe's": {},
}
"""Of choices that the paper does not test; `fuse_stride` becomes the one that the recipe does not have."""
_OTHER_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One trained and evaluated model of a plan."""

    name: str
    """Of its folder; equal specs have equal names, so that tables share their runs."""
    row: str
    """Of the table."""
    kind: Literal["train", "distill", "slicewise", "nnunet_v2"] = "train"
    model: str
    """A preset of ``recipes/models``; for `slicewise` which tuning, for `nnunet_v2` which preset of nnU-Net's."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe, ``key.path`` to value."""
    seed: int = 0
    small: bool = False
    """Of the size "2core"."""
    teacher: str | None = None
    """Name of the run that teaches a student."""
    predicts_as: str | None = None
    """Name of the run whose weights are taken, for a row that differs in inference only."""
    overlap: float | None = None
    """Of the windows, where it is not the recipe's."""


def plan_runs(
    target: Target, size: StudySize, seeds: Sequence[int], *, more_ablations: bool = False, nnunet_v2: bool = False,
    student: str | None = None,
) -> list[RunSpec]:
    """The runs of one dataset, teachers before their students; equal ones once.

    Args:
        target: the table or figure. `fig1` needs none.
        size: "paper", or "2core" for the small variants of every model.
        seeds: one run each.
        more_ablations: Table 3 with those that the paper does not have.
        nnunet_v2: Table 1 with the real nnU-Net v2 beside its network in our trainer.
        student: of Table 4; default the paper's SwinUNETR Small, for "2core" SwinUNETR Tiny.

    Raises:
        UsageError: SEEDS, no seed, one twice or a negative one.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError("SEEDS", "--seeds", f"expected different numbers of 0 or more, got {list(seeds)}",
                         "write for example --seeds 0,1,2")
    suffix = "" if size == "paper" else "_2core"
    runs: list[RunSpec] = []
    for seed in seeds:
        planned = _of_seed(target, suffix, seed, more_ablations, nnunet_v2, student)
        runs += [replace(run, small=size == "2core") for run in planned]
    return list({run.name: run for run in runs}.values())


def _of_seed(
    target: Target, suffix: str, seed: int, more: bool, nnunet_v2: bool, student: str | None
) -> list[RunSpec]:
    ours = _own(suffix, seed)
    if target == "table1" or target == "fig3":
        rows = [RunSpec(name=_named(f"{preset}{suffix}", seed), row=row, model=f"{preset}{suffix}", seed=seed)
                for row, preset in BASELINES.items()]
        if nnunet_v2 and target == "table1":
            rows.insert(1, RunSpec(name=_named(f"nnunet_v2{suffix}", seed), row="nnunet_v2", kind="nnunet_v2",
                                   model="default", seed=seed))
        return [*rows, ours]
    if target == "table2":
        rows = [RunSpec(name=_named(f"{tuning}_{prompt}", seed), row=tuning if prompt == "point" else f"{tuning}, box",
                        kind="slicewise", model=f"{tuning}:{prompt}", seed=seed)
                for prompt in ("point", "box") for tuning in ("sam", "medsam_pm", "medsam_full")]
        return [*rows, ours]
    if target == "table3":
        return [ours, *_ablations(suffix, seed, more)]
    if target == "table4":
        kind = student or ("small" if not suffix else "tiny")
        return [ours, *(_student(kind, suffix, seed, weight) for weight in LAMBDAS)]
    if target == "fig4":
        return [ours, *(_student(kind, suffix, seed, weight) for kind in ("tiny", "small") for weight in (1.0, 0.5))]
    return []


def _own(suffix: str, seed: int) -> RunSpec:
    return RunSpec(name=_named(f"{OURS}{suffix}", seed), row=OURS, model=f"{OURS}{suffix}", seed=seed)


def _ablations(suffix: str, seed: int, more: bool) -> list[RunSpec]:
    ours, runs = _own(suffix, seed), []
    for row, overrides in {**ABLATIONS, **(MORE_ABLATIONS if more else {})}.items():
        slug = row.replace(" ", "_").replace("'", "")
        name = _named(f"{OURS}{suffix}_{slug}", seed)
        if overrides:
            runs.append(RunSpec(name=name, row=row, model=ours.model, overrides=overrides, seed=seed))
        else:
            runs.append(RunSpec(name=name, row=row, model=ours.model, seed=seed, predicts_as=ours.name,
                                overlap=_OTHER_OVERLAP))
    return runs


def _student(kind: str, suffix: str, seed: int, weight: float) -> RunSpec:
    name = _named(f"student_{kind}{suffix}_lambda{weight:g}", seed)
    return RunSpec(name=name, row=lambda_key(weight), kind="distill", model=kind, seed=seed,
                   overrides={"distill.lambda": weight}, teacher=_own(suffix, seed).name)


def _named(name: str, seed: int) -> str:
    return f"{name}_s{seed}"
