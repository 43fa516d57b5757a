"""One scan or a folder of scans: what is finished is skipped, what fails is reported, the rest is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from autosam3d.errors import AutoSam3dError, ResourceError, UsageError, VolumeError
from autosam3d.inference.pipeline import Model, SegmentOptions, begin_segment
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.files import remove_stale_temporaries, sha256_of, write_bytes_atomic, write_text_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.output_formats import NIFTI, OutputFormat, WriteLabels, label_writer
from autosam3d.io.volume_table import organ_volumes
from autosam3d.version import __version__
from autosam3d.volume import Segmentation, Volume

_log = logging.getLogger(__name__)

_NIFTI = (".nii.gz", ".nii")
_ENDINGS = (*_NIFTI, ".dcm")
_MAX_REPORT_BYTES = 1 << 20
# A file name may have 255 bytes at most on every common file system; the longest name beside an output ends so.
_MAX_STEM_BYTES = 255 - len(".report.json")


@dataclass(frozen=True)
class Job:
    """One scan and where its labels go."""

    name: str
    source: Path
    """A NIfTI file, or a folder with a DICOM series."""
    output: Path

    @property
    def report(self) -> Path:
        """What was done, beside the output."""
        return self.output.with_name(f"{_stem(self.output)}.report.json")


@dataclass(frozen=True)
class Failure:
    job: Job
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


def check_inputs(source: Path, output: Path, form: OutputFormat = NIFTI) -> list[Job]:
    """The scans at `source` and the files that their labels go to; nothing is read or written.

    Args:
        source: a NIfTI file, a folder with one DICOM series, or a folder of NIfTI files or of DICOM folders.
        output: a name that ends with .nii.gz or .nii for one scan, else a folder; there a scan ``CASE.nii.gz`` or
            ``CASE_0000.nii.gz`` (nnU-Net's name for the first channel) becomes ``CASE.nii.gz``.
        form: of the outputs; a DICOM object's name ends with .dcm, in a folder with .seg.dcm or .rtstruct.dcm.

    Raises:
        VolumeError: UNREADABLE, no such source, or NO_SCANS, an empty folder.
        UsageError: OUTPUT_NAME, also of one that is too long; SAME_PATH, a scan would be overwritten; DUP_CASE, two
            scans have one name; FORMAT, a NIfTI file cannot become a DICOM object.
    """
    if not os.path.exists(source):  # noqa: PTH110 - unlike Path.exists, no error where no file system has such a name
        raise VolumeError("UNREADABLE", source, "no such file or folder", "check the path")
    scans = scans_in(source, output) if source.is_dir() else [source]
    nifti = next((scan for scan in scans if form.is_dicom and not scan.is_dir()), None)
    if nifti is not None:
        raise UsageError("FORMAT", nifti, f"expected a DICOM series for --format {form.name}, got a file",
                         "name the folder of the series, or use --format nifti")
    is_file = output.name.lower().endswith(form.endings) and not output.is_dir()
    if is_file and len(scans) > 1:
        raise UsageError("OUTPUT_NAME", output, f"expected a folder for {len(scans)} scans, got a file name",
                         "name a folder")
    if not is_file and output.suffix and not output.is_dir() and (
            scans == [source] or output.name.lower().endswith(_ENDINGS)):
        raise UsageError("OUTPUT_NAME", output, "expected a folder or a name that ends with "
                         f"{' or '.join(form.endings)}", "rename the output")
    jobs = [Job(_case_name(scan), scan, output if is_file else output / f"{_case_name(scan)}{form.ending_in_folder}")
            for scan in scans]
    for job in jobs:
        if len(os.fsencode(_stem(job.output))) > _MAX_STEM_BYTES:
            raise UsageError("OUTPUT_NAME", job.output, f"expected a case name of at most {_MAX_STEM_BYTES} bytes",
                             "shorten the name")
    _refuse_same_path(jobs, source)
    _refuse_equal_names(jobs)
    return jobs


def segment_batch(
    jobs: Sequence[Job],
    model: SourcedModel,
    *,
    options: ReadOptions | None = None,
    how: SegmentOptions | None = None,
    form: OutputFormat = NIFTI,
    overwrite: bool = False,
    preview: bool = False,
    progress: BatchProgress | None = None,
) -> BatchResult:
    """Segment one scan after the other with one model.

    Beside ``CASE.nii.gz`` and its label tables stands ``CASE.report.json``: model, settings, hashes, organ volumes,
    warnings. A case whose report names this model, these settings and this scan, and whose output is still the one
    that was written, is skipped; so a batch that was killed goes on where it stopped. With more than one job
    ``batch.jsonl`` says what became of each.

    Args:
        jobs: of `check_inputs`.
        model: is asked for its predictor once per scan.
        options: for reading.
        how: for segmenting.
        form: of the outputs, as `check_inputs` had it.
        overwrite: replace outputs that are there and are not this very batch's; without it nothing is begun.
        preview: also write ``CASE.png``.
        progress: told of scans and windows.

    Returns:
        Also where cases failed; a failure is an `AutoSam3dError`, anything else is a bug and passes through.

    Raises:
        UsageError: OUTPUT_EXISTS.
        ResourceError: NOT_WRITABLE, the output folder, before any work.
    """
    options, how = options or ReadOptions(), how or SegmentOptions()
    if how.max_ram_bytes is not None and options.max_ram_bytes is None:
        options = replace(options, max_ram_bytes=how.max_ram_bytes)
    result = BatchResult(jobs[0].output.parent)
    _demand_writable(result.output)
    run = _Run(model, options, how, preview, form)
    states = {job: run.state(job) for job in jobs if job.output.exists()}
    foreign = [job for job in states if states[job] == "foreign"]
    foreign += [job for job in jobs if job not in states and _has_strange_neighbours(job, preview, form)]
    if foreign and not overwrite:
        raise UsageError("OUTPUT_EXISTS", foreign[0].output, f"it, or a file that goes beside it, exists and is not of "
                         f"this model, scan and settings ({len(foreign)} of {len(jobs)} outputs)",
                         "choose another folder or allow --overwrite")
    try:
        for done, job in enumerate(jobs):
            if progress is not None:
                progress.on_scan(done, len(jobs), job.name)
            if states.get(job) == "finished":
                result.skipped.append(job.output)
                continue
            try:
                run.work(job, progress)
                result.written.append(job.output)
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
class _Run:
    """What all cases of a batch share."""

    model: SourcedModel
    options: ReadOptions
    how: SegmentOptions
    preview: bool
    form: OutputFormat = NIFTI

    def state(self, job: Job) -> str:
        """Of an output that exists: "finished", "begun" (ours, its writer was killed), "foreign", or "unreadable" where
        the scan cannot be read any more."""
        report = _read_report(job.report)
        if not report:
            return "foreign"
        try:
            identity = self._identity(job)
        except (VolumeError, ResourceError):
            return "unreadable"
        if any(report.get(key) != value for key, value in identity.items()):
            return "foreign"
        output_sha256 = sha256_of(job.output)
        if report.get("status") == "writing":
            return "begun" if report.get("replaces_sha256") != output_sha256 else "foreign"
        # Labels that someone has corrected by hand are no longer ours.
        return "finished" if report.get("output_sha256") == output_sha256 else "foreign"

    def work(self, job: Job, progress: BatchProgress | None) -> None:
        volume: Volume | None = read_ct(job.source, self.options)
        identity = self._identity(job)
        write = self._writer(job, volume)
        finish = begin_segment(volume, self.model, self.how)
        if not self.preview:
            volume = None  # its place in memory is what the windows take
        segmentation = finish(progress.on_window if progress else None)
        make_folder(job.output.parent, remedy="choose another output")
        remove_stale_temporaries(job.output.parent)
        # Named as ours before it exists: who is killed between output and report finds it again.
        replaces = _sha256_if_there(job.output)
        old_report = job.report.read_bytes() if job.report.is_file() else None
        _write_report(job.report, identity | {"status": "writing", "replaces_sha256": replaces})
        try:
            found = write(job.output, segmentation, self.model.recipe.labels)
        except BaseException:
            if _sha256_if_there(job.output) == replaces:
                _put_back(job.report, old_report)
            raise
        if volume is not None:
            self._write_preview(job, volume, segmentation)
        segmentation = replace(segmentation, warnings=(*segmentation.warnings, *found))
        findings = self._findings(segmentation) | {"output_sha256": sha256_of(job.output)}
        _write_report(job.report, identity | findings | {"status": "finished"})

    def _writer(self, job: Job, volume: Volume) -> WriteLabels:
        return label_writer(self.form, job.source, volume.source, self.options, self.model.recipe.name,
                            self.model.sha256)

    def _identity(self, job: Job) -> dict[str, Any]:
        """What makes an output this one: equal values, equal labels."""
        tiling = self.how.tiling or self.model.recipe.inference
        settings = asdict(tiling) | {"tta": self.how.tta}
        if self.form is not NIFTI:
            settings["format"] = self.form.name
        settings["reading"] = {k: v for k, v in asdict(self.options).items() if k != "max_ram_bytes"}
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

    def _write_preview(self, job: Job, volume: Volume, segmentation: Segmentation) -> None:
        from autosam3d.evaluation.overlay import overlay_png  # pillow, only where a picture is wanted

        overlay_png(volume, segmentation, job.output.with_name(f"{_stem(job.output)}.png"),
                    labels=self.model.recipe.labels)


def scans_in(folder: Path, output: Path | None = None) -> list[Path]:
    """NIfTI files; else the folder itself where it holds files, else its sub-folders that hold any; sorted.

    Args:
        folder: that exists.
        output: in it, passed over.

    Raises:
        VolumeError: UNREADABLE or NO_SCANS.
    """
    kept = None if output is None else _real(output)
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and _real(p) != kept)
    except OSError as error:
        raise VolumeError("UNREADABLE", folder, f"cannot be listed ({error.strerror})", "check the path") from None
    nifti = [p for p in entries if p.name.lower().endswith(_NIFTI)]
    if nifti:
        # Slices are named after patients often, so none is named here.
        if any(p not in nifti and _is_dicom(p) for p in entries):
            _log.warning("%s: it holds NIfTI files; its DICOM files are passed over", folder)
        return nifti
    if any(p.is_file() for p in entries):
        return [folder]
    scans = [p for p in entries if p.is_dir() and any(f.is_file() for f in p.rglob("*"))]
    if not scans:
        raise VolumeError("NO_SCANS", folder, "expected NIfTI files or DICOM series, got none", "check the path")
    return scans


def _is_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(132)[128:] == b"DICM"
    return False


def _case_name(scan: Path) -> str:
    return _stem(scan if scan.name not in ("", "..") else _real(scan)).removesuffix("_0000")


def _stem(path: Path) -> str:
    for suffix in _ENDINGS:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def _refuse_same_path(jobs: Sequence[Job], source: Path) -> None:
    remedy = "choose another output"
    folder = jobs[0].output.parent
    if source.is_dir() and _real(folder) == _real(source):
        raise UsageError("SAME_PATH", folder, "labels would be written among the scans", remedy)
    for job in jobs:
        if job.source.is_dir() and _real(job.output).is_relative_to(_real(job.source)):
            raise UsageError("SAME_PATH", job.output, "labels would be written into the DICOM series", remedy)
    # A link to nowhere is no scan; reading it will say so.
    scans = {_file_id(job.source) for job in jobs if job.source.exists()}
    for job in jobs:
        if job.output.exists() and _file_id(job.output) in scans:
            raise UsageError("SAME_PATH", job.output, "the scan itself would be overwritten", remedy)


def _real(path: Path) -> Path:
    """Links followed; unlike Path.resolve, links in a circle are left as they are."""
    return Path(os.path.realpath(path))


def _file_id(path: Path) -> tuple[int, int]:
    """The file behind a name, whatever links or letter case lead there."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _refuse_equal_names(jobs: Sequence[Job]) -> None:
    """Names must differ on every file system: also without letter case, and in composed Unicode."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(unicodedata.normalize("NFC", job.name).casefold(), job)
        if other is not job:
            raise UsageError("DUP_CASE", job.source, f"{other.source.name} would get the same output name",
                             "rename or remove one of them")


def _has_strange_neighbours(job: Job, preview: bool, form: OutputFormat) -> bool:
    """Whether a file beside the output-to-be would be replaced that no run of ours has begun to write."""
    beside = [*form.beside, ".report.json", *([".png"] if preview else [])]
    there = any(job.output.with_name(_stem(job.output) + suffix).exists() for suffix in beside)
    return there and "model_sha256" not in _read_report(job.report)


def _demand_writable(folder: Path) -> None:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError("OUTPUT_PATH", there, "expected a folder, got a file", "choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError("NOT_WRITABLE", there, "the folder may not be written to", "choose another output")


def _sha256_if_there(path: Path) -> str | None:
    return sha256_of(path) if path.exists() else None


def _sha256_of_scan(source: Path) -> str:
    """Of the file; of a DICOM folder over its files' hashes in sorted order, so that names do not matter."""
    if not source.is_dir():
        return sha256_of(source)
    try:
        files = [p for p in source.rglob("*") if p.is_file()]
    except OSError as error:
        raise VolumeError("UNREADABLE", source, f"cannot be listed ({error.strerror})", "check the folder") from None
    return hashlib.sha256("".join(sorted(map(sha256_of, files))).encode()).hexdigest()


def _named(error: AutoSam3dError | MemoryError, job: Job) -> AutoSam3dError:
    if isinstance(error, AutoSam3dError):
        return error
    return ResourceError("MEMORY", job.source, f"memory ran out ({error})" if str(error) else "memory ran out",
                         "close other programs, set --max-ram lower, or use a machine with more memory")


def _read_report(path: Path) -> dict[str, Any]:
    """Empty where there is none that can be understood."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size <= _MAX_REPORT_BYTES:
            report = json.loads(path.read_text("utf-8"))
            return report if isinstance(report, dict) else {}
    return {}


def _put_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_bytes_atomic(path, content)


def _write_report(path: Path, content: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def _write_summary(jobs: Sequence[Job], result: BatchResult) -> None:
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
        elif job.output in result.written or job.output in result.skipped:
            line["status"] = "written" if job.output in result.written else "skipped"
        lines.append(json.dumps(line))
    try:
        write_text_atomic(result.output / "batch.jsonl", "\n".join(lines) + "\n")
    except AutoSam3dError as error:
        _log.warning("the report of the batch was not written: %s", error.fault)
