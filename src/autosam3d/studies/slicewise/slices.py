"""SAM and MedSAM on a 3D scan, slice by slice, with prompts made from the truth. START with `segment_slices`.

The truth tells the model which organs are in which slice and where: an optimistic protocol, which every output and
table says. Slices are axial (axis 0 of every array here) and shown as radiologists see them: front at the top, the
patient's right on the left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autosam3d.data.folder import Case
from autosam3d.errors import VolumeError
from autosam3d.io import ReadOptions, read_ct, read_segmentation
from autosam3d.io.grid import demand_same_grid
from autosam3d.io.options import DEFAULTS
from autosam3d.labels import LabelMap, remap
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.prompts import Frame, PromptSpec, make_prompt, random_for
from autosam3d.volume import Segmentation, Volume, log_warnings

log = logging.getLogger(__name__)

TRUTH_NOTE = ("the truth gave the organs, the slices that they are in and the prompts: not comparable with automatic "
              "segmentation without saying so")


@dataclass(frozen=True)
class PromptedSlices:
    """A segmentation and how many prompts the truth gave for it."""

    segmentation: Segmentation
    slices: int
    prompts: int


def read_case(case: Case, labels: LabelMap, read_options: ReadOptions = DEFAULTS) -> tuple[Volume, np.ndarray]:
    """A scan and its truth in the numbers of `labels`, uint8 [z, y, x].

    Raises:
        VolumeError: NO_TRUTH; SHAPE or AFFINE_MISMATCH, the truth lies on another grid; LABEL_RANGE; NO_ORGANS, all
            background; and what the reader raises.
    """
    if case.label_path is None:
        raise no_truth(case)
    ct, truth = read_ct(case.image_path, read_options), read_segmentation(case.label_path, read_options)
    log_warnings(case.label_path, demand_same_grid(truth, case.label_path, ct, "the scan"))
    table = case.label_table or {0: 0} | {value: value for value in labels.by_index}
    try:
        numbers = remap(truth.labels, table)
    except KeyError as error:
        raise VolumeError("LABEL_RANGE", case.label_path, f"expected labels {sorted(table)}, got {error.args[0]}",
                          "correct the label map, or the labels of dataset.json") from None
    if not numbers.any():
        raise VolumeError("NO_ORGANS", case.label_path, "expected organs to prompt for, got background only",
                          "leave this case out")
    return ct, numbers


def no_truth(case: Case) -> VolumeError:
    """The refusal of a case that nothing can be prompted from."""
    return VolumeError("NO_TRUTH", case.image_path, "expected a label map that the prompts are made from, got none",
                       "add it to the labels folder, or name cases that have one")


def segment_slices(
    ct: Volume,
    truth: np.ndarray,
    encoder: SliceEncoder,
    prompts: PromptSpec,
    labels: LabelMap,
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> PromptedSlices:
    """Each slice that has an organ, encoded once and asked once for each of its organs; all others are background.

    Args:
        truth: uint8 [z, y, x] on the scan's grid, in the numbers of `labels`.
        encoder: the model, with or without kept embeddings.
        name: of the case; random prompts are drawn from (seed, name, slice, organ).
        progress: called with (done, total) slices before the first and after each.
    """
    found = np.zeros(ct.shape, np.uint8)
    slices = np.flatnonzero(truth.any((1, 2)))
    count = 0
    for done, z in enumerate(slices):
        if progress is not None:
            progress(done, len(slices))
        shown, true = on_screen(ct.voxels_hu[z]), on_screen(truth[z])
        organs = organs_of(true)
        random = [random_for(prompts.seed, name, int(z), organ) for organ in organs]
        logits = _ask(shown, [true == organ for organ in organs], encoder, prompts, random)
        found[z] = on_screen(combine(logits, organs))
        count += len(organs)
    if progress is not None:
        progress(len(slices), len(slices))
    segmentation = Segmentation(found, ct.affine, ct.source, dict(labels.by_index), ct.warnings)
    return PromptedSlices(segmentation, len(slices), count)


def combine(logits: np.ndarray, organs: Sequence[int]) -> np.ndarray:
    """uint8 [row, column]: each pixel the organ of the greatest logit, background where none is above 0.

    No order of the organs decides, unlike where later masks overwrite earlier ones.

    Args:
        logits: [P, row, column].
        organs: the label of each of the P masks.
    """
    best = logits.argmax(0)
    return np.where(logits.max(0) > 0, np.asarray(organs, np.uint8)[best], 0).astype(np.uint8)


def on_screen(plane: np.ndarray) -> np.ndarray:
    """A plane [y, x] with rows to the back and columns to the left, as MedSAM and readers have it; and back."""
    return np.ascontiguousarray(plane[::-1, ::-1])


def organs_of(plane: np.ndarray) -> list[int]:
    """The labels of a plane, sorted, without background."""
    return [int(value) for value in np.flatnonzero(np.bincount(plane.ravel())) if value]


def stack_prompts(prompts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """P 4 of boxes, P N 2 of points."""
    return torch.from_numpy(np.stack(prompts)).to(device)


@torch.inference_mode()
def _ask(
    shown_hu: np.ndarray, masks: Sequence[np.ndarray], encoder: SliceEncoder, prompts: PromptSpec,
    random: Sequence[np.random.Generator],
) -> np.ndarray:
    """Logits [P, row, column] of the organs of one slice."""
    sam, framing = encoder.sam, encoder.framing
    image = framing.image(shown_hu)
    frame: Frame = framing.frame((image.shape[0], image.shape[1]), sam.sizes.image_size)
    asked = [make_prompt(mask, frame, prompts, draw) for mask, draw in zip(masks, random, strict=True)]
    logits = sam.decode(encoder(image), stack_prompts(asked, sam.device)[None])[0]
    return framing.native(logits, frame).cpu().numpy()

