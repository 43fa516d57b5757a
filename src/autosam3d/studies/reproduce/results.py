"""From finished runs to the table or figure that they were made for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from autosam3d.checkpoints.machine import machine
from autosam3d.checkpoints.model_file import read_meta
from autosam3d.evaluation.statistics import Unit
from autosam3d.io import read_ct
from autosam3d.models.parameters import count_parameters
from autosam3d.models.spec import AutoSamSpec
from autosam3d.recipes.recipe import Recipe
from autosam3d.studies.reproduce.drawing import save_figure
from autosam3d.studies.reproduce.embeddings import ct_slices, embed, load_encoder, photographs
from autosam3d.studies.reproduce.figures import (
    Distilled,
    distillation_figure,
    embedding_figure,
    overlay_figure,
    read_subjects,
)
from autosam3d.studies.reproduce.paper import SMALL_VARIANTS, TABLES, lambda_key
from autosam3d.studies.reproduce.plan import OURS
from autosam3d.studies.reproduce.stages import is_finished
from autosam3d.studies.reproduce.study import PlannedRun, Study
from autosam3d.studies.reproduce.table import markdown, write_tables
from autosam3d.studies.reproduce.tables import Provenance, RunScores, build_table

_SHOWN = {"autosam": "AutoSAM Adapter", "nnunet": "nnU-Net", "nnformer": "nnFormer", "unetr": "UNETR",
          "swin_unetr": "SwinUNETR"}
_SUBJECTS = 5


def provenance(command: str, budget_minutes: float | None, small: bool) -> Provenance:
    """The provenance of a table or figure that is made now, on this machine."""
    said = f"{command} (small variants of all models)" if small else command
    return Provenance(command=said, date=datetime.now(UTC).date().isoformat(), machine=machine(),
                      budget_minutes=budget_minutes, small=small)


def write_table(
    target: str, studies: Sequence[Study], out: Path, about: Provenance, unit: Unit
) -> tuple[list[Path], str]:
    """Write the files of a table; returns their paths and the table as Markdown."""
    runs = [scores for study in studies for scores in scores_of(study)]
    spec = TABLES[target]
    students = dict.fromkeys(run.spec.model for study in studies for run in study.runs if run.spec.kind == "distill")
    if about.small:
        spec = replace(spec, title=f"{spec.title} (small variants)", notices=(SMALL_VARIANTS, *spec.notices))
    if students:
        taught = ", ".join(f"SwinUNETR {kind.capitalize()}" if kind != "edge" else "ResUnet" for kind in students)
        spec = replace(spec, notices=(*spec.notices, f"Student: {taught}; the paper's is SwinUNETR Small."))
    built = build_table(spec, runs, about, datasets=[study.dataset for study in studies], unit=unit)
    return write_tables(out, target, built.tables), "\n".join(map(markdown, built.tables))


def write_embedding_figure(
    scans: Sequence[tuple[str, Sequence[Path], Recipe]], pictures: Mapping[str, Path], sam: str, out: Path,
    about: Provenance,
    *, slices: int, seed: int, progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Figure 1A: SAM's embeddings of CT slices and of photographs.

    Args:
        scans: for each dataset its shown name, its scans, and its recipe, for window and reading.
        pictures: shown name of each set of photographs to its folder.
        sam: SAM weights.
        slices: of all scans of a dataset together, and of each set of photographs, about as many.
    """
    encoder = load_encoder(sam)
    shown, groups = [], []
    for name, paths, recipe in scans:
        each = max(1, round(slices / max(len(paths), 1)))
        for path in paths[:slices]:
            found = ct_slices(read_ct(path, recipe.reading.options()), recipe.preprocess.hu_window, each)
            shown += found
            groups += [name] * len(found)
    for name, folder in pictures.items():
        found = photographs(folder, slices)
        shown += found
        groups += [name] * len(found)
    embeddings = embed(encoder, shown, progress)
    drawn = embedding_figure(embeddings, groups, about, seed=seed)
    np.save(out / "fig1_embeddings.npy", embeddings)
    return save_figure(drawn, out, "fig1")


def write_overlays(study: Study, out: Path, about: Provenance) -> list[Path]:
    """Draw figure 3 from the runs of the first seed; returns its files."""
    seed = min(run.spec.seed for run in study.runs)
    finished = [run for run in study.runs if is_finished(run) and run.spec.seed == seed]
    evaluations = {_SHOWN[run.spec.row]: run.evaluation for run in finished}
    reference = _SHOWN[OURS] if _SHOWN[OURS] in evaluations else next(iter(evaluations))
    recipe = finished[0].recipe
    folders = {_SHOWN[run.spec.row]: (run.prediction, study.data / "labelsTs") for run in finished}
    subjects = read_subjects(evaluations, reference, _SUBJECTS, folders, recipe.reading.options())
    drawn = overlay_figure(subjects, recipe.labels.by_index, about, hu_window=recipe.preprocess.hu_window)
    return save_figure(drawn, out, "fig3")


def write_bars(study: Study, out: Path, about: Provenance) -> list[Path]:
    """Draw figure 4; returns its files."""
    scores = {run.spec.name: _scores(run, study.dataset) for run in study.runs if is_finished(run)}

    def of(kind: str, weight: float) -> list[RunScores]:
        return [scores[run.spec.name] for run in study.runs if run.spec.name in scores
                and run.spec.model == kind and run.spec.row == lambda_key(weight)]

    kinds = {run.spec.model: None for run in study.runs if run.spec.kind == "distill"}
    students = [Distilled(name=f"SwinUNETR {kind.capitalize()}", without=of(kind, 1), taught=of(kind, 0.5))
                for kind in kinds]
    return save_figure(distillation_figure(students, study.dataset, about), out, "fig4")


def scores_of(study: Study) -> list[RunScores]:
    """The scores of all finished runs of a study, except a teacher that is in the plan for its students alone."""
    has_students = any(run.spec.kind == "distill" for run in study.runs)
    return [_scores(run, study.dataset) for run in study.runs
            if is_finished(run) and not (has_students and run.spec.row == OURS)]


def _scores(run: PlannedRun, dataset: str) -> RunScores:
    done: Mapping = json.loads((run.folder / "done.json").read_text("utf-8"))
    return RunScores(model=run.spec.row, dataset=dataset, seed=run.spec.seed, evaluation=run.evaluation,
                     tuned_parameters=_tuned(run, done), minutes=done.get("minutes"), steps=done.get("steps"),
                     machine=done.get("machine"),
                     without_sam=_is_autosam(run) and not _has_sam(run))


def _tuned(run: PlannedRun, done: Mapping) -> int | None:
    """Parameters that were trained: an AutoSAM's, without SAM's frozen ones where it had SAM's."""
    if run.spec.kind in ("slicewise", "nnunet_v2"):
        return done.get("parameters")
    report = count_parameters(run.recipe.model)
    return report.paper_counted if _is_autosam(run) and _has_sam(run) else report.total


def _is_autosam(run: PlannedRun) -> bool:
    return run.spec.kind == "train" and isinstance(run.recipe.model, AutoSamSpec)


def _has_sam(run: PlannedRun) -> bool:
    """Whether the run started from SAM's weights."""
    return bool(read_meta(run.weights / "best.json").get("sam"))
