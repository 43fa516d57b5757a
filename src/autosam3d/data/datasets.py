"""Several datasets as one: whose organs have other names, of which each draws its own, in which some are unknown.

An organ that a dataset does not draw is unknown in its cases, not background; so is one that was not looked for in a
case (`annotated`). Label maps whose scan lies in another of the datasets add their organs to that case.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosam3d.data.annotated import looked_for
from autosam3d.data.case import Case
from autosam3d.data.copies import refuse_copies
from autosam3d.data.folder import CaseSet, case_set, open_dataset, plain_name, read_index
from autosam3d.data.index_slips import demand_plain_labels
from autosam3d.errors import UsageError, VolumeError
from autosam3d.recipes.data_source import DataSource
from autosam3d.recipes.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opened:
    source: DataSource
    cases: CaseSet
    scanless: Mapping[str, Case]
    """Label maps without a scan, by their case; `image_path` is where the scan was looked for."""


def open_datasets(folders: Sequence[str | Path], recipe: Recipe) -> CaseSet:
    """The cases of all datasets that a training learns from, split by each dataset's own rule.

    Args:
        folders: of datasets in the nnU-Net v2 layout, each as ``FOLDER`` or, for a dataset of ``recipe.data``,
            ``NAME=FOLDER``. Datasets of the recipe that have a path need not be named.

    Raises:
        UsageError: DATA, none is named, or a name that the recipe does not know.
        VolumeError: as `open_dataset`; and LABELS, a dataset names no organ of the recipe, or one that neither its
            ``organs`` nor ``dataset.background_organs`` explain; LEAK, DUPLICATE_SCAN, a scan lies in two of them.
    """
    places = _matched([str(folder) for folder in folders], recipe)
    if len(places) == 1 and not recipe.data:
        folder = places[0][1]
        index = read_index(folder, recipe)
        if looked_for(folder, index) is None:
            return open_dataset(folder, recipe)
    several = len(places) > 1
    opened = [_open(source, folder, recipe, several) for source, folder in places]
    parts = {part: [case for one in opened for case in getattr(one.cases, part)] for part in ("train", "val", "test")}
    if several:
        refuse_copies(parts)
        parts = _with_further_labels(parts, opened)
        parts = _with_unique_names(parts)
    parts["train"] = _that_teach(parts["train"])
    return CaseSet(places[0][1], *(tuple(parts[part]) for part in ("train", "val", "test")),
                   warnings=tuple(text for one in opened for text in one.cases.warnings),
                   further_folders=tuple(folder for _, folder in places[1:]))


def organ_counts(cases: Iterable[Case], recipe: Recipe, only: str) -> dict[str, dict[str, int]]:
    """Organ to {dataset: its cases in which that organ was looked for}; super-classes stand behind the organs.

    Args:
        only: name of the dataset where there is one only.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in recipe.labels.values}
    for case in cases:
        for name, value in recipe.labels.values.items():
            if value in case.drawn if case.drawn is not None else value < recipe.labels.num_outputs:
                counts[name][case.source or only] += 1
    return {name: dict(sources) for name, sources in counts.items()}


def _matched(folders: Sequence[str], recipe: Recipe) -> list[tuple[DataSource, Path]]:
    """Every dataset of the training with its folder."""
    known = {source.name: source for source in recipe.data}
    places = {source.name: Path(source.path) for source in recipe.data if source.path is not None}
    plain = []
    for text in folders:
        name, equals, folder = text.partition("=")
        if equals and name in known:
            places[name] = Path(folder)
        elif equals and not Path(text).exists():
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError("DATA", "--data", f"expected NAME=FOLDER with a dataset of the recipe "
                             f"({', '.join(known) or 'it names none'}), got {text!r}",
                             f"write {near[0]}={folder}" if near else "give the folder alone, or add it to `data`")
        else:
            plain.append(Path(text))
    lacking = [name for name in known if name not in places]
    if known and plain:
        if len(plain) != len(lacking):
            raise UsageError("DATA", "--data", f"expected folders for the datasets {', '.join(lacking) or '(none)'} of "
                             f"the recipe, got {len(plain)}", "write NAME=FOLDER for each")
        places |= dict(zip(lacking, plain, strict=True))
        lacking = []
    if lacking:
        raise UsageError("DATA", "--data", f"expected a folder for each dataset of the recipe, got none for "
                         f"{', '.join(lacking)}", f"add --data {lacking[0]}=FOLDER")
    if known:
        return [(source, places[name]) for name, source in known.items()]
    if not plain:
        raise UsageError("DATA", "--data", "expected a dataset folder, got none", "add --data FOLDER")
    return [(DataSource(name=_name_of(folder, index)), folder) for index, folder in enumerate(plain)]


def _name_of(folder: Path, index: int) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in folder.resolve().name)[:60]
    return name if name[:1].isalnum() else f"data{index + 1}"


def _open(source: DataSource, folder: Path, recipe: Recipe, several: bool) -> _Opened:
    index = read_index(folder, recipe)
    where = folder / "dataset.json"
    demand_plain_labels(index["labels"], where)
    means = _meanings(source, index["labels"], recipe, where)
    facts = _Facts(folder, index, source, recipe, means)
    scanless: dict[str, Path] = {}
    own = {"source": source.name, "weight": source.weight, "reading": source.reading}
    cases = case_set(folder, index, recipe.dataset.fold, recipe.dataset.val_share,
                     lambda name: facts.of(name) | own,
                     scanless if several else None)
    ending = index["file_ending"]
    return _Opened(source, cases, {
        name: Case(name, folder / "imagesTr" / f"{name}_0000{ending}", path, **own, **facts.of(name))
        for name, path in scanless.items()})


class _Facts:
    """What was looked for in each case of a folder, in the recipe's values."""

    def __init__(
        self, folder: Path, index: Mapping[str, Any], source: DataSource, recipe: Recipe, means: Mapping[str, int]
    ) -> None:
        self._folder, self._index, self._recipe, self._means = folder, index, recipe, means
        unknown = sorted(set(source.drawn or ()) - set(index["labels"]))
        if unknown:
            raise VolumeError("PARTIAL_LABELS", folder / "dataset.json", f"expected the names of data.{source.name}."
                              f"drawn among its labels, got {', '.join(unknown)}", "correct the recipe")
        self._looked = looked_for(folder, index)
        self._default = frozenset(source.drawn if source.drawn is not None else means)

    def of(self, case: str) -> dict[str, Any]:
        """``label_table`` and ``drawn`` of a case."""
        names = self._default if self._looked is None else self._looked.of(case)
        drawn = frozenset(self._means[name] for name in names if self._means.get(name))
        values = self._index["labels"]
        table = {values[name]: value if value in drawn else 0 for name, value in self._means.items()}
        labels = self._recipe.labels
        whole = set(range(1, labels.num_outputs)) <= drawn
        for name, members in labels.super_classes.items():
            twice = [organ for organ in members if labels.values[organ] in drawn]
            if labels.values[name] in drawn and twice:
                raise VolumeError("LABELS", self._folder / "dataset.json", f"case {case}: expected {name} or the "
                                  f"organs that it is made of, got both ({name}, {', '.join(twice)})",
                                  "map one of the two to background in `data`")
        return {"label_table": {0: 0} | table, "drawn": None if whole else drawn}


def _meanings(source: DataSource, labels: Mapping[str, Any], recipe: Recipe, where: Path) -> dict[str, int]:
    """Name in ``dataset.json`` to the recipe's value, 0 for what the model does not learn."""
    unknown = sorted(set(source.organs) - set(labels))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [str(name) for name in labels], 1)
        raise VolumeError("LABELS", where, f"expected the names of data.{source.name}.organs among its labels "
                          f"{[n for n in labels if n != 'background']}, got {', '.join(unknown)}",
                          f"write {near[0]}" if near else "correct the recipe")
    values = {plain_name(name): value for name, value in recipe.labels.values.items()}
    dropped = {plain_name(organ) for organ in recipe.dataset.background_organs} | {"background"}
    means, unexplained = {}, []
    for name in labels:
        if name == "background":
            continue
        meant = plain_name(source.organs.get(name, name))
        if meant not in values and meant not in dropped:
            unexplained.append(name)
        means[name] = values.get(meant, 0)
    if unexplained or not any(means.values()):
        got = f"got {', '.join(unexplained)}" if unexplained else f"got {', '.join(means) or 'none'}"
        raise VolumeError("LABELS", where, f"expected organs of the recipe {recipe.name} "
                          f"({', '.join(recipe.labels.values)}), {got}",
                          f"say in the recipe what they mean: data: [{{name: {source.name}, organs: "
                          f"{{{(unexplained or [*means, 'NAME'])[0]}: ORGAN or background}}}}]")
    twice = [name for name, count in Counter(v for v in means.values() if v).items() if count > 1]
    if twice:
        names = [name for name, value in means.items() if value == twice[0]]
        raise VolumeError("LABELS", where, f"expected one label for each organ, got {', '.join(names)} for the same",
                          "merge them in the label maps")
    return means


def _with_further_labels(parts: Mapping[str, list[Case]], opened: Sequence[_Opened]) -> dict[str, list[Case]]:
    """Cases with the label map of another dataset where that draws all that their own does, and more."""
    further = {name: case for one in opened for name, case in one.scanless.items()}
    own = {case.name: case for cases in parts.values() for case in cases}
    lonely = sorted(set(further) - set(own))
    if lonely:
        case = further[lonely[0]]
        raise VolumeError("PAIRING", case.label_path or case.image_path, "expected a scan for every label map, in its "
                          f"own dataset or another of them, got none for {len(lonely)}, the first of them {case.name}",
                          f"add {case.image_path.name} to imagesTr, or take the label map out")
    taken: dict[str, Case] = {}
    for name, more in further.items():
        case = own[name]
        if case.drawn is None or (more.drawn is not None and more.drawn <= case.drawn):
            continue
        if more.drawn is not None and not case.drawn <= more.drawn:
            raise VolumeError("LABELS", more.label_path or more.image_path, f"case {name}: expected label maps of "
                              f"which one draws all that the other does, got each with organs of its own "
                              f"({case.source}, {more.source})", "merge the two label maps")
        taken[name] = replace(case, label_path=more.label_path, label_table=more.label_table, drawn=more.drawn)
    if taken:
        log.info("%d cases learn from the label map of another dataset, which draws more organs", len(taken))
    return {part: [taken.get(case.name, case) for case in cases] for part, cases in parts.items()}


def _with_unique_names(parts: Mapping[str, list[Case]]) -> dict[str, list[Case]]:
    counts = Counter(case.name for cases in parts.values() for case in cases)
    return {part: [replace(case, name=f"{case.source}/{case.name}") if counts[case.name] > 1 else case
                   for case in cases] for part, cases in parts.items()}


def _that_teach(cases: Sequence[Case]) -> list[Case]:
    """`cases` less those in which no organ of the recipe was looked for."""
    silent = [case.name for case in cases if case.drawn is not None and not case.drawn]
    if silent:
        log.warning("%d training cases are left out, since no organ of the recipe was looked for in them, the first of "
                    "them %s", len(silent), silent[0])
    return [case for case in cases if case.drawn is None or case.drawn]
