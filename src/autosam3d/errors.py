"""Every failure that a user can cause or cure, as one tree:

    AutoSam3dError           exit code
    ├── UsageError           2   command line: paths that collide, a device that is absent
    │   ├── RecipeError      2   a recipe or an override
    │   └── MissingExtraError 2  an optional package is not installed
    ├── VolumeError          3   a scan, a label map or a dataset folder
    ├── CheckpointError      4   a model, a checkpoint or a SAM weight file
    ├── ResourceError        5   memory, disk, time
    └── BatchError           6   a folder was worked through and some cases failed

A message is three facts: what was expected, what was found, what to do. `cli` prints it as one line,
``error[CODE] where: fault; remedy``, and is the only module that turns it into an exit code.
A caller's own bug stays ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

from pathlib import Path


class AutoSam3dError(Exception):
    """A fault in three parts.

    Args:
        code: stable upper-case word for scripts, for example ``TRUNCATED``; of one exception class alone.
            docs/error-codes.md lists all of them.
        where: the file, key or option at fault.
        fault: what was expected and what was found, one sentence without a full stop.
        remedy: what the user can do, one sentence without a full stop.
    """

    exit_code = 1

    def __init__(self, code: str, where: str | Path, fault: str, remedy: str) -> None:
        self.code, self.where, self.fault, self.remedy = code, str(where), fault, remedy
        super().__init__(f"{where}: {fault}; {remedy}")

    def __reduce__(self) -> tuple:
        # Exceptions pickle by `args`, which here is the joined message: name the four parts instead, so that
        # an error crosses a process border whole.
        return type(self), (self.code, self.where, self.fault, self.remedy)


class UsageError(AutoSam3dError):
    """The command line asks for something that cannot be meant."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or a ``--set`` override is wrong."""


class MissingExtraError(UsageError):
    """An optional package is needed; the remedy names the extra."""


class VolumeError(AutoSam3dError):
    """A scan, a label map or a dataset folder is broken or not what it claims."""

    exit_code = 3


class CheckpointError(AutoSam3dError):
    """A model file is broken, of another architecture, or not safe to load."""

    exit_code = 4


class ResourceError(AutoSam3dError):
    """Not enough memory or disk; the message says how much is needed and how much there is."""

    exit_code = 5


class BatchError(AutoSam3dError):
    """A batch ran to its end and some cases failed."""

    exit_code = 6
