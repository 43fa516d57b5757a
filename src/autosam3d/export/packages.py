"""The Python packages that write an export and run it: which are installed, in which versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

from autosam3d.checkpoints.exported import BACKENDS, PACKAGE_OF, RUNTIMES
from autosam3d.errors import MissingExtraError

_WRITERS = {"litert": "litert_torch", "executorch": "executorch", "coreml": "coremltools"}
"""Mobile target to the package that writes it."""


def missing_packages() -> list[str]:
    """Those of the extra `export` that are not installed."""
    return [name for name in ("onnx", "onnxscript", *BACKENDS) if importlib.util.find_spec(name) is None]


def demand_packages(targets: Sequence[str]) -> None:
    """Refuse an export whose files could not be written or run here.

    Raises:
        MissingExtraError: MISSING_EXTRA, with the command that installs what is missing.
    """
    for where, extra, missing in (
        ("export", "export", missing_packages()),
        *((target, "mobile", [name for name in _packages(target) if importlib.util.find_spec(name) is None])
          for target in targets),
    ):
        if missing:
            raise MissingExtraError("MISSING_EXTRA", where, f"expected the packages {', '.join(missing)}, got none",
                                    f'pip install "autosam3d[{extra}]"')


def package_versions(mobile: Sequence[str]) -> dict[str, str]:
    """Package to version: what wrote and ran an export, also for its `mobile` targets."""
    names = ["onnx", "onnxscript", *BACKENDS, *(name for target in mobile for name in _packages(target))]
    return {name: importlib.metadata.version(name) for name in names}


def _packages(target: str) -> list[str]:
    """What writes a mobile target and, where something does, what runs it."""
    return list(dict.fromkeys([_WRITERS[target], *([PACKAGE_OF[target]] if target in RUNTIMES else [])]))
