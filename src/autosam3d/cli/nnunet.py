"""``autosam3d nnunet``: the real nnU-Net v2 on a dataset of ours, in one command that goes on where it was stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from autosam3d.cli.console import on_task, one_line, progress_bars
from autosam3d.cli.options import Device, Threads, Tolerances

# An epoch on a CPU can take minutes: so often a line says that it is at work.
STEP_LINE_S = 60.0


def nnunet(
    data: Annotated[Path, typer.Argument(help="Dataset folder in the nnU-Net v2 layout, with splits_final.json.")],
    out: Annotated[Path, typer.Argument(help="Run folder: nnU-Net's own folders, predictions, evaluation.")],
    preset: Annotated[str | None, typer.Option(help="default, resenc_m, resenc_l or resenc_xl.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long instead of 1000 epochs; the rate falls with "
                                                  "it.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the plan."
                                                        )] = None,
    test: Annotated[bool, typer.Option(help="Also predict imagesTs.")] = True,
    tolerance: Tolerances = None,
    python: Annotated[Path | None, typer.Option(help="bin/python of the environment that has nnunetv2; default this "
                                                     "one.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Plan, train and predict with the real nnU-Net v2, and evaluate it with our metrics and its own.

    Keys of --set: configuration (3d_fullres, 3d_lowres or 2d), fold (of splits_final.json), epochs, iterations (steps
    of an epoch), patch=[Z,Y,X] and batch (less than nnU-Net plans; the result is named reduced), tta (false predicts
    without mirror images), seed, and a recipe's reading.* for how our scores and pictures read the files.
    """
    from autosam3d.recipes.settings_file import read_settings
    from autosam3d.studies.nnunet.evaluation import evaluate_run, write_result
    from autosam3d.studies.nnunet.run import NnunetPlan, train_and_predict

    plan = read_settings(NnunetPlan, None, overrides or (), {
        "--preset": ("preset", preset), "--minutes": ("minutes", minutes)}, guide="autosam3d nnunet --help")
    with progress_bars() as bars:
        view = _View(bars)
        try:
            result = train_and_predict(
                data, out, plan, python=python, device=device, threads=threads,
                parts=("validation", "test") if test else ("validation",), on_event=view.on_event)
        except (KeyboardInterrupt, SystemExit):
            view.say(f"what is finished in {out} is kept; the same command goes on from here")
            raise
        scored = {}
        for part in result.truth:
            task = bars.add_task(f"comparing {part}", total=None)
            scored[part] = evaluate_run(result, part, tolerances_mm=tuple(tolerance or (1.0,)), python=python,
                                        threads=threads, reading=plan.reading, progress=on_task(bars, task),
                                        on_event=view.on_event)
    write_result(result)
    size = " x ".join(map(str, result.patch))
    typer.echo(f"{result.name} {result.nnunet}, {result.network} with {result.parameters / 1e6:.2f} M parameters, crop "
               f"{size}, batch {result.batch}: {result.steps} steps in {result.minutes:.1f} min")
    if result.reduced:
        typer.echo(f"reduced: {'; '.join(result.reduced)}")
    for part, (evaluation, agreement) in scored.items():
        typer.echo(f"{part}, {evaluation.summary()}")
        typer.echo(f"{part}: {agreement}")
    typer.echo(f"wrote {out / 'predictions'}, {out / 'evaluation'} and {out / 'result.json'}")


class _View:
    """Bars where stderr is a terminal, and a line for each thing that ends."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self._task = bars.add_task("nnU-Net", total=None)
        self._last, self._said_at = "", 0.0

    def on_event(self, stage: str, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("step", "epoch"):
            self.bars.update(self._task, description=f"training, loss {event['loss']:.3f}", total=1000,
                             completed=round(1000 * event["share"]))
        if kind in ("scan", "bar"):
            self.bars.update(self._task, description=one_line(event.get("text") or f"predicting {event.get('name')}"),
                             total=event["total"], completed=event["done"])
        line = _line(stage, event)
        if kind == "step" and time.monotonic() - self._said_at > STEP_LINE_S:
            line = (f"nnU-Net trains: {event['share']:.0%} of the budget, {event['steps']} steps, loss "
                    f"{event['loss']:.3f}")
        if line and line != self._last:
            self._last, self._said_at = line, time.monotonic()
            self.say(line)

    def say(self, line: str) -> None:
        self.bars.console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def _line(stage: str, event: dict[str, Any]) -> str | None:
    match event["kind"]:
        case "stage":
            return f"nnU-Net {stage}: {event['text']}"
        case "planned":
            return (f"nnU-Net plans {event['network']} of {event['stages']} stages, crop "
                    f"{' x '.join(map(str, event['patch']))} (planned {' x '.join(map(str, event['planned_patch']))}), "
                    f"batch {event['batch']}, {' x '.join(f'{mm:.3g}' for mm in event['spacing_mm'])} mm")
        case "network":
            return f"nnU-Net trains {event['parameters'] / 1e6:.2f} M parameters"
        case "epoch":
            return (f"nnU-Net epoch {event['epoch']}: {event['share']:.0%} of the budget, {event['steps']} steps, loss "
                    f"{event['loss']:.3f}, pseudo Dice {event['dice']:.3f}")
        case "bar" if event["done"] % max(1, event["total"] // 4) == 0 and event["done"]:
            return f"nnU-Net {stage}: {event['text']} {event['done']} of {event['total']}"
        case "scan":
            if not event["name"]:
                return None
            return f"nnU-Net predicts {event['done'] + 1} of {event['total']}: {event['name']}"
        case "tail":
            return "nnU-Net's last lines: " + " | ".join(event["lines"])
    return None
