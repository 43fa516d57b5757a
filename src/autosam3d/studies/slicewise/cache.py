"""Image embeddings of slices, kept on disk: each is computed once, whatever is killed in between.

A file's name is the SHA-256 of what it was made from: encoder, framing, slice. So files of several SAMs and datasets
share a folder, the same slice under another name is not encoded again, and no file can be out of date. They are
thousands a dataset, so each is one file with its checksum inside, and no entry of `data.entries` with a JSON beside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from autosam3d.errors import CheckpointError, ResourceError
from autosam3d.io.files import write_bytes_atomic
from autosam3d.io.folders import make_folder
from autosam3d.io.memory import size_text
from autosam3d.io.open_files import at_limit, limit_reached
from autosam3d.studies.slicewise.images import Framing
from autosam3d.studies.slicewise.model import SliceSam, demand_memory

log = logging.getLogger(__name__)

_SUM_BYTES = 32


class SliceEncoder:
    """From a slice to its embedding: out of `folder` where it lies there whole, else by the encoder.

    Args:
        folder: None keeps nothing, and embeddings stay in float32; else they are rounded to float16 as they are kept.
        watch: called before each pass through the encoder, to let a stop in.
    """

    def __init__(self, sam: SliceSam, framing: Framing, folder: Path | None = None,
                 watch: Callable[[], None] = lambda: None) -> None:
        self.sam, self.framing, self.folder, self._watch = sam, framing, folder, watch
        self.encoded = 0
        """Slices that went through the encoder."""
        demand_memory(sam)

    def key(self, image: np.ndarray) -> str:
        """Of a uint8 slice [row, column] of `Framing.image`."""
        text = json.dumps(["embedding", 1, self.sam.encoder_sha256, self.framing.style, str(self.sam.sizes),
                           list(image.shape)])
        return hashlib.sha256(text.encode() + b"\0" + np.ascontiguousarray(image).tobytes()).hexdigest()

    def path(self, key: str) -> Path:
        if self.folder is None:
            raise ValueError("SliceEncoder: expected a folder")
        return self.folder / key[:2] / f"{key}.embedding"

    def __call__(self, image: np.ndarray) -> Tensor:
        """1 E g g, float32, on the model's device, without gradient."""
        if self.folder is None:
            return self._encode(image)
        path = self.path(self.key(image))
        kept = read_embedding(path)
        if kept is None:
            kept = self._encode(image).half().cpu()
            if not bool(torch.isfinite(kept).all()):
                raise CheckpointError("NONFINITE", self.sam.sam.source, "its embedding of a slice is not finite in "
                                      "float16", "get the weights anew from their publisher")
            write_embedding(path, kept)
        return kept.float().to(self.sam.device)

    def demand_space(self, slices: int) -> None:
        """Refuse before the first slice what the disk cannot hold.

        Raises:
            ResourceError: NO_SPACE, NOT_WRITABLE; UsageError: OUTPUT_PATH.
        """
        if self.folder is None:
            return
        make_folder(self.folder)
        sizes = self.sam.sizes
        needed = slices * 2 * sizes.neck_dim * (sizes.image_size // sizes.token_size) ** 2
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ResourceError("NO_SPACE", self.folder, f"expected {size_text(needed)} free for the embeddings of "
                                f"{slices} slices, got {size_text(free)}", "free some space or name another --cache")

    @torch.no_grad()
    def _encode(self, image: np.ndarray) -> Tensor:
        self._watch()
        self.encoded += 1
        pixels = self.framing.pixels(image, self.sam.sizes.image_size)
        return self.sam.encode(pixels[None]).float()


def write_embedding(path: Path, embedding: Tensor) -> None:
    """A safetensors file behind its own SHA-256, whole or absent."""
    make_folder(path.parent)
    content = save({"embedding": embedding.contiguous()})
    write_bytes_atomic(path, hashlib.sha256(content).digest() + content)


def read_embedding(path: Path) -> Tensor | None:
    """What `write_embedding` wrote; None where there is nothing or no whole file (a warning says so)."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_SUM_BYTES:]).digest() == content[:_SUM_BYTES]:
            return load(content[_SUM_BYTES:])["embedding"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        if at_limit(error):
            raise limit_reached(path) from None
    log.warning("%s: not a whole embedding, made anew", path)
    return None
