"""Label maps: mirror tables, exchange of values, and the table of colours and codes."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosam3d.labels import _KNOWN, LabelMap, remap, remap_by_name
from autosam3d.recipes.recipe import load_recipe, recipe_names

SIDED = LabelMap(organs=("liver", "right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))


@pytest.mark.parametrize("name", recipe_names())
def test_mirroring_twice_changes_nothing(name: str) -> None:
    labels = load_recipe(name).labels
    table = labels.mirror_table
    np.testing.assert_array_equal(table[table], np.arange(labels.num_outputs))
    assert table.dtype == np.uint8
    moved = {labels.organs[i - 1] for i in np.flatnonzero(table != np.arange(len(table)))}
    assert moved == {organ for organ in labels.organs if "left" in organ or "right" in organ}


def test_mirror_table_swaps_the_pair_only() -> None:
    np.testing.assert_array_equal(SIDED.mirror_table, [0, 1, 3, 2])


def test_numbers_and_names_agree() -> None:
    assert [SIDED.index(organ) for organ in SIDED.organs] == [1, 2, 3] == list(SIDED.by_index)
    assert SIDED.num_outputs == 4


@pytest.mark.parametrize(
    ("organs", "pairs"),
    [
        ((), ()), (("a", "a"), ()), (("background",), ()), (tuple(map(str, range(256))), ()),
        (("a", "b"), (("a", "c"),)), (("a", "b"), (("a", "a"),)), (("a", "b", "c"), (("a", "b"), ("b", "c"))),
    ],
)
def test_label_map_refuses(organs: tuple, pairs: tuple) -> None:
    with pytest.raises(ValueError, match="expected"):
        LabelMap(organs=organs, side_pairs=pairs)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_remap_is_the_table(dtype: Any) -> None:
    labels = np.random.default_rng(0).integers(0, 7, (4, 5, 6)).astype(dtype)
    table = {value: (value * 3) % 7 for value in range(7)} | {1000: 5}
    got = remap(labels, table)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.vectorize(table.__getitem__)(labels))


def test_remap_of_large_values_and_of_nothing() -> None:
    np.testing.assert_array_equal(remap(np.array([[[0, 60000]]], np.uint16), {0: 0, 60000: 2}), [[[0, 2]]])
    assert remap(np.zeros((0, 3, 3), np.uint8), {0: 0}).shape == (0, 3, 3)


def test_remap_names_the_value_it_does_not_know() -> None:
    with pytest.raises(KeyError) as caught:
        remap(np.array([[0, 9, 4]]), {0: 0, 4: 1})
    assert caught.value.args == (9,)


@given(st.permutations(["liver", "spleen", "aorta", "stomach"]))
def test_remap_by_name_finds_the_same_organ_in_any_order(order: list[str]) -> None:
    source = dict(enumerate(order, start=1))
    target = ("liver", "spleen", "aorta")
    table = remap_by_name(source, target)
    assert table[0] == 0
    for value, organ in source.items():
        assert table[value] == (target.index(organ) + 1 if organ in target else 0)


@pytest.mark.parametrize("name", recipe_names())
def test_colours_of_a_recipe_can_be_told_apart(name: str) -> None:
    labels = load_recipe(name).labels
    colours = [labels.color(index) for index in labels.by_index]
    for a, b in itertools.combinations(colours, 2):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) >= 60
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_unknown_organs_get_colours_of_their_own() -> None:
    labels = LabelMap(organs=tuple(f"organ_{i}" for i in range(40)))
    assert len({labels.color(i) for i in labels.by_index}) == 40
    assert labels.snomed(1) is None


# SNOMED's check digit is Verhoeff's: the dihedral group D5 and the powers of a permutation.
_D5 = [[(i + j) % 5 if i < 5 and j < 5 else 5 + (i + j) % 5 if i < 5 else 5 + (i - j) % 5 if j < 5 else (i - j) % 5
        for j in range(10)] for i in range(10)]
_TURN = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]


def verhoeff_holds(digits: str) -> bool:
    check = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit)
        for _ in range(place % 8):
            value = _TURN[value]
        check = _D5[check][value]
    return check == 0


@pytest.mark.parametrize("organ", [organ for organ, (_, code) in _KNOWN.items() if code])
def test_snomed_code_has_its_check_digit(organ: str) -> None:
    code = _KNOWN[organ][1]
    assert code.isdigit() and verhoeff_holds(code)
    assert not verhoeff_holds(code[:-1] + str((int(code[-1]) + 1) % 10))


# Our name to the keyword of the concept in DICOM's own dictionary (PS3.16 annex D, as pydicom carries it).
_DICOM_KEYWORDS = {
    "spleen": "Spleen", "kidneys": "Kidney", "gallbladder": "Gallbladder", "esophagus": "Esophagus", "liver": "Liver",
    "stomach": "Stomach", "aorta": "Aorta", "inferior_vena_cava": "InferiorVenaCava",
    "pancreas": "Pancreas", "duodenum": "Duodenum", "bladder": "Bladder",
    "prostate": "Prostate", "lungs": "Lung", "bone": "Bone", "rectum": "Rectum", "uterus": "Uterus",
    "brainstem": "BrainStem", "spinal_cord": "SpinalCord", "parotid_right": "ParotidGland",
    "parotid_left": "ParotidGland", "mandible": "Mandible", "larynx": "Larynx",
}


@pytest.mark.parametrize("organ", _DICOM_KEYWORDS)
def test_snomed_code_is_dicoms(organ: str) -> None:
    codes = pytest.importorskip("pydicom.sr.codedict").codes
    concept = getattr(codes.SCT, _DICOM_KEYWORDS[organ])
    assert (_KNOWN[organ][1], concept.scheme_designator) == (concept.value, "SCT")


def test_every_known_code_is_verified_or_sided() -> None:
    assert set(_KNOWN) - set(_DICOM_KEYWORDS) == {
        # DICOM's dictionary has these organs without a side only, and no concept for "prostate or uterus" or for two
        # veins in one.
        "portal_and_splenic_veins",
        "right_kidney", "left_kidney", "right_adrenal_gland", "left_adrenal_gland", "prostate_or_uterus",
    }


KIDNEYS = LabelMap(organs=SIDED.organs, side_pairs=SIDED.side_pairs,
                   super_classes={"kidneys": ("right_kidney", "left_kidney"), "trunk": ("liver", "left_kidney"),
                                  "other_trunk": ("right_kidney", "liver")})


def test_groups_say_what_a_value_stands_for() -> None:
    assert KIDNEYS.values == {"liver": 1, "right_kidney": 2, "left_kidney": 3, "kidneys": 4, "trunk": 5,
                              "other_trunk": 6}
    np.testing.assert_array_equal(SIDED.groups((1, 2, 3)), np.eye(4, dtype=bool))
    assert SIDED.groups((2,)).astype(int).tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    table = KIDNEYS.groups((1, 4))
    assert [np.flatnonzero(row).tolist() for row in table] == [[0], [1], [], [], [2, 3], [], []]
    assert not SIDED.groups(())[1:].any() and SIDED.groups(())[0].all()


def test_super_classes_are_mirrored_as_their_organs_are() -> None:
    np.testing.assert_array_equal(KIDNEYS.mirror_table, [0, 1, 3, 2, 4, 6, 5])
    mirrored = KIDNEYS.groups((2, 5))[KIDNEYS.mirror_table][:, KIDNEYS.mirror_table[:4]]
    np.testing.assert_array_equal(mirrored, KIDNEYS.groups((3, 6)))


@pytest.mark.parametrize("super_classes", [
    {"liver": ("right_kidney", "left_kidney")}, {"background": ("right_kidney", "left_kidney")},
    {"kidneys": ("right_kidney",)}, {"kidneys": ("right_kidney", "right_kidney")}, {"kidneys": ("liver", "spleen")},
    {"right_trunk": ("liver", "right_kidney")},  # its mirror image is none
    {"kidneys": ("right_kidney", "left_kidney"), "both": ("left_kidney", "right_kidney")},
])
def test_super_classes_that_cannot_be(super_classes: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="super_classes"):
        LabelMap(organs=SIDED.organs, side_pairs=SIDED.side_pairs, super_classes=super_classes)
