"""The folder of a training run: held by one process, of one recipe, with room for its checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from lightning_fabric import Fabric

from autosam3d.checkpoints.checkpoint import remove_unnamed_weights
from autosam3d.errors import RecipeError, ResourceError, UsageError
from autosam3d.io.files import remove_stale_temporaries, write_text_atomic
from autosam3d.io.folders import writable_folder
from autosam3d.io.lock_file import hold_folder
from autosam3d.io.memory import size_text
from autosam3d.io.room import demand_room
from autosam3d.recipes.recipe import Recipe, dump_recipe, recipe_from_dict
from autosam3d.recipes.yaml_text import parse_yaml
from autosam3d.training.optimizer import state_bytes
from autosam3d.training.run import Run


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


def prepare_run_folder(folder: Path, recipe: Recipe, fabric: Fabric) -> None:
    """Write recipe.yaml into `folder`, or check that the run in it is of the same recipe and settings.

    Raises:
        UsageError: OTHER_RUN.
        ResourceError: NOT_WRITABLE.
    """
    text = dump_recipe(recipe)
    if fabric.is_global_zero:
        claim_run_folder(folder, "recipe.yaml", text)
    fabric.barrier()
    demand_same_run(folder, "recipe.yaml", text, lambda there: _means(there, recipe, folder / "recipe.yaml"))


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


def _means(text: str, recipe: Recipe, path: Path) -> bool:
    """Whether a resolved recipe is this one: a key that an older version did not know has its default."""
    try:
        return recipe_from_dict(parse_yaml(text, str(path)), path) == recipe
    except RecipeError:
        return False


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
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise ResourceError("NO_SPACE", run.folder, f"expected {size_text(needed)} free for the checkpoints, got "
                            f"{size_text(free)}", "free some space or name another folder with --out")
