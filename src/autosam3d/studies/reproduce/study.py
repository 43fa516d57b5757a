"""The plan of a study on one dataset: every run with its whole recipe, its folder, and what it will cost."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from autosam3d.axes import Size
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.geometry.patches import grid_starts
from autosam3d.geometry.preprocess import plan_grid
from autosam3d.io import read_ct
from autosam3d.io.files import write_text_atomic
from autosam3d.recipes.recipe import Recipe, load_recipe, recipe_from_dict
from autosam3d.studies.reproduce.cost import TrainingCost, measure_training
from autosam3d.studies.reproduce.plan import RunSpec
from autosam3d.studies.slots import Slot
from autosam3d.training.distill import student_of

_VALIDATIONS = 3
"""Number of validations in a run with a budget."""
_GRIDS_LOOKED_AT = 4
"""At most so many test cases are read for the estimate: a large CT takes seconds, and every plan waits for them."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that can be started."""

    spec: RunSpec
    recipe: Recipe
    """What is trained. SAM on slices uses its organs and HU window alone, nnU-Net v2 its organs alone."""
    folder: Path
    cost: TrainingCost | None
    train_seconds: float | None
    """Estimate, without validations."""
    segment_seconds: float | None
    """Estimate for all test cases."""

    @property
    def run(self) -> Path:
        """Where it is trained."""
        return self.folder / "run"

    @property
    def weights(self) -> Path:
        """The run folder of the weights that segment: its own, or another run's where only the inference differs."""
        return self.folder.parent / self.spec.predicts_as / "run" if self.spec.predicts_as else self.run

    @property
    def is_ours(self) -> bool:
        """Whether this package's trainer trains it."""
        return self.spec.kind in ("train", "distill") and self.spec.predicts_as is None

    @property
    def prediction(self) -> Path:
        return self.folder / "prediction"

    @property
    def evaluation(self) -> Path:
        return self.run / "evaluation" / "test" if self.spec.kind == "nnunet_v2" else self.folder / "evaluation"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"


@dataclass(frozen=True)
class Study:
    """Runs on one dataset."""

    dataset: str
    """The recipe's name."""
    data: Path
    """The dataset's folder."""
    cases: CaseSet
    folder: Path
    """Folder of its runs."""
    budget_minutes: float | None
    runs: tuple[PlannedRun, ...]

    @property
    def cache(self) -> Path:
        """Preprocessed cases and teachers' probabilities, shared by all runs."""
        return self.folder / "cache"


def plan_study(
    dataset: str, data: Path, out: Path, specs: Sequence[RunSpec], *, budget_minutes: float | None, slot: Slot,
    overrides: Sequence[str] = (), measured: Callable[[str], None] = lambda name: None,
) -> Study:
    """Plan `specs`: their recipes, folders and costs. A cost that was measured before is not measured again.

    Args:
        dataset: a recipe by name or file.
        data: the dataset's folder.
        out: folder of the whole reproduction.
        budget_minutes: of training, the same for every run: the epochs follow from the measured cost of a step. None
            trains as long as each recipe says.
        slot: where each run is trained; the cost of a training step is measured there.
        overrides: for all recipes, before those of a run.
        measured: called with the name of each run whose cost is about to be measured.

    Raises:
        RecipeError: a recipe or an override is wrong.
        VolumeError: the dataset is broken, or it has no test cases with truth.
        UsageError: BUDGET, or SAME_PATH where the runs would lie in the dataset.
        ResourceError: a model does not fit this machine, where its epochs follow from the budget.
    """
    if budget_minutes is not None and not 0 < budget_minutes <= 10**6:
        raise UsageError("BUDGET", f"--budget {budget_minutes}", "expected minutes above 0", "try 10")
    base = load_recipe(dataset, overrides)
    cases = open_dataset(data, base)
    _demand_test_cases(cases)
    folder = out / base.name
    if folder.absolute().resolve().is_relative_to(data.absolute().resolve()):
        raise UsageError("SAME_PATH", out, f"the runs would be written into the dataset {data}", "name another folder")
    recipes = {spec.name: _recipe_of(spec, dataset, overrides) for spec in specs}
    costs = _Costs(folder / "costs.json", slot)
    shapes = _prepared_shapes([case.image_path for case in cases.test], base)
    runs = []
    for spec in specs:
        recipe = recipes[spec.name]
        cost = None
        ours = spec.kind in ("train", "distill")
        if ours:
            cost = costs.of(recipe, lambda spec=spec: measured(spec.name))
            if budget_minutes is not None:
                if cost is None:
                    raise ResourceError("MEMORY", spec.name, "expected a training step that this machine can do in "
                                        "minutes, and none was done", "use --size 2core, or a larger machine")
                recipe = _within(recipe, budget_minutes, cost, len(cases.train))
        seconds = 60 * budget_minutes if budget_minutes and not ours and spec.model.partition(":")[0] != "sam" else None
        if cost is not None:
            seconds = 0.0 if spec.predicts_as else cost.step_seconds * _steps(recipe, len(cases.train)) * (
                recipe.train.epochs)
        runs.append(PlannedRun(spec, recipe, folder / spec.name, cost, seconds,
                               _segment_seconds(recipe, spec, cost, shapes, len(cases.test))))
    return Study(base.name, data, cases, folder, budget_minutes, tuple(runs))


def _recipe_of(spec: RunSpec, dataset: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run, as it would be trained without a budget."""
    if spec.kind in ("slicewise", "nnunet_v2"):
        return load_recipe(dataset, overrides)
    own = dict(spec.overrides)
    if spec.kind == "distill":
        teacher = load_recipe(dataset, overrides, model="autosam_2core" if spec.small else "autosam")
        recipe = student_of(teacher, spec.model, _as_sets(own))
        if spec.small:  # trained like the small baselines: the teacher's rate is half of theirs, too low for minutes
            recipe = replace(recipe, optim=load_recipe(dataset, overrides, model="swinunetr_2core").optim)
    else:
        recipe = load_recipe(dataset, overrides, model=spec.model)
        if "model.fuse_stride" in own:
            own["model.fuse_stride"] = 3 - recipe.model.fuse_stride  # type: ignore[union-attr]
        recipe = load_recipe(dataset, [*overrides, *_as_sets(own)], model=spec.model)
    return replace(recipe, train=replace(recipe.train, seed=spec.seed))


def _as_sets(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in
            overrides.items()]


def _within(recipe: Recipe, minutes: float, cost: TrainingCost, num_train: int) -> Recipe:
    """`recipe` with the epochs that `minutes` hold; its warm-up keeps its share of them."""
    epochs = cost.epochs_in(minutes, _steps(recipe, num_train))
    share = recipe.optim.warmup_epochs / recipe.train.epochs
    warmup = min(math.floor(share * epochs), max(epochs - 1, 0))
    tree = recipe.as_dict()
    tree["train"] |= {"epochs": epochs, "validate_every": max(1, -(-epochs // _VALIDATIONS))}
    tree["optim"]["warmup_epochs"] = warmup
    return recipe_from_dict(tree, recipe.name)


def _steps(recipe: Recipe, num_train: int) -> int:
    return -(-num_train * recipe.sampling.patches_per_volume // recipe.train.batch_size)


def _segment_seconds(
    recipe: Recipe, spec: RunSpec, cost: TrainingCost | None, shapes: Sequence[Size], num_cases: int
) -> float | None:
    """Estimate for all cases, from the prepared grids (`shapes`) of some of them; None where the cost is not known."""
    if cost is None:
        return None
    overlap = recipe.inference.overlap if spec.overlap is None else spec.overlap
    size = recipe.model.patch_size
    windows = sum(len(grid_starts(_grown(shape, size), size, overlap)) for shape in shapes)
    return cost.window_seconds * windows * num_cases / len(shapes)


def _grown(shape: Size, size: Size) -> Size:
    return tuple(max(n, least) for n, least in zip(shape, size, strict=True))  # type: ignore[return-value]


def _prepared_shapes(paths: Sequence[Path], recipe: Recipe) -> list[Size]:
    """Shapes (z, y, x) of the prepared grids of the scans: of all, or of a few that are taken evenly from the list.

    A single one would mislead: OpenKBP's test cases take from 2 to 72 windows of the small recipes.
    """
    some = paths[:: -(-len(paths) // _GRIDS_LOOKED_AT)]
    return [plan_grid(read_ct(path, recipe.reading.options()), recipe.preprocess).prepared_shape for path in some]


def _demand_test_cases(cases: CaseSet) -> None:
    if not cases.test:
        raise VolumeError("NO_CASES", cases.folder / "imagesTs", "expected test cases, got none",
                          "run autosam3d prepare with a recipe that names test cases")
    if any(case.label_path is None for case in cases.test):
        raise VolumeError("NO_TRUTH", cases.folder / "labelsTs", "expected the truth of the test cases, got none",
                          "add it, or take the scans out")


class _Costs:
    """Measured costs, kept in a file under a key made of everything that a cost depends on."""

    def __init__(self, path: Path, slot: Slot) -> None:
        self._path, self._slot = path, slot

    def of(self, recipe: Recipe, before: Callable[[], None]) -> TrainingCost | None:
        key = self._key(recipe)
        known = self._known()
        if key not in known:
            before()
            cost = measure_training(recipe, self._slot.device, self._slot.threads)
            if cost is None:
                return None
            # Where another process has measured the same meanwhile, its result counts, or the epochs would differ.
            known = {key: asdict(cost), **self._known()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self._path, json.dumps(known, indent=1, sort_keys=True) + "\n")
        return TrainingCost(**known[key])

    def _known(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def _key(self, recipe: Recipe) -> str:
        # Seeds, epochs and the weights of the loss do not change the cost of a step.
        parts = [recipe.as_dict()["model"], recipe.train.batch_size, recipe.train.precision, recipe.optim.ema > 0,
                 recipe.as_dict()["optim"].get("optimizer"), self._slot.device, self._slot.threads]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
