"""Random changes to a training crop, each drawn from the generator that is handed in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from autosam3d.axes import Size
from autosam3d.labels import LabelMap
from autosam3d.recipes.settings import Augment

# Counted from the last axis, so that they are the same with channels and without.
_AXIS = {"z": -3, "y": -2, "x": -1}


class Crop(NamedTuple):
    """What a training step sees of a scan; all arrays lie on one grid and are moved alike."""

    voxels: np.ndarray
    """float32 [z, y, x], normalised."""
    labels: np.ndarray
    """uint8 [z, y, x]."""
    probs: np.ndarray | None = None
    """Probabilities of a teacher, float32 [K, z, y, x]; None where there is none."""
    groups: np.ndarray | None = None
    """bool [V, K], `LabelMap.groups` of the organs that were looked for; None where all were."""


def augment(crop: Crop, spec: Augment, label_map: LabelMap, random: np.random.Generator) -> Crop:
    """One random draw of flips, quarter turns and intensity changes.

    An odd number of mirrored axes makes the body its own mirror image: the labels of left and right organs trade
    places, and so does which of them were looked for. An even number is a turn of the body (two axes: half a turn
    about the third), and a turned right kidney is a right kidney; so are quarter turns. Those need a crop that is
    square in the axial plane; other crops get half turns only. A teacher's probabilities follow the labels, channels
    of side pairs too; changes of intensity pass them by.
    """
    voxels, labels, probs, groups = crop
    mirrored = tuple(_AXIS[name] for name in spec.flip_axes if random.random() < spec.flip_prob)
    voxels, labels = np.flip(voxels, mirrored), np.flip(labels, mirrored)
    probs = None if probs is None else np.flip(probs, mirrored)
    if len(mirrored) % 2:
        table = label_map.mirror_table
        classes = table[: label_map.num_outputs]
        labels = table[labels]
        probs = None if probs is None else probs[classes]
        groups = None if groups is None else groups[table][:, classes]
    if random.random() < spec.rotate90_prob:
        square = voxels.shape[1] == voxels.shape[2]
        turns = int(random.integers(1, 4)) if square else 2
        voxels, labels = np.rot90(voxels, turns, (-2, -1)), np.rot90(labels, turns, (-2, -1))
        probs = None if probs is None else np.rot90(probs, turns, (-2, -1))
    if random.random() < spec.scale_prob:
        voxels = voxels * np.float32(1 + random.uniform(-spec.scale_range, spec.scale_range))
    if random.random() < spec.shift_prob:
        voxels = voxels + np.float32(random.uniform(-spec.shift_range, spec.shift_range))
    if random.random() < spec.noise_prob:
        voxels = voxels + random.standard_normal(voxels.shape, np.float32) * np.float32(spec.noise_std)
    return Crop(np.ascontiguousarray(voxels, np.float32), np.ascontiguousarray(labels),
                None if probs is None else np.ascontiguousarray(probs), groups)


def affine_margin(
    patch_size: Size, spacing_mm: tuple[float, float, float], spec: Augment
) -> Size:
    """Voxels (z, y, x) that a crop needs around the patch on each side, so that `random_affine` stays inside it."""
    if spec.affine_prob == 0:
        return 0, 0, 0
    _, edge_y, edge_x = (n * mm for n, mm in zip(patch_size, spacing_mm, strict=True))
    angle = np.deg2rad(spec.rotate_degrees)
    reach = [1.0]
    for other in (edge_x / edge_y, edge_y / edge_x):
        # cos(t) + other * sin(t) is largest at t = atan(other), or at the largest angle where that is smaller.
        turn = min(angle, np.arctan(other))
        reach.append(np.cos(turn) + other * np.sin(turn))
    z, y, x = (
        int(np.ceil((r * (1 + spec.zoom_range) - 1) * n / 2)) + 1 for n, r in zip(patch_size, reach, strict=True)
    )
    return z, y, x


def random_affine(
    crop: Crop,
    patch_size: Size,
    spacing_mm: tuple[float, float, float],
    spec: Augment,
    random: np.random.Generator,
) -> Crop:
    """A patch from the middle of a larger crop, with probability `affine_prob` turned in the axial plane and zoomed.

    The turn is a rotation in millimetres, so anisotropic voxels are not sheared. Linear for the image and for
    probabilities, nearest for the labels.
    """
    voxels, labels, probs, groups = crop
    if random.random() >= spec.affine_prob:
        middle = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(voxels.shape, patch_size, strict=True))
        return Crop(voxels[middle], labels[middle], None if probs is None else probs[:, *middle], groups)
    angle = np.deg2rad(random.uniform(-spec.rotate_degrees, spec.rotate_degrees))
    zoom = 1 + random.uniform(-spec.zoom_range, spec.zoom_range, 3)
    turn_mm = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    scale = np.asarray(spacing_mm)
    matrix = (turn_mm * scale) / scale[:, None] * zoom
    center_in, center_out = (np.array(voxels.shape) - 1) / 2, (np.array(patch_size) - 1) / 2
    offset = center_in - matrix @ center_out

    def turned(array: np.ndarray, order: int) -> np.ndarray:
        return ndimage.affine_transform(array, matrix, offset, patch_size, order=order, mode="nearest")  # type: ignore[arg-type]

    return Crop(turned(voxels, 1), turned(labels, 0),
                None if probs is None else np.stack([turned(channel, 1) for channel in probs]), groups)
