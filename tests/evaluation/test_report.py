"""The page and the pictures: self-contained, complete, escaped, and the right way round."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from autosam3d.evaluation.evaluate import evaluate_folder
from autosam3d.evaluation.overlay import draw_planes, organ_color
from autosam3d.evaluation.report import overlay_png, write_report
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume

AFFINE = np.diag([2.0, 2.0, 4.0, 1.0])
ORGANS = {1: "liver", 2: "spleen", 3: "<b>odd & name</b>"}


def scan() -> tuple[Volume, Segmentation]:
    """[z, y, x]: a soft-tissue box in air; the liver on the patient's right, high up and in front."""
    hu = np.full((20, 40, 40), -1000.0, np.float32)
    hu[2:18, 5:35, 5:35] = 40
    labels = np.zeros((20, 40, 40), np.uint8)
    labels[11:17, 24:33, 26:33] = 1
    labels[4:8, 8:14, 8:14] = 2
    return Volume(hu, AFFINE), Segmentation(labels, AFFINE, organs={1: "liver", 2: "spleen"})


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, AFFINE), path)


@pytest.fixture
def evaluation(tmp_path):
    volume, truth = scan()
    for i in range(4):
        save(tmp_path / "imagesTs" / f"case_{i}_0000.nii.gz", volume.voxels_hu)
        save(tmp_path / "labelsTs" / f"case_{i}.nii.gz", truth.labels)
        prediction = np.roll(truth.labels, i, axis=2)
        prediction[2:4, 2:4, 30:34] = 3 * (i == 3)
        if i < 3:
            save(tmp_path / "predictions" / f"case_{i}.nii.gz", prediction)
    return evaluate_folder(tmp_path / "predictions", tmp_path / "labelsTs", labels=ORGANS, tolerances_mm=(1, 3))


class Page(HTMLParser):
    """Tags that are opened must be closed, in order; attributes are kept."""

    VOID = ("meta", "img", "br", "line", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_file_with_all_numbers(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    summary = evaluation.summary()
    for value in (summary.dice, *summary.nsd, *(organ.dice for organ in summary.organs if organ.dice)):
        assert f"{value.mean:.3f}" in page.text
        assert f"{value.low:.3f} to {value.high:.3f}" in page.text
    assert f"{summary.hd95_mm.mean:.2f}" in page.text
    for case in evaluation.cases:
        assert case.name in page.text
    for words in ("1 of 4 cases", "Missing: case_3", "false positive", "-160 to 240 HU", "NSD at 3 mm",
                  "Not a medical device", "Worst case: case_2", "Best case: case_0"):
        assert words in page.text, words


def test_report_asks_nothing_of_a_network(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 9  # best, median, worst; three planes each
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'")
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        picture.load()
        assert min(picture.size) > 50
    assert len(text) < 2_000_000


def test_names_from_files_are_escaped(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<b>odd" not in text
    assert "&lt;b&gt;odd &amp; name" in text


def test_report_survives_scans_and_predictions_that_went_away(evaluation, tmp_path):
    for path in (tmp_path / "imagesTs").iterdir():
        path.write_bytes(b"broken")
    (tmp_path / "predictions" / "case_0.nii.gz").unlink()
    write_report(evaluation, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "no picture" in page.text
    assert "the CT could not be read" in page.text
    assert sum(tag == "img" for tag, name, _ in page.attributes if name == "src") == 6


def colored(image: Image.Image) -> tuple[float, float]:
    """Mean (row, column) of the pixels that are not grey, as shares of the height and width."""
    pixels = np.asarray(image, np.int32)
    rows, columns = np.nonzero(pixels.max(2) - pixels.min(2) > 40)
    return float(rows.mean() / image.height), float(columns.mean() / image.width)


def test_planes_have_the_radiological_sides():
    volume, segmentation = scan()
    only_liver = Segmentation(np.where(segmentation.labels == 1, 1, 0).astype(np.uint8), AFFINE, organs={1: "liver"})
    axial, coronal, sagittal = draw_planes(volume, only_liver)
    assert [p.name for p in (axial, coronal, sagittal)] == ["axial", "coronal", "sagittal"]
    row, column = colored(axial.image)
    assert row < 0.5, "the front belongs to the top"
    assert column < 0.5, "the patient's right belongs to the left of the picture"
    row, column = colored(coronal.image)
    assert row < 0.5, "the head belongs to the top"
    assert column < 0.5
    row, column = colored(sagittal.image)
    assert row < 0.5
    assert column < 0.5, "the face looks to the left"
    assert (axial.index, coronal.index, sagittal.index) == (11, 24, 26)


def test_a_millimetre_is_equally_long_everywhere():
    volume, segmentation = scan()
    axial, coronal, sagittal = (plane.image for plane in draw_planes(volume, segmentation))
    assert abs(axial.width - coronal.width) <= 1
    assert abs(axial.height - sagittal.width) <= 1
    assert abs(coronal.height - sagittal.height) <= 1
    assert coronal.height / coronal.width == pytest.approx(20 * 4 / (40 * 2), rel=0.02)


def test_the_window_sets_the_greys():
    volume, segmentation = scan()
    bare = Segmentation(np.zeros_like(segmentation.labels), AFFINE)
    for hu_window, grey in ((HuWindow(low_hu=-160, high_hu=240), 127), (HuWindow(low_hu=0, high_hu=80), 127),
                            (HuWindow(low_hu=-1000, high_hu=300), 204)):
        image = np.asarray(draw_planes(volume, bare, hu_window=hu_window)[0].image)[..., 0]
        assert abs(int(image[image.shape[0] // 4, image.shape[1] // 4]) - grey) <= 1  # inside the body, off the letters
        assert image[image.shape[0] // 4, 2] <= 1  # air


def test_the_worst_case_is_cut_where_it_is_wrong():
    volume, truth = scan()
    labels = truth.labels.copy()
    labels[14, 2:6, 2:6] = 2
    planes = draw_planes(volume, Segmentation(labels, AFFINE), truth=truth, at_errors=True)
    assert planes[0].index == 14
    with pytest.raises(ValueError, match="one shape"):
        draw_planes(volume, Segmentation(labels[1:], AFFINE), truth=truth)


@pytest.mark.parametrize("with_scan", [True, False])
@pytest.mark.parametrize("with_truth", [True, False])
def test_overlay_png(tmp_path, with_scan, with_truth):
    volume, segmentation = scan()
    overlay_png(volume if with_scan else None, segmentation, tmp_path / "o.png",
                labels=LabelMap(organs=("liver", "spleen")), truth=segmentation if with_truth else None)
    image = Image.open(tmp_path / "o.png")
    assert image.format == "PNG"
    assert image.width > 2 * image.height
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for label, organ in segmentation.organs.items():
        assert (pixels == organ_color(label, organ)).all(1).sum() > 50, "the legend has the organ's own colour"


def test_names_given_for_a_bare_label_map_color_the_organs_too(tmp_path):
    volume, segmentation = scan()
    bare = Segmentation(segmentation.labels, AFFINE)
    overlay_png(volume, segmentation, tmp_path / "a.png")
    overlay_png(volume, bare, tmp_path / "b.png", labels=LabelMap(organs=("liver", "spleen")))
    overlay_png(volume, bare, tmp_path / "c.png")
    a, b, c = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or (a != c).any()


def test_an_empty_segmentation_can_be_drawn(tmp_path):
    volume, segmentation = scan()
    overlay_png(volume, Segmentation(np.zeros_like(segmentation.labels), AFFINE), tmp_path / "o.png")
    assert Image.open(tmp_path / "o.png").width > 300


def test_colors_are_those_of_the_label_map_by_name_and_number():
    organs = LabelMap(organs=("liver", "something new", "spleen"))
    assert [organ_color(i, name) for i, name in organs.by_index.items()] == [organs.color(i) for i in (1, 2, 3)]
    assert organ_color(40, "liver") == organs.color(1)
    assert len({organ_color(i, "background") for i in (1, 300, 65535)}) > 1
