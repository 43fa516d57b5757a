"""Long forms borrow what the short ones of the rooms are made with."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOMS = ("badinput", "services/serve", "training", "export", "scans", "inference", "data")
sys.path[:0] = [str(TESTS / room) for room in ROOMS]
