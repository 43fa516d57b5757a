"""What phantoms are painted with: a canvas that knows partial volume, and bodies as signed distances in mm.

Distances are negative inside. Points are (x, y, z) in reference millimetres: x to the patient's right, y to the
front, z to the head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from autosam3d.axes import Size
from autosam3d.labels import LabelMap

Point = Sequence[float] | np.ndarray

# Mean and case-to-case deviation in HU, abdomen in the portal venous phase. Usual clinical values, rounded.
TISSUE_HU: dict[str, tuple[float, float]] = {
    "spleen": (120, 10), "kidney": (185, 18), "gallbladder": (10, 6), "esophagus": (62, 8), "liver": (106, 11),
    "stomach_wall": (85, 10), "stomach": (22, 15), "blood": (152, 16), "cava": (140, 16), "portal": (168, 14),
    "pancreas": (95, 10), "adrenal": (78, 9), "muscle": (60, 5), "fat": (-102, 6), "bowel": (42, 10),
    "bowel_wall": (92, 12), "lung": (-830, 30), "marrow": (190, 40), "cortex": (520, 90), "disc": (85, 10),
    "cyst": (8, 5), "cord": (32, 5), "stool": (35, 15),
}


class Canvas:
    """Reference coordinates of every voxel, and what has been painted there so far."""

    def __init__(
        self, rng: np.random.Generator, shape: Size, affine: np.ndarray, labels: LabelMap
    ) -> None:
        self.rng, self.label_map = rng, labels
        index = np.indices(shape, dtype=np.float32)[::-1].reshape(3, -1)  # x, y, z of every voxel
        world = affine[:3, :3].astype(np.float32) @ index + affine[:3, 3:].astype(np.float32)
        patient_size = np.array([rng.uniform(0.93, 1.08), rng.uniform(0.93, 1.08), rng.uniform(0.95, 1.06)])
        self.xyz = (world / patient_size[:, None]).astype(np.float32)
        # No two patients are alike: bend space, in long waves far and in short waves a little.
        for waves, amplitude_mm in ((4, 3.5), (9, 1.3)):
            coarse = rng.normal(0, amplitude_mm, (3, waves, waves, waves))
            for axis in range(3):
                zoom = [n / waves for n in shape]
                bent = ndimage.zoom(coarse[axis], zoom, order=3, grid_mode=True, mode="nearest")
                self.xyz[axis] += np.ravel(np.asarray(bent))
        self.edge_mm = float(np.abs(np.linalg.det(affine[:3, :3])) ** (1 / 3))
        self.hu = np.full(index.shape[1], -1000.0, np.float32)
        self.labels = np.zeros(index.shape[1], np.uint8)
        self.tissue = {name: rng.normal(mean, spread) for name, (mean, spread) in TISSUE_HU.items()}
        contrast = rng.uniform(0.85, 1.1)  # how well this patient took up the contrast agent
        for name in ("blood", "cava", "portal", "kidney", "spleen", "liver", "pancreas"):
            self.tissue[name] = 45 + (self.tissue[name] - 45) * contrast

    def paint(self, distance: np.ndarray, hu: float | str, organ: str | None = None, where: np.ndarray | None = None,
              keep_label: bool = False) -> None:
        """Covers what lies inside `distance` (mm, negative inside; of all voxels, or of the voxels `where`).

        A voxel that is more than half covered takes the label of `organ`, or loses its label where `organ` is None,
        unless `keep_label` says that the structure is a part of the organ it lies in.
        """
        hu = self.tissue[hu] if isinstance(hu, str) else hu
        where = np.arange(len(self.hu)) if where is None else where
        near = distance < self.edge_mm
        where, distance = where[near], distance[near]
        cover = np.clip(0.5 - distance / self.edge_mm, 0, 1)
        self.hu[where] += cover * (hu - self.hu[where])
        if not keep_label:
            self.labels[where[cover > 0.5]] = self.label_map.index(organ) if organ else 0

    def tube(self, points: Sequence[Point], hu: float | str, organ: str | None = None, keep_label: bool = False,
             shrink_mm: float = 0.0) -> None:
        """Paints a tube through `points` (x, y, z, radius)."""
        where = self.near(np.array(points)[:, :3], max(p[3] for p in points) + 2 * self.edge_mm)
        self.paint(tube(self.xyz[:, where], points) + shrink_mm, hu, organ, where, keep_label)

    def about(self, *point: float, mm: float = 2.5) -> np.ndarray:
        """`point`, moved at random."""
        return np.array(point) + self.rng.normal(0, mm, 3).clip(-2 * mm, 2 * mm)

    def sized(self, *half_axes: float, spread: float = 0.07) -> np.ndarray:
        """`half_axes`, each stretched or shrunk at random."""
        return np.array(half_axes) * self.rng.normal(1, spread, 3).clip(1 - 2 * spread, 1 + 2 * spread)

    def near(self, points: np.ndarray, margin_mm: float) -> np.ndarray:
        """Indexes of the voxels in the box around `points` [n, 3]."""
        low, high = points.min(0) - margin_mm, points.max(0) + margin_mm
        inside = np.ones(len(self.hu), bool)
        for axis in range(3):
            inside &= (self.xyz[axis] > low[axis]) & (self.xyz[axis] < high[axis])
        return np.flatnonzero(inside)


def rotation(degrees: Point) -> np.ndarray:
    """3x3: about x, then y, then z."""
    rx, ry, rz = (math.radians(d) for d in degrees)
    about_x = np.array([[1, 0, 0], [0, math.cos(rx), -math.sin(rx)], [0, math.sin(rx), math.cos(rx)]])
    about_y = np.array([[math.cos(ry), 0, math.sin(ry)], [0, 1, 0], [-math.sin(ry), 0, math.cos(ry)]])
    about_z = np.array([[math.cos(rz), -math.sin(rz), 0], [math.sin(rz), math.cos(rz), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def ellipse(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    """Distance in mm (first order: exact on the edge) to an endless elliptic cylinder along z."""
    k = np.hypot(x / half_x, y / half_y)
    return k * (k - 1) / np.maximum(np.hypot(x / half_x**2, y / half_y**2), 1e-6)


def trunk(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    """Distance in mm (first order) to a cylinder along z, a little squarer than an ellipse, as trunks are."""
    power = 2.4
    u, v = np.abs(x / half_x), np.abs(y / half_y)
    k = (u**power + v**power) ** (1 / power)
    slope = np.hypot(u ** (power - 1) / half_x, v ** (power - 1) / half_y) / np.maximum(k, 1e-3) ** (power - 1)
    return (k - 1) / np.maximum(slope, 1e-3)


def ellipsoid(xyz: np.ndarray, centre: Point, half: Point, turn: np.ndarray | None = None) -> np.ndarray:
    """Distance in mm (first order) to an ellipsoid whose axes are the columns of `turn`."""
    p = xyz - np.asarray(centre, np.float32)[:, None]
    if turn is not None:
        p = turn.T.astype(np.float32) @ p
    half_mm = np.asarray(half, np.float32)[:, None]
    k = np.linalg.norm(p / half_mm, axis=0)
    return k * (k - 1) / np.maximum(np.linalg.norm(p / half_mm**2, axis=0), 1e-6)


def tube(xyz: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Distance in mm to a chain of cones with round ends through `points` (x, y, z, radius)."""
    best = np.full(xyz.shape[1], np.inf, np.float32)
    for a, b in itertools.pairwise(points):
        start, step = np.asarray(a[:3], np.float32), np.asarray(b[:3], np.float32) - np.asarray(a[:3], np.float32)
        p = xyz - start[:, None]
        t = np.clip(step @ p / max(float(step @ step), 1e-6), 0, 1)
        apart = np.linalg.norm(p - step[:, None] * t, axis=0) - (a[3] + (b[3] - a[3]) * t)
        best = np.minimum(best, apart)
    return best


def smooth_min(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """The union of two bodies with a rounded seam."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend_mm, 0, 1)
    return b + (a - b) * h - blend_mm * h * (1 - h)
