"""One of the datasets that a model learns from: the section ``data`` of a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from autosam3d.recipes.reading import Reading
from autosam3d.recipes.settings import STRICT, demand


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A dataset, what its organs are called, and how often it is seen."""

    __pydantic_config__ = STRICT
    name: str
    """How ``--data NAME=FOLDER``, messages and the model card call it: letters, digits, ``_``, ``-`` and ``.``."""
    path: str | None = None
    """Its folder; ``--data NAME=FOLDER`` goes before it."""
    organs: Mapping[str, str] = field(default_factory=dict)
    """Name in its ``dataset.json`` to the organ or super-class of the recipe that it means, or to ``background`` where
    the model does not learn it. Names that are the recipe's need no entry."""
    drawn: tuple[str, ...] | None = None
    """What was looked for in every case, by the names of ``dataset.json``; None: all that it names, or what
    ``annotated.json`` says of each case. An organ that was not looked for is unknown, not background."""
    weight: float = 1.0
    """How often a case of it is seen, beside one of a dataset of weight 1."""
    reading: Reading | None = None
    """How its files are read; None: as the recipe's ``reading`` says."""

    def __post_init__(self) -> None:
        fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name) is not None
        demand(fits, "name", "1 to 64 letters, digits, _, - or .", self.name)
        demand(0 < self.weight <= 1000 and math.isfinite(self.weight), "weight", "above 0, at most 1000", self.weight)
