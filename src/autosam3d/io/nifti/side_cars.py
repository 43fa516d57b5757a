"""The files beside a segmentation with names, colours and codes: for scripts, ITK-SNAP and 3D Slicer."""

from __future__ import annotations

import json
from pathlib import Path

from autosam3d.io.files import FileToWrite, bytes_to_write
from autosam3d.labels import LabelMap

_SNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
"""


def side_cars(folder: Path, stem: str, label_map: LabelMap) -> list[FileToWrite]:
    """``STEM.json``, ``STEM.labels.txt`` (ITK-SNAP) and ``STEM.ctbl`` (3D Slicer), ready for `atomic_write_all`."""
    contents = {".json": _json(label_map), ".labels.txt": _itk_snap(label_map), ".ctbl": _slicer(label_map)}
    return [bytes_to_write(folder / (stem + suffix), text.encode()) for suffix, text in contents.items()]


def _json(label_map: LabelMap) -> str:
    labels = [
        {"value": value, "name": name, "color_rgb": list(label_map.color(value)), "snomed_ct": label_map.snomed(value)}
        for value, name in label_map.by_index.items()
    ]
    organs = {str(value): name for value, name in label_map.by_index.items()}
    return json.dumps({"organs": organs, "labels": labels}, indent=1, ensure_ascii=False) + "\n"


def _itk_snap(label_map: LabelMap) -> str:
    """*Source* of the format: ITK-SNAP, Segmentation > Export Label Descriptions."""
    lines = []
    for value, name in label_map.by_index.items():
        r, g, b = label_map.color(value)
        lines.append(f'{value:5d} {r:5d}{g:5d}{b:5d}        1  1  1    "{_one_word(name)}"\n')
    return _SNAP_HEAD + "".join(lines)


def _slicer(label_map: LabelMap) -> str:
    """*Source* of the format: 3D Slicer, colour table files (.ctbl): value, name without blanks, R, G, B, A."""
    lines = [f"# {label_map.num_outputs} values\n", "0 background 0 0 0 0\n"]
    for value, name in label_map.by_index.items():
        r, g, b = label_map.color(value)
        lines.append(f"{value} {_one_word(name)} {r} {g} {b} 255\n")
    return "".join(lines)


def _one_word(name: str) -> str:
    """The name with characters that either format could misread replaced by `_`."""
    return "".join("_" if c.isspace() or c in "\"'#,;" or not c.isprintable() else c for c in name)
