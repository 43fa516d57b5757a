"""What the command line shows on stderr: progress bars where it is a terminal, and log messages a line each."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

_MAX_WORD = 400


def one_line(text: str) -> str:
    """Text as one line of a terminal: no line ends, no control or direction marks, no endless file name."""
    text = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:150]}...{word[0][-150:]}", text)


def say(text: str, err: bool = False) -> None:
    """A line about work that is done and kept elsewhere: lost where it cannot be written, as on a full disk."""
    stream = sys.stderr if err else sys.stdout
    try:
        stream.write(text + "\n")
        stream.flush()
    except OSError:
        to_nowhere(stream.fileno())


def to_nowhere(number: int) -> None:
    """Let a stream of this process that cannot be written take what is left in it."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)


def open_streams() -> None:
    """Open the streams that this process was started without (``2>&-``), to nowhere: else the next file that is opened
    is the stream's, and gets its words."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, stream_number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(stream_number, "w", encoding="utf-8", closefd=False))


def give_up_stderr() -> None:
    """At the end of the process: words that could not be written are not tried again, and change no exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        to_nowhere(2)


class LogToStderr(logging.Handler):
    """A line a message, whatever a library puts into it. Progress bars stand in for stderr while they are shown, so
    it is looked up each time."""

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self._debug = debug
        if not debug:
            warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}"

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) if self._debug else one_line(record.getMessage())
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{record.levelname}: {text}\n")


def progress_bars() -> Progress:
    """Progress bars with the time left, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Bystander(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the process, and send stdout to nowhere, where nobody reads stderr any more."""
            self.quiet = True

    console = Bystander(stderr=True)
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                    TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
                    disable=not console.is_terminal)


def on_task(bars: Progress, task: Any) -> Callable[[int, int], None]:
    """What a step calls with (done, total) to move its bar."""
    return lambda done, total: bars.update(task, completed=done, total=total)


class TrainingView:
    """Bars for the stages of training, and its messages above them."""

    def __init__(self) -> None:
        self.bars = progress_bars()
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> TrainingView:
        with contextlib.suppress(OSError):
            self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self.bars.stop()

    @property
    def observer(self) -> Any:
        from autosam3d.training.train import Observer

        return Observer(on_cache=self._on("preparing cases"), on_teacher=self._on("teacher's probabilities"),
                        on_validation=self._on("validating"),
                        on_step=self._on_step, on_message=self._on_message)

    def task(self, name: str, done: int, total: int) -> None:
        """Show `done` of `total` on the bar `name`, which is made at its first use."""
        if name not in self._tasks or (self.bars.tasks[self._tasks[name]].finished and done < total):
            self._tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self._tasks[name], completed=done, total=total)

    def _on(self, name: str) -> Any:
        return lambda done, total: self.task(name, done, total)

    def _on_message(self, text: str) -> None:
        self.bars.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def _on_step(self, done: int, total: int, values: Any) -> None:
        self.task("training", done, total)
        self.bars.update(self._tasks["training"], description=f"training, loss {values['loss']:.3f}")


class BatchView:
    """Two bars: scans, and windows of the scan at work; or cases and slices, where the work is called so."""

    def __init__(self, bars: Progress, scans: str = "scans", windows: str = "windows") -> None:
        self.bars, self._name = bars, scans
        self._scans = bars.add_task(scans, total=None)
        self._windows = bars.add_task(windows, total=None)

    def on_scan(self, done: int, total: int, name: str) -> None:
        self.bars.update(self._scans, completed=done, total=total,
                         description=one_line(f"{self._name}: {name}") if name else self._name)

    def on_window(self, done: int, total: int) -> None:
        self.bars.update(self._windows, completed=done, total=total)
