"""The model that comes with the package: there, whole, small, documented, and right about a real head and neck."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import autosam3d
from autosam3d.checkpoints.checkpoint import LoadedModel
from autosam3d.checkpoints.model_file import PACKAGED, packaged_model, read_meta
from autosam3d.data.folder import open_dataset
from autosam3d.evaluation.metrics import dice_per_label
from autosam3d.geometry.patches import Tiling

REPO = Path(__file__).resolve().parents[2]
CARD = REPO / "MODEL_CARD.md"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return autosam3d.load_model()


def test_it_is_swin_unetr_tiny_in_at_most_nine_megabytes(model: LoadedModel) -> None:
    spec = model.recipe.model
    assert (spec.network, spec.feature_size) == ("swin_unetr", 12)  # type: ignore[union-attr]
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) <= 9_000_000
    weights = PACKAGED / read_meta(packaged_model())["weights"]["file"]
    assert len(gzip.compress(weights.read_bytes())) <= 8_000_000
    assert sum(p.numel() for p in model.network.parameters()) == 4_078_116


def test_the_card_says_what_the_file_says(model: LoadedModel) -> None:
    meta, card = read_meta(packaged_model()), CARD.read_text("utf-8")
    assert meta["weights"]["sha256"][:16] in card
    assert f"{meta['metrics']['val_dice']:.3f}" in card
    for organ in model.recipe.labels.organs:
        assert re.search(rf"\| {organ} \|", card), organ
    for heading in ("Data", "Training", "Results", "Not for", "Licence"):
        assert f"## {heading}" in card, heading


def test_no_path_of_a_machine_is_in_it() -> None:
    text = json.dumps(read_meta(packaged_model()))
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.slow
def test_it_segments_a_head_and_neck_that_it_was_not_trained_on(model: LoadedModel, real_data: Path) -> None:
    cases = open_dataset(real_data / "Dataset501_OpenKBP", model.recipe)
    case = cases.val[0]
    ct, truth = autosam3d.read_ct(case.image_path), autosam3d.read_segmentation(case.label_path)
    found = autosam3d.segment(ct, model, tiling=Tiling(overlap=0.25))
    dice = dice_per_label(found.labels, truth.labels, model.recipe.labels.num_outputs)
    assert np.nanmean(dice) > 0.6 and np.nanmin(dice) > 0.3
