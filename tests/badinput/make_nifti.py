"""Broken, odd and hostile NIfTI files, each made by one function, and what a careful reader must do with each.

``BROKEN[name] = (maker, code, exit_code)``: ``maker(folder)`` writes the file and returns its path; a reader of CT
must refuse it with that code word. ``ODD[name] = (maker, words)``: it must be read, with a warning that holds these
words (None: without a warning). ``BROKEN_LABELS`` is the same as BROKEN for readers of label maps. The number in a
name is the row of the catalogue of bad inputs. Everything is made from fixed seeds with numpy and zlib alone, so the
files do not depend on the code under test.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import header_dtype as NIFTI1
from nibabel.nifti2 import header_dtype as NIFTI2

Maker = Callable[[Path], Path]
SPACING = (2.0, 2.5, 3.0)
SHAPE = (24, 20, 16)
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280,
         "c8": 32}


def ct_array(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """int16 [i, j, k] HU: a noisy body of 40 HU in air, with a bone that breaks every symmetry."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:3]), indexing="ij")
    body = sum(g**2 for g in grid) < 0.8
    hu = np.where(body, 40, -1000)
    hu[tuple(slice(n // 2, n // 2 + max(1, n // 5)) for n in shape[:3])] = 700
    hu = hu + rng.integers(-30, 30, shape[:3])
    return np.broadcast_to(hu.reshape(hu.shape + (1,) * (len(shape) - 3)), shape).astype(np.int16)


def nifti_bytes(
    array: np.ndarray | None = None, *, version: int = 1, order: str = "<", extension: bytes = bytes(4), **fields: Any
) -> bytes:
    """An uncompressed NIfTI file; `fields` replace header fields after everything else is set."""
    array = ct_array() if array is None else array
    layout, length, magic = (NIFTI1, 348, b"n+1") if version == 1 else (NIFTI2, 540, b"n+2")
    header: Any = np.zeros((), layout.newbyteorder(order))
    header["sizeof_hdr"], header["magic"] = length, magic
    if version == 2:
        header["eol_check"] = (13, 10, 26, 10)
    header["dim"] = (array.ndim, *array.shape, *(1,) * (7 - array.ndim))
    header["pixdim"] = (1, *SPACING, 1, 1, 1, 1)
    header["datatype"], header["bitpix"] = CODES[array.dtype.str[1:]], array.dtype.itemsize * 8
    header["vox_offset"] = length + len(extension)
    header["scl_slope"], header["xyzt_units"] = 1, 2
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = np.diag([*SPACING, 1])[:3]
    for name, value in fields.items():
        header[name] = value
    voxels = array.astype(array.dtype.newbyteorder(order))
    return header.tobytes() + extension + voxels.tobytes("F")


def pack(raw: bytes) -> bytes:
    return gzip.compress(raw, 6, mtime=0)


def _file(make: Callable[[], bytes], name: str = "ct.nii.gz") -> Maker:
    def maker(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(make())
        return path

    return maker


def _packed(array: Callable[[], np.ndarray] = ct_array, **fields: Any) -> Maker:
    return _file(lambda: pack(nifti_bytes(array(), **fields)))


def _plain(array: Callable[[], np.ndarray] = ct_array, **fields: Any) -> Maker:
    return _file(lambda: nifti_bytes(array(), **fields), "ct.nii")


def _folder(folder: Path) -> Path:
    (folder / "ct.nii.gz").mkdir()
    return folder / "ct.nii.gz"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "ct.nii.gz")
    return folder / "ct.nii.gz"


def _flipped_bit() -> bytes:
    content = bytearray(pack(nifti_bytes()))
    content[len(content) // 2] ^= 0x10
    return bytes(content)


def _claims_terabytes(folder: Path) -> Path:
    """Two gigabytes on disk (a sparse file), whose header claims 2 TiB that gzip could just hold."""
    path = folder / "ct.nii.gz"
    dims = (3, 8192, 8192, 16384, 1, 1, 1, 1)
    raw = nifti_bytes(dim=dims, srow_x=(0.12, 0, 0, 0), srow_y=(0, 0.12, 0, 0), srow_z=(0, 0, 0.12, 0))
    squeezer = zlib.compressobj(6, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        file.write(squeezer.compress(raw + bytes(4 << 20)) + squeezer.flush(zlib.Z_FULL_FLUSH))
        file.truncate(2_300_000_000)
    return path


def _bomb() -> bytes:
    """A small header, then 128 MB of zeros in 0.1 MB."""
    squeezer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [squeezer.compress(nifti_bytes() + b"\1")]
    zeros = bytes(1 << 20)
    parts += [squeezer.compress(zeros) for _ in range(128)]
    return b"".join([*parts, squeezer.flush()])


def _with(value: float, share: float) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        array = ct_array().astype(np.float32)
        chosen = np.random.default_rng(1).random(array.shape) < share
        array[chosen] = value
        return array

    return make


def _one_beyond() -> np.ndarray:
    array = ct_array().astype(np.float32)
    array[12, 10, 8] = 1e6
    return array


def _wrapped() -> np.ndarray:
    return ct_array().astype(np.uint16)


def _standardised() -> np.ndarray:
    hu = ct_array().astype(np.float32)
    return (hu - hu.mean()) / hu.std()


def _windowed() -> np.ndarray:
    return (np.clip(ct_array().astype(np.float32) + 175, 0, 425) / 425 * 255).astype(np.uint8)


def _twice_rescaled() -> np.ndarray:
    return (ct_array() - 1024).astype(np.int16)


def _dicom_file() -> bytes:
    return bytes(128) + b"DICM" + bytes(1000)


_NAN, _INF = float("nan"), float("inf")
_QFORM = {"qform_code": 1, "qoffset_x": 0, "quatern_b": 0}
BROKEN: dict[str, tuple[Maker, str, int]] = {
    "01_empty": (_file(lambda: b""), "EMPTY", 3),
    "01_empty_plain": (_file(lambda: b"", "ct.nii"), "EMPTY", 3),
    "01_gzip_of_nothing": (_file(lambda: pack(b"")), "EMPTY", 3),
    "02_folder": (_folder, "NOT_A_FILE", 3),
    "02_fifo": (_fifo, "NOT_A_FILE", 3),
    "03_vanished": (lambda folder: folder / "gone.nii.gz", "UNREADABLE", 3),
    "04_cut_at_half": (_file(lambda: (b := pack(nifti_bytes()))[: len(b) // 2]), "TRUNCATED", 3),
    "04_cut_plain": (_file(lambda: (b := nifti_bytes())[: len(b) // 2], "ct.nii"), "SIZE", 3),
    "04_cut_before_packing": (_file(lambda: pack(nifti_bytes()[:-100])), "SIZE", 3),
    "04_cut_in_header": (_file(lambda: nifti_bytes()[:200], "ct.nii"), "TRUNCATED", 3),
    "05_no_checksum": (_file(lambda: pack(nifti_bytes())[:-8]), "TRUNCATED", 3),
    "05_half_checksum": (_file(lambda: pack(nifti_bytes())[:-5]), "TRUNCATED", 3),
    "06_flipped_bit": (_file(_flipped_bit), "CRC", 3),
    "08_html": (_file(lambda: b"<!DOCTYPE html><html>404 Not Found</html>" * 20), "NOT_NIFTI", 3),
    "08_text": (_file(lambda: b"patient,volume\n" * 100, "ct.nii"), "NOT_NIFTI", 3),
    "08_two_bytes": (_file(lambda: b"ab"), "NOT_NIFTI", 3),
    "08_dicom": (_file(_dicom_file, "ct.nii"), "NOT_NIFTI", 3),
    "09_garbage_after_gzip": (_file(lambda: pack(nifti_bytes()) + b"garbage"), "TRAILING", 3),
    "09_garbage_after_data": (_file(lambda: pack(nifti_bytes() + b"garbage")), "TRAILING", 3),
    "09_garbage_after_plain": (_file(lambda: nifti_bytes() + b"garbage", "ct.nii"), "TRAILING", 3),
    "09_two_files": (_file(lambda: pack(nifti_bytes()) * 2), "TRAILING", 3),
    "10_bomb": (_file(_bomb), "TRAILING", 3),
    "11_claims_terabytes": (_claims_terabytes, "MEMORY", 5),
    "12_forged_size": (_plain(dim=(3, 30000, 30000, 30000, 1, 1, 1, 1)), "SIZE", 3),
    "12_forged_size_packed": (_packed(dim=(3, 30000, 30000, 30000, 1, 1, 1, 1)), "SIZE", 3),
    "13_negative_dim": (_packed(dim=(3, 24, -20, 16, 1, 1, 1, 1)), "DIMS", 3),
    "13_zero_dim": (_packed(dim=(3, 24, 20, 0, 1, 1, 1, 1)), "DIMS", 3),
    "13_ndim_9": (_packed(dim=(9, 24, 20, 16, 1, 1, 1, 1)), "DIMS", 3),
    "13_ndim_0": (_packed(dim=(0, 24, 20, 16, 1, 1, 1, 1)), "DIMS", 3),
    "14_magic": (_packed(magic=b"xyz"), "MAGIC", 3),
    "14_analyze": (_packed(magic=b""), "MAGIC", 3),
    "14_pair_magic": (_packed(magic=b"ni1"), "PAIR", 3),
    "14_pair_name": (_file(nifti_bytes, "ct.hdr"), "PAIR", 3),
    "15_sizeof_hdr": (_packed(sizeof_hdr=999), "HEADER", 3),
    "17_offset_far": (_packed(vox_offset=1e9), "OFFSET", 3),
    "17_offset_inside": (_packed(vox_offset=10), "OFFSET", 3),
    "17_offset_nan": (_packed(vox_offset=_NAN), "OFFSET", 3),
    "17_offset_fraction": (_packed(vox_offset=352.5), "OFFSET", 3),
    "18_datatype": (_packed(datatype=77), "DTYPE", 3),
    "18_bitpix": (_packed(bitpix=32), "DTYPE", 3),
    "19_sform_nan": (_packed(srow_x=(_NAN, 0, 0, 0)), "AFFINE_NONFINITE", 3),
    "19_sform_nan_qform_sound": (_packed(srow_x=(_NAN, 0, 0, 0), **_QFORM), "AFFINE_NONFINITE", 3),
    "19_qform_nan_sform_sound": (_packed(qform_code=1, quatern_c=_NAN), "AFFINE_NONFINITE", 3),
    "20_origin_inf": (_packed(srow_z=(0, 0, 3, _INF)), "AFFINE_NONFINITE", 3),
    "20_qform_origin_inf": (_packed(sform_code=0, qform_code=1, qoffset_x=_INF), "AFFINE_NONFINITE", 3),
    "21_singular": (_packed(srow_z=(2, 0, 0, 0)), "AFFINE_SINGULAR", 3),
    "21_zero_row": (_packed(srow_z=(0, 0, 0, 0)), "AFFINE_SINGULAR", 3),
    "21_quaternion": (_packed(sform_code=0, qform_code=1, quatern_b=3), "HEADER", 3),
    "22_sheared": (_packed(srow_x=(2, 0.4, 0, 0)), "AFFINE_SHEAR", 3),
    "23_pixdim_zero": (_packed(sform_code=0, pixdim=(1, 0, 0, 0, 0, 0, 0, 0)), "SPACING", 3),
    "24_pixdim_negative": (_packed(sform_code=0, pixdim=(1, -2, 2, 3, 1, 1, 1, 1)), "SPACING", 3),
    "25_forms_flipped": (_packed(srow_x=(-2, 0, 0, 0), **_QFORM), "AFFINE_CONFLICT", 3),
    "25_forms_scaled": (_packed(srow_z=(0, 0, 2.5, 0), **_QFORM), "AFFINE_CONFLICT", 3),
    "26_no_orientation": (_packed(sform_code=0), "NO_ORIENTATION", 3),
    "29_spacing_small": (_packed(srow_x=(0.01, 0, 0, 0)), "SPACING", 3),
    "29_spacing_large": (_packed(srow_x=(30, 0, 0, 0)), "SPACING", 3),
    "29_field_small": (_packed(srow_x=(0.5, 0, 0, 0)), "SPACING", 3),
    "29_field_large": (_packed(lambda: ct_array((200, 16, 16)), srow_x=(15, 0, 0, 0)), "SPACING", 3),
    "30_2d": (_packed(lambda: ct_array()[:, :, 0]), "NDIM", 3),
    "32_4d": (_packed(lambda: ct_array((*SHAPE, 2))), "NDIM", 3),
    "32_5d": (_packed(lambda: ct_array((*SHAPE, 1, 3))), "NDIM", 3),
    "33_complex": (_packed(lambda: ct_array().astype(np.complex64)), "DTYPE", 3),
    "33_rgb": (_packed(lambda: ct_array((72, 20, 16)).astype(np.uint8), datatype=128, bitpix=24), "DTYPE", 3),
    "34_many_nan": (_packed(_with(_NAN, 0.05)), "VOXELS_NONFINITE", 3),
    "35_all_nan": (_packed(_with(_NAN, 2.0)), "NO_CONTENT", 3),
    "35_constant": (_packed(lambda: np.zeros(SHAPE, np.int16)), "NO_CONTENT", 3),
    "37_slope_nan": (_packed(scl_slope=_NAN), "SCALE", 3),
    "37_slope_inf": (_packed(scl_slope=_INF), "SCALE", 3),
    "37_slope_huge": (_packed(scl_slope=1e30), "SCALE", 3),
    "38_from_zero": (_packed(lambda: (ct_array() + 1024).clip(0, 4095).astype(np.int16)), "NOT_HU", 3),
    "38_rescaled_twice": (_packed(_twice_rescaled), "NOT_HU", 3),
    "39_unit_interval": (_packed(lambda: _windowed().astype(np.float32) / 255), "NOT_HU", 3),
    "39_windowed": (_packed(_windowed), "NOT_HU", 3),
    "39_standardised": (_packed(_standardised), "NOT_HU", 3),
    "40_wrapped": (_packed(_wrapped), "WRAPAROUND", 3),
    "40_absurd": (_packed(lambda: ct_array().astype(np.float64) * 1e6), "NOT_HU", 3),
    "40_beyond_float32": (_packed(_with(1e38, 0.005), scl_slope=1000), "NOT_HU", 3),
    "41_one_slice": (_packed(lambda: ct_array((24, 20, 1)), srow_z=(0, 0, 20, 0)), "FEW_SLICES", 3),
    "41_seven_slices": (_packed(lambda: ct_array((24, 20, 7))), "FEW_SLICES", 3),
}

ODD: dict[str, tuple[Maker, str | None]] = {
    "00_good": (_packed(), None),
    "00_good_plain": (_plain(), None),
    "00_nifti2": (_packed(version=2), None),
    "07_plain_named_gz": (_file(nifti_bytes), "whatever its name says"),
    "07_gz_named_plain": (_file(lambda: pack(nifti_bytes()), "ct.nii"), "whatever its name says"),
    "09_zero_padding": (_file(lambda: pack(nifti_bytes()) + bytes(1000)), None),
    "09_zero_padding_inside": (_file(lambda: pack(nifti_bytes() + bytes(1000))), None),
    "09_one_file_in_two_members": (_file(lambda: pack((b := nifti_bytes())[:5000]) + pack(b[5000:])), None),
    "16_big_endian": (_packed(order=">"), None),
    "16_big_endian_nifti2": (_packed(order=">", version=2), None),
    "22_nearly_right_angles": (_packed(srow_x=(2, 0.0012, 0, 0)), "nearest rotation"),
    "25_forms_shifted": (_packed(qform_code=1, qoffset_x=5), "shift of 5.00 mm"),
    "27_left_handed": (_packed(srow_x=(-2, 0, 0, 46)), None),
    "28_micron": (_packed(xyzt_units=3, srow_x=(2000, 0, 0, 0), srow_y=(0, 2500, 0, 0), srow_z=(0, 0, 3000, 0),
                          pixdim=(1, 2000, 2500, 3000, 1, 1, 1, 1)), "micrometres"),
    "28_metre": (_packed(xyzt_units=1, srow_x=(0.002, 0, 0, 0), srow_y=(0, 0.0025, 0, 0), srow_z=(0, 0, 0.003, 0),
                         pixdim=(1, 0.002, 0.0025, 0.003, 1, 1, 1, 1)), "metres"),
    "28_no_unit": (_packed(xyzt_units=0), "unknown"),
    "31_4d_with_one": (_packed(lambda: ct_array((*SHAPE, 1))), "taken as 3D"),
    "34_few_nan": (_packed(_with(_NAN, 0.005)), "taken as air"),
    "34_few_inf": (_packed(_with(_INF, 0.005)), "taken as air"),
    "36_slope_zero": (_packed(scl_slope=0, scl_inter=5), "scl_inter 5 is not applied"),
    "40_padding": (_packed(_with(-3024, 0.2)), "padding"),
    "40_a_few_beyond": (_packed(_one_beyond), "clipped"),
    "pixdim_wrong": (_packed(pixdim=(1, 1, 1, 1, 1, 1, 1, 1)), "pixdim"),
}


def _labels(values: tuple[float, ...], dtype: type = np.float32, **fields: Any) -> Maker:
    def array() -> np.ndarray:
        labels = np.zeros(SHAPE, dtype)
        for place, value in enumerate(values, start=3):
            labels[place, place : place + 4, 4:9] = value
        return labels

    return _packed(array, **fields)


BROKEN_LABELS: dict[str, tuple[Maker, str, int]] = {
    "71_fractions": (_labels((1, 1.5, 2)), "LABEL_FLOAT", 3),
    "71_fractional_scaling": (_labels((1, 2), np.uint8, scl_slope=0.3), "LABEL_FLOAT", 3),
    "71_nan": (_labels((1, _NAN)), "LABEL_FLOAT", 3),
    "72_negative": (_labels((1, -1), np.int16), "LABEL_RANGE", 3),
    "72_too_large": (_labels((1, 70000), np.int32), "LABEL_RANGE", 3),
    "72_float_too_large": (_labels((1, 1e30)), "LABEL_RANGE", 3),
}
