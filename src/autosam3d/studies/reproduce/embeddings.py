"""Embeddings of CT slices and photographs by SAM's image encoder, mean-pooled, one for each picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autosam3d.checkpoints.sam_files import read_sam_state
from autosam3d.errors import CheckpointError, MissingExtraError, UsageError
from autosam3d.geometry.preprocess import HuWindow, find_body
from autosam3d.volume import Volume

if TYPE_CHECKING:
    from transformers import SamVisionModel

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of SAM's input, red, green and blue. *Source*: Kirillov et al. 2023, its code's defaults."""
_PATCH = 16
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_MAX_PIXELS = 200_000_000
_FROM_ORIGINAL = {
    "patch_embed.proj": "patch_embed.projection", "blocks": "layers", "norm1": "layer_norm1", "norm2": "layer_norm2",
    "neck.0": "neck.conv1", "neck.1": "neck.layer_norm1", "neck.2": "neck.conv2", "neck.3": "neck.layer_norm2",
}


def ct_slices(volume: Volume, hu_window: HuWindow, num: int) -> list[np.ndarray]:
    """`num` axial slices of the body, evenly from its lower to its upper end, as a screen shows them.

    Returns:
        uint8 [H, W, 3] each, grey; fewer than `num` where the body has fewer slices.
    """
    body = find_body(volume.voxels_hu, volume.spacing_mm).slices[0]
    places = np.linspace(body.start, body.stop - 1, min(num, body.stop - body.start) + 2)[1:-1]
    pictures = []
    for z in dict.fromkeys(round(place) for place in places.tolist()):
        part = volume.voxels_hu[z, ::-1, ::-1]
        scaled = (part - hu_window.low_hu) * (255 / (hu_window.high_hu - hu_window.low_hu))
        pictures.append(np.repeat(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)[..., None], 3, axis=2))
    return pictures


def photographs(folder: str | Path, num: int | None = None) -> list[np.ndarray]:
    """The pictures of a folder in the order of their names, uint8 [H, W, 3] each; at most `num`, taken evenly.

    Raises:
        UsageError: NO_PHOTOGRAPHS where the folder has none, BAD_PHOTOGRAPH where one cannot be read.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES) if folder.is_dir() else []
    if not paths:
        raise UsageError("NO_PHOTOGRAPHS", folder, "expected a folder of pictures, got none in it" if folder.is_dir()
                         else "expected a folder of pictures, got no folder", f"put {', '.join(_PICTURES)} files there")
    if num is not None and num < len(paths):
        paths = [paths[round(place)] for place in np.linspace(0, len(paths) - 1, num).tolist()]
    return [_photograph(path) for path in paths]


def _photograph(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > _MAX_PIXELS:
                    raise ValueError(f"it has {picture.width} x {picture.height} pixels")
                picture.draft("RGB", (1024, 1024))
                return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError("BAD_PHOTOGRAPH", path, f"expected a picture, got a file that cannot be read as one ({error})",
                         "repair or remove it") from None


def sam_input(picture: np.ndarray, size: int = 1024) -> tuple[Tensor, tuple[int, int]]:
    """A picture as SAM's encoder takes it, float32 [3, size, size], and how many tokens (rows, columns) show it.

    The longest side becomes `size`, the colours are standardised, and zeros pad it at the right and below.

    Args:
        picture: uint8 [H, W, 3].
    """
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    resized = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR)
    values = (np.asarray(resized, np.float32) - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    padded = torch.zeros(3, size, size)
    padded[:, :rows, :columns] = torch.from_numpy(values.transpose(2, 0, 1).copy())
    return padded, (-(-rows // _PATCH), -(-columns // _PATCH))


def embed(
    encoder: SamVisionModel, pictures: Iterable[np.ndarray], progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """float32 [n, 256]: the encoder's map of each picture, averaged over the tokens that show the picture.

    Padded tokens are left out; otherwise wide photographs would differ from square slices by their shape alone.

    Args:
        encoder: transformers' SAM encoder, of `load_encoder` or as part of a whole model.
        progress: called with the number of pictures done.
    """
    found = []
    device, size = next(encoder.parameters()).device, encoder.config.image_size
    if not isinstance(size, int):
        raise ValueError(f"encoder: expected one size of its square pictures, got {size}")
    for picture in pictures:
        values, (rows, columns) = sam_input(picture, size)
        with torch.inference_mode():
            features = encoder(values[None].to(device)).last_hidden_state  # 1 256 h w
        found.append(features[0, :, :rows, :columns].mean((1, 2)).float().cpu().numpy())
        if progress is not None:
            progress(len(found))
    return np.stack(found) if found else np.zeros((0, encoder.config.output_channels), np.float32)


def load_encoder(source: str | Path) -> SamVisionModel:
    """SAM's 2D image encoder with its neck, for evaluation, from an original or a Hugging Face weight file.

    Args:
        source: as `sam_files.read_sam_state` takes it.

    Raises:
        CheckpointError: MISMATCH where tensors are missing, left over or of a wrong shape; else as `read_sam_state`.
        MissingExtraError: where transformers is not installed.
    """
    try:
        from transformers import SamVisionConfig, SamVisionModel
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "fig1", "expected the package transformers, got none",
                                "pip install 'autosam3d[figures]'") from None
    original = read_sam_state(source)[0]
    state = {_renamed(name): tensor for name, tensor in original.items() if _renamed(name)}
    try:
        model = SamVisionModel(SamVisionConfig(**_config_of(state)))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError("MISMATCH", source, f"expected SAM's image encoder, got other tensors ({error!r})",
                              "give a SAM or MedSAM weight file") from None
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted({n for n in own.keys() | state.keys() if own.get(n) != getattr(state.get(n), "shape", None)})
    if wrong:
        raise CheckpointError("MISMATCH", source, f"expected the {len(own)} tensors of SAM's image encoder, got "
                              f"{len(wrong)} missing, left over or of another shape ({', '.join(wrong[:3])})",
                              "give a SAM or MedSAM weight file")
    model.load_state_dict(state)
    return model.eval()


def _renamed(name: str) -> str:
    """Under transformers' name; an empty one for what is not the image encoder's. Whole path parts are replaced."""
    name = name.removeprefix("module.")
    if name.startswith("vision_encoder."):
        return name
    if not name.startswith("image_encoder."):
        return ""
    path = f".{name.removeprefix('image_encoder.')}."
    for original, theirs in _FROM_ORIGINAL.items():
        path = path.replace(f".{original}.", f".{theirs}.")
    return f"vision_encoder.{path.strip('.')}"


def _config_of(state: Mapping[str, Tensor]) -> dict:
    """The encoder's sizes, read off its tensors' shapes: ViT-B, L and H need no table."""
    grid, hidden = state["vision_encoder.pos_embed"].shape[1::2]
    tables = {int(name.split(".")[2]): tensor.shape for name, tensor in state.items() if name.endswith("rel_pos_h")}
    whole = [i for i, shape in sorted(tables.items()) if shape[0] == 2 * grid - 1]
    windows = [(shape[0] + 1) // 2 for i, shape in tables.items() if i not in whole]
    return {
        "hidden_size": hidden, "num_hidden_layers": len(tables), "num_attention_heads": hidden // tables[0][1],
        "mlp_dim": state["vision_encoder.layers.0.mlp.lin1.weight"].shape[0], "image_size": grid * _PATCH,
        "output_channels": state["vision_encoder.neck.conv1.weight"].shape[0], "global_attn_indexes": whole,
        "window_size": windows[0] if windows else 0, "patch_size": _PATCH,
    }
