"""SAM in 2D for slices: transformers' SamModel, filled strictly from any SAM file or from a tuning of this package."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import Checkpoint, SamSource, read_checkpoint
from autosam3d.checkpoints.model_file import find_checkpoint
from autosam3d.checkpoints.sam_files import read_sam_state
from autosam3d.errors import CheckpointError, MissingExtraError
from autosam3d.io.memory import demand_ram
from autosam3d.models.autosam.sam_names import POSITIONS, POSITIONS_TWIN, SamSizes, read_sizes, whole_sam
from autosam3d.models.spec import VITS

if TYPE_CHECKING:
    from transformers import SamModel

KIND = "slicewise"
"""What the JSON of a tuned SAM says that it is."""
_DECODER_HEADS = 8
_TUNED_PARTS = ("prompt_encoder.", "mask_decoder.")


@dataclass(frozen=True)
class SliceSam:
    """A SAM that reads slices, in eval mode on one device."""

    network: SamModel
    sizes: SamSizes
    device: torch.device
    sam: SamSource
    """The SAM file that it was filled from."""
    encoder_sha256: str
    """Of the file that the image encoder came from: two SAMs with the same make the same embeddings."""
    tuned: Checkpoint | None = None
    """The tuning on top of the SAM file."""

    @property
    def sha256(self) -> str:
        """Of the weights that make it this one."""
        return self.tuned.meta["weights"]["sha256"] if self.tuned else self.sam.sha256

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings B E g g of pixels B 3 S S."""
        return self.network.vision_encoder(pixels.to(self.device))[0]

    def decode(self, embeddings: Tensor, prompts: Tensor) -> Tensor:
        """One mask's logits for each prompt: B P s s.

        Args:
            embeddings: B E g g.
            prompts: boxes B P 4, or points B P N 2, all of them inside the organ.
        """
        boxes = prompts if prompts.dim() == 3 else None
        points = prompts if prompts.dim() == 4 else None
        labels = torch.ones(points.shape[:3], dtype=torch.int32, device=self.device) if points is not None else None
        result = self.network(input_boxes=boxes, input_points=points, input_labels=labels, image_embeddings=embeddings,
                              multimask_output=False)
        return result.pred_masks[:, :, 0]


@dataclass(frozen=True)
class SliceSeconds:
    """What one slice costs."""

    encode: float
    decode: float
    """For all its organs together."""

    @property
    def total(self) -> float:
        return self.encode + self.decode


def load_slice_sam(
    source: str | Path | None, *, tuned: str | Path | None = None, device: str | torch.device = "cpu"
) -> SliceSam:
    """SAM or MedSAM from a file or a hub id, with a tuning on top where one is named.

    Args:
        source: as `sam_files.read_sam_state` takes it; None takes the file that the tuning began with.
        tuned: a run folder of `slicewise tune`, or its checkpoint's JSON.

    Raises:
        CheckpointError: as `read_sam_state`; MISMATCH, another network, tensors missing or left over; KIND, no tuning;
            HASH, the tuning began with another SAM file; NO_SAM, that file is not there any more.
        MissingExtraError: without transformers.
        ResourceError: MEMORY.
    """
    checkpoint = read_tuning(tuned) if tuned is not None else None
    if source is None and checkpoint is None:
        raise ValueError("load_slice_sam: expected a source or a tuning")
    began_with = SamSource(**checkpoint.meta["sam"]) if checkpoint else None
    if checkpoint and began_with and checkpoint.meta.get("contains") == "all":
        where = str(tuned)
        network, sizes = fill_sam(whole_sam(checkpoint.tensors, where), where)
        digest, sam = checkpoint.meta["weights"]["sha256"], began_with
    else:
        sam, state = _read_base(source, began_with)
        digest = sam.sha256
        if checkpoint:
            names = {name for name in state if name.startswith(_TUNED_PARTS) and name != POSITIONS_TWIN}
            _demand_names(set(checkpoint.tensors), names, str(tuned))
            state |= {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
        network, sizes = fill_sam(state, sam.source if checkpoint is None else str(tuned))
    nn.Module.to(network, device).eval()
    return SliceSam(network, sizes, torch.device(device), sam, digest, checkpoint)


def read_tuning(path: str | Path) -> Checkpoint:
    """The best checkpoint of a `slicewise tune` run folder, or the one that a JSON names.

    Raises:
        CheckpointError: as `read_checkpoint`; KIND.
    """
    json_path = find_checkpoint(Path(path))
    checkpoint = read_checkpoint(json_path)
    if checkpoint.meta.get("kind") != KIND or not isinstance(checkpoint.meta.get("sam"), dict):
        raise CheckpointError("KIND", json_path, f"expected a SAM tuned by `autosam3d slicewise tune`, got a "
                              f"checkpoint of kind {checkpoint.meta.get('kind')!r}", "name the run folder of a tuning")
    return checkpoint


def build_sam(sizes: SamSizes) -> SamModel:
    """transformers' SamModel of these sizes, on torch's default device. The position table is no parameter to tune.

    Raises:
        MissingExtraError: without transformers.
    """
    try:
        from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "slicewise", "SAM on slices needs transformers",
                                "pip install 'autosam3d[sam]'") from None
    place: dict[str, Any] = {"image_size": sizes.image_size, "patch_size": sizes.token_size}
    vision = SamVisionConfig(
        hidden_size=sizes.embed_dim, output_channels=sizes.neck_dim, num_hidden_layers=sizes.num_blocks,
        num_attention_heads=sizes.num_heads, mlp_dim=sizes.mlp_dim, window_size=sizes.attn_window,
        global_attn_indexes=list(sizes.global_blocks), num_pos_feats=sizes.neck_dim // 2, **place,
    )
    prompt = SamPromptEncoderConfig(hidden_size=sizes.neck_dim, mask_input_channels=sizes.mask_channels, **place)
    decoder = SamMaskDecoderConfig(
        hidden_size=sizes.neck_dim, mlp_dim=sizes.decoder_mlp_dim, num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=_DECODER_HEADS, attention_downsample_rate=sizes.decoder_downsample,
        num_multimask_outputs=sizes.num_multimask, iou_head_hidden_dim=sizes.iou_hidden_dim,
    )
    network = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for name, parameter in network.named_parameters():
        if name in (POSITIONS, POSITIONS_TWIN):
            parameter.requires_grad_(False)
    return network


def fill_sam(state: dict[str, Tensor], where: str) -> tuple[SamModel, SamSizes]:
    """A SamModel of the sizes and with the numbers of a `whole_sam`: all tensors placed, none left.

    Raises:
        CheckpointError: MISMATCH; ResourceError: MEMORY.
    """
    sizes = read_sizes(state, where)
    if sizes.neck_dim % (2 * _DECODER_HEADS * sizes.decoder_downsample) or sizes.image_size > 8192:
        raise CheckpointError("MISMATCH", where, f"expected sizes of a SAM, got {sizes}", "give an unchanged SAM file")
    with torch.device("meta"):
        network = build_sam(sizes)
    expected = network.state_dict()
    _demand_names(set(state), set(expected), where)
    wrong = [f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}" for name, tensor in expected.items()
             if state[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError("MISMATCH", where, f"expected a SAM, {len(wrong)} tensors are of another shape: "
                              f"{', '.join(wrong[:3])}", "give an unchanged SAM or MedSAM file")
    # Copies: files are mapped, and a tuning changes its weights.
    network.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in (POSITIONS, POSITIONS_TWIN))
    return network, sizes


def vit_sizes(vit: str = "vit_b") -> SamSizes:
    """The sizes of a released SAM: vit_b, vit_l, vit_h. *Source*: segment-anything's build_sam."""
    spec = VITS[vit]
    return SamSizes(
        image_size=1024, token_size=spec.pretrain_patch, embed_dim=spec.embed_dim, num_blocks=spec.num_blocks,
        num_heads=spec.num_heads, mlp_dim=int(spec.embed_dim * spec.mlp_ratio), attn_window=spec.pretrain_window,
        global_blocks=tuple(spec.taps), neck_dim=256, mask_channels=16, decoder_layers=2, decoder_mlp_dim=2048,
        decoder_downsample=2, num_multimask=3, iou_hidden_dim=256,
    )


def random_sam(sizes: SamSizes, seed: int = 0, device: str | torch.device = "cpu") -> SliceSam:
    """A SAM of random weights, for timing and trials."""
    torch.manual_seed(seed)
    network = build_sam(sizes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("vision_encoder.") and parameter.dim() > 1:  # transformers begins it at 1e-10
                nn.init.trunc_normal_(parameter, std=0.02)
        # segment-anything's scale of 1; transformers' own has neighbouring pixels look unrelated.
        network.shared_image_embedding.positional_embedding.normal_()
        network.prompt_encoder.shared_embedding.positional_embedding.copy_(
            network.shared_image_embedding.positional_embedding)
    nn.Module.to(network, device).eval()
    return SliceSam(network, sizes, torch.device(device), SamSource("random", f"random-{seed}"), f"random-{seed}")


def tuned_tensors(network: nn.Module, scope: str) -> dict[str, Tensor]:
    """What a tuning changes and its checkpoint keeps: prompt encoder and mask decoder ("decoder"), or all ("full")."""
    return {name: tensor for name, tensor in network.state_dict().items()
            if name != POSITIONS_TWIN and (scope == "full" or name.startswith(_TUNED_PARTS))}


def measure_seconds(sam: SliceSam, organs: int = 5, repeats: int = 1) -> SliceSeconds:
    """Seconds of one slice with `organs` prompts, the fastest of `repeats`; for plans and estimates.

    On the CPU these are seconds of CPU time over the threads, what it takes where nothing else is at work.
    """
    demand_memory(sam)
    size = sam.sizes.image_size
    pixels = torch.zeros(1, 3, size, size)
    boxes = torch.tensor([0.2, 0.2, 0.6, 0.6], device=sam.device).mul(size).expand(1, max(1, organs), 4)
    encode, decode = [], []
    with torch.inference_mode():
        for _ in range(repeats):
            started = _clock(sam.device)
            embedding = sam.encode(pixels)
            middle = _clock(sam.device)
            sam.decode(embedding, boxes)
            encode.append(middle - started)
            decode.append(_clock(sam.device) - middle)
    return SliceSeconds(float(np.min(encode)), float(np.min(decode)))


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def demand_memory(sam: SliceSam, batch_size: int = 1, training: bool = False) -> None:
    """Refuse on the CPU what will not fit; attention over the whole square is what is large. An estimate: ViT-B takes
    1.8 GB for a slice beside its weights (measured) and is said to take 1.9; for training it is not measured.

    Raises:
        ResourceError: MEMORY.
    """
    if sam.device.type != "cpu":
        return
    sizes = sam.sizes
    tokens = (sizes.image_size // sizes.token_size) ** 2
    attention = 4 * batch_size * sizes.num_heads * tokens**2
    maps = 4 * batch_size * tokens * (sizes.mlp_dim + 8 * sizes.embed_dim)
    needed = _TABLES_AT_WORK * attention + 2 * maps
    if training:
        needed = 2 * len(sizes.global_blocks) * attention + sizes.num_blocks * maps
    demand_ram(needed, sam.sam.source, work="encoding a slice",
               remedy="take a smaller SAM, a smaller --batch-size or a device with more memory")


_TABLES_AT_WORK = 2
"""Tables of tokens x tokens that live at once while the encoder reads one image."""


def _read_base(source: str | Path | None, began_with: SamSource | None) -> tuple[SamSource, dict[str, Tensor]]:
    where = source if source is not None else (began_with.source if began_with else "")
    try:
        state, digest = read_sam_state(where)
    except CheckpointError as error:
        if source is not None or error.code != "NO_SAM":
            raise
        raise CheckpointError("NO_SAM", where, "the SAM weights that the tuning began with are not there any more",
                              "name the place where they lie now: --sam PATH") from None
    if began_with and digest != began_with.sha256:
        raise CheckpointError("HASH", where, f"expected the SAM file with SHA-256 {began_with.sha256[:16]}..., got "
                              f"{digest[:16]}...", "name the SAM file that the tuning began with: --sam PATH")
    path = Path(where)
    return SamSource(str(path.resolve() if path.exists() else where), digest), whole_sam(state, str(where))


def _demand_names(got: set[str], expected: set[str], where: str) -> None:
    faults: list[Any] = [f"missing {name}" for name in sorted(expected - got)]
    faults += [f"unexpected {name}" for name in sorted(got - expected)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError("MISMATCH", where, f"expected the tensors of one SAM, {', '.join(faults[:3])}{more}",
                              "give an unchanged SAM or MedSAM file")
