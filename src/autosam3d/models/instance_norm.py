"""Instance norm and leaky ReLU in one, made for long training on CPUs."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autosam3d.models.dry_run import is_dry


def norm_leaky(x: Tensor, slope: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Instance norm, then leaky ReLU. Statistics are in float32 or float64 whatever x is.

    Over 128^3 voxels of float32 the result on a CPU is exact to 1e-6, wherever the map's mean lies.

    A map of one voxel becomes 0 (or `bias`), where PyTorch refuses.

    Args:
        x: (B, C, d, h, w).
        slope: of the negative side; 1 leaves the ReLU out.
        weight, bias: (C,), both or neither.

    Returns:
        The shape and dtype of x; in channels_last_3d on a CPU.
    """
    if x.device.type == "cpu" and not torch.compiler.is_exporting():
        return cast(Tensor, _NormLeaky.apply(x, slope, weight, bias))
    size = x.shape[2:]
    if size.numel() == 1:
        x = x - x.detach() if bias is None else (x - x.detach()) + bias[:, None, None, None]
    elif torch.onnx.is_in_onnx_export() and size.numel() >= _MANY and all(n % 4 == 0 for n in size):
        x = _pooled_norm(x, weight, bias)
    else:
        x = F.instance_norm(x, weight=weight, bias=bias)
    return x if slope == 1 else F.leaky_relu(x, slope)


_MANY = 1 << 18
"""Voxels from which on an exported norm sums in two steps: 64^3. Smaller maps are not what makes the error."""


def _pooled_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Instance norm in two steps of summing, for ONNX.

    OpenVINO adds up a channel's voxels one by one: at 96^3 the norm after two convolutions is off by 1.2e-3 (and
    ONNX Runtime's by 7e-5). With blocks of 4x4x4 averaged first it is 2e-5 (and 4e-6).
    """
    x = x - F.avg_pool3d(x, 4).mean((2, 3, 4), keepdim=True)
    scale = torch.rsqrt(F.avg_pool3d(x * x, 4).mean((2, 3, 4), keepdim=True) + eps)
    if weight is None or bias is None:
        return x * scale
    return x * (scale * weight[:, None, None, None]) + bias[:, None, None, None]


class _NormLeaky(torch.autograd.Function):
    """`norm_leaky` for a channels_last_3d map on a CPU.

    PyTorch's instance norm leaves that layout, and its batch norm over one sample, which keeps it, adds up float32
    one by one: over 64^3 voxels the result is off by 2e-4. Here a row is as wide as W and C together, which fills
    the vector registers whatever C is, and a few rows at a time stay in the processor's cache from step to step.
    Without weights only the result is kept for the backward pass: it tells what came in.
    """

    MAX_ROWS = 1 << 17
    """Entries at a time: 512 KB of float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
    ) -> Tensor:
        batch, dim, *size = x.shape
        x = _rows(x)
        affine = None if weight is None or bias is None else (_widen(weight, x), _widen(bias, x))
        result = torch.empty_like(x)
        normed = result if affine is None else torch.empty_like(x)
        scales = []
        for sample, sample_normed, sample_result in zip(x, normed, result, strict=True):
            sums, squares = [rows.sum(0, dtype=_sum_type(x)) for rows in _split(sample)], []
            exact_mean = _channel_sum(sums, dim) / (sample.numel() // dim)
            mean = _widen(exact_mean, x)
            for rows, y in zip(_split(sample), _split(sample_normed), strict=True):
                torch.sub(rows, mean, out=y)
                squares.append((y * y).sum(0, dtype=_sum_type(x)))
            scale = torch.rsqrt(_channel_sum(squares, dim) / (sample.numel() // dim) + eps)
            scales.append(_widen(scale, x))
            # What rounding took from the mean: of a map far from 0 most of the error.
            rest = _widen((exact_mean.to(x.dtype) - exact_mean) * scale, x)
            for y, out in zip(_split(sample_normed), _split(sample_result), strict=True):
                torch.addcmul(rest, y, scales[-1], out=y)
                if affine is not None:
                    torch.addcmul(affine[1], y, affine[0], out=out)
                if slope != 1:
                    F.leaky_relu_(out, slope)
        ctx.slope, ctx.dim = slope, dim
        ctx.save_for_backward(normed, torch.stack(scales), *(affine or (None, None)))
        return result.view(batch, *size, dim).permute(0, 4, 1, 2, 3)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        normed, scales, weight, bias = ctx.saved_tensors
        batch, dim, *size = grad.shape
        grad = _rows(grad)
        grad_x = torch.empty_like(grad)
        sums, products = [], []
        for kept, grad_out, grad_in, scale in zip(normed, grad, grad_x, scales, strict=True):
            parts = [[], []]
            for y, g in zip(_split(kept), _split(grad_out), strict=True):
                y, g = _NormLeaky._before_relu(y, g, ctx.slope, weight, bias)
                parts[0].append(g.sum(0, dtype=_sum_type(grad)))
                parts[1].append((g * y).sum(0, dtype=_sum_type(grad)))
            sums.append(_channel_sum(parts[0], dim))
            products.append(_channel_sum(parts[1], dim))
            num_voxels = kept.numel() // dim
            mean, along = _widen(sums[-1] / num_voxels, grad), _widen(products[-1] / num_voxels, grad)
            scale = scale if weight is None else scale * weight
            for y, g, part in zip(_split(kept), _split(grad_out), _split(grad_in), strict=True):
                y, g = _NormLeaky._before_relu(y, g, ctx.slope, weight, bias)
                torch.sub(g, mean, out=part)
                part.addcmul_(y, along, value=-1).mul_(scale)
        grad_x = grad_x.view(batch, *size, ctx.dim).permute(0, 4, 1, 2, 3)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, None, *(torch.stack(each).sum(0).to(weight.dtype) for each in (products, sums))

    @staticmethod
    def _before_relu(
        kept: Tensor, grad: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The normalised map and the gradient after weight and bias."""
        if slope == 1:
            return kept, grad
        if weight is None:
            return torch.minimum(kept, kept / slope), torch.ops.aten.leaky_relu_backward(grad, kept, slope, True)
        before = torch.addcmul(cast(Tensor, bias), kept, weight)
        return kept, torch.ops.aten.leaky_relu_backward(grad, before, slope, False)


def _rows(x: Tensor) -> Tensor:
    """(B, C, d, h, w) to (B, d*h, w*C)."""
    batch, dim, d, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(batch, d * h, w * dim)


def _split(rows: Tensor) -> tuple[Tensor, ...]:
    parts = rows.split(max(1, _NormLeaky.MAX_ROWS // rows.shape[1]))
    return parts[:1] if is_dry(rows) else parts


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _channel_sum(sums: list[Tensor], dim: int) -> Tensor:
    """From sums over some rows each, (w*C), to the sum per channel, (C), in float64: a few thousand numbers."""
    return torch.stack(sums).double().sum(0).view(-1, dim).sum(0)


def _widen(values: Tensor, rows: Tensor) -> Tensor:
    """(C) to (w*C), as wide as `rows` and of its dtype."""
    return values.to(rows.dtype).repeat(rows.shape[-1] // len(values))
