"""Files with a few bytes other than they should be, drawn from a seed: what a careful reader must live through."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import make_nifti
import numpy as np
from make_series import series

from autosam3d.checkpoints.checkpoint import read_checkpoint
from autosam3d.errors import AutoSam3dError
from autosam3d.io import read_ct
from autosam3d.recipes.recipe import dump_recipe, load_recipe, recipe_from_dict
from command_line import contents, write_model
from mini_run import mini_recipe

SECONDS = 10.0
_ODD_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


@dataclass
class Lived:
    """What a reader did with many such files."""

    refused: dict[str, int] = field(default_factory=dict)
    """How often, by code."""
    accepted: int = 0
    surprises: list[str] = field(default_factory=list)
    """Each with the seed that makes it again: another exception, another exit code, a hang, a file left behind."""

    @property
    def count(self) -> int:
        return self.accepted + sum(self.refused.values()) + len(self.surprises)

    def __str__(self) -> str:
        return f"{self.count} files: {sum(self.refused.values())} refused with {len(self.refused)} codes, " \
               f"{self.accepted} read, {len(self.surprises)} surprises"


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """`content` after one to three small accidents; most lie at the beginning, where a format keeps its numbers."""
    for _ in range(int(random.integers(1, 4))):
        at = int(len(content) * random.random() ** float(random.choice([1.0, 4.0])))
        end = at + int(random.integers(1, 65))
        kind = str(random.choice(["bit", "cut", "gone", "twice", "noise", "filled", "number", "elsewhere"]))
        rest = b"" if kind == "cut" else content[end:]
        content = content[:at] + _replacement(kind, content, content[at:end], random) + rest
    return content


def _replacement(kind: str, content: bytes, middle: bytes, random: np.random.Generator) -> bytes:
    if kind in ("cut", "gone") or not middle:
        return b""
    if kind == "bit":
        index = int(random.integers(len(middle)))
        return middle[:index] + bytes([middle[index] ^ 1 << int(random.integers(8))]) + middle[index + 1 :]
    if kind == "number":
        width = int(random.choice([1, 2, 4, 8]))
        number = _ODD_NUMBERS[int(random.integers(len(_ODD_NUMBERS)))] % (1 << 8 * width)
        return (number.to_bytes(width, "little") + middle[width:])[: len(middle)]
    if kind == "elsewhere":
        other = int(random.integers(len(content)))
        return content[other : other + len(middle)]
    return {"twice": 2 * middle, "noise": random.bytes(len(middle)),
            "filled": bytes([int(random.choice([0, 0xFF, 0x20, 0x3A]))]) * len(middle)}[kind]


def try_niftis(folder: Path, seeds: range) -> Lived:
    """Changed before they are packed, so that the checksum is right; as packed files; and plain ones."""
    raw = make_nifti.nifti_bytes()
    lived = Lived()
    for seed in seeds:
        random = np.random.default_rng([1, seed])
        path = folder / ("ct.nii" if seed % 3 == 0 else "ct.nii.gz")
        if seed % 3 == 2:
            path.write_bytes(mutated(make_nifti.pack(raw), random))
        else:
            changed = mutated(raw, random)
            path.write_bytes(make_nifti.pack(changed) if seed % 3 else changed)
        _try(functools.partial(_demand_ct, path), lived, folder, f"NIfTI {seed}", {2, 3, 5})
        path.unlink()
    return lived


def try_series(folder: Path, seeds: range) -> Lived:
    """One of twelve slices is changed."""
    scan = series()(folder)
    slices = sorted(scan.iterdir())
    lived = Lived()
    for seed in seeds:
        random = np.random.default_rng([2, seed])
        path = slices[int(random.integers(len(slices)))]
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, random))
        _try(lambda: _demand_ct(scan), lived, folder, f"DICOM {seed}", {2, 3, 5})
        path.write_bytes(whole)
    return lived


def try_recipes(folder: Path, seeds: range) -> Lived:
    """A recipe that is taken in spite of all is one that can be written and read again."""
    whole = dump_recipe(mini_recipe()).encode()
    path = folder / "recipe.yaml"

    def read() -> None:
        recipe = load_recipe(path)
        assert recipe_from_dict(recipe.as_dict()) == recipe

    lived = Lived()
    for seed in seeds:
        path.write_bytes(mutated(whole, np.random.default_rng([3, seed])))
        _try(read, lived, folder, f"recipe {seed}", {2})
    return lived


def try_checkpoints(folder: Path, seeds: range) -> Lived:
    """JSON or weights are changed; what is taken must say the same as the whole one."""
    path = write_model(folder / "model") / "best.json"
    weights = path.parent / read_checkpoint(path).meta["weights"]["file"]
    whole = read_checkpoint(path)

    def read() -> None:
        found = read_checkpoint(path)
        assert found.meta == whole.meta and all(found.tensors[n].equal(t) for n, t in whole.tensors.items())

    lived = Lived()
    for seed in seeds:
        changed = (path, weights)[seed % 2]
        content = changed.read_bytes()
        changed.write_bytes(mutated(content, np.random.default_rng([4, seed])))
        _try(read, lived, folder, f"checkpoint {seed}", {4})
        changed.write_bytes(content)
    return lived


def _demand_ct(path: Path) -> None:
    volume = read_ct(path)
    assert volume.voxels_hu.ndim == 3 and volume.voxels_hu.size and np.isfinite(volume.voxels_hu).all()
    assert np.isfinite(volume.affine).all() and np.linalg.det(volume.affine[:3, :3]) != 0


def _try(read: Callable[[], None], lived: Lived, folder: Path, name: str, exit_codes: set[int]) -> None:
    before = set(contents(folder))
    try:
        with _within(SECONDS):
            read()
        lived.accepted += 1
    except AutoSam3dError as error:
        if error.exit_code in exit_codes and "\n" not in str(error):
            lived.refused[error.code] = lived.refused.get(error.code, 0) + 1
        else:
            lived.surprises.append(f"{name}: exit code {error.exit_code}, {error}")
    except Exception as error:
        lived.surprises.append(f"{name}: {type(error).__name__}: {error}")
    if set(contents(folder)) != before:
        lived.surprises.append(f"{name}: files appeared or went")


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
