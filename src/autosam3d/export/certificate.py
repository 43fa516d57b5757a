"""The parity certificate of an export: what was compared, where, with what result, for programs and for people."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from autosam3d.checkpoints.machine import machine
from autosam3d.export.parity import (
    BOUNDS,
    MIN_DICE_VOXELS,
    MIN_INT8_MEAN_DICE,
    MIN_INT8_WORST_DICE,
    Parity,
)
from autosam3d.version import __version__

PARITY_HEAD = ["backend", "version", "threads", "s per window", "largest logit difference", "of the scale",
               "flipped labels", "equal labels", "worst Dice", "within bounds"]


def make_certificate(
    rows: Sequence[Parity], source: str, model_sha256: str, not_run: Mapping[str, str] | None = None,
    int8: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain values for ``certificate.json``.

    Args:
        rows: one a backend, PyTorch first.
        source: where the golden windows come from; never a file name, which may name a patient.
        model_sha256: of the ONNX file.
        not_run: targets of the folder that nothing was proved of, each with the reason.
        int8: how the INT8 network was made and judged, where there is one.
    """
    missing = sorted(name for name, count in rows[0].reference_voxels.items() if not count)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "versions": {"autosam3d": __version__, "python": platform.python_version()}
        | {row.backend: row.version for row in rows},
        "model_sha256": model_sha256, "golden": source, "organs_not_shown": missing,
        "bounds": BOUNDS,
        "logits_against": "PyTorch float32, weights as stored (rounded to float16); PyTorch itself against weights as "
        "trained: what rounding does, without a bound",
        "labels_against": "PyTorch float32, weights as trained",
        "backends": [row.as_dict() for row in rows], "not_run": dict(not_run or {}),
    } | ({} if int8 is None else {"int8": int8 | {"bounds": {
        "mean_dice": MIN_INT8_MEAN_DICE, "worst_dice": MIN_INT8_WORST_DICE,
        "dice_judged_from_voxels": MIN_DICE_VOXELS}}})


def certificate_text(certificate: dict[str, Any], rows: Sequence[Parity]) -> str:
    """``certificate.md``."""
    bounds, missing = certificate["bounds"], certificate["organs_not_shown"]
    lines = [
        "# Parity certificate", "",
        f"Model {certificate['model_sha256'][:16]}, {certificate['date']}, {certificate['machine']}.",
        f"Golden case: {certificate['golden']}.", "",
        f"Logits against {certificate['logits_against']}.", f"Labels and Dice against {certificate['labels_against']}.",
        f"Bounds: logits {bounds['logit_share']:g} of their largest value, labels {bounds['equal_share']:.2%} equal, "
        f"Dice {bounds['dice']:g} for each organ of {bounds['dice_judged_from_voxels']} voxels or more.", "",
        f"| {' | '.join(PARITY_HEAD)} |", "|" + "---|" * len(PARITY_HEAD),
        *("| " + " | ".join(parity_cells(row)) + " |" for row in rows),
        *("| " + " | ".join(not_run_cells(name, why)) + " |" for name, why in certificate["not_run"].items()), "",
        "| organ | voxels | " + " | ".join(row.backend for row in rows) + " |",
        "|---|---|" + "---|" * len(rows),
        *(f"| {name} | {count} | " + " | ".join(_dice(row.dice[name]) for row in rows) + " |"
          for name, count in rows[0].reference_voxels.items()), "",
    ]
    if missing:
        lines += [f"Not shown by these windows, so not proved: {', '.join(missing)}.", ""]
    for name, why in certificate["not_run"].items():
        lines += [f"{name} was written and {why}: nothing is proved of it.", ""]
    return "\n".join([*lines, *_int8_lines(certificate["int8"])] if "int8" in certificate else lines)


def int8_text(int8: dict[str, Any]) -> str:
    """What the INT8 network is, in one sentence without a full stop."""
    way = ("weights as INT8, computed in float32" if int8["way"] == "weights" else
           f"weights and activations as INT8, calibrated on {int8['calibrating_windows']} windows of "
           f"{int8['calibrating_scans']} scans")
    ratio = int8["time_ratio"]
    return f"{way}; a window takes {ratio:.2f} of float32's time here{', no faster' if ratio > 0.95 else ''}"


def _int8_lines(int8: dict[str, Any]) -> list[str]:
    bounds = int8["bounds"]
    return [
        "## INT8", "", f"openvino-int8: {int8_text(int8)}. It is run only where it is named.",
        f"Bounds: Dice against float32 {bounds['mean_dice']:g} in the mean of the organs, {bounds['worst_dice']:g} for "
        f"the worst of any scan, from {bounds['dice_judged_from_voxels']} voxels on; logits and equal labels are "
        "reported, not judged.",
        f"Judged on {int8['judging_scans']} whole scans that did not calibrate it: mean Dice {int8['mean_dice']:.4f}.",
        "", "| organ | mean Dice | worst scan | scans |", "|---|---|---|---|",
        *(f"| {name} | {organ['mean']:.4f} | {organ['worst']:.4f} | {organ['scans']} |"
          for name, organ in int8["organs"].items()), "",
        *([f"Not shown by these scans, so not judged: {', '.join(int8['organs_not_judged'])}.", ""]
          if int8["organs_not_judged"] else []),
    ]


def parity_cells(row: Parity) -> list[str]:
    """A row of the table of backends."""
    return [row.backend, row.version, str(row.threads), f"{row.seconds_per_window:.3f}",
            f"{row.max_logit_difference:.2e}", f"{row.logit_share:.1e}", f"{row.flipped} of {row.voxels}",
            f"{row.equal_share:.4%}", _dice(row.worst_dice),
            "no: " + "; ".join(row.faults()) if row.faults() else "yes"]


def not_run_cells(name: str, why: str) -> list[str]:
    """The row of a target that no runtime was asked."""
    return [name, *["-"] * (len(PARITY_HEAD) - 2), why]


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
