import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
for folder in (TESTS / "badinput", TESTS / "pacs"):
    sys.path.insert(0, str(folder))
