"""The whole product in a few minutes, without patient data: phantoms, training, segmentation, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.data.phantom import write_phantom_dataset
from autosam3d.evaluation.evaluate import evaluate_folder
from autosam3d.evaluation.overlay import overlay_png
from autosam3d.evaluation.report import write_evaluation
from autosam3d.io import read_ct, read_segmentation
from autosam3d.recipes.recipe import Recipe, load_recipe
from autosam3d.scans.batch import segment_batch
from autosam3d.scans.jobs import check_inputs
from autosam3d.training.train import Observer, train

NUM_TRAIN, NUM_VAL, NUM_TEST = 12, 2, 2
SEED = 2308_14936

Show = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class DemoResult:
    """What became of it."""

    summary: str
    """For the terminal."""
    stopped_by: int | None = None
    """The signal that stopped the training, which goes on in the next call; None when the demo is finished."""


def run_demo(folder: Path, observer: Observer, show: Show) -> DemoResult:
    """Everything below `folder`; a demo that stands there is taken up where it stopped, and what it has is kept.

    Args:
        observer: is shown the training, and informed of what an earlier call has done.
        show: for the stages beside training.
    """
    started = time.perf_counter()
    recipe = load_recipe("phantom")
    data, run, predictions = folder / "data", folder / "run", folder / "predictions"
    cases = _make_data(data, recipe, observer, show)
    steps = _Steps(observer)
    trained = train(recipe, cases, run, observer=steps.observer)
    if trained.stopped_by is not None:
        return DemoResult("", trained.stopped_by)
    if not steps.count:
        observer.on_message(f"{run} is trained already: the model is used as it is")
    _segment_tests(data, run, predictions, observer, show)
    result = evaluate_folder(
        predictions, data / "labelsTs", labels=recipe.labels, ct_folder=data / "imagesTs",
        progress=lambda done, total: show("evaluating", done, total),
    )
    write_evaluation(result, folder, progress=lambda done, total: show("drawing the report", done, total))
    for done, case in enumerate(cases.test, start=1):
        assert case.label_path is not None  # a phantom has its truth
        overlay_png(read_ct(case.image_path), read_segmentation(predictions / f"{case.name}.nii.gz"),
                    folder / f"{case.name}.png", labels=recipe.labels, truth=read_segmentation(case.label_path))
        show("drawing the cases", done, len(cases.test))
    minutes = (time.perf_counter() - started) / 60
    return DemoResult(f"{result.summary()}\nopen {folder / 'report.html'} ({minutes:.1f} min in all)")


def _make_data(data: Path, recipe: Recipe, observer: Observer, show: Show) -> CaseSet:
    num_there = len(list(data.glob("images*/*.nii.gz")))
    write_phantom_dataset(data, NUM_TRAIN, NUM_VAL, NUM_TEST, SEED,
                          progress=lambda done, total: show("making phantoms", done, total))
    if num_there:
        observer.on_message(f"{num_there} phantoms in {data} were there already")
    return open_dataset(data, recipe)


def _segment_tests(data: Path, run: Path, predictions: Path, observer: Observer, show: Show) -> None:
    """The predictions are the demo's own: those of an older model are replaced."""
    jobs = check_inputs(data / "imagesTs", predictions)
    result = segment_batch(jobs, load_model(run), overwrite=True, progress=_Windows(show))
    if result.failed:
        raise result.failed[0].error
    if result.skipped:
        observer.on_message(f"{len(result.skipped)} of {len(jobs)} scans were segmented by this model already")


class _Steps:
    """An observer that also counts the steps of the training."""

    def __init__(self, observer: Observer) -> None:
        self.count = 0
        self._on_step = observer.on_step
        self.observer = replace(observer, on_step=self._counted)

    def _counted(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.count += 1
        self._on_step(done, total, values)


class _Windows:
    """A bar for the windows of each scan."""

    def __init__(self, show: Show) -> None:
        self._show, self._stage = show, ""

    def on_scan(self, done: int, total: int, name: str) -> None:
        self._stage = f"segmenting {name} ({done + 1} of {total})"

    def on_window(self, done: int, total: int) -> None:
        self._show(self._stage, done, total)
