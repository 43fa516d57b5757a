"""Reproducible figures: drawn without a screen, written as SVG, PNG and a caption; equal input gives equal bytes."""

from __future__ import annotations

import io as bytes_io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosam3d.errors import MissingExtraError
from autosam3d.io.files import atomic_write_all, bytes_to_write
from autosam3d.studies.reproduce.table import plain_markdown
from autosam3d.user_folders import cache_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6A5ACD", "#7F7F7F")
"""Colours that colour-blind readers can tell apart. *Source*: Okabe & Ito 2008, less yellow and black, and two more."""
_DPI = 200
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "autosam3d", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white", "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Drawn:
    """A figure with its words.

    Attributes:
        alt: a description for readers who cannot see it.
        caption: what it shows and how it was made.
    """

    figure: Figure
    alt: str
    caption: str


@contextmanager
def house_style() -> Iterator[None]:
    """Inside, matplotlib has this project's settings instead of the user's.

    Raises:
        MissingExtraError: where matplotlib is not installed.
    """
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))  # it keeps a list of fonts
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "figures", "expected the package matplotlib, got none",
                                "pip install 'autosam3d[figures]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def save_figure(drawn: Drawn, folder: str | Path, name: str) -> list[Path]:
    """Write ``NAME.png``, ``NAME.svg`` and ``NAME.md`` with alt text and caption, all or none of them.

    The files hold no date and no random names: the same figure gives the same bytes.
    """
    png, svg = bytes_io.BytesIO(), bytes_io.BytesIO()
    with house_style():
        drawn.figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None, "Description": drawn.alt})
        drawn.figure.savefig(svg, format="svg", dpi=_DPI, metadata={"Creator": None, "Date": None})
    contents = {
        f"{name}.png": png.getvalue(), f"{name}.svg": _with_words(svg.getvalue().decode(), drawn.alt).encode(),
        f"{name}.md": f"![{plain_markdown(drawn.alt)}]({name}.svg)\n\n{plain_markdown(drawn.caption)}\n".encode(),
    }
    folder = Path(folder)
    atomic_write_all([bytes_to_write(folder / file, content) for file, content in contents.items()])
    return [folder / file for file in contents]


def _with_words(svg: str, alt: str) -> str:
    """The alt text as the picture's own title, which browsers and screen readers read out."""
    words = f'\n <title id="alt">{escape(alt)}</title>'
    opened = '<svg role="img" aria-labelledby="alt" '
    return re.sub(r"<svg ([^>]*)>", lambda found: f"{opened}{found[1]}>{words}", svg, count=1)
