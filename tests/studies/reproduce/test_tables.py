"""The paper's tables: what is shown, what is tested, what is refused, and that four formats say the same."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from made import ABOUT, run_scores

from autosam3d.errors import UsageError, VolumeError
from autosam3d.evaluation.scores import read_json
from autosam3d.studies.reproduce.paper import (
    LAMBDAS,
    TABLE1,
    TABLE2,
    TABLE3,
    TABLE4,
    TABLES,
    PaperScore,
    Row,
    lambda_key,
)
from autosam3d.studies.reproduce.table import (
    NOT_REPORTED,
    NOT_RUN,
    Cell,
    Column,
    Table,
    comma_separated,
    html,
    latex,
    markdown,
    write_tables,
)
from autosam3d.studies.reproduce.tables import Built, build_table

ODD = r"<b>a&b</b> 50% $x_1^2$ #1 ~{y} \z | [k] *s* `c` ’é"
Parts = tuple[str, str, str, str, str]
"""value, mark, SD, low, high."""


def parts(cell: Cell) -> Parts:
    return (cell.shown, cell.mark, cell.shown_sd, *(cell.interval or ("", "")))


def split(shown: str) -> Parts:
    """A cell's text without markup, ``12.34* ± 0.50 (1.00 to 2.00)``; words as they are."""
    found = re.fullmatch(r"([+-]?\d+\.\d+)([*†]?)(?: ± (\d+\.\d+))?(?: \(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\))?", shown)
    a, b, c, d, e = found.groups("") if found else (shown, "", "", "", "")
    return a, b, c, d, e


def grid_of_markdown(text: str) -> list[list[Parts]]:
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    plain = [[re.sub(r"\\([\\`*_{}\[\]<>|#~])", r"\1", c.replace("**", "")).replace("&amp;", "&") for c in row]
             for row in cells]
    return [[split(c) for c in row] for row in plain]


_BACK = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
         r"\textgreater{}": ">", r"\textbar{}": "|", r"$\lambda$": "λ", r"$\pm$": "±", "$^{*}$": "*",
         r"$^{\dagger}$": "†", "$-$": "-", "$+$": "+", "{[}": "[", "{]}": "]", "{*}": "*", r"{\scriptsize (": "("}


def grid_of_latex(text: str) -> list[list[Parts]]:
    body = text[text.index(r"\midrule") + 8 : text.index(r"\bottomrule")].strip()
    grid = []
    for line in body.splitlines():
        assert line.endswith(r" \\")
        row = []
        for cell in re.split(r"(?<!\\) & ", line[:-3]):
            cell = re.sub(r"\\textbf\{(.*?)\}(?=\$|\s|$)", r"\1", cell)
            # What is escaped by one backslash goes through stand-ins, so that nothing is undone twice.
            for i, c in enumerate("&%$#_{}"):
                cell = cell.replace(f"\\{c}", chr(0xE000 + i))
            for markup, plain in _BACK.items():
                cell = cell.replace(markup, plain)
            cell = re.sub(r"(\(.* to .*\))\}$", r"\1", cell)
            row.append(split("".join("&%$#_{}"[ord(c) - 0xE000] if 0xE000 <= ord(c) < 0xE007 else c for c in cell)))
        grid.append(row)
    return grid


def grid_of_csv(text: str, table: Table) -> list[list[Parts]]:
    rows = list(csv.reader(io.StringIO("".join(line for line in text.splitlines(True) if not line.startswith("# ")))))
    grid = []
    for row in rows[1:]:
        fields, cells = iter(row), []
        for column in table.columns:
            value = next(fields)
            rest = [next(fields) for _ in range(4)] if column.kind == "run" else [""] * 4
            cells.append((value, rest[0], rest[1], rest[2], rest[3]))
        assert next(fields, None) is None
        grid.append(cells)
    return grid


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tbody":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag == "td":
            self.inside = True
            self.tables[-1][-1].append("")
        elif tag == "small" and self.inside:
            self.tables[-1][-1][-1] += " ("

    def handle_endtag(self, tag):
        if tag == "small" and self.inside:
            self.tables[-1][-1][-1] += ")"
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def grid_of_html(text: str) -> list[list[Parts]]:
    page = Page()
    page.feed(text)
    rows = [row for row in page.tables[0] if row and row[0] is not None]
    return [[split(c) for c in row] for row in rows if row]


def assert_formats_agree(table: Table) -> None:
    expected = [[parts(cell) for cell in row] for row in table.rows]
    assert grid_of_markdown(markdown(table)) == expected
    assert grid_of_latex(latex(table)) == expected
    assert grid_of_csv(comma_separated(table), table) == expected
    assert grid_of_html(html([table], "t")) == expected


def three_models(tmp_path: Path) -> list:
    """AutoSAM 0.05 above nnU-Net, nnFormer 0.2 above AutoSAM; two seeds of nnU-Net."""
    return [
        run_scores(tmp_path, "autosam", shift=0.05, tuned_parameters=26_530_944, minutes=20.0),
        run_scores(tmp_path, "nnunet", seed=1, shift=0.02, tuned_parameters=31_190_000, minutes=101.5, steps=12_000),
        run_scores(tmp_path, "nnunet", seed=0, shift=-0.02, minutes=9.0, steps=588),
        run_scores(tmp_path, "nnformer", shift=0.25),
        run_scores(tmp_path, ODD, shift=0.0),
    ]


def column(built: Built, group: str, name: str) -> dict[str, Cell]:
    index = next(i for i, c in enumerate(built.table.columns) if (c.group, c.name) == (group, name))
    return {row[0].shown: row[index] for row in built.table.rows}


def test_four_formats_hold_the_same_numbers_and_odd_names(tmp_path):
    built = build_table(TABLE1, three_models(tmp_path), ABOUT, datasets=("openkbp", "btcv"))
    assert built.table.rows[-1][0].shown == ODD
    assert built.tests is not None and any("<b>" in cell.text for row in built.tests.rows for cell in row)
    for table in built.tables:
        assert_formats_agree(table)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.text(min_size=1, max_size=12), st.floats(-1e4, 1e4), st.floats(0, 9), st.sampled_from(["", "*", "†"]))
def test_any_name_and_number_come_through_every_format(name, value, sd, mark):
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assume(shown)
    run = Cell(kind="run", value=value, sd=sd, low=value - 1, high=value + 1, mark=mark, best=True)
    table = Table(key="t", title=name, columns=(Column("model"), Column("m", "D", kind="run")),
                  rows=((Cell(text=shown), run),), notes=(name,))
    assert grid_of_csv(comma_separated(table), table) == [[parts(c) for c in table.rows[0]]]
    assert grid_of_html(html([table], "t")) == [[parts(c) for c in table.rows[0]]]
    assert grid_of_markdown(markdown(table))[0][1] == grid_of_latex(latex(table))[0][1] == parts(run)


def test_numbers_are_the_evaluations_own(tmp_path):
    """The mean of a run is its evaluation's headline, of seeds their mean; the paper's stay in their columns."""
    runs = three_models(tmp_path)
    built = build_table(TABLE1, runs, ABOUT, datasets=("openkbp", "btcv"))
    dice, nsd = column(built, "OpenKBP", "mDice"), column(built, "OpenKBP", "mNSD")
    summary = read_json(runs[0].evaluation / "scores.json").summary()
    assert summary.dice is not None and summary.nsd[0] is not None
    own = dice["AutoSAM Adapter"]
    assert (own.value, own.low, own.high) == pytest.approx(tuple(100 * v for v in (
        summary.dice.mean, summary.dice.low, summary.dice.high)))
    assert nsd["AutoSAM Adapter"].value == pytest.approx(100 * summary.nsd[0].mean)
    seeds = [read_json(run.evaluation / "scores.json").summary().dice for run in runs[1:3]]
    means = [100 * seed.mean for seed in seeds if seed is not None]
    assert dice["nnU-Net"].value == pytest.approx(sum(means) / 2)
    assert dice["nnU-Net"].sd == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert dice["UNETR"].shown == column(built, "BTCV", "mDice")["nnU-Net"].shown == NOT_RUN
    assert column(built, "BTCV, paper", "mNSD")["UNETR"].shown == "74.35"
    assert column(built, "", "tuned, M")["AutoSAM Adapter"].shown == "26.53"
    assert not any("OpenKBP, paper" in c.group for c in built.table.columns)
    assert [name for name, cell in dice.items() if cell.best] == ["nnFormer"]
    notes = "\n".join(built.table.notes)
    trained = "nnU-Net: seeds 0, 1, trained 9.0 to 101.5 minutes, 588 to 12,000 steps of 250,000 published."
    for said in (trained, "Not run: UNETR, SwinUNETR.", "NSD at 1 mm",
                 "20 minutes of training for each run", "18 pairs (case x organ) of 6 cases", "not independent"):
        assert said in notes, said


def test_star_needs_every_row_and_a_better_rival_gets_a_dagger(tmp_path):
    """A result in which a baseline wins is marked like any other."""
    two = replace(TABLE1, rows=tuple(row for row in TABLE1.rows if row.key in ("autosam", "nnunet")))
    ours, theirs = run_scores(tmp_path, "autosam", shift=0.05), run_scores(tmp_path, "nnunet")
    marked = build_table(two, [ours, theirs], ABOUT, datasets=("openkbp",))
    assert column(marked, "OpenKBP", "mDice")["AutoSAM Adapter"].mark == "*"
    (test,) = marked.comparisons["openkbp", "dice"]
    assert (test.test.num_pairs, test.p) == (18, 2 / 2**18)
    one_missing = build_table(TABLE1, [ours, theirs], ABOUT, datasets=("openkbp",))
    assert column(one_missing, "OpenKBP", "mDice")["AutoSAM Adapter"].mark == ""
    beaten = build_table(two, [ours, run_scores(tmp_path, "nnunet", seed=1, shift=0.3)], ABOUT, datasets=("openkbp",))
    found = column(beaten, "OpenKBP", "mDice")
    assert (found["nnU-Net"].mark, found["AutoSAM Adapter"].mark, found["nnU-Net"].best) == ("†", "", True)


def test_six_cases_can_carry_no_star_and_the_note_says_so(tmp_path):
    two = replace(TABLE1, rows=tuple(row for row in TABLE1.rows if row.key in ("autosam", "nnunet")))
    runs = [run_scores(tmp_path, "autosam", shift=0.05), run_scores(tmp_path, "nnunet")]
    built = build_table(two, runs, ABOUT, datasets=("openkbp",), unit="case")
    assert column(built, "OpenKBP", "mDice")["AutoSAM Adapter"].mark == ""
    assert "6 pairs (case) of 6 cases, smallest p possible after Holm 0.0312: no mark can be reached." in "\n".join(
        built.table.notes)


def test_ablations_and_lambdas_are_tested_against_their_reference(tmp_path):
    runs = [run_scores(tmp_path, "autosam", shift=0.05), run_scores(tmp_path, "no_apg"),
            run_scores(tmp_path, "no_adapter", shift=0.3)]
    built = build_table(TABLE3, runs, ABOUT, datasets=("openkbp",))
    dice = column(built, "OpenKBP", "mDice")
    assert {name: cell.mark for name, cell in dice.items()} == {
        "AutoSAM Adapter": "", "without APG": "†", "without MLAM": "", "without both": "", "no_adapter": "*"}
    assert [c.shown for c in built.table.rows[1][1:3]] == ["no", "yes"]
    sweep = [run_scores(tmp_path, lambda_key(lam), shift=shift) for lam, shift in ((0, -0.3), (0.5, 0.05), (1, 0.0))]
    built = build_table(TABLE4, sweep, ABOUT, datasets=("openkbp",))
    dice = column(built, "OpenKBP", "mDice")
    assert [dice[f"λ = {lam:g}"].mark for lam in LAMBDAS] == ["†", "", "*", "", ""]
    assert "mNSD" not in {c.name for c in built.table.columns}
    assert_formats_agree(built.table)


def test_rows_that_are_given_the_truth_say_so(tmp_path):
    runs = [run_scores(tmp_path, "sam"), run_scores(tmp_path, "medsam_pm"), run_scores(tmp_path, "autosam", shift=0.1)]
    built = build_table(TABLE2, runs, ABOUT, datasets=("openkbp", "btcv"))
    given = {row[0].shown + "/" + row[1].shown: row[2].shown for row in built.table.rows}
    assert given["SAM/none"] == "yes" and [v for k, v in given.items() if k.startswith("AutoSAM")] == ["no"]
    assert "made from the truth" in built.table.notes[0]
    assert column(built, "BTCV, paper", "mNSD")["SAM"].shown == NOT_REPORTED
    assert built.tests is not None
    assert "AutoSAM Adapter minus MedSAM (prompt encoder and mask decoder, yes)" in {
        cell.text for row in built.tests.rows for cell in row}


def test_without_any_run_every_table_stands_and_claims_nothing():
    for spec in TABLES.values():
        built = build_table(spec, [], ABOUT)
        assert built.tests is None
        assert all(c.shown == NOT_RUN for row in built.table.rows for c in row if c.kind == "run")
        assert_formats_agree(built.table)


def test_missing_predictions_are_told_and_left_out(tmp_path):
    runs = [run_scores(tmp_path, "autosam", shift=0.1), run_scores(tmp_path, "nnunet", missing=("case_2",))]
    built = build_table(TABLE1, runs, ABOUT, datasets=("openkbp",))
    notes = "\n".join(built.table.notes)
    assert "nnunet on OpenKBP, seed 0: 1 of 6 cases without a prediction, in no mean" in notes
    (test,) = built.comparisons["openkbp", "dice"]
    assert (test.test.num_pairs, test.num_left_out) == (15, 3)


def test_evaluations_that_cannot_be_compared_are_refused(tmp_path):
    ours = run_scores(tmp_path, "autosam")
    others = run_scores(tmp_path, "nnunet", organs={1: "liver", 2: "spleen", 3: "larynx"})
    with pytest.raises(UsageError, match=r"expected the organs of .*got others \(aorta, larynx\)"):
        build_table(TABLE1, [ours, others], ABOUT, datasets=("openkbp",))
    moved = run_scores(tmp_path, "unetr", first_case=1)
    with pytest.raises(UsageError, match=r"expected the cases of .*got others \(case_0, case_6\)"):
        build_table(TABLE1, [ours, moved], ABOUT, datasets=("openkbp",))
    coarse = run_scores(tmp_path, "nnformer", tolerances_mm=(2.0,))
    with pytest.raises(UsageError, match="expected an evaluation with NSD at 1 mm, got one at 2"):
        build_table(TABLE1, [coarse], ABOUT, datasets=("openkbp",))
    with pytest.raises(VolumeError, match="cannot be read"):
        build_table(TABLE1, [replace(ours, evaluation=tmp_path / "absent")], ABOUT, datasets=("openkbp",))
    with pytest.raises(ValueError, match="one for each model, dataset and seed"):
        build_table(TABLE1, [ours, ours], ABOUT, datasets=("openkbp",))


def test_the_papers_figures_cannot_stand_in_a_column_of_runs():
    columns = (Column("m", kind="run"),)
    with pytest.raises(ValueError, match="expected cells of the kinds"):
        Table(key="t", title="t", columns=columns, rows=((Cell(kind="paper", value=87.15),),))
    with pytest.raises(ValueError, match="finite"):
        Cell(kind="run", value=float("nan"))
    with pytest.raises(ValueError, match="both ends"):
        Cell(kind="run", mark="*")


def test_the_paper_as_printed():
    """Sums over each table's columns, added up from the paper's pages."""
    def total(table, dataset, measure):
        return sum(getattr(row.scores[dataset], measure) for row in table.rows)

    assert [total(TABLE1, d, "dice") for d in TABLE1.datasets] == pytest.approx([427.05, 424.03, 420.85, 442.74])
    assert [total(TABLE1, d, "nsd") for d in TABLE1.datasets] == pytest.approx([373.30, 362.00, 366.16, 415.43])
    assert sum(row.tuned_millions or 0 for row in TABLE1.rows) == pytest.approx(363.70)
    assert [total(TABLE2, d, "dice") for d in TABLE2.datasets] == pytest.approx([307.23, 291.34])
    assert (total(TABLE3, "btcv", "dice"), total(TABLE3, "btcv", "nsd")) == pytest.approx((337.89, 296.82))
    assert sum(LAMBDAS.values()) == pytest.approx(405.03)
    assert all(len(row.facts) == len(table.facts) for table in TABLES.values() for row in table.rows)
    assert all(table.reference in {row.key for row in table.rows} for table in TABLES.values())


def test_the_page_needs_nothing_else_and_escapes(tmp_path):
    built = build_table(TABLE1, three_models(tmp_path), ABOUT, datasets=("openkbp",))
    text = html(built.tables, "<script>alert(1)</script>")
    page = Page()
    page.feed(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "b"}
    assert not [v for _, attributes in page.tags for k, v in attributes.items() if k in ("href", "src", "onclick")]
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    assert len(page.tables) == 2


def test_files_are_all_written_or_none(tmp_path):
    built = build_table(TABLE1, three_models(tmp_path), ABOUT, datasets=("openkbp",))
    out = tmp_path / "out"
    out.mkdir()
    paths = write_tables(out, "table1", built.tables)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths) == [
        "table1.csv", "table1.html", "table1.md", "table1.tex", "table1_tests.csv", "table1_tests.tex"]
    assert (out / "table1.csv").read_text("utf-8") == comma_separated(built.table)
    with pytest.raises(UsageError):
        write_tables(tmp_path / "absent", "table1", built.tables)


def test_rows_of_other_sizes_carry_their_own_names(tmp_path):
    """The two-core form: tiny variants are named so and have no figure of the paper beside them."""
    tiny = replace(TABLE1, reference="tiny", rows=(Row(key="tiny", name="AutoSAM (vit_tiny)"), *TABLE1.rows[:1]))
    built = build_table(tiny, [run_scores(tmp_path, "tiny", "btcv")], ABOUT, datasets=("btcv",))
    assert column(built, "BTCV, paper", "mDice")["AutoSAM (vit_tiny)"].shown == NOT_REPORTED
    assert TABLE1.rows[0].scores["btcv"] == PaperScore(84.34, 73.21)


def test_rows_that_the_paper_lacks_say_what_they_are_given(tmp_path):
    runs = [run_scores(tmp_path, model, "btcv", shift=i / 50)
            for i, model in enumerate(("medsam_full, box", "sam, box", "a stranger", "autosam"))]
    rows = build_table(TABLES["table2"], runs, ABOUT, datasets=["btcv"]).table.rows
    assert [[cell.shown for cell in row[:3]] for row in rows[4:]] == [
        ["SAM, boxes for prompts", "none", "yes"], ["MedSAM, boxes for prompts", "everything", "yes"],
        ["a stranger", "", ""],
    ]
    runs = [run_scores(tmp_path, model, "btcv", seed=1) for model in ("autosam", "without adapters")]
    last = build_table(TABLES["table3"], runs, ABOUT, datasets=["btcv"]).table.rows[-1]
    assert [cell.shown for cell in last[:3]] == ["without adapters", "yes", "yes"]


def test_notes_say_where_runs_were_made_and_which_had_no_sam(tmp_path):
    runs = [run_scores(tmp_path, "autosam", machine="a GPU", without_sam=True),
            run_scores(tmp_path, "unetr", machine="two cores"), run_scores(tmp_path, "nnunet", machine="a GPU")]
    notes = "\n".join(build_table(TABLES["table1"], runs, ABOUT, datasets=["openkbp"]).table.notes)
    assert notes.count("without SAM's weights") == 1 and "AutoSAM Adapter: seed 0, without SAM's weights" in notes
    assert "Runs made on: two cores; a GPU." in notes or "Runs made on: a GPU; two cores." in notes


def test_no_p_is_below_the_smallest_possible_after_holm(tmp_path):
    runs = [run_scores(tmp_path, "autosam", shift=0.05), run_scores(tmp_path, "unetr"),
            run_scores(tmp_path, "nnunet", shift=0.05)]  # equal to the reference: no pair is left, p is 1
    built = build_table(TABLES["table1"], runs, ABOUT, datasets=["openkbp"], unit="case")
    family = built.comparisons["openkbp", "dice"]
    assert [(c.second, c.p, c.smallest_p) for c in family] == [("nnU-Net", 1.0, 1.0), ("UNETR", 0.0625, 0.0625)]
