import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "badinput"))

# Elsewhere than beside a checkout, AUTOSAM3D_TEST_DATA names the folder.
_DATA = Path(os.environ.get("AUTOSAM3D_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real CT scans, which is not part of the repository."""
    if not _DATA.is_dir():
        pytest.skip("no real CT at ../shared/data")
    return _DATA.resolve()
