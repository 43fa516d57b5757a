"""autosam3d: SAM as an automatic 3D multi-organ CT segmenter.

    model = autosam3d.load_model("runs/openkbp")
    organs = autosam3d.segment(autosam3d.read_ct("scan.nii.gz"), model)
    autosam3d.write_segmentation("organs.nii.gz", organs, model.recipe.labels)

The public surface is `__all__`, and `docs/python-api.md` describes it; what else the package holds may change with any
version.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from autosam3d.version import __version__

if TYPE_CHECKING:
    from autosam3d.checkpoints.checkpoint import LoadedModel, load_model
    from autosam3d.errors import (
        AutoSam3dError,
        BatchError,
        CheckpointError,
        MissingExtraError,
        RecipeError,
        ResourceError,
        UsageError,
        VolumeError,
    )
    from autosam3d.evaluation.evaluate import evaluate_folder
    from autosam3d.evaluation.scores import Evaluation
    from autosam3d.inference.pipeline import segment
    from autosam3d.io import ReadOptions, read_ct, read_segmentation, write_segmentation
    from autosam3d.labels import LabelMap
    from autosam3d.volume import Segmentation, Volume

__all__ = [
    "AutoSam3dError",
    "BatchError",
    "CheckpointError",
    "Evaluation",
    "LabelMap",
    "LoadedModel",
    "MissingExtraError",
    "ReadOptions",
    "RecipeError",
    "ResourceError",
    "Segmentation",
    "UsageError",
    "Volume",
    "VolumeError",
    "__version__",
    "evaluate_folder",
    "load_model",
    "read_ct",
    "read_segmentation",
    "segment",
    "write_segmentation",
]

_HOMES = {
    "AutoSam3dError": "autosam3d.errors",
    "BatchError": "autosam3d.errors",
    "CheckpointError": "autosam3d.errors",
    "Evaluation": "autosam3d.evaluation.scores",
    "LabelMap": "autosam3d.labels",
    "LoadedModel": "autosam3d.checkpoints.checkpoint",
    "MissingExtraError": "autosam3d.errors",
    "ReadOptions": "autosam3d.io",
    "RecipeError": "autosam3d.errors",
    "ResourceError": "autosam3d.errors",
    "Segmentation": "autosam3d.volume",
    "UsageError": "autosam3d.errors",
    "Volume": "autosam3d.volume",
    "VolumeError": "autosam3d.errors",
    "evaluate_folder": "autosam3d.evaluation.evaluate",
    "load_model": "autosam3d.checkpoints.checkpoint",
    "read_ct": "autosam3d.io",
    "read_segmentation": "autosam3d.io",
    "segment": "autosam3d.inference.pipeline",
    "write_segmentation": "autosam3d.io",
}

# Libraries that report their use to their makers are told not to, before anything can import them; with an export of
# ours nothing leaves the machine. ONNX Runtime looks at this variable as it is loaded, and no later call undoes what it
# has begun. OpenVINO and NNCF have stubs for a machine without `openvino_telemetry`, which None here is to them.
# *Source*: onnxruntime/core/platform/telemetry_1ds.cc, openvino/tools/ovc/utils.py, huggingface_hub/constants.py.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if not TYPE_CHECKING:  # a type checker that saw a module's `__getattr__` would believe in every name

    def __getattr__(name: str) -> Any:
        """The public names, imported at their first use: `import autosam3d` alone costs nothing."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public surface and the module's own dunders, sorted."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})
