"""What lies where labels go: whether it is finished, begun, foreign or not there, as the report beside it tells.

One output has one report, whose name carries the output's form, so that the forms of one scan lie side by side:

    organs.nii.gz      organs.report.json
    organs.nii         organs.nii.report.json
    organs.dcm         organs.seg.report.json or organs.rtstruct.report.json, by its form
    organs.seg.dcm     organs.seg.report.json, as in a folder of results

A report is written twice. Before the labels it says what they will be and what they replace; after them it says what
they are. So a process may be killed anywhere: its half-done output is recognised, and a file that it was to replace
and has not is protected as before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.io.files import remove_stale_temporaries, sha256_of, write_bytes_atomic, write_text_atomic
from autosam3d.io.output_formats import DICOM_FORMATS, NIFTI, OutputFormat

State = Literal["absent", "finished", "begun", "foreign", "unreadable"]
"""Of an output.

- absent: it is not there, and nothing that is not ours would be replaced beside it.
- finished: it is what this very work wrote, byte for byte.
- begun: this very work was writing it and was killed.
- foreign: it, or a file beside it, is somebody's: other work's, edited by hand, or not of this package.
- unreadable: what it is made from cannot be read any more, so nobody can say.
"""
ENDINGS = (".nii.gz", ".nii", ".dcm")
"""Of the names of scans and of outputs."""
REPORT = ".report.json"
_MAX_REPORT_BYTES = 1 << 20


def stem_of(path: Path) -> str:
    """The name of a scan or an output without its ending."""
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")
    return path.name[: len(path.name) - len(ending)]


@dataclass(frozen=True)
class Output:
    """One file of labels, and the files beside it."""

    path: Path
    form: OutputFormat = NIFTI

    @property
    def report(self) -> Path:
        """What was done, beside the output."""
        return self.beside(REPORT)

    @property
    def preview(self) -> Path:
        """A picture of it."""
        return self.beside(".png")

    def beside(self, ending: str) -> Path:
        """The file beside the output that is its alone, such as its report."""
        return self.path.with_name(self.side_stem + ending)

    @property
    def side_stem(self) -> str:
        """What the names of the files beside the output begin with."""
        return self._stem_as(self.form)

    def state(self, identity: Callable[[], Mapping[str, Any]], *, preview: bool = False) -> State:
        """Of what lies there now.

        Args:
            identity: what makes the output this one, as it goes into its report; equal values, equal labels. It is
                asked only where there is a report to compare it with, because it costs reading the input.
            preview: whether a picture goes beside the output.
        """
        if not self.path.exists():
            return "foreign" if self._has_strange_neighbours(identity, preview) else "absent"
        report = read_report(self.report)
        if not report or self._tells_of_another(report):
            report = read_report(self._old_report) if self._old_report != self.report else {}
            if report.get("status") != "finished":  # under a name that outputs shared, only the hash is a proof
                return "foreign"
        try:
            expected = _plain(identity())
        except (VolumeError, ResourceError):
            return "unreadable"
        if any(report.get(key) != value for key, value in expected.items()):
            return "foreign"
        output_sha256 = sha256_of(self.path)
        if report.get("status") == "writing":
            return "begun" if report.get("replaces_sha256") != output_sha256 else "foreign"
        # Labels that someone has corrected by hand are no longer ours.
        return "finished" if report.get("output_sha256") == output_sha256 else "foreign"

    def write(self, identity: Mapping[str, Any], write: Callable[[], Mapping[str, Any]]) -> None:
        """Announce the output in its report, have it written, and say in the report what it is.

        Args:
            identity: as in `state`.
            write: writes the file, whole or not at all, and what goes beside it; returns what else the report is to
                say.

        Raises:
            As `write`; the report is then what it was before, unless the output is there already.
        """
        remove_stale_temporaries(self.path.parent)
        replaced = _sha256_if_there(self.path)
        old_report = self.report.read_bytes() if self.report.is_file() else None
        facts = {**identity, "output": self.path.name}
        protected = replaced
        if replaced is not None and self.state(lambda: identity) == "begun":  # killed before: what is there is ours
            protected = read_report(self.report).get("replaces_sha256")
        _write_report(self.report, facts | {"status": "writing", "replaces_sha256": protected})
        try:
            findings = write()
        except BaseException:
            if _sha256_if_there(self.path) == replaced:
                _put_back(self.report, old_report)
            raise
        _write_report(self.report, facts | {**findings, "output_sha256": sha256_of(self.path), "status": "finished"})
        if replaced is not None:
            self._remove_reports_of(replaced)

    def adopt_report(self) -> None:
        """Give the report of a finished output its name, where the version before wrote it under a shared one."""
        if self._old_report != self.report and self._old_report.is_file() and not self.report.exists():
            with contextlib.suppress(OSError):  # it is recognised where it is, too
                self._old_report.rename(self.report)

    @property
    def _old_report(self) -> Path:
        """Where the version before wrote it: under one name for all forms."""
        return self.path.with_name(stem_of(self.path) + REPORT)

    def _stem_as(self, form: OutputFormat) -> str:
        if not form.is_dicom:
            return stem_of(self.path) if self.path.name.lower().endswith(".nii.gz") else self.path.name
        stem, kind = stem_of(self.path), form.ending_in_folder.removesuffix(".dcm")
        return stem if stem.lower().endswith(kind) else stem + kind

    def _has_strange_neighbours(self, identity: Callable[[], Mapping[str, Any]], preview: bool) -> bool:
        """Whether a file beside the output-to-be would be replaced that no run of ours has begun to write for it."""
        report = read_report(self.report)
        if self._tells_of_another(report):
            return True
        own = [self.report, *([self.preview] if preview else [])]
        tables = [self.path.with_name(stem_of(self.path) + ending) for ending in self.form.beside]
        if any(path.exists() for path in own) and not _is_ours(report):
            return True
        if not any(path.exists() for path in tables):
            return False
        for path in self._siblings():  # organs.nii and organs.nii.gz have their label tables in common
            if path.name.lower().endswith(self.form.endings) and _is_ours(
                    other := read_report(Output(path, self.form).report)):
                return other.get("recipe_sha256") != _plain(identity()).get("recipe_sha256")
        return not _is_ours(report)

    def _tells_of_another(self, report: Mapping[str, Any]) -> bool:
        """Whether a report that stands in this one's place is that of another output, which is there."""
        if not report:
            return False
        if isinstance(named := report.get("output"), str) and (name := Path(named).name):
            other = self.path.with_name(name)
            return other.name != self.path.name and other.exists() and not (
                self.path.exists() and other.samefile(self.path))
        return any(report.get("output_sha256") == sha256_of(path) for path in self._siblings())

    def _siblings(self) -> Iterator[Path]:
        """Files of the same stem that are there; in the version before they had their report in common."""
        for ending in ENDINGS:
            path = self.path.with_name(stem_of(self.path) + ending)
            if path.is_file() and path.name.lower() != self.path.name.lower():
                yield path

    def _remove_reports_of(self, replaced: str) -> None:
        """Reports under names of other forms that tell of the labels which this output has replaced."""
        names = {self.path.with_name(self._stem_as(form) + REPORT) for form in DICOM_FORMATS if self.form.is_dicom}
        for path in (names | {self._old_report}) - {self.report}:
            report = read_report(path)
            if report.get("output_sha256") == replaced and not self._tells_of_another(report):
                path.unlink(missing_ok=True)


def refuse_foreign(states: Mapping[Output, State], overwrite: bool) -> None:
    """Refuse work that would replace what is not its own.

    Raises:
        UsageError: OUTPUT_EXISTS, where an output is foreign and `overwrite` does not allow it.
    """
    foreign = [output for output, state in states.items() if state == "foreign"]
    if foreign and not overwrite:
        raise UsageError("OUTPUT_EXISTS", foreign[0].path, "it, or a file that goes beside it, exists and is not of "
                         f"this model, scan and settings ({len(foreign)} of {len(states)} outputs)",
                         "choose another folder or allow --overwrite")


def read_report(path: Path) -> dict[str, Any]:
    """Empty where there is none that can be understood."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_REPORT_BYTES:
            report = json.loads(path.read_text("utf-8"))
            return report if isinstance(report, dict) else {}
    return {}


def _is_ours(report: Mapping[str, Any]) -> bool:
    return "input_sha256" in report


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read: tuples are lists."""
    return json.loads(json.dumps(identity))


def _sha256_if_there(path: Path) -> str | None:
    return sha256_of(path) if path.exists() else None


def _put_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_bytes_atomic(path, content)


def _write_report(path: Path, content: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")
