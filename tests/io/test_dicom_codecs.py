"""Row 59: compressed slices are decoded to the very numbers, or refused with the name of what is missing."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")

import make_dicom as bad
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from autosam3d.errors import VolumeError
from autosam3d.io import read_ct

# 20 x 24 pixels of 24 + 50 * column + 100 * (row >= 6), encoded once by OpenJPH 0.26 (reversible, two levels).
_HTJ2K_PIXELS = 24 + 50 * np.arange(24) + 100 * (np.arange(20)[:, None] >= 6)
_HTJ2K_STREAM = base64.b85decode(
    "|4;u>04YEK0000O0000K00000000000000O0000K0000000000009pH0sl|{2mk^A000XAQUDA90ssL30|W#>0smY84Iqe+kdTm&"
    "kcfzg|6~9c00B>MWo}APNFY{aav(4+GBz$VF8`1K3IG5A005i-"
    "0soW004<;a01y9R`QP`S@?H3a|8@H;{3uJ!2>|;z0KfnhFaQNm#*K}EkKv1U0B`apZ}J0?c(nk)02Pn`1)^Xu7!3a0LOO8*cL0i|"
    "uoO$N6ic!GH~|9W7PkPv04*2*1+=0lilQirqWJUrdU|?rf_VVr@pwEQkH_Qjc>MS90SFuSgdlI;5P`nG0RPz"
)


def _htj2k(uid: str) -> bad.Change:
    """Every slice has the same pixels, and an intercept of its own."""

    def change(ds: Any, index: int) -> None:
        ds.file_meta.TransferSyntaxUID, ds.RescaleIntercept = uid, -1024 + index
        ds.PixelData = encapsulate([_HTJ2K_STREAM])
        ds["PixelData"].is_undefined_length = True

    return change


def _compressed(uid: UID) -> bad.Change:
    return lambda ds, index: ds.compress(uid, generate_instance_uid=False)


def _by_gdcm(uid: UID) -> Callable[[Path], None]:
    """For JPEG lossless, which most archives compress with and pydicom cannot write, and for small JPEG 2000 images."""

    def compress(folder: Path) -> None:
        import gdcm

        for path in folder.iterdir():
            reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
            reader.SetFileName(str(path))
            assert reader.Read()
            change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(uid)))
            change.SetInput(reader.GetImage())
            assert change.Change()
            writer.SetFileName(str(path))
            writer.SetFile(reader.GetFile())
            writer.SetImage(change.GetOutput())
            assert writer.Write()

    return compress


SERIES = {
    JPEGLSLossless: bad.series(_compressed(JPEGLSLossless)),
    JPEG2000Lossless: bad.series(after=_by_gdcm(JPEG2000Lossless)),
    JPEGLosslessSV1: bad.series(after=_by_gdcm(JPEGLosslessSV1)),
    RLELossless: bad.series(_compressed(RLELossless)),
    HTJ2KLossless: bad.series(_htj2k(HTJ2KLossless)),
    HTJ2KLosslessRPCL: bad.series(_htj2k(HTJ2KLosslessRPCL)),
    HTJ2K: bad.series(_htj2k(HTJ2K)),
}


@pytest.mark.parametrize("uid", SERIES, ids=lambda uid: UID(uid).keyword)
def test_compressed_slices_are_decoded_exactly(uid: str, tmp_path: Path) -> None:
    import pydicom

    folder = SERIES[uid](tmp_path)
    assert {pydicom.dcmread(path).file_meta.TransferSyntaxUID for path in folder.iterdir()} == {uid}
    expected = bad.hu_array().astype(np.float32)
    if uid in (HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL):
        expected = (_HTJ2K_PIXELS - 1024 + np.arange(bad.NUM_SLICES)[:, None, None]).astype(np.float32)
    volume = read_ct(folder)
    np.testing.assert_array_equal(volume.voxels_hu, expected[:, ::-1, ::-1])
    assert all("rescale" in warning for warning in volume.warnings)


def test_a_broken_htj2k_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        read_ct(bad.HTJ2K(tmp_path))
    assert caught.value.code == "SLICE_CORRUPT"


def test_without_a_decoder_the_syntax_and_the_extra_are_named(tmp_path: Path) -> None:
    """As where pydicom is installed alone."""
    uids = [uid for uid in SERIES if uid != RLELossless]  # which pydicom decodes itself
    folders = []
    for number, uid in enumerate(uids):
        (tmp_path / str(number)).mkdir()
        folders.append(SERIES[uid](tmp_path / str(number)))
    program = ("import sys\n"
               "for name in ('gdcm', 'pylibjpeg', 'openjpeg', 'jpeg_ls', 'PIL'): sys.modules[name] = None\n"
               "from autosam3d.io import read_ct\nfrom autosam3d.errors import VolumeError\n"
               "for folder in sys.argv[1:]:\n"
               "    try: read_ct(folder)\n"
               "    except VolumeError as error: print(error.exit_code, error.code, error)\n")
    done = subprocess.run([sys.executable, "-c", program, *map(str, folders)], capture_output=True, text=True,
                          check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(uids)
    for line, uid in zip(lines, uids, strict=True):
        assert line.startswith("3 CODEC ") and f" {uid};" in line and 'pip install "autosam3d[dicom]"' in line, line
