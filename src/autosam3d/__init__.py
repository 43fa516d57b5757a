"""autosam3d: SAM as an automatic 3D multi-organ CT segmenter.

    model = autosam3d.load_model("runs/openkbp")
    organs = autosam3d.segment(autosam3d.read_ct("scan.nii.gz"), model)
    autosam3d.write_segmentation("organs.nii.gz", organs, model.recipe.labels)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosam3d.checkpoints.checkpoint import load_model
    from autosam3d.inference.pipeline import segment
    from autosam3d.io import read_ct, read_segmentation, write_segmentation
    from autosam3d.volume import Segmentation, Volume

__version__ = "0.1.0"
__all__ = ["Segmentation", "Volume", "load_model", "read_ct", "read_segmentation", "segment", "write_segmentation"]

_HOMES = {
    "Segmentation": "autosam3d.volume",
    "Volume": "autosam3d.volume",
    "load_model": "autosam3d.checkpoints.checkpoint",
    "read_ct": "autosam3d.io",
    "read_segmentation": "autosam3d.io",
    "segment": "autosam3d.inference.pipeline",
    "write_segmentation": "autosam3d.io",
}


def __getattr__(name: str) -> Any:
    """The public names, imported at their first use: `import autosam3d` alone costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
