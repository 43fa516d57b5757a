"""Scans that nobody labelled: a teacher alone speaks of them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from autosam3d.data.case import Case
from autosam3d.data.folder import CaseSet
from autosam3d.errors import VolumeError
from autosam3d.io.files import sha256_of

log = logging.getLogger(__name__)


def with_unlabelled(cases: CaseSet, scans: Mapping[str, Path]) -> CaseSet:
    """`cases` with `scans` to train on, of which nothing is known.

    One that is a labelled training case as well, or is there twice, counts once.

    Args:
        scans: name to a file, or a folder of slices.

    Raises:
        VolumeError: LEAK, one is a validation or test case; NO_SCANS, none is left.
    """
    known = _by_size([("train", case) for case in cases.train]
                     + [(part, case) for part in ("val", "test") for case in getattr(cases, part)])
    own: dict[int, list[tuple[str, Case]]] = defaultdict(list)
    added, again = [], 0
    for name, path in scans.items():
        case = Case(name, path, None, drawn=frozenset(), source="unlabelled")
        size = None if path.is_dir() else path.stat().st_size
        twin = None if size is None else _twin(path, [*known[size], *own[size]])
        if twin is None:
            added.append(case)
            if size is not None:
                own[size].append(("train", case))
        elif twin[0] == "train":
            again += 1
        else:
            raise VolumeError("LEAK", path, f"expected scans that are in no other part, got the {twin[0]} case "
                              f"{twin[1].name}", "take it out of --unlabelled")
    if again:
        log.info("%d scans without labels are training cases already or there twice; they count once", again)
    if not added:
        raise VolumeError("NO_SCANS", next(iter(scans.values()), Path()), "expected scans that are no training case "
                          "already, got none", "leave --unlabelled out, or name another folder")
    taken = {case.name for case in cases.train}
    named = [replace(case, name=f"unlabelled/{case.name}") if case.name in taken else case for case in added]
    return replace(cases, train=(*cases.train, *named))


def _by_size(cases: Sequence[tuple[str, Case]]) -> dict[int, list[tuple[str, Case]]]:
    sizes: dict[int, list[tuple[str, Case]]] = defaultdict(list)
    for part, case in cases:
        sizes[case.image_path.stat().st_size].append((part, case))
    return sizes


def _twin(path: Path, others: Sequence[tuple[str, Case]]) -> tuple[str, Case] | None:
    """The case whose file is the same; only files of equal size are handed in."""
    if not others:
        return None
    digest = sha256_of(path)
    return next((other for other in others if sha256_of(other[1].image_path) == digest), None)
