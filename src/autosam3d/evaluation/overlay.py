"""A segmentation drawn over its CT: axial, coronal and sagittal, the way a radiologist expects them.

Axial planes are seen from the feet and coronal ones from the front, so the patient's right is on the left of the
picture; in sagittal planes the face looks to the left. A millimetre is equally long in every direction and plane.
"""

from __future__ import annotations

import io as bytes_io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contourpy import contour_generator
from PIL import Image, ImageDraw, ImageFont

from autosam3d.geometry.preprocess import HuWindow
from autosam3d.io.files import write_bytes_atomic
from autosam3d.labels import LabelMap, Rgb
from autosam3d.volume import Segmentation, Volume

SOFT_TISSUE = HuWindow(low_hu=-160, high_hu=240)
"""Level 40, width 400: the usual abdominal and neck setting."""
MARGIN_MM = 30.0
"""CT shown around the organs."""
PLANE_PX = 620
"""Longest edge of a plane."""
_FILL = 0.42
_LINE_PX, _HALO_PX = 1.8, 3.6
_FINER = 3
_INK, _PAPER, _DIM = (235, 238, 242), (12, 14, 17), (150, 158, 168)

# name, array axis that is cut, letters at left, right, top, bottom
_PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))
_Mask = np.ndarray


@dataclass(frozen=True)
class Plane:
    """One picture and where it was cut."""

    name: str
    index: int
    """Along the cut axis of the array [z, y, x]."""
    image: Image.Image


def overlay_png(
    volume: Volume | None,
    segmentation: Segmentation,
    path: str | Path,
    *,
    labels: LabelMap | Mapping[int, str] | None = None,
    truth: Segmentation | None = None,
    hu_window: HuWindow = SOFT_TISSUE,
) -> None:
    """Write a PNG of three planes with a legend, atomically.

    Args:
        volume: on the grid of `segmentation`; None draws on black.
        labels: names and colours; default the names that `segmentation` carries.
        truth: drawn as contour lines where given; `segmentation` is filled.
    """
    organs = _organs(labels, segmentation)
    planes = draw_planes(volume, segmentation, truth=truth, organs=organs, hu_window=hu_window)
    present = np.flatnonzero(np.bincount(segmentation.labels.ravel()))
    if truth is not None:
        present = np.union1d(present, np.flatnonzero(np.bincount(truth.labels.ravel())))
    shown = {int(label): organs.get(int(label), f"label {label}") for label in present if label}
    sheet = _sheet([plane.image for plane in planes], shown, truth is not None, hu_window if volume else None)
    write_bytes_atomic(path, encode(sheet, "PNG"))


def draw_planes(
    volume: Volume | None,
    segmentation: Segmentation,
    *,
    truth: Segmentation | None = None,
    organs: Mapping[int, str] | None = None,
    at_errors: bool = False,
    hu_window: HuWindow = SOFT_TISSUE,
) -> list[Plane]:
    """Axial, coronal and sagittal plane of one case, all at one scale.

    Args:
        organs: for the colours; default the names that `segmentation` carries.
        at_errors: cut where most voxels differ from `truth`, instead of where the organs show largest.

    Raises:
        ValueError: arrays of different shapes.
    """
    for other in (volume, truth):
        if other is not None and other.shape != segmentation.shape:
            raise ValueError(f"expected arrays of one shape {segmentation.shape}, got {other.shape}")
    arrays = [segmentation.labels] if truth is None else [segmentation.labels, truth.labels]
    box = _region(arrays, segmentation.spacing_mm)
    arrays = [a[box] for a in arrays]
    cut = _slices_to_show(arrays, at_errors)
    extent_mm = [n * mm for n, mm in zip(arrays[0].shape, segmentation.spacing_mm, strict=True)]
    px_per_mm = PLANE_PX / max(extent_mm)
    narrowest_mm = min(extent_mm[1:])  # what the three pictures show from left to right
    bar_mm = next((mm for mm in (100, 50, 20, 10) if mm < narrowest_mm / 2.5), 5)
    colors = {k: organ_color(k, name) for k, name in (organs or segmentation.organs).items()}
    planes = []
    for name, axis, letters in _PLANES:
        sides_mm = [mm for i, mm in enumerate(segmentation.spacing_mm) if i != axis]
        px = tuple(px_per_mm * mm for mm in sides_mm)
        layers = [_on_screen(a, axis, cut[axis]) for a in arrays]
        grey = None if volume is None else _on_screen(volume.voxels_hu[box], axis, cut[axis])
        image = _draw(_backdrop(grey, layers[0].shape, px, hu_window), layers, (px[0], px[1]), colors)
        _write_on(image, letters, f"{name} {cut[axis] + (box[axis].start or 0)}", bar_mm, px_per_mm)
        planes.append(Plane(name, cut[axis] + (box[axis].start or 0), image))
    return planes


def widest_section(segmentation: Segmentation) -> tuple[tuple[slice, slice, slice], int]:
    """The box [z, y, x] of all organs with `MARGIN_MM` around it, and the axial slice where they show largest."""
    box = _region([segmentation.labels], segmentation.spacing_mm)
    return box, _slices_to_show([segmentation.labels[box]], False)[0] + box[0].start


def draw_axial(
    volume: Volume | None,
    segmentation: Segmentation,
    *,
    index: int,
    box: tuple[slice, slice, slice],
    organs: Mapping[int, str] | None = None,
    hu_window: HuWindow = SOFT_TISSUE,
    longest_px: int = 400,
    letters: bool = False,
) -> Image.Image:
    """One axial slice, organs filled and outlined, for pictures that stand side by side.

    Args:
        index: of the slice in the whole array.
        box: what is shown, as `widest_section` has it; its z is not used.
        organs: for the colours; default the names that `segmentation` carries.
        letters: write right, left, front, back and a scale bar on it.

    Raises:
        ValueError: arrays of different shapes.
    """
    if volume is not None and volume.shape != segmentation.shape:
        raise ValueError(f"expected arrays of one shape {segmentation.shape}, got {volume.shape}")
    part = (slice(index, index + 1), box[1], box[2])
    labels = _on_screen(segmentation.labels[part], 0, 0)
    sides_mm = segmentation.spacing_mm[1:]
    px_per_mm = longest_px / max(n * mm for n, mm in zip(labels.shape, sides_mm, strict=True))
    px = (px_per_mm * sides_mm[0], px_per_mm * sides_mm[1])
    grey = None if volume is None else _on_screen(volume.voxels_hu[part], 0, 0)
    colors = {k: organ_color(k, name) for k, name in (organs or segmentation.organs).items()}
    image = _draw(_backdrop(grey, labels.shape, px, hu_window), [labels], px, colors)
    if letters:
        _write_on(image, "RLAP", "", 20, px_per_mm)
    return image


def organ_color(label: int, organ: str) -> Rgb:
    """The colour of `LabelMap` for an organ of this name and number, for label maps with gaps too."""
    place = (label - 1) % 255 + 1
    before = tuple(f"#{i}" for i in range(1, place))
    return LabelMap(organs=(*before, organ if organ != "background" else "#0")).color(place)


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of a PNG, or of a JPEG without chroma subsampling (thin coloured lines survive)."""
    buffer = bytes_io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", quality=86, subsampling=0, optimize=True, progressive=True)
    else:
        image.save(buffer, kind, optimize=True)
    return buffer.getvalue()


def _organs(labels: LabelMap | Mapping[int, str] | None, segmentation: Segmentation) -> Mapping[int, str]:
    if labels is None:
        return segmentation.organs
    return labels.by_index if isinstance(labels, LabelMap) else labels


def _region(arrays: list[np.ndarray], spacing_mm: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """The box of all organs and `MARGIN_MM` around it; the whole array where there is none."""
    somewhere = arrays[0] > 0 if len(arrays) == 1 else (arrays[0] > 0) | (arrays[1] > 0)
    spans = []
    for axis, mm in enumerate(spacing_mm):
        hit = np.flatnonzero(np.any(somewhere, axis=tuple(i for i in range(3) if i != axis)))
        size, margin = somewhere.shape[axis], math.ceil(MARGIN_MM / mm)
        spans.append(slice(max(0, int(hit[0]) - margin), min(size, int(hit[-1]) + 1 + margin)) if len(hit)
                     else slice(0, size))
    return spans[0], spans[1], spans[2]


def _slices_to_show(arrays: list[np.ndarray], at_errors: bool) -> tuple[int, int, int]:
    """Per axis, the slice with most wrong voxels, or the one where the organs together show largest.

    An organ's section counts as a share of its largest one, so that small organs have a say.
    """
    shares = [np.zeros(n) for n in arrays[0].shape]
    if at_errors and len(arrays) == 2:
        masks = [arrays[0] != arrays[1]]
    else:
        masks = [arrays[-1] == label for label in np.flatnonzero(np.bincount(arrays[-1].ravel())) if label]
    for mask in masks:
        for axis, share in enumerate(shares):
            section = np.count_nonzero(mask, axis=tuple(i for i in range(3) if i != axis))
            share += section / max(1, section.max())
    middle = [n // 2 for n in arrays[0].shape]
    z, y, x = (int(s.argmax()) if s.any() else m for s, m in zip(shares, middle, strict=True))
    return z, y, x


def _on_screen(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A slice with its rows downwards and columns rightwards.

    Axes grow to S, A and R; the screen shows S or A at the top and R or A on the left, so both are reversed.
    """
    return np.take(array, index, axis)[::-1, ::-1]


def _backdrop(
    grey_hu: np.ndarray | None, shape: tuple[int, ...], px: tuple[float, ...], hu_window: HuWindow
) -> Image.Image:
    size = max(1, round(shape[1] * px[1])), max(1, round(shape[0] * px[0]))
    if grey_hu is None:
        return Image.new("RGB", size, (0, 0, 0))
    scaled = (grey_hu - hu_window.low_hu) * (255 / (hu_window.high_hu - hu_window.low_hu))
    ct = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    return ct.resize(size, Image.Resampling.BICUBIC).convert("RGB")


def _draw(
    backdrop: Image.Image, layers: list[np.ndarray], px: tuple[float, float], colors: Mapping[int, Rgb]
) -> Image.Image:
    """`layers` are the filled labels and, if given, those drawn as lines; alone, the filled ones get the lines too."""
    canvas = np.asarray(backdrop, np.float32)
    filled, lined = layers[0], layers[-1]
    for label in _present(filled):
        alpha = _soft_mask(filled == label, backdrop.size, min(px)) * _FILL
        canvas = canvas + alpha[..., None] * (np.array(_color(label, colors), np.float32) - canvas)
    lines = {label: _lines(lined == label, px) for label in _present(lined)}
    halo = _stroke([line for some in lines.values() for line in some], backdrop.size, _HALO_PX)
    canvas = canvas * (1 - 0.55 * halo[..., None])
    for label, some in lines.items():
        bright = np.array(_color(label, colors), np.float32) * 0.7 + 0.3 * 255
        canvas = canvas + _stroke(some, backdrop.size, _LINE_PX)[..., None] * (bright - canvas)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _present(labels: np.ndarray) -> list[int]:
    return [int(v) for v in np.flatnonzero(np.bincount(labels.ravel())) if v]


def _color(label: int, colors: Mapping[int, Rgb]) -> Rgb:
    return colors[label] if label in colors else organ_color(label, f"label {label}")


def _soft_mask(mask: _Mask, size: tuple[int, int], px_per_voxel: float) -> np.ndarray:
    """float32 0 to 1 on the screen: voxel centres joined linearly, the edge at one half and one pixel wide."""
    grown = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.clip((np.asarray(grown, np.float32) / 255 - 0.5) * max(1.0, px_per_voxel) + 0.5, 0, 1)


def _lines(mask: _Mask, px: tuple[float, float]) -> list[np.ndarray]:
    """Closed outlines [points, (x, y)] in screen pixels, half way between voxel centres inside and outside."""
    outlines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    return [(np.asarray(line) - 0.5) * (px[1], px[0]) for line in outlines]  # padded index 1 is voxel 0, centre at 0.5


def _stroke(lines: list[np.ndarray], size: tuple[int, int], width_px: float) -> np.ndarray:
    """float32 0 to 1: the lines, smooth because drawn finer and averaged."""
    fine = Image.new("L", (size[0] * _FINER, size[1] * _FINER))
    pen = ImageDraw.Draw(fine)
    for line in lines:
        closed = np.concatenate([line, line[1:2]]) * _FINER
        pen.line([(float(x), float(y)) for x, y in closed], fill=255, width=round(width_px * _FINER), joint="curve")
    return np.asarray(fine.resize(size, Image.Resampling.BOX), np.float32) / 255


def _write_on(image: Image.Image, letters: str, title: str, bar_mm: int, px_per_mm: float) -> None:
    """Orientation letters, the plane's name and a scale bar."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    places = ((8, height / 2, "lm"), (width - 8, height / 2, "rm"), (width / 2, 6, "ma"), (width / 2, height - 6, "md"))
    for letter, (x, y, anchor) in zip(letters, places, strict=True):
        pen.text((x, y), letter, _INK, _font(20), anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    pen.text((8, 6), title, _INK, _font(15), "la", stroke_width=2, stroke_fill=(0, 0, 0))
    right, y = width - 10, height - 10
    left = right - bar_mm * px_per_mm
    pen.line([(left, y), (right, y)], (0, 0, 0), 6)
    pen.line([(left + 1, y), (right - 1, y)], _INK, 2)
    pen.text((right, y - 6), f"{bar_mm} mm", _INK, _font(15), "rd", stroke_width=2, stroke_fill=(0, 0, 0))


def _sheet(
    images: list[Image.Image], organs: Mapping[int, str], with_truth: bool, hu_window: HuWindow | None
) -> Image.Image:
    """Planes side by side, one legend below."""
    gap, line = 12, 26
    width = sum(i.width for i in images) + gap * (len(images) + 1)
    entries, rows = [], 1
    x = gap
    for label, organ in organs.items():
        length = 24 + round(_font(15).getlength(organ.replace("_", " "))) + 18
        if x + length > width and x > gap:
            x, rows = gap, rows + 1
        entries.append((x, rows - 1, organ_color(label, organ), organ.replace("_", " ")))
        x += length
    tall = max(i.height for i in images)
    sheet = Image.new("RGB", (width, tall + 2 * gap + (rows + 1) * line + gap), _PAPER)
    pen, x = ImageDraw.Draw(sheet), gap
    for image in images:
        sheet.paste(image, (x, gap + (tall - image.height) // 2))
        x += image.width + gap
    top = tall + 2 * gap
    for x, row, color, organ in entries:
        y = top + row * line + line // 2
        pen.rounded_rectangle((x, y - 7, x + 14, y + 7), 3, color)
        pen.text((x + 21, y), organ, _INK, _font(15), "lm")
    notes = ["filled: prediction, line: truth" if with_truth else "filled and outlined: prediction"]
    if hu_window is not None:
        notes.append(f"window {hu_window.low_hu:g} to {hu_window.high_hu:g} HU")
    pen.text((gap, top + rows * line + line // 2), " · ".join([*notes, "not a medical device"]), _DIM, _font(14), "lm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]
