"""How a training run is asked to stop, and how its passes through the network listen."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Interrupted(Exception):
    """A stop was asked for: what is at work is given up, and the run is as it was before."""


class StopRequest:
    """SIGTERM, SIGINT, SIGHUP (the terminal went) and SIGUSR1 (a batch system's warning) ask for a stop.

    A signal is noted only, so that no update of the weights and no save is torn; those at work look for it: training
    at each module of the network (`stop_inside`) and after each step, validation after each window. While nothing is
    there to save (`at_once`), the signal itself raises `Interrupted`, wherever it meets the program.
    A second signal ends everything at once; the last save stays whole.

    Args:
        echo_s: what comes so soon after the first signal is the same request. Ctrl-C under `torchrun` reaches each
            process twice, from the terminal and from `torchrun`.
    """

    def __init__(self, echo_s: float = 0.0) -> None:
        self.signal: int | None = None
        """What asks for the stop; with several processes the same in all, once they have agreed."""
        self._echo_s = echo_s
        self._noted_at: float | None = None
        self._at_once = False

    def demand_none(self) -> None:
        """Raise `Interrupted` where a stop was asked for."""
        if self.signal is not None:
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` by itself."""
        self._at_once = True
        try:
            self.demand_none()
            yield
        finally:
            self._at_once = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        # Who started it with `nohup` wants it to outlive the terminal.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._noted_at is not None:
            if now - self._noted_at < self._echo_s:
                return
            raise KeyboardInterrupt
        self._noted_at = now
        if self.signal is None:  # else another process was faster
            self.signal = number
        if self._at_once:
            raise Interrupted


def stop_inside(network: nn.Module, stop: StopRequest) -> None:
    """Let a stop end a pass through `network`, forward or backward, at the next module.

    A step of a large network on a CPU can take longer than the ten seconds that a batch system grants, and its
    backward pass is one call, in which Python runs no signal handler. A hook on each module's output is the moment
    at which it does. No hook lies between the gradients and the end of a step, so weights change whole or not.
    """

    def look(*_: object) -> None:
        stop.demand_none()

    def after_forward(module: nn.Module, arguments: object, output: object) -> None:
        stop.demand_none()
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.register_hook(look)

    for module in network.modules():
        module.register_forward_hook(after_forward)
