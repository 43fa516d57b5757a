"""`autosam3d train` as a user meets it: exit codes, one line of error, signals, kills, and two processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import command_line
from autosam3d.checkpoints.checkpoint import read_checkpoint
from autosam3d.recipes.recipe import Recipe, recipe_from_dict
from command_line import Done, Started
from mini_run import (
    TRAIN,
    environment,
    log_rows,
    mini_recipe,
    weights_of,
    write_mini_dataset,
    write_recipe,
    write_sam,
)

# Long enough to be met in the middle: 4 epochs of 4 steps, saved at every one.
RECIPE = mini_recipe(sampling__patches_per_volume=2, train__epochs=4, optim__ema=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", RECIPE)
    write_sam(folder / "sam.safetensors")
    return folder


def arguments(folder: Path, run: Path, *more: str | Path) -> list[str | Path]:
    return ["train", folder / "mini.yaml", "--data", folder / "data", "--out", run, "--device", "cpu", "--threads", "1",
            "--cache", folder / "cache", *more]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nothing disturbed."""
    done = command_line.run(*arguments(folder, folder / "whole", "--sam", folder / "sam.safetensors"))
    assert done.code == 0 and "trained 4 epochs" in done.out, done.err
    return folder / "whole"


def demand_equal(run: Path, expected: Path) -> None:
    for name in ("best", "last"):
        assert weights_of(run, name) == weights_of(expected, name)
    assert log_rows(run) == log_rows(expected)
    assert (run / "validation.csv").read_text() == (expected / "validation.csv").read_text()


def wait_for_steps(run: Path, count: int, child: Started, seconds: float = 60) -> None:
    """Until log.csv has `count` steps."""
    end = time.monotonic() + seconds
    log = run / "log.csv"
    while not log.exists() or log.read_text().count("\n") <= count:
        assert time.monotonic() < end, child.err.read_text()
        time.sleep(0.005)


# ---- stopping ----


def test_signals_save_and_the_same_command_goes_on(folder: Path, whole: Path,
                                                   tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(folder, run, "--sam", folder / "sam.safetensors")
    for steps, number, code in ((2, signal.SIGTERM, 143), (5, signal.SIGINT, 130), (9, signal.SIGUSR1, 138)):
        child = command_line.start(*command)
        wait_for_steps(run, steps, child)
        child.kill(number)
        done = child.wait(10)
        assert done.code == code, done.err
        assert "the same command goes on" in done.err and "Traceback" not in done.err
        saved = read_checkpoint(run / "last.json").meta["progress"]["global_step"]
        assert steps <= saved == len(log_rows(run)) - 1 < 16
    done = command_line.run(*command)
    assert done.code == 0, done.err
    demand_equal(run, whole)


def test_two_signals_end_at_once(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = command_line.start(*arguments(folder, run))
    wait_for_steps(run, 2, child)
    child.kill(signal.SIGINT)
    child.kill(signal.SIGTERM)
    assert child.wait(10).code in (130, 143)  # 143: it had saved before the second one came
    read_checkpoint(run / "last.json")


def kill_often(folder: Path, run: Path, kills: int, seed: int) -> int:
    """Kill -9 after a random part of the time that a whole run takes; returns how many hit a living process."""
    random = np.random.default_rng(seed)
    command = arguments(folder, run, "--sam", folder / "sam.safetensors")
    hit = 0
    for _ in range(kills):
        child = command_line.start(*command)
        steps_before = len(log_rows(run)) - 1 if (run / "log.csv").exists() else 0
        if random.random() < 0.3 or steps_before >= 15:
            time.sleep(random.uniform(0, 0.5))  # also while it starts
        else:
            wait_for_steps(run, steps_before + int(random.integers(0, 3)), child)
            time.sleep(random.uniform(0, 0.1))
        child.kill(signal.SIGKILL)
        hit += child.wait().code == -signal.SIGKILL
    done = command_line.run(*command)
    assert done.code == 0, done.err
    return hit


def test_killed_at_random_moments_the_run_ends_with_the_same_weights(folder: Path, whole: Path, tmp_path: Path) -> None:
    assert kill_often(folder, tmp_path / "run", kills=5, seed=0) >= 2
    demand_equal(tmp_path / "run", whole)
    assert not [p.name for p in (tmp_path / "run").iterdir() if ".tmp-" in p.name]


def test_with_workers_it_is_the_same_run_and_killed_it_starts_at_once_again(folder: Path, whole: Path,
                                                                            tmp_path: Path) -> None:
    # The processes that cut crops outlive a killed training by seconds: they must not hold its folder.
    run = tmp_path / "run"
    command = arguments(folder, run, "--sam", folder / "sam.safetensors", "--set", "train.num_workers=2")
    child = command_line.start(*command)
    wait_for_steps(run, 6, child)  # in the second epoch
    child.kill(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    done = command_line.run(*command)
    assert done.code == 0, done.err
    demand_equal(run, whole)


def test_two_trainings_in_one_folder_do_not_mix(folder: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(folder, run, "--sam", folder / "sam.safetensors")
    child = command_line.start(*command)
    wait_for_steps(run, 2, child)
    child.kill(signal.SIGSTOP)
    try:
        with command_line.unchanged(run):
            for more in ((), ("--set", "train.seed=3")):
                error = command_line.run(*command, *more).demand_error("LOCKED", 2)
                assert f"process {child.pid} " in error
    finally:
        child.kill(signal.SIGCONT)
    assert child.wait().code == 0
    demand_equal(run, whole)


def test_the_real_command_line_in_a_process_of_its_own(folder: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [str(a) for a in arguments(folder, run, "--sam", folder / "sam.safetensors")]
    with subprocess.Popen([sys.executable, "-m", "autosam3d", *options], env=environment(), stderr=subprocess.PIPE,
                          text=True) as process:
        end = time.monotonic() + 120
        while not (run / "log.csv").exists() or len(log_rows(run)) < 4:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 143, error
    done = command_line.run(*options)
    assert done.code == 0, done.err
    demand_equal(run, whole)


# ---- what cannot be meant, read or written ----


def demand_failure(done: Done, exit_code: int, code: str, *words: str) -> None:
    error = done.demand_error(code, exit_code)
    for word in words:
        assert word in error


def test_wrong_usage(folder: Path, tmp_path: Path) -> None:
    data, run, recipe = folder / "data", tmp_path / "run", folder / "mini.yaml"
    base = ["--data", data, "--out", run]
    demand_failure(command_line.run("train", recipe, *base, "--device", "cuda:7"), 2, "DEVICE", "cuda:7")
    demand_failure(command_line.run("train", recipe, *base, "--device", "tpu"), 2, "USAGE", "tpu")
    demand_failure(command_line.run("train", "btvc", *base), 2, "NO_RECIPE", "btcv")
    demand_failure(command_line.run("train", recipe, *base, "--set", "train.epoch=3"), 2, "UNKNOWN_KEY", "train.epochs")
    demand_failure(command_line.run("train", recipe, *base, "--set", "train.epochs=-3"), 2, "BAD_VALUE", "epochs")
    demand_failure(command_line.run("train", recipe, *base, "--set", "train.num_workers=1000"), 2, "BAD_VALUE", "64")
    demand_failure(command_line.run("train", recipe, *base, "--set", "optim.lr=.nan"), 2, "BAD_VALUE", "optim.lr")
    demand_failure(command_line.run("train", recipe, *base, "--set", "optim.warmup_epochs=4"), 2, "BAD_VALUE",
                   "optim.warmup_epochs", "train.epochs")
    demand_failure(command_line.run("train", recipe, *base, "--set", "model.patch_size=[15,16,16]"), 2, "BAD_VALUE")
    demand_failure(command_line.run("train", recipe, *base, "--set", "nonsense"), 2, "OVERRIDE")
    demand_failure(command_line.run("train", recipe), 2, "DATA")
    assert not run.exists() or list(run.iterdir()) == []  # nothing was begun


def test_data_that_is_absent_or_of_another_recipe(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = folder / "mini.yaml"
    demand_failure(command_line.run("train", recipe, "--data", tmp_path / "absent", "--out", run), 3, "DATASET")
    demand_failure(command_line.run("train", recipe, "--data", recipe, "--out", run), 3, "DATASET")
    demand_failure(command_line.run("train", "btcv", "--data", folder / "data", "--out", run), 3, "LABELS")
    assert not run.exists()


def test_a_damaged_scan_names_the_file(folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder / "data", tmp_path / "data"))
    scan = data / "imagesTr" / "c2_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-300])
    done = command_line.run("train", folder / "mini.yaml", "--data", data, "--out", tmp_path / "run", "--device", "cpu")
    demand_failure(done, 3, "TRUNCATED", "c2_0000.nii.gz")


def test_places_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    demand_failure(command_line.run(*arguments(folder, tmp_path / "file" / "run")), 2, "OUTPUT_PATH", "file")
    demand_failure(command_line.run(*arguments(folder, tmp_path / "run", "--cache", tmp_path / "file" / "cache")), 2,
                   "OUTPUT_PATH", "--cache")


def test_sam_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    text, cut, other, pickled = (tmp_path / name for name in ("text.pth", "cut.safetensors", "other.pth", "p.pth"))
    text.write_text("<html>Not found</html>")
    cut.write_bytes((folder / "sam.safetensors").read_bytes()[:-1000])
    torch.save({"image_encoder.pos_embed": torch.ones(1, 64, 64, 768)}, other)
    pickled.write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueq\x00\x85q\x01Rq\x02.")
    run = tmp_path / "run"
    for path, code in ((text, "CORRUPT"), (cut, "CORRUPT"), (other, "MISMATCH"), (pickled, "UNSAFE"),
                       (tmp_path / "absent.pth", "NO_SAM")):
        demand_failure(command_line.run(*arguments(folder, run, "--sam", path)), 4, code)


def test_another_run_or_another_sam_in_the_folder(folder: Path, whole: Path,
                                                  tmp_path: Path) -> None:
    sam = folder / "sam.safetensors"
    demand_failure(command_line.run(*arguments(folder, whole, "--sam", sam, "--set", "train.seed=9")), 2, "OTHER_RUN",
                   "seed: 9")
    other = write_sam(tmp_path / "other.safetensors", seed=4)
    demand_failure(command_line.run(*arguments(folder, whole, "--sam", other)), 2, "OTHER_SAM")
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("last.json", "previous.json"):
        (run / name).write_text("{")
    demand_failure(command_line.run(*arguments(folder, run, "--sam", sam)), 4, "CORRUPT")


def test_info_and_pack_of_a_trained_model(folder: Path, whole: Path, tmp_path: Path) -> None:
    text = command_line.run("info", whole).demand_ok().out
    assert "two blobs" in text and "right_kidney" in text
    command_line.run("pack", whole, tmp_path / "packed").demand_ok()
    assert (tmp_path / "packed" / "model.json").is_file()
    demand_failure(command_line.run("info", tmp_path), 4, "NO_MODEL")


# ---- two processes ----


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def training(folder: Path, recipe: Path, run: Path) -> list[str | Path]:
    return ["train", recipe, "--data", folder / "data", "--out", run, "--device", "cpu", "--sam",
            folder / "sam.safetensors"]


def by_torchrun(*command: str | Path) -> list[str]:
    """The command in two processes, as a user starts them."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
            "--master-port", str(free_port()), "-m", "autosam3d", *map(str, command)]


def as_torchrun(port: int, rank: int) -> dict[str, str]:
    """What `torchrun` would set for one of two processes, without its own start."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank),
            "LOCAL_RANK": str(rank)}


def run_in_two(*command: str | Path, script: Path | None = None) -> None:
    """The command, or a script, in two processes that have everything imported."""
    port = free_port()
    ranks = [command_line.start(*command, env=as_torchrun(port, rank), script=script) for rank in (0, 1)]
    try:
        for done in [rank.wait(200) for rank in ranks]:
            assert done.code == 0, done.err
    finally:
        for rank in ranks:
            rank.kill()


def recipe_of_batch(path: Path, batch_size: int, **changes: object) -> Path:
    recipe: Recipe = mini_recipe(train__batch_size=batch_size, train__epochs=2, train__validate_every=1,
                                 optim__lr=5e-4, **changes)
    return write_recipe(path, recipe)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_double_batch(folder: Path, tmp_path: Path) -> None:
    single, double = (recipe_of_batch(tmp_path / f"{n}.yaml", n) for n in (1, 2))
    done = subprocess.run(by_torchrun(*training(folder, single, tmp_path / "two")), env=environment(),
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    alone = command_line.run("train", double, "--data", folder / "data", "--out", tmp_path / "one", "--device", "cpu",
                "--threads", "1", "--sam", folder / "sam.safetensors")
    assert alone.code == 0, alone.err
    demand_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_distil_as_one_with_the_double_batch(folder: Path, tmp_path: Path) -> None:
    """Each asks the teacher for its half of the cases; both read all of its answers."""
    teacher = command_line.write_model(tmp_path / "teacher")
    for name, batch_size in (("two", 1), ("one", 2)):
        recipe = recipe_from_dict(mini_recipe(train__batch_size=batch_size, train__epochs=2, train__validate_every=1,
                                              model__adapter_dim=4).as_dict() | {"distill": {"lambda": 0.3}})
        command = ("distill", teacher, "--student", write_recipe(tmp_path / f"{name}.yaml", recipe), "--data",
                   folder / "data", "--out", tmp_path / name, "--device", "cpu", "--cache", tmp_path / f"{name}_cache")
        if name == "one":
            alone = command_line.run(*command, "--threads", "1")
            assert alone.code == 0, alone.err
            continue
        run_in_two(*command)
    demand_alike(tmp_path / "two", tmp_path / "one")
    answers = [sorted(p.relative_to(tmp_path / cache) for p in (tmp_path / cache).glob("*/teacher-*.npy"))
               for cache in ("two_cache", "one_cache")]
    assert answers[0] == answers[1] and len(answers[0]) == len(TRAIN)
    header, *rows = log_rows(tmp_path / "two")
    assert rows and all(float(row[header.index("teacher_loss")]) > 0 for row in rows)


def demand_alike(two: Path, one: Path) -> None:
    """Two processes with a crop each, and one with both, came to the same."""
    assert json.loads((two / "last.json").read_text())["world_size"] == 2
    ours, theirs = (read_checkpoint(run / "last.json").tensors for run in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)
    steps = [[row[:3] for row in log_rows(run)] for run in (two, one)]
    assert steps[0] == steps[1]
    val = [np.loadtxt(run / "validation.csv", delimiter=",", skiprows=1) for run in (two, one)]
    np.testing.assert_allclose(*val, atol=0.02)
    assert sorted(p.name.split("-")[0] for p in two.glob("*.safetensors")) == ["best", "last", "last"]
    assert not [p.name for p in two.iterdir() if ".tmp" in p.name]


# Run by each of two processes: five starts of one run, of which four are stopped, and one that nothing disturbs.
_STOPPED_RANKS = """
import json, logging, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
import autosam3d.data.cache as data_module
import autosam3d.training.train as train_module
from autosam3d.data.folder import CaseSet, open_dataset
from autosam3d.inference.torch_runtime import TorchPredictor
from mini_run import mini_recipe

torch.set_num_threads(1)
folder, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
recipe = mini_recipe(train__batch_size=1, train__epochs=2, train__validate_every=1)
found = open_dataset(folder / "data", recipe)
# Three validation cases: the first process has two, the second one.
cases = CaseSet(found.folder, found.train, (*found.val, found.train[0]), ())
warnings, hashed, steps, windows, tests = [], [], 0, 0, {}

class Warnings(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

logging.getLogger("autosam3d").addHandler(Warnings())

def signalled(name, real):
    def call(*args, **options):
        if name in tests:
            tests[name] -= 1
            if tests[name] == 0:
                os.kill(os.getpid(), tests["signal"])
        return real(*args, **options)
    return call

train_module.train_step = signalled("step", train_module.train_step)
TorchPredictor.predict = signalled("window", TorchPredictor.predict)
real_hash = data_module.sha256_of
data_module.sha256_of = lambda path: hashed.append(path.name) or real_hash(path)

results, saved = [], []
for victim, name, count, number in (
    (1, "step", 2, signal.SIGUSR1),     # one of two steps of the epoch
    (1, "window", 3, signal.SIGTERM),   # both at their first case
    (0, "window", 12, signal.SIGINT),   # the second has no case left and waits for the first, at its second one
    (0, "window", 10**9, signal.SIGTERM),
    (None, None, None, None),
):
    tests.clear()
    if rank == victim:
        tests.update({name: count, "signal": number})
    run = out / ("run" if victim is not None else "whole")
    result = train_module.train(recipe, cases, run, device="cpu", cache_dir=out / "cache", observer=None)
    results.append((result.stopped_by, result.epoch, result.rank))
    saved.append(json.loads((run / "last.json").read_text())["progress"])
(out / f"rank{rank}.json").write_text(json.dumps({
    "results": results, "saved": saved, "warnings": warnings, "hashed": hashed}))
"""


@pytest.mark.slow
def test_a_stop_of_one_process_stops_both_alike(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(_STOPPED_RANKS)
    run_in_two(folder, tmp_path, Path(__file__).parents[1], script=tmp_path / "ranks.py")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    stops = [(signal.SIGUSR1, 0), (signal.SIGTERM, 0), (signal.SIGINT, 0), (None, 2), (None, 2)]
    for rank, told in enumerate((first, second)):
        assert told["results"] == [[number, epoch, rank] for number, epoch in stops]
    # The second step was whole before they met; each validation was given up and began anew.
    assert [s["step_in_epoch"] for s in first["saved"][:3]] == [2, 2, 2]
    assert [s["global_step"] for s in first["saved"]] == [2, 2, 2, 4, 4]
    demand_equal(tmp_path / "run", tmp_path / "whole")
    # Each process read its half of the cases, at each of the five starts, and the first one alone warned.
    names = [f"{name}_0000.nii.gz" for name in ("c0", "c1", "c2", "c3", "c4", "c5", "c0")]
    for told, half in ((first, names[0::2]), (second, names[1::2])):
        images = [name for name in told["hashed"] if name.endswith("_0000.nii.gz")]
        assert images == 5 * half
    assert len(first["warnings"]) == 5 and "no SAM weights" in first["warnings"][0] and not second["warnings"]


@pytest.mark.soak
def test_one_process_of_two_killed_ends_both_and_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of_batch(tmp_path / "mini.yaml", 1, sampling__patches_per_volume=4)
    expected, run = tmp_path / "whole", tmp_path / "run"
    run_in_two(*training(folder, recipe, expected))
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = len(log_rows(run)) if (run / "log.csv").exists() else 1
        with subprocess.Popen(by_torchrun(*training(folder, recipe, run)), env=environment(), stderr=subprocess.PIPE,
                              text=True) as process:
            end = time.monotonic() + 120
            while not (run / "log.csv").exists() or len(log_rows(run)) < before + 2:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.01)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            victim = int(children[-1]) if number == signal.SIGKILL else process.pid
            subprocess.run(["kill", f"-{int(number)}", str(victim)], check=True)
            process.communicate(timeout=60)
        assert process.returncode != 0
    run_in_two(*training(folder, recipe, run))
    demand_equal(run, expected)
