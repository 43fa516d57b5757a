"""Which organs were looked for in which case: an organ that was not is unknown there, not background.

A folder says so in ``annotated.json`` (``{CASE: [ORGAN, ...]}``), or in ``dataset.json`` under ``present`` (the same,
or one list for all cases).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosam3d.data.json_file import read_json
from autosam3d.errors import VolumeError


@dataclass(frozen=True)
class LookedFor:
    """What a folder says of its cases."""

    where: Path
    """The file that says it."""
    organs: frozenset[str]
    """Of ``dataset.json``."""
    listed: Mapping[str, list[Any]] | list[Any]

    def of(self, case: str) -> frozenset[str]:
        """The organs that were looked for in `case`, by the names of ``dataset.json``.

        Raises:
            VolumeError: PARTIAL_LABELS, the case is not listed, or with a name that is no organ's.
        """
        names = self.listed if isinstance(self.listed, list) else self.listed.get(case)
        if names is None:
            raise VolumeError("PARTIAL_LABELS", self.where, f"case {case}: expected the organs that were looked for, "
                              "got none", "add the case, with an empty list where nothing was")
        for name in names:
            if name not in self.organs:
                near = difflib.get_close_matches(str(name), self.organs, 1)
                raise VolumeError("PARTIAL_LABELS", self.where, f"case {case}: expected names of dataset.json "
                                  f"({', '.join(sorted(self.organs))}), got {name!r}",
                                  f"write {near[0]}" if near else "correct the list")
        return frozenset(names)


def looked_for(folder: Path, index: Mapping[str, Any]) -> LookedFor | None:
    """What `folder` says; None where it says nothing, which means every organ in every case.

    Args:
        index: its ``dataset.json``.

    Raises:
        VolumeError: PARTIAL_LABELS, it holds no lists.
    """
    where, listed = folder / "dataset.json", index.get("present")
    if (folder / "annotated.json").is_file():
        where = folder / "annotated.json"
        listed = read_json(where)
    if listed is None:
        return None
    lists = listed.values() if isinstance(listed, dict) else [listed]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise VolumeError("PARTIAL_LABELS", where, "expected a list of organs for each case, got something else",
                          'write {"CASE": ["ORGAN", ...], ...}')
    return LookedFor(where, frozenset(str(name) for name in index["labels"] if name != "background"), listed)
