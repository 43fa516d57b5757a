"""Many cases through SAM slice by slice: finished ones are skipped, failures are told, the rest is done."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autosam3d.data.folder import Case
from autosam3d.errors import AutoSam3dError, UsageError
from autosam3d.io import ReadOptions, write_segmentation
from autosam3d.io.files import remove_stale_temporaries, sha256_of, write_text_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.options import DEFAULTS
from autosam3d.labels import LabelMap
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import SliceSam
from autosam3d.studies.slicewise.prompts import PromptSpec
from autosam3d.studies.slicewise.slices import TRUTH_NOTE, read_case, segment_slices
from autosam3d.version import __version__

log = logging.getLogger(__name__)

_MAX_REPORT_BYTES = 1 << 20


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
    *,
    framing: Framing,
    prompts: PromptSpec,
    labels: LabelMap,
    cache: Path | None = None,
    overwrite: bool = False,
    options: ReadOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
    on_slice: Callable[[int, int], None] | None = None,
) -> SlicewiseResult:
    """``OUT/CASE.nii.gz`` for each case, on its scan's grid, and ``CASE.report.json``, which says what the truth gave.

    A case whose report names this model, these settings, this scan and truth, and whose output is still the one that
    was written, is skipped: a call that was killed goes on where it stopped.

    Args:
        cases: with truth.
        cache: a folder for embeddings, for several prompts or tunings on one encoder; None keeps none.
        overwrite: replace outputs that are not of this very call; without it nothing is begun.
        progress: called with (done, total) cases; `on_slice` with those of the case at work.

    Returns:
        Also where cases failed.

    Raises:
        UsageError: OUTPUT_EXISTS, OUTPUT_PATH; ResourceError: NOT_WRITABLE.
    """
    make_folder(out)
    remove_stale_temporaries(out)
    settings = {"framing": asdict(framing), "prompts": asdict(prompts), "reading": asdict(options)}
    model = {"sha256": sam.sha256, "sam_sha256": sam.sam.sha256, "settings": settings}
    outputs = {case: out / f"{case.name}.nii.gz" for case in cases}
    states = {case: _state(case, path, model) for case, path in outputs.items()}
    foreign = [case for case in cases if states[case] == "foreign"]
    if foreign and not overwrite:
        raise UsageError("OUTPUT_EXISTS", outputs[foreign[0]], f"it, or its report, exists and is not of this model, "
                         f"case and settings ({len(foreign)} of {len(cases)} outputs)",
                         "choose another folder or allow --overwrite")
    encoder = SliceEncoder(sam, framing, cache)
    result, started = SlicewiseResult(), time.perf_counter()
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases))
        if states[case] == "finished":
            result.skipped.append(outputs[case])
            continue
        try:
            result.slices += _segment_case(case, encoder, outputs[case], model, prompts, labels, options, on_slice)
            result.written.append(outputs[case])
        except AutoSam3dError as error:
            result.failed.append((case.name, error))
            log.info("%s failed: %s", case.name, error.code)
    if progress is not None:
        progress(len(cases), len(cases))
    result.seconds = time.perf_counter() - started
    return result


def _segment_case(
    case: Case, encoder: SliceEncoder, output: Path, model: dict[str, Any], prompts: PromptSpec, labels: LabelMap,
    options: ReadOptions, on_slice: Callable[[int, int], None] | None,
) -> int:
    """Number of slices that were segmented."""
    ct, truth = read_case(case, labels, options)
    started = time.perf_counter()
    made = segment_slices(ct, truth, encoder, prompts, labels, name=case.name, progress=on_slice)
    identity = _identity(case, model)
    # Named as ours before it exists: who is killed between output and report finds it again.
    _write_report(output, identity | {"status": "writing"})
    try:
        write_segmentation(output, made.segmentation, labels)
    except BaseException:
        if not output.exists():
            _report_path(output).unlink(missing_ok=True)
        raise
    _write_report(output, identity | {
        "status": "finished", "note": TRUTH_NOTE, "truth_gave": ["organs", "slices", "prompts"],
        "slices": made.slices, "prompts_asked": made.prompts, "seconds": round(time.perf_counter() - started, 3),
        "device": str(encoder.sam.device), "torch": torch.__version__, "autosam3d": __version__,
        "warnings": list(ct.warnings), "output_sha256": sha256_of(output),
    })
    return made.slices


def _identity(case: Case, model: dict[str, Any]) -> dict[str, Any]:
    assert case.label_path is not None
    tables = sorted((case.label_table or {}).items())
    whole = {"model": model, "input_sha256": sha256_of(case.image_path), "truth_sha256": sha256_of(case.label_path),
             "label_table": tables}
    return json.loads(json.dumps(whole))  # as it will be read


def _state(case: Case, output: Path, model: dict[str, Any]) -> str:
    """Of what lies at `output`: "absent", "finished", "begun" (ours, its writer was killed) or "foreign"."""
    report = _report_path(output)
    if not output.exists() and not report.exists():
        stem = report.name.removesuffix(".report.json")
        strangers = any(output.with_name(stem + suffix).exists() for suffix in (".json", ".labels.txt", ".ctbl"))
        return "foreign" if strangers else "absent"
    try:
        if report.stat().st_size > _MAX_REPORT_BYTES:
            return "foreign"
        told = json.loads(report.read_text("utf-8"))
        identity = _identity(case, model) if case.label_path is not None else {}
        if not identity or any(told.get(key) != value for key, value in identity.items()):
            return "foreign"
        if told.get("status") == "writing" or not output.exists():
            return "begun"
        return "finished" if told.get("output_sha256") == sha256_of(output) else "foreign"
    except (OSError, ValueError, AttributeError, RecursionError):
        return "foreign"


def _report_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".nii.gz") + ".report.json")


def _write_report(output: Path, content: dict[str, Any]) -> None:
    write_text_atomic(_report_path(output), json.dumps(content, indent=1) + "\n")
