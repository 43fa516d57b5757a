"""Slips in ``dataset.json`` and ``splits_final.json``, each named as what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autosam3d.errors import VolumeError

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
_PARTS = ("train", "val")


def demand_version_2(index: Mapping[str, Any], where: Path) -> None:
    """Refuse version 1 of the layout; its left-over key ``modality`` beside ``channel_names`` is not used and no harm.

    Raises:
        VolumeError: DATASET.
    """
    if any(str(key).isdigit() for key in index["labels"]) or ("modality" in index and "channel_names" not in index):
        raise VolumeError("DATASET", where, "expected nnU-Net v2 (labels: name to number, and channel_names), got "
                          "version 1 or Decathlon", "convert it to version 2 first")


def demand_one_channel(index: Mapping[str, Any], where: Path) -> None:
    """Refuse anything but one channel.

    Raises:
        VolumeError: DATASET.
    """
    if index.get("channel_names") is None:
        raise VolumeError("DATASET", where, "expected channel_names with one channel, got none",
                          'write "channel_names": {"0": "CT"}')
    channels = index["channel_names"]
    if not isinstance(channels, dict) or len(channels) != 1:
        raise VolumeError("DATASET", where, f"expected channel_names with one channel, got {channels}",
                          'keep the CT channel only: {"0": "CT"}')


def demand_file_ending(index: Mapping[str, Any], where: Path) -> None:
    """Refuse a ``file_ending`` that is absent, misspelt or of files that are not read.

    Raises:
        VolumeError: DATASET.
    """
    ending, known = index.get("file_ending"), ", ".join(FILE_ENDINGS)
    if ending in FILE_ENDINGS:
        return
    if ending is None:
        raise VolumeError("DATASET", where, f"expected file_ending {known}, got none",
                          'write how the names of the images end: "file_ending": ".nii.gz"')
    meant = f".{ending.strip().lstrip('.').lower()}" if isinstance(ending, str) else ""
    if meant in FILE_ENDINGS:
        what = "without its dot" if f".{ending}" == meant else "spelt otherwise"
        raise VolumeError("DATASET", where, f'expected file_ending "{meant}", got "{ending}", {what}',
                          f'write "file_ending": "{meant}"')
    raise VolumeError("DATASET", where, f"expected file_ending {known}, got {ending!r}", "convert the files to NIfTI")


def demand_plain_labels(labels: Mapping[str, Any], where: Path) -> None:
    """Refuse a ``labels`` of ``dataset.json`` that is not one number for each organ, and 0 for background.

    Raises:
        VolumeError: LABELS, with the entry at fault.
    """
    for name, value in labels.items():
        if fault := _fault_of(value):
            what, remedy = fault
            raise VolumeError("LABELS", where, f'expected one number for each organ, got {what} for "{name}"', remedy)
    if "ignore" in labels:
        raise VolumeError("LABELS", where, "expected one number for each organ, got an ignore label",
                          "export plain labels: every voxel of every case belongs to one organ or to background")
    alike = [name for name in labels if name != "background" and name.strip().lower() == "background"]
    if alike and "background" not in labels:
        raise VolumeError("LABELS", where, f'expected the name "background" in lower case, got "{alike[0]}"',
                          f'write "background": {labels[alike[0]]}')
    if labels.get("background", 0) != 0 or 0 in [v for n, v in labels.items() if n != "background"]:
        raise VolumeError("LABELS", where, f"expected 0 to be background, got {dict(labels)}", "renumber the labels")
    values = [v for n, v in labels.items() if n != "background"]
    if len(set(values)) != len(values) or not all(0 < v < 65536 for v in values):
        raise VolumeError("LABELS", where, f"expected a positive number of its own for each organ, got {dict(labels)}",
                          "renumber the labels")


def fold_of(folds: Any, fold: int, path: Path) -> tuple[Sequence[str], Sequence[str]]:
    """(training names, validation names) of one fold in a parsed ``splits_final.json``.

    Raises:
        VolumeError: SPLITS.
    """
    if isinstance(folds, dict) and folds.keys() & set(_PARTS):
        raise VolumeError("SPLITS", path, "expected a list of folds, got one fold without the list around it",
                          'put it in brackets: [{"train": [names], "val": [names]}]')
    if not isinstance(folds, list):
        raise VolumeError("SPLITS", path, f"expected a list of folds, got {_kind(folds)}",
                          'write it: [{"train": [names], "val": [names]}]')
    if fold >= len(folds):
        raise VolumeError("SPLITS", path, f"expected a fold {fold}, got {len(folds)} folds", "name another fold")
    entry = folds[fold]
    if not isinstance(entry, dict):
        raise VolumeError("SPLITS", path, f"expected lists train and val in fold {fold}, got {_kind(entry)}",
                          'write each fold as {"train": [names], "val": [names]}')
    for part in _PARTS:
        names = entry.get(part)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            got = "none" if part not in entry else _kind(names) if not isinstance(names, list) else "other values in it"
            raise VolumeError("SPLITS", path, f"expected a list {part} of case names in fold {fold}, got {got}",
                              "correct the file, or delete it to split by dataset.val_share")
    return entry["train"], entry["val"]


def name_slip(unknown: Sequence[str], names: Sequence[str]) -> str:
    """What to do about names in a split that no case has: of files, or others."""
    for ending in ("_0000", *FILE_ENDINGS, *(f"_0000{e}" for e in FILE_ENDINGS)):
        if any(name.endswith(ending) and name.removesuffix(ending) in names for name in unknown):
            return f"write the names of cases, without {ending}"
    return "correct the file"


def _fault_of(value: Any) -> tuple[str, str] | None:
    """(what a label's value is, remedy) where it is no whole number."""
    if isinstance(value, bool):
        return f"{str(value).lower()}", "write its number"
    if isinstance(value, int):
        return None
    if isinstance(value, str):
        digits = value.strip()
        return f'the text "{value}"', f"write {digits} without quotation marks" if digits.isdigit() else \
            "write its number"
    if isinstance(value, float):
        whole = value == int(value) if abs(value) < 1e9 else False
        return f"the fraction {value}", f"write {int(value)} without a decimal point" if whole else "write its number"
    if isinstance(value, (list, tuple)):
        return "a region of several numbers", ("export plain labels: every voxel of every case belongs to one organ or "
                                               "to background")
    return _kind(value), "write its number"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
             float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "something else")
