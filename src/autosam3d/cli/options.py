"""Options and small checks that several groups of commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from autosam3d.errors import UsageError
from autosam3d.inference.device_names import is_device_name
from autosam3d.inference.out_of_memory import memory_named

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe.")]
SetBoth = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe, "
                                                    "or set one of the keys named above.")]
SetKey = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the settings; "
                                                   "wins over --config. Repeat it for several.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings. Options win over "
                                              "--set, --set over the file.")]
Sam = Annotated[str | None, typer.Option("--sam", help="SAM weights: a .pth, .bin or .safetensors file, or a "
                                                       "Hugging Face id such as facebook/sam-vit-base.")]

Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Train another network its own way on the "
                                           "recipe's data: a preset (see autosam3d recipes), or a YAML file.")]


def _known_device(device: str) -> str:
    if not is_device_name(device.lower()):
        raise UsageError("USAGE", f"--device {device}", "expected auto, cpu, cuda or cuda:N", "name one of these")
    return device.lower()


def _known_threads(threads: int) -> int:
    if not 0 <= threads <= 1024:
        raise UsageError("USAGE", f"--threads {threads}", "expected 0 to 1024", "0 takes the cores of this process")
    return threads


def _known_tolerances(tolerances: list[float] | None) -> list[float] | None:
    for mm in tolerances or ():
        if not 0 <= mm < 1000:
            raise UsageError("USAGE", f"--tolerance {mm:g}", "expected 0 to 1000 mm", "try 1")
    return tolerances


def _known_transform(name: str | None) -> str | None:
    if name not in (None, "sform", "qform"):
        raise UsageError("USAGE", f"--prefer {name}", "expected sform or qform", "name one of these")
    return name


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", callback=_known_device)]
Threads = Annotated[int, typer.Option(help="CPU threads up to 1024; 0 takes the cores this process may use.",
                                      callback=_known_threads)]

Prefer = Annotated[str | None, typer.Option(help="sform or qform, where the two disagree.", callback=_known_transform)]
Tolerances = Annotated[list[float] | None, typer.Option("--tolerance", callback=_known_tolerances,
                                                        help="NSD tolerance in mm; repeat it for several.")]
AssumeRas = Annotated[bool, typer.Option("--assume-ras", help="Take axes as RAS where the file does not say.")]
Force = Annotated[bool, typer.Option("--force", help="Read files with implausible geometry or values.")]


def run_folder_outside(folder: Path, data: Path) -> Path:
    """`folder`, unless it lies in the dataset.

    Raises:
        UsageError: SAME_PATH.
    """
    if folder.absolute().resolve().is_relative_to(data.absolute().resolve()):
        raise UsageError("SAME_PATH", folder, "the run would be written into the dataset", "name a folder outside it")
    return folder


def cores(threads: int) -> int:
    """The threads asked for, or the cores that are ours."""
    count = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
    return count


def set_threads(threads: int) -> None:
    """Threads of torch and of the libraries below it."""
    count = cores(threads)
    with memory_named("autosam3d", "loading PyTorch", "give this process more memory"):
        import torch

    torch.set_num_threads(count if threads or "WORLD_SIZE" not in os.environ else int(os.environ["OMP_NUM_THREADS"]))
