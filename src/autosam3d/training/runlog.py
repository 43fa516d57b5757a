"""What a training run leaves to read: CSV tables and TensorBoard events, cut back to the resumed step.

They say what the run does; what it makes are its checkpoints. So a row that cannot be written (a full disk, a folder of
another user) is lost with a warning, and never a reason to stop: a disk that is full for the checkpoints, too, is named
by the save.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autosam3d.errors import AutoSam3dError
from autosam3d.io.files import write_text_atomic

log = logging.getLogger(__name__)

STEP_COLUMNS = ("epoch", "step", "lr", "loss", "dice_loss", "ce_loss", "teacher_loss", "grad_norm", "seconds",
                "data_wait")


class RunLog:
    """``log.csv`` (a row a step), ``validation.csv`` (a row a validation) and ``tensorboard/``.

    Rows after `first_step` belong to work that a resumed run does again, so they are dropped at the start.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool = True) -> None:
        self._board: Any = None
        self._enabled = enabled
        self._told: set[Path] = set()
        self._steps, self._validation = folder / "log.csv", folder / "validation.csv"
        self._events = folder / "tensorboard"
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        for path in (self._steps, self._validation):
            with self._no_reason_to_stop(path):
                _cut(path, first_step)
        with self._no_reason_to_stop(self._events):
            # The event of `first_step` itself was written before the state was saved, and stays.
            self._board = SummaryWriter(str(self._events), purge_step=first_step + 1)

    def step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if not self._enabled:
            return
        row = {"epoch": epoch, "step": step, **values}
        with self._no_reason_to_stop(self._steps):
            _append(self._steps, STEP_COLUMNS, [row.get(name, "") for name in STEP_COLUMNS])
        names = ("loss", "dice_loss", "ce_loss", "teacher_loss", "lr", "data_wait")
        self._to_board(step, {f"train/{name}": values[name] for name in names if name in values})

    def validation(self, epoch: int, step: int, metrics: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        organs = metrics["val_dice_per_organ"]
        with self._no_reason_to_stop(self._validation):
            # A run that was killed between this row and the next save validates again: one row a step.
            _cut(self._validation, step - 1)
            _append(self._validation, ("epoch", "step", "dice_mean", *organs),
                    (epoch, step, metrics["val_dice"], *organs.values()))
        found = {f"validation/{name}": dice for name, dice in organs.items() if dice is not None}
        self._to_board(step, {"validation/dice": metrics["val_dice"], **found})

    def close(self) -> None:
        if self._board is not None:
            with self._no_reason_to_stop(self._events):
                self._board.close()

    def _to_board(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # of its writing thread, which has ended
            self._tell(self._events, error)
            self._board = None

    @contextmanager
    def _no_reason_to_stop(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tell(path, error)
        except AutoSam3dError as error:
            self._tell(path, error.__cause__ if isinstance(error.__cause__, OSError) else error)

    def _tell(self, path: Path, error: Exception) -> None:
        if path not in self._told:
            self._told.add(path)
            reason = error.strerror if isinstance(error, OSError) else None
            log.warning("%s: cannot be written (%s); the training goes on, and what it would say here is lost", path,
                        (reason or str(error)).lower())


def _append(path: Path, columns: Iterable[str], row: Iterable[Any]) -> None:
    """A row below `columns`, whole or not at all."""
    text = io.StringIO()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            _write(text, columns)
        _write(text, row)
        content = text.getvalue().encode()
        try:
            done = os.write(descriptor, content)
            if done < len(content):
                os.write(descriptor, content[done:])  # says why
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _write(file: io.StringIO, row: Iterable[Any]) -> None:
    csv.writer(file, lineterminator="\n").writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row)


def _cut(path: Path, last_step: int) -> None:
    """Keep the head and the rows up to `last_step`; a row torn by a kill goes too."""
    if not path.is_file() and not path.is_dir():  # absent, or a device, which never ends
        return
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    rows = list(csv.reader(line for line in lines if line.endswith("\n")))
    width = len(rows[0]) if rows else 0
    kept = rows[:1] + [r for r in rows[1:] if len(r) == width and r[1].isdecimal() and int(r[1]) <= last_step]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(kept)
    write_text_atomic(path, text.getvalue())
