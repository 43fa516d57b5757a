"""SAM on slices: prompts, pictures, weights in both namings, sides, and the files that `slicewise segment` leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import command_line
import tiny_sam
from autosam3d.data.folder import Case, open_dataset
from autosam3d.errors import CheckpointError, MissingExtraError, UsageError, VolumeError
from autosam3d.geometry.preprocess import HuWindow
from autosam3d.io import read_ct, read_segmentation, write_ct, write_segmentation
from autosam3d.models.autosam.sam_names import SamSizes, read_sizes, whole_sam
from autosam3d.studies.slicewise import cases as cases_module
from autosam3d.studies.slicewise.cache import SliceEncoder
from autosam3d.studies.slicewise.cases import SlicewiseResult, SlicewiseSettings, segment_cases
from autosam3d.studies.slicewise.images import MEDSAM_WINDOW, Framing, mask_in_square
from autosam3d.studies.slicewise.model import (
    SliceSam,
    build_sam,
    load_slice_sam,
    measure_seconds,
    tuned_tensors,
    vit_sizes,
)
from autosam3d.studies.slicewise.prompts import Frame, PromptSpec, deepest_pixel, make_prompt, random_for, random_pixels
from autosam3d.studies.slicewise.slices import PromptedSlices, combine, read_case, segment_slices
from autosam3d.volume import Segmentation, Volume
from killed import demand_killed, die
from mini_run import LABELS, TRAIN, affine_of, blobs, mini_recipe, write_mini_dataset, write_recipe

SAM = Framing(style="sam", hu_window=HuWindow(low_hu=-100, high_hu=155))
MEDSAM = Framing(style="medsam", hu_window=MEDSAM_WINDOW)
POINT, BOX = PromptSpec(kind="point"), PromptSpec(kind="box")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slicewise")
    write_mini_dataset(folder / "data")
    write_recipe(folder / "mini.yaml", mini_recipe())
    tiny_sam.write_pth(folder / "sam.pth")
    command_line.load_once("transformers.models.sam.modeling_sam")
    return folder


@pytest.fixture(scope="module")
def sam(folder: Path) -> SliceSam:
    return load_slice_sam(folder / "sam.pth")


# ---- prompts ----


def test_the_deepest_pixel_lies_inside_shapes_whose_middle_does_not() -> None:
    ring = np.zeros((40, 40), bool)
    rows, columns = np.indices(ring.shape)
    distance = np.hypot(rows - 20, columns - 20)
    ring[(distance > 8) & (distance < 14)] = True
    at = deepest_pixel(ring)
    assert ring[tuple(at)] and 9.5 < distance[tuple(at)] < 12.5
    bar = np.zeros((9, 30), bool)
    bar[2:7, 0:29] = True  # touches the left border, which counts as its end
    assert deepest_pixel(bar)[0] == 4 and 2 <= deepest_pixel(bar)[1] <= 26


def test_a_box_is_tight_and_its_jitter_goes_outwards_within_the_slice() -> None:
    mask = np.zeros((16, 32), bool)
    mask[3:6, 10:20] = True
    frame = Frame((16, 32), (512, 1024), 1024)
    tight = make_prompt(mask, frame, BOX, random_for(0))
    # 32 pixels of the square for each of the slice: first and last pixel of the organ.
    np.testing.assert_array_equal(tight, [320, 96, 639, 191])
    inside = mask_in_square(mask, frame, 1024).numpy() > 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    np.testing.assert_array_equal(tight, [columns[0], rows[0], columns[-1], rows[-1]])
    spec = PromptSpec(kind="box", jitter_px=20)
    grown = np.stack([make_prompt(mask, frame, spec, random_for(0, i)) for i in range(200)]) - tight
    assert (grown[:, :2] <= 0).all() and (grown[:, 2:] >= 0).all()
    assert grown.min() == -20 and grown.max() == 20
    corner = np.zeros((16, 32), bool)
    corner[-1, -1] = True
    x0, y0, x1, y1 = make_prompt(corner, frame, spec, random_for(1))
    assert (x1, y1) == (1023, 511) and x0 <= 992 and y0 <= 480


def test_random_points_are_the_organs_and_drawn_by_their_place() -> None:
    mask = np.zeros((20, 20), bool)
    mask[4:8, 5:9] = True
    points = random_pixels(mask, 10, random_for(3, "case", 7, 1))
    assert mask[tuple(points.T)].all() and len({tuple(p) for p in points}) == 10
    again = random_pixels(mask, 10, random_for(3, "case", 7, 1))
    np.testing.assert_array_equal(points, again)
    assert (points != random_pixels(mask, 10, random_for(3, "case", 8, 1))).any()
    assert len(random_pixels(mask, 40, random_for(0))) == 40  # more than it has: some come twice
    frame = SAM.frame((20, 20), 64)
    x, y = make_prompt(mask, frame, POINT, random_for(0))[0]
    assert 5 * 3.2 - 0.5 < x < 9 * 3.2 - 0.5 and 4 * 3.2 - 0.5 < y < 8 * 3.2 - 0.5


# ---- pictures ----


def test_sams_picture_keeps_its_shape_and_is_padded_after_the_statistics() -> None:
    image = SAM.image(np.full((24, 48), 27.0))
    assert image.dtype == np.uint8 and (image == 127).all()
    pixels = SAM.pixels(image, 64)
    assert pixels.shape == (3, 64, 64) and SAM.frame((24, 48), 64).scaled == (32, 64)
    for channel, (mean, std) in enumerate(((123.675, 58.395), (116.28, 57.12), (103.53, 57.375))):
        torch.testing.assert_close(pixels[channel, :32], torch.full((32, 64), (127 - mean) / std))
    assert not pixels[:, 32:].any()


def test_medsams_picture_fills_the_square_from_nought_to_one() -> None:
    ramp = np.tile(np.linspace(-300, 400, 48), (24, 1))
    image = MEDSAM.image(ramp)
    assert image.min() == 0 and image.max() == 255
    pixels = MEDSAM.pixels(image, 64)
    assert pixels.shape == (3, 64, 64) and pixels.min() == 0 and pixels.max() == 1
    assert torch.equal(pixels[0], pixels[2]) and (pixels[0].mean(0).diff() >= -0.02).all()
    assert not MEDSAM.pixels(np.full((24, 48), 9, np.uint8), 64).any()  # nothing to see: no division by zero


@pytest.mark.parametrize("framing", [SAM, MEDSAM])
def test_a_mask_in_the_square_comes_back_to_its_slice(framing: Framing) -> None:
    mask = np.zeros((48, 80), bool)
    mask[10:30, 44:70] = True
    frame = framing.frame((48, 80), 512)
    logits = mask_in_square(mask, frame, 128)[None] * 20 - 10
    assert (framing.native(logits, frame)[0].numpy() > 0)[12:28, 46:68].all()
    wrong = (framing.native(logits, frame)[0].numpy() > 0) != mask
    assert wrong.sum() < 0.1 * mask.sum()


def test_organs_are_joined_by_their_logits_and_not_by_their_order() -> None:
    a = np.array([[3.0, 1.0, -1.0, -5.0]])
    b = np.array([[2.0, 2.0, -2.0, 0.5]])
    expected = np.array([[4, 9, 0, 9]], np.uint8)
    np.testing.assert_array_equal(combine(np.stack([a, b]), [4, 9]), expected)
    np.testing.assert_array_equal(combine(np.stack([b, a]), [9, 4]), expected)
    assert not combine(np.zeros((1, 2, 2)), [3]).any()


# ---- weights ----


def test_both_namings_are_one_model(tmp_path: Path, sam: SliceSam) -> None:
    hub = load_slice_sam(tiny_sam.write_hf(tmp_path / "hub"))
    origin = tiny_sam.states()[0]
    assert sam.sizes == hub.sizes == tiny_sam.SIZES
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3.0, 4, 30, 40], [1, 1, 9, 9]]).expand(2, 2, 4)
    points = torch.tensor([[[3.0, 4]], [[40, 2]]]).expand(2, 2, 1, 2)
    with torch.inference_mode():
        for prompts in (boxes, points):
            one, two, three = (m.decode(m.encode(pixels), prompts) for m in (sam, hub, origin))
            assert one.shape == (2, 2, 32, 32) and one.std() > 1e-4
            assert torch.equal(one, two) and torch.equal(one, three)
            alone = [sam.decode(sam.encode(pixels[:1]), prompts[:1, i : i + 1])[0, 0] for i in range(2)]
            torch.testing.assert_close(one[0], torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_vit_b_has_the_released_sams_parameters() -> None:
    with torch.device("meta"):
        network = build_sam(vit_sizes("vit_b"))
    assert len({tiny_sam.original_name(name) for name in network.state_dict()} - {""}) == 315
    count = {scope: sum(tensor.numel() for name, tensor in tuned_tensors(network, scope).items()
                        if "positional" not in name) for scope in ("decoder", "full")}
    assert sum(p.numel() for n, p in network.prompt_encoder.named_parameters() if p.requires_grad) == 6_220
    assert sum(p.numel() for p in network.mask_decoder.parameters()) == 4_058_340
    assert count == {"decoder": 6_220 + 4_058_340, "full": 93_735_472}


def test_sizes_of_the_released_sams_are_read_off_their_tensors() -> None:
    for vit in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            state = build_sam(vit_sizes(vit)).state_dict()
        assert read_sizes(state) == vit_sizes(vit)


def demand_mismatch(state: dict, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_slice_sam(path)
    assert caught.value.code == "MISMATCH", caught.value
    return str(caught.value)


def test_every_tensor_is_placed_and_none_is_left(tmp_path: Path) -> None:
    original = tiny_sam.states()[2]
    path = tmp_path / "sam.pth"
    for name in ("image_encoder.neck.1.bias", "prompt_encoder.no_mask_embed.weight",
                 "mask_decoder.output_upscaling.3.weight",
                 "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"):
        demand_mismatch({n: t for n, t in original.items() if n != name}, path)
    assert "stranger" in demand_mismatch(original | {"mask_decoder.stranger.weight": torch.ones(2)}, path)
    assert "shape" in demand_mismatch(original | {"mask_decoder.iou_token.weight": torch.ones(1, 31)}, path)
    encoder_only = {n: t for n, t in original.items() if n.startswith("image_encoder.")}
    assert "prompt_encoder, mask_decoder" in demand_mismatch(encoder_only, path)
    mobile = original | {"image_encoder.layers.0.blocks.0.conv1.c.weight": torch.ones(2)}
    assert "MobileSAM" in demand_mismatch(mobile, path)
    assert "both" not in demand_mismatch(original | tiny_sam.states()[1], path)
    wrapped = {f"module.{n}": t for n, t in original.items()} | {"pixel_mean": torch.ones(3)}
    torch.save({"model": wrapped}, path)
    assert load_slice_sam(path).sizes == tiny_sam.SIZES


def test_sizes_that_no_sam_has_are_refused_before_any_memory(tmp_path: Path) -> None:
    hf = tiny_sam.states()[1]
    hf["vision_encoder.layers.0.attn.rel_pos_h"] = torch.ones(9, 8)
    with pytest.raises(CheckpointError, match="attention windows"):
        read_sizes(whole_sam(hf))


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"autosam3d\[sam\]"):
        load_slice_sam(folder / "sam.pth")


# ---- a whole case ----


def answer_with_the_prompt(sam: SliceSam, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fills the box it is given: what is left to be wrong are place, side and order."""

    def decode(self: SliceSam, embeddings: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        side = 4 * self.sizes.image_size // self.sizes.token_size
        middles = (torch.arange(side) + 0.5) * self.sizes.image_size / side - 0.5
        x0, y0, x1, y1 = (boxes[..., i, None] for i in range(4))
        rows, columns = (middles >= y0) & (middles <= y1), (middles >= x0) & (middles <= x1)
        return torch.where(rows[..., :, None] & columns[..., None, :], 5.0, -5.0)

    monkeypatch.setattr(SliceSam, "decode", decode)


@pytest.mark.parametrize("framing", [SAM, MEDSAM])
def test_the_right_side_stays_right_through_an_odd_orientation(
    framing: Framing, tmp_path: Path, sam: SliceSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two boxes of different size and height, stored as P, S, R: the answer is the truth, voxel for voxel."""
    labels = np.zeros((12, 16, 32), np.uint8)
    labels[3:5, 2:6, 20:30] = 1  # the patient's right
    labels[4:9, 8:14, 4:8] = 2
    hu = np.full(labels.shape, -1000, np.float32)
    hu[:, 1:15, 2:31] = 30
    hu[labels > 0] = 90
    images, truths = tmp_path / "imagesTr", tmp_path / "labelsTr"
    images.mkdir()
    truths.mkdir()
    write_ct(images / "a_0000.nii.gz", Volume(hu, affine_of((5.0, 2.5, 2.5))), axis_codes="PSR")
    ct_file = images / "a_0000.nii.gz"
    ct = read_ct(ct_file)
    assert ct.source is not None and ct.source.shape != ct.shape
    write_segmentation(truths / "a.nii.gz", Segmentation(labels, ct.affine, ct.source), LABELS)
    answer_with_the_prompt(sam, monkeypatch)
    result = segment_cases([Case("a", ct_file, truths / "a.nii.gz")], sam, tmp_path / "out", LABELS,
                           SlicewiseSettings(framing=framing, prompts=BOX))
    assert not result.failed and result.slices == 6
    found = read_segmentation(tmp_path / "out" / "a.nii.gz")
    assert found.source is not None and found.source.shape == ct.source.shape
    np.testing.assert_array_equal(found.labels, labels)
    report = json.loads((tmp_path / "out" / "a.report.json").read_text())
    assert report["truth_gave"] == ["organs", "slices", "prompts"] and report["prompts_asked"] == 7


def test_an_overwrite_killed_before_it_replaces_leaves_a_foreign_file_protected(
    folder: Path, tmp_path: Path, sam: SliceSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = open_dataset(folder / "data", mini_recipe()).train[0]
    labels = Segmentation(blobs(0)[1], affine_of())
    monkeypatch.setattr(cases_module, "segment_slices", lambda *_, **__: PromptedSlices(labels, 3, 4))
    foreign, settings = tmp_path / f"{case.name}.nii.gz", SlicewiseSettings(framing=SAM, prompts=BOX)

    def run(overwrite: bool) -> SlicewiseResult:
        return segment_cases([case], sam, tmp_path, LABELS, settings, overwrite=overwrite)

    foreign.write_bytes(b"a person's work")
    with monkeypatch.context() as patch:
        patch.setattr(cases_module, "write_segmentation", die)
        demand_killed(lambda: run(overwrite=True))
    assert json.loads((tmp_path / f"{case.name}.report.json").read_text())["status"] == "writing"
    with pytest.raises(UsageError) as caught:
        run(overwrite=False)
    assert caught.value.code == "OUTPUT_EXISTS" and foreign.read_bytes() == b"a person's work"
    assert run(overwrite=True).written == [foreign]
    assert run(overwrite=False).skipped == [foreign]


def test_slices_without_organs_are_not_encoded_and_the_cache_changes_nothing(folder: Path, sam: SliceSam,
                                                                             tmp_path: Path) -> None:
    case = open_dataset(folder / "data", mini_recipe()).train[0]
    ct, truth = read_case(case, LABELS)
    encoder = SliceEncoder(sam, MEDSAM, tmp_path / "cache")
    first = segment_slices(ct, truth, encoder, POINT, LABELS, name="c0")
    assert first.slices == encoder.encoded == np.count_nonzero(truth.any((1, 2))) < len(truth)
    again = segment_slices(ct, truth, encoder, POINT, LABELS, name="c0")
    assert encoder.encoded == first.slices
    np.testing.assert_array_equal(first.segmentation.labels, again.segmentation.labels)
    assert not first.segmentation.labels[~truth.any((1, 2))].any()


def test_an_embedding_that_was_cut_or_changed_is_made_anew(sam: SliceSam, tmp_path: Path) -> None:
    image = MEDSAM.image(blobs(0)[0][12])
    encoder = SliceEncoder(sam, MEDSAM, tmp_path)
    whole = encoder(image)
    path = encoder.path(encoder.key(image))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[: len(content) // 2], b"", bytes(flipped)):
        path.write_bytes(damaged)
        before = encoder.encoded
        assert torch.equal(encoder(image), whole) and encoder.encoded == before + 1
        assert path.read_bytes() == content
    other = SliceEncoder(sam, SAM, tmp_path)
    assert other.key(image) != encoder.key(image)
    assert len(list(tmp_path.rglob("*.embedding"))) == 1


def test_cases_that_cannot_be_prompted_are_refused(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    case = open_dataset(folder / "data", mini_recipe()).train[0]

    def code_of(labels: np.ndarray | None, affine: np.ndarray | None = None) -> str:
        path = None
        if labels is not None:
            path = tmp_path / "t.nii.gz"
            write_segmentation(path, Segmentation(labels, affine_of() if affine is None else affine), LABELS)
        with pytest.raises(VolumeError) as caught:
            read_case(replace(case, label_path=path), LABELS)
        return caught.value.code

    truth = blobs(0)[1]
    moved = affine_of()
    moved[0, 3] += 1
    assert code_of(None) == "NO_TRUTH"
    assert code_of(truth[:-1]) == "SHAPE"
    assert code_of(truth, moved) == "AFFINE_MISMATCH"
    assert code_of(np.zeros_like(truth)) == "NO_ORGANS"
    assert code_of(truth * 3) == "LABEL_RANGE"


def test_seconds_are_measured(sam: SliceSam) -> None:
    seconds = measure_seconds(sam, organs=2)
    assert 0 < seconds.decode < seconds.total < 60
    assert isinstance(sam.sizes, SamSizes)


# ---- the command ----


def segment(folder: Path, out: Path, *more: str | Path) -> command_line.Done:
    return command_line.run("slicewise", "segment", folder / "mini.yaml", "--data", folder / "data", "--out", out,
                            "--part", "train", "--device", "cpu", "--threads", "1", *more)


def test_the_command_writes_what_evaluate_scores_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    out, sam_file = tmp_path / "out", folder / "sam.pth"
    done = segment(folder, out, "--sam", sam_file, "--set", "cases=[c0,c1]")
    assert done.code == 0 and "c1.nii.gz" in done.out and "the truth gave organs" in done.err, done.err
    (out / "c1.nii.gz").unlink()  # as if killed in between
    done = segment(folder, out, "--sam", sam_file)
    assert done.code == 0 and "skipped 1" in done.out and done.out.count("wrote") == len(TRAIN) - 1
    for name in TRAIN:
        (tmp_path / "truth").mkdir(exist_ok=True)
        (tmp_path / "truth" / f"{name}.nii.gz").write_bytes((folder / "data/labelsTr" / f"{name}.nii.gz").read_bytes())
    scored = command_line.run("evaluate", out, tmp_path / "truth", "--out", tmp_path / "scores")
    assert scored.code == 0 and "4 cases: Dice" in scored.out
    before = (out / "c0.nii.gz").read_bytes()
    done = segment(folder, out, "--sam", sam_file, "--prompt", "box")
    assert "--overwrite" in done.demand_error("OUTPUT_EXISTS", 2) and (out / "c0.nii.gz").read_bytes() == before
    assert segment(folder, out, "--sam", sam_file, "--prompt", "box", "--overwrite").code == 0


def test_wrong_calls_are_one_line_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    out, sam_file = tmp_path / "out", folder / "sam.pth"
    mobile = tmp_path / "mobile_sam.pt"
    torch.save({"image_encoder.layers.0.blocks.0.conv1.c.weight": torch.ones(2, 2)}, mobile)
    segment(folder, out).demand_error("USAGE", 2)
    segment(folder, out, "--sam", tmp_path / "none.pth").demand_error("NO_SAM", 4)
    assert "MobileSAM" in segment(folder, out, "--sam", mobile).demand_error("MISMATCH", 4)
    segment(folder, out, "--sam", sam_file, "--set", "cases=c9").demand_error("USAGE", 2)
    segment(folder, out, "--sam", sam_file, "--part", "test").demand_error("NO_CASES", 3)
    segment(folder, out, "--sam", sam_file, "--prompt", "box", "--set", "prompts.num_points=3").demand_error("USAGE", 2)
    segment(folder, folder / "data" / "x", "--sam", sam_file).demand_error("SAME_PATH", 2)
    segment(folder, out, "--tuned", folder / "data").demand_error("NO_MODEL", 4)
    assert not out.exists()
    out.write_text("a file")
    segment(folder, out, "--sam", sam_file).demand_error("OUTPUT_PATH", 2)
    assert out.read_text() == "a file"
