"""Writes what web/test/dicom.test.ts compares with: DICOM series, sound and broken, and what Python makes of them.

``python web/test/make_dicom_vectors.py`` from the repository's root. Files that are alike are kept once:
`dicom.bin.gz` holds them one behind the other, `dicom.json` says which part is which. Needs dcmcjpeg of dcmtk.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import numpy as np

from autosam3d.data.phantom import make_phantom
from autosam3d.errors import AutoSam3dError
from autosam3d.io import read_ct
from autosam3d.io.dicom.seg import planes_of
from autosam3d.io.grid import grid_stored_as
from autosam3d.io.nifti.write import write_ct
from autosam3d.volume import Segmentation, Volume

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tests/badinput")]
import make_dicom as bad  # noqa: E402
import make_field as field  # noqa: E402

OUT = Path(__file__).parent / "vectors"


class _Pool:
    """Every file once, in the order of its name, so that slices which are alike lie near each other."""

    def __init__(self) -> None:
        self.contents: dict[str, tuple[str, bytes]] = {}

    def add(self, path: Path) -> str:
        content = path.read_bytes()
        key = hashlib.sha256(content).hexdigest()
        self.contents.setdefault(key, (path.name, content))
        return key

    def write(self) -> dict[str, list[int]]:
        places, parts, at = {}, [], 0
        for key, (_, content) in sorted(self.contents.items(), key=lambda entry: (entry[1][0], entry[0])):
            places[key] = [at, len(content)]
            parts.append(content)
            at += len(content)
        (OUT / "dicom.bin.gz").write_bytes(gzip.compress(b"".join(parts), 9, mtime=0))
        return places


def main() -> None:
    pool = _Pool()
    with tempfile.TemporaryDirectory() as scratch:
        series = [*bad.BROKEN.items(), *bad.ODD.items(), *_leaning(), *_orientations(), *_compressed(), *_reported()]
        rows = [_row(name, maker, Path(scratch) / f"b{i}", pool) for i, (name, (maker, *_)) in enumerate(series)]
        niftis = [_nifti(codes, Path(scratch), pool) for codes in _axis_codes()]
    places = pool.write()
    for row in [*rows, *niftis]:
        row["files"] = [[name, *places[key]] for name, key in row["files"]]
    text = json.dumps({"series": rows, "niftis": niftis}, separators=(",", ":")) + "\n"
    (OUT / "dicom.json").write_text(text, "utf-8")


def _row(name: str, maker: bad.Maker, folder: Path, pool: _Pool) -> dict[str, Any]:
    folder.mkdir()
    path = maker(folder)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.is_symlink()]
    row: dict[str, Any] = {"name": name, "files": [[p.relative_to(path).as_posix(), pool.add(p)] for p in files]}
    try:
        return row | _read(path)
    except AutoSam3dError as error:
        return row | {"code": error.code}


def _read(path: Path) -> dict[str, Any]:
    volume = read_ct(path)
    row = {"shape": volume.shape, "affine": volume.affine.ravel().tolist(), "warnings": list(volume.warnings),
           "voxels": hashlib.sha256(np.ascontiguousarray(volume.voxels_hu).tobytes()).hexdigest()}
    resampled = volume.source is not None and volume.source.acquired is not None
    return row | ({"acquired": _acquired_labels(volume)} if resampled else {})


def _acquired_labels(volume: Volume) -> str:
    """Of the labels that dicom.test.ts gives the voxels, on the slices that the scanner made."""
    hu = volume.voxels_hu
    labels = np.select([hu > 900, hu > 100, hu > 0], [3, 2, 1]).astype(np.uint8)
    return hashlib.sha256(planes_of(Segmentation(labels, volume.affine, volume.source)).tobytes()).hexdigest()


def _leaning() -> list[tuple[str, tuple[bad.Maker]]]:
    """Of a tilted gantry, with uneven slices, more or fewer than the grid's, and with both; turned in their plane, so
    that stacks lean along rows and columns to either side."""
    even = [bad.SPACING[0] * i for i in range(bad.NUM_SLICES)]
    more = np.cumsum([0, *[2, 2, 2.9] * 3, 2, 2]).tolist()
    fewer = np.cumsum([0, *[3, 3, 2] * 3, 3, 3]).tolist()
    return [("52_tilted", (bad.TILTED,)), ("53_uneven", (bad.UNEVEN,)),
            ("52_whole_pixels", (bad.series(_whole_pixels),)),
            ("52_tilted_turned", (_tilted(-24.0, 0.4, even),)), ("52_tilted_by_34", (_tilted(34.0, 2.5, even),)),
            ("53_more_slices", (_tilted(0.0, 0.3, more),)), ("53_fewer_slices", (_tilted(0.0, -1.3, fewer),)),
            ("52_53_tilted_uneven", (_tilted(11.0, -2.2, bad.HEIGHTS_UNEVEN),)),
            ("52_53_feet_first", (_tilted(-17.0, 1.0, [-h for h in bad.HEIGHTS_UNEVEN]),))]


def _whole_pixels(ds: Any, index: int) -> None:
    """Half a pixel a slice along the rows and, but for a last bit too much, five pixels in all along the columns."""
    x, y = -20.1 + 5 * bad.SPACING[2] * index / (bad.NUM_SLICES - 1), -30.25 + bad.SPACING[1] / 2 * index
    ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in (x, y, 4.0 * index)]


def _tilted(degrees: float, turn: float, heights: list[float]) -> bad.Maker:
    """Slices every `heights` along the table of a gantry that is tilted about x, turned by `turn` in their plane; their
    numbers are no integers."""
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    across, down = np.array([1.0, 0, 0]), np.array([0, cosine, -sine])
    rows = np.cos(turn) * across + np.sin(turn) * down
    columns = np.cos(turn) * down - np.sin(turn) * across

    def place(ds: Any, index: int) -> None:
        ds.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in (*rows, *columns)]
        ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in (-20.5, -30.25, 11.0 + heights[index])]
        ds.RescaleSlope, ds.RescaleIntercept = "0.97", "-1000.3"

    return bad.series(place)


def _orientations() -> list[tuple[str, tuple[bad.Maker]]]:
    """24 ways that rows and columns can run, each in both orders of files, and two oblique ones."""
    axes = {letter: sign * np.eye(3)[i] for i, pair in enumerate(("LR", "PA", "HF"))
            for letter, sign in zip(pair, (1, -1), strict=True)}
    ways = {a + b: np.stack([axes[a], axes[b]]) for a, b in itertools.permutations(axes, 2) if not axes[a] @ axes[b]}
    found = [(f"orientation {name}{'-' if back else '+'}", (_turned(way, back),))
             for name, way in ways.items() for back in (False, True)]
    for angle in (0.3, 2.0):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, s, -c], [0, c, s]])
        found.append((f"orientation oblique {angle}", (_turned(turn[:, :2].T, angle > 1),)))
    return found


def _compressed() -> list[tuple[str, tuple[bad.Maker]]]:
    """Without loss, by dcmtk with every prediction and by OpenJPEG, of unsigned and signed numbers."""
    ways: dict[str, bad.Change | None] = {"unsigned": None, "signed 16": bad._signed(16), "signed 12": bad._signed(12)}
    predictions = {f"jpeg lossless {n}": ["+el", "+sv", str(n)] for n in range(1, 8)}
    made: list[tuple[str, tuple[bad.Maker]]] = [
        (name, (bad.series(after=_by_dcmtk(*words)),)) for name, words in predictions.items()]
    for way, change in ways.items():
        made.append((f"jpeg lossless sv1 {way}", (bad.series(change, after=_by_dcmtk("+e1")),)))
        made.append((f"jpeg 2000 {way}", (bad.series(change, after=_by_openjpeg),)))
    return made


def _reported() -> list[tuple[str, tuple[bad.Maker]]]:
    """Padding in its forms, blocks of slices, lost slices, rounded positions and directions, acquisitions."""

    def two_decimals(ds: Any, index: int) -> None:
        normal = np.array([0.1, -0.2079, 0.9730]) / np.linalg.norm([0.1, -0.2079, 0.9730])
        ds.ImageOrientationPatient = ["0.99", "0", "-0.1", "-0.02", "0.98", "0.21"]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in np.array([-20.5, -30.25, 11.0]) + 3.0 * index * normal]

    thin_and_thick = np.cumsum([0, *[2.5] * 8, *[5.0] * 8])
    lost = [i for i in range(24) if i % 4 != 3 or i == 23]
    return [(f"padding {name}", (maker,)) for name, maker in {
        "high": field.padded(4095, bits=12), "0 HU": field.padded(1024), "unsigned": field.padded(63536),
        "beyond BitsStored": field.padded(63536, bits=12), "signed": field.padded(63536, signed=True, intercept=0),
        "12 bits": field.padded(2096, signed=True, bits=12, intercept=0), "SS": field.padded(-2000, vr="SS"),
        "range": field.padded(4095, bits=12, limit=3800, pixels=3900),
    }.items()] + [
        ("padding of the patient's numbers", (bad.series(bad._set(PixelPaddingValue=1064)),)),
        ("52 two decimals", (bad.series(two_decimals, num_slices=20),)),
        ("53 blocks", (field.at_heights(thin_and_thick, range(17)),)),
        ("53 blocks, rounded", (field.at_heights((thin_and_thick + 0.33).round(1)),)),
        ("53 rounded 0.625", (field.at_heights((0.625 * np.arange(40) + 0.017).round(1)),)),
        ("47 lost in a block", (field.at_heights(thin_and_thick, [*range(9), *range(10, 26, 2)]),)),
        ("47 lost, without numbers", (field.at_heights(2.5 * np.array(lost)),)),
        ("50 passes without a tag", (field.second_pass(1.5),)),
    ]


def _by_dcmtk(*words: str) -> Callable[[Path], None]:
    def compress(folder: Path) -> None:
        for path in folder.iterdir():
            subprocess.run(["dcmcjpeg", *words, "+un", path, path], check=True)

    return compress


def _by_openjpeg(folder: Path) -> None:
    """Through GDCM, which takes slices as small as these."""
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEG2000Lossless))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def _turned(orientation: np.ndarray, backwards: bool) -> bad.Maker:
    normal = np.cross(*orientation)

    def place(ds: Any, index: int) -> None:
        height = (bad.NUM_SLICES - 1 - index if backwards else index) * bad.SPACING[0]
        ds.ImageOrientationPatient = [f"{v:.12g}"[:16] for v in orientation.ravel()]
        ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in (-20.5, -30.25, 11.0) + normal * height]

    return bad.series(place)


def _axis_codes() -> list[str]:
    pairs = ("RL", "AP", "SI")
    straight = ["".join(pairs[axis][flip] for axis, flip in zip(order, flips, strict=True))
                for order in itertools.permutations(range(3)) for flips in itertools.product((0, 1), repeat=3)]
    return [*straight, "oblique1", "oblique2"]


def _nifti(codes: str, scratch: Path, pool: _Pool) -> dict[str, Any]:
    """One small phantom in every orientation that a file can have, and tilted."""
    volume, _ = make_phantom(5, (8, 9, 10), (8.0, 9.0, 7.0))
    voxels = np.round(volume.voxels_hu / 50) * 50
    affine = volume.affine.copy()
    if codes.startswith("oblique"):
        from scipy.spatial.transform import Rotation

        affine[:3, :3] = Rotation.from_euler("xyz", [0.3 * int(codes[-1]), -0.2, 0.4]).as_matrix() @ affine[:3, :3]
    stored = grid_stored_as(volume.shape, affine, "LPS" if codes.startswith("oblique") else codes)
    path = scratch / f"{codes}.nii"
    write_ct(path, Volume(voxels.astype(np.float32), affine, stored))
    return {"name": codes, "files": [[path.name, pool.add(path)]]} | _read(path)


if __name__ == "__main__":
    main()
