"""How a device is named, without asking whether it is there."""

from __future__ import annotations

import re

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,2})?")


def is_device_name(text: str) -> bool:
    """Whether `text` is auto, cpu, mps, cuda or cuda:N."""
    return _DEVICE.fullmatch(text) is not None
