"""nnFormer: its windows against a dense reference, token by token, and the laws of every network."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autosam3d.models.baselines.nnformer import Block, NnFormer, SelfAttention, SkipAttention
from autosam3d.models.build import build_network
from autosam3d.models.spec import NnFormerSpec

SPEC = NnFormerSpec(num_outputs=3, patch_size=(20, 24, 28), embed_dim=12, num_heads=(2, 3, 4), attn_windows=(4, 3, 2))
GRIDS = [(3, 3, 3), (6, 2, 3), (4, 5, 1), (2, 7, 3), (1, 1, 1), (3, 2, 2)]


def seeded(spec: NnFormerSpec = SPEC, side_outputs: bool = False) -> NnFormer:
    torch.manual_seed(0)
    built = build_network(spec, side_outputs)
    assert isinstance(built, NnFormer)
    return built


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int, shifted: bool) -> Tensor:
    """Attention of every token to every token of the grid it may see, by the definition.

    Args:
        q, k, v: (d, h, w, heads, c).
        table: (heads, 2n-1, 2n-1, 2n-1).
    """
    grid = q.shape[:3]
    sizes = [min(window, n) for n in grid]
    shift = [s // 2 if shifted and n > s else 0 for s, n in zip(sizes, grid, strict=True)]
    result = torch.zeros_like(v)

    def home(place: tuple[int, ...]) -> tuple[int, ...]:
        """The window of a token: windows begin `shift` before the grid does."""
        return tuple((p - s) // n for p, s, n in zip(place, shift, sizes, strict=True))

    places = list(itertools.product(*map(range, grid)))
    for place in places:
        seen = [other for other in places if home(other) == home(place)]
        for head in range(q.shape[3]):
            logits = torch.stack([
                q[place][head] @ k[other][head] / q.shape[4] ** 0.5
                + table[(head, *(p - o + window - 1 for p, o in zip(place, other, strict=True)))]
                for other in seen
            ])
            result[place][head] = sum(
                w * v[other][head] for w, other in zip(logits.softmax(0), seen, strict=True))  # type: ignore[assignment]
    return result


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_windows_are_dense_attention_with_a_mask(grid: tuple[int, int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attn = SelfAttention(4, 2, 3, shifted).double()
    attn.offset_bias.normal_()
    tokens = torch.randn(2, *grid, 4, dtype=torch.float64)
    got = attn(tokens)
    for sample, mixed in zip(tokens, got, strict=True):
        q, k, v = attn.qkv(sample).unflatten(-1, (3, 2, 2)).unbind(3)
        expected = attn.proj(dense(q, k, v, attn.offset_bias, 3, shifted).flatten(3))
        torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_skip_attention_asks_the_skip() -> None:
    torch.manual_seed(0)
    attn = SkipAttention(4, 2, 3, shifted=False).double()
    attn.offset_bias.normal_()
    up, skip = torch.randn(2, 1, 4, 3, 5, 4, dtype=torch.float64)
    k, v = attn.kv(skip[0]).unflatten(-1, (2, 2, 2)).unbind(3)
    expected = attn.proj(dense(up[0].unflatten(-1, (2, 2)), k, v, attn.offset_bias, 3, False).flatten(3))
    torch.testing.assert_close(attn(up, skip)[0], expected, rtol=1e-9, atol=1e-9)


def test_each_offset_has_a_bias_of_its_own() -> None:
    """In the published code 343 offsets of a window of 4 share some 300 numbers; here none do."""
    attn = SelfAttention(4, 1, 4, shifted=False)
    with torch.no_grad():
        attn.offset_bias.copy_(torch.arange(343.0).view(1, 7, 7, 7))
    bias = attn.bias((4, 4, 4))[0]
    assert bias.unique().numel() == 343
    place = torch.cartesian_prod(*[torch.arange(4)] * 3)
    offsets = place[:, None] - place[None, :] + 3
    assert torch.equal(bias, (offsets[..., 0] * 49 + offsets[..., 1] * 7 + offsets[..., 2]).float())


@torch.no_grad()
def test_whole_windows_move_with_their_tokens() -> None:
    torch.manual_seed(0)
    attn = SelfAttention(4, 2, 2, shifted=False).double()
    tokens = torch.randn(1, 4, 6, 4, 4, dtype=torch.float64)
    moved = attn(tokens.roll((2, 4, 2), (1, 2, 3)))
    torch.testing.assert_close(moved, attn(tokens).roll((2, 4, 2), (1, 2, 3)))


@pytest.mark.parametrize("size", [(20, 24, 28), (8, 16, 16), (2, 4, 4)])
def test_a_batch_is_its_samples(size: tuple[int, int, int]) -> None:
    model, ct = seeded().double().eval(), torch.randn(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        both, apart = model(ct), torch.cat([model(ct[:1]), model(ct[1:])])
    assert both.shape == (2, 3, *size)
    torch.testing.assert_close(both, apart, rtol=1e-9, atol=1e-9)


def test_every_weight_learns_and_side_outputs_shrink_by_two() -> None:
    model = seeded(replace(SPEC, drop_path=0.0), side_outputs=True)
    outputs = model(torch.randn(1, 1, *SPEC.patch_size))
    # 28 voxels are 7 tokens, which become 4 and then 8 again: what lies beyond the CT is cut off.
    assert [tuple(o.shape[2:]) for o in outputs] == [(20, 24, 28), (10, 12, 14)]
    sum(o.square().sum() for o in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []
    assert isinstance(model.eval()(torch.randn(1, 1, *SPEC.patch_size)), Tensor)


def test_the_published_size_has_three_outputs() -> None:
    with torch.device("meta"):
        model, ct = build_network(NnFormerSpec(num_outputs=14), side_outputs=True), torch.empty(1, 1, 128, 128, 128)
    assert [tuple(o.shape[2:]) for o in model(ct)] == [(128,) * 3, (64,) * 3, (32,) * 3]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples"):
        seeded()(torch.zeros(1, 1, 20, 24, 30))


def test_stochastic_depth_grows_evenly_from_0_down_and_up() -> None:
    """*Source*: the published network: linspace(0, 0.2, 8) on the way down, linspace(0, 0.2, 6) on the way up."""
    net = build_network(NnFormerSpec(num_outputs=2, embed_dim=12, num_heads=(1, 2, 3, 4), patch_size=(32, 32, 32)))
    down = [block.drop for stage in net.stages for block in stage.blocks]  # type: ignore[union-attr]
    up = [block.drop for stage in reversed(net.ups) for block in (stage.skip, stage.block)]  # type: ignore[arg-type,union-attr]
    assert down == pytest.approx([0.2 * i / 7 for i in range(8)])
    assert up == pytest.approx([0.04 * i for i in range(6)])


def test_a_finished_model_leaves_nothing_out_and_has_the_names_that_it_had() -> None:
    ct = torch.randn(1, 1, 20, 24, 28)
    still = seeded(replace(SPEC, drop_path=0.0)).eval()
    net = seeded().eval()
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in still.named_parameters()]
    torch.testing.assert_close(net(ct), still(ct), rtol=0, atol=0)


def test_a_block_is_left_out_for_whole_samples_and_its_mean_stays() -> None:
    block = Block(4, SelfAttention(4, 1, 2, shifted=False), drop=0.25).train()
    torch.manual_seed(0)
    kept = block.kept(torch.ones(4000, 1, 1, 1, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert bool((kept == kept[..., :1]).all()) and float(kept.mean()) == pytest.approx(1, abs=0.03)
    assert float(block.eval().kept(torch.ones(9, 1, 1, 1, 3)).min()) == 1
