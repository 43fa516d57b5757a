"""Label maps that are stored as a mask an organ, read as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.evaluation.found import masks_in
from autosam3d.io import ReadOptions, read_segmentation
from autosam3d.io.endings import image_stem
from autosam3d.io.grid import demand_same_grid
from autosam3d.volume import Segmentation


def read_labels(path: Path, options: ReadOptions) -> Segmentation:
    """A label map from its file, or from a folder with one mask an organ, named after it.

    Args:
        path: of the file or the folder.
        options: answers to what the files leave open.

    Returns:
        Of a folder, organs counted from 1 in the order of the files' names. A voxel of several masks is of the last of
        them; how many there are is a warning.

    Raises:
        VolumeError: NOT_MASK, a mask with several values; SHAPE or AFFINE_MISMATCH between two masks; and what
            `read_segmentation` raises.
    """
    if not path.is_dir():
        return read_segmentation(path, options)
    files = masks_in(path)
    labels, first, twice, warnings = None, None, 0, []
    for number, file in enumerate(files, start=1):
        mask = read_segmentation(file, options)
        values = np.unique(mask.labels[mask.labels > 0])
        if len(values) > 1:
            raise VolumeError("NOT_MASK", file, "expected the mask of one organ, 0 and one other value, got values "
                              f"{', '.join(map(str, values[:5]))}", "give one label map a case, or one mask an organ")
        if labels is None or first is None:
            first, labels = mask, np.zeros(mask.labels.shape, np.uint8 if len(files) < 256 else np.uint16)
        warnings += [w for w in (*mask.warnings, *demand_same_grid(mask, file, first, "the other masks"))
                     if w not in warnings]
        inside = mask.labels > 0
        twice += int(np.count_nonzero(labels[inside]))
        labels[inside] = number
    if first is None or labels is None:
        raise VolumeError("UNREADABLE", path, "expected a mask an organ, got none", "check the folder")
    if twice:
        warnings.append(f"{twice} voxels are in several masks and count for the last of them by name")
    organs = {number: image_stem(file) for number, file in enumerate(files, start=1)}
    return Segmentation(labels, first.affine, first.source, organs, tuple(warnings))
