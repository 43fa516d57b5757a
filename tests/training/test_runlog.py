"""The logs of a run that was stopped, killed and resumed read like those of a run that was not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autosam3d.training.runlog import STEP_COLUMNS, RunLog

VALUES = {"lr": 5e-4, "loss": 1 / 3, "dice_loss": 0.25, "ce_loss": 1 / 12, "grad_norm": 1.5, "seconds": 0.5,
          "data_wait": 0.1}


def write_steps(folder: Path, first_step: int, last_step: int) -> None:
    log = RunLog(folder, first_step)
    for step in range(first_step + 1, last_step + 1):
        log.step(step // 3, step, VALUES | {"loss": step / 7})
    log.close()


def validation(dice: float | None, step: int = 4) -> dict:
    return {"val_dice": 0.5, "val_dice_per_organ": {"liver": dice, "spleen": None}, "step": step}


def test_a_row_a_step(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 3)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(STEP_COLUMNS) and len(lines) == 4
    assert lines[1] == "0,1,0.0005,0.142857,0.25,0.0833333,,1.5,0.5,0.1"


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 8)
    whole = (tmp_path / "log.csv").read_text()
    write_steps(tmp_path, 5, 8)
    assert (tmp_path / "log.csv").read_text() == whole


@pytest.mark.parametrize("torn", ["2,7,0.000", "2,7,0.0005,1,0.25,0.0833333,1.5,0.5,0.", "2,7,0.0005\n", "\x00\x00\n",
                                  "epoch", "\n", "1,1000000,0.0005,1,0.25,0.0833333,1.5,0.5,0.1\n"])
def test_a_torn_tail_is_dropped(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, 0, 6)
    whole = (tmp_path / "log.csv").read_text()
    with (tmp_path / "log.csv").open("a") as file:
        file.write(torn)
    RunLog(tmp_path, 6).close()
    assert (tmp_path / "log.csv").read_text() == whole


@pytest.mark.parametrize("content", ["", "epoch,st"])
def test_a_torn_head_is_written_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.csv").write_text(content)
    write_steps(tmp_path, 0, 1)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(STEP_COLUMNS) and len(lines) == 2


def test_bytes_that_are_no_text_do_not_stop_a_run(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 2)
    with (tmp_path / "log.csv").open("ab") as file:
        file.write(b"\xff\xfe\x80\n")
    write_steps(tmp_path, 2, 3)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_validation_rows_and_absent_organs(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.validation(1, 4, validation(0.75))
    log.validation(2, 6, validation(None))
    log.close()
    assert (tmp_path / "validation.csv").read_text() == (
        "epoch,step,dice_mean,liver,spleen\n1,4,0.5,0.75,\n2,6,0.5,,\n")


def test_a_validation_that_is_done_again_has_one_row(tmp_path: Path) -> None:
    # Killed after the row was written and before the state was saved: the resumed run validates step 4 again.
    for _ in range(2):
        log = RunLog(tmp_path, 4)
        log.validation(1, 4, validation(0.75))
        log.close()
    assert (tmp_path / "validation.csv").read_text().count("\n") == 2


def test_tensorboard_has_each_step_once_after_resuming(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 3, 6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([s / 7 for s in range(1, 7)])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, enabled=False)
    log.step(0, 1, VALUES)
    log.validation(0, 1, validation(0.5))
    log.close()
    assert list(tmp_path.iterdir()) == []


def to_a_full_disk(path: Path) -> None:
    path.symlink_to("/dev/full")


def is_a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("fault", [to_a_full_disk, is_a_folder])
def test_what_cannot_be_written_is_told_once_and_stops_nothing(fault: Callable[[Path], None], tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    for name in ("log.csv", "validation.csv"):
        fault(tmp_path / name)
    (tmp_path / "tensorboard").touch()
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.step(0, step, VALUES)
        log.validation(0, step, validation(0.5))
    log.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all("cannot be written" in text and "goes on" in text for text in told)
    assert {Path(text.split(":")[0]).name for text in told} == {"log.csv", "validation.csv", "tensorboard"}


def test_a_row_is_whole_or_absent_and_rows_come_back_with_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    real = os.write
    log = RunLog(tmp_path, 0)
    log.step(0, 1, VALUES)

    def half(descriptor: int, content: bytes) -> int:
        if not content.startswith(b"0,2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content[:5])

    with monkeypatch.context() as patch:
        patch.setattr("autosam3d.training.runlog.os.write", half)
        log.step(0, 2, VALUES)
    log.step(0, 3, VALUES)
    log.close()
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == ["step", "1", "3"] and len(rows[2].split(",")) == len(STEP_COLUMNS)
    assert "log.csv: cannot be written (no space left on device)" in caplog.text
