"""The cases of a run on all its ranks: each makes or checks its share of the cache, and all open the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autosam3d.data.cache import KEY_BYTES, CachedCase, cache_cases, open_cached
from autosam3d.data.folder import CaseSet
from autosam3d.io.files import write_text_atomic
from autosam3d.training.run import Run, local_ranks
from autosam3d.training.teacher import cache_probabilities, open_probabilities


def cache_on_all_ranks(run: Run, cases: CaseSet, cache_dir: Path) -> tuple[list[CachedCase], list[CachedCase]]:
    """Training and validation cases. Each rank makes or checks its share of its node's cache; all open the whole."""
    recipe, fabric = run.recipe, run.fabric
    wanted = [*cases.train, *(cases.val[: recipe.train.val_cases] if recipe.train.val_cases else cases.val)]

    def watch(done: int, total: int) -> None:
        run.observer.on_cache(done, total)
        run.stop.demand_none()  # the exception of a signal that met a destructor was swallowed

    share = slice(fabric.local_rank, None, local_ranks())
    cached = cache_cases(wanted[share], recipe, cache_dir, watch)
    if fabric.world_size > 1:
        mine = torch.zeros(len(wanted), KEY_BYTES, dtype=torch.uint8)
        mine[share] = torch.tensor([list(bytes.fromhex(case.key)) for case in cached], dtype=torch.uint8).view(
            -1, KEY_BYTES)
        everyone = fabric.all_gather(fabric.to_device(mine))  # also waits until the cache is whole
        assert isinstance(everyone, Tensor)
        node = fabric.global_rank - fabric.local_rank
        rows = (everyone[node + index % local_ranks(), index] for index in range(len(wanted)))
        keys = [bytes(row.tolist()).hex() for row in rows]
        cached = [open_cached(cache_dir, key, case) for key, case in zip(keys, wanted, strict=True)]
    return cached[: len(cases.train)], cached[len(cases.train) :]


def ask_teacher(run: Run, cases: list[CachedCase], cache_dir: Path) -> list[CachedCase]:
    """The training cases with the teacher's probabilities, where those are kept on disk."""
    distill, teacher = run.recipe.distill, run.teacher
    if distill is None or teacher is None:
        return cases
    if distill.teacher_probs == "live":
        if distill.label_weight > 0:
            return cases
        # Where the labels do not count they do not say where to look either: crops fall anywhere.
        return [replace(case, organ_voxels=np.zeros_like(case.organ_voxels)) for case in cases]
    mine = cases[slice(run.fabric.local_rank, None, local_ranks())]

    def watch(done: int, total: int) -> None:
        run.stop.demand_none()  # the exception of a signal that met a destructor was swallowed

    checked = cache_probabilities(mine, teacher, run.recipe, cache_dir, run.observer.on_teacher, watch)
    if run.fabric.world_size > 1:
        run.fabric.barrier()
        checked = open_probabilities(cases, teacher, run.recipe, cache_dir)
    return _agreed(run, checked)


def _agreed(run: Run, cases: list[CachedCase]) -> list[CachedCase]:
    """`cases` less the scans without labels on which the teacher's voters disagree; ``left_out.csv`` lists those."""
    assert run.recipe.distill is not None
    least = run.recipe.distill.min_agreement
    doubted = [case for case in cases if case.drawn == frozenset() and case.agreement is not None
               and case.agreement < least]
    if run.fabric.is_global_zero and least > 0:
        rows = [f"{case.name},{case.agreement:.4f}\n" for case in doubted]
        write_text_atomic(run.folder / "left_out.csv", "".join(["case,agreement\n", *rows]))
        run.observer.on_message(f"{len(doubted)} scans without labels are left out, on which the teacher's voters "
                                f"agree less than {least:g} (left_out.csv)")
    names = {case.name for case in doubted}
    return [case for case in cases if case.name not in names]
