"""The whole product in a few minutes, without patient data: phantoms, training, segmentation, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from autosam3d.batch import check_inputs, segment_batch
from autosam3d.checkpoint import load_model
from autosam3d.dataset import open_dataset
from autosam3d.evaluate import evaluate_folder, write_csv, write_json
from autosam3d.io import ReadOptions, read_ct, read_segmentation
from autosam3d.overlay import overlay_png
from autosam3d.phantom import write_phantom_dataset
from autosam3d.recipe import load_recipe
from autosam3d.report import write_report
from autosam3d.train import Observer, train

NUM_TRAIN, NUM_VAL, NUM_TEST = 12, 2, 2
SEED = 2308_14936


def run_demo(folder: Path, observer: Observer, show: Callable[[str, int, int], None]) -> str:
    """Everything below `folder`; a demo that stands there is taken up where it stopped.

    Args:
        show: called with (stage, done, total) for the stages beside training.

    Returns:
        What to tell the user at the end.
    """
    started = time.perf_counter()
    recipe = load_recipe("phantom")
    data, run, predictions = folder / "data", folder / "run", folder / "predictions"
    write_phantom_dataset(data, NUM_TRAIN, NUM_VAL, NUM_TEST, SEED, progress=lambda d, t: show("making phantoms", d, t))
    cases = open_dataset(data, recipe)
    train(recipe, cases, run, observer=observer)
    model = load_model(run)
    jobs = check_inputs(data / "imagesTs", predictions)
    segment_batch(jobs, model, options=ReadOptions(), progress=_Windows(show))
    show("evaluating", 0, 1)
    result = evaluate_folder(predictions, data / "labelsTs", labels=recipe.labels, ct_folder=data / "imagesTs")
    write_csv(result, folder / "scores.csv")
    write_json(result, folder / "scores.json")
    write_report(result, folder / "report.html")
    for case in cases.test:
        assert case.label_path is not None  # a phantom has its truth
        overlay_png(read_ct(case.image_path), read_segmentation(predictions / f"{case.name}.nii.gz"),
                    folder / f"{case.name}.png", labels=recipe.labels, truth=read_segmentation(case.label_path))
    show("evaluating", 1, 1)
    minutes = (time.perf_counter() - started) / 60
    return f"{result.summary()}\nopen {folder / 'report.html'} ({minutes:.1f} min in all)"


class _Windows:
    """The windows of all scans as one bar."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self._show = show

    def on_scan(self, done: int, total: int, name: str) -> None:
        self._show("segmenting", done, total)

    def on_window(self, done: int, total: int) -> None:
        pass
