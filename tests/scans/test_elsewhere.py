"""Folders listed in another order, another language and time zone: the same files, byte for byte."""

from __future__ import annotations

from pathlib import Path

from command_line import contents, mini_model, run
from elsewhere import other_place, shuffled_listing
from mini_run import write_mini_dataset

_MAIN = "\nfrom autosam3d.cli.main import main\nmain()\n"


def test_a_batch_is_the_same_files_on_another_machine(tmp_path: Path) -> None:
    scans = write_mini_dataset(tmp_path / "data") / "imagesTr"
    for path in sorted(scans.iterdir())[2:]:
        path.unlink()
    script = shuffled_listing(tmp_path, _MAIN)
    made = []
    for index in (0, 1):
        run("segment", mini_model(), scans, tmp_path / "out", "--overwrite", script=script,
            env=other_place(index)).demand_ok()
        made.append(contents(tmp_path / "out"))
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert made[0] == made[1] and len(made[0]) == 2 * 5 + 1
