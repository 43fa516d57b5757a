"""Many cases through SAM slice by slice: finished ones are skipped, failures are reported, the rest is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autosam3d.data.folder import Case
from autosam3d.errors import AutoSam3dError
from autosam3d.io import ReadOptions, write_segmentation
from autosam3d.io.files import sha256_of
from autosam3d.io.folders import make_folder
from autosam3d.io.options import DEFAULTS
from autosam3d.labels import LabelMap
from autosam3d.scans.batch import BatchProgress
from autosam3d.scans.outputs import Output, State, refuse_foreign
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import SliceSam
from autosam3d.studies.slicewise.prompts import PromptSpec
from autosam3d.studies.slicewise.slices import TRUTH_NOTE, no_truth, read_case, segment_slices
from autosam3d.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SlicewiseSettings:
    """What decides the labels of a case, beside the model and the case itself."""

    framing: Framing
    prompts: PromptSpec
    read_options: ReadOptions = DEFAULTS

    def as_dict(self) -> dict[str, Any]:
        """As reports hold it."""
        return {"framing": asdict(self.framing), "prompts": asdict(self.prompts),
                "reading": self.read_options.as_settings() | {"max_ram_bytes": None}}


@dataclass
class SlicewiseResult:
    """What became of the cases."""

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    """Outputs that were finished before."""
    failed: list[tuple[str, AutoSam3dError]] = field(default_factory=list)
    slices: int = 0
    """That were segmented now."""
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return len(self.written) + len(self.skipped) + len(self.failed)


def segment_cases(
    cases: Sequence[Case],
    sam: SliceSam,
    out: Path,
    labels: LabelMap,
    settings: SlicewiseSettings,
    *,
    cache: Path | None = None,
    overwrite: bool = False,
    progress: BatchProgress | None = None,
) -> SlicewiseResult:
    """``OUT/CASE.nii.gz`` for each case, on its scan's grid, and ``CASE.report.json``, which says what the truth gave.

    A case whose report names this model, these settings, this scan and truth, and whose output is still the one that
    was written, is skipped: a call that was killed goes on where it stopped.

    Args:
        cases: with truth.
        sam: the model.
        out: the folder of the outputs.
        labels: of the truth and of the outputs.
        settings: pictures, prompts and reading.
        cache: a folder for embeddings, for several prompts or tunings on one encoder; None keeps none.
        overwrite: replace outputs that are not of this very call; without it nothing is begun.
        progress: called with cases, and of the slices of the case at work in the place of windows.

    Returns:
        Also where cases failed.

    Raises:
        UsageError: OUTPUT_EXISTS, OUTPUT_PATH; ResourceError: NOT_WRITABLE.
    """
    make_folder(out)
    model = {"sha256": sam.sha256, "sam_sha256": sam.sam.sha256, "settings": settings.as_dict()}
    outputs = [Output(out / f"{case.name}.nii.gz") for case in cases]
    states: dict[Output, State] = {output: output.state(lambda case=case: _identity(case, model))
                                   for case, output in zip(cases, outputs, strict=True)}
    refuse_foreign(states, overwrite)
    encoder = SliceEncoder(sam, settings.framing, cache)
    result, started = SlicewiseResult(), time.perf_counter()
    for done, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        if progress is not None:
            progress.on_scan(done, len(cases), case.name)
        if states[output] == "finished":
            result.skipped.append(output.path)
            continue
        try:
            result.slices += _segment_case(case, output, encoder, labels, settings, model, progress)
            result.written.append(output.path)
        except AutoSam3dError as error:
            result.failed.append((case.name, error))
            log.info("%s failed: %s", case.name, error.code)
    if progress is not None:
        progress.on_scan(len(cases), len(cases), "")
    result.seconds = time.perf_counter() - started
    return result


def _segment_case(
    case: Case, output: Output, encoder: SliceEncoder, labels: LabelMap, settings: SlicewiseSettings,
    model: dict[str, Any], progress: BatchProgress | None,
) -> int:
    """Number of slices that were segmented."""
    ct, truth = read_case(case, labels, settings.read_options)
    started = time.perf_counter()
    on_slice: Callable[[int, int], None] | None = progress.on_window if progress else None
    made = segment_slices(ct, truth, encoder, settings.prompts, labels, name=case.name, progress=on_slice)

    def write() -> dict[str, Any]:
        write_segmentation(output.path, made.segmentation, labels)
        return {
            "note": TRUTH_NOTE, "truth_gave": ["organs", "slices", "prompts"], "slices": made.slices,
            "prompts_asked": made.prompts, "seconds": round(time.perf_counter() - started, 3),
            "device": str(encoder.sam.device), "torch": torch.__version__, "autosam3d": __version__,
            "warnings": list(ct.warnings),
        }

    output.write(_identity(case, model), write)
    return made.slices


def _identity(case: Case, model: dict[str, Any]) -> dict[str, Any]:
    """What makes an output this one: equal values, equal labels.

    Raises:
        VolumeError: NO_TRUTH, or a file cannot be read.
    """
    if case.label_path is None:
        raise no_truth(case)
    return {"model": model, "input_sha256": sha256_of(case.image_path), "truth_sha256": sha256_of(case.label_path),
            "label_table": sorted((case.label_table or {}).items())}
