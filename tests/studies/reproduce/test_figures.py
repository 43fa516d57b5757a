"""The paper's figures: the same bytes in every run, what they show, and what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made import ABOUT, run_scores
from PIL import Image

from autosam3d.errors import CheckpointError, UsageError, VolumeError
from autosam3d.evaluation.evaluate import evaluate_folder, write_json
from autosam3d.evaluation.overlay import draw_axial, organ_color, widest_section
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume

pytest.importorskip("matplotlib", reason="the extra figures is not installed")
pytest.importorskip("sklearn", reason="the extra figures is not installed")

from autosam3d.evaluation.scores import read_json
from autosam3d.studies.reproduce.drawing import save_figure
from autosam3d.studies.reproduce.figures import (
    Distilled,
    Subject,
    choose_cases,
    distillation_figure,
    embedding_figure,
    overlay_figure,
    read_subjects,
    same_group_share,
    tsne,
)

AFFINE = np.diag([2.0, 2.0, 4.0, 1.0])
ORGANS = LabelMap(organs=("liver", "spleen"))


def two_clouds(num: int = 12) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    clouds = np.concatenate([rng.normal(0, 1, (num, 16)), rng.normal(6, 1, (num, 16))])
    return clouds, ["CT"] * num + ["photographs"] * num


def assert_saved_alike(drawn_twice, folder: Path) -> ET.Element:
    """Both drawings are the same files; the SVG is well-formed, says what it shows, and carries no date."""
    for i, drawn in enumerate(drawn_twice):
        (folder / str(i)).mkdir()
        save_figure(drawn, folder / str(i), "fig")
    for kind in ("png", "svg", "md"):
        assert (folder / "0" / f"fig.{kind}").read_bytes() == (folder / "1" / f"fig.{kind}").read_bytes()
    svg = (folder / "0" / "fig.svg").read_text("utf-8")
    assert "<dc:date>" not in svg
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root[0].tag.endswith("title") and root[0].text == drawn_twice[0].alt
    with Image.open(folder / "0" / "fig.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    return root


def test_tsne_keeps_groups_apart_at_any_scale():
    """Also where numbers are tiny, as those of an untrained network can be."""
    points, groups = two_clouds()
    assert same_group_share(points, groups) == 1
    assert same_group_share(points[:, :1] * 0 + np.arange(24)[:, None] % 12, groups) < 0.7
    for scale in (1.0, 1e-19, 1e6):
        places = tsne(points * scale)
        assert same_group_share(places, groups) == 1
    np.testing.assert_array_equal(tsne(points), tsne(points))
    assert not np.array_equal(tsne(points, seed=0), tsne(points + np.eye(24, 16), seed=1))
    for bad in (points[:3], np.full((9, 4), np.nan)):
        with pytest.raises(ValueError, match="at least 4 rows"):
            tsne(bad)


def test_figure_1_is_the_same_file_in_every_run(tmp_path):
    points, groups = two_clouds()
    groups = ["<CT & co>" if g == "CT" else g for g in groups]
    drawn = [embedding_figure(points, groups, ABOUT) for _ in range(2)]
    assert_saved_alike(drawn, tmp_path)
    assert "12 <CT & co>, 12 photographs" in drawn[0].alt and "100 %" in drawn[0].alt
    assert "autosam3d reproduce" in drawn[0].caption
    with pytest.raises(ValueError, match="expected 24 names, got 3"):
        embedding_figure(points, groups[:3], ABOUT)


def boxes(left: int = 0, spleen: bool = True) -> np.ndarray:
    """uint8 [z, y, x]: a liver on the patient's right, largest in slices 3 to 6, and a spleen."""
    labels = np.zeros((10, 20, 24), np.uint8)
    labels[3:7, 5:15, 14 - left : 22 - left] = 1
    labels[4:6, 6:10, 2:6] = 2 * spleen
    return labels


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, AFFINE), path)


@pytest.fixture
def evaluated(tmp_path) -> dict[str, Path]:
    """Two models on three cases of a dataset with scans; the second one lacks a case."""
    data = tmp_path / "data"
    hu = np.full((10, 20, 24), -1000, np.float32)
    hu[1:9, 2:18, 1:23] = 40
    folders = {}
    for i in range(3):
        save(data / "labelsTs" / f"case_{i}.nii.gz", boxes())
        save(data / "imagesTs" / f"case_{i}_0000.nii.gz", hu)
    for model, num in (("ours", 3), ("theirs", 2)):
        for i in range(num):
            save(tmp_path / model / f"case_{i}.nii.gz", boxes(left=i))
        folders[model] = tmp_path / f"{model}_eval"
        folders[model].mkdir()
        write_json(evaluate_folder(tmp_path / model, data / "labelsTs", labels=ORGANS), folders[model] / "scores.json")
    return folders


def test_figure_3_reads_what_evaluations_name(evaluated, tmp_path):
    subjects = read_subjects(evaluated, "ours", num=3)
    assert [s.name for s in subjects] == ["case_2", "case_1", "case_0"], "from the worst to the best"
    assert all(s.volume is not None for s in subjects)
    assert subjects[0].predictions["theirs"] is None and "theirs" not in subjects[0].dice
    assert subjects[1].dice == pytest.approx({"ours": (1 + 7 / 8) / 2, "theirs": (1 + 7 / 8) / 2})
    drawn = [overlay_figure(subjects, ORGANS.by_index, ABOUT) for _ in range(2)]
    assert_saved_alike(drawn, tmp_path)
    assert "case_1 slice 4" in drawn[0].caption and "truth and ours, theirs in columns" in drawn[0].alt


def test_cases_are_chosen_evenly_from_worst_to_best(evaluated):
    evaluation = read_json(evaluated["ours"] / "scores.json")
    assert choose_cases(evaluation, 2) == ["case_2", "case_0"]
    assert choose_cases(evaluation, 9) == ["case_2", "case_1", "case_0"]


def test_a_segmentation_on_another_grid_is_refused():
    truth = Segmentation(boxes(), AFFINE)
    moved = Segmentation(boxes(), np.diag([2.0, 2.0, 5.0, 1.0]))
    with pytest.raises(UsageError, match="expected m on the grid of the truth"):
        overlay_figure([Subject(name="a", truth=truth, predictions={"m": moved})], ORGANS.by_index, ABOUT)


def test_axial_slices_are_cut_where_organs_are_largest_and_seen_from_the_feet():
    segmentation = Segmentation(boxes(), AFFINE, organs=ORGANS.by_index)
    box, index = widest_section(segmentation)
    assert index == 4
    image = np.asarray(draw_axial(None, segmentation, index=index, box=box, longest_px=240)).astype(int)
    liver, spleen = (np.abs(image - np.array(organ_color(k, name)) * 0.42).sum(2) < 12 for k, name in ((1, "liver"),
                                                                                                    (2, "spleen")))
    assert liver.any() and spleen.any()
    assert np.argwhere(liver)[:, 1].mean() < 120 < np.argwhere(spleen)[:, 1].mean(), "right is on the left"


def test_figure_4_draws_what_the_evaluations_say(tmp_path):
    pairs = [Distilled(name="Tiny", without=[run_scores(tmp_path, "tiny")],
                       taught=[run_scores(tmp_path, "tiny_kd", seed=s, shift=0.05 + s / 100) for s in (0, 1)]),
             Distilled(name="Small", without=[], taught=[run_scores(tmp_path, "small_kd", shift=0.1)])]
    (tmp_path / "out").mkdir()
    drawn = [distillation_figure(pairs, "openkbp", ABOUT) for _ in range(2)]
    assert_saved_alike(drawn, tmp_path / "out")
    bars = [bar.get_height() for bar in drawn[0].figure.axes[0].patches]
    means = [[100 * read_json(run.evaluation / "scores.json").summary().dice.mean for run in runs]
             for runs in (pairs[0].without, pairs[0].taught, pairs[1].taught)]
    assert bars == pytest.approx([np.mean(means[0]), np.mean(means[1]), 0, np.mean(means[2])])
    assert "Small without a teacher not run" in drawn[0].alt
    assert "Tiny with minus Tiny without, mDice: +0.0" in drawn[0].caption and "6 pairs (case)" in drawn[0].caption
    empty = distillation_figure([replace(pairs[1], taught=[])], "btcv", ABOUT)
    assert empty.alt == "Bars of mean Dice on BTCV: Small without a teacher not run; Small with a teacher not run."


def tiny_encoder(seed: int = 0):
    transformers = pytest.importorskip("transformers", reason="the extra figures is not installed")
    import torch

    torch.manual_seed(seed)
    model = transformers.SamVisionModel(transformers.SamVisionConfig(
        hidden_size=32, output_channels=256, num_hidden_layers=2, num_attention_heads=2, image_size=128,
        global_attn_indexes=[1], window_size=4, mlp_dim=64)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(1) if "norm" in name and "weight" in name else tensor.normal_(0, 0.1)
    return model


def test_embeddings_are_means_over_the_picture_and_not_over_its_padding():
    import torch

    from autosam3d.studies.reproduce.embeddings import embed, sam_input

    model = tiny_encoder()
    wide = np.random.default_rng(0).integers(0, 255, (60, 120, 3)).astype(np.uint8)
    values, tokens = sam_input(wide, 128)
    assert tokens == (4, 8) and not values[:, 64:].any()
    with torch.inference_mode():
        whole = model(values[None]).last_hidden_state[0]
    done = []
    found = embed(model, [wide, wide[:, ::-1]], done.append)
    assert found.shape == (2, 256) and done == [1, 2]
    np.testing.assert_allclose(found[0], whole[:, :4].mean((1, 2)).numpy(), rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    grey = np.full((50, 50, 3), 255, np.uint8)
    np.testing.assert_allclose(sam_input(grey, 64)[0][0], (255 - 123.675) / 58.395, rtol=1e-5)


@pytest.mark.parametrize("original", [True, False])
def test_an_encoder_is_loaded_from_either_naming_and_gives_the_same(tmp_path, original):
    from safetensors.torch import save_file

    from autosam3d.studies.reproduce.embeddings import _FROM_ORIGINAL, embed, load_encoder

    model = tiny_encoder()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if original:
        back = {theirs: ours for ours, theirs in _FROM_ORIGINAL.items()}
        renamed = {}
        for name, tensor in state.items():
            path = f".{name.removeprefix('vision_encoder.')}."
            for theirs, ours in back.items():
                path = path.replace(f".{theirs}.", f".{ours}.")
            renamed[f"image_encoder.{path.strip('.')}"] = tensor
        state = renamed | {"mask_decoder.x": next(iter(state.values())).clone()}
    save_file(state, tmp_path / "sam.safetensors")
    picture = [np.random.default_rng(1).integers(0, 255, (40, 40, 3)).astype(np.uint8)]
    np.testing.assert_array_equal(embed(load_encoder(tmp_path / "sam.safetensors"), picture), embed(model, picture))
    lost = dict(list(state.items())[:-3])
    lost.pop(next(name for name in lost if name.endswith("qkv.bias")))
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(CheckpointError, match="missing, left over or of another shape"):
        load_encoder(tmp_path / "lost.safetensors")
    save_file({"vision_encoder.x": next(iter(state.values()))}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="got other tensors"):
        load_encoder(tmp_path / "other.safetensors")


def test_ct_slices_and_photographs_are_told_apart_end_to_end(tmp_path):
    """Photographs that scikit-image ships against slices of a phantom-like scan, through an untrained encoder."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    from autosam3d.studies.reproduce.embeddings import ct_slices, embed, photographs

    pictures = {"astronaut": data.astronaut(), "coffee": data.coffee(), "cat": data.chelsea(), "camera": data.camera()}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    seen = photographs(tmp_path)
    assert [p.shape for p in seen] == [(*pictures[n].shape[:2], 3) for n in sorted(pictures)], "grey becomes RGB"
    assert len(photographs(tmp_path, 2)) == 2
    hu = np.full((12, 60, 60), -1000, np.float32)
    hu[2:10, 10:50, 10:50] = np.random.default_rng(0).normal(40, 30, (8, 40, 40))
    slices = ct_slices(Volume(hu, np.diag([5.0, 5.0, 5.0, 1.0])), HuWindow(low_hu=-160, high_hu=240), 4)
    assert len(slices) == 4 and slices[0].dtype == np.uint8 and slices[0].shape == (60, 60, 3)
    assert slices[0].min() == 0 and slices[0][20:40, 20:40].mean() == pytest.approx(127.5, abs=3)
    points = embed(tiny_encoder(), [*slices, *seen])
    drawn = embedding_figure(points, ["CT"] * 4 + ["photographs"] * 4, ABOUT)
    save_figure(drawn, tmp_path, "fig1")
    assert "4 CT, 4 photographs" in drawn.caption


def test_bad_folders_of_photographs_are_refused(tmp_path):
    from autosam3d.studies.reproduce.embeddings import photographs

    with pytest.raises(UsageError, match="got no folder"):
        photographs(tmp_path / "absent")
    with pytest.raises(UsageError, match="got none in it"):
        photographs(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(UsageError, match="cannot be read as one"):
        photographs(tmp_path)


def test_figure_3_finds_segmentations_where_they_lie_now(evaluated, tmp_path):
    for name in ("ours", "theirs", "data"):
        (tmp_path / name).rename(tmp_path / f"{name} moved")
    with pytest.raises(VolumeError):
        read_subjects(evaluated, "ours")
    truth = tmp_path / "data moved" / "labelsTs"
    subjects = read_subjects(evaluated, "ours", 3, {m: (tmp_path / f"{m} moved", truth) for m in evaluated})
    assert [s.name for s in subjects] == ["case_2", "case_1", "case_0"]
    assert all(s.volume is not None for s in subjects) and subjects[1].predictions["theirs"] is not None
