"""From a dataset as it is downloaded to the nnU-Net v2 layout, with every case checked on the way.

Files that need no change are hard-linked, or copied where the file system cannot link. The work can be stopped and
taken up again: finished cases are noted in ``prepare.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d import io
from autosam3d.data.folder import held_out, write_index
from autosam3d.errors import AutoSam3dError, BatchError, ResourceError, UsageError, VolumeError
from autosam3d.io.files import atomic_write, remove_stale_temporaries, write_text_atomic
from autosam3d.io.folders import writable_folder
from autosam3d.io.grid import demand_same_grid
from autosam3d.labels import remap
from autosam3d.recipes.reading import Reading
from autosam3d.recipes.recipe import Recipe
from autosam3d.recipes.settings import Download

log = logging.getLogger(__name__)

JOURNAL = "prepare.json"
# Raise it when finished cases must be made anew.
JOURNAL_VERSION = 1


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared.

    Attributes:
        cases_with: organ to number of training (validation included) and test cases that show it.
        warnings: what a reader or a check found odd, one sentence each.
    """

    folder: Path
    num_train: int
    num_val: int
    num_test: int
    cases_with: dict[str, tuple[int, int]]
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """For the terminal."""
        width = max(len(organ) for organ in self.cases_with)
        rows = [f"  {organ:{width}} {train:5} {test:5}" for organ, (train, test) in self.cases_with.items()]
        return "\n".join([
            f"{self.folder}: {self.num_train} training, {self.num_val} validation, {self.num_test} test cases",
            f"  {'cases that show':{width}} train  test", *rows, *(f"warning: {w}" for w in self.warnings),
        ])


@dataclass(frozen=True)
class _Job:
    """One case of the download."""

    name: str
    image: Path
    label: Path | None
    part: str
    """"Tr" or "Ts"."""


def prepare_dataset(
    recipe: Recipe, source: str | Path, destination: str | Path, progress: Callable[[int, int], None] | None = None
) -> PrepareReport:
    """The download `source`, laid out anew in `destination` and split as the recipe says.

    Args:
        progress: called with (cases done, cases in all).

    Raises:
        UsageError: the recipe has no download section, or `destination` holds other files.
        VolumeError: `source` is not the download that the recipe describes, cases are missing, an organ is nowhere.
        BatchError: some cases are broken; the others are done and are not done again.
        ResourceError: `destination` cannot be written.
    """
    source, destination = Path(source), Path(destination)
    download = recipe.dataset.download
    if download is None:
        raise UsageError("NO_DOWNLOAD", f"recipe {recipe.name}", "it has no dataset.download section: the dataset is "
                         "used in the nnU-Net v2 layout as it is", "give the folder to autosam3d train --data")
    jobs = _find_jobs(recipe, download, source)
    journal = _open_journal(recipe, destination)
    faults: list[AutoSam3dError] = []
    for done, job in enumerate(jobs):
        if progress:
            progress(done, len(jobs))
        if _is_finished(journal["cases"].get(job.name), job, destination):
            continue
        try:
            journal["cases"][job.name] = _prepare_case(job, recipe, destination)
        except ResourceError:
            raise
        except AutoSam3dError as error:
            log.error("%s", error)
            faults.append(error)
            continue
        _write_journal(destination, journal)
    if progress:
        progress(len(jobs), len(jobs))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BatchError("FAILED_CASES", source, f"{len(faults)} of {len(jobs)} cases cannot be used; the first{more}: "
                         f"{faults[0]}", "replace these files and run the same command again, finished cases are kept")
    return _finish(recipe, download, jobs, journal["cases"], destination)


def _find_jobs(recipe: Recipe, download: Download, source: Path) -> list[_Job]:
    """Images and label maps of the download, paired by case id; nothing is opened yet."""
    def looks_wrong(fault: str) -> VolumeError:
        return VolumeError("DATASET", source, f"expected {recipe.dataset.title} as downloaded, {fault}",
                           "name the folder that looks like: " + " ".join(recipe.dataset.layout.split()))

    if not source.is_dir():
        raise looks_wrong("got no such folder")
    images, labels = _by_id(source, download.images, download), _by_id(source, download.labels, download)
    if not images or not labels:
        which = ("scan", download.images) if not images else ("label map", download.labels)
        raise looks_wrong(f"got no {which[0]} that fits {which[1]}")
    test_images: dict[str, Path] = {}
    test_labels: dict[str, Path] = {}
    if download.test_images:
        test_images = _by_id(source, download.test_images, download)
        test_labels = _by_id(source, download.test_labels, download) if download.test_labels else {}
        if not test_images:
            raise looks_wrong(f"got no test scan that fits {download.test_images}")
        if both := sorted(images.keys() & test_images.keys()):
            raise VolumeError("LEAK", source, f"expected test cases that are not for training, got {_few(both)}",
                              "take them out of one of the two")
    for some_images, some_labels in ((images, labels), (test_images, test_labels)):
        lonely, bare = sorted(some_labels.keys() - some_images.keys()), sorted(some_images.keys() - some_labels.keys())
        if lonely or (bare and some_labels):
            fault = f"got no scan for {_few(lonely)}" if lonely else f"got no label map for {_few(bare)}"
            raise VolumeError("PAIRING", source, f"expected every case with scan and label map, {fault}",
                              "download the missing files")
    test_ids = {*download.test_ids, *test_images}
    found = images.keys() | test_images.keys()
    if absent := sorted({*download.test_ids, *download.val_ids} - found):
        raise VolumeError("MISSING_CASES", source, f"expected the cases {_few(absent)}, got no such files",
                          "download the missing files")
    if download.num_cases is not None and len(found) < download.num_cases:
        raise VolumeError("MISSING_CASES", source, f"expected {download.num_cases} cases, got {len(found)}",
                          "download the rest, or say --set dataset.download.num_cases=null to go on without them")
    all_images, all_labels = images | test_images, labels | test_labels
    # Numbers in the order of numbers: 2 before 10.
    ids = sorted(found, key=lambda i: (int(i), i) if i.isdigit() else (0, i))
    return [_Job(f"{recipe.name}_{i}", all_images[i], all_labels.get(i), "Ts" if i in test_ids else "Tr") for i in ids]


def _by_id(source: Path, glob: str, download: Download) -> dict[str, Path]:
    """Case id to file."""
    found: dict[str, Path] = {}
    for path in sorted(source.glob(glob)):
        match = re.search(download.case_pattern, path.name)
        if not match or path.name.startswith(".") or not path.is_file():
            continue
        case = match.group(1)
        if download.id_range is not None and not (
            case.isdigit() and download.id_range[0] <= int(case) <= download.id_range[1]
        ):
            continue
        if case in found:
            raise VolumeError("DUPLICATE_FILE", path, f"expected one file for case {case}, got {found[case]} as well",
                              "take one of the two out, or name the folder above just one of them")
        found[case] = path
    return found


def _open_journal(recipe: Recipe, destination: Path) -> dict[str, Any]:
    """What an earlier call has done in `destination`; an empty folder is begun."""
    whole = recipe.as_dict()
    plan = {"version": JOURNAL_VERSION, "name": recipe.name, "organs": whole["labels"]["organs"],
            "download": whole["dataset"]["download"]}
    if recipe.reading != Reading():
        plan["reading"] = whole["reading"]
    # What the split is made of may change: it is written anew at the end, only its test part decides on folders.
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    path = destination / JOURNAL
    with writable_folder(destination):
        if destination.is_dir() and any(destination.iterdir()):
            try:
                journal = json.loads(path.read_text("utf-8"))
                same = journal["plan"] == digest and isinstance(journal["cases"], dict)
            except (OSError, ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise UsageError("OUTPUT_EXISTS", destination, "expected an empty folder or one that the same recipe "
                                 "began to prepare, got other files", "name a new folder")
            for folder in (destination, *(p for p in destination.iterdir() if p.is_dir())):
                remove_stale_temporaries(folder)
        else:
            journal = {"plan": digest, "recipe": recipe.name, "cases": {}}
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (destination / part).mkdir(parents=True, exist_ok=True)
    _write_journal(destination, journal)
    return journal


def _write_journal(destination: Path, journal: Mapping[str, Any]) -> None:
    write_text_atomic(destination / JOURNAL, json.dumps(journal, indent=1) + "\n")


def _targets(job: _Job, destination: Path) -> tuple[Path, Path]:
    return (destination / f"images{job.part}" / f"{job.name}_0000.nii.gz",
            destination / f"labels{job.part}" / f"{job.name}.nii.gz")


def _stamp(path: Path | None) -> list[int] | None:
    """Size and time of a file, to notice that it was replaced."""
    if path is None:
        return None
    try:
        return [path.stat().st_size, path.stat().st_mtime_ns]
    except OSError:
        return None


def _is_finished(record: Any, job: _Job, destination: Path) -> bool:
    image, label = _targets(job, destination)
    return isinstance(record, dict) and record.get("source") == [_stamp(job.image), _stamp(job.label)] and (
        record.get("target") == [_stamp(image), _stamp(label) if job.label else None]
    )


def _prepare_case(job: _Job, recipe: Recipe, destination: Path) -> dict[str, Any]:
    """Checks a case and puts it in its place; returns its entry in the journal."""
    image_target, label_target = _targets(job, destination)
    reading = recipe.reading.options()
    volume = io.read_ct(job.image, reading)
    notes = [f"{job.name}: {note}" for note in volume.warnings]
    organ_voxels: dict[str, int] = {}
    truth = written = None
    if job.label is not None:
        truth = io.read_segmentation(job.label, reading)
        notes += [f"{job.name}, labels: {note}" for note in truth.warnings]
        apart = demand_same_grid(truth, job.label, volume, "the scan")
        notes += [f"{job.name}, labels: {note}" for note in apart]
        table = _value_table(recipe)
        try:
            labels = remap(truth.labels, table)
        except KeyError as error:
            raise VolumeError("LABEL_RANGE", job.label, f"expected the values {sorted(table)}, got {error.args[0]}",
                              "correct the label map") from None
        organ_voxels = {o: int(np.count_nonzero(labels == value)) for value, o in recipe.labels.by_index.items()}
        if not any(organ_voxels.values()):
            notes.append(f"{job.name}: the label map is background everywhere")
        if not np.array_equal(labels, truth.labels):
            written = replace(truth, labels=labels, organs=dict(recipe.labels.by_index))
    if volume.source is not None and volume.source.kind == "nifti" and job.image.name.endswith(".nii.gz"):
        _place(job.image, image_target)
    else:
        # As it was stored: training adds the offset itself.
        io.write_ct(image_target, replace(volume, voxels_hu=volume.voxels_hu - np.float32(reading.offset)))
    if written is not None:
        io.write_segmentation(label_target, written, recipe.labels)
    elif truth is not None and job.label is not None and job.label.name.endswith(".nii.gz"):
        _place(job.label, label_target)
    elif truth is not None:
        io.write_segmentation(label_target, truth, recipe.labels)
    return {
        "source": [_stamp(job.image), _stamp(job.label)],
        "target": [_stamp(image_target), _stamp(label_target) if job.label else None],
        "voxels_sha256": hashlib.sha256(np.ascontiguousarray(volume.voxels_hu).data).hexdigest(),
        "organ_voxels": organ_voxels,
        "notes": notes,
    }


def _value_table(recipe: Recipe) -> dict[int, int]:
    """Value in the download to value of the recipe."""
    values = recipe.dataset.download.label_values if recipe.dataset.download else None
    if values is None:
        return {value: value for value in range(recipe.labels.num_outputs)}
    organs = {"background": 0} | {organ: value for value, organ in recipe.labels.by_index.items()}
    return {0: 0} | {value: organs[name] for value, name in values.items()}


def _place(source: Path, target: Path) -> None:
    """Hard link, or a copy where that cannot be; `target` is whole at every moment."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        os.link(source.resolve(), temporary)
        temporary.replace(target)
        # Renaming one link of a file over another one does nothing and leaves both.
        temporary.unlink(missing_ok=True)
    except OSError:
        temporary.unlink(missing_ok=True)
        atomic_write(target, lambda path: _copy(source, path), size_bytes=source.stat().st_size)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _finish(
    recipe: Recipe, download: Download, jobs: list[_Job], records: Mapping[str, Any], destination: Path
) -> PrepareReport:
    """Checks over the whole set, then the two index files."""
    seen: dict[str, str] = {}
    for job in jobs:
        digest = records[job.name]["voxels_sha256"]
        if digest in seen:
            raise VolumeError("DUPLICATE_SCAN", job.image, f"expected different scans, got the voxels of "
                              f"{seen[digest]} again in {job.name}", "take one of the two out of the download")
        seen[digest] = job.name
    cases_with: dict[str, tuple[int, int]] = {}
    warnings = [note for job in jobs for note in records[job.name]["notes"]]
    tested = any(job.part == "Ts" and job.label for job in jobs)
    for organ in recipe.labels.organs:
        train, test = (sum(records[job.name]["organ_voxels"].get(organ, 0) > 0 for job in jobs if job.part == part)
                       for part in ("Tr", "Ts"))
        cases_with[organ] = (train, test)
        if not train:
            raise VolumeError("ABSENT_ORGAN", destination, f"expected {organ} in some training case, got it in none",
                              "check dataset.download.label_values of the recipe, or drop the organ from it")
        if tested and not test:
            warnings.append(f"no test case shows {organ}")
    training = [job for job in jobs if job.part == "Tr"]
    empty = [job.name for job in training if not any(records[job.name]["organ_voxels"].values())]
    if 2 * len(empty) > len(training):
        raise VolumeError("EMPTY_LABELS", destination, f"expected organs in the label maps, got none in {len(empty)} "
                          f"of {len(training)} training cases", "check that these are the right label maps")
    names = [job.name for job in training]
    val = [f"{recipe.name}_{case}" for case in download.val_ids] or held_out(names, recipe.dataset.val_share)
    train = [name for name in names if name not in set(val)]
    write_index(destination, recipe.labels, train, val, description=recipe.dataset.title)
    num_test = sum(job.part == "Ts" for job in jobs)
    return PrepareReport(destination, len(train), len(val), num_test, cases_with, tuple(warnings))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
