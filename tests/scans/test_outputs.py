"""What an output is: the one law of finished, begun and foreign files, and one report for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.io.output_formats import NIFTI, RTSTRUCT, SEG, SEG_LABELMAP, OutputFormat
from autosam3d.scans.outputs import Output, State, refuse_foreign
from killed import demand_killed, die


def identity_of(output: Output, **changes: Any) -> dict[str, Any]:
    settings = {"format": output.form.name, "zyx": (1, 2)}
    return {"input_sha256": "c" * 64, "recipe_sha256": "r" * 64, "settings": settings,
            **changes}


def state_of(output: Output, **changes: Any) -> State:
    return output.state(lambda: identity_of(output, **changes))


def writes(path: Path, text: str) -> Callable[[], dict[str, Any]]:
    def write() -> dict[str, Any]:
        path.write_text(text)
        return {"volumes_ml": {}}

    return write


def make(output: Output, text: str | None = None, **changes: Any) -> Output:
    output.write(identity_of(output, **changes), writes(output.path, text or f"labels of {output.path.name}"))
    return output


SIDE_BY_SIDE = [
    ("organs.nii.gz", NIFTI, "organs"), ("organs.nii", NIFTI, "organs.nii"), ("organs.dcm", SEG, "organs.seg"),
    ("organs.rtstruct.dcm", RTSTRUCT, "organs.rtstruct"), ("organs.map.dcm", SEG_LABELMAP, "organs.map.seg"),
]


@pytest.mark.parametrize(("name", "form", "stem"), [
    *SIDE_BY_SIDE, ("organs.seg.dcm", SEG, "organs.seg"), ("organs.seg.dcm", SEG_LABELMAP, "organs.seg"),
    ("organs.dcm", RTSTRUCT, "organs.rtstruct"), ("organs.dcm", SEG_LABELMAP, "organs.seg"),
    ("Organs.SEG.DCM", SEG, "Organs.SEG"), ("a.b.NII.GZ", NIFTI, "a.b"), ("CASE.seg.nii.gz", NIFTI, "CASE.seg"),
])
def test_the_files_beside_an_output_carry_its_form(name: str, form: OutputFormat, stem: str) -> None:
    output = Output(Path("out") / name, form)
    assert output.report == Path("out") / f"{stem}.report.json"
    assert output.preview == Path("out") / f"{stem}.png"


def test_all_forms_of_one_stem_lie_side_by_side(tmp_path: Path) -> None:
    outputs = [Output(tmp_path / name, form) for name, form, _ in SIDE_BY_SIDE]
    for output in outputs:
        assert state_of(output) == "absent"
        make(output)
    assert [state_of(output) for output in outputs] == ["finished"] * len(outputs)
    reports = [json.loads(output.report.read_text()) for output in outputs]
    assert [report["output"] for report in reports] == [output.path.name for output in outputs]
    assert len(list(tmp_path.iterdir())) == 2 * len(outputs)


def test_an_output_goes_through_its_states(tmp_path: Path) -> None:
    output = make(Output(tmp_path / "organs.nii.gz"))
    assert state_of(output) == "finished"
    assert state_of(output, input_sha256="other") == "foreign"
    output.path.write_text("corrected by hand")
    assert state_of(output) == "foreign"
    output.path.unlink()
    assert state_of(output) == "absent"

    def unreadable() -> dict[str, Any]:
        raise VolumeError("UNREADABLE", "ct.nii.gz", "cannot be read", "check the path")

    assert output.state(unreadable) == "absent"  # nothing is there to be compared
    make(output)
    assert output.state(unreadable) == "unreadable"
    for broken in ("", "[]", "{", "[" * 60000, '{"input_sha256": 1}'):
        output.report.write_text(broken)
        assert state_of(output) == "foreign"


@pytest.mark.parametrize("foreign", [None, "a person's labels"])
@pytest.mark.parametrize("moment", ["before the output", "after the output"])
def test_a_writer_that_is_killed_leaves_what_it_replaces_protected(
    tmp_path: Path, foreign: str | None, moment: str
) -> None:
    output = Output(tmp_path / "organs.nii.gz")
    if foreign is not None:
        output.path.write_text(foreign)

    def write() -> dict[str, Any]:
        if moment == "after the output":
            output.path.write_text("labels")
        die()

    demand_killed(lambda: output.write(identity_of(output), write))
    assert json.loads(output.report.read_text())["status"] == "writing"
    if moment == "after the output":
        assert state_of(output) == "begun"
    else:
        assert state_of(output) == ("absent" if foreign is None else "foreign")
    make(output)
    assert state_of(output) == "finished"


@pytest.mark.parametrize("foreign", [None, "a person's labels"])
def test_killed_again_and_again_it_is_still_this_work(tmp_path: Path, foreign: str | None) -> None:
    """What a killed process had written is ours for the next one, which may be killed before it replaces it."""
    output = Output(tmp_path / "organs.nii.gz")
    if foreign is not None:
        output.path.write_text(foreign)
    demand_killed(lambda: output.write(identity_of(output), lambda: die(output.path.write_text("labels"))))
    for _ in range(2):
        assert state_of(output) == "begun"
        demand_killed(lambda: output.write(identity_of(output), die))
    assert state_of(output) == "begun" and state_of(output, input_sha256="other") == "foreign"
    make(output)
    assert state_of(output) == "finished"


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_write_puts_the_report_back(tmp_path: Path, before: bool) -> None:
    output = Output(tmp_path / "organs.nii.gz")
    if before:
        make(output)
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full() -> dict[str, Any]:
        raise ResourceError("NO_SPACE", output.path, "the disk is full", "free some")

    with pytest.raises(ResourceError):
        output.write(identity_of(output, input_sha256="other"), full)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == there
    assert state_of(output) == ("finished" if before else "absent")


def test_two_names_of_one_report_are_refused_and_not_mixed_up(tmp_path: Path) -> None:
    """organs.seg.dcm as a batch names it, and organs.dcm as a SEG: their reports would have one name."""
    first = make(Output(tmp_path / "organs.seg.dcm", SEG))
    second = Output(tmp_path / "organs.dcm", SEG)
    assert second.report == first.report and state_of(second) == "foreign"
    with pytest.raises(UsageError) as caught:
        refuse_foreign({second: state_of(second)}, overwrite=False)
    assert caught.value.code == "OUTPUT_EXISTS"
    refuse_foreign({second: state_of(second)}, overwrite=True)
    assert state_of(first) == "finished"
    first.path.rename(second.path)  # a person renames an output: its report goes on telling of it
    assert state_of(second) == "finished"


def test_another_form_in_an_outputs_place_takes_the_old_report_away(tmp_path: Path) -> None:
    seg = make(Output(tmp_path / "organs.dcm", SEG))
    rtstruct = Output(seg.path, RTSTRUCT)
    assert state_of(rtstruct) == "foreign"
    make(rtstruct, "an RTSTRUCT")
    assert state_of(rtstruct) == "finished" and not seg.report.exists() and state_of(seg) == "foreign"


def test_label_tables_are_shared_by_one_recipe_alone(tmp_path: Path) -> None:
    packed, plain = Output(tmp_path / "organs.nii.gz"), Output(tmp_path / "organs.nii")
    (tmp_path / "organs.ctbl").write_text("of somebody")
    assert state_of(packed) == state_of(plain) == "foreign"
    make(packed)
    assert state_of(plain) == "absent" and state_of(plain, recipe_sha256="other") == "foreign"


# ------------------------------------------------------------------------------------------------ the version before


def old(output: Output, status: str = "finished") -> Output:
    """An output as the version before left it: its report has the name that all forms had in common."""
    make(output)
    report = json.loads(output.report.read_text())
    output.report.unlink()
    del report["output"]
    output.path.with_name("organs.report.json").write_text(json.dumps(report | {"status": status}))
    return output


@pytest.mark.parametrize(("name", "form"), [("organs.dcm", SEG), ("organs.dcm", RTSTRUCT), ("organs.nii", NIFTI)])
def test_a_report_under_the_old_name_is_recognised_by_its_hash(
    tmp_path: Path, name: str, form: OutputFormat
) -> None:
    output = old(Output(tmp_path / name, form))
    assert state_of(output) == "finished"
    assert state_of(output, input_sha256="other") == "foreign"
    packed = Output(tmp_path / "organs.nii.gz")
    assert state_of(packed) == "foreign"  # it would take the report away
    output.adopt_report()
    assert state_of(output) == "finished" and output.report.is_file()
    assert state_of(packed) == "absent"
    make(packed)
    assert state_of(output) == state_of(packed) == "finished"


def test_an_old_report_that_proves_nothing_is_not_believed(tmp_path: Path) -> None:
    assert state_of(old(Output(tmp_path / "organs.dcm", SEG), status="writing")) == "foreign"
    output = old(Output(tmp_path / "organs.dcm", SEG))
    output.path.write_text("corrected by hand")
    assert state_of(output) == "foreign"
