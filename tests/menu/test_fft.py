"""fft in tensor operations: tiles that go together, and where single channels of long rows take it."""

import math

import pytest
import torch
from checks import check, reals, request

import plainconv
from plainconv.menu import fft
from plainconv.problem import PADDING_MODES, ConvProblem, Direction

LINES = {
    "tiles of several calls": "n2 c3 o3 x20000 k301 p300:0 g3",
    "a stride and a dilation": "n1 c2 o2 x30000 k51 s2 d3 g2",
    "several channels": "n2 c4 o6 x20000 k33 p16 g2",
    **{mode: f"n1 c2 o2 x20000 k301 p150:100 m{mode} g2" for mode in PADDING_MODES if mode != "zeros"},
}


def forget():
    for cached in (fft._tiles, fft._served):
        cached.cache_clear()


@pytest.fixture
def two_at_once(monkeypatch):
    """Two tiles a call."""
    monkeypatch.setattr(fft, "ENGINE", ())
    counted = fft._with_buffers

    def with_two(asked, *given):
        problem, (length,) = asked.problem, given[-1]
        channels = problem.in_channels + problem.out_channels
        monkeypatch.setattr(fft, "TOGETHER", 2 * problem.batch * channels * math.prod((length,)))
        return counted(asked, *given)

    monkeypatch.setattr(fft, "_with_buffers", with_two)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("direction", list(Direction), ids=lambda d: d.value)
@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_tiles_go_together(text, direction, dtype, two_at_once):
    asked = request(ConvProblem.parse(text), direction, dtype, has_bias=direction is not Direction.GRAD_WEIGHT)
    tiles = fft._tiles(asked)
    count = -(-asked.problem.out[0] // tiles.outputs[0])
    assert tiles.tiles == 2
    assert count > 2
    check(fft.ALGORITHM, asked, reals)


@pytest.mark.parametrize("direction", list(Direction), ids=lambda d: d.value)
@pytest.mark.parametrize("threads", [1, 2])
def test_single_channels_of_long_rows_and_kernels(direction, threads):
    """On one core of an AMD Zen 4: from some 300 taps on; for a gradient for the weight from 100, of many channels."""

    def chosen(length, k, channels, batch=1):
        text = f"n{batch} c{channels} o{channels} x{length} k{k} p{k - 1}:0 g{channels}"
        asked = request(ConvProblem.parse(text), direction, torch.float32, threads=threads)
        return plainconv.plan.explain_request(asked).chosen

    for length, k, channels in [(4096, 1000, 16), (65536, 1000, 4), (16384, 1000, 8), (100000, 4001, 64)]:
        assert chosen(length, k, channels) == "fft"
    for length, k, channels in [(1000, 31, 4), (16384, 31, 64), (65536, 31, 4), (4096, 128, 4)]:
        assert chosen(length, k, channels) != "fft"
    assert chosen(16384, 16000, 64) == "fft", "a kernel as long as the row"


def test_a_long_row_takes_little_memory_if_it_has_to():
    """A tile of few taps and a long stride is as short as may be, and not the whole row, when rounded up."""
    x, w = torch.randn(1, 1, 160_000), torch.randn(1, 1, 2)
    y = plainconv.conv1d(x, w, stride=16, algorithm="fft", max_workspace=1000)
    torch.testing.assert_close(y, torch.nn.functional.conv1d(x, w, stride=16))
