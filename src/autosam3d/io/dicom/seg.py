"""Writes DICOM SEG: a segmentation as an object of its series' study, with a coded segment for each organ.

The file is written under a temporary name, read back frame by frame without the library that wrote it, and renamed
only where every voxel has its label and every organ its position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autosam3d.errors import MissingExtraError, VolumeError
from autosam3d.io.dicom.acquired import as_acquired, slice_affines, slice_centres
from autosam3d.io.dicom.source import (
    Algorithm,
    SourceSeries,
    carry_identity,
    demand_centroids,
    derived_uid,
    label_centres,
    read_back_error,
    series_description,
    written_bytes,
)
from autosam3d.io.dicom.stack import place_tolerance_vox
from autosam3d.io.dicom.tags import DAMAGE, quiet_pydicom
from autosam3d.io.files import atomic_write
from autosam3d.io.grid import from_canonical
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, log_warnings

# isort: split
# After `tags`, whose import error says what to install where pydicom is absent.
import pydicom
from pydicom.pixels.utils import iter_pixels
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from autosam3d.io.dicom.codes import ANATOMICAL_STRUCTURE, cielab, code_item, organ_code, organ_side, organ_text

try:
    import highdicom
    from highdicom.color import CIELabColor
except ImportError:
    raise MissingExtraError("MISSING_EXTRA", "DICOM SEG", "writing it needs highdicom, which is not installed",
                            'pip install "autosam3d[dicom]"') from None

SegKind = Literal["binary", "labelmap"]
# How far a frame may lie beside its position on the grid, in voxels: slices may drift sideways.
_MAX_DRIFT_VOX = 0.5
_MAX_TURN = 2e-3
_LPS = np.array([-1.0, -1.0, 1.0])


def write_dicom_seg(
    path: str | Path, segmentation: Segmentation, series: SourceSeries, labels: LabelMap, algorithm: Algorithm,
    kind: SegKind = "binary",
) -> tuple[str, ...]:
    """Write labels as one DICOM SEG that refers to the slices they belong to.

    Args:
        path: of the file; an existing one is replaced.
        segmentation: on the grid of `series`, as `segment` returns it.
        series: of `read_source_series`.
        labels: organs, codes and colours; segment numbers follow its order, organs without a voxel are left out.
        kind: "binary" has a bit for each voxel and organ and is read by every viewer; "labelmap" has a byte for each
            voxel, is smaller, and is read by new viewers alone.

    Returns:
        Warnings, one sentence each; they were logged.

    Raises:
        VolumeError: NO_ORGANS, no organ has a voxel; READ_BACK, the file differs from the segmentation.
        ResourceError, UsageError: as `io.files.atomic_write`. In every case no file is left.
    """
    path = Path(path)
    planes = planes_of(segmentation)
    present, empty = present_and_empty(planes, labels, path)
    warnings = [*series.warnings, *([f"not in the object, because no voxel has it: {', '.join(empty)}"] if empty
                                    else []), *_readers_that_fail(segmentation, series)]
    numbers = np.zeros(256, np.uint8)
    for number, value in enumerate(present, start=1):
        numbers[value] = number
    with quiet_pydicom():
        dataset = _build(numbers[planes], series, labels, present, algorithm, kind)
        atomic_write(path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True),
                     lambda temporary: _verify(temporary, path, segmentation, planes, labels, present),
                     size_bytes=lambda: written_bytes(dataset))
    return log_warnings(path, warnings)


def present_and_empty(planes: np.ndarray, labels: LabelMap, path: Path) -> tuple[list[int], list[str]]:
    """(label values with voxels on the slices, names of organs without).

    Raises:
        VolumeError: NO_ORGANS, no voxel has a label.
        ValueError: a value that `labels` does not name.
    """
    counts = np.zeros(256, np.int64)
    for plane in planes:
        counts += np.bincount(plane.ravel(), minlength=256)
    strange = [int(v) for v in np.flatnonzero(counts) if v and int(v) not in labels.by_index]
    if strange:
        raise ValueError(f"labels: expected values of {list(labels.by_index)}, got {strange}")
    present = [value for value in labels.by_index if counts[value]]
    if not present:
        raise VolumeError("NO_ORGANS", path, "no organ was found in the scan, and a DICOM object must have one",
                          "look at the scan; NIfTI can hold an empty segmentation")
    return present, [name for value, name in labels.by_index.items() if not counts[value]]


def planes_of(segmentation: Segmentation) -> np.ndarray:
    """uint8 [slice, row, column], on the series' own slices along the normal.

    Raises:
        ValueError: the segmentation is none of a DICOM series, or has values above 255.
    """
    source = segmentation.source
    if source is None or source.kind != "dicom":
        raise ValueError("segmentation: expected one of a DICOM series")
    if segmentation.labels.max(initial=0) > 255:
        raise ValueError(f"labels: expected values up to 255, got {segmentation.labels.max()}")
    return np.ascontiguousarray(as_acquired(from_canonical(segmentation.labels, source).T, source), np.uint8)


def meant_centres(segmentation: Segmentation, planes: np.ndarray, present: list[int]) -> dict[int, np.ndarray]:
    """Label to its centre in RAS+ mm: by the scan's affine, or by the slices where the scan was resampled from them."""
    source = segmentation.source
    if source is not None and source.acquired is not None:
        return slice_centres(planes, source, present)
    return label_centres(segmentation.labels, segmentation.affine, present)


def _readers_that_fail(segmentation: Segmentation, series: SourceSeries) -> list[str]:
    """A sentence where a common reader makes something else of the object; each was tried (`docs/viewers.md`)."""
    source = segmentation.source
    shifts = np.zeros((1, 2)) if source is None or source.acquired is None else source.acquired.shifts
    how = [*(["tilted"] if np.ptp(shifts, axis=0).max() > _MAX_DRIFT_VOX else []),
           *(["unevenly spaced"] if "SpacingBetweenSlices" not in series.images[0] else [])]
    if not how:
        return []
    fault = "refuses this object" if "tilted" in how else ("lays this object on even slices, with gaps and other "
                                                           "volumes")
    return [f"the slices are {' and '.join(how)}: 3D Slicer's reader of DICOM SEG {fault}; for 3D Slicer take NIfTI"]


def _build(planes: np.ndarray, series: SourceSeries, labels: LabelMap, present: list[int], algorithm: Algorithm,
           kind: SegKind) -> Any:
    content = hashlib.sha256(planes.tobytes()).digest() + repr([labels.by_index[v] for v in present]).encode()
    dataset = highdicom.seg.Segmentation(
        source_images=list(series.images),
        pixel_array=planes,
        segmentation_type=kind.upper(),
        segment_descriptions=[_segment(number, value, labels, algorithm)
                              for number, value in enumerate(present, start=1)],
        series_instance_uid=derived_uid(f"seg {kind} series", series, algorithm, content),
        series_number=series_number(series),
        sop_instance_uid=derived_uid(f"seg {kind}", series, algorithm, content),
        instance_number=1,
        manufacturer="autosam3d",
        manufacturer_model_name=algorithm.name[:64],
        software_versions=algorithm.version[:64],
        device_serial_number=algorithm.sha256[:16],
        transfer_syntax_uid=ExplicitVRLittleEndian if kind == "binary" else RLELossless,
        content_label="SEGMENTATION",
        content_description="Automatic segmentation, not reviewed",
        series_description=series_description(algorithm),
    )
    if "SpacingBetweenSlices" not in series.images[0]:
        _tell_own_thickness(dataset, series)
    carry_identity(dataset, series)
    dataset.PositionReferenceIndicator = series.images[0].PositionReferenceIndicator
    return dataset


def _tell_own_thickness(dataset: Any, series: SourceSeries) -> None:
    """Pixel measures frame by frame, with the slice's own thickness and no distance that all would share."""
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    places = {tuple(map(float, image.ImagePositionPatient)): image for image in series.images}
    for group in dataset.PerFrameFunctionalGroupsSequence:
        image = places[tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))]
        measures = pydicom.Dataset()
        measures.SliceThickness, measures.PixelSpacing = image.SliceThickness, image.PixelSpacing
        group.PixelMeasuresSequence = [measures]


def series_number(series: SourceSeries) -> int:
    """A number that sorts after the source series. It need not be unique, since UIDs identify series."""
    return 100 * int(series.images[0].SeriesNumber) % 10**8 + 1


def _segment(number: int, value: int, labels: LabelMap, algorithm: Algorithm) -> Any:
    segment = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=organ_text(labels.by_index[value]),
        segmented_property_category=Code(*ANATOMICAL_STRUCTURE),
        segmented_property_type=Code(*organ_code(labels, value)),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm.name[:64], family=Code("123110", "DCM", "Artificial Intelligence"),
            version=f"{algorithm.version} {algorithm.sha256[:16]}"[:64]),
        display_color=CIELabColor.from_dicom_value(cielab(labels.color(value))),
    )
    side = organ_side(labels, value)
    if side is not None:
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [code_item(side)]
    return segment


def _verify(temporary: Path, path: Path, segmentation: Segmentation, planes: np.ndarray, labels: LabelMap,
            present: list[int]) -> None:
    source = segmentation.source
    assert source is not None
    dataset = pydicom.dcmread(temporary)
    values = dict(enumerate(present, start=1))
    written = {int(segment.SegmentNumber): segment.SegmentLabel for segment in dataset.SegmentSequence}
    if any(written.get(number) != organ_text(labels.by_index[value]) for number, value in values.items()):
        raise read_back_error(path, "the names of its segments")
    found, inverses = np.zeros_like(planes), np.linalg.inv(slice_affines(source))
    even_vox = place_tolerance_vox(float(np.linalg.norm(source.affine[:3, 2])))
    sums: dict[int, np.ndarray] = {value: np.zeros(3) for value in present}
    counts = dict.fromkeys(present, 0)
    try:
        for frame, index, number in _frames(dataset):
            to_ras = _frame_affine(dataset, index)
            plane = found[_plane_of(to_ras, inverses, even_vox, path)]
            for segment in values if number is None else (number,):
                rows, columns = np.nonzero(frame == (segment if number is None else 1))
                if plane[rows, columns].any():
                    raise read_back_error(path, "two segments overlap")
                plane[rows, columns] = values[segment]
                counts[values[segment]] += len(rows)
                sums[values[segment]] += to_ras @ [columns.sum(), rows.sum(), len(rows)]
    except (*DAMAGE, StopIteration):
        raise read_back_error(path, "it cannot be read back") from None
    if not np.array_equal(found, planes):
        raise read_back_error(path, f"{int(np.count_nonzero(found != planes))} voxels")
    centres = {value: sums[value] / max(1, counts[value]) for value in present}
    demand_centroids(meant_centres(segmentation, planes, present), centres,
                     min(segmentation.spacing_mm) / 2, path)


def _frames(dataset: Any) -> Iterator[tuple[np.ndarray, int, int | None]]:
    """(uint8 [row, column], its index, its segment's number or None where the pixels are the numbers)."""
    shape = int(dataset.Rows), int(dataset.Columns)
    num_frames = int(dataset.NumberOfFrames)
    if dataset.SegmentationType == "LABELMAP":
        for index, frame in enumerate(iter_pixels(dataset)):
            yield frame, index, None
        return
    size = math.prod(shape)
    packed = np.frombuffer(dataset.PixelData, np.uint8)
    for index in range(num_frames):  # frames follow each other bit by bit. *Source*: DICOM PS3.5 section 8.1.1
        first, last = index * size // 8, -(-(index + 1) * size // 8)
        bits = np.unpackbits(packed[first:last], bitorder="little")[index * size % 8 :][:size]
        segment = _of_frame(dataset, index, "SegmentIdentificationSequence")
        yield bits.reshape(shape), index, int(segment.ReferencedSegmentNumber)


def _frame_affine(dataset: Any, index: int) -> np.ndarray:
    """3x3: column, row and 1 of a frame to RAS+ mm. *Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    orientation = _of_frame(dataset, index, "PlaneOrientationSequence").ImageOrientationPatient
    directions = np.array(orientation, float).reshape(2, 3)
    spacing = _of_frame(dataset, index, "PixelMeasuresSequence").PixelSpacing
    position = np.array(_of_frame(dataset, index, "PlanePositionSequence").ImagePositionPatient, float)
    return np.stack([directions[0] * float(spacing[1]) * _LPS, directions[1] * float(spacing[0]) * _LPS,
                     position * _LPS], axis=1)


def _of_frame(dataset: Any, index: int, name: str) -> Any:
    """The one item of a frame's functional group `name`, which is shared where it is the same for all frames: the
    segment, too, where there is one organ."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    return getattr(shared if name in shared else dataset.PerFrameFunctionalGroupsSequence[index], name)[0]


def _plane_of(to_ras: np.ndarray, inverses: np.ndarray, even_vox: float, path: Path) -> int:
    """The slice that a frame lies in, by the inverse affines of all; its axes must be the slice's."""
    places = inverses @ [*to_ras[:, 2], 1.0]
    index = int(np.abs(places[:, 2]).argmin())
    turned = np.abs(inverses[index, :3, :3] @ to_ras[:, :2] - np.eye(3)[:, :2]).max()
    if turned > _MAX_TURN or (np.abs(places[index, :3]) > (_MAX_DRIFT_VOX, _MAX_DRIFT_VOX, even_vox)).any():
        raise read_back_error(path, "a frame lies elsewhere than its slice")
    return index
