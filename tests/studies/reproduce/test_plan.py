"""Which runs a table needs: each once, teachers first, shared between tables by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autosam3d.errors import UsageError
from autosam3d.studies.reproduce.paper import TABLES
from autosam3d.studies.reproduce.plan import TARGETS, RunSpec, plan_runs
from autosam3d.studies.reproduce.wish import study_keys


def planned(target: Any, size: Any, seeds: list[int], **how: Any) -> list[RunSpec]:
    return plan_runs(target, size, seeds, **how)


@pytest.mark.parametrize("target", sorted(TABLES))
@pytest.mark.parametrize("size", ["paper", "2core"])
def test_every_row_of_the_paper_has_its_run(target: str, size: str) -> None:
    rows = {run.row for run in planned(target, size, [0])}
    assert {row.key for row in TABLES[target].rows} <= rows


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_unique_and_teachers_come_first(target: str) -> None:
    runs = planned(target, "2core", [0, 3], more_ablations=True, nnunet_v2=True)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(runs):
        for needed in (run.teacher, run.predicts_as):
            assert needed is None or needed in names[:place]
        assert run.seed in (0, 3) and run.name.endswith(f"_s{run.seed}")


def test_tables_share_runs_and_sizes_do_not() -> None:
    ours = {run.name: run for run in planned("table1", "2core", [0])}["autosam_2core_s0"]
    for target in ("table2", "table3", "table4", "fig3", "fig4"):
        assert ours in planned(target, "2core", [0])
    both = {run.name for run in planned("table4", "2core", [0])} & {r.name for r in planned("fig4", "2core", [0])}
    assert {"student_tiny_2core_lambda0.5_s0", "student_tiny_2core_lambda1_s0"} < both
    for target in ("table1", "table3", "table4", "fig3", "fig4"):
        small = {run.name for run in planned(target, "2core", [0])}
        assert all(run.small for run in planned(target, "2core", [0]))
        assert not any(run.small for run in planned(target, "paper", [0]))
        assert not small & {run.name for run in planned(target, "paper", [0])}


def test_the_papers_student_of_table_4_is_small() -> None:
    assert {run.model for run in planned("table4", "paper", [0]) if run.teacher} == {"small"}
    assert {run.model for run in planned("table4", "2core", [0]) if run.teacher} == {"tiny"}
    assert {run.model for run in planned("table4", "2core", [0], student="edge") if run.teacher} == {"edge"}


def test_nnunet_v2_is_a_row_only_where_it_is_asked_for() -> None:
    assert "nnunet_v2" not in {run.row for run in planned("table1", "paper", [0])}
    assert "nnunet_v2" in {run.row for run in planned("table1", "paper", [0], nnunet_v2=True)}


@pytest.mark.parametrize("seeds", [[], [0, 0], [-1]])
def test_seeds_that_cannot_be_are_refused(seeds: list[int]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_runs("table1", "paper", seeds)
    assert caught.value.code == "SEEDS"


def test_photographs_of_figure_1_are_a_folder_or_named_folders() -> None:
    assert study_keys(["study.photographs=a/pictures"]).pictures == {"photographs (pictures)": Path("a/pictures")}
    named = study_keys(["study.photographs={ADE20K: a, COCO 2017: b}"])
    assert named.pictures == {"ADE20K": Path("a"), "COCO 2017": Path("b")}
    assert study_keys([]).pictures == {}
    for override in ("study.photographs={}", "study.photographs=[a, b]"):
        with pytest.raises(UsageError, match="photographs"):
            study_keys([override])
