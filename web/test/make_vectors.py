"""Writes what web/test/*.test.ts compare with: small scans, and what this package makes of them.

Run it from the repository's root after a change of reading, preprocessing, stitching or restoring:
``python web/test/make_vectors.py``; the vectors are kept in the repository.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from autosam3d.data.phantom import make_phantom
from autosam3d.errors import VolumeError
from autosam3d.export.description import describe_use
from autosam3d.export.parity import BOUNDS
from autosam3d.geometry.patches import gaussian_importance, grid_starts
from autosam3d.geometry.preprocess import find_body, plan_grid, prepare_ct
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_ct
from autosam3d.io.nifti.write import write_ct, write_segmentation
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.volume import Volume

OUT = Path(__file__).parent / "vectors"
PATCH = (16, 32, 32)
# Orientation, dtype, (slope, intercept), NIfTI version, byte order.
FILES = [
    ("RAS", "<i2", (1, 0), 1), ("LPS", "<i2", (1, -1024), 1), ("PSR", ">i2", (1, 0), 1), ("SLA", "<f4", (1, 0), 1),
    ("IPL", "<u2", (1, -1024), 2), ("ARI", "<i4", (0.5, 0), 2), ("LAS", "<f8", (1, 0), 1), ("RSA", ">f4", (2, -3), 1),
    ("PIL", "<i8", (1, 0), 1), ("ASL", "<u2", (1.5, -1024.25), 1), ("LIA", ">i4", (1, 0), 2),
    ("AIR", "<u4", (1, -1024), 1), ("RPI", "|u1", (8, -1024), 1), ("IAL", "|i1", (8, 0), 1),
    ("SPR", "<u8", (1, -1024), 1),
]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for old in (p for p in OUT.iterdir() if not p.name.startswith("dicom.")):
        old.unlink()
    vectors = {"reading": [_reading(*file, seed=i) for i, file in enumerate(FILES)], "refused": _refused(),
               "grids": _grids(), "importance": _importance(), "cases": [_case(seed) for seed in range(4)]}
    (OUT / "vectors.json").write_text(json.dumps(vectors, indent=1) + "\n", "utf-8")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _reading(codes: str, dtype: str, scaling: tuple[float, float], version: int, seed: int) -> dict[str, Any]:
    """One file in an odd orientation, tilted by a few degrees, and what the reader makes of it."""
    rng = np.random.default_rng(seed)
    slope, intercept = scaling
    hu = rng.integers(-1000, 1000, (9, 10, 11)).astype(float)
    stored = np.rint((hu - intercept) / slope)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        stored = np.clip(stored, np.iinfo(kind).min, np.iinfo(kind).max)
    affine = nib.orientations.inv_ornt_aff(
        nib.orientations.axcodes2ornt(tuple(codes)), stored.shape).astype(float)  # type: ignore[arg-type]
    affine = _tilted(rng.uniform(-0.2, 0.2, 3)) @ np.diag([2.5, 3.25, 4.0, 1.0]) @ affine
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)()
    header.set_data_shape(stored.shape)
    header.set_data_dtype(kind)
    header.set_sform(affine, code=1 if seed % 2 else 0)
    header.set_qform(affine, code=0 if seed % 3 == 1 and seed % 2 else 1)
    header.set_xyzt_units("mm")
    header["magic"] = b"n+1" if version == 1 else b"n+2"
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = slope, intercept
    name = f"{codes}_{kind.name}.nii.gz"
    order = ">" if kind.byteorder == ">" else "<"
    voxels = stored.astype(kind).tobytes("F")
    (OUT / name).write_bytes(gzip.compress(header.as_byteswapped(order).binaryblock + bytes(4) + voxels, mtime=0))
    volume = read_ct(OUT / name)
    labels = (volume.voxels_hu > 0).astype(np.uint8)
    return {"file": name, "shape": volume.shape, "affine": volume.affine.ravel().tolist(),
            "spacing": volume.spacing_mm, "voxels": _digest(volume.voxels_hu), "warnings": list(volume.warnings),
            "written": _written(volume, labels, ("one", "Größe \"2\""))}


def _written(volume: Volume, labels: np.ndarray, organs: tuple[str, ...]) -> str:
    """Digest of the .nii that a segmentation of this scan becomes."""
    from autosam3d.volume import Segmentation

    path = OUT / "written.nii"
    label_map = LabelMap(organs=organs)
    write_segmentation(path, Segmentation(labels, volume.affine, volume.source, dict(label_map.by_index)), label_map)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for file in OUT.glob("written.*"):
        file.unlink()
    return digest


def _tilted(angles: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix()
    return matrix


def _refused() -> list[dict[str, str]]:
    """Broken files, and the code with which the reader refuses them."""
    whole = gzip.decompress((OUT / "RAS_int16.nii.gz").read_bytes())

    def patched(*changes: tuple[int, bytes]) -> bytes:
        data = bytearray(whole)
        for at, value in changes:
            data[at : at + len(value)] = value
        return bytes(data)

    two = np.array(2, "<i2").tobytes()
    broken = {
        "empty": b"", "text": b"no scan at all, but long enough to hold a header " * 20, "cut": whole[:-100],
        "cut_header": whole[:200], "magic": patched((344, b"xxx\0")), "pair": patched((344, b"ni1\0")),
        "dims": patched((40, np.array(9, "<i2").tobytes())), "two_d": patched((40, two)),
        "dtype": patched((70, np.array(32, "<i2").tobytes())), "bitpix": patched((72, two)),
        "offset": patched((108, np.array(np.nan, "<f4").tobytes())),
        "slope": patched((112, np.array(np.inf, "<f4").tobytes())),
        "no_orientation": patched((252, bytes(4))), "conflict": patched((254, b"\1\0"), (280, _sform(5, 4, 3))),
        "constant": whole[:352] + bytes(len(whole) - 352),
        "damaged_gzip": gzip.compress(whole, mtime=0)[:-200] + bytes(200),
        "spacing": patched((252, b"\0\0\1\0"), (280, _sform(50, 40, 30))),
    }
    rows = []
    for name, data in broken.items():
        path = OUT / f"broken_{name}.nii"
        path.write_bytes(data)
        try:
            read_ct(path)
        except VolumeError as error:
            rows.append({"file": path.name, "code": error.code})
        else:
            raise AssertionError(f"{name} was read")
        path.unlink()
        packed = data if name == "damaged_gzip" else gzip.compress(data, mtime=0)
        path.with_suffix(".nii.gz").write_bytes(packed)
        rows[-1]["file"] += ".gz"
    return rows


def _sform(*spacing_mm: float) -> bytes:
    """The bytes of its three rows."""
    return np.diag([*spacing_mm, 1.0])[:3].astype("<f4").tobytes()


def _grids() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(30):
        patch = [int(n) for n in rng.integers(3, 20, 3)]
        shape = [p + int(n) for p, n in zip(patch, rng.integers(0, 60, 3), strict=True)]
        overlap = float(rng.choice([0, 0.25, 0.5, 0.75, 0.9]))
        rows.append({"shape": shape, "patch": patch, "overlap": overlap,
                     "starts": [sorted({s[axis] for s in grid_starts(shape, patch, overlap)}) for axis in range(3)]})
    return rows


def _importance() -> dict[str, Any]:
    weights = gaussian_importance((4, 6, 5))
    return {"patch": [4, 6, 5], "weights": weights.ravel().tolist()}


class _Bands:
    """A network that needs no runtime: each class likes a band of values, and the left half of a window less."""

    patch_size, num_outputs = PATCH, 4

    def predict(self, patches: np.ndarray) -> np.ndarray:
        v = patches[:, 0]
        side = np.where(np.arange(PATCH[2]) < PATCH[2] // 2, np.float32(0.75), np.float32(1))
        return np.stack([np.full_like(v, 0.3), v * side, np.float32(0.5) - v * v, np.float32(-0.5) * v], axis=1)

    def activation_bytes(self, batch_size: int) -> int:
        return 0


class _Model:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.predictor = recipe, _Bands()


def _case(seed: int) -> dict[str, Any]:
    """The whole way on a phantom, with a network that both sides can compute exactly."""
    shape, spacing = [((20, 40, 44), (6.0, 5.0, 5.0)), ((30, 36, 36), (3.0, 4.0, 4.5)), ((10, 24, 20), (8.0, 9.0, 9.0)),
                      ((26, 48, 48), (5.0, 2.5, 2.5))][seed]
    volume, _ = make_phantom(seed, shape, spacing)
    name = f"phantom_{seed}.nii.gz"
    write_ct(OUT / name, volume)
    for beside in OUT.glob(f"phantom_{seed}.*"):
        if beside.name != name:
            beside.unlink()
    recipe = load_recipe("openkbp_tiny", [
        "labels.organs=[a, b, c]", "labels.side_pairs=[]", "model.num_outputs=4", "inference.overlap=0.5",
        f"preprocess.spacing_mm={[None, [4, 4, 4], [9, 7, 7], [5, 2.5, 2.5]][seed]}".replace("None", "null")])
    volume = read_ct(OUT / name)
    undo = plan_grid(volume, recipe.preprocess)
    box = find_body(volume.voxels_hu, volume.spacing_mm)
    result = segment(volume, _Model(recipe))
    labels = result.labels
    use = {**describe_use(recipe, 18), "patch": list(PATCH)}
    model = {"recipe": {"name": recipe.name}, "use": use, "bounds": BOUNDS}
    return {"file": name, "model": model, "box": [box.start, box.stop],
            "prepared_shape": undo.prepared_shape, "prepared": _digest(prepare_ct(volume, recipe.preprocess).voxels),
            "labels": _digest(labels), "counts": np.bincount(labels.ravel(), minlength=4).tolist(),
            "confidence": [result.confidence.get(k, 0) for k in range(4)]}


if __name__ == "__main__":
    main()
