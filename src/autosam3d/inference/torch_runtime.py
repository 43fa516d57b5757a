"""PyTorch as a `Predictor`: a network on one device, with batches that shrink where memory runs out.

torch is imported when a predictor is built and not before, so that whoever runs an export does without it.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import ResourceError, UsageError
from autosam3d.inference.out_of_memory import ran_out_of_memory

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# The CPU kernels keep copies of tensors and weights in their own layout, and the allocator keeps what it has freed:
# resident growth measured was 1.04 (SwinUNETR 64^3), 1.28 (two convolutions 96^3), 1.54 (nnU-Net's network 96^3) and,
# less the 32 MiB that `memory` sets aside, 1.7 (AutoSAM vit_tiny 48^3) and 2.1 times (AutoSAM ViT-B 64^3, float32) the
# live tensors.
_KERNEL_FACTOR = 2.0


def pick_device(wish: str) -> str:
    """A PyTorch device that is there: "auto" takes the first CUDA device, else the CPU.

    Raises:
        UsageError: DEVICE, no such device here.
    """
    import torch

    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UsageError("DEVICE", wish, "expected auto, cpu, cuda, cuda:N or mps", "name one of these") from None
    count = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if device.type not in ("cpu", "cuda", "mps") or (device.type != "cpu" and (device.index or 0) >= count):
        there = ", ".join(f"{device.type}:{i}" for i in range(count)) or "no such device"
        raise UsageError("DEVICE", wish, f"expected a device that PyTorch can use here, it finds {there}",
                         "take auto or cpu" + (" (for a GPU, its driver and a CUDA build of PyTorch must be installed)"
                                               if device.type == "cuda" and not count else ""))
    return str(device)


def bf16_in_hardware(device_type: str) -> bool:
    """Whether "cuda" or "cpu" multiplies bf16 in hardware: NVIDIA from Ampere on, x86 with AVX512-BF16 or AMX-BF16.

    Measured on a CPU with AVX512-BF16: AutoSam (vit_tiny, 32 x 64 x 64) predicts 1.6 to 1.9 times and trains 1.5 to
    2.5 times as fast as in float32; SwinUNETR at 96^3 takes 1.01 times as long. Labels change where organs tie.
    """
    import torch

    if device_type == "cpu":
        # Older versions of torch cannot say; they stay with float32.
        features = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return device_type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)


class TorchPredictor:
    """A PyTorch network, in eval mode on one device.

    Args:
        network: [B, 1, D, H, W] to logits [B, K, D, H, W]; moved to `device` and put into eval mode.
        patch_size: (z, y, x).
        device: "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", "bf16" autocast, or "auto": bf16 where `bf16_in_hardware`. The softmax is always float32.
        num_outputs: K; None asks the network's `spec`.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        patch_size: Size,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        num_outputs: int | None = None,
    ) -> None:
        import torch

        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision: expected auto, fp32 or bf16, got {precision!r}")
        self.patch_size = patch_size
        self.num_outputs: int = num_outputs or network.spec.num_outputs  # type: ignore[union-attr, assignment]
        self.device = torch.device(device)
        auto = "bf16" if bf16_in_hardware(self.device.type) else "fp32"
        self.precision = auto if precision == "auto" else precision
        self._network = network.to(self.device).eval()
        self._batch_limit: int | None = None
        self._activation_bytes: dict[int, int] = {}

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32.

        A batch that does not fit is halved, and later batches stay at that size.

        Raises:
            ResourceError: MEMORY, a single patch does not fit.
        """
        import torch

        while True:
            size = min(len(patches), self._batch_limit or len(patches))
            try:
                parts = [self._run(patches[i : i + size]) for i in range(0, len(patches), size)]
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                fault = str(error).splitlines()[0] if str(error) else "out of memory"
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if size == 1:
                raise ResourceError(
                    "MEMORY", str(self.device), f"one patch of {self.patch_size} voxels does not fit ({fault})",
                    "take a model with a smaller patch or a device with more memory",
                )
            self._batch_limit = size // 2
            _log.warning("a batch of %d patches does not fit on %s: going on with %d", size, self.device, size // 2)

    def _run(self, patches: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            ct = torch.from_numpy(np.ascontiguousarray(patches)).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = self._network(ct)
            expected = (len(patches), self.num_outputs, *patches.shape[2:])
            if tuple(logits.shape) != expected:
                raise ValueError(f"network: expected logits of shape {expected}, got {tuple(logits.shape)}")
            return torch.softmax(logits.float(), dim=1).cpu().numpy()

    def activation_bytes(self, batch_size: int) -> int:
        """Peak of live tensors of a forward pass on the CPU, found by running it on tensors without data."""
        if self.device.type != "cpu":
            return 0
        import torch

        if batch_size not in self._activation_bytes:
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                    peak = _peak_bytes(self._network, (batch_size, 1, *self.patch_size))
            except RuntimeError as error:
                # Networks that branch on values, or operators that have no dry run.
                _log.info("the memory of the network cannot be foreseen: %s", type(error).__name__)
                peak = 0
            self._activation_bytes[batch_size] = int(_KERNEL_FACTOR * peak)
        return self._activation_bytes[batch_size]


def _peak_bytes(network: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Most bytes of results alive at once in ``softmax(network(zeros(shape)))``; weights are counted where they are
    cast to another type."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Meter(TorchDispatchMode):
        live = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.count(leaf.untyped_storage())
            return result

        def count(self, storage: torch.UntypedStorage) -> None:
            if storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())

        def free(self, num_bytes: int) -> None:
            self.live -= num_bytes

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        torch.softmax(network(torch.zeros(shape)).float(), dim=1)
        return meter.peak
