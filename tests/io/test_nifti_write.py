"""Writing: a segmentation comes back onto the very grid of its scan, whole, named, and without a patient's data."""

from __future__ import annotations

import json
from pathlib import Path

import make_nifti as bad
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from test_nifti import ORIENTATIONS, oriented_affine, write_oriented

from autosam3d.errors import ResourceError, UsageError
from autosam3d.io import ReadOptions, read_ct, read_segmentation, write_array, write_ct, write_segmentation
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume, same_grid

ORGANS = LabelMap(organs=("right_kidney", "left_kidney", "liver"), side_pairs=(("right_kidney", "left_kidney"),))
PLACE = ["qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
         "srow_x", "srow_y", "srow_z", "xyzt_units"]


def two_kidneys(volume: Volume) -> Segmentation:
    """Label 1 in the right half, 2 in the left half, as the array in memory has them (x runs to the right)."""
    labels = np.zeros(volume.shape, np.uint8)
    depth, height, width = volume.shape
    labels[depth // 3 : depth // 2 + 1, 1 : height // 2, width - 3 :] = 1
    labels[depth // 3 : depth // 2 + 1, 1 : height // 2, :2] = 2
    return Segmentation(labels, volume.affine, volume.source)


def centroid_mm(array_ijk: np.ndarray, affine: np.ndarray, label: int) -> np.ndarray:
    return (affine @ [*np.argwhere(array_ijk == label).mean(axis=0), 1])[:3]


def check_round_trip(folder: Path, affine: np.ndarray, forms: str) -> None:
    write_oriented(folder / "ct.nii.gz", affine, forms)
    volume = read_ct(folder / "ct.nii.gz")
    segmentation = two_kidneys(volume)
    write_segmentation(folder / "seg.nii.gz", segmentation, ORGANS)
    scan, written = nib.load(folder / "ct.nii.gz"), nib.load(folder / "seg.nii.gz")
    assert isinstance(scan, nib.Nifti1Image) and isinstance(written, nib.Nifti1Image)
    for name in PLACE:
        np.testing.assert_array_equal(written.header[name], scan.header[name])
    np.testing.assert_array_equal(written.header["pixdim"][:4], scan.header["pixdim"][:4])
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert written.shape == scan.shape and written.get_data_dtype() == np.uint8
    stored = np.asarray(written.dataobj)
    for label in (1, 2):
        meant = centroid_mm(segmentation.labels.T, volume.affine, label)
        assert np.abs(centroid_mm(stored, written.affine, label) - meant).max() <= 1e-3
    # Right is where x in RAS+ is larger: the kidneys do not trade places.
    sides = volume.affine[:3, 0] @ (centroid_mm(stored, written.affine, 1) - centroid_mm(stored, written.affine, 2))
    assert sides > 0
    again = read_segmentation(folder / "seg.nii.gz")
    np.testing.assert_array_equal(again.labels, segmentation.labels)
    assert same_grid(again, volume, 1e-6) and again.organs == ORGANS.by_index


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_comes_back(codes: str, tmp_path: Path) -> None:
    for forms in ("sform", "qform", "both"):
        check_round_trip(tmp_path, oriented_affine(codes), forms)


@pytest.mark.parametrize("turn", [(10, 0, 0), (0, -20, 0), (0, 0, 35), (12, -7, 30), (-40, 3, 5)])
def test_oblique_scans_come_back(turn: tuple[float, float, float], tmp_path: Path) -> None:
    for codes in ("LPS", "IRA"):
        check_round_trip(tmp_path, oriented_affine(codes, turn), "both")


def test_thick_slices_come_back(tmp_path: Path) -> None:
    check_round_trip(tmp_path, oriented_affine("LPS") @ np.diag([2, 1, 1.2, 1]), "sform")


@pytest.mark.parametrize("changes", [
    {"order": ">"}, {"version": 2}, {"version": 2, "order": ">"},
    {"xyzt_units": 3, "srow_x": (2000, 0, 0, 9000), "srow_y": (0, 2500, 0, 0), "srow_z": (0, 0, 3000, 0),
     "pixdim": (1, 2000, 2500, 3000, 1, 1, 1, 1)},
])
def test_other_headers_come_back(changes: dict, tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(bad.nifti_bytes(**changes))
    volume = read_ct(tmp_path / "ct.nii")
    write_segmentation(tmp_path / "seg.nii.gz", two_kidneys(volume), ORGANS)
    scan, written = nib.load(tmp_path / "ct.nii"), nib.load(tmp_path / "seg.nii.gz")
    assert type(scan) is type(written)
    for name in PLACE:
        np.testing.assert_array_equal(written.header[name], scan.header[name])  # type: ignore[attr-defined]
    assert same_grid(read_segmentation(tmp_path / "seg.nii.gz"), volume, 1e-6)


def test_a_broken_transform_is_not_handed_on(tmp_path: Path) -> None:
    path = bad.BROKEN["19_sform_nan_qform_sound"][0](tmp_path)
    volume = read_ct(path, ReadOptions(prefer="qform"))
    write_segmentation(tmp_path / "seg.nii.gz", two_kidneys(volume), ORGANS)
    assert same_grid(read_segmentation(tmp_path / "seg.nii.gz"), volume, 1e-6)


def test_nothing_of_the_inputs_free_text_is_written(tmp_path: Path) -> None:
    texts = {name: f"Doe^{name}".encode() for name in ("descrip", "db_name", "aux_file", "intent_name", "data_type")}
    extension = b"\1\0\0\0" + np.array([32, 6], "<i4").tobytes() + b"Doe^extension".ljust(24, b"\0")
    (tmp_path / "ct.nii").write_bytes(bad.nifti_bytes(extension=extension, **texts))
    out = tmp_path / "out"
    out.mkdir()
    write_segmentation(out / "seg.nii", two_kidneys(read_ct(tmp_path / "ct.nii")), ORGANS)
    assert len(list(out.iterdir())) == 4
    for path in out.iterdir():
        assert b"Doe" not in path.read_bytes()


def test_side_cars_name_colour_and_code_every_organ(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "a.b.nii.gz", Segmentation(np.zeros((9, 9, 9), np.uint8), np.eye(4) * 3), ORGANS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.ctbl", "a.b.json", "a.b.labels.txt", "a.b.nii.gz"]
    tree = json.loads((tmp_path / "a.b.json").read_text())
    assert tree["organs"] == {"1": "right_kidney", "2": "left_kidney", "3": "liver"}
    assert tree["labels"][2] == {
        "value": 3, "name": "liver", "color_rgb": list(ORGANS.color(3)), "snomed_ct": ORGANS.snomed(3)
    }
    r, g, b = ORGANS.color(3)
    assert f'    3 {r:5d}{g:5d}{b:5d}        1  1  1    "liver"\n' in (tmp_path / "a.b.labels.txt").read_text()
    assert f"3 liver {r} {g} {b} 255\n" in (tmp_path / "a.b.ctbl").read_text()


def test_names_come_from_the_side_car_where_the_image_has_none(tmp_path: Path) -> None:
    (tmp_path / "seg.nii").write_bytes(bad.nifti_bytes(np.ones(bad.SHAPE, np.uint8)))
    (tmp_path / "seg.json").write_text('{"organs": {"1": "liver"}}')
    assert read_segmentation(tmp_path / "seg.nii").organs == {1: "liver"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_segmentation(tmp_path / name / f"{name}.nii.gz", Segmentation(labels, np.diag([2.0, 2, 2, 1])), ORGANS)
    assert (tmp_path / "a/a.nii.gz").read_bytes() == (tmp_path / "b/b.nii.gz").read_bytes()


def test_uint16_labels_are_kept_and_narrow_ones_are_narrowed(tmp_path: Path) -> None:
    for largest, dtype in ((200, np.uint8), (1000, np.uint16)):
        labels = np.zeros((9, 9, 9), np.uint16)
        labels[4, 4, 4] = largest
        write_segmentation(tmp_path / "a.nii.gz", Segmentation(labels, np.diag([3.0, 3, 3, 1])), ORGANS)
        again = read_segmentation(tmp_path / "a.nii.gz")
        assert again.labels.dtype == dtype and again.labels[4, 4, 4] == largest


def test_simpleitk_sees_the_same_labels_in_the_same_place(tmp_path: Path) -> None:
    write_oriented(tmp_path / "ct.nii.gz", oriented_affine("LSA", (12, -7, 30)), "both")
    volume = read_ct(tmp_path / "ct.nii.gz")
    segmentation = two_kidneys(volume)
    write_segmentation(tmp_path / "seg.nii.gz", segmentation, ORGANS)
    image = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
    for z, y, x in np.argwhere(segmentation.labels > 0)[::7]:
        right, front, up = (volume.affine @ (x, y, z, 1))[:3]
        assert image[image.TransformPhysicalPointToIndex((-right, -front, up))] == segmentation.labels[z, y, x]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "ASR", "IRP"])
def test_ct_is_stored_as_asked_and_reads_back(codes: str, tmp_path: Path) -> None:
    hu = bad.ct_array((20, 14, 12)).astype(np.float32).T
    affine = oriented_affine("RAS", (5, -8, 10))
    write_ct(tmp_path / "ct.nii.gz", Volume(hu, affine), axis_codes=codes)
    image = nib.load(tmp_path / "ct.nii.gz")
    assert nib.aff2axcodes(image.affine) == tuple(codes)  # type: ignore[attr-defined]
    volume = read_ct(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(volume.voxels_hu, hu)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    write_ct(tmp_path / "again.nii.gz", volume)
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "ct.nii.gz").read_bytes()


def test_ct_is_rounded_and_clipped_to_16_bits(tmp_path: Path) -> None:
    hu = bad.ct_array((20, 14, 12)).astype(np.float32).T
    hu[0, 0, :4] = (-1000.4, -0.6, 1.5, 30000.0)
    write_ct(tmp_path / "ct.nii", Volume(hu, np.diag([2.0, 2, 2, 1])))
    assert np.asarray(nib.load(tmp_path / "ct.nii").dataobj)[:4, 0, 0].tolist() == [-1000, -1, 2, 30000]  # type: ignore


def test_any_array_with_any_affine(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    affine = oriented_affine("PIR", (3, 4, 5))
    write_array(tmp_path / "a.nii.gz", array, affine)
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), array)  # type: ignore[attr-defined]
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)  # type: ignore[attr-defined]


def test_long_axes_need_nifti_2(tmp_path: Path) -> None:
    write_array(tmp_path / "a.nii.gz", np.zeros((40_000, 2, 2), np.uint8), np.eye(4))
    assert isinstance(nib.load(tmp_path / "a.nii.gz"), nib.Nifti2Image)


def test_wrong_names_and_shapes(tmp_path: Path) -> None:
    segmentation = Segmentation(np.zeros((9, 9, 9), np.uint8), np.eye(4))
    for name in ("a.nrrd", "a", ".nii.gz"):
        with pytest.raises(UsageError) as caught:
            write_segmentation(tmp_path / name, segmentation, ORGANS)
        assert caught.value.code == "OUTPUT_NAME"
    (tmp_path / "a.nii").write_text("old")
    with pytest.raises(UsageError) as caught:
        write_segmentation(tmp_path / "a.nii", segmentation, ORGANS, overwrite=False)
    assert caught.value.code == "OUTPUT_EXISTS" and (tmp_path / "a.nii").read_text() == "old"
    path = bad.ODD["00_good"][0](tmp_path)
    with pytest.raises(ValueError, match="expected shape"):
        elsewhere = Segmentation(segmentation.labels, np.eye(4), read_ct(path).source)
        write_segmentation(tmp_path / "b.nii", elsewhere, ORGANS)
    with pytest.raises(ValueError, match="uint8 or uint16"):
        write_segmentation(tmp_path / "b.nii", Segmentation(np.zeros((9, 9, 9)), np.eye(4)), ORGANS)


def test_what_the_disk_garbles_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read back before it gets its name."""
    from autosam3d.io import files

    flush = files._flush

    def garble(path: Path) -> None:
        flush(path)
        if ".nii" in path.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(files, "_flush", garble)
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(ResourceError) as caught:
            write_segmentation(tmp_path / name, Segmentation(np.zeros((9, 9, 9), np.uint8), np.eye(4)), ORGANS)
        assert caught.value.code == "IO" and list(tmp_path.iterdir()) == []
