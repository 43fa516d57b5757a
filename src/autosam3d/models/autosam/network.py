"""START HERE: AutoSAM Adapter, a 3D segmentation network grown from the 2D Segment Anything Model.

    ct ── image encoder ─┬─ neck ── F1 ──────────────┐
          (SAM blocks    ├─ neck ── F2 ──────────────┤
           + adapters)   ├─ neck ── F3 ──────────────┼── mask decoder ── logits
                         └─ neck ── F4 ── prompt ────┤   (multi-layer
                                          generator  │    aggregation)
    ct ──────────────────────────────────────────────┘

*Source*: "Auto-Prompting SAM for Mobile Friendly 3D Medical Image Segmentation" (arXiv:2308.14936).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from autosam3d.models.autosam.encoder import ImageEncoder, Neck
from autosam3d.models.autosam.mask_decoder import MaskDecoder
from autosam3d.models.autosam.prompt_generator import PromptGenerator
from autosam3d.models.spec import VITS, AutoSamSpec

if TYPE_CHECKING:
    from jaxtyping import Float


class AutoSam(nn.Module):
    """The whole network.

    Takes any batch size and any D, H, W that are multiples of `spec.token_size`; `spec.patch_size` is only what the
    depth positions and the number of prompt generator levels are built for.
    """

    def __init__(self, spec: AutoSamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.image_encoder = ImageEncoder(spec)
        # Without aggregation only the deepest stage is used: the other necks do not exist.
        used = range(4) if spec.aggregation else range(3, 4)
        self.necks = nn.ModuleDict({str(i): Neck(VITS[spec.vit].embed_dim, spec.neck_dim) for i in used})
        self.apg = (
            PromptGenerator(spec.neck_dim, spec.prompt_dim, spec.token_grid, spec.prompt_residual)
            if spec.prompt_generator
            else nn.Identity()
        )
        self.decoder = MaskDecoder(
            spec.neck_dim, spec.head_dim, spec.num_outputs, len(self.necks), spec.token_size,
            spec.fuse_stride, spec.full_res_refine,
        )

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"]:
        """Logits of background and organs at the CT's resolution.

        Raises:
            ValueError: the shape is not (B, 1, D, H, W) with sizes that are multiples of the token size.
        """
        self._check(ct)
        stages = self.image_encoder(ct)  # after the four tapped blocks
        *features, deepest = [neck(stages[int(i)]) for i, neck in self.necks.items()]
        prompt = self.apg(deepest)
        return self.decoder(features, prompt, ct)

    def _check(self, ct: Tensor) -> None:
        token = self.spec.token_size
        if ct.dim() != 5 or ct.shape[1] != 1 or any(n < t or n % t for n, t in zip(ct.shape[2:], token, strict=True)):
            raise ValueError(f"expected (B, 1, D, H, W) with D, H, W multiples of {token}, got {tuple(ct.shape)}")
