"""The messages between a worker process and the process that started it: a line of JSON each, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autosam3d.errors import AutoSam3dError, CheckpointError, ResourceError, UsageError, VolumeError
from autosam3d.io.volume_table import OrganVolume
from autosam3d.scans.batch import SourcedModel
from autosam3d.services.workers.scan import ScanResult

MAX_LINE = 1 << 20
_ERRORS: Mapping[int, type[AutoSam3dError]] = {
    2: UsageError, 3: VolumeError, 4: CheckpointError, 5: ResourceError,
}
# The reader quotes the first bytes of a file that is no image; they may be of a private document.
_QUOTED = "bytes that begin with"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How worker processes run; the same for all of a service."""

    model: Path | None = None
    """As for `scans.open_model.open_model`; None takes the one of the package."""
    sam: str | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int = 1
    max_ram_bytes: int | None = None
    """Most memory that a worker may hold; None sets no limit. A scan whose estimate is higher is refused before it is
    segmented; where the estimate was too low, the worker ends and the service goes on."""
    job_seconds: float = 3600.0
    """A scan that takes longer is given up."""
    start_seconds: float = 600.0
    """A model that takes longer to load (and, the first time, to export) is given up."""
    scratch: Path | None = None
    """Folder for temporary files; None takes the system's."""

    def as_dict(self) -> dict[str, Any]:
        paths = {name: None if (path := getattr(self, name)) is None else os.fspath(path)
                 for name in ("model", "scratch")}
        return asdict(self) | paths

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> WorkerSettings:
        paths = {name: None if message[name] is None else Path(message[name]) for name in ("model", "scratch")}
        return cls(**{**message, **paths})


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that a worker has loaded."""

    name: str
    """Of its recipe."""
    sha256: str
    runtime: str
    organs: tuple[str, ...]
    """In the order of their labels, from 1."""
    side_pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model: SourcedModel) -> ModelFacts:
        labels = model.recipe.labels
        return cls(name=model.recipe.name, sha256=model.sha256, runtime=model.runtime, organs=labels.organs,
                   side_pairs=labels.side_pairs)

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> ModelFacts:
        pairs = tuple(map(tuple, message["side_pairs"]))
        return cls(**{**message, "organs": tuple(message["organs"]), "side_pairs": pairs})


def error_message(error: AutoSam3dError, private: Iterable[Path]) -> dict[str, Any]:
    """An error as a message, without its `where`, which may name a patient.

    Args:
        private: paths that no text may name.
    """
    fault = without_paths(error.fault, private)
    if _QUOTED in fault:
        fault = fault[: fault.index(_QUOTED)] + "other bytes"
    return {"exit_code": error.exit_code, "code": error.code, "where": "model" if error.exit_code == 4 else "scan",
            "fault": fault, "remedy": without_paths(error.remedy, private)}


def error_from(message: Mapping[str, Any]) -> AutoSam3dError:
    """The error that `error_message` describes, of the class that belongs to its exit code."""
    kind = _ERRORS.get(message["exit_code"], ResourceError)
    return kind(message["code"], message["where"], message["fault"], message["remedy"])


def without_paths(text: str, private: Iterable[Path]) -> str:
    for path in private:
        for name in (os.fspath(path), os.path.realpath(path)):
            if len(name) > 1:
                text = text.replace(name, "scan")
    return text


def result_message(result: ScanResult, private: Iterable[Path]) -> dict[str, Any]:
    private = list(private)
    return {
        "files": {form: path.name for form, path in result.files.items()},
        "refused": {form: error_message(error, private) for form, error in result.refused.items()},
        "organs": [organ.as_dict() for organ in result.organs],
        "shape_zyx": list(result.shape_zyx),
        "spacing_mm_zyx": list(result.spacing_mm_zyx),
        "warnings": [without_paths(warning, private) for warning in result.warnings],
        "from_dicom": result.from_dicom,
    }


def result_from(message: Mapping[str, Any], folder: Path) -> ScanResult:
    """The result that `result_message` describes, with its files in the job's `folder`."""
    organs = [OrganVolume(**{**organ, "color_rgb": tuple(organ["color_rgb"])}) for organ in message["organs"]]
    return ScanResult(
        files={form: folder / Path(name).name for form, name in message["files"].items()},
        refused={form: error_from(error) for form, error in message["refused"].items()},
        organs=organs,
        shape_zyx=tuple(message["shape_zyx"]),  # type: ignore[arg-type]
        spacing_mm_zyx=tuple(message["spacing_mm_zyx"]),  # type: ignore[arg-type]
        warnings=tuple(message["warnings"]),
        from_dicom=message["from_dicom"],
    )
