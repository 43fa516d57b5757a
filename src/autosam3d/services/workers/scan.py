"""From one scan to all files that were asked for, segmented once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autosam3d.axes import Size
from autosam3d.errors import AutoSam3dError, UsageError
from autosam3d.geometry.patches import Tiling
from autosam3d.inference.pipeline import SegmentOptions, begin_segment
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.dicom.archive import unpacked_scan
from autosam3d.io.files import write_text_atomic
from autosam3d.io.output_formats import OutputFormat, WriteLabels, label_writer, output_format
from autosam3d.io.volume_table import OrganVolume, organ_volumes, volumes_csv
from autosam3d.scans.batch import SourcedModel
from autosam3d.version import __version__
from autosam3d.volume import Volume

FILE_OF: Mapping[str, str] = {
    "nifti": "segmentation.nii.gz",
    "seg": "segmentation.seg.dcm",
    "seg-labelmap": "segmentation.labelmap.seg.dcm",
    "rtstruct": "segmentation.rtstruct.dcm",
    "json": "volumes.json",
    "csv": "volumes.csv",
}
"""Form of a result to its file's name in a job's folder."""
FORMS = tuple(FILE_OF)
_TABLES = ("json", "csv")
SCRATCH = ".unpacked"
"""Name of the folder in a job's folder into which a zip is unpacked while it is read."""

ScanProgress = Callable[[str, int, int], None]
"""Called with the stage ("reading", "segmenting", "writing"), the steps of it that are done, and their number."""


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """A scan to be segmented, and the files to be made from it."""

    source: Path
    """A NIfTI file, a folder with a DICOM series, or a zip with either."""
    folder: Path
    """Existing folder for the files; nothing else writes there."""
    forms: tuple[str, ...] = ("nifti", "json")
    """Some of `FORMS`. DICOM forms can be made from DICOM series alone."""
    read_options: ReadOptions = field(default_factory=ReadOptions)
    """What they leave open the model's recipe answers."""
    overlap: float | None = None
    """Of the windows; None takes the recipe's."""
    tta: bool = False
    uid_settings: str | None = None
    """Text from which the UIDs of DICOM objects are derived, instead of the labels; see `io.dicom.source.Algorithm`."""

    def __post_init__(self) -> None:
        unknown = [form for form in self.forms if form not in FILE_OF]
        if unknown or not self.forms:
            raise ValueError(f"forms: expected some of {', '.join(FORMS)}, got {list(self.forms)}")
        if self.overlap is not None and not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap: expected 0 to 0.9, got {self.overlap}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"source": os.fspath(self.source), "folder": os.fspath(self.folder)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScanJob:
        return cls(source=Path(values["source"]), folder=Path(values["folder"]), forms=tuple(values["forms"]),
                   read_options=ReadOptions(**values["read_options"]), overlap=values["overlap"], tta=values["tta"],
                   uid_settings=values["uid_settings"])


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """The files and measurements of a segmented scan."""

    files: dict[str, Path]
    """Form to file."""
    refused: dict[str, AutoSam3dError]
    """Form to the reason why this scan cannot have it, such as a DICOM object from slices without UIDs."""
    organs: list[OrganVolume]
    shape_zyx: Size
    spacing_mm_zyx: tuple[float, float, float]
    warnings: tuple[str, ...]
    from_dicom: bool


def segment_scan(job: ScanJob, model: SourcedModel, progress: ScanProgress | None = None,
                 max_ram_bytes: int | None = None) -> ScanResult:
    """Read, segment once, write every form.

    Each file is whole or absent. A form that the scan cannot have is refused before the segmentation; the others are
    made all the same.

    Args:
        job: the scan.
        model: that segments it.
        progress: called for every window and file.
        max_ram_bytes: most memory that this process may hold; None takes what is free.

    Raises:
        AutoSam3dError: as `read_ct`, `unpacked_scan` and `begin_segment`; as `label_writer` where no form can be made.
    """
    tell = progress or (lambda stage, done, total: None)
    segment_options = _segment_options(job, model, max_ram_bytes)
    tell("reading", 0, 1)
    with unpacked_scan(job.source, job.folder / SCRATCH) as source:
        read_options = replace(model.recipe.reading.answers(job.read_options), max_ram_bytes=max_ram_bytes)
        volume: Volume | None = read_ct(source, read_options)
        from_dicom = volume.source is not None and volume.source.kind == "dicom"
        writers, refused = _writers(job, source, volume, read_options, model)
        finish = begin_segment(volume, model, segment_options)
        volume = None  # frees the memory that the windows need
        tell("segmenting", 0, 1)
        segmentation = finish(lambda done, total: tell("segmenting", done, total))
        files: dict[str, Path] = {}
        for done, (form, write) in enumerate(writers.items()):
            tell("writing", done, len(job.forms))
            try:
                found = write(job.folder / FILE_OF[form], segmentation, model.recipe.labels)
            except AutoSam3dError as error:
                if error.exit_code == 5 or len(job.forms) == 1:  # a full disk affects every form
                    raise
                refused[form] = error
                continue
            segmentation = replace(segmentation, warnings=(*segmentation.warnings, *found))
            files[form] = job.folder / FILE_OF[form]
    result = ScanResult(files=files, refused=refused, organs=organ_volumes(segmentation, model.recipe.labels),
                        shape_zyx=segmentation.shape, spacing_mm_zyx=segmentation.spacing_mm,
                        warnings=segmentation.warnings, from_dicom=from_dicom)
    _write_tables(job, model, result)
    tell("writing", len(job.forms), len(job.forms))
    return result


def _segment_options(job: ScanJob, model: SourcedModel, max_ram_bytes: int | None) -> SegmentOptions:
    tiling = model.recipe.inference
    if job.overlap is not None:
        tiling = Tiling(overlap=job.overlap, importance=tiling.importance)
    return SegmentOptions(tiling=tiling, tta=job.tta, max_ram_bytes=max_ram_bytes)


def _writers(job: ScanJob, source: Path, volume: Volume, read_options: ReadOptions, model: SourcedModel
             ) -> tuple[dict[str, WriteLabels], dict[str, AutoSam3dError]]:
    writers: dict[str, WriteLabels] = {}
    refused: dict[str, AutoSam3dError] = {}
    for name in job.forms:
        if name in _TABLES:
            continue
        try:
            form = output_format(name, job.folder)
            _demand_series(form, source)
            writers[name] = label_writer(form, source, volume.source, read_options, model.recipe.name, model.sha256,
                                         job.uid_settings)
        except AutoSam3dError as error:
            refused[name] = error
    if len(refused) == len(job.forms):
        raise next(iter(refused.values()))
    return writers, refused


def _demand_series(form: OutputFormat, source: Path) -> None:
    if form.is_dicom and not source.is_dir():
        raise UsageError("FORMAT", source, f"expected a DICOM series for {form.name}, got a NIfTI file",
                         "send the series, or ask for NIfTI")


def _write_tables(job: ScanJob, model: SourcedModel, result: ScanResult) -> None:
    if "csv" in job.forms:
        write_text_atomic(job.folder / FILE_OF["csv"], volumes_csv(result.organs))
        result.files["csv"] = job.folder / FILE_OF["csv"]
    if "json" in job.forms:
        content = {
            "autosam3d": __version__,
            "model": {"recipe": model.recipe.name, "sha256": model.sha256, "runtime": model.runtime},
            "shape_zyx": list(result.shape_zyx),
            "spacing_mm_zyx": [round(mm, 6) for mm in result.spacing_mm_zyx],
            "organs": [organ.as_dict() for organ in result.organs],
            "warnings": list(result.warnings),
        }
        write_text_atomic(job.folder / FILE_OF["json"], json.dumps(content, indent=1) + "\n")
        result.files["json"] = job.folder / FILE_OF["json"]
