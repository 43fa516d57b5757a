"""Checks a study's folder: runs that are there must be those that are asked for, on the same cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from autosam3d.errors import UsageError
from autosam3d.io.files import write_text_atomic
from autosam3d.recipes.recipe import load_recipe
from autosam3d.studies.reproduce.study import PlannedRun, Study

_CASES = "cases.json"


def demand_own_runs(study: Study) -> None:
    """Refuse a folder that holds other runs, before any work.

    Raises:
        UsageError: OTHER_RUN, OTHER_DATA.
    """
    for run in study.runs:
        demand_own_run(run, study)
    _demand_same_cases(study)


def demand_own_run(run: PlannedRun, study: Study) -> None:
    """Refuse a run folder of another recipe, or of another budget where the recipe does not set the length.

    Raises:
        UsageError: OTHER_RUN.
    """
    if run.recipe_file.exists():
        old, new = load_recipe(run.recipe_file).as_dict(), run.recipe.as_dict()
        if old != new:
            raise _other_run(run, *next(_differences(old, new)))
    if run.is_ours or run.spec.predicts_as is not None:
        return
    try:
        done = json.loads((run.folder / "done.json").read_text("utf-8"))
        before = done["budget_minutes"] if done["minutes"] else study.budget_minutes  # untrained: no budget
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != study.budget_minutes:
        raise _other_run(run, "--budget", before, study.budget_minutes)


def keep_cases(study: Study) -> None:
    """Write down which cases the runs of `study` are made on, for the next time."""
    study.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(study.folder / _CASES, json.dumps(_cases_of(study), indent=1, sort_keys=True) + "\n")


def _demand_same_cases(study: Study) -> None:
    path = study.folder / _CASES
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return
    now = _cases_of(study)
    if before == now:
        return
    key, was, is_now = next(_differences(before, now))
    raise UsageError("OTHER_DATA", study.data, f"expected the cases that the runs in {study.folder} are made on, got "
                     f"others: {key} has {_bytes(was)} there, and {_bytes(is_now)} here",
                     "restore the dataset, or name another folder with --out")


def _cases_of(study: Study) -> dict[str, Any]:
    """Part to case to the sizes of its files in bytes: as good as always another case has another one."""
    return {
        part: {case.name: {"scan": case.image_path.stat().st_size,
                           "truth": case.label_path.stat().st_size if case.label_path else None}
               for case in getattr(study.cases, part)}
        for part in ("train", "val", "test")
    }


def _bytes(size: Any) -> str:
    return "no file" if size is None else f"{size} bytes" if isinstance(size, int) else "a file"


def _other_run(run: PlannedRun, key: str, was: Any, wish: Any) -> UsageError:
    return UsageError("OTHER_RUN", run.folder, f"it holds a run of another recipe: {key} is {was!r} there, and "
                      f"{wish!r} is asked for", "name another folder with --out, or give the same options")


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*old, *new}):
        was, wish = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(wish, dict):
            yield from _differences(was, wish, f"{path}{key}.")
        elif was != wish:
            yield f"{path}{key}", was, wish
