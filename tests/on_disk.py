"""Whether a folder holds what docs/on-disk.md says of it."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = Path(__file__).resolve().parents[1] / "docs/on-disk.md"


def rows_of(title: str) -> dict[str, str]:
    """File pattern to when it is there ("" for always), of the section with that title."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", _PAGE.read_text("utf-8"), re.M | re.S)
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) ?\| .+ \|$", section, re.M)
    assert len(rows) == len({name for name, _ in rows}) == section.count("\n| `"), f"{title}: a row that is none"
    return dict(rows)


def demand_as_told(title: str, folder: Path, *sometimes: str, not_yet: tuple[str, ...] = ()) -> None:
    """Each file of `folder` has a row, and each row that is always there, or in `sometimes`, has a file.

    Args:
        title: of the section.
        folder: one that the package has just made.
        sometimes: patterns with a condition that is met here.
        not_yet: patterns without a condition that this folder is too young for.
    """
    rows = rows_of(title)
    assert set(sometimes) <= {name for name, when in rows.items() if when}
    assert set(not_yet) <= {name for name, when in rows.items() if not when}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    patterns = {name: _pattern(name) for name in sorted(rows, key=_literal, reverse=True)}
    row_of = {file: next((name for name, pattern in patterns.items() if pattern.fullmatch(file)), None)
              for file in files}
    assert {file for file, row in row_of.items() if row is None} == set(), f"{title}: files that the page does not name"
    due = {name for name, when in rows.items() if not when or name in sometimes} - set(not_yet)
    assert due - set(row_of.values()) == set(), f"{title}: rows without a file"


def _literal(name: str) -> int:
    """How much of a name is said word for word: the row that says most has the file."""
    return sum(len(part) for part in _parts(name)[::2])


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("".join(re.escape(part) if i % 2 == 0 else ".+" if part == "**" else "[^/]+?"
                              for i, part in enumerate(_parts(name))))


def _parts(name: str) -> list[str]:
    """What is said word for word, and between it words in capitals (anything without a slash) and ``**`` (anything)."""
    return re.split(r"(\*\*|(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z]))", name)
