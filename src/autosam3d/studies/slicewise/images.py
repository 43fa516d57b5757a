"""One CT slice as SAM or MedSAM reads it, and SAM's small logits back onto the slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from autosam3d.geometry.preprocess import HuWindow
from autosam3d.studies.slicewise.prompts import Frame

MEDSAM_WINDOW = HuWindow(low_hu=-160, high_hu=240)
"""Level 40, width 400. *Source*: MedSAM's preprocessing of CT."""
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of SAM's pixels 0 to 255, R G B. *Source*: segment-anything."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a slice becomes SAM's input."""

    style: Literal["sam", "medsam"]
    """"sam": longest side to the square's, mean and deviation of photographs, zeros beside it. "medsam": stretched to
    the whole square by cubic splines, its own minimum and maximum to 0 and 1."""
    hu_window: HuWindow

    def __post_init__(self) -> None:
        if self.style not in ("sam", "medsam"):
            raise ValueError(f"style: expected sam or medsam, got {self.style!r}")

    def frame(self, shape: tuple[int, int], image_size: int) -> Frame:
        """Where a slice of `shape` lies in the square."""
        if self.style == "medsam":
            return Frame(shape, (image_size, image_size), image_size)
        # Rounded as segment-anything's ResizeLongestSide does.
        rows, columns = (max(1, int(n * image_size / max(shape) + 0.5)) for n in shape)
        return Frame(shape, (rows, columns), image_size)

    def image(self, slice_hu: np.ndarray) -> np.ndarray:
        """uint8 [row, column] of HU."""
        low, high = self.hu_window.low_hu, self.hu_window.high_hu
        return ((np.clip(slice_hu, low, high) - low) / (high - low) * 255).astype(np.uint8)

    def pixels(self, image: np.ndarray, image_size: int) -> Tensor:
        """float32 [3, S, S] of a uint8 slice."""
        frame = self.frame((image.shape[0], image.shape[1]), image_size)
        if self.style == "medsam":
            grey = _spline_resized(image, frame.scaled)
            grey = (grey - grey.min()) / max(float(grey.max() - grey.min()), 1e-8)
            return torch.from_numpy(grey).float().expand(3, -1, -1).contiguous()
        rows, columns = frame.scaled
        scaled = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
        grey = torch.from_numpy(np.asarray(scaled, np.float32))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        return F.pad((grey - mean) / std, (0, image_size - columns, 0, image_size - rows))

    def native(self, logits: Tensor, frame: Frame) -> Tensor:
        """Logits [P, h, w] of the slice from SAM's [P, s, s] of the square."""
        logits = logits[:, None].float()
        if self.style == "sam":
            size = (frame.image_size, frame.image_size)
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            logits = logits[..., : frame.scaled[0], : frame.scaled[1]]
        return F.interpolate(logits, frame.shape, mode="bilinear", align_corners=False)[:, 0]


def mask_in_square(mask: np.ndarray, frame: Frame, side: int) -> Tensor:
    """float32 [side, side]: the slice's mask over the whole square, each pixel what its middle lies in."""
    middles = (np.arange(side) + 0.5) * frame.image_size / side
    index = [np.minimum((middles * n / m).astype(int), n - 1) for n, m in zip(frame.shape, frame.scaled, strict=True)]
    inside = [middles < m for m in frame.scaled]
    seen = mask[index[0][:, None], index[1]] & inside[0][:, None] & inside[1]
    return torch.from_numpy(seen.astype(np.float32))


def _spline_resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whole numbers 0 to 255 in float32; smoothed before where it shrinks.

    *Source*: MedSAM's inference calls scikit-image's ``resize(order=3, anti_aliasing=True)`` and takes whole numbers.
    """
    zoom = [m / n for m, n in zip(size, image.shape, strict=True)]
    blur = [max(0.0, (1 / z - 1) / 2) for z in zoom]
    source = ndimage.gaussian_filter(image.astype(np.float32), blur, mode="mirror") if any(blur) else image
    # The splines are found in float64 and the values taken on the new grid: half-pixel aligned.
    resized: Any = ndimage.zoom(source.astype(np.float64), zoom, order=3, mode="mirror", grid_mode=True)
    # Flat parts come out a rounding below their number, which whole numbers must not make a step of.
    return np.floor(np.clip(resized + 1e-6, image.min(), image.max())).astype(np.float32)
