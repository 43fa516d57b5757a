"""From a trained model to a folder that runs without torch: ONNX, OpenVINO, what phones take, a description, a proof.

The proof comes before the folder: a backend that does not say what PyTorch says is reason to write nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autosam3d.checkpoints.checkpoint import LoadedModel
from autosam3d.checkpoints.exported import (
    BACKENDS,
    INT8,
    NOT_RUN_HERE,
    RUNTIMES,
    Export,
    is_export,
    load_exported,
)
from autosam3d.checkpoints.machine import cpu_name
from autosam3d.checkpoints.model_file import meta_text, sealed
from autosam3d.checkpoints.probe import measure_cost
from autosam3d.checkpoints.targets import MOBILE, demand_exportable, demand_mobile
from autosam3d.errors import CheckpointError
from autosam3d.export.certificate import certificate_text, make_certificate
from autosam3d.export.description import describe_use
from autosam3d.export.golden import Golden, golden_windows, make_golden, save_golden
from autosam3d.export.int8 import Int8, Scans, demand_bounds, write_int8
from autosam3d.export.onnx_graph import OPSET, onnx_model, with_half_weights
from autosam3d.export.packages import demand_packages, package_versions
from autosam3d.export.parity import Parity, Ran, Reference, measure_parity
from autosam3d.inference.onnx_file import labels_note
from autosam3d.inference.openvino_runtime import openvino_core
from autosam3d.io import folders
from autosam3d.io.files import sha256_of
from autosam3d.io.room import demand_room, free_bytes
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Volume

Progress = Callable[[int, int], None]
"""Called with the steps done and their number."""
_STEPS = 6
_INT8_STEPS = 3
_PHANTOM_SEED = 0
_WINDOWS = {"phantom": 2, "scan": 4}


@dataclass(frozen=True)
class Exported:
    """What became of an export."""

    folder: Path
    sizes: dict[str, int]
    """File, or folder, to its bytes."""
    rows: list[Parity]
    not_run: dict[str, str]
    """Targets that were written and not run, each with the reason: nothing is proved of them."""
    organs_not_shown: list[str]
    int8: Int8 | None = None


def export_model(
    model: LoadedModel,
    folder: Path,
    *,
    targets: Sequence[str] = (),
    ct: Volume | None = None,
    int8: Scans | None = None,
    threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as ONNX and OpenVINO IR, and for phones where asked, with its certificate; all of it, or nothing.

    Args:
        model: trained.
        folder: new; with `overwrite` also one that an export wrote before. Nothing else is ever replaced.
        targets: of `MOBILE`, written besides.
        ct: a scan of the kind that the model is for, whose windows become the golden case and go into the folder; None
            takes a phantom, which shows abdominal organs or none at all.
        int8: scans that make and judge an INT8 network beside the others, with `ct`; None makes none.
        threads: of the runtimes, in the certificate.
        progress: called after each step.

    Raises:
        CheckpointError: PARITY, a backend differs from PyTorch beyond the bounds of `parity`; INT8, that one does.
        UsageError: OUTPUT_EXISTS, or TARGET, one that is none or does not run this network.
        MissingExtraError: a package that writes or runs one of the files is not installed.
        ResourceError: NO_SPACE, before the work where its weights alone do not fit.
    """
    recipe = model.recipe
    targets = sorted(set(targets), key=list(MOBILE).index) if set(targets) <= set(MOBILE) else targets
    demand_exportable(recipe.model)
    demand_mobile(recipe.model, targets)
    demand_packages(targets)
    demand_replaceable(folder, overwrite)
    trained = model.network.to("cpu").float().eval()
    # Every form holds all weights at half their bytes at least.
    num_forms = len(BACKENDS) + len(targets) + (int8 is not None)
    demand_room(folder, num_forms * sum(2 * p.numel() for p in trained.parameters()))
    step = _Steps(_STEPS + 2 * len(targets) + _INT8_STEPS * (int8 is not None), progress)
    work = _Work(model, trained, with_half_weights(trained), tuple(targets), threads, folder, step)
    with folders.staged_folder(folder) as stage:
        work.write_all(stage)
        judged = work.judge(stage, ct, int8)
        not_shown = work.describe(stage, judged)
        sizes = {path.name: sum(p.stat().st_size for p in _files(path)) for path in sorted(stage.iterdir())}
    return Exported(folder, sizes, judged.rows, judged.not_run, not_shown, judged.int8)


class _Steps:
    """Counts the steps of an export."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self) -> None:
        """One step is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class _Judged:
    """What was proved of an export, and of what."""

    rows: list[Parity]
    """One a backend, PyTorch first."""
    not_run: dict[str, str]
    source: str
    """Where the golden windows come from."""
    int8: Int8 | None

    @property
    def backends(self) -> list[str]:
        """That were run, without PyTorch."""
        return [row.backend for row in self.rows[1:]]


@dataclass(frozen=True)
class _Work:
    """What the three parts of an export share: all files, the proof, the description."""

    model: LoadedModel
    trained: nn.Module
    """Weights as they were trained, float32 on the CPU."""
    stored: nn.Module
    """The same network with the weights as the files hold them, rounded to float16."""
    targets: tuple[str, ...]
    threads: int
    folder: Path
    """Where the export will stand; errors name it."""
    step: _Steps

    def write_all(self, stage: Path) -> None:
        """The network in every form but INT8, whose making needs the float32 one judged."""
        _write_graphs(self.stored, self.model.recipe, stage)
        self.step()
        for target in self.targets:
            _write_mobile(target, self.stored, self.model.recipe, stage)
            self.step()

    def judge(self, stage: Path, ct: Volume | None, int8: Scans | None) -> _Judged:
        """The golden case, written to `stage`, and each runtime's answer to it; makes and judges INT8 where asked.

        Raises:
            CheckpointError: PARITY or INT8.
        """
        recipe = self.model.recipe
        scan, source = (ct, "windows of a real CT, chosen by what the model finds there") if ct else _phantom(recipe)
        windows, trained_logits = golden_windows(scan, recipe, _runner(self.trained),
                                                 _WINDOWS["scan" if ct else "phantom"])
        self.step()
        started = time.perf_counter()
        logits = _runner(self.stored)(windows)
        torch_ran = Ran(backend="pytorch", version=torch.__version__, threads=torch.get_num_threads(),
                        seconds=time.perf_counter() - started, logits=logits)
        golden = make_golden(windows, logits, trained_logits)
        save_golden(stage / "golden.npz", golden)
        rows = [measure_parity(torch_ran, golden, recipe.labels.organs,
                               Reference(trained_logits, of_stored_weights=False))]
        self.step()
        for backend in (*BACKENDS, *(target for target in self.targets if target in RUNTIMES)):
            rows.append(self._run(stage, backend, golden, logits))
            self.step()
        self._demand_parity(rows)
        made = None
        if int8 is not None:
            made = write_int8(stage, recipe, int8, self.threads, self.step)
            demand_bounds(made, self.folder)
            rows.append(self._run(stage, INT8, golden, logits))
            self._demand_parity(rows)
            self.step()
        not_run = {target: NOT_RUN_HERE for target in self.targets if target not in RUNTIMES}
        return _Judged(rows, not_run, source, made)

    def describe(self, stage: Path, judged: _Judged) -> list[str]:
        """The certificate and ``model.json``; returns the organs that the golden case does not show."""
        certificate = make_certificate(judged.rows, judged.source, sha256_of(stage / "model.onnx"), judged.not_run,
                                       judged.int8 and judged.int8.as_dict())
        (stage / "certificate.json").write_text(json.dumps(certificate, indent=1) + "\n", "utf-8")
        (stage / "certificate.md").write_text(certificate_text(certificate, judged.rows), "utf-8")
        # The probe reads the folder as any user would, so it needs a description that is whole.
        _write_meta(stage, _meta(self.model, _entries(stage)))
        costs = {backend: measure_cost(stage, backend, self.threads) for backend in judged.backends}
        memory = {backend: cost.activation_bytes for backend, cost in costs.items() if cost is not None}
        _write_meta(stage, _meta(self.model, _entries(stage), memory))
        self.step()
        return certificate["organs_not_shown"]

    def _run(self, stage: Path, backend: str, golden: Golden, stored_logits: np.ndarray) -> Parity:
        """The golden case on a runtime."""
        export = Export(stage, _meta(self.model, _entries(stage)), self.model.recipe)
        predictor = load_exported(export, backend, self.threads, output="logits").predictor
        logits, seconds = _timed(predictor.predict, golden.ct)
        ran = Ran(backend=backend, version=predictor.version, threads=self.threads, seconds=seconds, logits=logits,
                  int8=backend == INT8)
        return measure_parity(ran, golden, self.model.recipe.labels.organs, Reference(stored_logits))

    def _demand_parity(self, rows: Sequence[Parity]) -> None:
        for row in rows:
            if row.faults():
                raise CheckpointError("INT8" if row.int8 else "PARITY", self.folder, f"{row.backend} {row.version} "
                                      f"does not say what PyTorch says: {'; '.join(row.faults())}", "nothing was "
                                      "written; train longer (an untrained network has no clear answers), or report it "
                                      "with the model")


def _write_graphs(stored: nn.Module, recipe: Recipe, stage: Path) -> None:
    import openvino

    labels = labels_note(["background", *recipe.labels.organs])
    graph = onnx_model(stored, recipe.model.patch_size)
    entry = graph.metadata_props.add()
    entry.key, entry.value = "labels", labels
    onnx_path = stage / "model.onnx"
    onnx_path.write_bytes(graph.SerializeToString(deterministic=True))
    # Not `convert_model`, which reports its use to a server.
    ir = openvino_core().read_model(onnx_path)
    ir.set_rt_info(labels, ["autosam3d", "labels"])
    # The large weights are float16 already; compressing the rest, biases and norms, costs accuracy and saves nothing.
    try:
        openvino.save_model(ir, stage / "openvino.xml", compress_to_fp16=False)
    except RuntimeError as error:  # it tells of a full disk in words of its own, or not at all
        if (free_bytes(stage) or 0) >= onnx_path.stat().st_size:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _write_mobile(target: str, stored: nn.Module, recipe: Recipe, stage: Path) -> None:
    form = stored, recipe.model.patch_size, ["background", *recipe.labels.organs]
    path = stage / MOBILE[target]
    if target == "litert":
        from autosam3d.export.litert_graph import litert_model

        path.write_bytes(litert_model(*form))
    elif target == "executorch":
        from autosam3d.export.executorch_graph import executorch_program

        path.write_bytes(executorch_program(*form))
    else:
        from autosam3d.export.coreml_graph import write_coreml

        write_coreml(*form, path)


def _meta(model: LoadedModel, files: dict[str, Any], memory: dict[str, int] | None = None) -> dict[str, Any]:
    recipe = model.recipe
    mobile = [target for target in MOBILE if any(name.split("/")[0] == MOBILE[target] for name in files)]
    return sealed({
        "kind": "export", "recipe": recipe.as_dict(), "weights": {"file": "model.onnx", **files["model.onnx"]},
        "files": files, "use": describe_use(recipe, OPSET, mobile, "openvino_int8.xml" in files),
        "metrics": dict(model.metrics),
        "trained_weights_sha256": model.sha256, "memory": memory or {},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **package_versions(mobile)},
        "machine": cpu_name(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    })


def _write_meta(stage: Path, meta: dict[str, Any]) -> None:
    (stage / "model.json").write_text(meta_text(meta), "utf-8")


def _entries(stage: Path) -> dict[str, Any]:
    return {path.relative_to(stage).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            for path in _files(stage) if path != stage / "model.json"}


def _files(path: Path) -> list[Path]:
    """All files of a folder, or the file itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _runner(network: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Logits window by window, in float32."""

    def run(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([network(torch.from_numpy(w[None])).numpy() for w in windows])

    return run


def _timed(run: Callable[[np.ndarray], np.ndarray], windows: np.ndarray) -> tuple[np.ndarray, float]:
    run(windows[:1])  # what a runtime prepares at its first call does not count
    started = time.perf_counter()
    logits = run(windows)
    return logits, time.perf_counter() - started


def demand_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an export which may be replaced.

    Raises:
        UsageError: OUTPUT_EXISTS.
    """
    folders.demand_replaceable(folder, overwrite, is_export, "an export")


def _phantom(recipe: Recipe) -> tuple[Volume, str]:
    from autosam3d.data.phantom import make_phantom

    phantom = replace(make_phantom(_PHANTOM_SEED)[0], intensity=recipe.reading.intensity)
    return phantom, f"windows of a synthetic abdomen (phantom {_PHANTOM_SEED}), no patient"
