"""``autosam3d reproduce``: a table or a figure of the paper, from the plan of its runs to its files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosam3d.cli.console import progress_bars
from autosam3d.cli.options import SetBoth, run_folder_outside
from autosam3d.errors import BatchError

if TYPE_CHECKING:
    from autosam3d.studies.reproduce.plan import RunSpec
    from autosam3d.studies.reproduce.stages import Given
    from autosam3d.studies.reproduce.study import Study
    from autosam3d.studies.reproduce.tables import Provenance, Unit
    from autosam3d.studies.reproduce.wish import Wish
    from autosam3d.studies.slots import Slot


def reproduce(
    target: Annotated[str, typer.Argument(help="table1, table2, table3, table4, fig1, fig3 or fig4.")],
    data: Annotated[list[Path], typer.Option(help="Dataset folder in the nnU-Net v2 layout, or NAME=FOLDER with the "
                                                  "recipe's name; repeat it for several datasets.")],
    out: Annotated[Path, typer.Option(help="Folder of all runs and of the result.")] = Path("reproduction"),
    dataset: Annotated[str, typer.Option(help="Recipe of a --data without a name.")] = "btcv",
    size: Annotated[str, typer.Option(help="paper, or 2core: a small variant of every model.")] = "paper",
    budget: Annotated[float | None, typer.Option(help="Minutes of training, the same for every run; default: as long "
                                                      "as each recipe says.")] = None,
    seeds: Annotated[str, typer.Option(help="Numbers with commas between; one run each.")] = "0",
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and leave.")] = False,
    sam: Annotated[str | None, typer.Option(help="SAM weights: a file, or a Hugging Face id.")] = None,
    nnunet_python: Annotated[Path | None, typer.Option(help="Python in which nnU-Net v2 is installed; Table 1 then "
                                                            "has it as a row.")] = None,
    overrides: SetBoth = None,
    devices: Annotated[str, typer.Option(help="auto (each GPU takes runs), cpu, or GPUs as cuda:0,cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of a run; 0 takes the cores "
                                                               "of this process.")] = 0,
) -> None:
    """Make a table or a figure of the paper: plan its runs, train what is missing, test, write.

    Keys of --set beside those of all recipes: study.student (of Table 4: tiny, small or edge), study.more=true (Table 3
    with ablations that the paper does not have), study.medsam (weights for Table 2; default those of --sam),
    study.by_case=true (test cases as pairs, not cases and organs), study.photographs (for fig1: a folder, or
    {NAME: FOLDER, NAME: FOLDER}, a set each).
    """
    from autosam3d.recipes.settings_file import split_overrides
    from autosam3d.studies.reproduce.wish import Wish, datasets, seeds_of, size_of, study_keys, target_of

    own, of_recipes = split_overrides(overrides or (), ("study",))
    wish = Wish(target=target_of(target), size=size_of(size), folders=datasets(data, dataset), out=out,
                seeds=seeds_of(seeds), sam=sam, overrides=of_recipes, keys=study_keys(own))
    for _, folder in wish.folders:
        run_folder_outside(out, folder)
    if target == "fig1" and plan_only:
        typer.echo("fig1 needs no runs: SAM's encoder is asked as it is")
        return
    if not plan_only:
        wish.demand_inputs()
    if target == "fig1":
        _embeddings(wish)
        return
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.plan import plan_runs
    from autosam3d.studies.reproduce.stages import Given
    from autosam3d.studies.slots import find_slots

    specs = plan_runs(wish.target, wish.size, wish.seeds, more_ablations=wish.keys.more,
                      nnunet_v2=nnunet_python is not None, student=wish.keys.student)
    slots = find_slots(devices, threads)
    studies = _planned(wish.folders, specs, out, budget, slots, of_recipes)
    if plan_only:
        return
    failed = _brought_to_end(studies, slots, Given(sam, wish.keys.medsam, nnunet_python), out)
    about = results.provenance(_command(), budget, small=size == "2core")
    _write(target, studies, out, about, "case" if wish.keys.by_case else "case x organ")
    if failed:
        name, why = next(iter(failed.items()))
        raise BatchError("FAILED_RUNS", name, f"{len(failed)} of {sum(len(s.runs) for s in studies)} runs failed: "
                         f"{why}", f"read {out / name / 'log.txt'}, then give the same command again")


def _planned(
    folders: Sequence[tuple[str, Path]], specs: Sequence[RunSpec], out: Path, budget: float | None,
    slots: Sequence[Slot], overrides: Sequence[str],
) -> list[Study]:
    """A study for each dataset; their plans are printed when none is refused."""
    from autosam3d.studies.reproduce.guard import demand_own_runs
    from autosam3d.studies.reproduce.study import plan_study

    studies = []
    for name, folder in folders:
        study = plan_study(
            name, folder, out, specs, budget_minutes=budget, slot=slots[0], overrides=overrides,
            measured=lambda run: typer.echo(f"measuring a step of {run}", err=True),
        )
        demand_own_runs(study)
        studies.append(study)
    for study in studies:
        typer.echo(_plan_text(study, len(slots)))
    return studies


def _brought_to_end(studies: Sequence[Study], slots: Sequence[Slot], given: Given, out: Path) -> dict[str, str]:
    """DATASET/RUN to the last line of the runs that failed."""
    from autosam3d.studies.reproduce.runner import run_study

    failed: dict[str, str] = {}
    for study in studies:
        outcome = run_study(study, slots, given, lambda text: typer.echo(text, err=True))
        failed |= {f"{study.dataset}/{name}": why for name, why in outcome.failed.items()}
        if outcome.stopped_by is not None:
            typer.echo(f"stopped; what was done lies in {out}, the same command goes on from here", err=True)
            raise typer.Exit(128 + outcome.stopped_by)
    return failed


def _write(target: str, studies: Sequence[Study], out: Path, about: Provenance, unit: Unit) -> None:
    """The table, which is printed, too, or the figure, of what is finished."""
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.stages import is_finished

    files: Sequence[Path] = ()
    if target.startswith("fig") and not any(is_finished(run) for run in studies[0].runs):
        typer.echo(f"no run is finished: nothing to draw in {target}", err=True)
    elif target == "fig3":
        files = results.write_overlays(studies[0], out, about)
    elif target == "fig4":
        files = results.write_bars(studies[0], out, about)
    else:
        files, text = results.write_table(target, studies, out, about, unit)
        typer.echo(text)
    if files:
        typer.echo(f"wrote {', '.join(str(file) for file in files)}")


def _embeddings(wish: Wish) -> None:
    from autosam3d.data.folder import open_dataset
    from autosam3d.recipes.recipe import load_recipe
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.paper import DATASETS

    assert wish.sam is not None and wish.keys.pictures  # demanded before
    scans = []
    for name, folder in wish.folders:
        recipe = load_recipe(name, wish.overrides)
        cases = open_dataset(folder, recipe)
        paths = [case.image_path for case in (*cases.train, *cases.val)]
        scans.append((DATASETS.get(recipe.name, recipe.name), paths, recipe))
    wish.out.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:
        task = bars.add_task("embedding", total=None)
        files = results.write_embedding_figure(
            scans, wish.keys.pictures, wish.sam, wish.out,
            results.provenance(_command(), None, small=False), slices=100, seed=wish.seeds[0],
            progress=lambda done: bars.update(task, completed=done),
        )
    typer.echo(f"wrote {', '.join(str(file) for file in files)}")


def _plan_text(study: Study, num_slots: int) -> str:
    """The plan as a table: what each run is, and what it will take."""
    from autosam3d.evaluation.scores import counted
    from autosam3d.studies.reproduce.stages import is_finished

    lines = [f"{study.dataset}: {len(study.cases.train)} training, {len(study.cases.val)} validation and "
             f"{len(study.cases.test)} test cases",
             f"{'run':44} {'epochs':>7} {'train':>9} {'segment':>9} {'memory':>9}  state"]
    left, unknown = 0.0, 0
    for run in study.runs:
        done = is_finished(run)
        epochs = "" if not run.is_ours else str(run.recipe.train.epochs)
        memory = "" if run.cost is None else f"{run.cost.memory_bytes / 2**30:.1f} GiB"
        begun = any((run.run / name).exists() for name in ("last.json", "nnunet.json"))
        state = "there" if done else "to go on" if begun else "to do"
        lines.append(f"{run.spec.name:44} {epochs:>7} {_minutes(run.train_seconds):>9} "
                     f"{_minutes(run.segment_seconds):>9} {memory:>9}  {state}")
        left += 0 if done else (run.train_seconds or 0) + (run.segment_seconds or 0)
        unknown += not done and (run.train_seconds is None or run.segment_seconds is None)
    more = f", nor what has a ? in {counted(unknown, 'run')}" if unknown else ""
    lines.append(f"about {left / 3600 / num_slots:.1f} h for what is left, validations and scoring not counted{more}")
    return "\n".join(lines)


def _minutes(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 60:.1f} min"


def _command() -> str:
    """What was typed, without folders: they say nothing to others."""
    return shlex.join(["autosam3d", *map(_last_part, sys.argv[1:])])


def _last_part(word: str) -> str:
    """``btcv=/data/BTCV/`` as ``btcv=BTCV``."""
    name, equals, folder = word.rpartition("=")
    return f"{name.rsplit('/', 1)[-1]}{equals}{folder.rstrip('/').rsplit('/', 1)[-1] or folder}"


