"""Writes RTSTRUCT: a segmentation as contours on the slices of its series, for planning systems.

Contours run along the borders of voxels, and holes are joined to their surroundings by keyholes
(`io.dicom.outlines`), so readers that fill by parity, by winding or that unite contours get every voxel back. That is
checked on the file before it is renamed to its final name.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import numpy as np

from autosam3d.io.dicom.acquired import slice_heights, slice_shape
from autosam3d.io.dicom.outlines import filled, outlines
from autosam3d.io.dicom.seg import meant_centres, planes_of, present_and_empty, series_number
from autosam3d.io.dicom.source import (
    Algorithm,
    SourceSeries,
    carry_identity,
    demand_centroids,
    derived_uid,
    read_back_error,
    series_description,
    written_bytes,
)
from autosam3d.io.dicom.tags import DAMAGE, quiet_pydicom
from autosam3d.io.files import atomic_write
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, log_warnings

# isort: split
# After `tags`, whose import error says what to install where pydicom is absent.
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ImplicitVRLittleEndian, RTStructureSetStorage

from autosam3d.io.dicom.codes import code_item, organ_code, organ_text

_STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # what PS3.3 C.8.8.5 asks for, though it is retired
_MAX_SHORT = 16  # characters of value representation SH
_LPS = np.array([-1.0, -1.0, 1.0])


def write_rtstruct(
    path: str | Path, segmentation: Segmentation, series: SourceSeries, labels: LabelMap, algorithm: Algorithm
) -> tuple[str, ...]:
    """Write labels as one RTSTRUCT with a region of interest an organ; its contours are closed and planar.

    Args:
        path: of the file; an existing one is replaced.
        segmentation: on the grid of `series`, as `segment` returns it.
        series: of `read_source_series`.
        labels: organs and colours; ROI numbers are the label values, organs without a voxel are left out.

    Returns:
        Warnings, one sentence each; they were logged.

    Raises:
        As `write_dicom_seg`.
    """
    path = Path(path)
    planes = planes_of(segmentation)
    present, empty = present_and_empty(planes, labels, path)
    warnings = [*series.warnings, *([f"not in the object, because no voxel has it: {', '.join(empty)}"] if empty
                                    else [])]
    with quiet_pydicom():
        dataset = _build(planes, series, labels, present, algorithm)
        atomic_write(path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True),
                     lambda temporary: _verify(temporary, path, segmentation, planes, series, present),
                     size_bytes=lambda: written_bytes(dataset))
    return log_warnings(path, warnings)


def _build(planes: np.ndarray, series: SourceSeries, labels: LabelMap, present: list[int], algorithm: Algorithm
           ) -> Dataset:
    content = hashlib.sha256(planes.tobytes()).digest() + repr([labels.by_index[v] for v in present]).encode()
    dataset = _head(series, algorithm, content)
    dataset.StructureSetLabel = "AUTOSAM3D"
    dataset.StructureSetName = series_description(algorithm)
    dataset.StructureSetDate, dataset.StructureSetTime = dataset.InstanceCreationDate, dataset.InstanceCreationTime
    dataset.ReferencedFrameOfReferenceSequence = [_references(series)]
    dataset.StructureSetROISequence = [_roi(value, series, labels, algorithm) for value in present]
    dataset.ROIContourSequence = [_contours(value, planes, series, labels) for value in present]
    dataset.RTROIObservationsSequence = [_observation(number, value, labels)
                                         for number, value in enumerate(present, start=1)]
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _head(series: SourceSeries, algorithm: Algorithm, content: bytes) -> Dataset:
    """Everything but the structures: SOP Common, patient, study, series, frame of reference, equipment."""
    dataset = Dataset()
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = derived_uid("rtstruct", series, algorithm, content)
    carry_identity(dataset, series)
    now = datetime.datetime.now()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesInstanceUID = derived_uid("rtstruct series", series, algorithm, content)
    dataset.SeriesNumber = series_number(series) + 1
    dataset.SeriesDescription = series_description(algorithm)
    dataset.OperatorsName = ""
    dataset.InstanceNumber = 1
    dataset.FrameOfReferenceUID = series.frame_of_reference
    dataset.PositionReferenceIndicator = series.images[0].PositionReferenceIndicator
    dataset.Manufacturer = "autosam3d"
    dataset.ManufacturerModelName = algorithm.name[:64]
    dataset.DeviceSerialNumber = algorithm.sha256[:16]
    dataset.SoftwareVersions = algorithm.version[:64]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
    # In explicit VR a contour of more than 65,534 bytes, as a lung has, can only be written as unknown (UN), which many
    # readers do not take for numbers; in implicit VR lengths have 32 bits. *Source*: DICOM PS3.5, 6.2.2 and 7.1.
    meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.file_meta = meta
    return dataset


def _references(series: SourceSeries) -> Dataset:
    images, study, frame = Dataset(), Dataset(), Dataset()
    images.SeriesInstanceUID = series.images[0].SeriesInstanceUID
    images.ContourImageSequence = [_image_reference(image) for image in series.images]
    study.ReferencedSOPClassUID = _STUDY_COMPONENT
    study.ReferencedSOPInstanceUID = series.identity.StudyInstanceUID
    study.RTReferencedSeriesSequence = [images]
    frame.FrameOfReferenceUID = series.frame_of_reference
    frame.RTReferencedStudySequence = [study]
    return frame


def _image_reference(image: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return reference


def _roi(value: int, series: SourceSeries, labels: LabelMap, algorithm: Algorithm) -> Dataset:
    roi = Dataset()
    roi.ROINumber = value
    roi.ReferencedFrameOfReferenceUID = series.frame_of_reference
    roi.ROIName = organ_text(labels.by_index[value])
    roi.ROIDescription = f"{algorithm.name} {algorithm.version}"[:64]
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    return roi


def _observation(number: int, value: int, labels: LabelMap) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber, observation.ReferencedROINumber = number, value
    if len(text := organ_text(labels.by_index[value])) <= _MAX_SHORT:  # cut, two organs could have one
        observation.ROIObservationLabel = text
    observation.RTROIIdentificationCodeSequence = [code_item(organ_code(labels, value))]
    observation.RTROIInterpretedType = "ORGAN"
    observation.ROIInterpreter = ""
    return observation


def _contours(value: int, planes: np.ndarray, series: SourceSeries, labels: LabelMap) -> Dataset:
    item = Dataset()
    item.ROIDisplayColor = list(labels.color(value))
    item.ReferencedROINumber = value
    item.ContourSequence = []
    for plane, image in zip(planes, series.images, strict=True):
        for outline in outlines(plane == value):
            contour = Dataset()
            contour.ContourImageSequence = [_image_reference(image)]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(outline)
            contour.ContourNumber = len(item.ContourSequence) + 1
            contour.ContourData = [f"{mm:.4f}" for mm in _points_lps(outline, image).ravel()]
            item.ContourSequence.append(contour)
    return item


def _points_lps(outline: np.ndarray, image: Dataset) -> np.ndarray:
    """*Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    along_row, along_column = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = (float(mm) for mm in image.PixelSpacing)
    return (np.array(image.ImagePositionPatient, float) + outline[:, :1] * between_columns * along_row
            + outline[:, 1:] * between_rows * along_column)


def _verify(temporary: Path, path: Path, segmentation: Segmentation, planes: np.ndarray, series: SourceSeries,
            present: list[int]) -> None:
    dataset = pydicom.dcmread(temporary)
    found = np.zeros_like(planes)
    centres: dict[int, np.ndarray] = {}
    try:
        for item in dataset.ROIContourSequence:
            value, weighted, area = int(item.ReferencedROINumber), np.zeros(3), 0.0
            for contour in item.ContourSequence:
                points = np.array(contour.ContourData, float).reshape(-1, 3) * _LPS
                box, inside = _voxels(points, segmentation, series, path)
                if found[box][inside].any():
                    raise read_back_error(path, "two contours overlap")
                found[box][inside] = value
                moment, size = _moment(points)
                weighted, area = weighted + moment, area + size
            centres[value] = weighted / max(area, 1e-9)
    except DAMAGE:
        raise read_back_error(path, "it cannot be read back") from None
    if not np.array_equal(found, planes):
        raise read_back_error(path, f"{int(np.count_nonzero(found != planes))} voxels")
    demand_centroids(meant_centres(segmentation, planes, present), centres,
                     min(segmentation.spacing_mm) / 2, path)


def _voxels(points_ras: np.ndarray, segmentation: Segmentation, series: SourceSeries, path: Path
            ) -> tuple[tuple[int, slice, slice], np.ndarray]:
    """(a box of one slice, bool [row, column] there) inside a contour: by the grid's axes, from the slice's own
    first voxel."""
    source = segmentation.source
    assert source is not None
    inverse = np.linalg.inv(source.affine)
    heights = (points_ras @ inverse[:3, :3].T + inverse[:3, 3])[:, 2]
    slices = slice_heights(source)
    index = int(np.abs(slices - heights.mean()).argmin())
    if np.abs(heights - slices[index]).max() > 0.1:
        raise read_back_error(path, "a contour lies elsewhere than its slice")
    first_ras = np.array(series.images[index].ImagePositionPatient, float) * _LPS
    outline = ((points_ras - first_ras) @ inverse[:3, :3].T)[:, :2]
    left, top = (max(0, int(n)) for n in np.floor(outline.min(axis=0)))
    right, bottom = (max(0, int(n)) + 1 for n in np.ceil(outline.max(axis=0)))
    _, rows, columns = slice_shape(source)
    right, bottom = min(right, columns), min(bottom, rows)
    return (index, slice(top, bottom), slice(left, right)), filled(outline - (left, top), (bottom - top, right - left))


def _moment(points: np.ndarray) -> tuple[np.ndarray, float]:
    """(area times centre, area) of a plane polygon in space, as triangles around its first point."""
    first, second, third = points[0], points[1:-1], points[2:]
    crosses = np.cross(second - first, third - first) / 2
    whole = crosses.sum(axis=0)
    areas = crosses @ (whole / np.linalg.norm(whole))
    return areas @ (first + second + third) / 3, float(areas.sum())
