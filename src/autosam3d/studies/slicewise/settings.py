"""Keys of ``--set`` of the slicewise commands beside the recipe's: `SegmentKeys`, and ``tune.`` for a tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from autosam3d.errors import UsageError
from autosam3d.recipes.settings_file import Words
from autosam3d.recipes.typed_tree import demand, typed, with_overrides
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.prompts import REFERENCE_SIZE, PromptSpec
from autosam3d.studies.slicewise.run import TuneSettings

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class PromptKeys:
    """``prompts.``: as `PromptSpec`, whose kind is an option of the command."""

    __pydantic_config__ = _STRICT
    num_points: int = 0
    jitter_px: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        demand(0 <= self.num_points <= 100, "num_points", "0 to 100", self.num_points)
        demand(0 <= self.jitter_px <= REFERENCE_SIZE, "jitter_px", f"0 to {REFERENCE_SIZE}", self.jitter_px)
        demand(self.seed >= 0, "seed", "0 or more", self.seed)


@dataclass(frozen=True, kw_only=True)
class SegmentKeys:
    """Of ``slicewise segment``."""

    __pydantic_config__ = _STRICT
    cases: Words = ()
    """Only these; none takes all of the part."""
    prompts: PromptKeys = field(default_factory=PromptKeys)

    def prompt_spec(self, kind: Literal["point", "box"]) -> PromptSpec:
        """The prompts of a kind.

        Raises:
            UsageError: USAGE, keys of the other kind.
        """
        keys = self.prompts
        if (keys.num_points and kind == "box") or (keys.jitter_px and kind == "point"):
            raise UsageError("USAGE", "slicewise segment", "expected prompts.num_points with points and "
                             f"prompts.jitter_px with boxes, got --prompt {kind}", "leave the other one out")
        return PromptSpec(kind=kind, num_points=keys.num_points, jitter_px=keys.jitter_px, seed=keys.seed)


SEGMENT_KEYS = ("cases", "prompts")


def tune_settings(overrides: Iterable[str], framing: Framing, prompt: Literal["point", "box"]) -> TuneSettings:
    """The settings of a tuning: the defaults of `TuneSettings` with ``tune.KEY=VALUE`` over them.

    Raises:
        RecipeError: OVERRIDE, UNKNOWN_KEY, BAD_VALUE.
    """
    tree = with_overrides({"tune": {"framing": asdict(framing), "prompt": prompt}}, overrides)
    return typed(TypeAdapter(_Tune), tree, "--set").tune


@dataclass(frozen=True, kw_only=True)
class _Tune:
    __pydantic_config__ = _STRICT
    tune: TuneSettings
