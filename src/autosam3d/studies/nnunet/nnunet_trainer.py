"""What runs inside nnU-Net's own environment: its planner, its trainer with a budget, its predictor, its evaluator.

`run.py` copies this file beside the run and starts it as ``python nnunet_trainer.py STAGE SPEC.json``, in an
environment that has nnunetv2 and may lack this package: nothing of the package is imported here. nnU-Net finds the
trainer class in the folder that the environment variable ``nnUNet_extTrainer`` names.

Lines on stdout that begin with `MARK` are JSON for `process.py`; all others are nnU-Net's words.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]

MARK = "@autosam3d "
TRAINER, PLANNERS = "nnUNetTrainerBudget", {
    "default": ("ExperimentPlanner", "nnUNetPlans"),
    "resenc_m": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "resenc_l": ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
    "resenc_xl": ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans"),
}
SAVE_EVERY_S = 60.0
TELL_EVERY_S = 2.0
# *Source*: the shortest edge of a feature map in nnU-Net's planner (UNet_featuremap_min_edge_length).
MIN_EDGE = 4


def tell(kind: str, **facts: Any) -> None:
    """Report an event to the process that started this one, as a line on stdout."""
    print(MARK + json.dumps({"kind": kind, **facts}), flush=True)


class Stopped(Exception):
    """SIGTERM was received, and the state is saved."""


class nnUNetTrainerBudget(nnUNetTrainer):
    """nnU-Net's trainer, ended by a number of epochs or by minutes; the spec of the run says which.

    With minutes, the rate follows nnU-Net's own law, initial rate x (1 - share)^0.9, over the share of the minutes
    that is spent instead of the share of the epochs; what validation inside training takes counts as spent.
    """

    spec: dict[str, Any]
    spent_s: float
    steps: int

    def initialize(self) -> None:
        self.spec = json.loads(Path(os.environ["AUTOSAM3D_NNUNET_SPEC"]).read_text("utf-8"))
        self.num_iterations_per_epoch = self.spec["iterations"]
        # *Source*: nnU-Net validates on 50 batches after 250.
        self.num_val_iterations_per_epoch = max(1, self.spec["iterations"] // 5)
        self.budget_s = self.spec["minutes"] * 60 if self.spec["minutes"] is not None else None
        self.num_epochs = self.spec["epochs"] if self.budget_s is None else 10**9
        self.spent_s, self.steps, self.validation_s = 0.0, 0, 0.0
        self._since = self._saved_at = self._told_at = time.monotonic()
        self._stop = False
        super().initialize()

    def run_training(self) -> None:
        self.on_train_start()
        signal.signal(signal.SIGTERM, self._on_stop)  # after the start of the loaders, which must not inherit it
        tell("network", parameters=sum(p.numel() for p in self.network.parameters() if p.requires_grad),
             patch=list(self.configuration_manager.patch_size), batch=self.configuration_manager.batch_size)
        self._since = self._saved_at = time.monotonic()
        while self.current_epoch < self.num_epochs and (self.budget_s is None or self._share() < 1):
            self._one_epoch()
        self.on_train_end()

    def _one_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        outputs: list[dict] = []
        for _ in range(self.num_iterations_per_epoch):
            self._set_rate()
            outputs.append(self.train_step(next(self.dataloader_train)))
            self.steps += 1
            self._after_step(outputs[-1])
            if self._share() >= 1 and self.budget_s is not None:
                break
        self.on_train_epoch_end(outputs)
        started = time.monotonic()
        with torch.no_grad():
            self.on_validation_epoch_start()
            # Nothing follows that could use it: when the minutes are over, one batch fills nnU-Net's table.
            over = self.budget_s is not None and self._share() >= 1
            batches = range(1 if over else self.num_val_iterations_per_epoch)
            self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in batches])
        self.validation_s += time.monotonic() - started
        due = time.monotonic() - self._saved_at > SAVE_EVERY_S
        self.save_every = 1 if due else 10**9
        self.on_epoch_end()
        tell("epoch", epoch=self.current_epoch, share=self._share(), steps=self.steps,
             loss=float(self.logger.get_value("train_losses", step=-1)),
             dice=float(self.logger.get_value("mean_fg_dice", step=-1)))

    def _share(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        now = time.monotonic()
        self.spent_s += now - self._since
        self._since = now
        if self.budget_s is not None:
            return min(1.0, self.spent_s / self.budget_s)
        return min(1.0, self.steps / (self.num_epochs * self.num_iterations_per_epoch))

    def _set_rate(self) -> None:
        if self.budget_s is None:
            return
        # *Source*: PolyLRScheduler of nnU-Net, exponent 0.9.
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * (1 - min(self._share(), 1 - 1e-6)) ** 0.9

    def _after_step(self, output: dict) -> None:
        now = time.monotonic()
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            tell("step", share=self._share(), steps=self.steps, loss=float(output["loss"]))
        if not self._stop:
            return
        # The epoch is begun again: what it learned so far is kept, its number is not counted.
        self.current_epoch -= 1
        self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        raise Stopped

    def _on_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._set_rate()

    def save_checkpoint(self, filename: str) -> None:
        """Save a checkpoint whole or not at all; nnU-Net itself overwrites the file that it would resume from."""
        self._share()
        if filename.endswith("checkpoint_latest.pth"):
            self._saved_at = time.monotonic()
        # First what is spent: a kill between the two can only lose minutes, never win some.
        counted = {"spent_s": self.spent_s, "steps": self.steps, "validation_s": self.validation_s}
        replace_text(Path(self.output_folder) / "budget.json", json.dumps(counted))
        super().save_checkpoint(filename + ".part")
        Path(filename + ".part").replace(filename)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        counted = json.loads((Path(self.output_folder) / "budget.json").read_text("utf-8"))
        self.spent_s, self.steps = counted["spent_s"], counted["steps"]
        self.validation_s = counted["validation_s"]
        self._since = time.monotonic()


def nnunets_folder(name: str) -> Path:
    """One of nnU-Net's three folders: ``raw``, ``preprocessed`` or ``results``."""
    return Path(os.environ[f"nnUNet_{name}"])


def replace_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def plan(spec: dict[str, Any]) -> None:
    """Fingerprint, plans and preprocessed cases; with `patch` or `batch`, plans of that size beside nnU-Net's own."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api  # pyright: ignore[reportMissingImports]

    planner, _ = PLANNERS[spec["preset"]]
    number, workers = spec["dataset_id"], spec["workers"]
    tell("stage", text="looking at the cases")
    api.extract_fingerprints([number], num_processes=workers, check_dataset_integrity=True, clean=True)
    name = api.plan_experiments([number], planner)
    folder = nnunets_folder("preprocessed") / spec["dataset"]
    plans = json.loads((folder / f"{name}.json").read_text("utf-8"))
    configuration = plans["configurations"].get(spec["configuration"])
    if configuration is None:
        there = ", ".join(c for c in plans["configurations"] if "cascade" not in c)
        refuse(f"expected a configuration that nnU-Net plans for this dataset ({there}), got {spec['configuration']}")
    whole = {"patch": configuration["patch_size"], "batch": configuration["batch_size"]}
    if spec["patch"] is not None or spec["batch"] is not None:
        shrink(plans, configuration, spec["patch"], spec["batch"])
        plans["plans_name"] = name = f"{name}Reduced"
        replace_text(folder / f"{name}.json", json.dumps(plans, indent=1))
    # The same cases validate as elsewhere, whatever an older copy says.
    splits = nnunets_folder("raw") / spec["dataset"] / "splits_final.json"
    replace_text(folder / "splits_final.json", splits.read_text("utf-8"))
    tell("stage", text="preprocessing")
    api.preprocess([number], name, (spec["configuration"],), (workers,))
    flat = len(configuration["patch_size"]) == 2
    back = [] if flat else [plans["transpose_forward"].index(axis) for axis in range(3)]
    tell("planned", plans=name, batch=configuration["batch_size"], planned_batch=whole["batch"],
         patch=[configuration["patch_size"][i] for i in back] or configuration["patch_size"],
         planned_patch=[whole["patch"][i] for i in back] or whole["patch"],
         spacing_mm=[configuration["spacing"][i] for i in back] or configuration["spacing"],
         stages=configuration["architecture"]["arch_kwargs"]["n_stages"],
         network=configuration["architecture"]["network_class_name"].rsplit(".", 1)[-1])


def shrink(plans: dict[str, Any], configuration: dict[str, Any], patch: list[int] | None, batch: int | None) -> None:
    """Plans for a smaller crop, with the network of nnU-Net's own pooling rule: fewer stages, the same widths."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (  # pyright: ignore
        get_pool_and_conv_props,
    )

    if batch is not None:
        configuration["batch_size"] = batch
    if patch is None:
        return
    wanted = [patch[axis] for axis in plans["transpose_forward"]]
    _, strides, kernels, size, _ = get_pool_and_conv_props(configuration["spacing"], wanted, MIN_EDGE, 999999)
    network = configuration["architecture"]["arch_kwargs"]
    stages = len(strides)
    if stages > network["n_stages"] or stages < 2:
        refuse(f"expected a crop that takes 2 to {network['n_stages']} stages, got one of {stages}: nnU-Net plans "
               f"{configuration['patch_size']} in its order of axes {plans['transpose_forward']}")
    network |= {"n_stages": stages, "strides": strides, "kernel_sizes": kernels}
    for key, length in (("features_per_stage", stages), ("n_conv_per_stage", stages), ("n_blocks_per_stage", stages),
                        ("n_conv_per_stage_decoder", stages - 1)):
        if key in network:
            network[key] = network[key][:length]
    configuration["patch_size"] = [int(n) for n in size]


def know_the_trainer(module: Any) -> None:
    """Let a module of nnU-Net have the class above without a search.

    The search imports every trainer of nnU-Net first, among them those that need timm and torchvision, which must be
    absent beside a CPU build of torch. Where a later nnU-Net searches elsewhere, ``nnUNet_extTrainer`` leads it here.
    """
    if hasattr(module, "recursive_find_trainer_class_by_name"):
        module.recursive_find_trainer_class_by_name = {TRAINER: nnUNetTrainerBudget}.__getitem__


def train(spec: dict[str, Any]) -> None:
    from nnunetv2.run import run_training  # pyright: ignore[reportMissingImports]

    know_the_trainer(run_training)
    trainer = run_training.get_trainer_from_args(spec["dataset"], spec["configuration"], spec["fold"], TRAINER,
                                                 spec["plans"], device=torch.device(spec["device"]))
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        tell("stage", text=f"going on after {trainer.spent_s / 60:.1f} min, {trainer.steps} steps")
    try:
        trainer.run_training()
    except Stopped:
        sys.exit(128 + signal.SIGTERM)
    tell("trained", seconds=round(trainer.spent_s, 1), validation_seconds=round(trainer.validation_s, 1),
         steps=trainer.steps, epochs=trainer.current_epoch, model=str(Path(trainer.output_folder_base)))


def predict(spec: dict[str, Any]) -> None:
    """Label maps of ``spec["scans"]`` (name, image) in ``spec["into"]``, a case at a time, each whole or absent."""
    from nnunetv2.inference import predict_from_raw_data  # pyright: ignore[reportMissingImports]

    know_the_trainer(predict_from_raw_data)
    device = torch.device(spec["device"])
    predictor = predict_from_raw_data.nnUNetPredictor(
        use_mirroring=spec["tta"], perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(spec["model"], (spec["fold"],), "checkpoint_final.pth")
    into, ending = Path(spec["into"]), spec["ending"]
    part = into / ".part"
    part.mkdir(parents=True, exist_ok=True)
    for done, (name, image) in enumerate(spec["scans"]):
        tell("scan", done=done, total=len(spec["scans"]), name=name)
        if not (into / (name + ending)).is_file():
            predictor.predict_from_files_sequential([[image]], [str(part / name)], False, True)
            (part / (name + ending)).replace(into / (name + ending))
    for left in part.iterdir():
        left.unlink()
    part.rmdir()
    tell("scan", done=len(spec["scans"]), total=len(spec["scans"]), name="")


def evaluate(spec: dict[str, Any]) -> None:
    """nnU-Net's own metrics of a folder, as ``nnUNetv2_evaluate_folder`` writes them."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2  # pyright: ignore

    raw = nnunets_folder("raw") / spec["dataset"]
    compute_metrics_on_folder2(spec["truth"], spec["into"], str(raw / "dataset.json"),
                               str(Path(spec["model"]) / "plans.json"), spec["summary"] + ".part.json",
                               num_processes=spec["workers"], chill=True)
    Path(spec["summary"] + ".part.json").replace(spec["summary"])


def refuse(text: str) -> NoReturn:
    tell("refused", text=text)
    sys.exit(2)


if __name__ == "__main__":
    _spec = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    torch.set_num_threads(_spec["threads"])
    torch.manual_seed(_spec["seed"])
    {"plan": plan, "train": train, "predict": predict, "evaluate": evaluate}[sys.argv[1]](_spec)
