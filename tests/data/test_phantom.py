"""Phantoms: anatomy on its right side, HU as tissues have them, the same from the same seed, stored in many orders."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from autosam3d import io
from autosam3d.data import folder as folder_module
from autosam3d.data.folder import open_dataset
from autosam3d.data.phantom import BTCV_LABELS, make_phantom, write_phantom_dataset
from autosam3d.errors import ResourceError, UsageError
from autosam3d.recipes.recipe import load_recipe
from autosam3d.volume import Segmentation, Volume, same_grid

SEEDS = (0, 7)
SMALL = {"shape": (24, 44, 44), "spacing_mm": (10.0, 7.5, 7.5)}


@pytest.fixture(scope="module")
def phantoms() -> dict[int, tuple[Volume, Segmentation]]:
    return {seed: make_phantom(seed) for seed in SEEDS}


@pytest.fixture(scope="module")
def quiet() -> Volume:
    """Seed 0 without noise."""
    return make_phantom(0, noise_hu=0.0)[0]


def centre_mm(truth: Segmentation, organ: str) -> np.ndarray:
    """Centroid in world mm (x right, y front, z head)."""
    z, y, x = ndimage.center_of_mass(truth.labels == BTCV_LABELS.index(organ))
    return (truth.affine @ [x, y, z, 1])[:3]


def test_organs_are_btcvs() -> None:
    assert load_recipe("btcv").labels == BTCV_LABELS == load_recipe("phantom").labels


@pytest.mark.parametrize("seed", SEEDS)
def test_every_organ_has_a_humans_volume(seed: int, phantoms: dict) -> None:
    truth = phantoms[seed][1]
    assert set(np.unique(truth.labels)) == set(range(14))
    ranges_ml = {
        "spleen": (50, 350), "right_kidney": (80, 260), "left_kidney": (80, 260), "gallbladder": (4, 60),
        "esophagus": (4, 30), "liver": (700, 2000), "stomach": (100, 500), "aorta": (30, 130),
        "inferior_vena_cava": (30, 130), "portal_and_splenic_veins": (10, 50), "pancreas": (25, 110),
        "right_adrenal_gland": (1, 9), "left_adrenal_gland": (1, 9),
    }
    for organ, (low, high) in ranges_ml.items():
        assert low < truth.volume_ml(BTCV_LABELS.index(organ)) < high, organ


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_lie_where_they_belong(seed: int, phantoms: dict) -> None:
    truth = phantoms[seed][1]
    at = {organ: centre_mm(truth, organ) for organ in BTCV_LABELS.organs}
    for right, left in (("liver", "spleen"), ("gallbladder", "stomach"), ("inferior_vena_cava", "aorta"),
                        *BTCV_LABELS.side_pairs):
        assert at[right][0] > at[left][0] + 10, (right, left)  # x grows to the patient's right
    assert at["stomach"][1] > at["pancreas"][1] > at["left_kidney"][1]  # y grows to the front
    assert at["esophagus"][2] > at["pancreas"][2]  # z grows to the head
    for side in ("right", "left"):
        assert at[f"{side}_adrenal_gland"][2] > at[f"{side}_kidney"][2]


@pytest.mark.parametrize("seed", SEEDS)
def test_tissues_have_their_hounsfield_units(seed: int, phantoms: dict) -> None:
    volume, truth = phantoms[seed]
    assert volume.voxels_hu.dtype == np.float32 and truth.labels.dtype == np.uint8
    assert -1024 <= volume.voxels_hu.min() < -950
    medians = {o: np.median(volume.voxels_hu[truth.labels == value]) for value, o in BTCV_LABELS.by_index.items()}
    for organ, low, high in (("liver", 70, 150), ("aorta", 90, 220), ("right_kidney", 110, 260), ("spleen", 80, 170),
                             ("gallbladder", -15, 45)):
        assert low < medians[organ] < high, organ
    assert medians["gallbladder"] < medians["liver"] < medians["right_kidney"]
    inside = ndimage.binary_fill_holes(volume.voxels_hu > -300)
    fat = np.count_nonzero((volume.voxels_hu > -140) & (volume.voxels_hu < -60))
    bone = np.count_nonzero(volume.voxels_hu > 300)
    assert 0.1 < fat / np.count_nonzero(inside) < 0.7
    assert 0.005 < bone / np.count_nonzero(inside) < 0.12


def test_noise_is_grain_not_waves(phantoms: dict, quiet: Volume) -> None:
    volume, truth = phantoms[0]
    noise = volume.voxels_hu - quiet.voxels_hu
    liver = noise[ndimage.binary_erosion(truth.labels == BTCV_LABELS.index("liver"), iterations=2)]
    assert 7 < liver.std() < 17
    neighbours = np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]
    far = np.corrcoef(noise[:, :, 12:].ravel(), noise[:, :, :-12].ravel())[0, 1]
    assert neighbours > 0.2 and abs(far) < 0.05


def test_edges_show_partial_volume(phantoms: dict, quiet: Volume) -> None:
    truth = phantoms[0][1]
    kidney = truth.labels == BTCV_LABELS.index("right_kidney")
    inner = np.median(quiet.voxels_hu[ndimage.binary_erosion(kidney, iterations=2)])
    rim = quiet.voxels_hu[kidney & ~ndimage.binary_erosion(kidney)]
    between = (rim < inner - 15) & (rim > -90)
    assert between.mean() > 0.3


def test_same_seed_same_patient_other_seed_other_patient(phantoms: dict) -> None:
    first, again = make_phantom(3, **SMALL), make_phantom(3, **SMALL)
    np.testing.assert_array_equal(again[0].voxels_hu, first[0].voxels_hu)
    np.testing.assert_array_equal(again[1].labels, first[1].labels)
    liver = BTCV_LABELS.index("liver")
    a, b = phantoms[0][1].labels == liver, phantoms[7][1].labels == liver
    dice = 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))
    assert 0.5 < dice < 0.97  # alike, not equal


def test_shape_and_spacing_are_kept() -> None:
    volume, truth = make_phantom(3, (20, 30, 40), (9.0, 8.0, 7.0))
    assert volume.shape == truth.shape == (20, 30, 40)
    assert volume.spacing_mm == pytest.approx((9, 8, 7))
    assert same_grid(volume, truth)
    columns = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(columns.T @ columns, np.eye(3), atol=1e-12)
    assert 0.9 < columns[0, 0] < 1  # oblique, but only a few degrees


def test_files_come_in_many_orders_and_read_back_the_same(tmp_path: Path) -> None:
    orders = set()
    for seed in range(5):
        volume, truth = make_phantom(seed, **SMALL)
        io.write_ct(tmp_path / "ct.nii.gz", volume)
        io.write_segmentation(tmp_path / "labels.nii.gz", truth, BTCV_LABELS)
        got, labels = io.read_ct(tmp_path / "ct.nii.gz"), io.read_segmentation(tmp_path / "labels.nii.gz")
        assert volume.source is not None and got.source is not None
        orders.add((got.source.axis_of, got.source.flipped))
        assert (got.source.axis_of, got.source.flipped) == (volume.source.axis_of, volume.source.flipped)
        np.testing.assert_array_equal(got.voxels_hu, volume.voxels_hu)
        np.testing.assert_array_equal(labels.labels, truth.labels)
        assert same_grid(got, volume) and same_grid(labels, volume)
    assert len(orders) >= 3


def test_dataset_is_whole_and_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosam3d.data.phantom.make_phantom", lambda seed: make_phantom(seed, **SMALL))
    folder = tmp_path / "data"
    seen = []
    write_phantom_dataset(folder, 2, 1, 1, seed=5, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    cases = open_dataset(folder, load_recipe("phantom"))
    names = [[case.name for case in part] for part in (cases.train, cases.val, cases.test)]
    assert names == [["phantom_000", "phantom_001"], ["phantom_002"], ["phantom_003"]]
    scans = [io.read_ct(case.image_path) for case in (*cases.train, *cases.val, *cases.test)]
    assert len({scan.voxels_hu.tobytes() for scan in scans}) == 4

    # What an interrupted call left is completed, and nothing is written twice.
    kept, lost = cases.train[0].image_path, cases.test[0].image_path
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    write_phantom_dataset(folder, 2, 1, 1, seed=5)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    with pytest.raises(UsageError, match="expected an empty folder"):
        write_phantom_dataset(folder, 2, 1, 1, seed=6)


def test_a_folder_that_a_full_disk_left_without_an_index_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    def full(*_: object) -> None:
        raise ResourceError("NO_SPACE", tmp_path, "the disk is full", "free some")

    folder = tmp_path / "data"
    for name in ("splits_final.json", "dataset.json"):
        write = folder_module.write_text_atomic
        with monkeypatch.context() as patch, pytest.raises(ResourceError):
            patch.setattr(folder_module, "write_text_atomic",
                          lambda path, text, name=name, write=write: (full if path.name == name else write)(path, text))
            write_phantom_dataset(folder, 1, 0, 0)
    monkeypatch.setattr("autosam3d.data.phantom.make_phantom", lambda seed: make_phantom(seed, **SMALL))
    write_phantom_dataset(folder, 1, 0, 0)
    assert (folder / "imagesTr" / "phantom_000_0000.nii.gz").is_file() and (folder / "dataset.json").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "splits_final.json").write_text("somebody's")
    with pytest.raises(UsageError, match="expected an empty folder"):
        write_phantom_dataset(tmp_path / "other", 1, 0, 0)


def test_source_grid_and_array_describe_the_same_voxels() -> None:
    for seed in range(4):
        volume, _ = make_phantom(seed, **SMALL)
        source = volume.source
        assert source is not None
        canonical = np.array([3, 5, 2])  # x, y, z
        stored = np.zeros(3)
        for axis, (held_in, flip) in enumerate(zip(source.axis_of, source.flipped, strict=True)):
            size = volume.shape[2 - axis]
            assert source.shape[held_in] == size
            stored[held_in] = size - 1 - canonical[axis] if flip else canonical[axis]
        np.testing.assert_allclose(source.affine @ [*stored, 1], volume.affine @ [*canonical, 1], atol=1e-9)
