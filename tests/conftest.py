"""What several tests share: where the real scans lie, and a user's cache of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# What `segment` keeps in the user's cache stays out of it, and out of the next run of the tests.
CACHE = tempfile.TemporaryDirectory(prefix="autosam3d-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

REPO = Path(__file__).resolve().parents[1]
REAL_DATA = REPO.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CTs; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real CTs are not beside this checkout (../shared/data)")
    return REAL_DATA
