"""The golden case of an export: windows of CT with what PyTorch made of them, to be compared with anywhere."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError
from autosam3d.geometry.patches import grid_starts, pad_to
from autosam3d.geometry.preprocess import prepare_ct
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Volume

Run = Callable[[np.ndarray], np.ndarray]
"""Windows float32 [B, 1, D, H, W] to logits or probabilities float32 [B, K, D, H, W]."""

_STEPS = 32767
_LATTICE = 2
"""Logits are kept at every second voxel of each axis; labels at all."""
_CANDIDATES = 4
_OVERLAP = 0.5
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Golden:
    """Windows and answers.

    Attributes:
        ct: float32 [n, 1, D, H, W], normalised; float16 values, so that the file holds exactly what was run.
        logits: float32 [n, K, ...] at every second voxel of each axis, of PyTorch in float32 with the weights as they
            are stored (rounded to float16), in steps of `scale` / 32767.
        labels: uint8 [n, D, H, W], of PyTorch in float32 with the weights as they were trained.
        scale: largest absolute logit.
    """

    ct: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    scale: float

    @property
    def step(self) -> float:
        """How far a stored logit may lie from the one that was computed, twice."""
        return self.scale / _STEPS


def golden_windows(volume: Volume, recipe: Recipe, run: Run, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows [n, 1, D, H, W] of a scan in which `run` sees most of the organs, and its logits.

    Windows are ranked by how much of them is denser than air; of the first few those with the most organs are taken,
    and among equals those with the most organ voxels.

    Args:
        volume: a CT.
        recipe: of the model.
        run: the trained network.
        count: windows at most.
    """
    size = recipe.model.patch_size
    ct, _ = pad_to(prepare_ct(volume, recipe.preprocess).voxels, size, recipe.preprocess.air)
    starts = grid_starts(ct.shape, size, _OVERLAP)
    starts.sort(key=lambda start: -int((_window(ct, start, size) > recipe.preprocess.air + 1e-3).sum()))
    windows = [_window(ct, start, size) for start in starts[: max(count, _CANDIDATES)]]
    # Rounded here, once: what is run, stored and run again elsewhere is the same to the last bit.
    windows = [window.astype(np.float16).astype(np.float32)[None] for window in windows]

    seen = [(window, run(window[None])) for window in windows]

    def organs(of: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
        counts = np.bincount(labels_of(of[1]).ravel(), minlength=2)[1:]
        return int(np.count_nonzero(counts)), int(counts.sum())

    seen.sort(key=organs, reverse=True)
    return np.stack([window for window, _ in seen[:count]]), np.concatenate([logits for _, logits in seen[:count]])


def make_golden(ct: np.ndarray, stored_logits: np.ndarray, trained_logits: np.ndarray) -> Golden:
    """Of the windows and the logits [n, K, D, H, W] of the network with stored and with trained weights."""
    scale = max(1.0, float(np.abs(stored_logits).max()))
    return Golden(ct, lattice(stored_logits), labels_of(trained_logits), scale)


def lattice(logits: np.ndarray) -> np.ndarray:
    """The voxels whose logits are kept."""
    return logits[(..., *(slice(None, None, _LATTICE),) * 3)]


def labels_of(logits: np.ndarray) -> np.ndarray:
    """uint8 [n, D, H, W]; the lowest label among equals."""
    return logits.argmax(1).astype(np.uint8)


def save_golden(path: Path, golden: Golden) -> None:
    """As ``.npz``: ``ct`` float16, ``logits`` int16 (times ``scale`` / 32767), ``labels`` uint8, ``scale``."""
    steps = np.round(golden.logits * (_STEPS / golden.scale)).astype(np.int16)
    with path.open("wb") as file:
        np.savez_compressed(file, ct=golden.ct.astype(np.float16), logits=steps, labels=golden.labels,
                            scale=np.float64(golden.scale))


def load_golden(path: Path, recipe: Recipe) -> Golden:
    """Read what `save_golden` wrote.

    Raises:
        CheckpointError: CORRUPT.
    """
    size, num_outputs = recipe.model.patch_size, recipe.model.num_outputs
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise ValueError("more than 1 GiB")
        with np.load(path, allow_pickle=False) as arrays:
            ct, steps, labels, scale = (arrays[name] for name in ("ct", "logits", "labels", "scale"))
        _demand_form(ct, np.float16, (len(ct), 1, *size))
        _demand_form(labels, np.uint8, (len(ct), *size))
        _demand_form(steps, np.int16, (len(ct), num_outputs, *(-(-n // _LATTICE) for n in size)))
        if not (scale.shape == () and math.isfinite(scale) and scale > 0 and np.isfinite(ct).all()):
            raise ValueError("a scale that is none")
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise CheckpointError("CORRUPT", path, f"expected the golden case of an export, got something else ({error})",
                              "copy the whole folder again") from None
    logits = steps.astype(np.float32) * np.float32(scale / _STEPS)
    return Golden(ct.astype(np.float32), logits, labels, float(scale))


def _window(ct: np.ndarray, start: Size, size: Size) -> np.ndarray:
    return ct[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]


def _demand_form(array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not len(array):
        raise ValueError(f"expected {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
