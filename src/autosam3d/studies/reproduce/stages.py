"""What is left to do for a run: the commands of its stages, and whether it is trained and scored. Starts nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from autosam3d.checkpoints.model_file import read_meta
from autosam3d.errors import AutoSam3dError, CheckpointError
from autosam3d.io.files import sha256_of
from autosam3d.recipes.reading import Reading
from autosam3d.studies.reproduce.study import PlannedRun, Study
from autosam3d.studies.slots import Slot

_TOLERANCES = ("--tolerance", "1", "--tolerance", "2", "--tolerance", "5")
"""Tolerances of the NSD in mm, as options of the scoring commands."""
SMALL_PATCH = (32, 64, 64)
"""Patch of the 2core presets in voxels (z, y, x)."""


@dataclass(frozen=True)
class Given:
    """Weights and programs that the user named and that only some of the runs need."""

    sam: str | None = None
    """SAM weights."""
    medsam: str | None = None
    """MedSAM weights; None takes those of `sam`."""
    nnunet_python: Path | None = None
    """Python of the environment in which nnU-Net v2 is installed; None takes this one."""


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has scores, and they are those of the model that it holds now."""
    try:
        done = json.loads((run.folder / "done.json").read_text("utf-8"))
        return bool(done["model"] == model_of(run) and (run.evaluation / "scores.json").is_file())
    except (OSError, ValueError, KeyError, TypeError, AutoSam3dError):
        return False


def is_trained(run: PlannedRun) -> bool:
    """Whether the training of a run reached its last epoch."""
    try:
        meta = read_meta(run.run / "last.json")
        return (run.run / "best.json").is_file() and meta["progress"]["epoch"] >= run.recipe.train.epochs
    except (CheckpointError, KeyError, TypeError):
        return False


def model_of(run: PlannedRun) -> str:
    """SHA-256 that identifies the model that a run's scores are of: of our weights, else of the scores themselves.

    Raises:
        CheckpointError, OSError: the file is missing or cannot be read.
    """
    if run.spec.kind in ("train", "distill"):
        return str(read_meta(run.weights / "best.json")["weights"]["sha256"])
    return sha256_of(run.evaluation / "scores.json")


def stages(run: PlannedRun, study: Study, slot: Slot, given: Given) -> list[tuple[str, list[str]]]:
    """The stages that are left to do for a run, in their order.

    Args:
        run: of `study`.
        study: whose dataset, cache and other runs the commands name.
        slot: where the stages run.
        given: by the user.

    Returns:
        (name, arguments of ``autosam3d``) of each stage.
    """
    how = ["--device", slot.device, "--threads", str(slot.threads)]
    todo: list[tuple[str, list[str]]] = []
    if run.spec.kind == "nnunet_v2":
        return [("nnU-Net v2", [*_nnunet(run, study, given), *how])]
    if run.spec.kind == "slicewise":
        todo += [(name, [*command, "--cache", str(study.folder / "embeddings"), *how])
                 for name, command in _slicewise(run, study, given)]
    else:
        todo += [(name, [*command, *how]) for name, command in _ours(run, study, given)]
    todo.append(("scoring", ["evaluate", str(run.prediction), str(study.data / "labelsTs"), "--out",
                             str(run.evaluation), "--recipe", str(run.recipe_file), *_TOLERANCES]))
    return todo


def _ours(run: PlannedRun, study: Study, given: Given) -> Iterator[tuple[str, list[str]]]:
    of = {planned.spec.name: planned for planned in study.runs}
    if run.is_ours and not is_trained(run):
        where = ["--data", str(study.data), "--out", str(run.run), "--cache", str(study.cache)]
        if run.spec.kind == "distill":
            teacher = of[run.spec.teacher or ""].run
            yield "training", ["distill", str(teacher), "--student", str(run.recipe_file), *where]
        else:
            # SAM's weights do not fit the small variants.
            takes_sam = run.recipe.model.network == "autosam" and not run.spec.small
            sam = ["--sam", given.sam] if given.sam and takes_sam else []
            yield "training", ["train", str(run.recipe_file), *where, *sam]
    overlap = run.recipe.inference.overlap if run.spec.overlap is None else run.spec.overlap
    yield "segmenting", ["segment", str(run.weights), str(study.data / "imagesTs"), str(run.prediction),
                         "--overlap", str(min(overlap, 0.9))]


def _slicewise(run: PlannedRun, study: Study, given: Given) -> Iterator[tuple[str, list[str]]]:
    tuning, _, prompt = run.spec.model.partition(":")
    where = [str(run.recipe_file), "--data", str(study.data)]
    model = ["--sam", str(given.sam)]
    if tuning != "sam":
        length = []
        if study.budget_minutes:  # so many epochs that the minutes end the training
            length = ["--set", f"tune.minutes={study.budget_minutes:g}", "--set", "tune.epochs=1000000"]
        yield "tuning", ["slicewise", "tune", *where, "--sam", str(given.medsam or given.sam), "--out", str(run.run),
                         "--prompt", prompt, "--set", f"tune.seed={run.spec.seed}",
                         "--set", f"tune.scope={'full' if tuning == 'medsam_full' else 'decoder'}", *length]
        model = ["--tuned", str(run.run)]
    yield "segmenting", ["slicewise", "segment", *where, "--out", str(run.prediction), "--prompt", prompt, *model]


def _nnunet(run: PlannedRun, study: Study, given: Given) -> list[str]:
    length = ["--minutes", f"{study.budget_minutes:g}"] if study.budget_minutes else []
    small = (f"patch={list(SMALL_PATCH)}", "batch=2", "iterations=50") if run.spec.small else ()
    usual = asdict(Reading())
    reading = (f"reading.{key}={json.dumps(value)}" for key, value in asdict(run.recipe.reading).items()
               if value != usual[key])
    size = [word for key in (*small, *reading) for word in ("--set", key)]
    return ["nnunet", str(study.data), str(run.run), "--preset", run.spec.model, "--python",
            str(given.nnunet_python or sys.executable), *length, *size, *_TOLERANCES]
