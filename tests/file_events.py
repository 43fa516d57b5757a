"""The real command line, killed at the n-th time that it opens, renames or removes something below a folder."""

from __future__ import annotations

from pathlib import Path

import command_line

# Run in place of the command: counts what Python's audit events tell of a folder, and ends there as SIGKILL does.
_SCRIPT = """
import os, signal, sys
from pathlib import Path
from autosam3d.cli.main import main

folder, last, told = os.environ["SOAK_FOLDER"], int(os.environ["SOAK_LAST"]), Path(os.environ["SOAK_TOLD"])
count = 0

def seen(event, args):
    global count
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link") and any(
            isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(folder) for a in args[:2]):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(seen)
try:
    main()
finally:
    told.write_text(str(count))
"""


class FileEvents:
    """Of one command, whose arguments are the same each time."""

    def __init__(self, scratch: Path, folder: Path, *args: object) -> None:
        scratch.mkdir(exist_ok=True)
        self._script, self._told, self.folder, self.args = scratch / "events.py", scratch / "told", folder, args
        self._script.write_text(_SCRIPT)

    def run(self, last: int = 0, seconds: float = 120) -> command_line.Done:
        """Ended at the event number `last`; 0 lets it be."""
        return command_line.run(*self.args, script=self._script, seconds=seconds, env={
            "SOAK_FOLDER": str(self.folder), "SOAK_LAST": str(last), "SOAK_TOLD": str(self._told)})

    def count(self) -> int:
        """How many there were in the last run that came to its end."""
        return int(self._told.read_text())
