"""Converters tell a developer of themselves; their user is spared it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*talkers: str) -> Iterator[None]:
    """No Python warnings, and of the loggers named here nothing below errors."""
    loggers = [logging.getLogger(name) for name in talkers]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Nothing at all on stdout and stderr of this process, not even of native code."""
    _flush()
    kept = {number: os.dup(number) for number in (1, 2) if _is_open(number)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        _flush()
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):  # a pipe that nobody reads
                stream.flush()


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
