"""narrow in channels_last: right for every type and vector width; nothing outside is touched; no spilled sums."""

import assembly
import pytest
import torch
from checks import check, compare, given, integers, reals, request
from guarded import guarded

from plainconv.cpu import compile as cpu
from plainconv.cpu import groups
from plainconv.menu import channels
from plainconv.menu.narrow import ALGORITHM
from plainconv.menu.parts import parts
from plainconv.problem import ConvProblem, Direction

BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

every_width = pytest.mark.parametrize("bits", BITS)

WAYS = {
    "four groups a vector": "n2 c16 o16 x5x16 k3x3 p1 g4",
    "two groups, stride 2": "n1 c16 o16 x9x31 k3x3 s2 p1 g2",
    "a group a vector, wide": "n1 c40 o32 x4x17 k3x3 p1 g2",
    "more outputs than a vector": "n1 c6 o64 x4x9 k3x3 p1 g2",
    "fewer inputs": "n1 c8 o32 x5x9 k3x2 p1 g4",
    "more inputs": "n1 c32 o16 x5x9 k3x3 p1 g4",
    "groups that fill no vector": "n1 c20 o20 x4x9 k3x3 p1 g5",
    "one input, dilation": "n1 c8 o16 x6x9 k2x3 d2 p1x3 g8",
    "reflect": "n1 c8 o16 x6x30 k3x5 p2x4 mreflect g4",
    "rows in turn, long kernel": "n1 c16 o16 x3x40 k2x31 p1x15 g4",
    "one group": "n1 c3 o16 x5x8 k3x3 p1",
    "3-D, stride": "n1 c16 o16 x5x6x9 k3x3x3 s2 p1 g2",
    "all border": "n1 c16 o16 x2x2 k3x3 p6 g4",
}
EVERY_WAY = [(text, torch.float32) for text in WAYS.values()]
EVERY_WAY += [
    (WAYS[name], dtype)
    for name in ("two groups, stride 2", "more inputs")
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
]
every_way = pytest.mark.parametrize(("text", "dtype"), EVERY_WAY, ids=str)


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    return request(ConvProblem.parse(text), direction, dtype, channels_last=True, **more)


def last(tensor):
    """Channels side by side."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture
def as_if(monkeypatch):
    """A function that pretends the processor has vectors of so many bits, and that every input is a large one."""

    def pretend(bits):
        monkeypatch.setattr(channels, "ASKED_GROUPS", 0)
        monkeypatch.setattr(channels, "PACKED", 1 << 10)
        target = cpu.Target.host(bits)
        monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
        monkeypatch.setattr(channels, "prepare", channels.prepare.__wrapped__)

    return pretend


@every_width
@every_way
def test_every_way_through_the_kernel(bits, dtype, text, as_if):
    as_if(bits)
    for direction in (Direction.FORWARD, Direction.GRAD_INPUT):
        asked = asked_for(text, dtype, direction, has_bias=True, has_residual=True, threads=3)
        if direction is Direction.FORWARD or ALGORITHM.why_not(asked) is None:
            check(ALGORITHM, asked, integers, last)


@pytest.mark.parametrize("layout", [last, torch.Tensor.contiguous], ids=["last", "first"])
def test_what_is_summed_stays_within_the_bound(layout):
    for text in (WAYS["four groups a vector"], WAYS["3-D, stride"]):
        check(ALGORITHM, asked_for(text, activation="silu"), reals, layout)


@every_width
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.name)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("apart", [False, True], ids=["channels side by side", "apart"])
@every_way
def test_nothing_outside_is_touched(bits, apart, at_end, text, dtype, direction, as_if, monkeypatch):
    """Every tensor, every table and the workspace right before or right behind memory that faults."""
    as_if(bits)
    asked, tables = asked_for(text, dtype, direction, has_bias=True, has_residual=True), channels._tables
    if ALGORITHM.why_not(asked) is not None or asked.problem.padding_mode != "zeros":
        pytest.skip("not served, or by way of a padded gradient")
    monkeypatch.setattr(
        channels, "_tables", lambda *how: tuple(guarded(table, at_end=at_end) for table in tables(*how))
    )

    def enclosed(tensor):
        return guarded(tensor.movedim(1, -1), at_end=at_end).movedim(-1, 1)

    x, w, bias, residual = given(asked, reals)
    tensors = given(asked, reals)._replace(
        first=guarded(x, at_end=at_end) if apart else enclosed(x),
        second=guarded(w, at_end=at_end),
        bias=guarded(bias, at_end=at_end),
        residual=enclosed(residual),
    )
    out = enclosed(torch.full(asked.problem.shape_of(asked.direction.makes), torch.nan, dtype=dtype))
    workspace = guarded(torch.full((channels.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
    channels.run(asked, tensors, out, workspace)
    compare(ALGORITHM, asked, out, *tensors, to_the_bit=False)


def test_the_border_is_zeros_that_are_multiplied():
    x, w = last(torch.ones(1, 16, 3, 20)), torch.ones(16, 4, 3, 3)
    w[5, 1, 0, 0] = torch.inf
    asked = asked_for("n1 c16 o16 x3x20 k3x3 p1 g4")
    out, workspace = last(torch.empty(1, 16, 3, 20)), torch.empty(ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    channels.run(asked, given(asked, integers)._replace(first=x, second=w), out, workspace)
    expected = torch.zeros(1, 16, 3, 20, dtype=torch.bool)
    expected[0, 5, 0], expected[0, 5, :, 0] = True, True
    assert torch.equal(out.isnan(), expected)


def test_a_new_size_compiles_nothing():
    texts = set()
    for n, h, w in [(1, 20, 50), (2, 21, 400), (3, 77, 101)]:
        asked = asked_for(f"n{n} c64 o64 x{h}x{w} k3x3 p{n} g16")
        texts.add(groups.text(channels.shape_of(parts(asked)[0], cpu.Target.host())))
    assert len(texts) == 1


@assembly.every_target
@pytest.mark.parametrize("text", ["n1 c64 o64 x56x56 k3x3 p1 g16", "n1 c64 o64 x56x56 k3x3 s2 p1 g4"])
def test_sums_stay_in_registers(target, text):
    code = cpu.assembly(groups.text(channels.shape_of(parts(asked_for(text))[0], target)), target)
    tile = assembly.main_tile(code)
    assert assembly.products(tile) >= 8
    assert not assembly.spills(tile, code)


def test_what_is_refused_is_said():
    assert "theirs are 3 input and 3 output channels" in ALGORITHM.why_not(asked_for("n1 c6 o6 x9x9 k3x3 g2"))
    weight = asked_for(WAYS["one group"], direction=Direction.GRAD_WEIGHT)
    assert ALGORITHM.why_not(weight) == "it makes no gradient for a weight in channels_last"
