"""INT8 on request: made from real scans, judged on others, refused where it is another segmenter.

Two ways are tried. `weights` stores the weights of convolutions and linear layers as INT8 and computes in float32:
small, as fast as before. `activations` computes in INT8 as well; the ranges of what flows between the layers are
calibrated on windows of the scans. It is taken where it is faster *and* within the bounds on the very scans that
calibrated it; what decides at last are scans that it has not seen.

*Source*: plain calibration of a SwinUNETR gave Dice 0.94 and 0.66 for the worst organ (0.91 and 0.53 on random input),
so neither is ever trusted. What was measured with this module: benchmarks/results/int8.md.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import CheckpointError, MissingExtraError, UsageError
from autosam3d.export.parity import OrganDice, compare_labels, int8_faults, judged_int8, mean_int8_dice
from autosam3d.geometry.patches import Tiling, grid_starts, pad_to
from autosam3d.geometry.preprocess import prepare_ct
from autosam3d.inference.onnx_file import labels_note
from autosam3d.inference.openvino_runtime import OpenVinoPredictor, openvino_core
from autosam3d.inference.pipeline import label_prepared
from autosam3d.inference.quiet import quiet
from autosam3d.io import ReadOptions, read_ct
from autosam3d.io.folders import temporary_folder
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Volume

_log = logging.getLogger(__name__)

_MAX_SCANS = 16
_WINDOWS = 24
"""That calibrate, of all scans together: the range of each layer changes little after a dozen."""
_OVERLAP = 0.5
"""Of the windows that label a scan, at most: less averaging than in use shows more of a difference."""
_FASTER = 0.95
"""Share of the time from which on INT8 activations are worth what they cost in exactness."""
_TIMED = 5
_LEFT = ["Gather", "Add", "Subtract", "Multiply", "Divide", "Concat"]
"""Kinds of operators that stay float32: an INT8 copy of a skip connection loses more than it gains, and nncf 3.4 fails
on a table that is gathered from."""
_NNCF_FAULTS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Scans:
    """Prepared scans, float32 [z, y, x] each; no scan is in both lists."""

    calibrating: list[np.ndarray]
    judging: list[np.ndarray]


@dataclass(frozen=True)
class Int8:
    """What became of it."""

    way: str
    """"weights" or "activations"."""
    scans: Sequence[Mapping[str, OrganDice]]
    """Organ to its Dice against float32, one mapping a judging scan."""
    calibrated_on: tuple[int, int]
    """Scans and windows."""
    time_ratio: float
    """CPU time of a window on one thread, divided by that of float32 in the same run."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the certificate."""
        judged = judged_int8(self.scans)
        return {
            "way": self.way, "time_ratio": self.time_ratio, "calibrating_scans": self.calibrated_on[0],
            "calibrating_windows": self.calibrated_on[1], "judging_scans": len(self.scans),
            "mean_dice": mean_int8_dice(judged),
            "organs": {name: {"mean": float(np.mean(values)), "worst": min(values), "scans": len(values)}
                       for name, values in judged.items()},
            "organs_not_judged": [name for name in self.scans[0] if name not in judged],
        }


def demand_int8(paths: Sequence[Path], has_ct: bool) -> None:
    """Refuse what cannot become INT8, before any work.

    Raises:
        UsageError: TOO_FEW scans, or NO_CT.
        MissingExtraError: nncf is not installed.
    """
    if len(paths) < 2:
        raise UsageError("TOO_FEW", "--int8", f"expected two scans or more, got {len(paths)}: one calibrates, another "
                         "one judges", "name a folder of scans of the kind that the model is for")
    if not has_ct:
        raise UsageError("NO_CT", "--int8", "expected --ct as well: INT8 is verified later on windows of a real scan, "
                         "which go into the folder", "name a scan with --ct that may go where the export goes")
    if importlib.util.find_spec("nncf") is None:
        raise MissingExtraError("MISSING_EXTRA", "--int8", "expected the package nncf, got none",
                                'pip install "autosam3d[int8]"')


def read_scans(paths: Sequence[Path], recipe: Recipe, read_options: ReadOptions, golden: Volume) -> Scans:
    """Read and prepare scans: of their order every first calibrates and every second judges.

    Args:
        paths: two or more; of more than 16 the first ones are taken.
        recipe: of the model.
        read_options: for the readers.
        golden: the scan of the golden case. Where it is one of them, it judges.

    Raises:
        VolumeError: a scan is refused.
        UsageError: SAME_SCAN, two of them are one, or TOO_FEW are left to calibrate.
    """
    if len(paths) > _MAX_SCANS:
        _log.warning("--int8: the first %d of %d scans are taken", _MAX_SCANS, len(paths))
    shown = _digest(prepare_ct(golden, recipe.preprocess).voxels)
    known: dict[str, Path] = {}
    scans = Scans([], [])
    rest = 0
    for path in paths[:_MAX_SCANS]:
        voxels = prepare_ct(read_ct(path, read_options), recipe.preprocess).voxels
        digest = _digest(voxels)
        if digest in known:
            raise UsageError("SAME_SCAN", path, f"expected different scans, got the one of {known[digest]} again",
                             "name each scan once: what calibrates must not judge")
        known[digest] = path
        judges = digest == shown or rest % 2 == 1
        rest += digest != shown
        (scans.judging if judges else scans.calibrating).append(voxels)
    if not scans.judging:
        raise UsageError("TOO_FEW", "--int8", "expected a scan that judges", "name more scans")
    return scans


def write_int8(
    stage: Path, recipe: Recipe, scans: Scans, threads: int, step: Callable[[], None] = lambda: None
) -> Int8:
    """Make ``openvino_int8.xml`` and ``.bin`` beside the ``openvino.xml`` of `stage`, or refuse.

    Args:
        stage: an export in the making.
        recipe: of the model.
        scans: that calibrate and judge.
        threads: of the runtime.
        step: called twice: when it is made, and when it is judged.

    Raises:
        CheckpointError: INT8, Dice against float32 is below the bounds of `parity` on the scans that judge.
    """
    judge = _Judge(recipe, threads)
    exact = stage / "openvino.xml"
    truths = [judge.label(exact, scan) for scan in scans.calibrating]
    windows = _calibrating_windows(scans.calibrating, truths, recipe)
    seconds = judge.cpu_seconds(exact, windows[0])
    with temporary_folder("int8") as folder:
        chosen, way = _safest(exact, folder, windows, recipe), "weights"
        spent = judge.cpu_seconds(chosen, windows[0])
        bolder = _bolder(exact, folder, windows, recipe)
        if bolder is not None and (bold := judge.cpu_seconds(bolder, windows[0])) < _FASTER * spent:
            found = [compare_labels(judge.label(bolder, scan), truth, recipe.labels.organs)
                     for scan, truth in zip(scans.calibrating, truths, strict=True)]
            faults = int8_faults(found)
            _log.info("INT8 activations take %.2f of the time; %s", bold / seconds, "; ".join(faults) or "in bounds")
            if not faults:
                chosen, way, spent = bolder, "activations", bold
        for suffix in (".xml", ".bin"):
            (stage / f"openvino_int8{suffix}").write_bytes(chosen.with_suffix(suffix).read_bytes())
    step()
    made = stage / "openvino_int8.xml"
    judged = [compare_labels(judge.label(made, scan), judge.label(exact, scan), recipe.labels.organs)
              for scan in scans.judging]
    step()
    return Int8(way, judged, (len(scans.calibrating), len(windows)), round(spent / seconds, 3))


def demand_bounds(int8: Int8, where: Path) -> None:
    """Refuse INT8 that segments otherwise than float32.

    Raises:
        CheckpointError: INT8.
    """
    faults = int8_faults(int8.scans)
    if faults:
        raise CheckpointError("INT8", where, f"INT8 ({int8.way}) is not the network that was trained, on "
                              f"{len(int8.scans)} scans that did not calibrate it: {'; '.join(faults)}", "nothing was "
                              "written; train longer, name scans that show the organs, or export without --int8")


class _Judge:
    """Labels and time of a network on disk, of the prepared scans that it is shown."""

    def __init__(self, recipe: Recipe, threads: int) -> None:
        self._recipe, self._threads = recipe, threads
        self._tiling = Tiling(overlap=min(_OVERLAP, recipe.inference.overlap), importance=recipe.inference.importance)

    def label(self, xml: Path, voxels: np.ndarray) -> np.ndarray:
        """uint8 [z, y, x]."""
        return label_prepared(voxels, self._predictor(xml, self._threads), self._tiling,
                              air=self._recipe.preprocess.air)

    def cpu_seconds(self, xml: Path, window: np.ndarray) -> float:
        """The least of a few, on one thread: unlike the clock, this hardly depends on what else the machine does."""
        predictor, taken = self._predictor(xml, 1), []
        for _ in range(_TIMED + 1):
            started = time.process_time()
            predictor.predict(window[None])
            taken.append(time.process_time() - started)
        return max(min(taken[1:]), 1e-9)

    def _predictor(self, xml: Path, threads: int) -> OpenVinoPredictor:
        recipe = self._recipe
        return OpenVinoPredictor(xml, recipe.model.patch_size, ["background", *recipe.labels.organs], threads)


def _calibrating_windows(scans: Sequence[np.ndarray], truths: Sequence[np.ndarray], recipe: Recipe) -> list[np.ndarray]:
    """Windows float32 [1, D, H, W] as inference cuts them: half by the organs in them, half by the body."""
    size, air = recipe.model.patch_size, recipe.preprocess.air
    each = max(2, _WINDOWS // len(scans))
    windows = []
    for scan, truth in zip(scans, truths, strict=True):
        (ct, _), (labels, _) = pad_to(scan, size, air), pad_to(truth, size, 0)
        crops = [tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
                 for start in grid_starts(ct.shape, size, _OVERLAP)]
        body = np.array([np.count_nonzero(ct[crop] > air + 1e-3) for crop in crops])
        organs = np.array([np.count_nonzero(labels[crop]) for crop in crops])
        taken = list(np.argsort(-organs, kind="stable")[: each // 2])
        taken += [i for i in np.argsort(-body, kind="stable") if i not in taken][: each - len(taken)]
        windows += [np.ascontiguousarray(ct[crops[i]][None], np.float32) for i in sorted(taken)]
    return windows


def _safest(exact: Path, folder: Path, windows: Sequence[np.ndarray], recipe: Recipe) -> Path:
    """The network with INT8 weights.

    Raises:
        CheckpointError: INT8, nncf cannot make it.
    """
    try:
        return _quantised(exact, folder, "weights", windows, recipe)
    except _NNCF_FAULTS as error:
        raise CheckpointError("INT8", "--int8", f"nncf cannot make INT8 weights of this network "
                              f"({type(error).__name__})", "export without --int8") from error


def _bolder(exact: Path, folder: Path, windows: Sequence[np.ndarray], recipe: Recipe) -> Path | None:
    """The network with INT8 activations; None where nncf cannot make it, which is no reason to give up."""
    try:
        return _quantised(exact, folder, "activations", windows, recipe)
    except _NNCF_FAULTS as error:
        _log.warning("INT8 activations are left out: nncf cannot make them of this network (%s)", type(error).__name__)
        return None


def _quantised(exact: Path, folder: Path, way: str, windows: Sequence[np.ndarray], recipe: Recipe) -> Path:
    import openvino

    nncf = _nncf()
    model = openvino_core().read_model(exact)
    with _quiet():
        if way == "weights":
            made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            # The preset for transformers takes ranges that are not symmetric, which suits leaky ReLU, too.
            made = nncf.quantize(model, nncf.Dataset(list(windows), lambda window: {"ct": window[None]}),
                                 subset_size=len(windows), model_type=nncf.ModelType.TRANSFORMER,
                                 ignored_scope=nncf.IgnoredScope(names=_left(model), types=_LEFT, validate=False))
    gc.collect()  # here, and not in another thread: see openvino_core
    made.set_rt_info(labels_note(["background", *recipe.labels.organs]), ["autosam3d", "labels"])
    openvino.save_model(made, folder / f"{way}.xml", compress_to_fp16=True)
    return folder / f"{way}.xml"


def _left(model: Any) -> list[str]:
    """Names of the layers that stay float32 where activations become INT8.

    Those that read the CT, whose every step counts, and the last one, whose rounding nothing evens out: together they
    cost little time and made the difference between Dice 0.986 and 0.992. And products of two activations, as in
    attention, which have no weights.
    """
    layers = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Convolution", "MatMul")]
    products = [op for op in layers if op.get_type_name() == "MatMul"
                and not any(_is_constant(op.input_value(i).get_node()) for i in (0, 1))]
    readers = [op for op in layers if op.get_type_name() == "Convolution" and op.get_input_shape(0)[1] == 1]
    return sorted({op.get_friendly_name() for op in (*products, *readers, layers[-1])})


def _is_constant(node: Any) -> bool:
    """Whether a node is a constant, or one that was cast or put into another form."""
    while node.get_type_name() in ("Convert", "Reshape", "Transpose", "Multiply", "Subtract"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def _nncf() -> Any:
    """nncf, imported in a way in which it reports its use to nobody."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # read once, when it is imported
    try:
        with _quiet():
            nncf: Any = importlib.import_module("nncf")
            wrapper: Any = importlib.import_module("nncf.telemetry.wrapper")
            decorator: Any = importlib.import_module("nncf.telemetry.decorator")
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    # Where somebody imported it before, that came too late.
    decorator.telemetry = wrapper.telemetry = wrapper.NNCFTelemetryStub()
    return nncf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """nncf draws progress bars on stdout and tells of itself in log messages and warnings."""
    with quiet("nncf"), contextlib.redirect_stdout(io.StringIO()):
        yield


def _digest(voxels: np.ndarray) -> str:
    return hashlib.sha256(repr(voxels.shape).encode() + np.ascontiguousarray(voxels).tobytes()).hexdigest()
