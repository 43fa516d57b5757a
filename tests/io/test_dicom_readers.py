"""DICOM objects that other readers used to lose something of: long contours, uneven slices, names in other scripts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")

import make_dicom as bad
import nibabel as nib
import pydicom
from pydicom.uid import ImplicitVRLittleEndian

from autosam3d.io import read_ct
from autosam3d.io.dicom.codes import organ_code
from autosam3d.io.dicom.rtstruct import write_rtstruct
from autosam3d.io.dicom.seg import planes_of, write_dicom_seg
from autosam3d.io.dicom.source import Algorithm, SourceSeries, read_source_series
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation

LABELS = LabelMap(organs=("lungs", "liver"))
ALGORITHM = Algorithm("autosam3d test", "1.2.3", "ab" * 32)
DCMQI = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent)) or shutil.which("segimage2itkimage")
UNEVEN = np.concatenate([[0], np.cumsum(np.where(np.arange(11) % 3 == 0, 3.4, 2.0))])


def _read(folder: Path, labels: np.ndarray, change: bad.Change) -> tuple[Segmentation, SourceSeries]:
    """Labels [slice, row, column] as a series whose voxels are 300 HU times their label, and as it is read."""
    folder.mkdir()
    for index, plane in enumerate(labels):
        ds = bad.make_slice(index, np.int16(300) * plane + (plane == 0) * np.int16(-900), 0.0)
        ds.ImagePositionPatient = [-20.5, -30.25, 3.0 * index]
        change(ds, index)
        bad.save(ds, folder / f"{index:03d}.dcm")
    volume = read_ct(folder)
    found = np.clip(np.rint(volume.voxels_hu / 300), 0, 2).astype(np.uint8)
    return (Segmentation(found, volume.affine, volume.source, warnings=volume.warnings),
            read_source_series(folder, volume.source))


def _blocks() -> np.ndarray:
    labels = np.zeros((12, 20, 24), np.uint8)
    labels[1:9, 2:12, 3:16], labels[5:11, 14:19, 1:9] = 1, 2
    return labels


def _uneven(ds: Any, index: int) -> None:
    ds.ImagePositionPatient = [-20.5, -30.25, float(UNEVEN[index])]


def _tilted(ds: Any, index: int) -> None:
    sine, cosine = np.sin(np.radians(12)), np.cos(np.radians(12))
    ds.ImageOrientationPatient = [1, 0, 0, 0, f"{cosine:.8f}", f"{-sine:.8f}"]


def _by_dcmqi(path: Path, folder: Path) -> dict[int, tuple[int, float]] | None:
    """Segment to (voxels, ml) as 3D Slicer's reader has them; None where it refuses."""
    folder.mkdir()
    done = subprocess.run([str(DCMQI), "--inputDICOM", str(path), "--outputDirectory", str(folder), "-t", "nii",
                           "--mergeSegments"], capture_output=True, text=True)
    if done.returncode or "ERROR" in done.stderr or not (folder / "1.nii.gz").exists():
        return None
    image = nib.load(folder / "1.nii.gz")
    assert "segmentAttributes" in json.loads((folder / "meta.json").read_text())
    array, voxel_ml = np.asarray(image.dataobj), float(np.prod(image.header.get_zooms())) / 1000
    return {value: (int((array == value).sum()), float((array == value).sum()) * voxel_ml) for value in (1, 2)}


@pytest.mark.skipif(DCMQI is None, reason="dcmqi is not installed")
@pytest.mark.parametrize("name, change", [("even", lambda ds, i: None), ("uneven", _uneven), ("tilted", _tilted)])
def test_what_slicers_reader_makes_of_a_seg_is_said(name: str, change: bad.Change, tmp_path: Path) -> None:
    segmentation, series = _read(tmp_path / "ct", _blocks(), change)
    warnings = write_dicom_seg(tmp_path / "seg.dcm", segmentation, series, LABELS, ALGORITHM)
    planes, found = planes_of(segmentation), _by_dcmqi(tmp_path / "seg.dcm", tmp_path / "out")
    voxels = {value: int((planes == value).sum()) for value in (1, 2)}
    if name == "even":
        assert warnings == () and found is not None
        assert {value: count for value, (count, _) in found.items()} == voxels
        for value, (_, ml) in found.items():
            assert ml == pytest.approx(segmentation.volume_ml(value))
        return
    (warning,) = warnings
    assert warning.startswith(f"the slices are {'tilted' if name == 'tilted' else 'unevenly spaced'}")
    assert "3D Slicer" in warning and "take NIfTI" in warning
    if name == "tilted":
        assert found is None
    else:
        assert found is not None
        assert any(abs(ml / segmentation.volume_ml(value) - 1) > 0.1 for value, (_, ml) in found.items())


def _measures(path: Path) -> list[Any]:
    """Of each frame."""
    ds = pydicom.dcmread(path)
    shared = ds.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
    return [(shared or group.PixelMeasuresSequence)[0] for group in ds.PerFrameFunctionalGroupsSequence]


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_uneven_slices_have_their_own_thickness_and_no_common_distance(kind: Any, tmp_path: Path) -> None:
    segmentation, series = _read(tmp_path / "ct", _blocks(), _uneven)
    write_dicom_seg(tmp_path / "seg.dcm", segmentation, series, LABELS, ALGORITHM, kind)
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    middles = (UNEVEN[:-1] + UNEVEN[1:]) / 2
    expected = np.diff([2 * UNEVEN[0] - middles[0], *middles, 2 * UNEVEN[-1] - middles[-1]])
    for group, measures in zip(ds.PerFrameFunctionalGroupsSequence, _measures(tmp_path / "seg.dcm"), strict=True):
        index = np.abs(UNEVEN - float(group.PlanePositionSequence[0].ImagePositionPatient[2])).argmin()
        assert float(measures.SliceThickness) == pytest.approx(expected[index], abs=1e-6)
        assert list(measures.PixelSpacing) == [bad.SPACING[1], bad.SPACING[2]]
        assert "SpacingBetweenSlices" not in measures
    if kind == "binary":  # whoever adds up the frames has the volume of what was found
        frames = dict.fromkeys((1, 2), 0.0)
        for frame, group, measures in zip(ds.pixel_array, ds.PerFrameFunctionalGroupsSequence,
                                          _measures(tmp_path / "seg.dcm"), strict=True):
            number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            frames[number] += float(frame.sum() * np.prod(measures.PixelSpacing) * measures.SliceThickness) / 1000
        planes = planes_of(segmentation)
        area = bad.SPACING[1] * bad.SPACING[2] / 1000
        for value, ml in frames.items():
            counts = (planes == value).sum(axis=(1, 2))
            assert ml == pytest.approx(float(counts @ expected) * area)


@pytest.mark.parametrize("change", [lambda ds, i: None, _tilted])
def test_even_slices_share_one_true_distance(change: bad.Change, tmp_path: Path) -> None:
    """Along the normal, which is what the attribute means: also where a stack leans."""
    segmentation, series = _read(tmp_path / "ct", _blocks(), change)
    write_dicom_seg(tmp_path / "seg.dcm", segmentation, series, LABELS, ALGORITHM)
    orientation = np.array(series.images[0].ImageOrientationPatient, float).reshape(2, 3)
    step = 3.0 * abs(np.cross(*orientation)[2])
    for measures in _measures(tmp_path / "seg.dcm"):
        assert (float(measures.SpacingBetweenSlices), float(measures.SliceThickness)) == pytest.approx((step, step))


@pytest.fixture(scope="module")
def sponge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """(series, RTSTRUCT, mask [slice, row, column]) of an organ with more holes than 65,534 bytes of contour hold."""
    tmp_path = tmp_path_factory.mktemp("sponge")
    mask = np.zeros((8, 200, 200), np.uint8)
    mask[2:4, 10:190, 10:190] = 1
    mask[2:4, 12:188:4, 12:188:4] = 0

    def change(ds: Any, index: int) -> None:
        ds.PixelSpacing = [0.7, 0.7]

    segmentation, series = _read(tmp_path / "ct", mask, change)
    write_rtstruct(tmp_path / "rt.dcm", segmentation, series, LABELS, ALGORITHM)
    return tmp_path / "ct", tmp_path / "rt.dcm", mask


def test_a_contour_of_any_length_is_numbers(sponge: tuple[Path, Path, np.ndarray]) -> None:
    ds = pydicom.dcmread(sponge[1])
    assert ds.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    contours = [contour for item in ds.ROIContourSequence for contour in item.ContourSequence]
    assert max(len("\\".join(map(str, contour.ContourData))) for contour in contours) > 65534
    for contour in contours:
        assert len(contour.ContourData) == 3 * contour.NumberOfContourPoints


@pytest.mark.skipif(shutil.which("plastimatch") is None, reason="plastimatch is not installed")
def test_plastimatch_reads_a_long_contour_whole(sponge: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    series, rtstruct, mask = sponge
    subprocess.run(["plastimatch", "convert", "--input", str(rtstruct), "--referenced-ct", str(series),
                    "--output-prefix", str(tmp_path / "masks"), "--prefix-format", "nii.gz"], check=True,
                   capture_output=True)
    (path,) = (tmp_path / "masks").glob("*.nii.gz")
    assert np.count_nonzero(np.asarray(nib.load(path).dataobj)) == np.count_nonzero(mask)


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmtk is not installed")
def test_dcmtk_takes_a_long_contour_for_numbers(sponge: tuple[Path, Path, np.ndarray]) -> None:
    told = subprocess.run(["dcmdump", "+P", "ContourData", str(sponge[1])], capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in told.stdout.splitlines()} == {"DS"}


def test_every_organ_has_a_code_of_its_own() -> None:
    organs = ("vertebrae_lumbar_1", "vertebrae_lumbar_2", "iliac_artery_common_left", "iliac_artery_common_right",
              "Liver lobe", "liver_lobe", "liver lobe", "größe", "an_organ_of_16_ch", "my^own\\organ", "my own organ")
    labels = LabelMap(organs=organs)
    codes = [organ_code(labels, value) for value in range(1, len(organs) + 1)]
    assert len({code for code, _, _ in codes}) == len(organs)
    assert all(0 < len(code) <= 16 and "\\" not in code for code, _, _ in codes)
    # Who has written objects keeps their codes, whatever other organs a model has.
    assert organ_code(LabelMap(organs=("liver_lobe",)), 1) == ("LIVER_LOBE", "99AUTOSAM3D", "Liver lobe")
    assert organ_code(LabelMap(organs=organs[1:2]), 1) == codes[1] == (
        "VERTEBR_B3SMIMWJ", "99AUTOSAM3D", "Vertebrae lumbar 2")


@pytest.mark.parametrize("sets, name", [
    (["", "ISO 2022 IR 87"], "TEST^REI=試験\u3000例^見本=てすと\u3000れい^みほん"), ("GB18030", "Ce^Shi=测试^例\ue000"),
    (["", "ISO 2022 IR 149"], "Test^Ye=시험^예"), ("ISO_IR 144", "Пример^Тест"), ("ISO_IR 192", "نمونه\u200cای^آزمون"),
    ("ISO_IR 192", "E\u0301tude\u00a0B^Ünit"),
])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_name_in_any_script_is_carried_as_it_is(sets: Any, name: str, tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.SpecificCharacterSet, ds.PatientName = sets, name

    segmentation, series = _read(tmp_path / "ct", _blocks(), change)
    assert write_dicom_seg(tmp_path / "seg.dcm", segmentation, series, LABELS, ALGORITHM) == ()
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").PatientName) == name


@pytest.mark.parametrize("name", ["Doe\u202eJane", "Doe\x07", "Doe\u2028Jane"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_what_no_name_is_written_with_is_left_out(name: str, tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 192", name

    _, series = _read(tmp_path / "ct", _blocks(), change)
    assert series.identity.PatientName == "" and "PatientName" in " ".join(series.warnings)
