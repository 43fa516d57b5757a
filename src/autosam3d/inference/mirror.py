"""A predictor asked about the mirror images of each window, too."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np

from autosam3d.inference.predictor import Predictor
from autosam3d.recipes.recipe import Recipe

_log = logging.getLogger(__name__)


class MirrorPredictor:
    """Averages a predictor over mirror images (test-time augmentation).

    Mirrored are the axes that the model was trained to see mirrored. With an odd number of them a right kidney looks
    like a left one, so the channels of side pairs trade places on the way back; an even number is a turn of the body.

    Args:
        predictor: is called 2, 4 or 8 times per batch.
        recipe: names the axes (`augment`) and the pairs (`labels`).
    """

    def __init__(self, predictor: Predictor, recipe: Recipe) -> None:
        self._predictor = predictor
        self.patch_size, self.num_outputs = predictor.patch_size, predictor.num_outputs
        axes = sorted("zyx".index(a) + 2 for a in set(recipe.augment.flip_axes)) if recipe.augment.flip_prob else []
        if not axes:
            _log.warning("the model was not trained on mirror images: test-time augmentation changes nothing")
        self._flips = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
        self._swap = recipe.labels.mirror_table[: recipe.labels.num_outputs].astype(np.intp)

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32."""
        mean: np.ndarray | None = None
        for axes in self._flips:
            probs = np.flip(self._predictor.predict(np.ascontiguousarray(np.flip(patches, axes))), axes)
            swap = self._swap if len(axes) % 2 else range(self.num_outputs)
            if mean is None:
                mean = probs.astype(np.float32)
                continue
            for channel, source in enumerate(swap):
                mean[:, channel] += probs[:, source]
        assert mean is not None
        mean /= len(self._flips)
        return mean

    def activation_bytes(self, batch_size: int) -> int:
        """See `Predictor`; the mean of the mirror images is one output more."""
        output = 4 * batch_size * self.num_outputs * math.prod(self.patch_size)
        return self._predictor.activation_bytes(batch_size) + output
