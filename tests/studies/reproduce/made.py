"""Evaluations whose scores are known, written as `autosam3d evaluate` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosam3d.evaluation.metrics import OrganScore
from autosam3d.evaluation.scores import CaseResult, Evaluation, write_json
from autosam3d.studies.reproduce.tables import Provenance, RunScores

ABOUT = Provenance(command="autosam3d reproduce", date="2026-11-25", machine="two cores", budget_minutes=20)
ORGANS = {1: "liver", 2: "spleen", 3: "aorta"}


def run_scores(
    folder: Path, model: str, dataset: str = "openkbp", seed: int = 0, *, shift: float = 0.0, num_cases: int = 6,
    missing: tuple[str, ...] = (), organs: dict[int, str] | None = None, first_case: int = 0,
    tolerances_mm: tuple[float, ...] = (1.0, 2.0), **facts,
) -> RunScores:
    """A run whose organs all score `shift` above fixed numbers between 0.4 and 0.8; the NSD is 0.1 below the Dice."""
    organs = ORGANS if organs is None else organs
    rng = np.random.default_rng(5)
    cases = []
    for i in range(num_cases):
        dice = rng.uniform(0.4, 0.8, len(organs)) + shift * (1 + i / 10)
        scores = tuple(
            OrganScore(label=label, organ=organ, status="scored", dice=float(d), hd95_mm=1.0, truth_ml=1.0,
                       nsd=tuple(float(d) - 0.1 + 0.05 * j for j in range(len(tolerances_mm))), prediction_ml=1.0)
            for (label, organ), d in zip(organs.items(), dice, strict=True))
        name = f"case_{i + first_case}"
        if name not in missing:
            cases.append(CaseResult(name=name, scores=scores, shape=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0),
                                    prediction_path=Path("p.nii.gz"), truth_path=Path("t.nii.gz")))
    place = folder / f"{model}_{dataset}_{seed}".replace("/", "_")
    place.mkdir()
    write_json(Evaluation(cases=tuple(cases), organs=organs, tolerances_mm=tolerances_mm, predictions=Path("p"),
                          truth=Path("t"), missing=missing), place / "scores.json")
    return RunScores(model=model, dataset=dataset, seed=seed, evaluation=place, **facts)
