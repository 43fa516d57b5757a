"""How the scans of a dataset are read: a recipe's section ``reading``, which goes with the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from autosam3d.errors import UsageError
from autosam3d.io.options import AskedBy, ReadOptions
from autosam3d.recipes.settings import STRICT, demand


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the scans of a dataset leave open, answered once for training, and for segmenting others of their kind."""

    __pydantic_config__ = STRICT
    intensity: Literal["hu", "raw"] = "hu"
    """What a model is for. hu: Hounsfield units; raw: numbers of another scale, such as MR or a CT that was windowed,
    as they are stored. `preprocess.hu_window` and its neighbours are of that scale then, and no body is looked for.
    Scans of the other kind are refused, in training and by the model."""
    intensity_offset: float = 0.0
    """Added to every voxel to make it HU: -1024 for a CT that is stored from 0."""
    prefer: Literal["sform", "qform"] | None = None
    """Which of NIfTI's two transforms to believe where they disagree or one is broken."""
    assume_ras: bool = False
    """Take axes as right, anterior, superior where a file does not say."""
    force: bool = False
    """Accept implausible geometry, and DICOM images that are not marked as CT."""
    volume: int | None = None
    """Which volume of a 4D file, from 0; files of one volume are taken as they are."""
    acquisition: int | None = None
    """Which of several acquisitions that are woven in one DICOM series; a series of one is taken as it is."""

    def __post_init__(self) -> None:
        fits = math.isfinite(self.intensity_offset) and abs(self.intensity_offset) <= 1e5
        demand(fits, "intensity_offset", "a number of HU, at most 100000 up or down", self.intensity_offset)
        fits = self.intensity == "hu" or self.intensity_offset == 0
        demand(fits, "intensity_offset", "0 with the intensity raw", self.intensity_offset)
        demand(self.volume is None or self.volume >= 0, "volume", "0 or more", self.volume)

    def options(self, asked_by: AskedBy = "recipe") -> ReadOptions:
        """For the scans and label maps of the dataset itself."""
        return self.answers(ReadOptions(asked_by=asked_by))

    def answers(self, given: ReadOptions) -> ReadOptions:
        """`given`, and where it leaves something open, what stands here.

        Raises:
            UsageError: INTENSITY, an offset for a model of raw numbers.
        """
        intensity = given.intensity or self.intensity
        if intensity == "raw" and given.offset:
            where = given.spelled("intensity_offset", f"{given.offset:g}") or "intensity_offset"
            raise UsageError("INTENSITY", where, "expected no offset: the model takes numbers as they are stored "
                             "(reading.intensity: raw)", "leave it out")
        own_offset = self.intensity_offset if intensity == "hu" else 0.0
        is_given = given.volume_index is not None or given.acquisition is not None
        return replace(
            given, intensity=intensity, prefer=given.prefer or self.prefer,
            assume_ras=given.assume_ras or self.assume_ras, force=given.force or self.force,
            intensity_offset=own_offset if given.intensity_offset is None else given.offset,
            volume_index=self.volume if given.volume_index is None else given.volume_index,
            acquisition=self.acquisition if given.acquisition is None else given.acquisition,
            of_dataset=given.of_dataset or not is_given,
        )
