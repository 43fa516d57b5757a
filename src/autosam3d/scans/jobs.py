"""What a user named as scans to be segmented, as jobs: which scans there are, where labels go, what is refused."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import UsageError, VolumeError
from autosam3d.io.output_formats import NIFTI, OutputFormat
from autosam3d.scans.found import case_names, scans_in
from autosam3d.scans.outputs import ENDINGS, REPORT, Output

# A file name may have 255 bytes at most on every common file system; the longest name beside an output ends so.
_MAX_STEM_BYTES = 255 - len(REPORT)


@dataclass(frozen=True)
class BatchJob:
    """One scan and where its labels go."""

    name: str
    source: Path
    """A NIfTI, NRRD or MetaImage file, or a folder with a DICOM series."""
    output: Output


def check_inputs(source: Path, output: Path, form: OutputFormat = NIFTI) -> list[BatchJob]:
    """The scans at `source` and the files that their labels go to; nothing is read or written.

    Args:
        source: a NIfTI, NRRD or MetaImage file, a folder with one DICOM series, or a folder of such files and folders,
            at any depth.
        output: a name that ends with .nii.gz or .nii for one scan, else a folder; there a scan ``CASE.nii.gz`` or
            ``CASE_0000.nii.gz`` (nnU-Net's name for the first channel) or ``CASE/ct.nii.gz`` becomes ``CASE.nii.gz``.
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
            scans == [source] or output.name.lower().endswith(ENDINGS)):
        raise UsageError("OUTPUT_NAME", output, "expected a folder or a name that ends with "
                         f"{' or '.join(form.endings)}", "rename the output")
    jobs = [BatchJob(name, scan, Output(output if is_file else output / f"{name}{form.ending_in_folder}", form))
            for scan, name in zip(scans, case_names(scans, source), strict=True)]
    for job in jobs:
        if len(os.fsencode(job.output.side_stem)) > _MAX_STEM_BYTES:
            raise UsageError("OUTPUT_NAME", job.output.path, f"expected a case name of at most {_MAX_STEM_BYTES} bytes",
                             "shorten the name")
    _refuse_same_path(jobs, source)
    _refuse_equal_names(jobs)
    return jobs


def _refuse_same_path(jobs: Sequence[BatchJob], source: Path) -> None:
    remedy = "choose another output"
    folder = jobs[0].output.path.parent
    if source.is_dir() and _real(folder) == _real(source):
        raise UsageError("SAME_PATH", folder, "labels would be written among the scans", remedy)
    for job in jobs:
        if job.source.is_dir() and _real(job.output.path).is_relative_to(_real(job.source)):
            raise UsageError("SAME_PATH", job.output.path, "labels would be written into the DICOM series", remedy)
    # A link to nowhere is no scan; reading it will say so.
    scans = {_file_id(job.source) for job in jobs if job.source.exists()}
    for job in jobs:
        if job.output.path.exists() and _file_id(job.output.path) in scans:
            raise UsageError("SAME_PATH", job.output.path, "the scan itself would be overwritten", remedy)


def _real(path: Path) -> Path:
    """Links followed; unlike Path.resolve, links in a circle are left as they are."""
    return Path(os.path.realpath(path))


def _file_id(path: Path) -> tuple[int, int]:
    """The file behind a name, whatever links or letter case lead there."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _refuse_equal_names(jobs: Sequence[BatchJob]) -> None:
    """Names must differ on every file system: also without letter case, and in composed Unicode."""
    seen: dict[str, BatchJob] = {}
    for job in jobs:
        other = seen.setdefault(unicodedata.normalize("NFC", job.name).casefold(), job)
        if other is not job:
            raise UsageError("DUP_CASE", job.source, f"{other.source.name} would get the same output name",
                             "rename or remove one of them")
