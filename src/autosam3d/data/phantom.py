"""An abdomen that belongs to nobody: CT phantoms with the 13 organs of BTCV, drawn from a seed.

For demonstrations and tests without patient data. No figure measured on phantoms says anything about patients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from autosam3d import io
from autosam3d.axes import Size
from autosam3d.data.folder import index_description, write_index
from autosam3d.data.phantom_anatomy import draw_abdomen
from autosam3d.data.phantom_canvas import Canvas, rotation
from autosam3d.errors import UsageError
from autosam3d.io.files import remove_stale_temporaries
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, SourceGrid, Volume

BTCV_LABELS = LabelMap(
    organs=(
        "spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior_vena_cava", "portal_and_splenic_veins", "pancreas", "right_adrenal_gland", "left_adrenal_gland",
    ),
    side_pairs=(("right_kidney", "left_kidney"), ("right_adrenal_gland", "left_adrenal_gland")),
)

def make_phantom(
    seed: int,
    shape: Size = (48, 96, 96),
    spacing_mm: tuple[float, float, float] = (5.0, 3.5, 3.5),
    noise_hu: float = 11.0,
) -> tuple[Volume, Segmentation]:
    """One patient: anatomy, contrast, table position and the file's axis order follow from `seed`.

    Args:
        seed: equal seeds give equal arrays.
        shape: voxels (z, y, x) of the canonical array.
        spacing_mm: (z, y, x). The default sees an abdomen from the lung bases to the aortic bifurcation.
        noise_hu: standard deviation of the noise inside the body.

    Returns:
        The scan and its truth on one oblique grid (a few degrees off the patient's axes). Both carry a `SourceGrid`
        whose axis order and directions vary with the seed, so that written files do too.
    """
    rng = np.random.default_rng(seed)
    affine, source = _random_grid(rng, shape, spacing_mm)
    canvas = Canvas(rng, shape, affine, BTCV_LABELS)
    draw_abdomen(canvas)
    voxels_hu = canvas.hu.reshape(shape) + _ct_noise(rng, shape, noise_hu)
    voxels_hu = np.clip(np.round(voxels_hu), -1024, 3071).astype(np.float32)
    labels = canvas.labels.reshape(shape)
    return Volume(voxels_hu, affine, source), Segmentation(labels, affine, source, dict(BTCV_LABELS.by_index))


def write_phantom_dataset(
    folder: str | Path,
    num_train: int,
    num_val: int,
    num_test: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Phantoms as a training folder in the nnU-Net v2 layout, cases ``phantom_000`` onwards.

    A folder that an interrupted call with the same numbers left is completed.

    Raises:
        UsageError: the folder holds something else.
        ResourceError: it cannot be written.
    """
    folder = Path(folder)
    names = [f"phantom_{i:03d}" for i in range(num_train + num_val + num_test)]
    train, val = names[:num_train], names[num_train : num_train + num_val]
    about = f"CT phantoms, seed {seed}, {num_train} + {num_val} + {num_test} cases; no patient data"
    _demand_ours(folder, about)
    for part in ("Tr", "Ts"):
        (folder / f"images{part}").mkdir(parents=True, exist_ok=True)
        (folder / f"labels{part}").mkdir(parents=True, exist_ok=True)
    write_index(folder, BTCV_LABELS, train, val, description=about)
    for i, name in enumerate(names):
        part = "Tr" if i < len(train) + len(val) else "Ts"
        image = folder / f"images{part}" / f"{name}_0000.nii.gz"
        truth_path = folder / f"labels{part}" / f"{name}.nii.gz"
        if not (image.exists() and truth_path.exists()):
            # Far apart, so that data sets of neighbouring seeds share no patient.
            volume, truth = make_phantom(seed * 100_003 + i)
            io.write_ct(image, volume)
            io.write_segmentation(truth_path, truth, BTCV_LABELS)
        if progress:
            progress(i + 1, len(names))


def _demand_ours(folder: Path, about: str) -> None:
    """Refuse a folder that is neither empty nor begun by such a call, which writes its index before its first scan."""
    if not folder.is_dir() or index_description(folder) == about:
        return
    remove_stale_temporaries(folder)
    begun = {folder / "splits_final.json"} if (folder / "labelsTs").is_dir() else set()
    if any(path.is_file() and path not in begun for path in folder.rglob("*")):
        raise UsageError("OUTPUT_EXISTS", folder, "expected an empty folder or the same phantoms, got other files",
                         "name a new folder")


def _random_grid(
    rng: np.random.Generator, shape: Size, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, SourceGrid]:
    """An oblique canonical affine centred on the abdomen, and a file grid with its axes swapped and reversed."""
    tilt = rotation(rng.uniform(-4, 4, 3))
    affine = np.eye(4)
    affine[:3, :3] = tilt * np.array(spacing_mm[::-1])
    centre_vox = (np.array(shape[::-1]) - 1) / 2
    centre_mm = np.array((0, -6, -3)) + rng.uniform(-6, 6, 3)
    affine[:3, 3] = centre_mm - affine[:3, :3] @ centre_vox
    axis_of = tuple(int(a) for a in (rng.permutation(3) if rng.random() < 0.4 else range(3)))
    flipped = tuple(bool(f) for f in rng.random(3) < 0.5)
    to_canonical = np.zeros((4, 4))  # file voxel -> canonical voxel
    to_canonical[3, 3] = 1
    file_shape = [0, 0, 0]
    for canonical, (axis, flip) in enumerate(zip(axis_of, flipped, strict=True)):
        size = shape[2 - canonical]
        file_shape[axis] = size
        to_canonical[canonical, axis] = -1 if flip else 1
        to_canonical[canonical, 3] = size - 1 if flip else 0
    return affine, SourceGrid(
        kind="array", shape=(file_shape[0], file_shape[1], file_shape[2]), affine=affine @ to_canonical,
        axis_of=axis_of, flipped=flipped,  # type: ignore[arg-type]
    )


def _ct_noise(rng: np.random.Generator, shape: Size, noise_hu: float) -> np.ndarray:
    """Noise as filtered backprojection leaves it: grainy, without slow waves, a little alike in neighbouring slices."""
    white = rng.normal(0, 1, shape).astype(np.float32)
    grain = ndimage.gaussian_filter(white, (0.4, 0.6, 0.6)) - 0.8 * ndimage.gaussian_filter(white, (0.4, 2.2, 2.2))
    return grain * (noise_hu * rng.uniform(0.8, 1.3) / float(grain.std()))
