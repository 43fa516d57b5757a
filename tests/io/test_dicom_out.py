"""DICOM SEG and RTSTRUCT: read by others voxel for voxel, on the right side, whole or not at all, telling no name."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

import highdicom
import make_dicom as bad
import pydicom
from matplotlib.path import Path as Polygon

from autosam3d.errors import AutoSam3dError, ResourceError, VolumeError
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.dicom import rtstruct as dicom_rtstruct
from autosam3d.io.dicom import seg as dicom_seg
from autosam3d.io.dicom.codes import cielab
from autosam3d.io.dicom.source import Algorithm, SourceSeries, read_source_series
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume

LABELS = LabelMap(organs=("liver", "spleen", "my^own\\organ", "parotid_left", "aorta"))
ALGORITHM = Algorithm("autosam3d test", "1.2.3", "ab" * 32)
WRITERS = {
    "seg": dicom_seg.write_dicom_seg,
    "labelmap": lambda *args: dicom_seg.write_dicom_seg(*args, "labelmap"),
    "rtstruct": dicom_rtstruct.write_rtstruct,
}
# Beside this Python, where pip puts it, or on the path.
DCMQI = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent)) or shutil.which("segimage2itkimage")
_AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])


def _organs(shape: tuple[int, int, int] = (12, 20, 24)) -> np.ndarray:
    """uint8 [slice, row, column]: no axis is like another, a hole with an island, a diagonal; the aorta is absent."""
    organs = np.zeros(shape, np.uint8)
    organs[1:5, 2:12, 3:16] = 1
    organs[2:4, 4:10, 5:13] = 0
    organs[2:4, 6:8, 7:10] = 1
    organs[7:11, 13:19, 1:5] = 2
    organs[6:8, 1:3, 18:23] = 3
    organs[8, np.arange(4, 9), np.arange(14, 19)] = 4
    return organs


def _series(folder: Path, organs: np.ndarray, orientation: np.ndarray = _AXIAL, *, backwards: bool = False,
            change: bad.Change | None = None) -> Path:
    """A CT whose voxels are 100 HU times their organ, so that labels come from what was read."""
    folder.mkdir()
    normal = np.cross(*orientation)
    for index, plane in enumerate(organs):
        number = len(organs) - 1 - index if backwards else index
        ds = bad.make_slice(number, np.int16(100) * plane + (plane == 0) * np.int16(-900), 0.0)
        ds.ImageOrientationPatient = [f"{v:.12g}"[:16] for v in orientation.ravel()]
        ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in (-20.5, -30.25, 11.0) + normal * bad.SPACING[0] * index]
        if change is not None:
            change(ds, index)
        bad.save(ds, folder / f"{number:03d}.dcm")
    return folder


def _read(folder: Path) -> tuple[Volume, Segmentation, SourceSeries]:
    volume = read_ct(folder)
    labels = np.clip(np.rint(volume.voxels_hu / 100), 0, 4).astype(np.uint8)
    return volume, Segmentation(labels, volume.affine, volume.source), read_source_series(folder, volume.source)


def _lps(organs: np.ndarray, value: int, orientation: np.ndarray) -> np.ndarray:
    """Where the organ's voxels lie by DICOM's own words: [n, 3] in LPS mm."""
    z, y, x = np.nonzero(organs == value)
    steps = np.stack([orientation[0] * bad.SPACING[2], orientation[1] * bad.SPACING[1],
                      np.cross(*orientation) * bad.SPACING[0]])
    return (-20.5, -30.25, 11.0) + np.stack([x, y, z], axis=1) @ steps


def _orientations() -> dict[str, tuple[np.ndarray, bool]]:
    """24 ways that rows and columns can run, each in both orders of files, and two oblique ones."""
    axes = [sign * np.eye(3)[i] for i in range(3) for sign in (1, -1)]
    pairs = [np.stack(pair) for pair in itertools.permutations(axes, 2) if pair[0] @ pair[1] == 0]
    names = {str(tuple(axis)): name for axis, name in zip(axes, "LRPAHF", strict=True)}
    found = {f"{names[str(tuple(p[0]))]}{names[str(tuple(p[1]))]}{'-' if back else '+'}": (p, back)
             for p in pairs for back in (False, True)}
    for angle in (0.3, 2.0):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, s, -c], [0, c, s]])
        found[f"oblique {angle}"] = turn[:, :2].T, angle > 1
    assert len(found) == 50
    return found


def _same_points(a: np.ndarray, b: np.ndarray) -> None:
    assert len(a) == len(b)
    a, b = (p[np.lexsort(np.round(p, 2).T)] for p in (a, b))
    np.testing.assert_allclose(a, b, atol=1e-3)


def _seg_points(path: Path) -> dict[str, np.ndarray]:
    """highdicom's reading: organ to its voxels in LPS mm."""
    seg = highdicom.seg.segread(path)
    found = {}
    for number in seg.segment_numbers:
        volume = seg.get_volume(segment_numbers=[number])
        indexes = np.argwhere(volume.array.reshape(volume.array.shape[:3]) != 0)
        found[seg.get_segment_description(number).segment_label] = volume.map_indices_to_reference(indexes)
    return found


def _rt_points(path: Path, orientation: np.ndarray) -> dict[str, np.ndarray]:
    """Centres of voxels inside contours, by matplotlib's test of points; contours are united."""
    ds = pydicom.dcmread(path)
    names = {roi.ROINumber: roi.ROIName for roi in ds.StructureSetROISequence}
    y, x = np.mgrid[:20, :24].reshape(2, -1)
    grid = np.stack([x * bad.SPACING[2], y * bad.SPACING[1]], axis=1)
    found = {}
    for item in ds.ROIContourSequence:
        points = set()
        for contour in item.ContourSequence:
            corners = np.array(contour.ContourData, float).reshape(-1, 3) - (-20.5, -30.25, 11.0)
            height = round(float((corners @ np.cross(*orientation))[0]) / bad.SPACING[0])
            inside = Polygon(np.vstack([corners, corners[:1]]) @ orientation.T, closed=True).contains_points(grid)
            points |= {(height, *p) for p in grid[inside]}
        z, gx, gy = np.array(sorted(points)).T
        found[names[item.ReferencedROINumber]] = (-20.5, -30.25, 11.0) + (
            gx[:, None] * orientation[0] + gy[:, None] * orientation[1]
            + z[:, None] * bad.SPACING[0] * np.cross(*orientation))
    return found


NAMES = {"Liver": 1, "Spleen": 2, "My own organ": 3, "Parotid left": 4}


@pytest.mark.parametrize("name", _orientations())
def test_every_voxel_lies_where_it_was(name: str, tmp_path: Path) -> None:
    orientation, backwards = _orientations()[name]
    organs = _organs()
    _, segmentation, series = _read(_series(tmp_path / "ct", organs, orientation, backwards=backwards))
    WRITERS["seg"](tmp_path / "seg.dcm", segmentation, series, LABELS, ALGORITHM)
    WRITERS["rtstruct"](tmp_path / "rt.dcm", segmentation, series, LABELS, ALGORITHM)
    for found in (_seg_points(tmp_path / "seg.dcm"), _rt_points(tmp_path / "rt.dcm", orientation)):
        assert set(found) == set(NAMES)
        for organ, value in NAMES.items():
            _same_points(found[organ], _lps(organs, value, orientation))


def test_seg_by_pydicom_and_its_references(tmp_path: Path) -> None:
    organs = _organs()
    folder = _series(tmp_path / "ct", organs, backwards=True)
    _, segmentation, series = _read(folder)
    for kind in ("seg", "labelmap"):
        (warning,) = WRITERS[kind](tmp_path / f"{kind}.dcm", segmentation, series, LABELS, ALGORITHM)
        assert "aorta" in warning
        ds = pydicom.dcmread(tmp_path / f"{kind}.dcm")
        heights = {float(pydicom.dcmread(p).ImagePositionPatient[2]): pydicom.dcmread(p).SOPInstanceUID
                   for p in folder.iterdir()}
        for frame, group in zip(ds.pixel_array, ds.PerFrameFunctionalGroupsSequence, strict=True):
            height = float(group.PlanePositionSequence[0].ImagePositionPatient[2])
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            assert source.ReferencedSOPInstanceUID == heights[height]
            plane = organs[round((height - 11) / bad.SPACING[0])]
            number = None if kind == "labelmap" else group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            np.testing.assert_array_equal(frame, plane if number is None else plane == number)
        segments = {s.SegmentNumber: s for s in ds.SegmentSequence}
        assert segments[1].SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
        parotid = segments[4].SegmentedPropertyTypeCodeSequence[0]
        assert parotid.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
        own = segments[3].SegmentedPropertyTypeCodeSequence[0]
        assert own.CodingSchemeDesignator == "99AUTOSAM3D" and len(own.CodeValue) <= 16
        made_by = segments[1].SegmentationAlgorithmIdentificationSequence[0]
        assert (made_by.AlgorithmName, made_by.AlgorithmVersion) == ("autosam3d test", f"1.2.3 {'ab' * 8}")


def test_rtstruct_modules(tmp_path: Path) -> None:
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    WRITERS["rtstruct"](tmp_path / "rt.dcm", segmentation, series, LABELS, ALGORITHM)
    ds = pydicom.dcmread(tmp_path / "rt.dcm")
    assert (ds.PatientName, ds.PatientID, ds.StudyInstanceUID) == ("Doe^Jane", "Doe-4711", "1.2.3")
    assert ds.FrameOfReferenceUID == "1.2.4" and "PositionReferenceIndicator" in ds
    assert "InstitutionName" not in ds and "StudyDescription" not in ds
    referred = ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == bad.SERIES_UID and len(referred.ContourImageSequence) == 12
    assert [tuple(item.ROIDisplayColor) for item in ds.ROIContourSequence] == [LABELS.color(v) for v in (1, 2, 3, 4)]
    assert {o.RTROIInterpretedType for o in ds.RTROIObservationsSequence} == {"ORGAN"}
    for item in ds.ROIContourSequence:
        for contour in item.ContourSequence:
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            assert len(contour.ContourData) == 3 * contour.NumberOfContourPoints
            assert all(len(str(v)) <= 16 for v in contour.ContourData)


@pytest.mark.parametrize("kind", WRITERS)
def test_equal_content_has_equal_uids_and_other_content_others(kind: str, tmp_path: Path) -> None:
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    uids = []
    for change in (0, 0, 1):
        segmentation.labels[0, 0, 0] = change
        WRITERS[kind](tmp_path / "out.dcm", segmentation, series, LABELS, ALGORITHM)
        ds = pydicom.dcmread(tmp_path / "out.dcm")
        uids.append((ds.SOPInstanceUID, ds.SeriesInstanceUID))
    assert uids[0] == uids[1] and not set(uids[0]) & set(uids[2]) and len(set(uids[0])) == 2


@pytest.mark.parametrize("kind", WRITERS)
def test_what_reads_back_otherwise_is_not_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    (tmp_path / "out").mkdir()
    module = dicom_rtstruct if kind == "rtstruct" else dicom_seg
    good = module._build
    # Mirrored, shifted by a slice, shifted by a pixel: each is whole and valid, and wrong.
    for spoil in (lambda p: p[:, :, ::-1], lambda p: np.roll(p, 1, axis=0), lambda p: np.roll(p, 1, axis=2)):
        monkeypatch.setattr(module, "_build", lambda planes, *a, s=spoil: good(np.ascontiguousarray(s(planes)), *a))
        with pytest.raises(VolumeError, match="differs from the segmentation") as caught:
            WRITERS[kind](tmp_path / "out" / "x.dcm", segmentation, series, LABELS, ALGORITHM)
        assert caught.value.code == "READ_BACK" and list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(module, "_build", good)
    # Every voxel right, but the scan's affine moved by 0.6 of a voxel: the organs lie elsewhere.
    moved = volume.affine.copy()
    moved[0, 3] += 0.6 * bad.SPACING[2]
    with pytest.raises(VolumeError, match="mm from its place"):
        WRITERS[kind](tmp_path / "out" / "x.dcm", Segmentation(segmentation.labels, moved, volume.source), series,
                      LABELS, ALGORITHM)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_with_the_bytes_of_the_whole_object(kind: str, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    (tmp_path / "out").mkdir()
    path = tmp_path / "out/x.dcm"
    WRITERS[kind](path, segmentation, series, LABELS, ALGORITHM)
    size, whole = path.stat().st_size, pydicom.Dataset.save_as
    path.write_text("old")

    def full(self: pydicom.Dataset, to: Any, **options: Any) -> None:
        if not isinstance(to, Path):
            return whole(self, to, **options)
        to.write_bytes(bytes(500))
        raise OSError("With tag (3006,0050) got exception") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    with pytest.raises(ResourceError) as caught:
        WRITERS[kind](path, segmentation, series, LABELS, ALGORITHM)
    needed, words = caught.value.fault.split(" ", 1)
    assert caught.value.code == "NO_SPACE" and words.startswith("bytes needed, ")
    assert abs(int(needed) - size) <= 16  # the time of day has more digits at times
    assert "bytes free" in caught.value.fault and path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_a_segmentation_without_organs_is_refused(kind: str, tmp_path: Path) -> None:
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    segmentation.labels[:] = 0
    with pytest.raises(VolumeError) as caught:
        WRITERS[kind](tmp_path / "x.dcm", segmentation, series, LABELS, ALGORITHM)
    assert caught.value.code == "NO_ORGANS" and not (tmp_path / "x.dcm").exists()


@pytest.mark.parametrize("slices", [slice(0, 12), slice(2, 3)])
@pytest.mark.parametrize("kind", WRITERS)
def test_one_organ_alone(kind: str, slices: slice, tmp_path: Path) -> None:
    """What all frames share stands elsewhere in a SEG."""
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    kept = np.zeros_like(segmentation.labels)
    kept[slices] = np.where(segmentation.labels[slices] == 1, 1, 0)
    segmentation.labels[:] = kept
    assert kept.any()
    WRITERS[kind](tmp_path / "x.dcm", segmentation, series, LABELS, ALGORITHM)
    if kind == "seg":
        (points,) = _seg_points(tmp_path / "x.dcm").values()
        assert len(points) == np.count_nonzero(kept)


SERIES_FAULTS = {
    "no study": (lambda ds, i: delattr(ds, "StudyInstanceUID"), "TAG_MISSING"),
    "no frame of reference": (lambda ds, i: delattr(ds, "FrameOfReferenceUID"), "TAG_MISSING"),
    "hostile UID": (lambda ds, i: setattr(ds, "StudyInstanceUID", "../Doe"), "TAG_INVALID"),
    "two studies": (lambda ds, i: setattr(ds, "StudyInstanceUID", f"1.2.{i}"), "TAG_INVALID"),
    "one UID twice": (lambda ds, i: setattr(ds, "SOPInstanceUID", "1.2.3.4"), "DUPLICATE_SLICE"),
}


@pytest.mark.parametrize("name", SERIES_FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_series_that_cannot_be_referred_to(name: str, tmp_path: Path) -> None:
    change, code = SERIES_FAULTS[name]
    with pytest.raises(VolumeError) as caught:
        _read(_series(tmp_path / "ct", _organs(), change=change))
    assert caught.value.code == code
    assert "Doe" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_slices_of_one_uid_are_read_by_force_and_never_referred_to(tmp_path: Path) -> None:
    folder = _series(tmp_path / "ct", _organs(), change=lambda ds, i: setattr(ds, "SOPInstanceUID", "1.2.3.4"))
    volume = read_ct(folder, ReadOptions(force=True))
    assert "accepted by force: 11 slices have the SOPInstanceUID of another one" in volume.warnings
    with pytest.raises(VolumeError) as caught:
        read_source_series(folder, volume.source, ReadOptions(force=True))
    assert caught.value.code == "TAG_INVALID"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_no_name_is_told_and_damaged_texts_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(ds: object, index: int) -> None:
        bad._wrong_texts(ds, index)
        ds.PatientSex, ds.StudyTime = "Doe-sex", "Doe-time"

    folder = _series(tmp_path / "ct", _organs(), change=damage)
    caplog.clear()  # of what pydicom says while the test writes them
    with caplog.at_level(logging.DEBUG):
        _, segmentation, series = _read(folder)
        told = [w for kind, write in WRITERS.items()
                for w in write(tmp_path / f"{kind}.dcm", segmentation, series, LABELS, ALGORITHM)]
    assert any("PatientSex" in w and "StudyTime" in w for w in told)
    assert not any(text in caplog.text + " ".join(told) for text in ("Doe", "4711", bad.SERIES_UID))
    for kind in WRITERS:
        content = (tmp_path / f"{kind}.dcm").read_bytes()
        allowed = pydicom.dcmread(tmp_path / f"{kind}.dcm")
        assert allowed.PatientID == "Doe-4711" and allowed.PatientBirthDate == ""
        assert content.count(b"Doe") == 2  # name and number: nothing else of the patient's texts
        assert content[:128] == bytes(128)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("kind", ["seg", "rtstruct"])  # it does not know label map segmentations
def test_dciodvfy_finds_no_error(kind: str, tmp_path: Path) -> None:
    _, segmentation, series = _read(_series(tmp_path / "ct", _organs()))
    WRITERS[kind](tmp_path / "x.dcm", segmentation, series, LABELS, ALGORITHM)
    said = subprocess.run(["dciodvfy", str(tmp_path / "x.dcm")], capture_output=True, text=True).stderr
    assert said and not [line for line in said.splitlines() if line.startswith("Error")]


@pytest.mark.skipif(shutil.which("plastimatch") is None, reason="plastimatch is not installed")
@pytest.mark.parametrize("how", [[], ["--xor-contours"]])
def test_plastimatch_fills_the_same_voxels(how: list[str], tmp_path: Path) -> None:
    import nibabel as nib

    folder = _series(tmp_path / "ct", _organs())
    _, segmentation, series = _read(folder)
    WRITERS["rtstruct"](tmp_path / "rt.dcm", segmentation, series, LABELS, ALGORITHM)
    subprocess.run(["plastimatch", "convert", "--input", str(tmp_path / "rt.dcm"), "--referenced-ct", str(folder),
                    "--output-prefix", str(tmp_path / "masks"), "--prefix-format", "nii.gz", *how], check=True)
    for organ, value in NAMES.items():
        (mask,) = (tmp_path / "masks").glob(f"{organ.replace(' ', '?')}.nii.gz")
        assert np.count_nonzero(np.asarray(nib.load(mask).dataobj)) == np.count_nonzero(_organs() == value)


@pytest.mark.skipif(DCMQI is None, reason="dcmqi is not installed")
@pytest.mark.parametrize("kind", ["seg", "labelmap"])
def test_dcmqi_reads_the_same_voxels(kind: str, tmp_path: Path) -> None:
    """dcmqi is what 3D Slicer's extension QuantitativeReporting reads DICOM SEG with."""
    import nibabel as nib

    organs = _organs()
    _, segmentation, series = _read(_series(tmp_path / "ct", organs))
    WRITERS[kind](tmp_path / "x.dcm", segmentation, series, LABELS, ALGORITHM)
    (tmp_path / "out").mkdir()
    subprocess.run([str(DCMQI), "--inputDICOM", str(tmp_path / "x.dcm"), "--outputDirectory", str(tmp_path / "out"),
                    "-t", "nii", "--mergeSegments"], check=True, capture_output=True)
    image = nib.load(tmp_path / "out" / "1.nii.gz")
    told = json.loads((tmp_path / "out" / "meta.json").read_text())["segmentAttributes"]
    values = {one["SegmentLabel"]: one["labelID"] for group in told for one in group}
    assert {name: values[name] for name in NAMES} == NAMES
    read = np.asarray(image.dataobj)
    for value in NAMES.values():
        ras = np.argwhere(read == value) @ image.affine[:3, :3].T + image.affine[:3, 3]
        _same_points(ras * (-1, -1, 1), _lps(organs, value, _AXIAL))


def test_colours_are_those_of_highdicom() -> None:
    for rgb in ((255, 255, 255), (0, 0, 0), (165, 85, 50), (30, 80, 220)):
        back = highdicom.color.CIELabColor.from_dicom_value(cielab(rgb)).to_rgb(clip=True)
        assert max(abs(a - b) for a, b in zip(back, rgb, strict=True)) <= 40  # white points differ


def test_nothing_but_a_series_is_taken(tmp_path: Path) -> None:
    folder = _series(tmp_path / "ct", _organs())
    with pytest.raises(AutoSam3dError) as caught:
        read_source_series(folder, None, ReadOptions())
    assert caught.value.code == "NOT_DICOM"
