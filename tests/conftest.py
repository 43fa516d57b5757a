"""What several tests share: where the real scans lie, and one thread per test process."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
REAL_DATA = REPO.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CTs; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real CTs are not beside this checkout (../shared/data)")
    return REAL_DATA
