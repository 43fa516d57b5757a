"""What a training run leaves to read: CSV tables and TensorBoard events, cut back to the resumed step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from autosam3d.errors import ResourceError
from autosam3d.io.files import write_text_atomic

STEP_COLUMNS = ("epoch", "step", "lr", "loss", "dice_loss", "ce_loss", "teacher_loss", "grad_norm", "seconds",
                "data_wait")


class RunLog:
    """``log.csv`` (a row a step), ``validation.csv`` (a row a validation) and ``tensorboard/``.

    Rows after `first_step` belong to work that a resumed run does again, so they are dropped at the start.

    Raises:
        ResourceError: LOG, the folder cannot be written to, here and in every method.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool = True) -> None:
        self._folder = folder
        self._steps: TextIO | None = None
        self._board = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._steps_path, self._validation_path = folder / "log.csv", folder / "validation.csv"
        _cut(self._steps_path, first_step)
        _cut(self._validation_path, first_step)
        with self._writable():
            self._steps = self._steps_path.open("a", newline="", buffering=1, encoding="utf-8")
            if self._steps_path.stat().st_size == 0:
                _write(self._steps, STEP_COLUMNS)
            # The event of `first_step` itself was written before the state was saved, and stays.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if self._board is None or self._steps is None:
            return
        row = {"epoch": epoch, "step": step, **values}
        with self._writable():
            _write(self._steps, [row.get(name, "") for name in STEP_COLUMNS])
            for name in ("loss", "dice_loss", "ce_loss", "teacher_loss", "lr", "data_wait"):
                if name in values:
                    self._board.add_scalar(f"train/{name}", values[name], step)

    def validation(self, epoch: int, step: int, metrics: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        organs = metrics["val_dice_per_organ"]
        # A run that was killed between this row and the next save validates again: one row a step.
        _cut(self._validation_path, step - 1)
        with self._writable():
            with self._validation_path.open("a", newline="", encoding="utf-8") as file:
                if file.tell() == 0:
                    _write(file, ("epoch", "step", "dice_mean", *organs))
                _write(file, (epoch, step, metrics["val_dice"], *organs.values()))
            self._board.add_scalar("validation/dice", metrics["val_dice"], step)
            for name, dice in organs.items():
                if dice is not None:
                    self._board.add_scalar(f"validation/{name}", dice, step)

    def close(self) -> None:
        with self._writable():
            if self._steps is not None:
                self._steps.close()
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError("LOG", self._folder, f"its logs cannot be written ({error.strerror or error})",
                                "free some space; the same command goes on from the last save") from None


def _write(file: TextIO, row: Iterable[Any]) -> None:
    csv.writer(file, lineterminator="\n").writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row)


def _cut(path: Path, last_step: int) -> None:
    """Keep the head and the rows up to `last_step`; a row torn by a kill goes too."""
    if not path.exists():
        return
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    rows = list(csv.reader(line for line in lines if line.endswith("\n")))
    width = len(rows[0]) if rows else 0
    kept = rows[:1] + [r for r in rows[1:] if len(r) == width and r[1].isdecimal() and int(r[1]) <= last_step]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(kept)
    write_text_atomic(path, text.getvalue())
