"""The random crops that a training step sees, cut from cached cases.

A crop is drawn from (seed, epoch, position) alone, so it is the same in every process and after every restart.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from autosam3d.axes import Size
from autosam3d.data.augment import Crop, affine_margin, augment, random_affine
from autosam3d.data.cache import CachedCase, with_background
from autosam3d.data.centers import draw_center
from autosam3d.data.entries import StoredArray
from autosam3d.data.order import learns_background_from_labels, weighted_order, with_whole_cases
from autosam3d.errors import AutoSam3dError
from autosam3d.io.open_files import demand_open_files
from autosam3d.recipes.recipe import Recipe

# Batches that a worker cuts ahead, the tensors of one, and the files that a training has open besides.
_PREFETCH, _MAX_TENSORS, _OWN_FILES = 4, 4, 64


class CropDataset(Dataset):
    """Random crops; item ``(epoch, position, case)`` is the same crop in every process, on every machine.

    Item: ``voxels`` float32 [1, D, H, W] and ``labels`` uint8 [D, H, W]; where the cases have a teacher's probabilities
    ``probs``, float32 [K, D, H, W]; where not every organ was looked for in every case ``groups``, bool [V, K]
    (`LabelMap.groups`).
    """

    def __init__(self, cases: Sequence[CachedCase], recipe: Recipe) -> None:
        self.cases, self.recipe = list(cases), recipe
        self._partial = any(case.drawn is not None for case in cases)

    def __len__(self) -> int:
        return len(self.cases) * self.recipe.sampling.patches_per_volume

    def order(self, epoch: int) -> np.ndarray:
        """Which case stands at each position of `epoch`."""
        random = np.random.default_rng([self.recipe.train.seed, 1, epoch])
        order = weighted_order([case.weight for case in self.cases], len(self), random)
        if self._partial and learns_background_from_labels(self.recipe):
            order = with_whole_cases(order, [case.drawn is None for case in self.cases],
                                     2 * self.recipe.train.batch_size, random)
        return order

    def __getitem__(self, item: tuple[int, int, int]) -> dict[str, Tensor]:
        epoch, position, index = item
        case, recipe = self.cases[index], self.recipe
        random = np.random.default_rng([recipe.train.seed, 2, epoch, position])
        patch_size = recipe.model.patch_size
        start = self._start(case, random)
        margin = affine_margin(patch_size, case.spacing_mm, recipe.augment)
        air = case.voxels.dtype.type(recipe.preprocess.air)
        crop = Crop(
            _cut(case.voxels, start, patch_size, margin, air).astype(np.float32),
            _cut(case.labels, start, patch_size, margin, 0),
            None if case.probs is None else with_background(
                _cut(case.probs, (0, *start), (len(case.probs), *patch_size), (0, *margin), 0)),
            recipe.labels.groups(_drawn(case, recipe)) if self._partial else None,
        )
        if any(margin):
            crop = random_affine(crop, patch_size, case.spacing_mm, recipe.augment, random)
        crop = augment(crop, recipe.augment, recipe.labels, random)
        tensors = {"voxels": torch.from_numpy(crop.voxels).unsqueeze(0), "labels": torch.from_numpy(crop.labels)}
        if crop.probs is not None:
            tensors["probs"] = torch.from_numpy(crop.probs)
        if crop.groups is not None:
            tensors["groups"] = torch.from_numpy(crop.groups)
        return tensors

    def _start(self, case: CachedCase, random: np.random.Generator) -> Size:
        """First voxel of a crop around an organ voxel or any voxel, moved inside the scan along axes where it fits."""
        sampling = self.recipe.sampling
        if case.organ_voxels.any() and random.random() < sampling.foreground_share:
            center = draw_center(case.organ_voxels, case.organs_in_plane, random,
                                 balance_organs=sampling.balance_organs)
        else:
            center = random.integers(0, case.voxels.shape)
        z, y, x = (
            min(max(0, int(c) - p // 2), n - p) if n > p else -((p - n) // 2)
            for c, n, p in zip(center, case.voxels.shape, self.recipe.model.patch_size, strict=True)
        )
        return z, y, x


class StepSampler:
    """The items of one rank for one epoch, from step `first_step` on, in batches.

    The list of an epoch is filled up by starting over, so that every rank makes the same number of full steps.
    """

    def __init__(self, dataset: CropDataset, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.epoch = self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Full steps that every rank makes in an epoch."""
        return -(-len(self.dataset) // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return max(self.steps_per_epoch - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = self.dataset.order(self.epoch)
        positions = np.arange(self.steps_per_epoch * self.batch_size * self.world_size)
        indexes = order[positions % len(order)]
        for step in range(self.first_step, self.steps_per_epoch):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(p), int(indexes[p])) for p in positions[start : start + self.batch_size]]


class CropLoader:
    """Batches of crops in the order that `sampler` has when an iteration begins.

    They are cut ahead by processes that live until it is closed, or in a thread where `num_workers` is 0. A context
    manager, since an exception on its way out keeps everything alive that it passed, and workers hear no SIGTERM.
    """

    def __init__(self, dataset: CropDataset, sampler: StepSampler, num_workers: int, pin_memory: bool) -> None:
        # Which crop to cut comes with each item, so the workers know nothing of epochs and outlive them.
        self._loader = DataLoader(_Fetch(dataset), batch_sampler=sampler, num_workers=num_workers,
                                  pin_memory=pin_memory, persistent_workers=num_workers > 0,
                                  collate_fn=_collate, worker_init_fn=_begin_worker if num_workers else None,
                                  prefetch_factor=_PREFETCH if num_workers else None)

    def __enter__(self) -> CropLoader:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        if (iterator := self._loader._iterator) is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined] - torch has no other way than to forget it

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._loader.num_workers:
            for batch in self._loader:
                if isinstance(batch, AutoSam3dError):
                    raise batch
                yield batch
            return
        batches = iter(self._loader)
        with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                if isinstance(batch, AutoSam3dError):
                    raise batch
                coming = pool.submit(next, batches, None)
                yield batch


def _drawn(case: CachedCase, recipe: Recipe) -> Collection[int]:
    return range(1, recipe.labels.num_outputs) if case.drawn is None else case.drawn


def demand_files_for(num_workers: int) -> None:
    """Raise the limit of open files to what so many worker processes need.

    Raises:
        ResourceError: OPEN_FILES, the system does not let it.
    """
    # Torch hands each tensor of a batch over as a file; a worker has three ends of pipes besides.
    needed = _OWN_FILES + num_workers * (3 + _MAX_TENSORS * _PREFETCH)
    if num_workers:
        demand_open_files(needed, "train.num_workers", "lower train.num_workers, 0 needs none")


class _Fetch(Dataset):
    """Batches before they are collated; or an error of ours in place of one, since torch would pass it on from a worker
    as a RuntimeError without its parts."""

    def __init__(self, crops: CropDataset) -> None:
        self._crops = crops

    def __getitems__(self, items: list[tuple[int, int, int]]) -> list[dict[str, Tensor]] | AutoSam3dError:
        try:
            return [self._crops[item] for item in items]
        except AutoSam3dError as error:
            return error


def _collate(batch: list[dict[str, Tensor]] | AutoSam3dError) -> Any:
    return batch if isinstance(batch, AutoSam3dError) else default_collate(batch)


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and batch systems signal the whole group. Workers go on until the training has saved, and end with it.
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _cut(array: np.ndarray | StoredArray, start: Sequence[int], size: Sequence[int], margin: Sequence[int], fill: Any
         ) -> np.ndarray:
    """A copy of ``array[start - margin : start + size + margin]``; what lies outside the array is `fill`."""
    lows = [s - m for s, m in zip(start, margin, strict=True)]
    highs = [s + p + m for s, p, m in zip(start, size, margin, strict=True)]
    cut = np.full([h - low for low, h in zip(lows, highs, strict=True)], fill, array.dtype)
    inside = [(max(0, low), min(n, h)) for low, h, n in zip(lows, highs, array.shape, strict=True)]
    target = tuple(slice(a - low, b - low) for (a, b), low in zip(inside, lows, strict=True))
    cut[target] = array[tuple(slice(a, b) for a, b in inside)]
    return cut
