"""A dataset folder in the nnU-Net v2 layout, as it is on disk: which cases there are, and which part each plays.

Everything that can be wrong with such a folder is found here, before an image is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosam3d.data.case import Case
from autosam3d.data.copies import refuse_copies
from autosam3d.data.index_slips import (
    demand_file_ending,
    demand_one_channel,
    demand_plain_labels,
    demand_version_2,
    fold_of,
    name_slip,
)
from autosam3d.data.json_file import read_json
from autosam3d.errors import VolumeError
from autosam3d.io.files import write_text_atomic
from autosam3d.labels import LabelMap
from autosam3d.recipes.recipe import Recipe

log = logging.getLogger(__name__)



@dataclass(frozen=True)
class CaseSet:
    """The cases of a folder, sorted by name; every training and validation case has labels."""

    folder: Path
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]
    warnings: tuple[str, ...] = ()
    further_folders: tuple[Path, ...] = ()
    """Where they come from several datasets: the folders of the others."""

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder, *self.further_folders)


def open_dataset(folder: str | Path, recipe: Recipe) -> CaseSet:
    """The cases of `folder`, split as `splits_final.json` says, or by `dataset.val_share` where it is absent.

    Every organ must have been drawn in every case; `datasets.open_datasets` takes others too.

    Raises:
        VolumeError: DATASET (another layout), LABELS (organs that are not the recipe's), PAIRING, SPLITS, LEAK,
            PARTIAL_LABELS; the message says what was expected.
    """
    folder = Path(folder)
    index = read_index(folder, recipe)
    _demand_every_organ(folder, index)
    table = _label_table(index["labels"], recipe, folder)
    return case_set(folder, index, recipe.dataset.fold, recipe.dataset.val_share, lambda _: {"label_table": table})


def open_without_recipe(folder: str | Path, fold: int) -> tuple[CaseSet, dict[int, str], str]:
    """(cases, label to organ, file ending) of `folder` for a program that knows no recipe; labels count 1, 2, 3, ...

    Raises:
        VolumeError: as `open_dataset`, and SPLITS without ``splits_final.json`` or without validation cases.
    """
    folder = Path(folder)
    index = read_index(folder, None)
    _demand_every_organ(folder, index)
    where, labels = folder / "dataset.json", index["labels"]
    plain = all(isinstance(value, int) and not isinstance(value, bool) for value in labels.values())
    organs = {value: str(name) for name, value in labels.items() if name != "background"} if plain else {}
    if labels.get("background") != 0 or sorted(organs) != list(range(1, len(labels))) or not organs:
        raise VolumeError("LABELS", where, f"expected background 0 and organs numbered 1, 2, 3, ..., got {labels}",
                          "renumber the label maps without gaps")
    if not (folder / "splits_final.json").is_file():
        raise VolumeError("SPLITS", folder, "expected splits_final.json, so that the same cases validate as elsewhere, "
                          "got none", 'write it: [{"train": [names], "val": [names]}]')
    table = {value: value for value in (0, *organs)}
    cases = case_set(folder, index, fold, 0.0, lambda _: {"label_table": table})
    if not cases.val:
        raise VolumeError("SPLITS", folder / "splits_final.json", f"expected validation cases in fold {fold}, got none",
                          "name some of the training cases there")
    return cases, dict(sorted(organs.items())), index["file_ending"]


def case_set(
    folder: Path, index: Mapping[str, Any], fold: int, val_share: float, facts: Callable[[str], Mapping[str, Any]],
    scanless: dict[str, Path] | None = None,
) -> CaseSet:
    """The cases of `folder`, paired and split.

    Args:
        index: what `read_index` gave.
        facts: from a case's name to what else `Case` is to hold of it.
        scanless: takes up the label maps of labelsTr whose scan is not there, by their case; None refuses them.

    Raises:
        VolumeError: as `open_dataset`.
    """
    ending, expected = index["file_ending"], index.get("numTraining")
    warnings: list[str] = []
    training = _pair(folder, "Tr", ending, facts, labels_needed=True, scanless=scanless)
    testing = _pair(folder, "Ts", ending, facts, labels_needed=False)
    if not training:
        raise VolumeError("DATASET", folder / "imagesTr", f"expected scans named CASE_0000{ending}, got none",
                          "run autosam3d prepare again, or name another folder")
    if isinstance(expected, int) and expected != len(training):
        raise VolumeError("DATASET", folder / "dataset.json", f"expected the {expected} training cases of numTraining, "
                          f"got {len(training)}", "complete the copy, or correct numTraining")
    both = sorted(training.keys() & testing.keys())
    if both:
        raise VolumeError("LEAK", folder, f"expected imagesTs and imagesTr to differ, got {_few(both)} twice",
                          "take them out of one of the two")
    train, val = _split(folder, sorted(training), fold, val_share, warnings, elsewhere=scanless or {})
    parts = {
        "train": [training[n] for n in train], "val": [training[n] for n in val],
        "test": [testing[n] for n in sorted(testing)],
    }
    refuse_copies(parts)
    for warning in warnings:
        log.warning("%s: %s", folder, warning)
    return CaseSet(folder, *(tuple(part) for part in parts.values()), warnings=tuple(warnings))


def write_index(folder: Path, labels: LabelMap, train: Sequence[str], val: Sequence[str], description: str) -> None:
    """``dataset.json`` and ``splits_final.json`` of a folder whose files end in .nii.gz."""
    index = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {organ: value for value, organ in labels.by_index.items()},
        "numTraining": len(train) + len(val),
        "file_ending": ".nii.gz",
        "description": description,
    }
    splits = [{"train": list(train), "val": list(val)}]
    write_text_atomic(folder / "splits_final.json", json.dumps(splits, indent=1) + "\n")
    write_text_atomic(folder / "dataset.json", json.dumps(index, indent=1) + "\n")


def index_description(folder: Path) -> str | None:
    """The description in a folder's ``dataset.json``; None where there is no such file or no such key."""
    path = folder / "dataset.json"
    tree = read_json(path) if path.is_file() else None
    return tree.get("description") if isinstance(tree, dict) else None


def held_out(names: Iterable[str], share: float) -> list[str]:
    """`share` of `names`, at least one and not all, in the order of a hash: the same on every machine."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    if share <= 0 or len(ranked) < 2:
        return []
    return sorted(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])


def read_index(folder: Path, recipe: Recipe | None) -> dict[str, Any]:
    """``dataset.json`` of `folder`, checked for what this project needs of it.

    Raises:
        VolumeError: DATASET.
    """
    def other_layout(fault: str) -> VolumeError:
        if recipe is None:
            return VolumeError("DATASET", folder, f"expected a folder in the nnU-Net v2 layout (dataset.json, "
                               f"imagesTr, labelsTr), {fault}", "autosam3d prepare makes it from a download")
        how = "the dataset looks like"
        if recipe.dataset.download:
            how = f"autosam3d prepare {recipe.name} DOWNLOAD NEW_FOLDER makes it from a download, which looks like"
        return VolumeError("DATASET", folder, f"expected a folder in the nnU-Net v2 layout (dataset.json, imagesTr, "
                           f"labelsTr), {fault}", f"{how}: {' '.join(recipe.dataset.layout.split())}")

    if not folder.is_dir():
        raise other_layout("got no such folder")
    if not (folder / "dataset.json").is_file():
        raise other_layout("got no dataset.json")
    for part in ("imagesTr", "labelsTr"):
        if not (folder / part).is_dir():
            raise other_layout(f"got no {part}")
    where = folder / "dataset.json"
    index = read_json(where)
    if not isinstance(index, dict) or not isinstance(index.get("labels"), dict):
        raise other_layout("got a dataset.json without labels")
    demand_version_2(index, where)
    demand_one_channel(index, where)
    demand_file_ending(index, where)
    return index


def _demand_every_organ(folder: Path, index: Mapping[str, Any]) -> None:
    for where, listed in ((folder / "annotated.json", (folder / "annotated.json").exists()),
                          (folder / "dataset.json", "present" in index)):
        if listed:
            raise VolumeError("PARTIAL_LABELS", where, "expected every organ drawn in every case, got a list of organs "
                              "that some cases lack", "`autosam3d train` and `distill` take such a dataset; here, give "
                              "the fully drawn cases only, without the list")


def _label_table(labels: Mapping[str, Any], recipe: Recipe, folder: Path) -> dict[int, int]:
    """Value in the files to value of the recipe, matched by name."""
    where = folder / "dataset.json"
    demand_plain_labels(labels, where)
    numbers = {plain_name(organ): number for number, organ in recipe.labels.by_index.items()}
    dropped = {plain_name(organ) for organ in recipe.dataset.background_organs}
    there = {plain_name(name): value for name, value in labels.items() if name != "background"}
    missing = sorted(numbers.keys() - there.keys())
    surplus = sorted(there.keys() - numbers.keys() - dropped)
    if missing or surplus:
        extra = f"; dataset.background_organs can name {_few(surplus)} to be made background" if surplus else ""
        raise VolumeError("LABELS", where, f"expected the organs of the recipe {recipe.name} "
                          f"{list(recipe.labels.organs)}, got {[n for n in labels if n != 'background']}",
                          f"use the recipe that belongs to this dataset, or one with these organs{extra}")
    return {0: 0} | {value: numbers.get(name, 0) for name, value in there.items()}


def plain_name(name: str) -> str:
    """An organ's name as names are compared: without case, with underscores for spaces and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _pair(
    folder: Path, part: str, ending: str, facts: Callable[[str], Mapping[str, Any]], labels_needed: bool,
    scanless: dict[str, Path] | None = None,
) -> dict[str, Case]:
    """Cases of images{part} and labels{part} by name."""
    images_dir, labels_dir = folder / f"images{part}", folder / f"labels{part}"
    images: dict[str, Path] = {}
    for path in _files(images_dir, ending):
        name, _, channel = path.name.removesuffix(ending).rpartition("_")
        if not name or channel != "0000":
            raise VolumeError("DATASET", path, f"expected one channel a case, in files named CASE_0000{ending}",
                              "rename the CT scans, and take other channels out")
        images[name] = path
    labels = {path.name.removesuffix(ending): path for path in _files(labels_dir, ending)}
    lonely = sorted(labels.keys() - images.keys())
    if scanless is not None:
        scanless.update((name, labels[name]) for name in lonely)
    elif lonely:
        raise VolumeError("PAIRING", labels_dir, f"expected a scan for every label map, got none for {_few(lonely)}",
                          f"add {lonely[0]}_0000{ending} to images{part}, or take the label map out")
    bare = sorted(images.keys() - labels.keys())
    if bare and (labels_needed or labels):
        raise VolumeError("PAIRING", images_dir, f"expected a label map for every scan, got none for {_few(bare)}",
                          f"add {bare[0]}{ending} to labels{part}, or take the scan out")
    folded = defaultdict(list)
    for name in images:
        folded[name.casefold()].append(name)
    twice = next((names for names in folded.values() if len(names) > 1), None)
    if twice:
        raise VolumeError("DATASET", images_dir, f"expected names that differ in more than case, got {_few(twice)}",
                          "rename one of them")
    return {name: Case(name, path, labels.get(name), **facts(name)) for name, path in sorted(images.items())}


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def _split(
    folder: Path, names: list[str], fold: int, val_share: float, warnings: list[str], elsewhere: Collection[str]
) -> tuple[list[str], list[str]]:
    """Training and validation names of the fold; those `elsewhere` are passed over."""
    path = folder / "splits_final.json"
    if not path.is_file():
        val = held_out(names, val_share)
        return [n for n in names if n not in set(val)], val
    folds = read_json(path)
    train, val = (sorted(set(part) - set(elsewhere)) if elsewhere else sorted(part)
                  for part in fold_of(folds, fold, path))
    unknown = sorted({*train, *val} - set(names))
    if unknown:
        raise VolumeError("SPLITS", path, f"expected names of cases in imagesTr, got {_few(unknown)}",
                          name_slip(unknown, names))
    if len({*train, *val}) != len(train) + len(val):
        again = sorted(n for n in {*train, *val} if (train + val).count(n) > 1)
        raise VolumeError("LEAK", path, f"expected every case once in fold {fold}, got {_few(again)} more than once",
                          "correct the file")
    if not train:
        raise VolumeError("SPLITS", path, f"expected training cases in fold {fold}, got none", "correct the file")
    unused = len(names) - len(train) - len(val)
    if unused:
        warnings.append(f"{unused} of {len(names)} cases of imagesTr are in neither part of fold {fold}")
    return train, val


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(str(n) for n in names[:5]) + more
