"""What a caller may ask of the readers beyond the path. Every option is a decision that the reader refuses to take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Answers to the questions that a scan leaves open; by default none is answered and the reader refuses."""

    prefer: Literal["sform", "qform"] | None = None
    """Which of NIfTI's two transforms to believe where they contradict each other or one is broken."""
    assume_ras: bool = False
    """Take a NIfTI file without any orientation as stored right, anterior, superior."""
    force: bool = False
    """Accept implausible spacing, field of view or slice count, and DICOM images that are not marked as CT."""
    intensity_offset: float = 0.0
    """Added to every voxel, in HU: -1024 for scans stored as 0..4095."""
    volume_index: int | None = None
    """Which volume of a 4D NIfTI file, from 0."""
    series: str | None = None
    """DICOM SeriesInstanceUID, or the hash that the SERIES_CHOICE message lists."""
    acquisition: int | None = None
    """Which of several acquisitions in one DICOM series, by its number in the list that ACQUISITION_CHOICE tells."""
    max_ram_bytes: int | None = None
    """Most memory that the whole process may hold while it reads; None takes what the machine and its limits leave
    free."""

    def __post_init__(self) -> None:
        if self.prefer not in (None, "sform", "qform"):
            raise ValueError(f"prefer: expected sform, qform or None, got {self.prefer!r}")
        if not math.isfinite(self.intensity_offset):
            raise ValueError(f"intensity_offset: expected a finite number, got {self.intensity_offset}")
        if self.volume_index is not None and self.volume_index < 0:
            raise ValueError(f"volume_index: expected 0 or more, got {self.volume_index}")
        if self.max_ram_bytes is not None and self.max_ram_bytes < 0:
            raise ValueError(f"max_ram_bytes: expected 0 or more, got {self.max_ram_bytes}")


DEFAULTS = ReadOptions()
