"""``autosam3d reproduce``: a table or a figure of the paper, from the plan of its runs to its files."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosam3d.cli.console import progress_bars
from autosam3d.cli.options import run_folder_outside
from autosam3d.errors import BatchError, UsageError

if TYPE_CHECKING:
    from autosam3d.studies.reproduce.plan import RunSpec
    from autosam3d.studies.reproduce.runner import Given, Worker
    from autosam3d.studies.reproduce.study import Study
    from autosam3d.studies.reproduce.tables import Provenance, Unit


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
    more: Annotated[bool, typer.Option("--more", help="Table 3 with ablations that the paper does not have.")] = False,
    student: Annotated[str | None, typer.Option(help="Of Table 4: tiny, small or edge; default small, for 2core "
                                                     "tiny.")] = None,
    sam: Annotated[str | None, typer.Option(help="SAM weights: a file, or a Hugging Face id.")] = None,
    medsam: Annotated[str | None, typer.Option(help="MedSAM weights, for Table 2; default those of --sam.")] = None,
    photographs: Annotated[Path | None, typer.Option(help="Folder of photographs, for fig1.")] = None,
    nnunet_python: Annotated[Path | None, typer.Option(help="Python in which nnU-Net v2 is installed; Table 1 then "
                                                            "has it as a row.")] = None,
    by_case: Annotated[bool, typer.Option("--by-case", help="Test cases as pairs, not cases and organs.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE for all recipes.")] = None,
    devices: Annotated[str, typer.Option(help="auto (each GPU takes runs), cpu, or GPUs as cuda:0,cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of a run; 0 takes the cores "
                                                               "of this process.")] = 0,
) -> None:
    """Make a table or a figure of the paper: plan its runs, train what is missing, test, write."""
    from autosam3d.studies.reproduce.plan import TARGETS

    if target not in TARGETS:
        raise UsageError("USAGE", target, f"expected one of {', '.join(TARGETS)}", "name one of these")
    if size not in ("paper", "2core"):
        raise UsageError("USAGE", f"--size {size}", "expected paper or 2core", "name one of these")
    if student not in (None, "tiny", "small", "edge"):
        raise UsageError("USAGE", f"--student {student}", "expected tiny, small or edge", "name one of these")
    folders = _datasets(data, dataset)
    if target in ("fig3", "fig4") and len(folders) > 1:
        raise UsageError("USAGE", "--data", f"expected one dataset for {target}, got {len(folders)}", "name one")
    for _, folder in folders:
        run_folder_outside(out, folder)
    _demand_different_recipes(folders, overrides or ())
    if target == "fig1":
        if plan_only:
            typer.echo("fig1 needs no runs: SAM's encoder is asked as it is")
            return
        _embeddings(folders, sam, photographs, out, overrides or (), _seeds(seeds)[0])
        return
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.plan import plan_runs
    from autosam3d.studies.reproduce.runner import Given
    from autosam3d.studies.reproduce.workers import find_workers

    if target == "table2" and sam is None and not plan_only:
        raise UsageError("USAGE", "--sam", "expected SAM weights: two rows of Table 2 are SAM and MedSAM",
                         "name a file with --sam, and MedSAM's with --medsam")
    specs = plan_runs(target, size, _seeds(seeds), more_ablations=more, nnunet_v2=nnunet_python is not None,
                      student=student)
    workers = find_workers(devices, threads)
    studies = _planned(folders, specs, out, budget, workers, overrides or ())
    if plan_only:
        return
    failed = _brought_to_end(studies, workers, Given(sam, medsam, nnunet_python), out)
    about = results.provenance(_command(), budget, small=size == "2core")
    _write(target, studies, out, about, "case" if by_case else "case x organ")
    if failed:
        name, why = next(iter(failed.items()))
        raise BatchError("FAILED_RUNS", name, f"{len(failed)} of {sum(len(s.runs) for s in studies)} runs failed: "
                         f"{why}", f"read {out / name / 'log.txt'}, then give the same command again")


def _demand_different_recipes(folders: Sequence[tuple[str, Path]], overrides: Sequence[str]) -> None:
    """Refuse datasets whose recipes have one name: their runs would be taken for one another's."""
    from autosam3d.recipes.recipe import load_recipe

    named: dict[str, str] = {}
    for source, _ in folders:
        name = load_recipe(source, overrides).name
        if name in named:
            raise UsageError("USAGE", "--data", f"expected recipes of different names, got {name!r} in {named[name]} "
                             f"and {source}", "give one of them another name")
        named[name] = source


def _datasets(data: Sequence[Path], default: str) -> list[tuple[str, Path]]:
    found = []
    for entry in data:
        name, equals, folder = str(entry).partition("=")
        found.append((name, Path(folder)) if equals and not entry.exists() else (default, entry))
    twice = {name for name, _ in found if sum(name == other for other, _ in found) > 1}
    if twice:
        raise UsageError("USAGE", "--data", f"expected each dataset once, got {', '.join(sorted(twice))} twice",
                         "write NAME=FOLDER with the name of the recipe")
    return found


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise UsageError("SEEDS", f"--seeds {text}", "expected whole numbers with commas between", "write 0,1,2")
    return [int(part) for part in text.split(",")]


def _planned(
    folders: Sequence[tuple[str, Path]], specs: Sequence[RunSpec], out: Path, budget: float | None,
    workers: Sequence[Worker], overrides: Sequence[str],
) -> list[Study]:
    """A study for each dataset; their plans are printed when none is refused."""
    from autosam3d.studies.reproduce.guard import demand_own_runs
    from autosam3d.studies.reproduce.study import plan_study

    studies = []
    for name, folder in folders:
        study = plan_study(
            name, folder, out, specs, budget_minutes=budget, device=workers[0].device, threads=workers[0].threads,
            overrides=overrides, measured=lambda run: typer.echo(f"measuring a step of {run}", err=True),
        )
        demand_own_runs(study)
        studies.append(study)
    for study in studies:
        typer.echo(_plan_text(study, len(workers)))
    return studies


def _brought_to_end(studies: Sequence[Study], workers: Sequence[Worker], given: Given, out: Path) -> dict[str, str]:
    """DATASET/RUN to the last line of the runs that failed."""
    from autosam3d.studies.reproduce.runner import run_study

    failed: dict[str, str] = {}
    for study in studies:
        outcome = run_study(study, workers, given, lambda text: typer.echo(text, err=True))
        failed |= {f"{study.dataset}/{name}": why for name, why in outcome.failed.items()}
        if outcome.stopped_by is not None:
            typer.echo(f"stopped; what was done lies in {out}, the same command goes on from here", err=True)
            raise typer.Exit(128 + outcome.stopped_by)
    return failed


def _write(target: str, studies: Sequence[Study], out: Path, about: Provenance, unit: Unit) -> None:
    """The table, which is printed, too, or the figure, of what is finished."""
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.runner import is_finished

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


def _embeddings(
    folders: Sequence[tuple[str, Path]], sam: str | None, photographs: Path | None, out: Path,
    overrides: Sequence[str], seed: int,
) -> None:
    from autosam3d.data.folder import open_dataset
    from autosam3d.recipes.recipe import load_recipe
    from autosam3d.studies.reproduce import results
    from autosam3d.studies.reproduce.paper import DATASETS

    if sam is None or photographs is None:
        missing = "--sam" if sam is None else "--photographs"
        raise UsageError("USAGE", missing, "expected SAM weights and a folder of photographs for fig1", "name both")
    scans = []
    for name, folder in folders:
        recipe = load_recipe(name, overrides)
        window = recipe.preprocess.hu_window
        cases = open_dataset(folder, recipe)
        paths = [case.image_path for case in (*cases.train, *cases.val)]
        scans.append((DATASETS.get(recipe.name, recipe.name), paths, window.low_hu, window.high_hu))
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:
        task = bars.add_task("embedding", total=None)
        files = results.write_embedding_figure(
            scans, photographs, sam, out, results.provenance(_command(), None, small=False), slices=100, seed=seed,
            progress=lambda done: bars.update(task, completed=done),
        )
    typer.echo(f"wrote {', '.join(str(file) for file in files)}")


def _plan_text(study: Study, num_workers: int) -> str:
    """The plan as a table: what each run is, and what it will take."""
    from autosam3d.evaluation.scores import counted
    from autosam3d.studies.reproduce.runner import is_finished

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
    lines.append(f"about {left / 3600 / num_workers:.1f} h for what is left, validations and scoring not counted{more}")
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


