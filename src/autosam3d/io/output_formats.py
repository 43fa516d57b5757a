"""The file formats of a segmentation, by name: NIfTI, DICOM SEG, RTSTRUCT."""

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

# Writes a segmentation to a path and returns the warnings.
WriteLabels = Callable[[Path, Segmentation, LabelMap], tuple[str, ...]]


@dataclass(frozen=True)
class OutputFormat:
    """One file format of a segmentation."""

    name: str
    """Its name for `--format`."""
    endings: tuple[str, ...]
    """Endings that an output's name may have."""
    ending_in_folder: str
    """Ending of a scan's file in a folder of results, and of the names of the files beside any output."""
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
    """The function that writes the segmentation of the scan at `source`. What a series lacks raises here, not there.

    Args:
        grid: of the scan as it was read.
        options: it was read with.
        model, sha256: name and hash of the model that segments it, for DICOM objects.
        settings: of the run, where the UIDs are derived from them.

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
    """Raise MissingExtraError now, not after minutes of work."""
    import autosam3d.io.dicom.rtstruct  # noqa: F401
