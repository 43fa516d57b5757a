"""A dataset as nnU-Net wants it: its raw folder, made of links to ours, and a fingerprint of the cases."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosam3d.data.folder import Case, CaseSet, open_without_recipe
from autosam3d.io.files import decoded, write_text_atomic

_DEFAULT_ID = 501


@dataclass(frozen=True)
class NnunetData:
    """A dataset that nnU-Net can take.

    Attributes:
        name: ``DatasetNNN_NAME``, nnU-Net's name for it.
        organs: label to organ, 1, 2, 3, ...
        ending: of the files.
    """

    cases: CaseSet
    organs: dict[int, str]
    ending: str
    name: str

    @property
    def number(self) -> int:
        return int(self.name[7:10])

    def fingerprint(self) -> str:
        """SHA-256 of organs, parts, names and file sizes; the files themselves are not read."""
        digest = hashlib.sha256(json.dumps([self.organs, self.ending]).encode())
        for part, cases in (("train", self.cases.train), ("val", self.cases.val), ("test", self.cases.test)):
            for case in cases:
                sizes = [path.stat().st_size for path in (case.image_path, case.label_path) if path is not None]
                digest.update(json.dumps([part, case.name, sizes]).encode())
        return digest.hexdigest()


def open_for_nnunet(folder: str | Path, fold: int) -> NnunetData:
    """`folder` checked; what is wrong with it raises as `data.folder.open_without_recipe` says."""
    cases, organs, ending = open_without_recipe(folder, fold)
    plain = re.sub(r"[^A-Za-z0-9]+", "", Path(folder).absolute().name) or "Cases"
    named = re.fullmatch(r"Dataset([0-9]{3})_(\w+)", Path(folder).absolute().name)
    return NnunetData(cases, organs, ending, named[0] if named else f"Dataset{_DEFAULT_ID}_{plain}")


def write_raw(data: NnunetData, folder: Path) -> Path:
    """nnU-Net's raw dataset below `folder`: links where the file system has them, else copies. Test scans stay outside.

    The splits are ours, so that the same cases validate; the channel is named CT, so that nnU-Net normalises as CT.
    """
    raw = folder / data.name
    for part in ("imagesTr", "labelsTr"):
        shutil.rmtree(raw / part, ignore_errors=True)
        (raw / part).mkdir(parents=True)
    for case in (*data.cases.train, *data.cases.val):
        link(case.image_path, raw / "imagesTr" / f"{case.name}_0000{data.ending}")
        assert case.label_path is not None
        link(case.label_path, raw / "labelsTr" / f"{case.name}{data.ending}")
    index: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {organ: value for value, organ in data.organs.items()},
        "numTraining": len(data.cases.train) + len(data.cases.val),
        "file_ending": data.ending,
    }
    splits = decoded((data.cases.folder / "splits_final.json").read_bytes())
    write_text_atomic(raw / "splits_final.json", splits)
    write_text_atomic(raw / "dataset.json", json.dumps(index, indent=1) + "\n")
    return raw


def scans_of(data: NnunetData, part: str) -> tuple[Case, ...]:
    """The cases of ``validation`` or ``test``."""
    return data.cases.val if part == "validation" else data.cases.test


def link(source: Path, target: Path) -> None:
    """`target` as a link to `source`, or as a copy where links cannot be."""
    try:
        target.symlink_to(source.absolute().resolve())
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)
