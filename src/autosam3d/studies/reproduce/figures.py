"""The paper's figures 1A, 3 and 4, drawn from embeddings, segmentations and evaluations of this project."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.distance import cdist

from autosam3d.errors import MissingExtraError, UsageError
from autosam3d.evaluation.evaluate import read_pair
from autosam3d.evaluation.overlay import SOFT_TISSUE, draw_axial, organ_color, widest_section
from autosam3d.evaluation.scores import CaseResult, Evaluation, counted, organ_scores, read_json
from autosam3d.evaluation.statistics import (
    Comparison,
    Estimate,
    Key,
    compare,
    estimate,
    over_organs,
    over_seeds,
    p_text,
    with_holm,
)
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.options import DEFAULTS
from autosam3d.studies.reproduce.drawing import COLORS, Drawn, house_style
from autosam3d.studies.reproduce.paper import DATASETS, FIGURE4_PAPER
from autosam3d.studies.reproduce.table import NOT_RUN
from autosam3d.studies.reproduce.tables import Provenance, RunScores
from autosam3d.volume import SAME_GRID_VOX, Segmentation, Volume, same_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEIGHBOURS = 5
_MARKERS = "osD^vPX*"


def tsne(embeddings: np.ndarray, seed: int = 0) -> np.ndarray:
    """float64 [n, 2]: t-SNE of `embeddings` [n, d], begun at their principal components.

    Raises:
        MissingExtraError: where scikit-learn is not installed.
        ValueError: fewer than 4 points, or numbers that are not finite.

    *Source*: van der Maaten & Hinton 2008; perplexity 30, or a third of the points where they are few.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "fig1", "expected the package scikit-learn, got none",
                                "pip install 'autosam3d[figures]'") from None
    if embeddings.ndim != 2 or len(embeddings) < 4 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings: expected at least 4 rows of finite numbers, got shape {embeddings.shape}")
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    # t-SNE does not know scales, but its search for bandwidths begins at 1 and never gets to very small ones.
    centred /= np.linalg.norm(centred, axis=1).mean() or 1.0
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(centred)
    return np.asarray(found, np.float64)


def same_group_share(embeddings: np.ndarray, groups: Sequence[str]) -> float:
    """Share of a point's nearest neighbours that are of its own group, in all dimensions of the embeddings."""
    names = np.asarray(groups)
    apart = cdist(embeddings, embeddings)
    np.fill_diagonal(apart, math.inf)
    nearest = np.argsort(apart, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(names) - 1)]
    return float(np.mean(names[nearest] == names[:, None]))


def _share_by_chance(groups: Sequence[str]) -> float:
    """What `same_group_share` is on average where the groups are given to the points at random."""
    sizes = np.array(list(Counter(groups).values()), np.float64)
    return float((sizes * (sizes - 1)).sum() / (sizes.sum() * (sizes.sum() - 1)))


def embedding_figure(embeddings: np.ndarray, groups: Sequence[str], about: Provenance, *, seed: int = 0) -> Drawn:
    """Figure 1A: how SAM's encoder sees CT slices and photographs.

    Args:
        embeddings: [n, 256], one a picture (`reproduce.embeddings.embed`).
        groups: the name of each picture's set, in the order in which the legend has them.
    """
    if len(groups) != len(embeddings):
        raise ValueError(f"groups: expected {len(embeddings)} names, got {len(groups)}")
    places = tsne(embeddings, seed)
    share = same_group_share(embeddings, groups)
    names = list(dict.fromkeys(groups))
    numbers = ", ".join(f"{list(groups).count(name)} {name}" for name in names)
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            own = places[np.asarray(groups) == name]
            axes.scatter(own[:, 0], own[:, 1], s=26, c=COLORS[i % len(COLORS)], marker=_MARKERS[i % len(_MARKERS)],
                         label=name, alpha=0.8, edgecolors="white", linewidths=0.5)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=min(4, len(names)))
    return Drawn(
        figure, alt=f"Scatter plot of {len(places)} points, one a picture ({numbers}), each set in its own colour and "
        f"shape; {100 * share:.0f} % of nearest neighbours are of one's own set.",
        caption=f"t-SNE of the mean-pooled embeddings of SAM's image encoder: {numbers}. Of the {NEIGHBOURS} nearest "
        f"neighbours in the {embeddings.shape[1]} dimensions of the encoder, {100 * share:.1f} % are of the same set "
        f"({100 * _share_by_chance(groups):.1f} % by chance, as large as the sets are); "
        f"distances between clusters in the picture mean little. {about.note()}",
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of figure 3: a case with its truth and what each model made of it, all on one grid."""

    name: str
    truth: Segmentation
    volume: Volume | None = None
    predictions: Mapping[str, Segmentation | None] = field(default_factory=dict)
    """By the model's shown name; None where it has none of this case."""
    dice: Mapping[str, float] = field(default_factory=dict)


def choose_cases(evaluation: Evaluation, num: int = 5) -> list[str]:
    """`num` cases, evenly from the worst to the best by mean Dice, so that good ones are not chosen by hand."""
    ranked = [c.name for c in sorted(evaluation.cases, key=lambda c: (c.dice, c.name)) if not math.isnan(c.dice)]
    places = np.linspace(0, len(ranked) - 1, min(num, len(ranked)))
    return [ranked[round(place)] for place in places.tolist()]


def read_subjects(
    evaluations: Mapping[str, Path], reference: str, num: int = 5,
    folders: Mapping[str, tuple[Path, Path]] | None = None, read_options: ReadOptions = DEFAULTS,
) -> list[Subject]:
    """The cases of figure 3, read from the files that evaluations name.

    Args:
        evaluations: shown name of a model to the folder of its `autosam3d evaluate`, in the order of the columns.
        reference: the model whose ranking chooses the cases.
        folders: of each model's segmentations and of the truth, where they lie now; default where they lay, seen from
            the working folder of then, when they were evaluated.
        read_options: for scans and label maps.

    Raises:
        VolumeError: an evaluation, or a scan or segmentation that it names, cannot be read.
    """
    found = {name: read_json(Path(folder) / "scores.json") for name, folder in evaluations.items()}
    organs = found[reference].organs
    subjects = []
    for case_name in choose_cases(found[reference], num):
        cases = {name: next((_placed(c, (folders or {}).get(name)) for c in e.cases if c.name == case_name), None)
                 for name, e in found.items()}
        own = cases[reference]
        assert own is not None
        truth = read_pair(own, organs, read_options)[1]
        pairs = {name: None if case is None else read_pair(case, organs, read_options)[0]
                 for name, case in cases.items()}
        subjects.append(Subject(
            name=case_name, truth=truth, volume=_scan_of(own, read_options), predictions=pairs,
            dice={name: case.dice for name, case in cases.items() if case is not None},
        ))
    return subjects


def _placed(case: CaseResult, folders: tuple[Path, Path] | None) -> CaseResult:
    if folders is None:
        return case
    prediction, truth = folders[0] / case.prediction_path.name, folders[1] / case.truth_path.name
    return replace(case, prediction_path=prediction, truth_path=truth, ct_path=None)


def _scan_of(case: CaseResult, read_options: ReadOptions) -> Volume | None:
    """The CT of the evaluation, or of the dataset folder in which the truth lies; None where there is neither."""
    path = case.ct_path
    if path is None:
        images = case.truth_path.parent.name.replace("labels", "images")
        path = case.truth_path.parent.parent / images / f"{case.name}_0000.nii.gz"
        if images == case.truth_path.parent.name or not path.is_file():
            return None
    return read_ct(path, read_options)


def overlay_figure(
    subjects: Sequence[Subject], organs: Mapping[int, str], about: Provenance, *, hu_window: HuWindow = SOFT_TISSUE
) -> Drawn:
    """Figure 3: truth and all models of several cases, axial, in the colours that the product has everywhere.

    Args:
        organs: label to name, for colours and legend.

    Raises:
        UsageError: OTHER_GRID, where a segmentation lies on another grid than the truth.
    """
    if not subjects:
        raise ValueError("subjects: expected at least one, got none")
    models = list(dict.fromkeys(name for subject in subjects for name in subject.predictions))
    indexes = []
    with house_style():
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        figure = Figure(figsize=(1.75 * (1 + len(models)) + 0.3, 1.75 * len(subjects) + 0.75), layout="constrained")
        grid = figure.subplots(len(subjects), 1 + len(models), squeeze=False)
        for row, subject in zip(grid, subjects, strict=True):
            box, index = widest_section(subject.truth)
            indexes.append(f"{subject.name} slice {index}")
            for axes, name in zip(row, ["truth", *models], strict=True):
                made = subject.truth if name == "truth" and axes is row[0] else subject.predictions.get(name)
                _demand_grid(subject, name, made)
                if made is not None:
                    axes.imshow(np.asarray(draw_axial(subject.volume, made, index=index, box=box, organs=organs,
                                                      hu_window=hu_window, letters=axes is row[0])))
                _frame(axes, "" if made is not None else NOT_RUN)
                if axes is not row[0] and name in subject.dice:
                    axes.set_xlabel(f"Dice {subject.dice[name]:.3f}", fontsize=7, labelpad=2)
            row[0].set_ylabel(subject.name, fontsize=8)
        for axes, name in zip(grid[0], ["truth", *models], strict=True):
            axes.set_title(name, fontsize=9)
        patches = [Patch(color="#" + "".join(f"{c:02x}" for c in organ_color(k, name)), label=name.replace("_", " "))
                   for k, name in organs.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(7, len(patches)), frameon=False,
                      fontsize=8)
    shown = ", ".join(indexes)
    return Drawn(
        figure, alt=f"CT slices with coloured organs: {counted(len(subjects), 'case')} in rows, truth and "
        f"{', '.join(models)} in columns.",
        caption=f"Axial slices where the true organs show largest ({shown}); the patient's right is on the left. "
        f"Window {hu_window.low_hu:g} to {hu_window.high_hu:g} HU. Dice: mean over the organs of the case. "
        f"{about.note()}",
    )


def _demand_grid(subject: Subject, name: str, made: Segmentation | None) -> None:
    for what, other in ((name, made), ("the CT", subject.volume)):
        if other is not None and not same_grid(other, subject.truth, SAME_GRID_VOX):
            raise UsageError("OTHER_GRID", subject.name, f"expected {what} on the grid of the truth, got another",
                             "evaluate segmentations that lie on their scans' own grids")


def _frame(axes: Axes, words: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(bool(words))
    if words:
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="0.45", fontsize=8)


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """One pair of bars of figure 4: a student on labels alone and with a teacher, each with any number of seeds."""

    name: str
    without: Sequence[RunScores]
    taught: Sequence[RunScores]


def distillation_figure(students: Sequence[Distilled], dataset: str, about: Provenance) -> Drawn:
    """Figure 4: mean Dice of students with and without a teacher, with intervals over cases and a dot for each seed."""
    if not students:
        raise ValueError("students: expected at least one, got none")
    scores = [(_dice_of(student.without), _dice_of(student.taught)) for student in students]
    pairs = [compare((f"{s.name} with", taught), (f"{s.name} without", without), measure="mDice")
             if without and taught else None for s, (without, taught) in zip(students, scores, strict=True)]
    family = iter(with_holm([pair for pair in pairs if pair is not None]))
    tests = [None if pair is None else next(family) for pair in pairs]
    means = [[estimate(list(over_organs(over_seeds(runs)).values())) if runs else None for runs in both]
             for both in scores]
    lowest = min((100 * (m.mean if m.low is None else m.low) for both in means for m in both if m), default=0.0)
    begin = max(0, math.floor((lowest - 3) / 5) * 5)
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.5 + 1.7 * len(students), 3.6), layout="constrained")
        axes = figure.subplots()
        for i in range(len(students)):
            for side in (0, 1):
                _draw_bar(axes, i + (side - 0.5) * 0.38, means[i][side], scores[i][side], side, first=i == 0)
        axes.set_xticks(range(len(students)), [_under(s.name, t) for s, t in zip(students, tests, strict=True)])
        axes.set(ylabel=f"mean Dice, % (axis begins at {begin})", ylim=(begin, None), xlim=(-0.6, len(students) - 0.4),
                 title=DATASETS.get(dataset, dataset))
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    said = [f"{student.name} {word} a teacher {NOT_RUN if mean is None else f'{100 * mean.mean:.2f}'}"
            for student, both in zip(students, means, strict=True)
            for word, mean in zip(("without", "with"), both, strict=True)]
    compared = " ".join(f"{test.sentence()}." for test in tests if test is not None)
    return Drawn(
        figure, alt=f"Bars of mean Dice on {DATASETS.get(dataset, dataset)}: {'; '.join(said)}.",
        caption="Students trained on labels alone and with the teacher's probabilities. Whiskers: 95 % bootstrap "
        f"interval over cases; dots: seeds; the axis begins at {begin} %. Under the bars: difference in points, p "
        f"after Holm, cases. {compared + ' ' if compared else ''}{FIGURE4_PAPER} {about.note()}",
    )


def _dice_of(runs: Sequence[RunScores]) -> list[dict[Key, float]]:
    return [organ_scores(read_json(Path(run.evaluation) / "scores.json"), "dice") for run in runs]


def _draw_bar(
    axes: Axes, x: float, mean: Estimate | None, runs: Sequence[dict[Key, float]], side: int, first: bool
) -> None:
    label = ("labels alone", "with a teacher")[side] if first else None
    style: dict[str, Any] = {"color": COLORS[(7, 0)[side]], "label": label, "hatch": ("", "//")[side],
                             "edgecolor": "white"}
    axes.bar(x, 0 if mean is None else 100 * mean.mean, 0.34, **style)
    if mean is None:
        axes.text(x, 0.02, NOT_RUN, ha="center", va="bottom", rotation=90, color="0.45",
                  transform=axes.get_xaxis_transform())
        return
    if mean.low is not None and mean.high is not None:
        ends = [[100 * (mean.mean - mean.low)], [100 * (mean.high - mean.mean)]]
        axes.errorbar(x, 100 * mean.mean, yerr=ends, color="black", capsize=3, linewidth=1)
    if len(runs) > 1:
        each = [np.mean(list(over_organs(run).values())) * 100 for run in runs]
        axes.plot(np.linspace(x - 0.08, x + 0.08, len(each)), each, "o", color="black", markersize=3, zorder=3)
    axes.text(x, 100 * (mean.mean if mean.high is None else mean.high) + 0.4, f"{100 * mean.mean:.1f}", ha="center",
              va="bottom", fontsize=8)


def _under(name: str, test: Comparison | None) -> str:
    if test is None:
        return name
    return f"{name}\n{100 * test.difference.mean:+.2f}, p = {p_text(test.p)}, n = {test.test.num_pairs}"
