"""The page as a person uses it: DICOM folders, zips, drops, a choice of series, keyboard, phone, dark and light."""

# ruff: noqa: E402  the makers of slices lie beside
from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "badinput")]

import highdicom
import make_dicom as bad

from autosam3d.checkpoints.exported import load_exported, open_export
from autosam3d.data.phantom import make_phantom
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct, read_segmentation
from autosam3d.io.dicom.seg import write_dicom_seg
from autosam3d.io.dicom.source import Algorithm, read_source_series
from autosam3d.io.nifti.write import write_ct
from autosam3d.labels import LabelMap
from seg_frames import demand_equal_frames
from web_browser import Page

pytestmark = pytest.mark.slow
SHOTS = os.environ.get("AUTOSAM3D_WEB_SHOTS")
# A real series may be named here, to show the agreement on it.
SERIES = os.environ.get("AUTOSAM3D_WEB_SERIES", "")


def write_series(folder: Path, scan: Path, series_uid: str = bad.SERIES_UID, first: int = 0) -> Path:
    """The CT of a NIfTI file as DICOM slices: rows run to the left, columns to the back, the last slice first."""
    volume = read_ct(scan)
    folder.mkdir(parents=True)
    planes = volume.voxels_hu[:, ::-1, ::-1]
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0) * ((-1,), (-1,), (1,))
    for index, plane in enumerate(planes):
        ds = bad.make_slice(index, np.rint(plane).clip(-1024, 3071).astype(np.int16), 0.0)
        corner = volume.affine @ (volume.shape[2] - 1, volume.shape[1] - 1, index, 1)
        ds.ImagePositionPatient = [f"{v:.6f}" for v in corner[:3] * (-1, -1, 1)]
        ds.ImageOrientationPatient = [f"{v:.10f}"[:16] for v in (*-directions[:, 0], *-directions[:, 1])]
        ds.PixelSpacing = [f"{mm:.6f}" for mm in volume.spacing_mm[1:]]
        ds.SeriesInstanceUID = series_uid
        ds.SOPInstanceUID = f"{series_uid}.{index + 1}"
        bad.save(ds, folder / f"{first + len(planes) - index:04d}.dcm")
    return folder


@pytest.fixture(scope="module")
def ct_folder(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series") / "ct", phantom)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of one window, where it matters how it was given and not what is found in it."""
    path = tmp_path_factory.mktemp("flat") / "flat.nii.gz"
    write_ct(path, make_phantom(3, (10, 30, 30), (5.0, 8.0, 8.0))[0])
    return path


def _shot(page: Page, name: str) -> None:
    if SHOTS:
        page.page.wait_for_timeout(800)
        page.page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def test_a_folder_of_slices_becomes_nifti_and_dicom_seg(
    opened: Any, web_export: Path, ct_folder: Path, tmp_path: Path,
) -> None:
    page = opened(color_scheme="dark")
    assert page.isolated()
    for folder in [ct_folder, *(Path(name) for name in SERIES.split(os.pathsep) if name)]:
        assert page.segment(folder).startswith("Done"), page.outcome()
        _shot(page, f"folder_{folder.name}")
        ours = segment(read_ct(folder), load_exported(open_export(web_export), "onnxruntime", 1))
        theirs = read_segmentation(page.download("#nifti", tmp_path / "seg.nii.gz"))
        assert np.allclose(theirs.affine, ours.affine, atol=1e-4)
        equal = float(np.mean(ours.labels == theirs.labels))
        print(f"{folder.name}: {100 * equal:.5f} % of the voxels equal")
        assert equal >= 0.999 and (ours.labels > 0).sum() > 50
        seg = highdicom.seg.segread(page.download("#seg", tmp_path / "seg.dcm"))
        assert len(seg.segment_numbers) == len(np.unique(theirs.labels)) - 1
        for number, value in zip(seg.segment_numbers, np.unique(theirs.labels)[1:], strict=True):
            assert int(seg.get_volume(segment_numbers=[number]).array.sum()) == np.count_nonzero(theirs.labels == value)
            name = theirs.organs[int(value)].replace("_", " ")
            assert seg.get_segment_description(number).segment_label.lower() == name
    assert page.left_the_site() == [] and page.faults == []


def test_a_leaning_uneven_series_gets_its_labels_on_its_own_slices(opened_mini: Any, tmp_path: Path) -> None:
    from exports import mini_export

    slices = _vectors("52_53_tilted_uneven")
    (tmp_path / "ct").mkdir()
    for name, content in slices.items():
        (tmp_path / "ct" / name).write_bytes(content)
    page = opened_mini()
    assert page.isolated()
    assert page.drop(slices).startswith("Done"), page.outcome()
    volume = read_ct(tmp_path / "ct")
    assert len(volume.warnings) == 2
    said = page.page.inner_text("#warnings").splitlines()
    assert [warning for warning in volume.warnings if warning not in said] == []
    ours = segment(volume, load_exported(open_export(mini_export()), "onnxruntime", 1))
    theirs = read_segmentation(page.download("#nifti", tmp_path / "seg.nii.gz"))
    assert np.allclose(theirs.affine, ours.affine, atol=1e-4)
    assert np.mean(ours.labels == theirs.labels) >= 0.999
    for row in page.download("#csv", tmp_path / "seg.csv").read_text().splitlines()[1:]:
        label, _, voxels, ml, _ = row.split(",")
        assert int(voxels) == np.count_nonzero(theirs.labels == int(label))
        assert float(ml) == pytest.approx(ours.volume_ml(int(label)), rel=0.01)
    meant = replace(ours, labels=theirs.labels)
    write_dicom_seg(tmp_path / "ours.dcm", meant, read_source_series(tmp_path / "ct", volume.source),
                    LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),)),
                    Algorithm("autosam3d test", "1.2.3", "ab" * 32))
    assert demand_equal_frames(page.download("#seg", tmp_path / "seg.dcm"), tmp_path / "ours.dcm") >= 12
    assert page.left_the_site() == [] and page.faults == []


def test_zips_and_drops_and_a_choice_of_series(
    opened_mini: Any, flat: Path, tmp_path: Path,
) -> None:
    page = opened_mini()
    assert page.isolated()
    ct_folder = write_series(tmp_path / "ct", flat)
    slices = {p.name: p.read_bytes() for p in sorted(ct_folder.iterdir())}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in slices.items():
            archive.writestr(f"ct/{name}", content)
    assert page.drop({"ct.zip": packed.getvalue()}).startswith("Done")
    counts = page.page.inner_text("#organs")
    assert page.drop(slices).startswith("Done")
    assert page.page.inner_text("#organs") == counts
    assert page.drop({"scan.nii.gz": flat.read_bytes()}).startswith("Done")
    assert not page.page.is_visible("#seg")
    write_series(tmp_path / "two" / "a", flat)
    write_series(tmp_path / "two" / "b", flat, f"{bad.SERIES_UID}.7", first=500)
    page.page.set_input_files("#folder", tmp_path / "two")
    page.until("!document.querySelector('#choice').hidden")
    assert "10 slices of 30 x 30" in page.page.inner_text("#series")
    _shot(page, "choice")
    page.page.keyboard.press("Enter")  # the first of them has the focus
    assert page.outcome().startswith("Done")
    assert not page.page.is_visible("#choice") and page.page.inner_text("#organs") == counts
    # Refusals in words, and the page still works afterwards.
    less = {name: content for i, (name, content) in enumerate(slices.items()) if i not in (5, 6)}
    assert "missing are 2 after slice" in page.drop(less)
    assert "cut" in page.drop({"ct.zip": packed.getvalue()[:-2000]})
    assert page.drop(slices).startswith("Done")
    assert page.left_the_site() == [] and page.faults == []


def test_compressed_slices(opened_mini: Any) -> None:
    """OpenJPEG is there under the page's policy and offline; what decoders make of pixels is tested in web/test."""
    page = opened_mini()
    assert page.isolated()
    page.context.set_offline(True)
    assert page.drop(_vectors("00_good")).startswith("Done")
    plain = page.page.inner_text("#organs")
    assert page.drop(_vectors("jpeg 2000 signed 16")).startswith("Done")
    assert page.page.inner_text("#organs") == plain
    assert "cannot be decoded" in page.drop(_vectors("60_broken_jpeg2000"))
    other = {name: content.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.80")
             for name, content in _vectors("jpeg 2000 signed 16").items()}
    assert "compressed (JPEG-LS), which this page does not read" in page.drop(other)
    assert page.left_the_site() == [] and page.faults == []


def _vectors(name: str) -> dict[str, bytes]:
    """The files of a series of web/test/make_dicom_vectors.py."""
    folder = Path(__file__).resolve().parents[2] / "web/test/vectors"
    rows = json.loads((folder / "dicom.json").read_text("utf-8"))["series"]
    pool = gzip.decompress((folder / "dicom.bin.gz").read_bytes())
    return {file: pool[at : at + size] for file, at, size in next(r for r in rows if r["name"] == name)["files"]}


def test_by_keyboard_alone_on_a_phone(opened_mini: Any, phantom: Path) -> None:
    page = opened_mini(viewport={"width": 390, "height": 844}, color_scheme="light")
    assert page.isolated()
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    while page.page.evaluate("document.activeElement.id") != "file":
        page.page.keyboard.press("Tab")
    with page.page.expect_file_chooser() as chooser:
        page.page.keyboard.press("Space")
    chooser.value.set_files(phantom)
    assert page.outcome().startswith("Done")
    reached = []
    for _ in range(40):
        page.page.keyboard.press("Tab")
        reached.append(page.page.evaluate("document.activeElement.id || document.activeElement.type"))
    assert {"canvas", "file", "folder", "all", "none", "opacity", "nifti", "csv", "checkbox", "radio"} <= set(reached)
    page.page.focus("#csv")
    with page.page.expect_download() as download:
        page.page.keyboard.press("Enter")
    assert download.value.suggested_filename == "phantom_volumes.csv"
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    _shot(page, "phone_light")
    small = page.page.evaluate("""[...document.querySelectorAll('button, .button, #organs label')].filter((e) =>
        e.offsetParent && e.getBoundingClientRect().height < 40).map((e) => e.id || e.textContent)""")
    assert small == []


def test_names_for_a_screen_reader_and_contrast(opened: Any, phantom: Path) -> None:
    page = opened()
    assert page.isolated() and page.segment(phantom).startswith("Done")
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        tree = page.page.locator("body").aria_snapshot()
        for name in ("button \"Show all\"", "button \"Download NIfTI\"", "slider \"Opacity\"", "group \"View\"",
                     "radio \"3D\"", "img \"CT with organs", "status", "Open a folder of DICOM slices"):
            assert name in tree, tree
        assert tree.count("checkbox ") == 5 and "ml" in tree and "% sure" in tree
        # Of body text and quiet text on its ground. *Source*: WCAG 2.2, 1.4.3.
        for selector in ("#status", "#threads", "#organs small", "#left"):
            assert page.page.evaluate(_CONTRAST, selector) >= 4.5, (scheme, selector)


_CONTRAST = """(selector) => {
    const light = (text) => text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const one = light(getComputedStyle(document.querySelector(selector)).color);
    const two = light(getComputedStyle(document.querySelector('#panel')).backgroundColor);
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
}"""
