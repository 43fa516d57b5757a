"""An evaluation as one HTML page: no script, no other file, nothing from a network; light, dark, phone and paper."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autosam3d.errors import AutoSam3dError
from autosam3d.evaluation.evaluate import read_pair
from autosam3d.evaluation.metrics import ABSENT_RULE, HD95_RULE
from autosam3d.evaluation.overlay import SOFT_TISSUE, draw_planes, encode, organ_color, overlay_png
from autosam3d.evaluation.scores import MEAN_RULE, CaseResult, Evaluation, csv_text, json_text
from autosam3d.evaluation.statistics import Estimate
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.files import atomic_write_all, bytes_to_write, write_text_atomic
from autosam3d.io.options import DEFAULTS
from autosam3d.version import __version__
from autosam3d.volume import SAME_GRID_VOX, Volume, same_grid

__all__ = ["overlay_png", "write_evaluation", "write_report"]

log = logging.getLogger(__name__)

_STRIP_W, _STRIP_H = 168, 22


@dataclass(frozen=True)
class _Picture:
    title: str
    case: CaseResult
    how: str
    planes: list[tuple[str, str]]
    """(name, data URI); empty where the files could not be read."""
    note: str


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    hu_window: HuWindow = SOFT_TISSUE,
    read_options: ReadOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path, Path]:
    """``scores.csv``, ``scores.json`` and ``report.html`` of one evaluation: all three, or none of them changes.

    Args:
        folder: that exists.
        hu_window: of the pictures.
        read_options: for reading, those of the evaluation.
        progress: called with (pictures drawn, pictures in all).

    Returns:
        Their paths.

    Raises:
        ResourceError, UsageError: as `io.files.atomic_write_all`.
    """
    csv_path, json_path, page_path = (folder / name for name in ("scores.csv", "scores.json", "report.html"))
    texts = {page_path: report_html(evaluation, hu_window=hu_window, read_options=read_options, progress=progress),
             csv_path: csv_text(evaluation), json_path: json_text(evaluation)}
    atomic_write_all([bytes_to_write(path, text.encode()) for path, text in texts.items()])
    return csv_path, json_path, page_path


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    *,
    hu_window: HuWindow = SOFT_TISSUE,
    read_options: ReadOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`report_html` into a file, atomically."""
    write_text_atomic(path, report_html(evaluation, hu_window=hu_window, read_options=read_options, progress=progress))


def report_html(
    evaluation: Evaluation,
    *,
    hu_window: HuWindow = SOFT_TISSUE,
    read_options: ReadOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The page. Pictures are drawn from the files of the evaluation, read anew.

    A case whose files cannot be read any more is shown without picture, one whose CT cannot be read is shown on black.

    Args:
        read_options: for reading, those of the evaluation.
        progress: called with (pictures drawn, pictures in all).
    """
    environment = Environment(
        loader=PackageLoader("autosam3d"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "interval": _interval, "rgb": _rgb}
    cases = sorted(evaluation.cases, key=lambda case: (math.isnan(case.dice), case.dice, case.name))
    summary = evaluation.summary()
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation, summary=summary, cases=cases,
        pictures=_pictures(evaluation, hu_window, read_options, progress),
        colors={label: organ_color(label, organ) for label, organ in evaluation.organs.items()},
        strips={o.label: _strip(evaluation, o.label, o.dice) for o in summary.organs},
        by_organ={case.name: {score.label: score for score in case.scores} for case in cases},
        rules=(MEAN_RULE, ABSENT_RULE, HD95_RULE), hu_window=hu_window, version=__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), warnings=_warnings(evaluation),
    )


def _pictures(
    evaluation: Evaluation, hu_window: HuWindow, read_options: ReadOptions, progress: Callable[[int, int], None] | None
) -> list[_Picture]:
    """Best, median and worst case by mean Dice; fewer where there are fewer cases."""
    ranked = sorted((c for c in evaluation.cases if not math.isnan(c.dice)), key=lambda case: case.dice)
    if not ranked:
        return []
    chosen = {"Worst": ranked[0], "Median": ranked[len(ranked) // 2], "Best": ranked[-1]}
    if len(ranked) < 3:
        chosen = {"Worst": ranked[0], "Best": ranked[-1]} if len(ranked) == 2 else {"Only": ranked[0]}
    pictures = []
    for rank, case in reversed(chosen.items()):
        if progress is not None:
            progress(len(pictures), len(chosen))
        pictures.append(_picture(f"{rank} case", case, evaluation, hu_window, read_options))
    if progress is not None:
        progress(len(chosen), len(chosen))
    return pictures


def _picture(
    title: str, case: CaseResult, evaluation: Evaluation, hu_window: HuWindow, read_options: ReadOptions
) -> _Picture:
    at_errors = title.startswith("Worst")
    how = "slices with most wrong voxels" if at_errors else "slices where the organs show largest"
    try:
        truth_folder = evaluation.truth if evaluation.truth.is_dir() else None
        prediction, truth = read_pair(case, evaluation.organs, read_options, truth_folder)
        volume, note = _scan(case, hu_window, read_options)
        if volume is not None and not same_grid(volume, truth, SAME_GRID_VOX):
            volume, note = None, "the CT lies on another grid and is not shown"
        planes = draw_planes(volume, prediction, truth=truth, organs=evaluation.organs, at_errors=at_errors,
                             hu_window=hu_window)
    except (AutoSam3dError, ValueError) as error:
        log.warning("%s: no picture: %s", case.name, error)
        return _Picture(title, case, how, [], f"no picture: {error}")
    encoded = [(f"{p.name} slice {p.index}", _data_uri(encode(p.image, "JPEG"))) for p in planes]
    return _Picture(title, case, how, encoded, note)


def _scan(case: CaseResult, hu_window: HuWindow, read_options: ReadOptions) -> tuple[Volume | None, str]:
    if case.ct_path is None:
        return None, "no CT was given, so the labels are on black"
    try:
        return read_ct(case.ct_path, read_options), f"window {hu_window.low_hu:g} to {hu_window.high_hu:g} HU"
    except AutoSam3dError as error:
        log.warning("%s: the picture has no CT: %s", case.name, error)
        return None, f"the CT could not be read ({error.code})"


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _strip(evaluation: Evaluation, label: int, mean: Estimate | None) -> Markup:
    """Dice of one organ, one dot a case, on an axis from 0 to 1; the tick is the mean, the bar its interval."""
    values = [s.dice for s in evaluation.scores_of(label) if s.dice is not None]

    def place(value: float) -> float:
        return 6 + value * (_STRIP_W - 12)

    marks = [f'<line class="axis" x1="6" x2="{_STRIP_W - 6}" y1="{_STRIP_H / 2}" y2="{_STRIP_H / 2}"/>']
    marks += [f'<line class="axis" x1="{place(t):.1f}" x2="{place(t):.1f}" y1="8" y2="14"/>' for t in (0, 0.5, 1)]
    if mean is not None and mean.low is not None and mean.high is not None:
        width = max(1.0, place(mean.high) - place(mean.low))
        marks.append(f'<rect class="ci" x="{place(mean.low):.1f}" y="7" width="{width:.1f}" height="8" rx="2"/>')
    for i, value in enumerate(values):
        y = _STRIP_H / 2 + ((i * 5) % 7 - 3) * 1.3  # apart from each other, the same in every run
        marks.append(f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="2.4"/>')
    if mean is not None:
        x = place(mean.mean)
        marks.append(f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{_STRIP_H - 2}"/>')
    said = f"Dice of {len(values)} cases, {min(values):.3f} to {max(values):.3f}" if values else "no case"
    size = f'viewBox="0 0 {_STRIP_W} {_STRIP_H}" width="{_STRIP_W}" height="{_STRIP_H}"'
    # Numbers only: nothing of a file's text gets into this markup unescaped.
    return Markup(f'<svg class="strip" {size} role="img" aria-label="{said}">{"".join(marks)}</svg>')


def _warnings(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Each warning with the cases that it is about, none for one about all; equal ones are joined."""
    found: dict[str, list[str]] = {warning: [] for warning in evaluation.warnings}
    for case in evaluation.cases:
        for warning in case.warnings:
            found.setdefault(warning, []).append(case.name)
        if case.not_annotated:
            unknown = f"not drawn in the truth, so not scored: {', '.join(case.not_annotated)}"
            found.setdefault(unknown, []).append(case.name)
    return list(found.items())


def _number(value: float | Estimate | None, digits: int = 3) -> str:
    if isinstance(value, Estimate):
        value = value.mean
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def _interval(value: Estimate | None, digits: int = 3) -> str:
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{value.low:.{digits}f} to {value.high:.{digits}f}"


def _rgb(color: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in color)
