"""The index table behind every padding, against one that is made element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plainconv.border import Run, gather, runs, scatter_add
from plainconv.problem import PADDING_MODES


def padded_row(size, padding, mode):
    """Which element each place of the padded row shows, -1 for zero: crop the list, then lengthen it."""
    lo, hi = padding
    row = list(range(size))[max(-lo, 0) : size - max(-hi, 0)]
    lo, hi = max(lo, 0), max(hi, 0)
    if mode == "zeros":
        return [-1] * lo + row + [-1] * hi
    if mode == "replicate":
        return row[:1] * lo + row + row[-1:] * hi
    if mode == "circular":
        return row[len(row) - lo :] + row + row[:hi]
    return row[1 : 1 + lo][::-1] + row + row[len(row) - 1 - hi : len(row) - 1][::-1]


def shown(found):
    """The runs of a strip, written out."""
    return [run.source + run.step * i if run.source >= 0 else -1 for run in found for i in range(run.length)]


@st.composite
def sides(draw, largest=9):
    """size, (lo, hi) and mode that fit together."""
    mode, size = draw(st.sampled_from(PADDING_MODES)), draw(st.integers(1, largest))
    lo = draw(st.integers(1 - size, 7))
    hi = draw(st.integers(1 - size - min(lo, 0), 7))
    inside = size + min(lo, 0) + min(hi, 0)
    most = {"reflect": inside - 1, "circular": inside}.get(mode, 7)
    return size, (min(lo, most), min(hi, most)), mode


@settings(max_examples=500)
@given(sides(), st.integers(-6, 30), st.integers(0, 20), st.integers(1, 5))
def test_runs_show_what_the_padded_row_shows(side, start, count, step):
    size, padding, mode = side
    row = padded_row(size, padding, mode)
    places = [start + step * i for i in range(count)]
    expected = [row[place] if 0 <= place < len(row) else -1 for place in places]
    found = runs(size, padding, mode, start, count, step)
    assert shown(found) == expected
    assert len(found) <= 5
    assert [run.at for run in found] == [sum(run.length for run in found[:i]) for i in range(len(found))]
    assert all(run.length > 0 for run in found)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("zeros", [-1, -1, 0, 1, 2, 3, -1]),
        ("reflect", [2, 1, 0, 1, 2, 3, 2]),
        ("replicate", [0, 0, 0, 1, 2, 3, 3]),
        ("circular", [2, 3, 0, 1, 2, 3, 0]),
    ],
)
def test_the_four_modes_by_hand(mode, expected):
    assert shown(runs(4, (2, 1), mode, 0, 7)) == expected


def test_a_whole_row_without_padding_is_one_run():
    assert runs(8, (0, 0), "zeros", 0, 8) == (Run(0, 8, 0, 1),)


def torch_pad(x, paddings, mode):
    """F.pad, which crops in mode "constant" only."""
    crop = [min(side, 0) for pair in reversed(paddings) for side in pair]
    grow = [max(side, 0) for pair in reversed(paddings) for side in pair]
    x = torch.nn.functional.pad(x, crop)
    return torch.nn.functional.pad(x, grow, mode={"zeros": "constant"}.get(mode, mode))


@st.composite
def blocks(draw):
    """A tensor of one to three dimensions behind batch and channels, and a padding for each."""
    mode = draw(st.sampled_from(PADDING_MODES))
    found = [draw(sides(5).filter(lambda side: side[2] == mode)) for _ in range(draw(st.integers(1, 3)))]
    x = torch.arange(1, 1 + 2 * torch.Size([size for size, _, _ in found]).numel(), dtype=torch.int64)
    return x.view(1, 2, *(size for size, _, _ in found)), [padding for _, padding, _ in found], mode


@given(blocks())
def test_gather_is_torch_pad(block):
    x, paddings, mode = block
    expected = torch_pad(x.double(), paddings, mode).long()
    out = torch.full_like(expected, -77)
    axes = [
        runs(size, pair, mode, 0, length)
        for size, pair, length in zip(x.shape[2:], paddings, expected.shape[2:], strict=True)
    ]
    gather(x, axes, out)
    assert torch.equal(out, expected)


@given(blocks(), st.integers(-3, 6), st.integers(1, 7), st.integers(1, 3))
def test_scatter_add_is_the_adjoint_of_gather(block, start, count, step):
    x, paddings, mode = block
    axes = [runs(size, pair, mode, start, count, step) for size, pair in zip(x.shape[2:], paddings, strict=True)]
    strip = torch.full((*x.shape[:2], *(count,) * len(axes)), -77)
    gather(x, axes, strip)
    other = torch.randint(-9, 9, strip.shape)
    into = torch.randint(-9, 9, x.shape)
    before = into.clone()
    scatter_add(other, axes, into)
    assert (strip * other).sum() == (x * (into - before)).sum()


@pytest.mark.parametrize("layout", ["transposed", "every second", "channels last"])
def test_views_are_read_and_written_where_they_lie(layout):
    x = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    view = {
        "transposed": lambda: x.mT.contiguous().mT,
        "every second": lambda: x.repeat_interleave(2, -1)[..., ::2],
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
    }[layout]()
    axes = [runs(5, (2, 1), "reflect", 0, 8), runs(4, (1, 2), "reflect", 0, 7)]
    plain, viewed = torch.empty(2, 3, 8, 7, dtype=x.dtype), torch.empty(2, 3, 8, 7, dtype=x.dtype)
    gather(x, axes, plain)
    gather(view, axes, viewed)
    assert torch.equal(plain, viewed)
    into, into_view = torch.zeros_like(x), torch.zeros_like(view, memory_format=torch.preserve_format)
    scatter_add(plain, axes, into)
    scatter_add(plain, axes, into_view)
    assert torch.equal(into, into_view)
