"""What a tuning of SAM on slices learns from: slices with an organ large enough, one prompt and mask of each."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autosam3d.data.folder import Case
from autosam3d.errors import VolumeError
from autosam3d.io import ReadOptions
from autosam3d.io.options import DEFAULTS
from autosam3d.labels import LabelMap
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.images import mask_in_square
from autosam3d.studies.slicewise.prompts import PromptSpec, make_prompt, random_for
from autosam3d.studies.slicewise.slices import on_screen, organs_of, read_case, stack_prompts
from autosam3d.volume import Volume

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceSample:
    """One slice of a case that can be learnt from; its arrays are packed, since thousands are held."""

    case: Case
    z: int
    organs: tuple[int, ...]
    """Large enough to be asked for."""
    key: str
    """Of its embedding."""
    shape: tuple[int, int]
    packed_labels: bytes
    packed_image: bytes

    @property
    def labels(self) -> np.ndarray:
        """uint8 [row, column], as shown."""
        return self._unpacked(self.packed_labels)

    @property
    def image(self) -> np.ndarray:
        """uint8 [row, column], as shown."""
        return self._unpacked(self.packed_image)

    def _unpacked(self, packed: bytes) -> np.ndarray:
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(self.shape)


@dataclass(frozen=True)
class SliceBatch:
    images: list[np.ndarray]
    prompts: Tensor
    """B 1 4 of boxes, B 1 N 2 of points."""
    masks: Tensor
    """B s s, in the square."""


def collect_samples(
    cases: Sequence[Case],
    encoder: SliceEncoder,
    labels: LabelMap,
    *,
    min_slice_px: int,
    min_case_vox: int,
    read_options: ReadOptions = DEFAULTS,
    watch: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SliceSample]:
    """The slices of `cases` in which an organ has `min_slice_px` pixels, and `min_case_vox` voxels in its case.

    Raises:
        VolumeError: NO_SAMPLES, no slice has such an organ; and as `read_case`.
    """
    samples: list[SliceSample] = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases))
        watch()
        pair = read_case_with_organs(case, labels, read_options)
        if pair is None:
            continue
        ct, truth = pair
        large = {organ for organ in organs_of(truth) if np.count_nonzero(truth == organ) >= min_case_vox}
        for z in np.flatnonzero(truth.any((1, 2))):
            shown = on_screen(truth[z])
            organs = tuple(o for o in organs_of(shown) if o in large and np.count_nonzero(shown == o) >= min_slice_px)
            if organs:
                image = encoder.framing.image(on_screen(ct.voxels_hu[z]))
                samples.append(SliceSample(case, int(z), organs, encoder.key(image), (shown.shape[0], shown.shape[1]),
                                           zlib.compress(shown.tobytes(), 1), zlib.compress(image.tobytes(), 1)))
    if progress is not None:
        progress(len(cases), len(cases))
    learnt = {organ for sample in samples for organ in sample.organs}
    lacking = [name for organ, name in labels.by_index.items() if organ not in learnt]
    wish = f"{min_slice_px} pixels in a slice and {min_case_vox} voxels in its case"
    if not samples:
        where = cases[0].label_path if cases and cases[0].label_path else "dataset"
        raise VolumeError("NO_SAMPLES", where, f"expected slices in which an organ has {wish}, got none in "
                          f"{len(cases)} cases", "lower tune.min_slice_px and tune.min_case_vox with --set")
    if lacking:
        log.warning("no slice shows %s with %s: not learnt from", ", ".join(lacking), wish)
    return samples


def read_case_with_organs(case: Case, labels: LabelMap, read_options: ReadOptions) -> tuple[Volume, np.ndarray] | None:
    """`read_case`; None, and a warning, for a case in which nothing can be asked for."""
    try:
        return read_case(case, labels, read_options)
    except VolumeError as error:
        if error.code != "NO_ORGANS":
            raise
        log.warning("%s: no organs, left out", case.name)
        return None


def samples_sha256(samples: Sequence[SliceSample]) -> str:
    """Of all that is learnt from; equal samples, equal digest."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.case.name} {sample.z} {sample.organs} {sample.key}".encode())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


def order_of_epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch in their order."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def make_batch(
    samples: Sequence[SliceSample], positions: Sequence[int], encoder: SliceEncoder, prompts: PromptSpec, epoch: int
) -> SliceBatch:
    """One random organ of each sample with its prompt and mask, drawn from (seed, epoch, position)."""
    size = encoder.sam.sizes.image_size
    images, asked, masks = [], [], []
    for sample, position in zip(samples, positions, strict=True):
        random = random_for(prompts.seed, epoch, position)
        mask = sample.labels == random.choice(sample.organs)
        frame = encoder.framing.frame(sample.shape, size)
        asked.append(make_prompt(mask, frame, prompts, random))
        masks.append(mask_in_square(mask, frame, 4 * (size // encoder.sam.sizes.token_size)))
        images.append(sample.image)
    device = encoder.sam.device
    return SliceBatch(images, stack_prompts(asked, device)[:, None], torch.stack(masks).to(device))
