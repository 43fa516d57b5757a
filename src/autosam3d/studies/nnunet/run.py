"""The real nnU-Net v2 as a baseline: a dataset of ours planned, trained and predicted there, as other programs.

START with `train_and_predict`, which is the whole run from top to bottom. A run folder holds nnU-Net's own folders
(``nnUNet_raw``, ``nnUNet_preprocessed``, ``nnUNet_results``), ``predictions/validation`` and ``predictions/test``,
``logs``, and ``nnunet.json``, which says whose run it is and which stages are finished. A stage is entered there
after its last file is written, so that a run that was killed goes on with the stage that was not finished, training
inside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from autosam3d.errors import UsageError
from autosam3d.io.files import write_text_atomic
from autosam3d.io.lock_file import HeldFolder, hold_folder
from autosam3d.recipes.reading import Reading
from autosam3d.studies.nnunet.data import NnunetData, open_for_nnunet, scans_of, write_raw
from autosam3d.studies.nnunet.process import NnunetEnvironment, find_nnunet, run_stage
from autosam3d.studies.slots import Slot, available_cores

FORMAT, FORMAT_VERSION = "autosam3d-nnunet", 1
PRESETS = ("default", "resenc_m", "resenc_l", "resenc_xl")
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
PARTS = ("validation", "test")
# *Source*: nnU-Net's own trainer.
NNUNET_EPOCHS, NNUNET_ITERATIONS = 1000, 250
SCRIPT = Path(__file__).with_name("nnunet_trainer.py")
_STATE = "nnunet.json"
_LOCK = "nnunet.lock"

Part = Literal["validation", "test"]
OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class NnunetPlan:
    """What is to be run. The defaults are nnU-Net's own; whatever is smaller is named in `NnunetResult.reduced`."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - as pydantic reads it
    preset: str = "default"
    configuration: str = "3d_fullres"
    fold: int = 0
    """Of splits_final.json."""
    epochs: int | None = None
    """Default nnU-Net's 1000, where `minutes` is None."""
    minutes: float | None = None
    """Of training, validation inside it counted; the rate falls with the share that is spent."""
    iterations: int = NNUNET_ITERATIONS
    """Steps of an epoch."""
    patch: tuple[int, int, int] | None = None
    """Crop in voxels (z, y, x) instead of the planned one; the network gets the stages that it has room for."""
    batch: int | None = None
    tta: bool = True
    """Average over mirror images when predicting, as nnU-Net does."""
    seed: int = 0
    """Of the first weights; nnU-Net's augmentation is not seeded."""
    reading: Reading = field(default_factory=Reading)
    """How scans and label maps are read for scores and pictures. nnU-Net reads the numbers of the files as they are,
    whatever they mean; of an offset its normalisation leaves nothing."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of a reading that is not named none, as in versions that had no such key."""
        whole = asdict(self)
        if self.reading == Reading():
            del whole["reading"]
        return whole

    def __post_init__(self) -> None:
        def demand(good: bool, option: str, expected: str, remedy: str) -> None:
            if not good:
                named = f"--{option}" if option in ("preset", "minutes") else f"--set {option}"
                raise UsageError("USAGE", named, f"expected {expected}, got {getattr(self, option)}", remedy)

        demand(self.preset in PRESETS, "preset", ", ".join(PRESETS), "name one of these")
        demand(self.configuration in CONFIGURATIONS, "configuration", ", ".join(CONFIGURATIONS), "name one of these")
        demand(0 <= self.fold < 1000, "fold", "a number from 0", "name a fold of splits_final.json")
        demand(self.epochs is None or self.minutes is None, "minutes", "--set epochs or --minutes", "leave one out")
        demand(self.epochs is None or 1 <= self.epochs <= 100_000, "epochs", "1 to 100000", "try 1000")
        demand(self.minutes is None or 0 < self.minutes <= 100_000, "minutes", "more than 0", "try 60")
        demand(1 <= self.iterations <= 100_000, "iterations", "1 to 100000", "nnU-Net takes 250")
        demand(self.batch is None or 2 <= self.batch <= 1024, "batch", "2 or more: of one, nnU-Net would never look at "
               "an organ on purpose", "try 2")
        demand(self.patch is None or (len(self.patch) == 3 and all(8 <= n <= 1024 for n in self.patch)), "patch",
               "three numbers from 8, as [32,64,64] (z, y, x)", "leave it out for nnU-Net's own")
        demand(self.reading.volume is None and self.reading.acquisition is None, "reading", "neither volume nor "
               "acquisition, since nnU-Net reads files of one volume", "store one volume a file")
        demand(self.patch is None or self.configuration != "2d", "patch", "a 3D configuration", "leave it out")


@dataclass(frozen=True, kw_only=True)
class NnunetResult:
    """A finished run."""

    folder: Path
    predictions: dict[str, Path]
    """``validation`` and, where there are test scans and they were asked for, ``test``, each a folder of label maps."""
    model: Path
    """nnU-Net's folder of the trained model."""
    minutes: float
    """Of training; planning and prediction are not in it."""
    validation_minutes: float
    """The part of `minutes` that validation inside training took."""
    epochs: int
    steps: int
    parameters: int
    patch: tuple[int, ...]
    """(z, y, x), or (y, x)."""
    batch: int
    network: str
    nnunet: str
    torch: str
    reduced: tuple[str, ...]
    """How this run is smaller than nnU-Net's own; empty where it is not."""
    organs: dict[int, str]
    truth: dict[str, Path]
    """The true label maps of each part that has them."""

    @property
    def name(self) -> str:
        return f"nnU-Net v2{' (reduced)' if self.reduced else ''}"


def train_and_predict(
    data: str | Path, out: str | Path, plan: NnunetPlan | None = None, *, python: str | Path | None = None,
    device: str = "auto", threads: int = 0, parts: Sequence[Part] = PARTS, on_event: OnEvent | None = None,
) -> NnunetResult:
    """Train nnU-Net on `data` below `out`, or go on with that, and predict.

    Args:
        data: nnU-Net v2 layout with ``splits_final.json``.
        python: of the environment that has nnunetv2; default this one.
        device: auto, cpu, mps, cuda or cuda:N.
        threads: of the CPU; 0 takes the cores of this process.
        parts: what is predicted. Leave ``test`` out while something is still chosen.
        on_event: called with (stage, event); an event is a dict with a ``kind``: ``stage``, ``planned``, ``network``,
            ``step``, ``epoch``, ``trained``, ``scan``, ``bar`` or ``tail``.

    Raises:
        VolumeError: the dataset. UsageError: options, OTHER_RUN in the way, LOCKED, a Python without nnU-Net.
        ResourceError: what `run_stage` raises.
    """
    plan, out = plan or NnunetPlan(), Path(out)
    source = open_for_nnunet(data, plan.fold)
    _demand_apart(out, Path(data))
    if out.is_dir():
        _read_state(out, plan, source)  # before the lock is written into somebody's folder
    environment = find_nnunet(python)
    kind, visible = environment.device(device)
    slot = Slot(kind, threads or available_cores(), visible)
    # nnU-Net's training outlives this process where it is killed: the folder stays held until it ends, too.
    with hold_folder(out, _LOCK, what="run folder", inherit=True) as held:
        run = _NnunetRun(out, plan, source, environment, slot, held, on_event)
        run.plan()
        run.train()
        wanted = [part for part in PARTS if part in parts and scans_of(source, part)]
        for part in wanted:
            run.predict(part)
        return run.result(wanted)


class _NnunetRun:
    """The stages of one run, each skipped where it is finished."""

    def __init__(
        self, out: Path, plan: NnunetPlan, data: NnunetData, environment: NnunetEnvironment, slot: Slot,
        held: HeldFolder, on_event: OnEvent | None,
    ) -> None:
        self.out, self.options, self.data, self.environment, self.held = out, plan, data, environment, held
        self._on_event = on_event or (lambda stage, event: None)
        self.script = out / "trainer" / "nnunet_trainer.py"
        workers = max(1, min(8, slot.threads // 2))
        self.spec = plan.as_dict() | {
            "dataset": data.name, "dataset_id": data.number, "ending": data.ending, "device": slot.device,
            "threads": slot.threads, "workers": workers,
            "epochs": plan.epochs or (NNUNET_EPOCHS if plan.minutes is None else None),
        }
        self.variables = {
            **{name: str((out / name).absolute()) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(self.script.parent.absolute()), "nnUNet_def_n_proc": str(workers),
            # On a CPU the steps are the slow part: more augmenting processes would take their cores.
            "nnUNet_n_proc_DA": str(1 if slot.device == "cpu" else min(12, slot.threads)), "nnUNet_wandb_enabled": "0",
            "AUTOSAM3D_NNUNET_SPEC": str((out / "logs" / "train.json").absolute()),
            "OMP_NUM_THREADS": str(slot.threads), "PYTHONUNBUFFERED": "1",
        }
        self.variables |= {"nnUNet_compile": "0"} if slot.device != "cuda" else {}
        self.variables |= {"CUDA_VISIBLE_DEVICES": slot.visible_gpu} if slot.visible_gpu is not None else {}
        self.state = _read_state(out, plan, data)
        self._save()  # first: from here on the folder says whose it is
        for part in ("trainer", "logs"):
            (out / part).mkdir(exist_ok=True)
        shutil.copyfile(SCRIPT, self.script)

    def plan(self) -> None:
        if "plan" in self.state["stages"]:
            return
        write_raw(self.data, self.out / "nnUNet_raw")
        events = self._stage("plan", {})
        self._done("plan", events["planned"])

    def train(self) -> None:
        if "train" in self.state["stages"]:
            return
        events = self._stage("train", {"plans": self.state["stages"]["plan"]["plans"]})
        facts = {"parameters": events["network"]["parameters"], "nnunet": self.environment.version,
                 "torch": self.environment.torch}
        self._done("train", events["trained"] | facts)

    def predict(self, part: str) -> None:
        if f"predict {part}" in self.state["stages"]:
            return
        into = self.out / "predictions" / part
        into.mkdir(parents=True, exist_ok=True)
        scans = [(case.name, str(case.image_path.absolute())) for case in scans_of(self.data, part)]
        more = {"scans": scans, "into": str(into.absolute()), "model": str(self._model.absolute())}
        self._stage("predict", more, log=f"predict_{part}")
        self._done(f"predict {part}", {"scans": len(scans)})

    @property
    def _model(self) -> Path:
        plans = self.state["stages"]["plan"]["plans"]
        name = f"nnUNetTrainerBudget__{plans}__{self.options.configuration}"
        return self.out / "nnUNet_results" / self.data.name / name

    def result(self, parts: Sequence[str]) -> NnunetResult:
        planned, trained = self.state["stages"]["plan"], self.state["stages"]["train"]
        truth = {part: cases[0].label_path.parent for part in parts if (cases := scans_of(self.data, part))
                 if cases[0].label_path is not None}
        return NnunetResult(
            folder=self.out, predictions={part: self.out / "predictions" / part for part in parts}, model=self._model,
            minutes=trained["seconds"] / 60, validation_minutes=trained["validation_seconds"] / 60,
            epochs=trained["epochs"], steps=trained["steps"], parameters=trained["parameters"],
            patch=tuple(planned["patch"]), batch=planned["batch"], network=planned["network"],
            nnunet=trained["nnunet"], torch=trained["torch"], organs=self.data.organs, truth=truth,
            reduced=_reduced(self.options, planned, trained),
        )

    def _stage(self, stage: str, more: dict[str, Any], log: str | None = None) -> dict[str, dict[str, Any]]:
        """Run a stage; returns the last event of each kind."""
        last: dict[str, dict[str, Any]] = {}

        def listen(event: dict[str, Any]) -> None:
            last[event["kind"]] = event
            self._on_event(stage, event)

        spec = self.out / "logs" / f"{log or stage}.json"
        write_text_atomic(spec, json.dumps(self.spec | more, indent=1) + "\n")
        run_stage(self.environment, self.script, stage, spec, log=spec.with_suffix(".log"), variables=self.variables,
                  on_event=listen, descriptors=self.held.descriptors)
        return last

    def _done(self, stage: str, facts: dict[str, Any]) -> None:
        self.state["stages"][stage] = {key: value for key, value in facts.items() if key != "kind"}
        self._save()

    def _save(self) -> None:
        write_text_atomic(self.out / _STATE, json.dumps(self.state, indent=1) + "\n")


def _reduced(plan: NnunetPlan, planned: dict[str, Any], trained: dict[str, Any]) -> tuple[str, ...]:
    words = []
    if planned["patch"] != planned["planned_patch"]:
        words.append(f"crop {_by(planned['patch'])} instead of {_by(planned['planned_patch'])}")
    if planned["batch"] != planned["planned_batch"]:
        words.append(f"batch {planned['batch']} instead of {planned['planned_batch']}")
    whole = NNUNET_EPOCHS * NNUNET_ITERATIONS
    if trained["steps"] < whole:
        words.append(f"{trained['steps']} steps instead of {whole}")
    if not plan.tta:
        words.append("no mirror images when predicting")
    return tuple(words)


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


def _demand_apart(out: Path, data: Path) -> None:
    if out.absolute().resolve().is_relative_to(data.absolute().resolve()):
        raise UsageError("SAME_PATH", out, "the run would be written into the dataset", "name a folder outside it")


def _read_state(out: Path, plan: NnunetPlan, data: NnunetData) -> dict[str, Any]:
    """What `out` says of itself, or that it is new; refused where it is another run's or somebody's folder."""
    mine = {"format": FORMAT, "version": FORMAT_VERSION, "dataset": data.name, "cases": data.fingerprint(),
            "plan": json.loads(json.dumps(plan.as_dict()))}
    path = out / _STATE
    if not path.is_file():
        if any(p.name != _LOCK for p in out.iterdir()):
            raise UsageError("OTHER_RUN", out, f"expected a new folder or a run of nnU-Net ({_STATE}), got other files",
                             "name a new folder")
        return mine | {"stages": {}}
    try:
        state = json.loads(path.read_text("utf-8"))
        theirs = {key: state[key] for key in mine}
        if not isinstance(state["stages"], dict):
            raise ValueError("stages")
    except (ValueError, KeyError, TypeError):
        raise UsageError("OTHER_RUN", path, "expected the state of a run, got something else",
                         "name a new folder") from None
    if theirs["cases"] != mine["cases"] or theirs["dataset"] != mine["dataset"]:
        raise UsageError("OTHER_RUN", out, f"expected a run on these cases of {data.name}, got one on other cases "
                         f"({theirs['dataset']})", "name a new folder")
    ours, before = mine["plan"], theirs["plan"]
    changed = [f"{key} {before.get(key)} instead of {ours[key]}" for key in ours if before.get(key) != ours[key]]
    if changed or (theirs["format"], theirs["version"]) != (FORMAT, FORMAT_VERSION):
        raise UsageError("OTHER_RUN", out, f"expected a run of this plan, got one with {', '.join(changed)}",
                         "name a new folder, or repeat the command as it was")
    return state
