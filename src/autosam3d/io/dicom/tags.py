"""Values of DICOM tags, checked: a number is there and finite, or the slice is refused."""

from __future__ import annotations

import hashlib
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from autosam3d.errors import MissingExtraError, VolumeError

try:
    from pydicom import config
    from pydicom.errors import InvalidDicomError
except ImportError:
    raise MissingExtraError("MISSING_EXTRA", "DICOM", "reading DICOM needs pydicom, which is not installed",
                            'pip install "autosam3d[dicom]"') from None

# Errors that pydicom and its decoders raise on damaged bytes; they have no common base class.
DAMAGE = (InvalidDicomError, AttributeError, EOFError, IndexError, KeyError, NotImplementedError, OverflowError,
          RuntimeError, TypeError, UnicodeError, ValueError, struct.error)
_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "libjpeg", "highdicom")
_REMEDY = "export the series again, whole"
_MAX_MAGNITUDE = 1e6


def tag_numbers(dataset: Any, keyword: str, count: int, where: str) -> np.ndarray:
    """float64 [count].

    Raises:
        VolumeError: TAG_MISSING; TAG_INVALID for another count, text, NaN, or a magnitude that no geometry has.
    """
    try:
        value = dataset.get(keyword)
        if value is None or value == "" or (not isinstance(value, (int, float, str)) and len(value) == 0):
            raise VolumeError("TAG_MISSING", where, f"expected {keyword}, got none", _REMEDY)
        numbers = np.atleast_1d(np.asarray(value, float))
    except DAMAGE:
        numbers = np.array([])
    if numbers.shape != (count,) or not (np.abs(numbers) <= _MAX_MAGNITUDE).all():
        raise VolumeError("TAG_INVALID", where, f"expected {count} plausible numbers in {keyword}", _REMEDY)
    return numbers


def tag_integer(dataset: Any, keyword: str, where: str, default: int | None = None) -> int:
    """Raises as `tag_numbers`, where there is no `default`."""
    if default is not None and tag_text(dataset, keyword) == "":
        return default
    return int(tag_numbers(dataset, keyword, 1, where)[0])


def tag_text(dataset: Any, keyword: str) -> str:
    """Text of a tag that geometry does not depend on: damaged text counts as empty."""
    try:
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip()
    except DAMAGE:
        return ""


def hashed(identifier: str) -> str:
    """A short hash that stands for a UID or a patient number."""
    return hashlib.sha256(identifier.strip().encode(errors="replace")).hexdigest()[:8]


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence pydicom and its decoders inside: their warnings and logs repeat tag values, which may name patients."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)  # the loggers below them inherit it
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
