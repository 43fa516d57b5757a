"""Window attention against a token-by-token dense form with explicit bias and mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from autosam3d.models.autosam.attention import (
    WindowAttention,
    merge_windows,
    offset_table,
    resize_table,
    softmax_attention,
    split_windows,
)

CASES = [
    # grid, window, shifted
    ((4, 4, 4), (4, 4, 4), False),
    ((3, 2, 4), (8, 8, 8), True),
    ((8, 8, 8), (4, 4, 4), True),
    ((8, 8, 8), (4, 4, 4), False),
    ((6, 5, 8), (4, 4, 4), True),
    ((6, 5, 8), (4, 4, 4), False),
    ((2, 9, 4), (4, 3, 8), True),
    ((1, 7, 1), (4, 4, 4), True),
]


def random_attention(window: tuple[int, int, int], shifted: bool = False, **options: bool) -> WindowAttention:
    torch.manual_seed(0)
    attention = WindowAttention(24, 3, window, shifted=shifted, **options).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def dense_attention(attention: WindowAttention, tokens: Tensor) -> Tensor:
    """The definition, written over all pairs of tokens of the grid: who may see whom, and at which offset."""
    batch, *grid, dim = tokens.shape
    heads = attention.num_heads
    window = grid if attention.whole_grid else [min(n, g) for n, g in zip(attention.attn_window, grid, strict=True)]
    shift = [n // 2 if attention.shifted and g > n else 0 for n, g in zip(window, grid, strict=True)]
    padded = [-(-g // n) * n for n, g in zip(window, grid, strict=True)]
    place = torch.tensor(list(itertools.product(*map(range, grid))))
    rolled = torch.stack([(place[:, a] - shift[a]) % padded[a] for a in range(3)], 1)
    number = torch.stack([rolled[:, a] // window[a] for a in range(3)], 1)
    visible = (number[:, None] == number[None]).all(-1)
    for axis in range(3):
        if shift[axis]:
            wrapped = place[:, axis] < shift[axis]
            visible &= wrapped[:, None] == wrapped[None]
    head_dim = dim // heads
    q, k, v = attention.qkv(tokens).view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / head_dim**0.5
    for axis, table in enumerate((attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w)):
        middle = table.shape[0] // 2
        offset = (rolled[:, None, axis] - rolled[None, :, axis]).clamp(-middle, middle) + middle
        logits = logits + torch.einsum("bhic,ijc->bhij", q, table[offset])
    probs = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return attention.proj((probs @ v).transpose(1, 2).reshape(tokens.shape))


@pytest.mark.parametrize(("grid", "window", "shifted"), CASES)
def test_widened_attention_equals_dense_bias_and_mask(
    grid: tuple[int, int, int], window: tuple[int, int, int], shifted: bool
) -> None:
    attention = random_attention(window, shifted)
    tokens = torch.randn(2, *grid, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(tokens), dense_attention(attention, tokens), rtol=0, atol=1e-10)


def test_gradients_equal_those_of_the_dense_form() -> None:
    attention = random_attention((4, 4, 4), shifted=True)
    tokens = torch.randn(1, 6, 4, 8, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 6, 4, 8, 24, dtype=torch.float64)
    inputs = [tokens, *attention.parameters()]
    fast = torch.autograd.grad((attention(tokens) * weight).sum(), inputs)
    dense = torch.autograd.grad((dense_attention(attention, tokens) * weight).sum(), inputs)
    for got, wanted in zip(fast, dense, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_whole_grid_sees_everything_and_stretches_its_tables() -> None:
    attention = random_attention((2, 4, 4), whole_grid=True)
    tokens = torch.randn(1, 2, 4, 4, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(tokens), dense_attention(attention, tokens), rtol=0, atol=1e-10)
    assert attention(torch.randn(1, 3, 6, 5, 24, dtype=torch.float64)).shape == (1, 3, 6, 5, 24)


def test_padding_never_reaches_a_token() -> None:
    """A grid that needs padding gives the same as each of its windows cut out by hand."""
    attention = random_attention((4, 4, 4))
    tokens = torch.randn(1, 4, 4, 6, 24, dtype=torch.float64)
    whole = attention(tokens)
    torch.testing.assert_close(whole[..., :4, :], attention(tokens[..., :4, :]), rtol=0, atol=1e-10)
    torch.testing.assert_close(whole[..., 4:, :], attention(tokens[..., 4:, :]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_hundreds_do_not_reach_across_a_seam(dtype: torch.dtype) -> None:
    """Weights far from their start: a mask of -100, as public codes have it, moves the result by 7 %."""
    attention = random_attention((4, 4, 4), shifted=True).to(dtype)
    with torch.no_grad():
        attention.qkv.weight *= 3
    tokens = torch.randn(1, 6, 4, 8, 24, dtype=dtype)
    wanted = dense_attention(attention.double(), tokens.double())
    got = attention.to(dtype)(tokens).double()
    assert (got - wanted).norm() < (1e-10 if dtype == torch.float64 else 1e-4) * wanted.norm()


@pytest.mark.parametrize(("grid", "window", "shifted"), CASES)
def test_merging_undoes_splitting(
    grid: tuple[int, int, int], window: tuple[int, int, int], shifted: bool
) -> None:
    tokens = torch.randn(2, *grid, 5)
    size = tuple(map(min, window, grid))
    shift = tuple(n // 2 if shifted and g > n else 0 for n, g in zip(size, grid, strict=True))
    torch.testing.assert_close(merge_windows(split_windows(tokens, size, shift), grid, size, shift), tokens)


def test_bfloat16_on_a_cpu_is_as_close_as_bfloat16_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from autosam3d.models.autosam.attention import _ChunkedAttention

    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 64, width, requires_grad=True) for width in (40, 40, 32))
    weight = torch.randn(3, 2, 64, 32)
    exact = softmax_attention(q, k, v, 0.2)
    wanted = [exact, *torch.autograd.grad((exact * weight).sum(), (q, k, v))]
    for entries in (1 << 23, 2 * 64 * 64):  # in one chunk and in three
        monkeypatch.setattr(_ChunkedAttention, "MAX_MAP", entries)
        rounded = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.2)
        assert rounded.dtype == torch.bfloat16
        got = [rounded, *torch.autograd.grad((rounded * weight).sum(), (q, k, v))]
        for a, b in zip(got, wanted, strict=True):
            assert (a.float() - b).norm() < 0.02 * b.norm()


def test_offset_table_reads_the_row_of_each_offset() -> None:
    table = torch.arange(7.0)[:, None]  # offsets -3..3
    assert offset_table(table, 3)[..., 0].tolist() == [[3, 2, 1], [4, 3, 2], [5, 4, 3]]


def test_crop_keeps_offsets_and_interp_keeps_ends_of_a_line() -> None:
    table = torch.arange(-13.0, 14.0)[:, None]  # the row of offset o holds o
    assert resize_table(table, 8, "crop")[:, 0].tolist() == list(range(-7, 8))
    squeezed = resize_table(table, 8, "interp")[:, 0]
    torch.testing.assert_close(squeezed, torch.arange(-7.0, 8.0) * 27 / 15)
    assert resize_table(table[10:17], 8, "crop").shape == (15, 1)  # too short to crop: stretched
    assert resize_table(table, 14, "interp") is table
