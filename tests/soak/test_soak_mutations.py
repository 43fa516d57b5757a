"""T1, the long form of tests/badinput/test_mutations.py: two thousand files with a few wrong bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import make_nifti
import nibabel as nib
import numpy as np
import pytest
from mutations import Lived, try_checkpoints, try_niftis, try_recipes, try_series

from autosam3d.errors import VolumeError
from autosam3d.io import read_ct
from soak_table import share_of

FIRST_SEED = 1000  # those below are tried in every run of the tests


@pytest.mark.parametrize(("try_all", "count"), [
    (try_niftis, 1000), (try_series, 500), (try_recipes, 300), (try_checkpoints, 200),
], ids=["nifti", "dicom", "recipe", "checkpoint"])
def test_wrong_bytes_are_read_or_refused_in_words(try_all: Callable[[Path, range], Lived], count: int, tmp_path: Path,
                                                  figures: Callable[..., None]) -> None:
    lived = try_all(tmp_path, range(FIRST_SEED, FIRST_SEED + share_of(count)))
    assert lived.surprises == []
    figures("T1", "files with a few wrong bytes: read, or refused in words with the right exit code, within 10 s, "
            "nothing left behind", str(lived), "in the next row")


def test_a_reader_without_checks_takes_what_ours_refuses(tmp_path: Path, figures: Callable[..., None]) -> None:
    """The control arm: nibabel stops before gzip's checksum, so it takes some of these files as data."""
    whole = make_nifti.pack(make_nifti.nifti_bytes())
    count, refused, taken = share_of(200, least=40), 0, 0
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(whole)
    right = _by_nibabel(path)
    for seed in range(count):
        random = np.random.default_rng([5, seed])
        content = bytearray(whole)
        content[int(random.integers(20, len(content) - 8))] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(content))
        with pytest.raises(VolumeError):
            read_ct(path)
        refused += 1
        try:
            taken += not np.array_equal(_by_nibabel(path), right)
        except Exception:
            continue
    assert refused == count and taken >= 1
    figures("T1", "single wrong bits in .nii.gz", f"{refused} of {count} refused",
            f"nibabel takes {taken} of {count} as other voxels")


def _by_nibabel(path: Path) -> np.ndarray:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return np.asarray(image.dataobj)
