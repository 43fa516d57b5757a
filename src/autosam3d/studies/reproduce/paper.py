"""What the paper reports, and which table of it has which rows. No figure here is a result of this project.

*Source*: Li et al., "Auto-Prompting SAM for Mobile Friendly 3D Medical Image Segmentation", arXiv:2308.14936, tables 1
to 4, figures 1, 3 and 4. Scores are mean Dice and mean NSD in percent; parameters are in millions, as printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DATASETS: Mapping[str, str] = {
    "btcv": "BTCV", "amos_ct": "AMOS", "ct_org": "CT-ORG", "pelvic": "Institutional Pelvic", "openkbp": "OpenKBP",
    "phantom": "Phantoms",
}
"""Recipe name to the name shown; the last two are not in the paper."""
ALPHA = 0.01
"""Of the paper's star."""


@dataclass(frozen=True)
class PaperScore:
    """In percent. None where the paper prints a dash."""

    dice: float
    nsd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a table."""

    key: str
    """What `RunScores.model` says."""
    name: str
    facts: tuple[str, ...] = ()
    """What stands in the table's own columns, in their order."""
    tuned_millions: float | None = None
    scores: Mapping[str, PaperScore] = field(default_factory=dict)
    """By recipe name of the dataset."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table's rows and what is asked of them.

    Attributes:
        facts: headings of columns that only this table has.
        reference: key of the row that all others are tested against.
        question: ``reference`` asks whether the reference is better than every other row (the paper's star), ``rows``
            whether each other row is better than the reference.
        more_rows: rows that the paper does not have, shown behind its own where they were run.
    """

    key: str
    title: str
    datasets: tuple[str, ...]
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    reference: str
    question: Literal["reference", "rows"]
    measures: tuple[Literal["dice", "nsd"], ...] = ("dice", "nsd")
    shows_tuned: bool = False
    notices: tuple[str, ...] = ()
    more_rows: tuple[Row, ...] = ()


def _scores(**pairs: tuple[float, float | None]) -> dict[str, PaperScore]:
    return {dataset: PaperScore(*pair) for dataset, pair in pairs.items()}


TABLE1 = PaperTable(
    key="table1", title="Table 1: AutoSAM Adapter and networks trained from scratch",
    datasets=("btcv", "amos_ct", "ct_org", "pelvic"), facts=(), reference="autosam", question="reference",
    shows_tuned=True,
    rows=(
        Row(key="nnunet", name="nnU-Net", tuned_millions=31.18, scores=_scores(
            btcv=(84.34, 73.21), amos_ct=(87.43, 77.12), ct_org=(85.51, 75.60), pelvic=(88.04, 83.87))),
        Row(key="nnformer", name="nnFormer", tuned_millions=150.14, scores=_scores(
            btcv=(83.51, 71.65), amos_ct=(84.52, 70.06), ct_org=(82.75, 70.31), pelvic=(87.60, 82.13))),
        Row(key="unetr", name="UNETR", tuned_millions=93.02, scores=_scores(
            btcv=(85.47, 74.35), amos_ct=(77.24, 60.58), ct_org=(83.13, 71.56), pelvic=(86.68, 81.54))),
        Row(key="swin_unetr", name="SwinUNETR", tuned_millions=62.83, scores=_scores(
            btcv=(86.58, 75.26), amos_ct=(86.19, 74.83), ct_org=(84.34, 72.32), pelvic=(89.12, 83.54))),
        Row(key="autosam", name="AutoSAM Adapter", tuned_millions=26.53, scores=_scores(
            btcv=(87.15, 78.83), amos_ct=(88.65, 79.41), ct_org=(85.12, 76.37), pelvic=(91.30, 84.35))),
    ),
    more_rows=(Row(key="nnunet_v2", name="nnU-Net v2, the program itself"),),
)

PUBLISHED_STEPS: Mapping[str, int] = {"nnunet": 250_000, "nnformer": 250_000, "unetr": 20_000}
"""Row to the optimiser's steps that its own authors train for. How long a run here trains is the dataset's recipe's to
say, or the budget's, so the table tells both. *Source*: nnU-Net (arXiv:1904.08128) and nnFormer (arXiv:2109.03201),
1000 epochs of 250 steps; UNETR (arXiv:2103.10504), 20,000 steps. SwinUNETR's count epochs of another dataset."""

SMALL_VARIANTS = (
    "Every network trained here from scratch is a small variant of the one that its row names, for two CPU cores: such "
    "rows stand for no published figure, and the paper's columns are of the whole networks."
)

GIVEN_THE_TRUTH = (
    "Rows marked yes under \"given the truth\" segment slice by slice from prompts that are made from the truth: it "
    "tells them which organs a slice holds and where. They answer an easier question than the automatic rows."
)

TABLE2 = PaperTable(
    key="table2", title="Table 2: AutoSAM Adapter, SAM and MedSAM", datasets=("btcv", "amos_ct"),
    facts=("tuned", "given the truth"), reference="autosam", question="reference", notices=(GIVEN_THE_TRUTH,),
    rows=(
        Row(key="sam", name="SAM", facts=("none", "yes"), scores=_scores(btcv=(54.86, None), amos_ct=(49.31, None))),
        Row(key="medsam_pm", name="MedSAM", facts=("prompt encoder and mask decoder", "yes"), scores=_scores(
            btcv=(80.65, 66.82), amos_ct=(70.28, 59.61))),
        Row(key="medsam_full", name="MedSAM", facts=("everything", "yes"), scores=_scores(
            btcv=(84.57, 73.76), amos_ct=(83.10, 70.26))),
        Row(key="autosam", name="AutoSAM Adapter", facts=("adapters, norms, prompt generator, decoder", "no"),
            scores=_scores(btcv=(87.15, 78.83), amos_ct=(88.65, 79.41))),
    ),
    more_rows=(
        Row(key="sam, box", name="SAM, boxes for prompts", facts=("none", "yes")),
        Row(key="medsam_pm, box", name="MedSAM, boxes for prompts", facts=("prompt encoder and mask decoder", "yes")),
        Row(key="medsam_full, box", name="MedSAM, boxes for prompts", facts=("everything", "yes")),
    ),
)
"""The paper calls its own row "P&M", as MedSAM's; its text has adapters and norms tuned as well."""

TABLE3 = PaperTable(
    key="table3", title="Table 3: AutoSAM Adapter without its parts", datasets=("btcv",), facts=("APG", "MLAM"),
    reference="autosam", question="rows",
    notices=("APG: Auto Prompt Generator. MLAM: multi-layer aggregation in the mask decoder.",),
    rows=(
        Row(key="autosam", name="AutoSAM Adapter", facts=("yes", "yes"), scores=_scores(btcv=(87.15, 78.83))),
        Row(key="no_apg", name="without APG", facts=("no", "yes"), scores=_scores(btcv=(85.23, 74.12))),
        Row(key="no_mlam", name="without MLAM", facts=("yes", "no"), scores=_scores(btcv=(84.37, 73.54))),
        Row(key="no_apg_no_mlam", name="without both", facts=("no", "no"), scores=_scores(btcv=(81.14, 70.33))),
    ),
    more_rows=tuple(Row(key=name, name=name, facts=("yes", "yes")) for name in (
        "without adapters", "without depth embedding", "relative positions interpolated",
        "image fused at the other resolution", "overlap 0.5 instead of the recipe's")),
)

LAMBDAS: Mapping[float, float] = {0: 78.54, 0.2: 82.45, 0.5: 83.27, 0.8: 81.14, 1: 79.63}
"""Lambda of the distillation to mean Dice of SwinUNETR Small on BTCV; 1 is without a teacher, 0 without labels."""


def lambda_key(lam: float) -> str:
    """The row of Table 4 with this lambda: ``lambda_0.5``."""
    return f"lambda_{lam:g}"


TABLE4 = PaperTable(
    key="table4", title="Table 4: the weight of the labels in distillation", datasets=("btcv",), facts=(),
    reference=lambda_key(1), question="rows", measures=("dice",),
    notices=("Loss: λ (Dice + CE) with the labels + (1 - λ) MSE with the teacher's probabilities; λ = 1 is without a "
             "teacher.",),
    rows=tuple(Row(key=lambda_key(lam), name=f"λ = {lam:g}", scores=_scores(btcv=(dice, None)))
               for lam, dice in LAMBDAS.items()),
)

TABLES: Mapping[str, PaperTable] = {table.key: table for table in (TABLE1, TABLE2, TABLE3, TABLE4)}

FIGURE4_PAPER = (
    "The paper's figure 4 prints no numbers; its table 4 has Small on BTCV at 79.63 without and 83.27 with a teacher, "
    "its text \"approximate 4%\" more for Tiny and as much for Small."
)
