"""The JSON files of a dataset folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autosam3d.errors import VolumeError
from autosam3d.io.files import decoded

MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> Any:
    """What the file holds.

    Raises:
        VolumeError: DATASET, it cannot be read, is over 16 MiB or no JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VolumeError("DATASET", path, "expected at most 16 MiB of JSON, got more", "check the file")
        return json.loads(decoded(path.read_bytes()))
    except OSError as error:
        raise VolumeError("DATASET", path, f"cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise VolumeError("DATASET", path, f"not readable as JSON ({str(error).splitlines()[0]})",
                          "correct the file") from None
