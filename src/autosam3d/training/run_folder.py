"""The folder of a training run: held by one process, of one recipe, with room for its checkpoints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from lightning_fabric import Fabric

from autosam3d.checkpoints.checkpoint import remove_unnamed_weights
from autosam3d.errors import RecipeError, UsageError
from autosam3d.io.files import remove_stale_temporaries, write_text_atomic
from autosam3d.io.folders import writable_folder
from autosam3d.io.lock_file import hold_folder
from autosam3d.io.room import demand_room
from autosam3d.recipes.recipe import Recipe, dump_recipe, recipe_from_dict
from autosam3d.recipes.yaml_text import parse_yaml
from autosam3d.training.optimizer import state_bytes
from autosam3d.training.run import Run

log = logging.getLogger(__name__)


@contextmanager
def hold_run_folder(folder: Path, fabric: Fabric) -> Iterator[None]:
    """Make `folder`; inside, this run alone trains there. The hold ends with the process, however it ends.

    Raises:
        As `hold_folder`: LOCKED, OUTPUT_PATH, NOT_WRITABLE, and NO_SPACE. Where the file system has no locks the run
        goes on.
    """
    with contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            demand_room(folder, remedy="free some space or name another folder with --out")
            stack.enter_context(hold_folder(folder, "train.lock", what="run folder", option="--out"))
        yield


FREE = ("num_workers", "save_every_steps", "validate_every", "val_cases", "val_overlap", "max_nan_steps")
"""Settings of `train` that change no step, with which a run may therefore go on otherwise than it began."""
_CHOOSE_BEST = ("validate_every", "val_cases", "val_overlap")


def prepare_run_folder(folder: Path, recipe: Recipe, fabric: Fabric) -> None:
    """Write recipe.yaml into `folder`, or check that the run in it is of the same recipe and settings, but for `FREE`.

    Raises:
        UsageError: OTHER_RUN.
        ResourceError: NOT_WRITABLE.
    """
    text, path = dump_recipe(recipe), folder / "recipe.yaml"
    if fabric.is_global_zero:
        claim_run_folder(folder, path.name, text)
    fabric.barrier()
    begun = _recipe_at(path)
    if begun is None:
        demand_same_run(folder, path.name, text)
        return
    as_begun = replace(recipe, train=replace(recipe.train, **{key: getattr(begun.train, key) for key in FREE}))
    # A key that an older version did not know has its default.
    demand_same_run(folder, path.name, dump_recipe(as_begun), lambda _: begun == as_begun)


def keep_recipe(run: Run) -> None:
    """Let recipe.yaml say how a run goes on that has been taken up with other settings of `FREE`.

    Raises:
        ResourceError: NOT_WRITABLE, NO_SPACE.
    """
    path, recipe = run.folder / "recipe.yaml", run.recipe
    run.fabric.barrier()  # all have read it
    begun = _recipe_at(path)
    if begun is None or begun == recipe or not run.fabric.is_global_zero:
        return
    for key in _CHOOSE_BEST:
        before, now = getattr(begun.train, key), getattr(recipe.train, key)
        if before != now:
            log.warning("train.%s is %s now and was %s: from here on the best weights are chosen otherwise, and Dice "
                        "of validations before and after may not compare", key, now, before)
    write_text_atomic(path, dump_recipe(recipe))


def claim_run_folder(folder: Path, name: str, text: str) -> None:
    """Write the file that says which run a folder is of. A run that has not saved anything yet is none: it gives way.
    What a killed process left there goes.

    Args:
        name: of that file.

    Raises:
        UsageError: OUTPUT_PATH.
        ResourceError: NOT_WRITABLE.
    """
    path = folder / name
    with writable_folder(folder, "name another folder with --out"):
        remove_stale_temporaries(folder)
        for stem in ("last", "best"):
            remove_unnamed_weights(folder, stem)
        begun = any((folder / f"{saved}.json").exists() for saved in ("last", "previous", "best"))
        if not begun and (not path.exists() or path.read_bytes() != text.encode()):
            write_text_atomic(path, text)


def demand_same_run(folder: Path, name: str, text: str, same: Callable[[str], bool] = lambda there: False) -> None:
    """Refuse a folder whose file `name` is absent or says other than `text`.

    Args:
        same: whether other words than `text` mean the same run.

    Raises:
        UsageError: OTHER_RUN, with the first line that differs.
    """
    path = folder / name
    if not path.exists():
        raise UsageError("OTHER_RUN", folder, f"expected a new folder or one with a {name}, it holds another run",
                         "name a new folder with --out")
    there = path.read_bytes().decode("utf-8", errors="replace")
    if there != text and not same(there):
        pairs = zip_longest(there.splitlines(), text.splitlines(), fillvalue="nothing")
        old, new = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("its line ends", "others"))
        raise UsageError("OTHER_RUN", folder, f"it holds a run of other settings: expected {old!r} as in its {name}, "
                         f"got {new!r}", "name a new folder with --out, or give the same settings")


def _recipe_at(path: Path) -> Recipe | None:
    """What a resolved recipe says; None where it is none."""
    try:
        return recipe_from_dict(parse_yaml(path.read_text("utf-8"), str(path)), path)
    except (OSError, ValueError, RecipeError):
        return None


def demand_space(run: Run) -> None:
    """Refuse a run whose checkpoints cannot fit on the disk, at the start rather than hours later.

    Raises:
        ResourceError: NO_SPACE.
    """
    if not run.fabric.is_global_zero:
        return
    weights = sum(t.nbytes for t in run.tuned.values())
    state = weights + sum(t.nbytes for t in run.average.values())
    state += state_bytes(run.network, run.recipe)
    # last, previous and the next one being written; best and the next one.
    needed = 3 * state + 2 * weights - sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    demand_room(run.folder, needed, "free some space or name another folder with --out")
