"""One scan or a folder of scans: what is finished is skipped, what fails is reported, the rest is done."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.inference.pipeline import Model, SegmentOptions, begin_segment
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.files import sha256_of, write_text_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.itk.read import files_of
from autosam3d.io.output_formats import NIFTI, label_writer
from autosam3d.io.room import demand_room
from autosam3d.io.volume_table import organ_volumes
from autosam3d.scans.jobs import BatchJob
from autosam3d.scans.outputs import State, refuse_foreign
from autosam3d.version import __version__
from autosam3d.volume import Segmentation, Volume

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A job that failed, and why."""

    job: BatchJob
    error: AutoSam3dError


@dataclass
class BatchResult:
    """What became of the jobs."""

    output: Path
    """The folder of the outputs."""
    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    """Outputs that were finished before."""
    failed: list[Failure] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.written) + len(self.skipped) + len(self.failed)


class BatchProgress(Protocol):
    def on_scan(self, done: int, total: int, name: str) -> None:
        """Before each scan, and at the end with an empty name."""
        ...

    def on_window(self, done: int, total: int) -> None:
        """After each window of the scan at work."""
        ...


class SourcedModel(Model, Protocol):
    """A model that can be told from others, as `checkpoint.LoadedModel`."""

    @property
    def sha256(self) -> str: ...

    @property
    def runtime(self) -> str: ...


def segment_batch(
    jobs: Sequence[BatchJob],
    model: SourcedModel,
    *,
    read_options: ReadOptions | None = None,
    segment_options: SegmentOptions | None = None,
    overwrite: bool = False,
    preview: bool = False,
    progress: BatchProgress | None = None,
) -> BatchResult:
    """Segment one scan after the other with one model.

    Beside ``CASE.nii.gz`` and its label tables stands ``CASE.report.json``: model, settings, hashes, organ volumes,
    warnings; `scans.outputs` names the reports of other forms. A case whose report names this model, these settings and
    this scan, and whose output is still the one that was written, is skipped; so a batch that was killed goes on where
    it stopped. With more than one job ``batch.jsonl`` says what became of each.

    Args:
        jobs: of `check_inputs`.
        model: is asked for its predictor once per scan.
        read_options: answers to what the scans leave open; the model's recipe answers the rest.
        segment_options: how the windows walk, and within which memory.
        overwrite: replace outputs that are there and are not this very batch's; without it nothing is begun.
        preview: also write a picture, ``CASE.png``.
        progress: called with scans and windows.

    Returns:
        Also where cases failed; a failure is an `AutoSam3dError`, anything else is a bug and passes through.

    Raises:
        UsageError: OUTPUT_EXISTS; INTENSITY, an offset for a model of raw numbers.
        ResourceError: NOT_WRITABLE or NO_SPACE, the output folder, before any work.
    """
    segment_options = segment_options or SegmentOptions()
    read_options = _within(model.recipe.reading.answers(read_options or ReadOptions()), segment_options.max_ram_bytes)
    result = BatchResult(jobs[0].output.path.parent)
    _demand_writable(result.output)
    batch = _Batch(model, read_options, segment_options, preview)
    states: dict[BatchJob, State] = {job: batch.state(job) for job in jobs}
    refuse_foreign({job.output: state for job, state in states.items()}, overwrite)
    try:
        for done, job in enumerate(jobs):
            if progress is not None:
                progress.on_scan(done, len(jobs), job.name)
            if states[job] == "finished":
                job.output.adopt_report()
                result.skipped.append(job.output.path)
                continue
            try:
                batch.work(job, progress)
                result.written.append(job.output.path)
            except (AutoSam3dError, MemoryError) as error:
                result.failed.append(Failure(job, _named(error, job)))
                if len(jobs) > 1:
                    _log.warning("case %d of %d failed: %s", done + 1, len(jobs), result.failed[-1].error.code)
        if progress is not None:
            progress.on_scan(len(jobs), len(jobs), "")
    finally:
        _write_summary(jobs, result)
    return result


@dataclass(frozen=True)
class _Batch:
    """What all cases of a batch share."""

    model: SourcedModel
    read_options: ReadOptions
    segment_options: SegmentOptions
    preview: bool

    def state(self, job: BatchJob) -> State:
        return job.output.state(lambda: self._identity(job), preview=self.preview)

    def work(self, job: BatchJob, progress: BatchProgress | None) -> None:
        volume: Volume | None = read_ct(job.source, self.read_options)
        identity = self._identity(job)
        write = label_writer(job.output.form, job.source, volume.source, self.read_options, self.model.recipe.name,
                             self.model.sha256)
        if job.output.path.name.lower().endswith(".nii"):
            demand_room(job.output.path, math.prod(volume.shape))  # a byte a voxel
        finish = begin_segment(volume, self.model, self.segment_options)
        if not self.preview:
            volume = None  # its place in memory is what the windows take
        segmentation = finish(progress.on_window if progress else None)
        make_folder(job.output.path.parent, remedy="choose another output")

        def write_all() -> dict[str, Any]:
            found = write(job.output.path, segmentation, self.model.recipe.labels)
            if volume is not None:
                self._write_preview(job, volume, segmentation)
            return self._findings(replace(segmentation, warnings=(*segmentation.warnings, *found)))

        job.output.write(identity, write_all)

    def _identity(self, job: BatchJob) -> dict[str, Any]:
        """What makes an output this one: equal values, equal labels."""
        tiling = self.segment_options.tiling or self.model.recipe.inference
        settings = asdict(tiling) | {"tta": self.segment_options.tta}
        if job.output.form is not NIFTI:
            settings["format"] = job.output.form.name
        settings["reading"] = self.read_options.as_settings()
        return {
            "model_sha256": self.model.sha256,
            "recipe_sha256": self.model.recipe.digest(),
            "input_sha256": _sha256_of_scan(job.source),
            "settings": settings,
        }

    def _findings(self, segmentation: Segmentation) -> dict[str, Any]:
        labels = self.model.recipe.labels
        organs = organ_volumes(segmentation, labels)
        return {
            "autosam3d": __version__,
            "recipe": self.model.recipe.name,
            "runtime": self.model.runtime,
            "shape_zyx": list(segmentation.shape),
            "spacing_mm_zyx": [round(mm, 6) for mm in segmentation.spacing_mm],
            "volumes_ml": {organ.organ: organ.volume_ml for organ in organs},
            "confidence": {labels.by_index[k]: round(v, 4) for k, v in segmentation.confidence.items()},
            "warnings": list(segmentation.warnings),
        }

    def _write_preview(self, job: BatchJob, volume: Volume, segmentation: Segmentation) -> None:
        from autosam3d.evaluation.overlay import overlay_png  # pillow, only where a picture is wanted

        overlay_png(volume, segmentation, job.output.preview, labels=self.model.recipe.labels)


def _within(read_options: ReadOptions, max_ram_bytes: int | None) -> ReadOptions:
    """Reading, too, keeps to the limit of segmenting, where it has none of its own."""
    return read_options if read_options.max_ram_bytes is not None else replace(
        read_options, max_ram_bytes=max_ram_bytes)


def _demand_writable(folder: Path) -> None:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError("OUTPUT_PATH", there, "expected a folder, got a file", "choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError("NOT_WRITABLE", there, "the folder may not be written to", "choose another output")
    demand_room(folder)


def _sha256_of_scan(source: Path) -> str:
    """Of the file, or of both files of a .mhd; of a DICOM folder over its files' hashes in sorted order, so that names
    do not matter."""
    if not source.is_dir():
        files = files_of(source)
        if len(files) == 1:
            return sha256_of(source)
        return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    try:
        files = [p for p in source.rglob("*") if p.is_file()]
    except OSError as error:
        raise VolumeError("UNREADABLE", source, f"cannot be listed ({error.strerror})", "check the folder") from None
    return hashlib.sha256("".join(sorted(map(sha256_of, files))).encode()).hexdigest()


def _named(error: AutoSam3dError | MemoryError, job: BatchJob) -> AutoSam3dError:
    if isinstance(error, AutoSam3dError):
        return error
    return ResourceError("MEMORY", job.source, f"memory ran out ({error})" if str(error) else "memory ran out",
                         "close other programs, set --max-ram lower, or use a machine with more memory")


def _write_summary(jobs: Sequence[BatchJob], result: BatchResult) -> None:
    """``batch.jsonl``, a line a case; never the reason for a batch to fail."""
    if len(jobs) < 2 or not result.output.is_dir():
        return
    failures = {failure.job: failure.error for failure in result.failed}
    lines = []
    for job in jobs:
        line = {"case": job.name, "status": "not begun"}
        if job in failures:
            error = failures[job]  # without `where`: reports name no folders
            line |= {"status": "failed", "code": error.code, "fault": error.fault, "remedy": error.remedy}
        elif job.output.path in result.written or job.output.path in result.skipped:
            line["status"] = "written" if job.output.path in result.written else "skipped"
        lines.append(json.dumps(line))
    try:
        write_text_atomic(result.output / "batch.jsonl", "\n".join(lines) + "\n")
    except AutoSam3dError as error:
        _log.warning("the report of the batch was not written: %s", error.fault)
