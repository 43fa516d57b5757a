"""nnU-Net as a baseline: what is asked of it, what it is told, how it ends, and that both evaluators say the same.

nnU-Net itself runs where it is installed; what stands for it elsewhere is a program that speaks its words.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autosam3d.errors import AutoSam3dError, MissingExtraError, ResourceError, UsageError, VolumeError
from autosam3d.evaluation.evaluate import evaluate_folder
from autosam3d.studies.nnunet import evaluation as evaluation_module
from autosam3d.studies.nnunet import run as run_module
from autosam3d.studies.nnunet.agreement import BOUND, compare, read_summary
from autosam3d.studies.nnunet.data import open_for_nnunet, write_raw
from autosam3d.studies.nnunet.process import NnunetEnvironment, find_nnunet, run_stage
from autosam3d.studies.nnunet.run import NnunetPlan, train_and_predict
from lock_holders import held_by_another, needs_locks
from on_disk import demand_as_told

ORGANS = {1: "liver", 2: "spleen", 3: "aorta"}
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
# Where nnU-Net lives, if it does: a venv of its own, as the README says.
NNUNET_PYTHON = os.environ.get("AUTOSAM3D_NNUNET_PYTHON") or (
    sys.executable if importlib.util.find_spec("nnunetv2") else None)
needs_nnunet = pytest.mark.skipif(NNUNET_PYTHON is None, reason="nnunetv2 is not installed here; name its Python in "
                                  "AUTOSAM3D_NNUNET_PYTHON")


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def label_map(seed: int, organs: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    """uint8 (x, y, z): a ragged block of each organ."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((24, 20, 14), np.uint8)
    for organ in organs:
        low = rng.integers(0, 8, 3)
        block = labels[low[0]: low[0] + 9, low[1]: low[1] + 8, low[2]: low[2] + 6]
        block[rng.random(block.shape) < 0.8] = organ
    return labels


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path]:
    """(predictions, truth) of five made-up cases: two plain, one missed organ, one false positive, one absent organ."""
    here = {"a": ((1, 2, 3), (1, 2, 3)), "b": ((1, 2, 3), (1, 2, 3)), "missed": ((1, 2), (1, 2, 3)),
            "false": ((1, 2, 3), (1, 2)), "absent": ((1, 2), (1, 2))}
    for number, (name, (predicted, true)) in enumerate(here.items()):
        save(tmp_path / "predictions" / f"{name}.nii.gz", label_map(number, predicted))
        save(tmp_path / "truth" / f"{name}.nii.gz", label_map(number + 100, true))
    return tmp_path / "predictions", tmp_path / "truth"


def summary_of(predictions: Path, truth: Path) -> dict:
    """What nnU-Net 2.8.1 writes for these folders, its formulas written out."""
    rows = []
    for path in sorted(predictions.iterdir()):
        predicted, true = (np.asarray(nib.load(folder / path.name).dataobj) for folder in (predictions, truth))
        metrics = {}
        for label in ORGANS:
            tp = int(((predicted == label) & (true == label)).sum())
            fp, fn = int((predicted == label).sum()) - tp, int((true == label).sum()) - tp
            dice = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
            metrics[str(label)] = {"Dice": dice, "TP": tp, "FP": fp, "FN": fn}
        rows.append({"reference_file": str(truth / path.name), "prediction_file": str(path), "metrics": metrics})
    means = {label: {"Dice": float(np.nanmean([r["metrics"][label]["Dice"] for r in rows]))}
             for label in map(str, ORGANS)}
    return {"metric_per_case": rows, "mean": means,
            "foreground_mean": {"Dice": float(np.mean([m["Dice"] for m in means.values()]))}}


def test_both_evaluators_agree_and_their_rules_are_told_apart(maps: tuple[Path, Path], tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(summary_of(*maps)))
    found = compare(summary, evaluate_folder(*maps, labels=ORGANS))
    assert found.agrees and found.largest <= BOUND
    # 5 cases x 3 organs: one false positive, one absent organ; the missed one is Dice 0 on both sides.
    assert (found.compared, found.false_positives, found.absent) == (13, 1, 1)
    assert found.nnunet_mean < evaluate_folder(*maps, labels=ORGANS).summary().dice.mean  # type: ignore[union-attr]


@pytest.mark.parametrize(("change", "word"), [
    (lambda rows: rows[0]["metrics"]["1"].update(Dice=rows[0]["metrics"]["1"]["Dice"] + 2e-6), "here"),
    (lambda rows: rows[0]["metrics"]["1"].update(Dice=float("nan")), "here"),
    (lambda rows: rows.pop(), "not in nnU-Net's file"),
    (lambda rows: rows[1]["metrics"]["3"].update(Dice=0.25), "not scored here"),
    (lambda rows: rows[3]["metrics"]["3"].update(Dice=0.25), "false positive here"),
])
def test_a_disagreement_is_found(maps: tuple[Path, Path], tmp_path: Path, change, word: str) -> None:
    tree = summary_of(*maps)
    assert [Path(r["prediction_file"]).name.split(".")[0] for r in tree["metric_per_case"]] == [
        "a", "absent", "b", "false", "missed"]
    change(tree["metric_per_case"])
    (tmp_path / "summary.json").write_text(json.dumps(tree))
    found = compare(tmp_path / "summary.json", evaluate_folder(*maps, labels=ORGANS))
    assert not found.agrees and any(word in fault for fault in found.faults), found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric_per_case": 3}', '{"metric_per_case": [], "mean": {}}'])
def test_a_file_that_is_no_summary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(VolumeError, match="nnUNetv2_evaluate_folder"):
        read_summary(tmp_path / "summary.json")


@needs_nnunet
def test_nnunets_own_evaluator_agrees(maps: tuple[Path, Path], tmp_path: Path) -> None:
    labels = {"background": 0} | {name: value for value, name in ORGANS.items()}
    code = ("import sys; from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder as run\n"
            "from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO\n"
            "if __name__ == '__main__': run(sys.argv[1], sys.argv[2], sys.argv[3], SimpleITKIO(), '.nii.gz', "
            f"{sorted(set(labels.values()) - {0})}, None, 1)\n")
    (tmp_path / "run.py").write_text(code)
    subprocess.run([str(NNUNET_PYTHON), str(tmp_path / "run.py"), str(maps[1]), str(maps[0]),
                    str(tmp_path / "summary.json")], check=True, capture_output=True, timeout=280)
    found = compare(tmp_path / "summary.json", evaluate_folder(*maps, labels=ORGANS))
    assert found.agrees and (found.compared, found.false_positives, found.absent) == (13, 1, 1)
    theirs, ours = read_summary(tmp_path / "summary.json")[0], summary_of(*maps)
    for row in ours["metric_per_case"]:
        for label, metrics in row["metrics"].items():
            name = Path(row["prediction_file"]).name.split(".")[0]
            assert theirs[name, int(label)] == pytest.approx(metrics["Dice"], abs=1e-12, nan_ok=True)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training, two validation and one test case."""
    folder = tmp_path / "Dataset612_Made"
    names = [f"case_{n}" for n in range(6)]
    rng = np.random.default_rng(1)
    for number, name in enumerate([*names, "test_0"]):
        part = "Ts" if name.startswith("test") else "Tr"
        save(folder / f"images{part}" / f"{name}_0000.nii.gz", rng.integers(-900, 900, (24, 20, 14)).astype(np.int16))
        save(folder / f"labels{part}" / f"{name}.nii.gz", label_map(number))
    index = {"channel_names": {"0": "image"}, "labels": {"background": 0} | {n: v for v, n in ORGANS.items()},
             "numTraining": 6, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(index))
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    return folder


def test_the_raw_folder_is_nnunets(dataset: Path, tmp_path: Path) -> None:
    raw = write_raw(open_for_nnunet(dataset, 0), tmp_path / "raw")
    assert raw.name == dataset.name
    index = json.loads((raw / "dataset.json").read_text())
    assert index["channel_names"] == {"0": "CT"} and index["numTraining"] == 6
    assert json.loads((raw / "splits_final.json").read_text())[0]["val"] == ["case_4", "case_5"]
    images = sorted(p.name for p in (raw / "imagesTr").iterdir())
    assert images == [f"case_{n}_0000.nii.gz" for n in range(6)] and not (raw / "imagesTs").exists()
    for path in (raw / "labelsTr").iterdir():
        assert path.read_bytes() == (dataset / "labelsTr" / path.name).read_bytes()


def _edit(folder: Path, name: str, change) -> None:
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))


@pytest.mark.parametrize(("spoil", "code"), [
    (lambda d: (d / "splits_final.json").unlink(), "SPLITS"),
    (lambda d: _edit(d, "splits_final.json", lambda s: s[0].update(val=[])), "SPLITS"),
    (lambda d: _edit(d, "splits_final.json", lambda s: s[0]["train"].append("ghost")), "SPLITS"),
    (lambda d: _edit(d, "dataset.json", lambda t: t["labels"].update(aorta=7)), "LABELS"),
    (lambda d: _edit(d, "dataset.json", lambda t: t["labels"].update(liver=[1, 2])), "LABELS"),
    (lambda d: _edit(d, "dataset.json", lambda t: t["labels"].pop("background")), "LABELS"),
    (lambda d: (d / "labelsTr" / "case_3.nii.gz").unlink(), "PAIRING"),
    (lambda d: [p.unlink() for p in (d / "imagesTr" / "case_3_0000.nii.gz", d / "labelsTr" / "case_3.nii.gz")],
     "DATASET"),
    (lambda d: (d / "dataset.json").unlink(), "DATASET"),
    (lambda d: shutil.rmtree(d), "DATASET"),
])
def test_a_wrong_dataset_is_refused_before_anything_is_written(dataset: Path, tmp_path: Path, spoil, code: str) -> None:
    spoil(dataset)
    with pytest.raises(VolumeError) as caught:
        train_and_predict(dataset, tmp_path / "out", python=sys.executable)
    assert caught.value.code == code and not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [
    {"preset": "huge"}, {"configuration": "3d_cascade_fullres"}, {"epochs": 1, "minutes": 1.0}, {"minutes": 0.0},
    {"minutes": float("nan")}, {"epochs": 0}, {"iterations": 0}, {"batch": 1}, {"patch": (4, 64, 64)}, {"fold": -1},
    {"patch": (32, 64, 64), "configuration": "2d"},
])
def test_a_plan_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        NnunetPlan(**wrong)


# What stands for nnU-Net: the same stages, the same words on stdout, the same files, no network.
FAKE = """
    import json, os, signal, sys, time
    from pathlib import Path
    spec = json.loads(Path(sys.argv[2]).read_text())
    stage, faults = sys.argv[1], os.environ.get("FAKE_FAULT", "")
    def tell(kind, **facts): print("@autosam3d " + json.dumps({"kind": kind, **facts}), flush=True)
    (Path(sys.argv[2]).parent / "order.txt").open("a").write(stage + "\\n")
    print("the words of nnU-Net, stage", stage, flush=True)
    if faults == stage + " fails": print("ValueError: it cannot"); sys.exit(1)
    if faults == stage + " memory": print("RuntimeError: CUDA out of memory"); sys.exit(1)
    if faults == stage + " refuses": tell("refused", text="expected another, got this"); sys.exit(2)
    if faults == stage + " hangs": tell("stage", text="hanging"); time.sleep(60)
    if stage == "plan":
        tell("planned", plans="nnUNetPlansReduced", batch=2, planned_batch=2, patch=[8, 16, 16],
             planned_patch=[14, 20, 24], spacing_mm=[3, 2, 2], stages=3, network="PlainConvUNet")
    if stage == "train":
        assert Path(os.environ["nnUNet_raw"], spec["dataset"], "dataset.json").is_file()
        tell("network", parameters=1234567, patch=[8, 16, 16], batch=2)
        tell("epoch", epoch=1, share=1.0, steps=9, loss=-0.2, dice=0.1)
        tell("trained", seconds=60.0, validation_seconds=6.0, steps=9, epochs=1, model="")
    if stage == "predict":
        import shutil
        for done, (name, image) in enumerate(spec["scans"]):
            truth = Path(image).parent.with_name(Path(image).parent.name.replace("images", "labels"))
            shutil.copyfile(truth / (name + ".nii.gz"), Path(spec["into"]) / (name + ".nii.gz"))
            tell("scan", done=done, total=len(spec["scans"]), name=name)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`train_and_predict` meets the program above instead of nnU-Net; the environment is not asked."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(run_module, "SCRIPT", script)
    here = NnunetEnvironment(sys.executable, "2.8.1", "2.13", False, False)
    monkeypatch.setattr(run_module, "find_nnunet", lambda python: here)
    monkeypatch.setattr(evaluation_module, "find_nnunet", run_module.find_nnunet)
    return script


def order(out: Path) -> list[str]:
    return (out / "logs/order.txt").read_text().split()


PLAN = NnunetPlan(minutes=1.0, patch=(8, 16, 16))


def test_a_run_from_planning_to_predictions(dataset: Path, tmp_path: Path, fake: Path) -> None:
    told: list[str] = []
    result = train_and_predict(dataset, tmp_path / "out", PLAN, on_event=lambda stage, word: told.append(word["kind"]))
    assert {p.name for p in result.predictions["validation"].iterdir()} == {"case_4.nii.gz", "case_5.nii.gz"}
    assert {p.name for p in result.predictions["test"].iterdir()} == {"test_0.nii.gz"}
    assert (result.minutes, result.parameters, result.steps, result.patch) == (1.0, 1234567, 9, (8, 16, 16))
    assert result.reduced == ("crop 8 x 16 x 16 instead of 14 x 20 x 24", "9 steps instead of 250000")
    assert result.name == "nnU-Net v2 (reduced)" and result.truth["validation"] == dataset / "labelsTr"
    assert told == ["planned", "network", "epoch", "trained", "scan", "scan", "scan"]
    assert "the words of nnU-Net, stage train" in (tmp_path / "out/logs/train.log").read_text()
    again = train_and_predict(dataset, tmp_path / "out", PLAN)
    assert again == result and order(tmp_path / "out") == ["plan", "train", "predict", "predict"]
    (tmp_path / "out/logs/order.txt").unlink()  # of what stands for nnU-Net
    demand_as_told("A run folder of nnU-Net", tmp_path / "out")


def test_test_scans_wait_until_they_are_asked_for(dataset: Path, tmp_path: Path, fake: Path) -> None:
    result = train_and_predict(dataset, tmp_path / "out", PLAN, parts=("validation",))
    assert list(result.predictions) == ["validation"] and not (tmp_path / "out/predictions/test").exists()
    assert "test" in train_and_predict(dataset, tmp_path / "out", PLAN).predictions
    assert order(tmp_path / "out") == ["plan", "train", "predict", "predict"]


@pytest.mark.parametrize("stage", ["plan", "train", "predict"])
def test_a_stage_that_fails_is_explained_and_repeated(
    dataset: Path, tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    tails: list[list[str]] = []
    monkeypatch.setenv("FAKE_FAULT", f"{stage} fails")
    with pytest.raises(ResourceError, match="exit code 1: ValueError: it cannot; see") as caught:
        train_and_predict(dataset, tmp_path / "out", PLAN, on_event=lambda _, w: tails.append(w.get("lines", [])))
    assert caught.value.code == "NNUNET_FAILED" and tails[-1][-1] == "ValueError: it cannot"
    monkeypatch.setenv("FAKE_FAULT", "")
    assert train_and_predict(dataset, tmp_path / "out", PLAN).steps == 9
    assert order(tmp_path / "out").count(stage) == (3 if stage == "predict" else 2)
    assert "ValueError: it cannot" in next((tmp_path / "out/logs").glob(f"{stage}*.log")).read_text()


def test_refusals_and_memory_have_codes_of_their_own(
    dataset: Path, tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", "plan refuses")
    with pytest.raises(UsageError, match="expected another, got this"):
        train_and_predict(dataset, tmp_path / "out", PLAN)
    monkeypatch.setenv("FAKE_FAULT", "train memory")
    with pytest.raises(ResourceError) as caught:
        train_and_predict(dataset, tmp_path / "out", PLAN)
    assert caught.value.code == "MEMORY"


def test_another_run_in_the_way_is_left_alone(dataset: Path, tmp_path: Path, fake: Path) -> None:
    out = tmp_path / "out"
    train_and_predict(dataset, out, PLAN)
    before = (out / "nnunet.json").read_bytes()

    def refused(where: Path, plan: NnunetPlan) -> str:
        with pytest.raises(AutoSam3dError) as caught:
            train_and_predict(dataset, where, plan)
        return caught.value.code

    assert refused(out, replace(PLAN, minutes=2.0)) == "OTHER_RUN"
    label = dataset / "labelsTr/case_0.nii.gz"
    save(label, label_map(77, (1, 2)))
    assert refused(out, PLAN) == "OTHER_RUN"
    assert (out / "nnunet.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert refused(tmp_path / "mine", PLAN) == "OTHER_RUN"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert refused(dataset / "out", PLAN) == "SAME_PATH"
    assert refused(tmp_path / "mine/thesis.txt", PLAN) == "OUTPUT_PATH"
    (out / "nnunet.json").write_text("{")
    assert refused(out, PLAN) == "OTHER_RUN"


@needs_locks
def test_a_second_process_is_told_who_is_there(dataset: Path, tmp_path: Path, fake: Path) -> None:
    with held_by_another(tmp_path / "out", "nnunet.lock", inherit=True) as holder, pytest.raises(UsageError) as caught:
        train_and_predict(dataset, tmp_path / "out", PLAN)
    assert caught.value.code == "LOCKED" and f"held by process {holder.pid} on " in caught.value.fault


@needs_locks
def test_without_locks_a_run_goes_on(dataset: Path, tmp_path: Path, fake: Path, no_locks: None) -> None:
    assert train_and_predict(dataset, tmp_path / "out", PLAN).steps == 9


@needs_locks
def test_stages_hold_the_folder_too(dataset: Path, tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run_stage = run_module.run_stage

    def note(*given: Any, **more: Any) -> None:
        seen.append(more["descriptors"])
        run_stage(*given, **more)

    monkeypatch.setattr(run_module, "run_stage", note)
    train_and_predict(dataset, tmp_path / "out", PLAN)
    assert seen and all(len(descriptors) == 1 for descriptors in seen)


def test_a_stop_ends_the_stage_and_all_that_it_started(tmp_path: Path) -> None:
    script, pids = tmp_path / "stage.py", tmp_path / "pids"
    script.write_text(textwrap.dedent(f"""
        import os, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        def save(number, frame):
            open({str(tmp_path / "saved")!r}, "w").write("saved"); sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        print('@autosam3d {{"kind": "stage", "text": "here"}}', flush=True)
        time.sleep(60)
    """))

    def interrupt(told: dict) -> None:
        raise KeyboardInterrupt

    here = NnunetEnvironment(sys.executable, "2.8.1", "2.13", False, False)
    with pytest.raises(KeyboardInterrupt):
        run_stage(here, script, "train", tmp_path / "spec.json", log=tmp_path / "log", variables={}, on_event=interrupt)
    assert (tmp_path / "saved").read_text() == "saved"
    time.sleep(0.2)
    for pid in map(int, pids.read_text().split()):
        alive = Path(f"/proc/{pid}/stat")
        assert not alive.exists() or alive.read_text().split()[2] == "Z"


def _python_that_says(tmp_path: Path, found: dict) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho noise\necho '@autosam3d {json.dumps(found)}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("found", "word"), [
    ({"nnunetv2": None, "torch": "2.13.0", "torchvision": None}, "got nnunetv2 missing"),
    ({"nnunetv2": "2.5.1", "torch": "2.13.0", "torchvision": None}, "got nnunetv2 2.5.1"),
    ({"nnunetv2": "2.8.1", "torch": None, "torchvision": None}, "torch missing"),
    ({"nnunetv2": "2.8.1", "torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "pip uninstall torchvision timm"),
])
def test_an_environment_that_cannot_run_nnunet(tmp_path: Path, found: dict, word: str) -> None:
    with pytest.raises(MissingExtraError, match=word):
        find_nnunet(_python_that_says(tmp_path, found))


def test_an_environment_that_can(tmp_path: Path) -> None:
    found = {"nnunetv2": "2.8.1", "torch": "2.13.0+cu130", "torchvision": "0.28.0", "cuda": True, "mps": False}
    environment = find_nnunet(_python_that_says(tmp_path, found))
    assert environment.device("auto") == ("cuda", None) and environment.device("cuda:3") == ("cuda", "3")
    with pytest.raises(UsageError):
        environment.device("mps")
    with pytest.raises(UsageError, match="expected a Python that runs"):
        find_nnunet(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="imports torch"):
        find_nnunet("/bin/false")


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is not None, reason="nnunetv2 is installed here")
def test_the_command_without_nnunet_says_what_is_missing(dataset: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "autosam3d", "nnunet", str(dataset), str(tmp_path / "out")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error[NNUNET]" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@needs_nnunet
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nnunet_itself_trains_predicts_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    plan = NnunetPlan(epochs=2, iterations=2, patch=(8, 16, 16), batch=2, tta=False)
    stopped: list[int] = []

    def stop(stage: str, told: dict) -> None:
        if told["kind"] == "epoch" and not stopped:
            stopped.append(signal.SIGINT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_predict(dataset, tmp_path / "out", plan, python=NNUNET_PYTHON, device="cpu", threads=1, on_event=stop)
    told: list[dict] = []
    result = train_and_predict(dataset, tmp_path / "out", plan, python=NNUNET_PYTHON, device="cpu", threads=1,
                               on_event=lambda _, word: told.append(word))
    assert any("going on after" in word.get("text", "") for word in told)
    assert result.epochs == 2 and result.reduced
    evaluation, agreement = evaluation_module.evaluate_run(result, "validation", python=NNUNET_PYTHON, threads=1)
    assert len(evaluation.cases) == 2 and agreement.agrees
