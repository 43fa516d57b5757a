"""One case of a dataset, as it lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autosam3d.recipes.reading import Reading


@dataclass(frozen=True)
class Case:
    """One scan, with its truth where it has one.

    Attributes:
        label_path: None for a test case without truth, and for a scan that only a teacher speaks of.
        label_table: value in the label file to the recipe's value, for `labels.remap`; None leaves values alone.
        drawn: values of the organs and super-classes that were looked for; None where every organ was.
        source: name of the dataset that it comes from; empty where there is one only.
        weight: how often it is seen in training, beside a case of weight 1.
        reading: how its files are read; None as the recipe says.
    """

    name: str
    image_path: Path
    label_path: Path | None
    label_table: Mapping[int, int] | None = field(default=None, hash=False)
    drawn: frozenset[int] | None = None
    source: str = ""
    weight: float = 1.0
    reading: Reading | None = None

    @property
    def is_unlabelled(self) -> bool:
        """Whether nothing was looked for in it, so that it has no label map either."""
        return self.label_path is None and self.drawn == frozenset()
