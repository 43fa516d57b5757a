"""From a teacher to a student that fits a laptop, a phone or a browser: which student, and its recipe.

Training itself is `train`, with a teacher's probabilities beside the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autosam3d.checkpoints.model_file import find_checkpoint, read_meta, recipe_of
from autosam3d.checkpoints.targets import demand_exportable
from autosam3d.recipes.recipe import Recipe, load_recipe, recipe_from_dict, with_overrides

STUDENTS: dict[str, dict[str, Any]] = {
    "tiny": {"network": "swin_unetr", "feature_size": 12},
    "small": {"network": "swin_unetr", "feature_size": 24},
    "edge": {"network": "res_unet"},
}
"""The paper's two students, SwinUNETR of 4.1 M and 15.7 M parameters, and a residual U-Net for the weakest machines."""
# Both students halve a crop five times.
_STEP = 32
# In short trainings on small crops a student's last layer, which reads normalised channels, must grow faster.
# *Source*: benchmarks/results/head_lr.md. In the paper's size a student trains as its teacher does.
_SMALL_HEAD_LR = 10.0
_PAPER_CROP_VOX = 128**3


def student_recipe(teacher: str | Path, student: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a student: its teacher's data, crops, augmentation and optimiser, and a network of its own.

    Only the last layer's rate is not the teacher's, where the crops are smaller than the paper's. Deep supervision and
    the teacher's own stochastic depth stay with the teacher: a student has no coarser outputs.

    Args:
        teacher: a trained model.
        student: a key of `STUDENTS`, or a recipe of its own by name or file.
        overrides: ``key.path=value``, applied last.

    Raises:
        CheckpointError: the teacher's JSON is broken.
        RecipeError: an override is wrong, or there is no such recipe.
    """
    if student not in STUDENTS:
        return load_recipe(student, overrides)
    json_path = find_checkpoint(Path(teacher))
    return student_of(recipe_of(read_meta(json_path), json_path), student, overrides)


def student_of(teacher: Recipe, student: str, overrides: Iterable[str] = ()) -> Recipe:
    """The same from a teacher's recipe, trained or not.

    Raises:
        RecipeError: an override is wrong.
    """
    tree = teacher.as_dict()
    # At least what the teacher saw around a voxel.
    patch_size = [-(-n // _STEP) * _STEP for n in tree["model"]["patch_size"]]
    tree["about"] = f"{student} student of {tree['name']}"
    tree["name"] = f"{tree['name'][:50]}_{student}"
    tree["model"] = {**STUDENTS[student], "patch_size": patch_size}
    if math.prod(patch_size) < _PAPER_CROP_VOX:
        tree["optim"]["head_lr"] = _SMALL_HEAD_LR
    tree["distill"] = {"loss": "dice_ce"}
    tree["train"]["deep_supervision"] = False
    recipe = recipe_from_dict(with_overrides(tree, overrides), f"student {student}")
    demand_exportable(recipe.model)
    return recipe
