"""A machine that lists folders in another order, in another language and time zone: what a command must not show."""

from __future__ import annotations

from pathlib import Path

_SHUFFLED = """
import os, random
order = random.Random(os.environ["SOAK_ORDER"])
real_listdir, real_scandir = os.listdir, os.scandir

def listdir(*path):
    names = real_listdir(*path)
    order.shuffle(names)
    return names

class scandir:
    def __init__(self, *path):
        with real_scandir(*path) as entries:
            self.entries = list(entries)
        order.shuffle(self.entries)
    def __iter__(self):
        return iter(self.entries)
    def __next__(self):
        return self.entries.pop()
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def close(self):
        pass

os.listdir, os.scandir = listdir, scandir
"""


def shuffled_listing(folder: Path, then: str = "") -> Path:
    """A Python file that shuffles what folders list, by the variable SOAK_ORDER, and then runs `then`."""
    path = folder / "sitecustomize.py"
    path.write_text(_SHUFFLED + then)
    return path


def other_place(index: int) -> dict[str, str]:
    """Variables of the index-th machine: language, time zone, hash seed, order of listings."""
    places = (("C.UTF-8", "UTC"), ("tr_TR.UTF-8", "Pacific/Kiritimati"), ("de_DE.UTF-8", "America/St_Johns"),
              ("C", "Asia/Kathmandu"))
    language, zone = places[index % len(places)]
    return {"LANG": language, "LC_ALL": language, "TZ": zone, "PYTHONHASHSEED": str(index), "SOAK_ORDER": str(index)}
