"""How the names of scans and label maps end, the one list of them."""

from __future__ import annotations

from pathlib import Path

IMAGE_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")
"""Of files of one volume; those that begin another one's name come before it."""


def is_image(path: str | Path) -> bool:
    """Whether a name ends as that of a scan or a label map does."""
    return Path(path).name.lower().endswith(IMAGE_ENDINGS)


def image_stem(path: str | Path) -> str:
    """The file name without its ending."""
    name = Path(path).name
    for ending in IMAGE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
