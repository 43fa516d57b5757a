"""Which series are segmented: a rule, from a YAML file or from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autosam3d.errors import RecipeError, UsageError
from autosam3d.io.files import open_regular, readable
from autosam3d.recipes.yaml_text import parse_yaml

_MAX_BYTES = 1 << 20
_MAX_TEXT = 256
_MIN_SLICES = 8
# What we write ourselves, and what else is never a scan.
_OWN = ("SEG", "RTSTRUCT")


@dataclass(frozen=True, kw_only=True)
class SeriesFacts:
    """What is known of a series before its images are looked at; texts are never logged."""

    modality: str
    body_part: str = ""
    description: str = ""
    num_instances: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a series must be; what is left empty is not asked."""

    modality: tuple[str, ...] = ("CT",)
    body_part: tuple[str, ...] = ()
    """BodyPartExamined, any of these, without regard to letter case."""
    description: str | None = None
    """Regular expression that is found in SeriesDescription, without regard to letter case."""
    not_description: str | None = None
    """Regular expression that is not found there."""
    min_slices: int = _MIN_SLICES
    max_slices: int = 5000
    min_thickness_mm: float | None = None
    max_thickness_mm: float | None = None

    def __post_init__(self) -> None:
        for name in ("description", "not_description"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except (re.error, RecursionError):
                raise UsageError("RULE", name, "expected a regular expression", "correct it") from None
        if not self.modality or any(m.upper() in _OWN for m in self.modality):
            raise UsageError("RULE", "modality", "expected modalities of scans, such as CT",
                             "results are never segmented again")
        if not 1 <= self.min_slices <= self.max_slices:
            raise UsageError("RULE", "min_slices", f"expected 1 to max_slices, got {self.min_slices} and "
                             f"{self.max_slices}", "correct them")

    @property
    def asks_thickness(self) -> bool:
        return self.min_thickness_mm is not None or self.max_thickness_mm is not None

    def misses(self, facts: SeriesFacts) -> str:
        """Which key a series does not meet, or an empty text."""
        description = facts.description[:_MAX_TEXT]
        if facts.modality.upper() not in (m.upper() for m in self.modality):
            return "modality"
        if self.body_part and facts.body_part.casefold() not in (b.casefold() for b in self.body_part):
            return "body_part"
        if self.description and not re.search(self.description, description, re.IGNORECASE):
            return "description"
        if self.not_description and re.search(self.not_description, description, re.IGNORECASE):
            return "not_description"
        if facts.num_instances is not None and not self.min_slices <= facts.num_instances <= self.max_slices:
            return "min_slices" if facts.num_instances < self.min_slices else "max_slices"
        return ""

    def misses_images(self, images: dict[str, tuple[str, float | None]]) -> str:
        """As `misses`, of (ImageType, SliceThickness) of the images: localizers do not count as slices."""
        slices = [thickness for image_type, thickness in images.values() if "LOCALIZER" not in image_type.upper()]
        if len(slices) < self.min_slices:
            return "min_slices"
        known = [mm for mm in slices if mm is not None]
        if self.asks_thickness and not known:
            return "thickness"
        if self.min_thickness_mm is not None and min(known) < self.min_thickness_mm:
            return "min_thickness_mm"
        if self.max_thickness_mm is not None and max(known) > self.max_thickness_mm:
            return "max_thickness_mm"
        return ""


def read_rule(path: Path) -> Rule:
    """A rule from YAML: the keys of `Rule`, one value or a list where several are allowed.

    Raises:
        RecipeError, UsageError: RULE, YAML. VolumeError: NOT_A_FILE, UNREADABLE.
    """
    with open_regular(path) as file, readable(path):
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise RecipeError("RULE", path, "expected a rule of at most 1 MiB", "name the rule's file")
    try:
        tree = parse_yaml(content.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise RecipeError("RULE", path, "expected UTF-8 text", "name the rule's file") from None
    known = [field.name for field in fields(Rule)]
    strange = [key for key in tree if key not in known]
    if strange:
        raise RecipeError("RULE", path, f"unknown key {str(strange[0])[:60]!r}", f"use {', '.join(known)}")
    return Rule(**{key: _value(key, value, path) for key, value in tree.items()})


def _value(key: str, value: Any, path: Path) -> Any:
    if key in ("modality", "body_part"):
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(v, str) and v for v in values):
            return tuple(values)
        wanted = "a word or a list of words"
    elif key in ("description", "not_description"):
        if isinstance(value, str) and value:
            return value
        wanted = "a regular expression"
    elif key in ("min_slices", "max_slices"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "a whole number"
    else:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1000:
            return float(value)
        wanted = "a length in mm"
    raise RecipeError("RULE", path, f"expected {wanted} for {key}", "correct it")
