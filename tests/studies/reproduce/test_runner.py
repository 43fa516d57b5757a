"""What stands in the way of runs, and what becomes of them when something dies: no training, stages are stand-ins."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autosam3d.cli import reproduce as cli_reproduce
from autosam3d.errors import AutoSam3dError, ResourceError
from autosam3d.recipes.recipe import dump_recipe
from autosam3d.studies.reproduce import runner, study
from autosam3d.studies.reproduce.cost import TrainingCost
from autosam3d.studies.reproduce.guard import demand_own_runs, keep_cases
from autosam3d.studies.reproduce.plan import RunSpec
from autosam3d.studies.reproduce.runner import run_study
from autosam3d.studies.reproduce.stages import Given, stages
from autosam3d.studies.reproduce.study import Study, plan_study
from autosam3d.studies.reproduce.wish import demand_different_recipes
from autosam3d.studies.slots import Slot
from lock_holders import held_by_another, needs_locks
from mini_run import mini_recipe, write_mini_dataset, write_recipe

CPU = Slot("cpu", 1)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A study of these specs on a dataset with two test cases; nothing is measured."""
    monkeypatch.setattr(study, "measure_training", lambda recipe, device, threads: TrainingCost(0.5, 0.1, 1 << 28, "x"))
    data = write_mini_dataset(tmp_path / "data")
    for part in ("images", "labels"):
        (data / f"{part}Ts").mkdir()
        for path in sorted((data / f"{part}Tr").glob("c5*.nii.gz")):  # bytes are compared, so a case of its own
            name = path.name.replace("c5", "t8")
            (data / f"{part}Ts" / name).write_bytes(path.read_bytes() + b"\0" * 512)
    write_recipe(tmp_path / "mini.yaml", mini_recipe())

    def plan(*specs: RunSpec, budget: float | None = None) -> Study:
        return plan_study(str(tmp_path / "mini.yaml"), data, tmp_path / "out", specs, budget_minutes=budget, slot=CPU)

    return plan


def spec(name: str = "a_s0", **more: Any) -> RunSpec:
    given: dict[str, Any] = {"name": name, "row": "unetr", "model": "unetr_2core"}
    return RunSpec(**(given | more))


def stage(code: str) -> list[tuple[str, list[str]]]:
    return [("training", ["-c", code])]


@pytest.fixture
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is `python -c CODE`."""
    real = subprocess.Popen

    def start(command: list[str], **how: Any) -> subprocess.Popen:
        return real([command[0], *command[3:]], **how)

    monkeypatch.setattr(runner.subprocess, "Popen", start)


def test_runs_on_other_cases_are_not_taken(planned: Callable[..., Study]) -> None:
    first = planned(spec())
    keep_cases(first)
    demand_own_runs(first)
    truth = first.data / "labelsTs" / "t8.nii.gz"
    truth.write_bytes(truth.read_bytes() + b"\0" * 512)
    with pytest.raises(AutoSam3dError, match=r"test\.t8\.truth has") as caught:
        demand_own_runs(planned(spec()))
    assert (caught.value.code, caught.value.exit_code) == ("OTHER_DATA", 2)
    for part in ("images", "labels"):
        for path in (first.data / f"{part}Ts").iterdir():
            path.rename(path.with_name(path.name.replace("t8", "t9")))
    with pytest.raises(AutoSam3dError, match=r"test\.t8 has a file there, and no file here"):
        demand_own_runs(planned(spec()))


def test_another_budget_is_another_run_where_the_recipe_does_not_hold_it(planned: Callable[..., Study]) -> None:
    tuned = spec("m_s0", kind="slicewise", model="medsam_pm:point")
    plain = spec("s_s0", kind="slicewise", model="sam:point")
    for run in planned(tuned, plain, budget=10).runs:
        run.folder.mkdir(parents=True)
        run.recipe_file.write_text(dump_recipe(run.recipe), "utf-8")
        minutes = 9.0 if run.spec is tuned else 0.0
        (run.folder / "done.json").write_text(json.dumps({"budget_minutes": 10, "minutes": minutes}), "utf-8")
    demand_own_runs(planned(tuned, plain, budget=10))
    demand_own_runs(planned(plain, budget=20))  # nothing was trained
    with pytest.raises(AutoSam3dError, match="--budget is 10 there, and 20 is asked for") as caught:
        demand_own_runs(planned(tuned, plain, budget=20))
    assert caught.value.code == "OTHER_RUN"


def test_a_run_folder_that_cannot_be_written_is_a_failed_run(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "recipe.yaml" and "a_s0" in str(path):
            raise ResourceError("NO_SPACE", path, "expected 1 byte, got none", "free some space")

    monkeypatch.setattr(runner, "write_text_atomic", full)
    monkeypatch.setattr(runner, "stages", lambda *given: [])
    monkeypatch.setattr(runner, "_write_done", lambda *given: None)
    outcome = run_study(planned(spec(), spec("b_s0")), [CPU])
    assert outcome.finished == ["b_s0"] and "error[NO_SPACE]" in outcome.failed["a_s0"]


def test_a_bug_in_a_worker_is_seen(planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "stages", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(planned(spec()), [CPU])


def test_a_recipe_that_changed_since_the_plan_is_not_written_over(planned: Callable[..., Study]) -> None:
    mine = planned(spec())
    other = mine.runs[0].recipe
    other = replace(other, train=replace(other.train, epochs=7))

    def begun_meanwhile(text: str) -> None:
        mine.runs[0].recipe_file.write_text(dump_recipe(other), "utf-8")

    work = runner._Work(mine, Given(), begun_meanwhile)
    mine.runs[0].folder.mkdir(parents=True)
    begun_meanwhile("")
    (mine.runs[0].folder / "done.json").write_text("{}", "utf-8")
    work.do(CPU)
    assert "train.epochs is 7 there" in work.outcome.failed["a_s0"]
    assert "epochs: 7" in mine.runs[0].recipe_file.read_text("utf-8")


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("code, said", [
    ("import os, signal; print('epoch 3', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
     "it was killed by signal 9, after 'epoch 3'"),
    ("import sys; sys.exit(7)", "it ended with 7"),
    ("print('error[X] a: b; c'); print('more'); raise SystemExit(2)", "error[X] a: b; c"),
])
def test_a_failed_stage_says_how(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(runner, "stages", lambda *given: stage(code))
    one = planned(spec())
    one.runs[0].folder.mkdir(parents=True)
    (one.runs[0].folder / "log.txt").write_text("ü" * 500 + "\n", "utf-8")  # bytes are not characters
    assert run_study(one, [CPU]).failed == {"a_s0": said}


@needs_locks
def test_a_run_that_another_process_is_at_is_waited_for(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "stages", lambda *given: [])
    monkeypatch.setattr(runner, "_write_done", lambda *given: None)
    one, said = planned(spec()), list[str]()
    with held_by_another(one.runs[0].folder, "claim.lock", inherit=True) as holder:

        def tell(text: str) -> None:
            said.append(text)
            if "another process works on it" in text:
                holder.kill()

        assert run_study(one, [CPU], tell=tell).finished == ["a_s0"]
    assert f"held by process {holder.pid} on " in said[0] and len(said) == 2


@needs_locks
@pytest.mark.parametrize("locks", [True, False])
def test_stages_hold_the_run_too_and_go_on_without_locks(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, locks: bool
) -> None:
    seen: list[Any] = []

    def start(command: list[str], **how: Any) -> Any:
        seen.append(how["pass_fds"])
        return _Ended()

    study_of_one = planned(spec())
    if not locks:
        request.getfixturevalue("no_locks")
    monkeypatch.setattr(runner, "stages", lambda *given: stage(""))
    monkeypatch.setattr(runner, "_write_done", lambda *given: None)
    monkeypatch.setattr(runner.subprocess, "Popen", start)
    assert run_study(study_of_one, [CPU]).finished == ["a_s0"]
    assert [len(descriptors) for descriptors in seen] == [int(locks)]


class _Ended:
    def wait(self, seconds: float) -> int:
        return 0


def test_sam_weights_go_to_those_that_they_fit(planned: Callable[..., Study]) -> None:
    small, paper = planned(spec("a_s0", row="autosam", model="autosam_2core", small=True),
                           spec("b_s0", row="autosam", model="autosam")).runs
    given = Given(sam="sam.pth")
    both = planned()
    assert "--sam" not in stages(small, both, CPU, given)[0][1]
    assert stages(paper, both, CPU, given)[0][1][-6:-4] == ["--sam", "sam.pth"]


def test_runs_are_not_put_into_the_dataset(tmp_path: Path, planned: Callable[..., Study]) -> None:
    data = planned().data.rename(tmp_path / "mini")
    with pytest.raises(AutoSam3dError, match="into the dataset") as caught:
        plan_study(str(tmp_path / "mini.yaml"), data, tmp_path, [spec()], budget_minutes=None, slot=CPU)
    assert caught.value.code == "SAME_PATH" and not (data / "costs.json").exists()


def test_time_to_segment_is_that_of_all_cases_not_of_the_first(
    monkeypatch: pytest.MonkeyPatch, planned: Callable[..., Study]
) -> None:
    seconds = []
    for shapes in ([(32, 32, 32)], [(32, 32, 32), (32, 32, 512)]):
        monkeypatch.setattr(study, "_prepared_shapes", lambda paths, recipe, shapes=shapes: shapes)
        seconds.append(planned(spec()).runs[0].segment_seconds)
    # Half of the scans take as many times the windows as they are longer than one.
    assert seconds[1] > 3 * seconds[0] > 0


def test_two_recipes_of_one_name_are_refused(tmp_path: Path, planned: Callable[..., Study]) -> None:
    data = planned().data
    write_recipe(tmp_path / "other.yaml", mini_recipe())
    folders = [(str(tmp_path / name), data) for name in ("mini.yaml", "other.yaml")]
    with pytest.raises(AutoSam3dError, match="recipes of different names, got 'mini'"):
        demand_different_recipes(folders, ())
    demand_different_recipes(folders[:1], ())


@pytest.mark.parametrize("word, shown", [
    ("btcv=/data/BTCV/", "btcv=BTCV"), ("/home/me/mini.yaml", "mini.yaml"), ("--out=/tmp/a b/out", "--out=out"),
    ("model.patch_size=[32,32,32]", "model.patch_size=[32,32,32]"), ("/a=b/c", "a=c"), ("table1", "table1"), ("/", "/"),
])
def test_the_command_of_a_table_names_no_folders(word: str, shown: str) -> None:
    assert cli_reproduce._last_part(word) == shown


def test_costs_that_another_process_measured_meanwhile_count(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs: dict[str, Any] = {}

    def measured(recipe: Any, device: str, threads: int) -> TrainingCost:
        path = costs._path
        path.parent.mkdir(parents=True, exist_ok=True)
        theirs[costs._key(recipe)] = {"step_seconds": 9.0, "window_seconds": 1.0, "memory_bytes": 1, "machine": "other"}
        path.write_text(json.dumps(theirs | {"more": {}}), "utf-8")
        return TrainingCost(0.5, 0.1, 1, "mine")

    one = planned(spec())
    (one.folder / "costs.json").unlink()
    costs = study._Costs(one.folder / "costs.json", CPU)
    monkeypatch.setattr(study, "measure_training", measured)
    for _ in range(2):
        cost = costs.of(one.runs[0].recipe, lambda: None)
        assert cost is not None and (cost.step_seconds, cost.machine) == (9.0, "other")
    assert "more" in json.loads((one.folder / "costs.json").read_text("utf-8"))


@pytest.mark.parametrize("is_trained", [True, False])
def test_students_of_a_teacher_that_is_trained_do_not_wait_for_its_scores(
    planned: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    both = planned(spec("t_s0", row="autosam", model="autosam_2core"),
                   spec("s_s0", kind="distill", model="tiny", row="lambda_0.5", teacher="t_s0"))
    monkeypatch.setattr(runner, "stages", lambda *given: stage(""))
    monkeypatch.setattr(runner, "is_trained", lambda run: is_trained)
    monkeypatch.setattr(runner, "_write_done", lambda *given: None)
    monkeypatch.setattr(runner._Work, "_call", lambda self, run, *rest: "no" if run.spec.name == "t_s0" else None)
    outcome = run_study(both, [CPU])
    assert outcome.failed == {"t_s0": "no"} | ({} if is_trained else {"s_s0": "t_s0 failed"})
