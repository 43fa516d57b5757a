"""What is asked of a reproduction, checked before anything is planned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from autosam3d.errors import UsageError
from autosam3d.recipes.recipe import load_recipe
from autosam3d.recipes.typed_tree import demand, typed, with_overrides
from autosam3d.studies.reproduce.plan import TARGETS, StudySize, Target

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class StudyKeys:
    """``study.`` of ``--set``: what few ask for."""

    __pydantic_config__ = _STRICT
    more: bool = False
    """Table 3 with ablations that the paper does not have."""
    student: Literal["tiny", "small", "edge"] | None = None
    """Of Table 4; None takes small, for 2core tiny."""
    medsam: str | None = None
    """MedSAM weights, for Table 2; None takes SAM's."""
    photographs: Path | Mapping[str, Path] | None = None
    """For fig1: a folder of photographs, or several, each by the name that the legend shows."""
    by_case: bool = False
    """Test cases as pairs, not cases and organs."""

    def __post_init__(self) -> None:
        if isinstance(self.photographs, Mapping):
            demand(len(self.photographs) > 0, "photographs", "a folder, or names with one each", dict(self.photographs))

    @property
    def pictures(self) -> dict[str, Path]:
        """Shown name of each set of photographs to its folder."""
        if isinstance(self.photographs, Mapping):
            return dict(self.photographs)
        return {} if self.photographs is None else {f"photographs ({self.photographs.name})": self.photographs}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One target, with all that it needs."""

    target: Target
    folders: Sequence[tuple[str, Path]]
    """Recipe and folder of each dataset."""
    out: Path
    size: StudySize = "paper"
    seeds: Sequence[int] = (0,)
    sam: str | None = None
    overrides: Sequence[str] = ()
    """Of the recipes."""
    keys: StudyKeys = field(default_factory=StudyKeys)

    def __post_init__(self) -> None:
        if self.target in ("fig3", "fig4") and len(self.folders) > 1:
            raise UsageError("USAGE", "--data", f"expected one dataset for {self.target}, got {len(self.folders)}",
                             "name one")
        demand_different_recipes(self.folders, self.overrides)

    def demand_inputs(self) -> None:
        """What only the work needs, and not its plan.

        Raises:
            UsageError: USAGE.
        """
        if self.target == "table2" and self.sam is None:
            raise UsageError("USAGE", "--sam", "expected SAM weights: two rows of Table 2 are SAM and MedSAM",
                             "name a file with --sam, and MedSAM's with --set study.medsam=FILE")
        if self.target == "fig1" and (self.sam is None or self.keys.photographs is None):
            missing = "--sam" if self.sam is None else "--set study.photographs"
            raise UsageError("USAGE", missing, "expected SAM weights and a folder of photographs for fig1",
                             "name both")


def target_of(text: str) -> Target:
    """A table or a figure by its name.

    Raises:
        UsageError: USAGE.
    """
    if text not in TARGETS:
        raise UsageError("USAGE", text, f"expected one of {', '.join(TARGETS)}", "name one of these")
    return text


def size_of(text: str) -> StudySize:
    """``paper`` or ``2core``.

    Raises:
        UsageError: USAGE.
    """
    if text not in ("paper", "2core"):
        raise UsageError("USAGE", f"--size {text}", "expected paper or 2core", "name one of these")
    return text


def study_keys(overrides: Iterable[str]) -> StudyKeys:
    """The keys that ``study.KEY=VALUE`` sets.

    Raises:
        RecipeError: OVERRIDE, UNKNOWN_KEY, BAD_VALUE.
    """
    return typed(TypeAdapter(_Keys), with_overrides({}, overrides), "--set").study


@dataclass(frozen=True, kw_only=True)
class _Keys:
    __pydantic_config__ = _STRICT
    study: StudyKeys = field(default_factory=StudyKeys)


def datasets(data: Sequence[Path], default: str) -> list[tuple[str, Path]]:
    """(recipe, folder) of each ``FOLDER`` or ``NAME=FOLDER``.

    Args:
        default: the recipe of a folder without a name.

    Raises:
        UsageError: USAGE, one recipe twice.
    """
    found = []
    for entry in data:
        name, equals, folder = str(entry).partition("=")
        found.append((name, Path(folder)) if equals and not entry.exists() else (default, entry))
    twice = {name for name, _ in found if sum(name == other for other, _ in found) > 1}
    if twice:
        raise UsageError("USAGE", "--data", f"expected each dataset once, got {', '.join(sorted(twice))} twice",
                         "write NAME=FOLDER with the name of the recipe")
    return found


def seeds_of(text: str) -> list[int]:
    """The numbers of ``0,1,2``.

    Raises:
        UsageError: SEEDS.
    """
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise UsageError("SEEDS", f"--seeds {text}", "expected whole numbers with commas between", "write 0,1,2")
    return [int(part) for part in text.split(",")]


def demand_different_recipes(folders: Sequence[tuple[str, Path]], overrides: Sequence[str]) -> None:
    """Refuse datasets whose recipes have one name: their runs would be taken for one another's.

    Raises:
        UsageError: USAGE. As `load_recipe`.
    """
    named: dict[str, str] = {}
    for source, _ in folders:
        name = load_recipe(source, overrides).name
        if name in named:
            raise UsageError("USAGE", "--data", f"expected recipes of different names, got {name!r} in {named[name]} "
                             f"and {source}", "give one of them another name")
        named[name] = source
