"""T17 beside an archive: ledger, log, work folder and status name no patient; what goes back carries the list alone."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("highdicom", reason="the dicom extra is not installed")
pytest.importorskip("requests", reason="the pacs extra is not installed")

import canaries
import driver
import make_dicom as bad
import pydicom
from test_pacs_faults import FakeArchive, archive  # noqa: F401

from autosam3d.cli.pacs import status
from autosam3d.errors import AutoSam3dError

FAULTS = ("cut", "html", "other study", "slice missing", "not stored", "500", "401")
BROKEN = ("46_cut_in_pixels", "47_two_missing", "51_half_across", "53_very_uneven", "55_no_pixel_spacing",
          "57_no_rescale", "58_mixed_size", "59_unknown_syntax", "60_broken_fragments", "62_nested", "63_forged_rows",
          "66_colour", "69_bad_number")


class Named(FakeArchive):
    """An archive whose answers are full of names, errors among them."""

    bodies: list[bytes]

    def json(self, tree: object) -> None:
        marked = [one | {"00100010": {"vr": "PN", "Value": [{"Alphabetic": canaries.DICOM["PatientName"]}]},
                         "0008103E": {"vr": "LO", "Value": [canaries.DICOM["SeriesDescription"]]},
                         "00080050": {"vr": "SH", "Value": [canaries.DICOM["AccessionNumber"]]}}
                  for one in tree] if isinstance(tree, list) else tree
        super().json(marked)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        super().send_error(code, canaries.DICOM["PatientName"], canaries.DICOM["PatientComments"])

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        self.bodies.append(content.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0])
        self.rfile = io.BytesIO(content)  # type: ignore[assignment]
        super().do_POST()


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    canaries.marked_slices(monkeypatch)
    monkeypatch.setattr("test_pacs_faults.FakeArchive", Named)
    Named.bodies = []
    yield request.getfixturevalue("archive")


def demand_silence(told: str, state: Path) -> None:
    """Results that wait to be sent are objects of the patient; everything else is silent."""
    assert canaries.found_in(told) == set()
    hits = {name for name in canaries.found_below(state) if not name.endswith((".seg.dcm", ".rtstruct.dcm"))
            and "/series/" not in name}
    assert hits == set()


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_an_archive_is_told_what_it_needs_and_nobody_else_anything(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.clear()
    told = []
    with caplog.at_level(logging.DEBUG, "autosam3d"):
        for number, fault in enumerate((*FAULTS, "")):
            Named.fault = fault
            try:
                service = driver.work(named, tmp_path / f"state{number}", tries=1)
                assert service.num_failed == bool(fault)
            except AutoSam3dError as error:
                assert fault in ("500", "401")
                told.append(str(error))
    assert len(Named.bodies) >= 2
    for body in Named.bodies[-2:]:
        canaries.demand_carried_alone(body)
    for number in range(len(FAULTS) + 1):
        state = tmp_path / f"state{number}"
        demand_silence("", state)
        if (state / "ledger.sqlite").is_file():
            status(state)  # prints
    logged = "".join(record.getMessage() for record in caplog.records if record.name.startswith("autosam3d"))
    said = capfd.readouterr()
    assert "series; " in said.out
    assert canaries.found_in(logged + said.out + said.err + json.dumps(told)) == set()


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_series_that_are_refused_are_named_by_their_hash(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(BROKEN):
        (tmp_path / name).mkdir()
        folder = bad.BROKEN[name][0](tmp_path / name)
        Named.files = [path.read_bytes() for path in sorted(folder.iterdir())]
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "autosam3d"):
            service = driver.work(named, tmp_path / f"state{number}", tries=1)
        assert service.num_failed == 1, name
        assert any(code in caplog.text for code in (bad.BROKEN[name][1], "INCOMPLETE", "SLICE_CORRUPT")), caplog.text
        logged = "".join(record.getMessage() for record in caplog.records if record.name.startswith("autosam3d"))
        demand_silence(logged, tmp_path / f"state{number}")


def test_what_is_sent_has_an_empty_preamble_whatever_stood_in_the_scan(named: str, tmp_path: Path) -> None:
    """Row 68: a program in the preamble of a slice (PE or ELF) does not travel."""
    driver.work(named, tmp_path / "state")
    assert len(Named.bodies) == 2
    assert {pydicom.dcmread(io.BytesIO(body)).preamble for body in Named.bodies} == {bytes(128)}
