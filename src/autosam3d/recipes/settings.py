"""The settings of a recipe, a class a section; each checks its own values as it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from autosam3d.geometry.patches import MAX_OVERLAP

STRICT = ConfigDict(extra="forbid")


def demand(ok: bool, field_name: str, wish: str, got: object) -> None:
    """Raise the ValueError of a setting that is not `ok`; pydantic and `recipe_from_dict` put the file before it."""
    if not ok:
        raise ValueError(f"{field_name}: expected {wish}, got {got!r}")


def _is_glob_below(glob: str) -> bool:
    parts = glob.split("/")
    whole_stars = all(part == "**" or "**" not in part for part in parts)  # what pathlib demands
    return bool(glob) and not glob.startswith("/") and ".." not in parts and "\\" not in glob and whole_stars


@dataclass(frozen=True, kw_only=True)
class Download:
    """How the dataset looks as it is downloaded, for `autosam3d prepare`."""

    __pydantic_config__ = STRICT
    images: str
    """Glob below the source folder, for example ``Training/img/img*.nii.gz``."""
    labels: str
    """Glob of the label maps."""
    case_pattern: str
    """Regular expression with one group, the case id, searched in image and label file names alike."""
    id_range: tuple[int, int] | None = None
    """Only cases whose number lies in first..last; None takes all."""
    test_ids: tuple[str, ...] = ()
    val_ids: tuple[str, ...] = ()
    test_images: str | None = None
    """Glob of a separate test folder, where the dataset has one."""
    test_labels: str | None = None
    label_values: dict[int, str] | None = None
    """Value in the file to organ name or "background"; None where values are already 1..n in recipe order."""
    num_cases: int | None = None
    """How many cases the whole download has, after `id_range`; fewer means that some are missing."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.case_pattern).groups
        except (re.error, RecursionError, OverflowError):
            groups = 0
        demand(groups == 1, "case_pattern", "a regular expression with one group", self.case_pattern)
        for name in ("images", "labels", "test_images", "test_labels"):
            glob = getattr(self, name)
            demand(glob is None or _is_glob_below(glob), name, "a glob below the source folder", glob)
        if self.id_range is not None:
            demand(0 <= self.id_range[0] <= self.id_range[1], "id_range", "first..last", self.id_range)
        demand(min(self.label_values or (0,)) >= 0, "label_values", "values of 0 or more", self.label_values)
        both = sorted(set(self.test_ids) & set(self.val_ids))
        demand(not both, "val_ids", "ids that are not in test_ids", both)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Where cases come from. Training reads the nnU-Net v2 layout; `download` tells `prepare` how to make it."""

    __pydantic_config__ = STRICT
    title: str
    url: str
    layout: str
    """Told to the user when a folder does not look right."""
    download: Download | None = None
    fold: int = 0
    """Which entry of splits_final.json; without that file `val_share` decides."""
    val_share: float = 0.0
    """Share of the training cases held out for validation, chosen by a hash of the case name."""
    background_organs: tuple[str, ...] = ()
    """Organs that the dataset has and the recipe does not want: they become background."""

    def __post_init__(self) -> None:
        demand(self.fold >= 0, "fold", "0 or more", self.fold)
        demand(0 <= self.val_share < 1, "val_share", "0 up to less than 1", self.val_share)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which crops a step sees."""

    __pydantic_config__ = STRICT
    patches_per_volume: int = 1
    """Crops per case and epoch."""
    foreground_share: float = 0.5
    """Share of crops centred on an organ voxel (0.5 = the paper's 1:1); the others fall anywhere."""
    balance_organs: bool = False
    """Foreground centres: first an organ at random, then a voxel of it; False, the paper's way: any voxel of all organs
    of the case alike, so that a liver is drawn hundreds of times as often as an adrenal gland."""
    whole_cases: Literal["required", "optional"] = "required"
    """Where organs are unknown in some cases: refuse cases of which none is fully drawn, since what is no organ at all
    is learnt from those, or go on (datasets that each draw organs of their own)."""

    def __post_init__(self) -> None:
        fits = 1 <= self.patches_per_volume <= 10_000
        demand(fits, "patches_per_volume", "1 to 10000", self.patches_per_volume)
        demand(0 <= self.foreground_share <= 1, "foreground_share", "0 to 1", self.foreground_share)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Probabilities and ranges of the random changes to a training crop (paper, appendix 7.2; ranges MONAI's usual)."""

    __pydantic_config__ = STRICT
    flip_prob: float = 0.1
    """For each axis by itself; an odd number of flips swaps left and right organs by the recipe's pairs."""
    flip_axes: tuple[Literal["z", "y", "x"], ...] = ("z", "y", "x")
    rotate90_prob: float = 0.1
    """Quarter turns in the axial plane."""
    scale_prob: float = 0.2
    scale_range: float = 0.1
    """Intensity times 1 + u, u in -range..range."""
    shift_prob: float = 0.0
    shift_range: float = 0.1
    """Intensity plus u, in normalised units."""
    affine_prob: float = 0.0
    """A small rotation and zoom together (not in the paper; off unless a recipe says so)."""
    rotate_degrees: float = 10.0
    zoom_range: float = 0.1
    noise_prob: float = 0.0
    noise_std: float = 0.02
    """Gaussian noise, in normalised units."""

    def __post_init__(self) -> None:
        for name in ("flip_prob", "rotate90_prob", "scale_prob", "shift_prob", "affine_prob", "noise_prob"):
            demand(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1", getattr(self, name))
        for name in ("scale_range", "zoom_range"):
            demand(0 <= getattr(self, name) < 1, name, "0 up to less than 1", getattr(self, name))
        for name in ("shift_range", "noise_std"):
            demand(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        demand(len(set(self.flip_axes)) == len(self.flip_axes), "flip_axes", "each axis once", self.flip_axes)
        demand(0 <= self.rotate_degrees <= 180, "rotate_degrees", "0 to 180", self.rotate_degrees)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and its schedule; AdamW as in the paper, section 4, unless a recipe says otherwise."""

    __pydantic_config__ = STRICT
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-4
    """Learning rate at the end of the warm-up."""
    head_lr: float = 1.0
    """Times `lr`, for the last layer alone. Its inputs are normalised, so its weights must grow to some units before a
    voxel is sure, while convolutions before a norm only turn."""
    momentum: float = 0.9
    """beta1 of AdamW, the paper's "momentum"; of SGD its momentum."""
    beta2: float = 0.999
    """Of AdamW; SGD has none."""
    nesterov: bool = False
    """Of SGD."""
    weight_decay: float = 1e-5
    decay_all: bool = False
    """Weight decay on norms, biases and position tables, too, as the baselines publish it."""
    schedule: Literal["exp_warmup_poly", "exponential", "constant", "poly", "warmup_cosine"] = "exp_warmup_poly"
    warmup_epochs: int = 5
    """0 for "poly"."""
    per_step: bool = False
    """Follow the schedule within an epoch too; False holds the rate for a whole epoch (the public code)."""
    clip_norm: float = 1.0
    """Gradient norm at most; 0 switches clipping off."""
    ema: float = 0.0
    """Decay per step of an average of the weights that is validated and kept; 0 switches it off."""

    def __post_init__(self) -> None:
        demand(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        demand(self.head_lr > 0 and math.isfinite(self.head_lr), "head_lr", "a positive number", self.head_lr)
        for name in ("momentum", "beta2", "ema"):
            demand(0 <= getattr(self, name) < 1, name, "0 up to less than 1", getattr(self, name))
        demand(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        fits = not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0)
        demand(fits, "nesterov", "false where there is no SGD with momentum", self.nesterov)
        fits = self.schedule != "poly" or self.warmup_epochs == 0
        demand(fits, "warmup_epochs", "0 with the schedule poly", self.warmup_epochs)
        demand(self.warmup_epochs >= 0, "warmup_epochs", "0 or more", self.warmup_epochs)
        demand(self.clip_norm >= 0, "clip_norm", "0 or more", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class Training:
    __pydantic_config__ = STRICT
    epochs: int = 200
    batch_size: int = 1
    """Crops per device and step."""
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the device multiplies bf16 in hardware, else fp32; the loss is always fp32."""
    validate_every: int = 10
    """Epochs between validations; the last epoch is always validated."""
    val_cases: int = 0
    """Validate on the first n validation cases only; 0 takes all."""
    val_overlap: float = 0.25
    """Window overlap in validation, smaller than in `inference` to save time."""
    save_every_steps: int = 200
    """Steps between saves of the training state; every epoch that validates saves too."""
    num_workers: int = 0
    """Processes that load crops; 0 loads in a thread beside the training."""
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    batch_dice: bool = False
    """Pool voxels over the batch, that of all devices, before the Dice ratio; False takes it per crop (MONAI's way)."""
    deep_supervision: bool = False
    """Train coarser levels of the decoder as well, on reduced labels; of the networks nnunet and nnformer. What is
    made for it is in no finished model."""
    freeze_sam: bool = True
    """Keep SAM's weights frozen when they are given; without SAM weights everything is trained."""
    max_nan_steps: int = 5
    """Stop after so many steps in a row whose loss is not finite."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "save_every_steps", "max_nan_steps"):
            demand(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("val_cases", "num_workers", "dice_weight", "ce_weight"):
            demand(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        demand(self.num_workers <= 64, "num_workers", "at most 64", self.num_workers)
        demand(self.batch_size <= 1024, "batch_size", "at most 1024", self.batch_size)
        demand(self.epochs <= 10**6, "epochs", "at most a million", self.epochs)
        demand(0 <= self.seed < 2**63, "seed", "0 up to less than 2**63", self.seed)
        demand(self.dice_weight + self.ce_weight > 0, "dice_weight", "a weight above 0 here or in ce_weight", 0)
        demand(0 <= self.val_overlap <= MAX_OVERLAP, "val_overlap", f"0 to {MAX_OVERLAP}", self.val_overlap)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a student learns from a teacher: ``lambda * (Dice + CE) + (1 - lambda) * T``, T the teacher's term."""

    __pydantic_config__ = STRICT
    label_weight: Annotated[float, Field(alias="lambda")] = 0.5
    """The paper's lambda, written ``lambda`` in recipes: 1 trains on the labels alone, 0 on the teacher alone."""
    loss: Literal["mse", "dice_ce", "kl"] = "mse"
    """The teacher's term: "mse", mean squared differences of probabilities, the paper's (3.6); "dice_ce", Dice and
    cross-entropy against the teacher's probabilities, of the labels' own scale; "kl", the Kullback-Leibler divergence a
    voxel. Which begins small organs, on a toy: benchmarks/results/teaching.md."""
    temperature: float = 1.0
    """Of "kl": both sides are softened by it and the divergence is multiplied by its square."""
    mse_reduction: Literal["mean", "class_sum"] = "mean"
    """Of "mse": the mean over all values, or the sum over the K classes, background included, averaged over
    the voxels, which weighs the teacher K times as much."""
    teacher_probs: Literal["cache", "live"] = "cache"
    """"cache": the teacher sees each scan once, window by window, and its probabilities are kept on disk; "live": it
    sees every augmented crop."""
    teacher_overlap: float = 0.5
    """Window overlap when the cache is filled."""
    teacher_mirror: bool = False
    """Of "cache": each teacher also sees the scan's mirror image, left and right, and the mean counts; takes twice the
    time."""
    min_agreement: float = 0.0
    """Leave out scans without labels on which the teacher's voters (teachers, mirror images) agree less than this: the
    mean Dice of their label maps with one another. 0 keeps all."""

    def __post_init__(self) -> None:
        demand(0 <= self.label_weight <= 1, "lambda", "0 to 1", self.label_weight)
        demand(0 <= self.min_agreement <= 1, "min_agreement", "0 to 1", self.min_agreement)
        fits = self.teacher_probs == "cache" or (self.min_agreement == 0 and not self.teacher_mirror)
        demand(fits, "teacher_probs", "cache with teacher_mirror or min_agreement", self.teacher_probs)
        demand(0.1 <= self.temperature <= 100, "temperature", "0.1 to 100", self.temperature)
        demand(self.temperature == 1 or self.loss == "kl", "temperature", "1 where the loss is not kl",
               self.temperature)
        fits = self.mse_reduction == "mean" or self.loss == "mse"
        demand(fits, "mse_reduction", "mean where the loss is not mse", self.mse_reduction)
        demand(0 <= self.teacher_overlap <= MAX_OVERLAP, "teacher_overlap", f"0 to {MAX_OVERLAP}", self.teacher_overlap)
