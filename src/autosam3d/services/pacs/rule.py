"""Which series are segmented: a rule, from a YAML file or from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict

from autosam3d.recipes.settings_file import Words, read_settings
from autosam3d.recipes.typed_tree import demand

_MAX_TEXT = 256
_MIN_SLICES = 8
# Modalities that this service writes itself, which are never scans.
_OWN = ("SEG", "RTSTRUCT")


@dataclass(frozen=True, kw_only=True)
class SeriesFacts:
    """What the archive's index says of a series; these texts are never logged."""

    modality: str
    body_part: str = ""
    description: str = ""
    num_instances: int | None = None


@dataclass(frozen=True)
class ImageFacts:
    """What is said of one image."""

    image_type: str
    """With backslashes between its words."""
    thickness_mm: float | None
    num_frames: int = 1
    """Each is a slice."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a series must be to be segmented; an empty key is not tested."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    modality: Words = ("CT",)
    body_part: Words = ()
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
            demand(pattern is None or _is_pattern(pattern), name, "a regular expression", pattern)
        for name in ("modality", "body_part"):
            demand(all(getattr(self, name)), name, "a word or a list of words", getattr(self, name))
        scans = bool(self.modality) and not any(m.upper() in _OWN for m in self.modality)
        demand(scans, "modality", "modalities of scans, such as CT, since results are never segmented again",
               self.modality)
        demand(self.min_slices >= 1, "min_slices", "1 or more", self.min_slices)
        demand(self.max_slices >= self.min_slices, "max_slices", f"{self.min_slices} (min_slices) or more",
               self.max_slices)
        for name in ("min_thickness_mm", "max_thickness_mm"):
            mm = getattr(self, name)
            demand(mm is None or 0 < mm < 1000, name, "more than 0 and less than 1000 mm", mm)

    @property
    def narrows(self) -> bool:
        """Whether it asks for more than a modality: no model is made for every CT."""
        return replace(self, modality=("CT",)) != Rule()

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

    def misses_images(self, images: Iterable[ImageFacts]) -> str:
        """As `misses`, for the images. Localizers do not count as slices."""
        slices = [image for image in images if "LOCALIZER" not in image.image_type.upper()]
        if sum(image.num_frames for image in slices) < self.min_slices:
            return "min_slices"
        known = [image.thickness_mm for image in slices if image.thickness_mm is not None]
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
        RecipeError: the file cannot be read as YAML; UNKNOWN_KEY, BAD_VALUE.
    """
    return read_settings(Rule, path, guide="docs/pacs.md")


def _is_pattern(text: str) -> bool:
    try:
        return bool(text) and re.compile(text) is not None
    except (re.error, RecursionError, OverflowError):
        return False
