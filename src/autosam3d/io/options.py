"""What a caller may ask of the readers beyond the path. Every option is a decision that the reader refuses to take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from autosam3d.errors import UsageError

Intensity = Literal["hu", "raw"]
"""What the numbers of a scan are: Hounsfield units, or another scale, which is taken as it is stored."""
AskedBy = Literal["library", "segment", "evaluate", "recipe", "request", "nobody"]
"""Who can answer what a scan leaves open, and so how a message names the answer."""

_OF_SEGMENT = {
    "prefer": "--prefer", "assume_ras": "--assume-ras", "force": "--force", "volume_index": "--volume",
    "intensity_offset": "--intensity-offset", "series": "--series", "acquisition": "--acquisition",
}
_OF_EVALUATE = {name: _OF_SEGMENT[name] for name in ("prefer", "assume_ras", "force")}
# A recipe tells of a whole dataset, in which every scan is another series.
_OF_RECIPE = {name: f"--set reading.{'volume' if name == 'volume_index' else name}=" for name in
              ("intensity", "intensity_offset", "prefer", "assume_ras", "force", "volume_index", "acquisition")}
_OF_REQUEST = {name: f"{'volume' if name == 'volume_index' else name}=" for name in _OF_SEGMENT}
_OF_LIBRARY = {name: f"{name}=" for name in ("intensity", *_OF_SEGMENT)}
_SPELLED: Mapping[AskedBy, Mapping[str, str]] = {
    "library": _OF_LIBRARY, "segment": _OF_SEGMENT, "evaluate": _OF_EVALUATE, "recipe": _OF_RECIPE,
    "request": _OF_REQUEST, "nobody": {},
}


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Answers to the questions that a scan leaves open; by default none is answered and the reader refuses.

    Where a model or a recipe is at hand, what is not answered here is answered by its section ``reading``.
    """

    intensity: Intensity | None = None
    """What the numbers are; None means Hounsfield units."""
    prefer: Literal["sform", "qform"] | None = None
    """Which of NIfTI's two transforms to believe where they contradict each other or one is broken."""
    assume_ras: bool = False
    """Take a NIfTI file without any orientation as stored right, anterior, superior."""
    force: bool = False
    """Accept implausible spacing, field of view or slice count, and DICOM images that are not marked as CT."""
    intensity_offset: float | None = None
    """Added to every voxel, in HU: -1024 for scans stored as 0..4095; None adds nothing."""
    volume_index: int | None = None
    """Which volume of a 4D NIfTI file, from 0."""
    series: str | None = None
    """DICOM SeriesInstanceUID, or the hash that the SERIES_CHOICE message lists."""
    acquisition: int | None = None
    """Which of several acquisitions in one DICOM series, by its number in the list that ACQUISITION_CHOICE tells."""
    max_ram_bytes: int | None = None
    """Most memory that the whole process may hold while it reads; None takes what the machine and its limits leave
    free."""
    asked_by: AskedBy = "library"
    """Who reads the messages: a remedy names only what they can do."""
    of_dataset: bool = False
    """Whether `volume_index` and `acquisition` tell of a dataset and not of this file, which may hold but one."""

    def __post_init__(self) -> None:
        if self.intensity not in (None, "hu", "raw"):
            raise ValueError(f"intensity: expected hu, raw or None, got {self.intensity!r}")
        if self.prefer not in (None, "sform", "qform"):
            raise ValueError(f"prefer: expected sform, qform or None, got {self.prefer!r}")
        if not math.isfinite(self.offset):
            raise ValueError(f"intensity_offset: expected a finite number, got {self.intensity_offset}")
        if self.is_raw and self.offset:
            raise ValueError(f"intensity_offset: expected none beside the intensity raw, got {self.intensity_offset}")
        if self.volume_index is not None and self.volume_index < 0:
            raise ValueError(f"volume_index: expected 0 or more, got {self.volume_index}")
        if self.max_ram_bytes is not None and self.max_ram_bytes < 0:
            raise ValueError(f"max_ram_bytes: expected 0 or more, got {self.max_ram_bytes}")

    @property
    def is_raw(self) -> bool:
        """Whether the numbers are taken as they are stored."""
        return self.intensity == "raw"

    @property
    def offset(self) -> float:
        """Added to every voxel."""
        return self.intensity_offset or 0.0

    def spelled(self, option: str, value: object) -> str | None:
        """How who asked gives `value` to an option; None where they cannot."""
        name = _SPELLED[self.asked_by].get(option)
        if name is None:
            return None
        if self.asked_by == "library":
            return f"ReadOptions({name}{value!r})"
        text = str(value).lower() if isinstance(value, bool) else value
        if name.endswith("="):
            return f"{name}{text}"
        return name if value is True else f"{name} {text}"

    def remedy(self, option: str, value: object, plain: str, more: str = ", or use {}") -> str:
        """A remedy: `plain`, and `more` behind it where who asked can give `value` to an option.

        Args:
            more: with ``{}`` for the answer as they would write it; without `plain`, all of the remedy.
        """
        answer = self.spelled(option, value)
        return plain if answer is None else plain + more.format(answer)

    def volume_of(self, num_volumes: int) -> int:
        """Which of the volumes of a file is taken."""
        return 0 if num_volumes == 1 or self.volume_index is None else self.volume_index

    def has_volume(self, num_volumes: int) -> bool:
        """Whether a file has the volume that is asked for; one of a single volume has what is said of a dataset."""
        return (self.volume_index or 0) < num_volumes or (num_volumes == 1 and self.of_dataset)

    def no_volume(self, where: str | Path, num_volumes: int) -> UsageError:
        """VOLUME_INDEX, for a file without the volume that is asked for."""
        remedy = self.remedy("volume_index", 0, "name one that it has", ", such as {}")
        return UsageError("VOLUME_INDEX", where, f"expected a volume from 0 to {num_volumes - 1}, got "
                          f"{self.volume_index}", remedy)

    def choose_volume(self) -> str:
        """The remedy for a file of several volumes."""
        return self.remedy("volume_index", "K", "split it into 3D files", ", or choose one with {}, counted from 0")

    def as_settings(self) -> dict[str, Any]:
        """What makes a scan read as it is: equal values, equal voxels. Of a library that knew fewer options, the same.
        """
        whole = asdict(self) | {"intensity_offset": self.offset}
        for name in ("max_ram_bytes", "asked_by", "of_dataset"):
            del whole[name]
        if not self.is_raw:
            del whole["intensity"]
        if self.acquisition is None:
            del whole["acquisition"]
        return whole


DEFAULTS = ReadOptions()
