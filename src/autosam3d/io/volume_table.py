"""The volume of each organ, for tables in JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation


@dataclass(frozen=True)
class OrganVolume:
    """One organ of a segmentation."""

    label: int
    organ: str
    voxels: int
    volume_ml: float
    color_rgb: tuple[int, int, int]
    snomed_ct: str | None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in reports and in the answers of the service."""
        return {"label": self.label, "organ": self.organ, "voxels": self.voxels, "volume_ml": self.volume_ml,
                "color_rgb": list(self.color_rgb), "snomed_ct": self.snomed_ct}


def organ_volumes(segmentation: Segmentation, labels: LabelMap) -> list[OrganVolume]:
    """All organs of the model in the order of their labels, those without a voxel, too."""
    counts = np.zeros(max(256, labels.num_outputs), np.int64)
    for plane in segmentation.labels:  # plane by plane, since bincount needs eight bytes a voxel
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    voxel_ml = float(np.prod(segmentation.spacing_mm)) / 1000
    return [OrganVolume(index, name, int(counts[index]), round(float(counts[index]) * voxel_ml, 3), labels.color(index),
                        labels.snomed(index)) for index, name in labels.by_index.items()]


def volumes_csv(organs: Sequence[OrganVolume]) -> str:
    """The table as comma-separated values, with the columns of the browser app."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label", "organ", "voxels", "volume_ml"])
    rows.writerows([o.label, o.organ, o.voxels, f"{o.volume_ml:.3f}"] for o in organs)
    return text.getvalue()
