"""Which number is which organ: names, colours, SNOMED CT codes, left/right pairs, and maps between datasets."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Rgb = tuple[int, int, int]

# name: (colour, SNOMED CT concept of the structure). Colours lean on an atlas (arteries red, veins blue)
# and are well apart within each dataset. Codes: SNOMED CT body structures, as DICOM PS3.16 lists them (annex D) where
# it does; a parotid's side is said by its name alone, for want of a sided code there.
_KNOWN: dict[str, tuple[Rgb, str]] = {
    "spleen": ((150, 90, 180), "78961009"),
    "right_kidney": ((205, 80, 140), "9846003"),
    "left_kidney": ((240, 140, 50), "18639004"),
    "kidneys": ((205, 80, 80), "64033007"),
    "gallbladder": ((110, 160, 60), "28231008"),
    "esophagus": ((240, 190, 200), "32849002"),
    "liver": ((165, 85, 50), "10200004"),
    "stomach": ((95, 190, 170), "69695003"),
    "aorta": ((230, 20, 30), "15825003"),
    "inferior_vena_cava": ((30, 80, 220), "64131007"),
    # Two veins in one label: the concepts at hand (32764006, portal vein; 35819009, splenic vein) name one each.
    "portal_and_splenic_veins": ((80, 170, 245), ""),
    "pancreas": ((250, 215, 80), "15776009"),
    "right_adrenal_gland": ((20, 150, 80), "29392005"),
    "left_adrenal_gland": ((170, 220, 60), "12003004"),
    "duodenum": ((200, 160, 100), "38848004"),
    "bladder": ((255, 240, 170), "89837001"),
    "prostate": ((175, 105, 125), "41216001"),
    "prostate_or_uterus": ((175, 105, 125), ""),
    "lungs": ((130, 190, 210), "39607008"),
    "bone": ((235, 225, 205), "272673000"),
    "rectum": ((110, 60, 30), "34402009"),
    "uterus": ((220, 90, 170), "35039007"),
    "brainstem": ((110, 184, 209), "119238007"),
    "spinal_cord": ((250, 205, 60), "2748008"),
    "parotid_right": ((150, 160, 60), "45289007"),
    "parotid_left": ((89, 196, 120), "45289007"),
    "mandible": ((225, 200, 165), "91609006"),
    "larynx": ((120, 130, 235), "4596009"),
}
# The colours of organs that the table does not know: hues a golden-ratio turn apart, so neighbours differ.
_GOLDEN_TURN = 0.618033988749895


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """The organs of a dataset: label ``i`` is ``organs[i - 1]``, 0 is background.

    Args:
        organs: names in the order of the dataset.
        side_pairs: (right, left) names that trade places in a mirror.
        super_classes: name of a class that some label maps draw as one (kidneys) to the organs that it is made of.
            A model never answers it: it learns from such a map that a voxel is one of them.
    """

    organs: tuple[str, ...]
    side_pairs: tuple[tuple[str, str], ...] = ()
    super_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        if not self.organs:
            raise ValueError("organs: expected at least one name, got none")
        if len(self.organs) > 255:
            raise ValueError(f"organs: expected at most 255 names, got {len(self.organs)}")
        if len(set(self.organs)) != len(self.organs) or "background" in self.organs:
            raise ValueError(f"organs: expected different names without 'background', got {list(self.organs)}")
        paired = [name for pair in self.side_pairs for name in pair]
        unknown = sorted(set(paired) - set(self.organs))
        if unknown or len(set(paired)) != len(paired):
            raise ValueError(f"side_pairs: expected pairs of names in organs, each once, got {paired}")
        self._check_super_classes()

    def _check_super_classes(self) -> None:
        for name, members in self.super_classes.items():
            if name in self.organs or name == "background":
                raise ValueError(f"super_classes: expected names that no organ has, got {name!r}")
            if len(set(members)) < 2 or len(set(members)) != len(members) or not set(members) <= set(self.organs):
                raise ValueError(f"super_classes.{name}: expected two or more different names in organs, "
                                 f"got {list(members)}")
        if self.num_values > 256:
            raise ValueError(f"super_classes: expected at most 255 names with the organs, got {self.num_values - 1}")
        side = {a: b for pair in self.side_pairs for a, b in (pair, pair[::-1])}
        known = {frozenset(members) for members in self.super_classes.values()}
        if len(known) < len(self.super_classes):
            raise ValueError("super_classes: expected different organs in each, got the same twice")
        for name, members in self.super_classes.items():
            mirrored = frozenset(side.get(organ, organ) for organ in members)
            if mirrored not in known:
                raise ValueError(f"super_classes.{name}: expected its mirror image {sorted(mirrored)} to be a "
                                 "super-class too, since training mirrors scans")

    @property
    def num_outputs(self) -> int:
        """K: organs and background."""
        return len(self.organs) + 1

    @property
    def num_values(self) -> int:
        """V: values that a label map for training may hold; K + i is the super-class i."""
        return self.num_outputs + len(self.super_classes)

    @cached_property
    def values(self) -> dict[str, int]:
        """Organ or super-class to its value in a label map for training; background is left out."""
        return {name: value for value, name in enumerate((*self.organs, *self.super_classes), start=1)}

    def groups(self, drawn: Collection[int]) -> np.ndarray:
        """bool [V, K]: which classes of a model a value of a label map stands for, where only `drawn` was looked for.

        An organ that was not looked for may lie anywhere in the background, so it belongs to value 0 as well; a row
        without a True is a value that the map cannot hold.

        Args:
            drawn: values of organs and of super-classes.

        *Source*: Shi et al., Marginal loss and exclusion loss for partially supervised multi-organ segmentation,
        Medical Image Analysis 70 (2021), section 3.1.
        """
        table = np.zeros((self.num_values, self.num_outputs), bool)
        for value in drawn:
            members = [value] if value < self.num_outputs else [
                self.index(organ) for organ in list(self.super_classes.values())[value - self.num_outputs]]
            table[value, members] = True
        table[0] = ~table.any(0)
        return table

    @cached_property
    def by_index(self) -> dict[int, str]:
        """Label to organ name, from 1; background is left out."""
        return dict(enumerate(self.organs, start=1))

    def index(self, organ: str) -> int:
        """The label of an organ.

        Raises:
            ValueError: no organ has that name.
        """
        return self.organs.index(organ) + 1

    def color(self, index: int) -> Rgb:
        """RGB of label `index`: the atlas colour of a known organ, else a hue of its own."""
        name = self.by_index[index]
        if name in _KNOWN:
            return _KNOWN[name][0]
        r, g, b = colorsys.hsv_to_rgb((index * _GOLDEN_TURN) % 1.0, 0.65, 0.95)
        return round(255 * r), round(255 * g), round(255 * b)

    def snomed(self, index: int) -> str | None:
        """SNOMED CT concept id of label `index`, None where the table has none."""
        return _KNOWN.get(self.by_index[index], ((0, 0, 0), ""))[1] or None

    @cached_property
    def mirror_table(self) -> np.ndarray:
        """uint8 [V]: label to the label of its mirror image; ``table[labels]`` mirrors a label map's meaning.

        Its first K entries are those of a model's classes.
        """
        table = np.arange(self.num_values, dtype=np.uint8)
        for right, left in self.side_pairs:
            table[self.index(right)], table[self.index(left)] = self.index(left), self.index(right)
        made_of = {frozenset(map(self.index, members)): self.values[name]
                   for name, members in self.super_classes.items()}
        for members, value in made_of.items():
            table[value] = made_of[frozenset(int(table[organ]) for organ in members)]
        return table


def remap(labels: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Label values exchanged by `table`; values that it does not name raise ``KeyError`` with the value."""
    present = np.unique(labels)
    missing = [int(v) for v in present if int(v) not in table]
    if missing:
        raise KeyError(missing[0])
    lookup = np.zeros(int(present.max(initial=0)) + 1, np.uint8)
    for source, target in table.items():
        if 0 <= source < len(lookup):
            lookup[source] = target
    renamed = np.empty(labels.shape, np.uint8)
    for old, new in zip(labels, renamed, strict=True):  # slice by slice: an index array takes eight bytes a voxel
        new[...] = lookup[old.astype(np.intp)]
    return renamed


def remap_by_name(source: Mapping[int, str], target: Sequence[str]) -> dict[int, int]:
    """A table for `remap` from a file's own names to the order `target`; organs that `target` lacks become 0."""
    order = {name: index for index, name in enumerate(target, start=1)}
    return {0: 0} | {value: order.get(name, 0) for value, name in source.items()}
