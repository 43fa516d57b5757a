"""One table as Markdown, LaTeX, CSV and HTML: every number is formatted once, so that the four cannot differ."""

from __future__ import annotations

import csv
import io as text_io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from autosam3d.io.files import atomic_write_all, bytes_to_write
from autosam3d.version import __version__

Kind = Literal["fact", "run", "paper"]
"""Of a column: words and sizes, results of this project's runs, or figures of the paper."""
NOT_RUN, NOT_REPORTED = "not run", "not reported"


@dataclass(frozen=True)
class Column:
    """A column; neighbours of one `group` share a heading."""

    name: str
    group: str = ""
    kind: Kind = "fact"
    numbers: bool = False
    """Of a fact: numbers, set to the right."""

    @property
    def right(self) -> bool:
        return self.numbers or self.kind != "fact"

    @property
    def heading(self) -> str:
        """In one line, for Markdown and CSV."""
        return " ".join(part for part in (self.group, self.name) if part)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry: words, or a number with what belongs to it. Numbers are as shown, for example in percent."""

    kind: Kind = "fact"
    value: float | None = None
    """None with a `text` is words, without one "not run" or "not reported"."""
    text: str = ""
    digits: int = 2
    signed: bool = False
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval."""
    sd: float | None = None
    """Standard deviation over seeds."""
    mark: str = ""
    """``*`` or ``†``; the table's notes say what for."""
    best: bool = False
    """Of its column."""

    def __post_init__(self) -> None:
        numbers = [v for v in (self.value, self.low, self.high, self.sd) if v is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"cell: expected finite numbers, got {numbers}")
        if (self.low is None) != (self.high is None) or (self.value is None and (numbers or self.mark or self.best)):
            raise ValueError("cell: expected both ends of an interval, and a value beside interval, SD and mark")

    @property
    def shown(self) -> str:
        if self.value is not None:
            return f"{self.value:{'+' if self.signed else ''}.{self.digits}f}"
        return self.text or {"fact": "", "run": NOT_RUN, "paper": NOT_REPORTED}[self.kind]

    @property
    def shown_sd(self) -> str:
        return "" if self.sd is None else f"{self.sd:.{self.digits}f}"

    @property
    def interval(self) -> tuple[str, str] | None:
        """Both ends as shown."""
        if self.low is None or self.high is None:
            return None
        form = f"{'+' if self.signed else ''}.{self.digits}f"
        return f"{self.low:{form}}", f"{self.high:{form}}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is shown, whatever the format.

    Attributes:
        rows: each as long as `columns`, each cell of its column's kind: the paper's figures stay in columns of their
            own, and a column of this project's results holds nothing else.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if [cell.kind for cell in row] != [column.kind for column in self.columns]:
                raise ValueError(f"{self.key}: expected cells of the kinds {[c.kind for c in self.columns]}, got "
                                 f"{[cell.kind for cell in row]}")

    @property
    def groups(self) -> list[tuple[str, Kind, int]]:
        """Heading, kind and width of neighbouring columns that belong together."""
        runs = ((key, len(list(some))) for key, some in groupby(self.columns, lambda c: (c.group, c.kind)))
        return [(group, kind, width) for (group, kind), width in runs]


def markdown(table: Table) -> str:
    """A pipe table with its title above and its notes below."""
    heads = " | ".join(plain_markdown(c.heading) for c in table.columns)
    lines = [f"**{plain_markdown(table.title)}**", "", f"| {heads} |",
             "|" + "|".join("--:" if c.right else ":--" for c in table.columns) + "|"]
    lines += ["| " + " | ".join(_md_cell(cell) for cell in row) + " |" for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {plain_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    r"""A `table*` for booktabs; it needs ``\usepackage{booktabs,graphicx}`` and nothing else."""
    columns = "".join("r" if c.right else "l" for c in table.columns)
    heads, rules, at = [], [], 1
    for group, kind, width in table.groups:
        heads.append(rf"\multicolumn{{{width}}}{{{'l' if kind == 'fact' else 'c'}}}{{{_tex(group)}}}")
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if group else []
        at += width
    body = [" & ".join(_tex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    notes = [rf"{_tex(note)}\par" for note in table.notes]
    lines = [
        r"% needs \usepackage{booktabs,graphicx}", r"\begin{table*}[t]", r"\centering",
        rf"\caption{{{_tex(table.title)}}}", rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', table.key)}}}",
        rf"\resizebox{{\textwidth}}{{!}}{{\begin{{tabular}}{{{columns}}}", r"\toprule",
        *([" & ".join(heads) + r" \\", " ".join(rules)] if rules else []),
        " & ".join(_tex(c.name) for c in table.columns) + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", *([r"\par\smallskip\raggedright\footnotesize", *notes] if notes else []),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """Notes as ``#`` lines, one heading line, one line a row; interval, SD and mark have columns of their own."""
    buffer = text_io.StringIO()
    for line in (table.title, *table.notes):
        buffer.write("# " + " ".join(line.split()) + "\n")
    writer = csv.writer(buffer, lineterminator="\n")
    heads: list[str] = []
    for column in table.columns:
        heads.append(column.heading)
        if column.kind == "run":
            heads += [f"{column.heading} {what}" for what in ("mark", "SD over seeds", "CI low", "CI high")]
    writer.writerow(heads)
    for row in table.rows:
        fields: list[str] = []
        for cell in row:
            fields.append(cell.shown)
            if cell.kind == "run":
                fields += [cell.mark, cell.shown_sd, *(cell.interval or ("", ""))]
        writer.writerow(fields)
    return buffer.getvalue()


def html(tables: Sequence[Table], title: str) -> str:
    """One page of all tables: no script, no other file, nothing from a network; light, dark, phone and paper."""
    environment = Environment(loader=PackageLoader("autosam3d"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("tables.html.j2").render(tables=tables, title=title, version=__version__)


def write_tables(folder: str | Path, name: str, tables: Sequence[Table]) -> list[Path]:
    """Write ``NAME.md``, ``NAME.html``, and for each table a ``.tex`` and a ``.csv``, all or none of them.

    The first table's files are called `name`, those of others by their own keys. Returns the paths, the page last.

    Raises:
        ResourceError, UsageError: as `io.files.atomic_write_all`.
    """
    folder = Path(folder)
    texts: dict[str, str] = {}
    for i, table in enumerate(tables):
        stem = name if i == 0 else table.key
        texts |= {f"{stem}.tex": latex(table), f"{stem}.csv": comma_separated(table)}
    texts |= {f"{name}.md": "\n".join(map(markdown, tables)), f"{name}.html": html(tables, tables[0].title)}
    atomic_write_all([bytes_to_write(folder / file, text.encode()) for file, text in texts.items()])
    return [folder / file for file in texts]


def _md_cell(cell: Cell) -> str:
    shown = plain_markdown(cell.shown)
    shown = f"**{shown}**" if cell.best else shown
    shown += plain_markdown(cell.mark) + (f" ± {cell.shown_sd}" if cell.shown_sd else "")
    return shown + (" ({} to {})".format(*cell.interval) if cell.interval else "")


def _tex_cell(cell: Cell) -> str:
    shown = _tex_number(cell.shown) if cell.value is not None else _tex(cell.shown)
    shown = rf"\textbf{{{shown}}}" if cell.best else shown
    shown += {"": "", "*": "$^{*}$", "†": r"$^{\dagger}$"}.get(cell.mark, f"$^{{{_tex(cell.mark)}}}$")
    shown += rf" $\pm$ {cell.shown_sd}" if cell.shown_sd else ""
    ends = tuple(map(_tex_number, cell.interval or ()))
    return shown + (r" {{\scriptsize ({} to {})}}".format(*ends) if ends else "")


def _tex_number(shown: str) -> str:
    return shown.replace("-", "$-$").replace("+", "$+$")


def _one_line(text: str) -> str:
    """Without line ends and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain_markdown(text: str) -> str:
    """`text` as one line of Markdown in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", _one_line(text).replace("&", "&amp;"))


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "λ": r"$\lambda$", "×": r"$\times$", "±": r"$\pm$",
    "†": r"$\dagger$", "–": "--", **{c: f"\\{c}" for c in "&%$#_{}"},
    # After a row's end these would be read as its options.
    **{c: f"{{{c}}}" for c in "[]*"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in _one_line(text))
