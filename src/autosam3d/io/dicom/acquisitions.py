"""One acquisition of several that a series may hold: contrast phases, passes that overlap, reconstructions.

Blocks of slices one above the other, as step-and-shoot scans make them, are one volume. Groups that lie in one another
are several volumes: woven into one, every organ of it would be wrong.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import UsageError
from autosam3d.io.dicom.tags import tag_text
from autosam3d.io.options import ReadOptions

# What tells acquisitions apart, the tags that a scanner sets for that first. *Source*: DICOM PS3.3 C.7.3.1, C.8.2.1,
# C.8.15.3.8 and C.7.6.16.2.2.
_SURE = ("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase",
         "NominalPercentageOfRespiratoryPhase")
# These may differ in a slice or two of one acquisition, so they count only where several slices agree.
_LIKELY = ("ContrastBolusAgent", "ConvolutionKernel", "KVP", "SliceThickness")
ACQUISITION_TAGS = [*_SURE, *_LIKELY, "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime", "InstanceNumber"]
_TIME = "AcquisitionTime"
_MIN_LIKELY_SLICES = 3
# Fewer slices than these may lack a tag that the others have, without being a group of their own.
_MIN_WITHOUT = 8
# Seconds between two slices of one acquisition are fractions, or a pause of the table; a second pass over the same
# place comes later than this.
_MIN_PAUSE_S = 5.0
_MAX_LISTED = 8


@dataclass(frozen=True)
class Acquired:
    """When and how an image was made, as far as it tells acquisitions apart."""

    marks: tuple[str, ...]
    """Of the tags, in their order; numbers in one writing, "" where there is none."""
    time_s: float | None
    """Since some day; None where the file does not say."""
    instance_number: int | None

    @property
    def number(self) -> int | None:
        """AcquisitionNumber."""
        return int(float(self.marks[0])) if re.fullmatch(r"-?\d{1,9}", self.marks[0]) else None


def read_acquired(dataset: Any) -> Acquired:
    """Of a data set with `ACQUISITION_TAGS`; damaged values count as none."""
    instance = tag_text(dataset, "InstanceNumber")
    return Acquired(tuple(_mark(tag_text(dataset, keyword)) for keyword in (*_SURE, *_LIKELY)),
                    _time_s(dataset), int(instance) if re.fullmatch(r"[+-]?\d{1,9}", instance) else None)


def _mark(text: str) -> str:
    """Numbers that are equal are written alike: 120, 120.0, 1.2E2."""
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text):
        return f"{float(text):.9g}"
    return text


def _time_s(dataset: Any) -> float | None:
    """*Source*: DICOM PS3.5 table 6.2-1, DT and TM; zones are left out, as one scanner has one."""
    both = tag_text(dataset, "AcquisitionDateTime")
    date, time = (both[:8], both[8:]) if both else (tag_text(dataset, "AcquisitionDate"),
                                                    tag_text(dataset, "AcquisitionTime"))
    found = re.match(r"([01]\d|2[0-3])([0-5]\d)?([0-5]\d(?:\.\d{1,6})?)?", time)
    if found is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return _day(date) * 86400.0 + hours * 3600 + minutes * 60 + seconds


def _day(date: str) -> int:
    try:
        return datetime.datetime.strptime(date, "%Y%m%d").toordinal()
    except ValueError:
        return 0


def demand_one_acquisition(found: list[Acquired], places: list[int], heights_mm: np.ndarray, options: ReadOptions,
                           where: str | Path, warnings: list[str]) -> np.ndarray:
    """bool [slice]: the slices of one volume.

    Args:
        found: of each slice, in the order of their heights.
        places: of each slice, counted from below; slices in one place have one number.
        heights_mm: of each slice.
        options: which acquisition, by its number in the list that the error tells; None takes the only one.
        where: what messages call the series.
        warnings: are added to.

    Raises:
        UsageError: ACQUISITION_CHOICE with the list.
    """
    wanted = options.acquisition
    groups, woven = _parted(_keys(found), places)
    if wanted is not None and not woven:
        groups = _by_label([acquired.marks[0] for acquired in found])
    numbered = _numbered(groups, found)
    if options.of_dataset and not woven and wanted not in numbered:
        wanted = None
    if wanted is None:
        if woven:
            raise _choice(numbered, found, heights_mm, where, options, "expected one acquisition, found "
                          f"{len(numbered)} that lie in one another (by {', '.join(woven)})")
        return np.ones(len(found), bool)
    if wanted not in numbered:
        raise _choice(numbered, found, heights_mm, where, options,
                      f"no acquisition {wanted}; the series has {len(numbered)}")
    chosen = np.zeros(len(found), bool)
    chosen[numbered[wanted]] = True
    if not chosen.all():
        num_left = len(found) - int(chosen.sum())
        warnings.append(f"acquisition {wanted} is taken; {num_left} slices of others are left out")
    return chosen


def _keys(found: list[Acquired]) -> dict[str, list[Hashable]]:
    """Tag to the label of each slice by it; None belongs to any group. Tags in which all agree are left out."""
    keys: dict[str, list[Hashable]] = {}
    for index, name in enumerate((*_SURE, *_LIKELY)):
        labels: list[Hashable] = [acquired.marks[index] for acquired in found]
        keys[name] = _without_few(labels, "", at_least=_MIN_WITHOUT)
        if name in _LIKELY:
            keys[name] = _without_few(keys[name], *set(keys[name]), at_least=_MIN_LIKELY_SLICES)
    keys[_TIME] = _passes([acquired.time_s for acquired in found])
    keys["InstanceNumber"] = _ramps([acquired.instance_number for acquired in found])
    return {name: labels for name, labels in keys.items() if len(set(labels) - {None}) > 1}


def _without_few(labels: list[Hashable], *values: Hashable, at_least: int) -> list[Hashable]:
    few = {value for value in values if labels.count(value) < at_least}
    return [None if label in few else label for label in labels]


def _passes(times_s: list[float | None]) -> list[Hashable]:
    """Which pass of the scanner each slice is of: the times fall into groups with pauses between."""
    known = sorted({time for time in times_s if time is not None})
    starts = [known[0], *(b for a, b in itertools.pairwise(known) if b - a > _MIN_PAUSE_S)] if known else []
    labels: list[Hashable] = [-1 if time is None else sum(start <= time for start in starts) for time in times_s]
    labels = _without_few(labels, -1, at_least=_MIN_WITHOUT)
    return _without_few(labels, *set(labels), at_least=_MIN_LIKELY_SLICES)


def _ramps(numbers: list[int | None]) -> list[Hashable]:
    """Two runs of numbers that alternate from slice to slice, as 1, 47, 2, 48: two passes that no tag tells apart."""
    if None in numbers or len(numbers) < 2 * _MIN_WITHOUT:
        return [None] * len(numbers)
    known = np.array(numbers)
    own = known[2:] - known[:-2]
    alternate = abs(int(own[0])) == 1 and (own == own[0]).all()
    return [index % 2 for index in range(len(numbers))] if alternate else [None] * len(numbers)


def _lie_in_one_another(labels: list[Hashable], places: list[int]) -> bool:
    """Whether the groups are anything but blocks one above the other."""
    known = [(place, label) for place, label in zip(places, labels, strict=True) if label is not None]
    changes = [(below, above) for below, above in itertools.pairwise(known) if below[1] != above[1]]
    shared = any(below[0] == above[0] for below, above in changes)
    return shared or 1 + len(changes) > len({label for _, label in known})


def _parted(keys: dict[str, list[Hashable]], places: list[int]) -> tuple[list[list[int]], list[str]]:
    """(groups of slices that each are blocks by every tag, the tags that it took to part them)."""
    groups, woven = [list(range(len(places)))], []
    for name, labels in keys.items():
        if any(_lie_in_one_another([labels[i] for i in group], [places[i] for i in group]) for group in groups):
            groups = [[group[i] for i in part] for group in groups for part in _by_label([labels[i] for i in group])]
            woven.append(name)
    return groups, woven


def _by_label(labels: list[Hashable]) -> list[list[int]]:
    parts: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        parts.setdefault(label, []).append(index)
    return list(parts.values())


def _numbered(groups: list[list[int]], found: list[Acquired]) -> dict[int, list[int]]:
    """Number of an acquisition to its slices: AcquisitionNumber where that tells them apart, else counted by time."""
    members = sorted(groups, key=lambda group: (_start_s(group, found), group[0]))
    numbers = [{found[index].number for index in group} for group in members]
    own = [next(iter(of_group)) for of_group in numbers if len(of_group) == 1]
    if len({number for number in own if number is not None}) == len(members):
        return dict(sorted((number, group) for number, group in zip(own, members, strict=True) if number is not None))
    return dict(enumerate(members, start=1))


def _start_s(group: list[int], found: list[Acquired]) -> float:
    return min((time for index in group if (time := found[index].time_s) is not None), default=0.0)


def _choice(groups: dict[int, list[int]], found: list[Acquired], heights_mm: np.ndarray, where: str | Path,
            options: ReadOptions, fault: str) -> UsageError:
    """Times are given as seconds after the first, as the time of day may be a patient's."""
    zero = min((a.time_s for a in found if a.time_s is not None), default=None)
    if not all(any(found[index].time_s is not None for index in group) for group in groups.values()):
        zero = None
    listed = []
    for number, group in list(groups.items())[:_MAX_LISTED]:
        time = "" if zero is None else f", {_start_s(group, found) - zero:.0f} s after the first"
        low, high = heights_mm[group].min(), heights_mm[group].max()
        listed.append(f"{number}: {len(group)} slices{time}, {low:.1f} to {high:.1f} mm")
    more = f"; and {len(groups) - _MAX_LISTED} more" if len(groups) > _MAX_LISTED else ""
    remedy = options.remedy("acquisition", "N", "export each as a series of its own", ", or choose one with {}")
    return UsageError("ACQUISITION_CHOICE", where, f"{fault}: {'; '.join(listed)}{more}", remedy)
