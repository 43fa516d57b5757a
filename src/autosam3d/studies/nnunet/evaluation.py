"""Predictions of an nnU-Net run, scored twice: by our metrics and by nnU-Net's own evaluator, which must agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from autosam3d.errors import VolumeError
from autosam3d.evaluation.evaluate import case_name, evaluate_folder
from autosam3d.evaluation.report import write_evaluation
from autosam3d.evaluation.scores import Evaluation
from autosam3d.io.files import write_text_atomic
from autosam3d.recipes.reading import Reading
from autosam3d.studies.nnunet.agreement import BOUND, Agreement, compare
from autosam3d.studies.nnunet.data import link
from autosam3d.studies.nnunet.process import find_nnunet, run_stage
from autosam3d.studies.nnunet.run import NnunetResult, OnEvent
from autosam3d.studies.slots import available_cores


def evaluate_run(
    result: NnunetResult, part: str, *, tolerances_mm: Sequence[float] = (1.0,), python: str | Path | None = None,
    threads: int = 0, reading: Reading | None = None, progress: Callable[[int, int], None] | None = None,
    on_event: OnEvent | None = None,
) -> tuple[Evaluation, Agreement]:
    """Score a part's predictions into ``evaluation/PART`` of the run: our CSV, JSON and report, nnU-Net's file beside.

    Raises:
        VolumeError: NO_TRUTH; DISAGREE, where a Dice differs by more than `BOUND`: all files are written then, too.
    """
    if part not in result.truth:
        raise VolumeError("NO_TRUTH", result.folder, f"expected label maps of the {part} cases, got none",
                          "add them to the dataset, or evaluate the others")
    predictions, out = result.predictions[part], result.folder / "evaluation" / part
    out.mkdir(parents=True, exist_ok=True)
    truth = _truth_of(result, part)
    images = result.truth[part].with_name("images" + result.truth[part].name.removeprefix("labels"))
    read_options = (reading or Reading()).options()
    evaluation = evaluate_folder(predictions, truth, labels=result.organs, tolerances_mm=tolerances_mm,
                                 ct_folder=images, read_options=read_options, progress=progress)
    write_evaluation(evaluation, out, read_options=read_options)
    summary = _nnunets_metrics(result, part, truth, out / "summary.json", python, threads, on_event)
    agreement = compare(summary, evaluation)
    write_text_atomic(out / "agreement.json", json.dumps(asdict(agreement) | {"bound": BOUND}, indent=1) + "\n")
    if not agreement.agrees:
        raise VolumeError("DISAGREE", out / "agreement.json", f"expected nnU-Net's Dice and ours to agree, got: "
                          f"{agreement}", "do not use these scores, and report it")
    return evaluation, agreement


def write_result(result: NnunetResult) -> Path:
    """``result.json`` of a run: what was trained, for how long, and how it is smaller than nnU-Net's own."""
    path = result.folder / "result.json"
    write_text_atomic(path, json.dumps(asdict(result) | {"name": result.name}, indent=1, default=str) + "\n")
    return path


def _truth_of(result: NnunetResult, part: str) -> Path:
    """A folder of the part's true label maps alone: labelsTr holds those of the training cases, too."""
    folder = result.folder / "truth" / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = {case_name(path) for path in result.predictions[part].glob("*.nii*")}
    for path in sorted(result.truth[part].glob("*.nii*")):
        if case_name(path) in wanted:
            link(path, folder / path.name)
    return folder


def _nnunets_metrics(
    result: NnunetResult, part: str, truth: Path, summary: Path, python: str | Path | None, threads: int,
    on_event: OnEvent | None,
) -> Path:
    """`summary`, written by nnU-Net's evaluator in its environment."""
    threads = threads or available_cores()
    spec = {"dataset": result.model.parent.name, "model": str(result.model.absolute()), "seed": 0,
            "into": str(result.predictions[part].absolute()), "truth": str(truth.absolute()),
            "summary": str(summary.absolute()), "threads": threads, "workers": max(1, min(8, threads // 2))}
    path = result.folder / "logs" / f"evaluate_{part}.json"
    write_text_atomic(path, json.dumps(spec, indent=1) + "\n")
    variables = {"nnUNet_raw": str((result.folder / "nnUNet_raw").absolute()), "OMP_NUM_THREADS": str(threads)}
    run_stage(find_nnunet(python), result.folder / "trainer" / "nnunet_trainer.py", "evaluate", path,
              log=path.with_suffix(".log"), variables=variables,
              on_event=lambda event: on_event("evaluate", event) if on_event is not None else None)
    return summary
