"""The forms that a segmentation can be written in, by name: NIfTI, DICOM SEG, RTSTRUCT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autosam3d.errors import UsageError
from autosam3d.io.nifti.write import write_segmentation
from autosam3d.io.options import ReadOptions
from autosam3d.labels import LabelMap
from autosam3d.version import __version__
from autosam3d.volume import Segmentation, SourceGrid

# Writes a segmentation to a path, and returns what there was to warn of.
WriteLabels = Callable[[Path, Segmentation, LabelMap], tuple[str, ...]]


@dataclass(frozen=True)
class OutputFormat:
    """One form of a result."""

    name: str
    """What `--format` calls it."""
    endings: tuple[str, ...]
    """Of an output's name."""
    ending_in_folder: str
    """Of the file that a scan becomes in a folder of results, and so of the names of what lies beside any output."""
    beside: tuple[str, ...] = ()
    """Endings of the label tables that are written beside it."""

    @property
    def is_dicom(self) -> bool:
        """Whether it is made from a DICOM series, and of one alone."""
        return ".dcm" in self.endings


NIFTI = OutputFormat("nifti", (".nii.gz", ".nii"), ".nii.gz", (".json", ".labels.txt", ".ctbl"))
SEG = OutputFormat("seg", (".dcm",), ".seg.dcm")
SEG_LABELMAP = OutputFormat("seg-labelmap", (".dcm",), ".seg.dcm")
RTSTRUCT = OutputFormat("rtstruct", (".dcm",), ".rtstruct.dcm")
DICOM_FORMATS = (SEG, SEG_LABELMAP, RTSTRUCT)
_FORMATS = {form.name: form for form in (NIFTI, *DICOM_FORMATS)}


def output_format(name: str | None, output: Path) -> OutputFormat:
    """The format of that name; without one NIfTI, unless `output` asks for DICOM and does not say which.

    Raises:
        UsageError: FORMAT, OUTPUT_NAME.
    """
    ends_as_dicom = output.name.lower().endswith(".dcm") and not output.is_dir()
    if name is None:
        if ends_as_dicom:
            raise UsageError("FORMAT", output, "expected --format beside a name that ends with .dcm: it can be a SEG "
                             "or an RTSTRUCT", "add --format seg (for viewers) or --format rtstruct (for planning)")
        return NIFTI
    if name not in _FORMATS:
        raise UsageError("FORMAT", f"--format {name}", f"expected {', '.join(_FORMATS)}", "name one of these")
    form = _FORMATS[name]
    if form.is_dicom:
        _demand_extra()
    return form


def label_writer(form: OutputFormat, source: Path, grid: SourceGrid | None, options: ReadOptions,
                 model: str, sha256: str, settings: str | None = None) -> WriteLabels:
    """What will write the segmentation of the scan at `source`; whatever a series lacks is said now.

    Args:
        grid: of the scan as it was read.
        options: it was read with.
        model, sha256: name and hash of what segmented it, for objects that name their maker.
        settings: of the run, where UIDs are to follow from them.

    Raises:
        VolumeError: as `io.dicom.source.read_source_series`. MissingExtraError.
    """
    if not form.is_dicom:
        return _write_nifti
    from autosam3d.io.dicom.source import Algorithm, read_source_series  # pydicom is optional and slow to import

    made_by = Algorithm(f"autosam3d {model}", __version__, sha256, settings)
    series = read_source_series(source, grid, options)
    if form is RTSTRUCT:
        from autosam3d.io.dicom.rtstruct import write_rtstruct

        return lambda path, labels, names: write_rtstruct(path, labels, series, names, made_by)
    from autosam3d.io.dicom.seg import write_dicom_seg

    kind = "labelmap" if form is SEG_LABELMAP else "binary"
    return lambda path, labels, names: write_dicom_seg(path, labels, series, names, made_by, kind)


def _write_nifti(path: Path, segmentation: Segmentation, labels: LabelMap) -> tuple[str, ...]:
    write_segmentation(path, segmentation, labels)
    return ()


def _demand_extra() -> None:
    """MissingExtraError now rather than after minutes of work."""
    import autosam3d.io.dicom.rtstruct  # noqa: F401
