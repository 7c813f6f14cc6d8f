"""fft on the engine: every form, every way through the kernels, for every vector width, type and layout of memory."""

import dataclasses
import math
from functools import partial

import assembly
import pytest
import torch
from checks import FOURIER as ALGORITHM
from checks import (
    channels_inside,
    channels_last,
    check,
    compare,
    every_width,
    exact,
    given,
    reals,
    request,
    result_of,
    spread,
    tolerance,
)
from guarded import guarded, guarded_inside, guarded_tables
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import plainconv
from plainconv.cpu import compile as cpu
from plainconv.cpu import fourier as kernels
from plainconv.menu import fft, fourier, winograd
from plainconv.menu.base import Tensors
from plainconv.problem import PADDING_MODES, ConvProblem, Direction

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
both_directions = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
both_directions_in_time = pytest.mark.parametrize(
    "direction", [Direction.FORWARD, pytest.param(Direction.GRAD_INPUT, marks=pytest.mark.slow)], ids=lambda d: d.value
)

WAYS = {
    "few tiles": "n1 c20 o37 x9x10 k5x5 p2",
    "few tiles, many channels": "n2 c75 o40 x6x5 k5x5 p2",
    "blocks of rows": "n2 c5 o19 x37x43 k7x5 p3",
    "parts of a row": "n1 c3 o5 x5x501 k3x7 p1",
    "one output channel": "n2 c6 o1 x29x33 k7x7 p3",
    "one input channel": "n2 c1 o18 x29x33 k9x9",
    "groups": "n2 c14 o22 x30x31 k5x5 p1 g2",
    "small": "n1 c3 o4 x3x3 k3x3",
    "wide padding": "n1 c4 o6 x3x2 k5x5 p5x4",
    "cropped": "n2 c4 o6 x19x30 k7x7 p-2:1x-3:-4",
    "1-D": "n3 c9 o17 x401 k11 p5",
    "1-D, two blocks of taps": "n2 c9 o17 x401 k53 p1",
    "1-D, many blocks of taps": "n1 c40 o37 x401 k301 p150",
    "1-D, blocks and images": "n3 c9 o17 x105 k101 p1",
    "1-D, short": "n3 c9 o17 x5 k3 p1",
    "rows alone": "n2 c9 o7 x31x14 k35x1 p20x0",
    "width alone, blocks": "n2 c9 o7 x11x34 k1x65 p0x32",
    "3-D, flat": "n2 c6 o18 x3x13x15 k1x5x5 p0x2x2",
    "no channels": "n1 c0 o3 x9x9 k5x5 p1",
    "no images": "n0 c4 o3 x9x9 k5x5 p1",
    "no outputs": "n1 c4 o0 x9x9 k5x5 p1",
}
BORDERS = {mode: f"n2 c5 o19 x13x17 k5x5 p2x1:3 m{mode}" for mode in PADDING_MODES if mode != "zeros"}


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, **{"threads": 2, **more})
    assert fourier.why_not(asked) is None
    return asked


def forms_of(asked):
    return fourier._forms(winograd.sides_of(winograd.work(asked)))


def forget():
    for cached in (fourier.way, winograd.cut_by, winograd._room, winograd.prepare):
        cached.cache_clear()


@pytest.fixture
def only(monkeypatch):
    """A function that leaves one form to choose from."""

    def leave(form):
        monkeypatch.setattr(fourier, "_forms", lambda sides: (form,))
        forget()

    yield leave
    forget()


@every_width
@both_layouts
@both_directions_in_time
@pytest.mark.parametrize("text", (WAYS | BORDERS).values(), ids=WAYS | BORDERS)
def test_every_way_through_the_kernels(bits, last, direction, text, as_if):
    as_if(bits)
    problem = ConvProblem.parse(text)
    if last and problem.dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    if problem.padding_mode != "zeros" and direction is Direction.GRAD_INPUT:
        pytest.skip("that is left to tensor operations")
    asked = asked_for(text, direction=direction, channels_last=last, has_bias=True)
    check(ALGORITHM, asked, reals, channels_inside if last else None)


@both_directions_in_time
@pytest.mark.parametrize("text", ["n2 c18 o20 x61 k6 p2", "n1 c18 o20 x150 k70 p33", "n1 c5 o20 x21x23 k5x6 p2"])
def test_every_form(text, direction, only):
    """Every length, with the kernel whole and in blocks, though the estimate would take another."""
    asked = asked_for(text, direction=direction)
    forms = forms_of(asked)
    assert len(forms) > 3
    for form in forms:
        only(form)
        assert fourier.way(asked).form == form
        check(ALGORITHM, asked, reals)


@both_layouts
@both_directions
@pytest.mark.parametrize("text", [WAYS["few tiles"], WAYS["blocks of rows"], WAYS["rows alone"]])
def test_float64(last, direction, text):
    asked = asked_for(text, torch.float64, direction, channels_last=last)
    check(ALGORITHM, asked, reals)
    check(ALGORITHM, dataclasses.replace(asked, threads=1), reals, channels_inside)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("text", [WAYS["few tiles"], WAYS["groups"], WAYS["1-D, many blocks of taps"]])
def test_any_number_of_threads_gives_the_same(text, threads):
    asked = asked_for(text, threads=threads)
    check(ALGORITHM, asked, reals)
    tensors = given(asked, reals)
    assert torch.equal(result_of(ALGORITHM, asked, *tensors), result_of(ALGORITHM, asked, *tensors))


@both_directions
@pytest.mark.parametrize("layout", [spread, lambda t: t[:1].expand(t.shape)])
def test_memory_of_any_strides(layout, direction):
    for text in (WAYS["blocks of rows"], WAYS["1-D, two blocks of taps"]):
        check(ALGORITHM, asked_for(text, direction=direction), reals, layout)


@st.composite
def problems(draw):
    dims, mode = draw(st.sampled_from((1, 2))), draw(st.sampled_from(PADDING_MODES))
    most = {1: 90, 2: 12}[dims]
    kernel = tuple(draw(st.integers(1, most)) for _ in range(dims))
    spatial = tuple(k + draw(st.integers(2, 80 // dims)) for k in kernel)
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(-1, 2))) for _ in range(dims))
    groups, c, o = draw(st.sampled_from((1, 1, 2))), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ones = (1,) * dims
    return ConvProblem(
        draw(st.integers(1, 3)), c * groups, o * groups, spatial, kernel, ones, padding, ones, groups, mode
    )


@both_directions
@drawn(problem=problems(), last=st.booleans(), wide=st.booleans(), bias=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_random_problems(direction, problem, last, wide, bias, seed):
    dtype = torch.float64 if wide else torch.float32
    asked = request(problem, direction, dtype, channels_last=last and problem.dims > 1, has_bias=bias, threads=2)
    if fourier.why_not(asked) is None:
        check(ALGORITHM, asked, reals, seed=seed)


GUARDED = [(text, torch.float32) for text in (*WAYS.values(), BORDERS["reflect"])]
GUARDED += [(WAYS[name], torch.float64) for name in ("few tiles", "blocks of rows", "1-D, blocks and images")]


@every_width
@both_layouts
@both_directions_in_time
@pytest.mark.parametrize(("text", "dtype"), GUARDED, ids=str)
def test_nothing_outside_is_touched(bits, last, direction, text, dtype, as_if, monkeypatch):
    """Every tensor, the tables and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    problem = ConvProblem.parse(text)
    if problem.padding_mode != "zeros" and direction is Direction.GRAD_INPUT:
        pytest.skip("that is left to tensor operations")
    if last and problem.dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    tables, place = winograd._tables, partial(guarded_inside, channels_last=last)
    asked = asked_for(text, dtype, direction, channels_last=last, has_bias=True)
    for at_end in (True, False):
        held = []
        monkeypatch.setattr(winograd, "_tables", guarded_tables(tables, held, at_end=at_end))
        winograd.prepare.cache_clear()
        tensors = Tensors(*(None if t is None else place(t, at_end=at_end) for t in given(asked, reals)))
        out = place(torch.full(asked.problem.shape_of(direction.makes), torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((fourier.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        ALGORITHM.run(asked, tensors, out, workspace)
        assert held, "the tables were not guarded"
        compare(ALGORITHM, asked, out, *tensors, to_the_bit=False)


@both_layouts
def test_a_new_size_compiles_little(last, monkeypatch):
    """Batch, height and width are arguments; which of the lengths pay depends on them, two along rows and width."""
    texts = set()
    monkeypatch.setattr(winograd.cpu, "compile", lambda text, target: texts.add(text))
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 77, 1001), (4, 200, 64), (8, 130, 131)]:
        asked = asked_for(f"n{n} c64 o64 x{h}x{w} k7x7 p3", channels_last=last)
        x = torch.empty(asked.problem.input_shape, device="meta")
        winograd.prepare.__wrapped__(asked, fourier.way(asked), (channels_inside(x) if last else x).stride(), False)
    assert len(texts) <= 2 * len(forms_of(asked)) == 8


@assembly.every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("text", ["n1 c64 o64 x56x56 k7x7 p3", "n2 c64 o64 x1000 k31 p15"])
def test_the_sums_stay_in_registers(text, dtype, target, as_if, monkeypatch):
    as_if(target)
    texts = []
    monkeypatch.setattr(winograd.cpu, "compile", lambda text, target: texts.append(text))
    asked = asked_for(text, dtype)
    cut = fourier.way(asked)
    winograd.prepare.__wrapped__(asked, cut, torch.empty(asked.problem.input_shape, device="meta").stride(), False)
    code = cpu.assembly(texts[-1], target)
    inner = [block for block in assembly.blocks(code) if assembly.products(block) == cut.scalars * cut.vectors]
    assert inner, "the step of a product is one block"
    for block in inner:
        assert not assembly.spills(block, code), "a vector is written to the stack"


# -- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("text", ["n1 c{} o16 x40x40 k5x5 p2", "n1 c{} o16 x500 k101 p50", "n1 c{} o16 x500 k5"])
def test_the_error_that_is_stated(text, positive):
    """Against float64, and how it grows with channels: that of a sum of the products, about."""
    for channels in (4, 64):
        asked = asked_for(text.format(channels))
        tensors = given(asked, lambda *how: reals(*how).abs() if positive else reals(*how))
        right = exact(asked, *tensors[:2])
        error = result_of(ALGORITHM, asked, *tensors).double() - right
        assert bool((error.abs() <= tolerance(ALGORITHM, asked, *tensors)).all())
        assert error.norm() <= 1e-6 * right.norm()


@both_directions
def test_a_nan_stays_in_its_tiles(direction):
    asked = asked_for("n1 c3 o4 x400 k9 p4", direction=direction)
    form = fourier.way(asked).form
    first, second, *_ = given(asked, reals)
    right = result_of(ALGORITHM, asked, first, second)
    first[0, 1, 200] = torch.nan
    found = result_of(ALGORITHM, asked, first, second)
    lost = found.isnan().any(1)[0]
    assert bool(lost[196:205].all())
    assert lost.sum() <= 2 * form.tile[2]
    assert torch.equal(found[:, :, ~lost], right[:, :, ~lost])


def test_what_is_refused_is_said():
    for text, more, words in [
        ("n1 c2 o2 x8x8 k3x3", {"device": "cuda"}, "another device"),
        ("n1 c2 o2 x8x8 k3x3", {"dtype": torch.bfloat16}, "float32 and float64"),
        ("n1 c2 o2 x8x8 k3x3", {"direction": Direction.GRAD_WEIGHT}, "not those for the weight"),
        ("n1 c2 o2 x8x8 k3x3 p1 mreflect", {"direction": Direction.GRAD_INPUT}, "no border but zeros"),
        ("n1 c2 o2 x8x8 k3x3 s2", {}, "stride 1"),
        ("n1 c2 o2 x8x8 k3x3 d2", {}, "no dilation"),
        ("n1 c2 o2 x8x8 k1x1", {}, "one tap"),
        ("n1 c2 o2 x80 k7 g2", {}, "a group of one"),
        ("n1 c2 o2 x38x38 k31x31", {}, "too large"),
        ("n1 c2 o2 x8x8x8 k3x3x3", {}, "along the depth"),
        (f"n1 c2 o2 x8x8 k3x3 p{1 << 21}", {}, "tables list every place"),
    ]:
        asked = request(ConvProblem.parse(text), **{"direction": Direction.FORWARD, "dtype": torch.float32, **more})
        assert words in fourier.why_not(asked)
        assert fft.ALGORITHM.why_not(asked) is None, "tensor operations serve it"


def test_auto_takes_it_where_it_wins():
    many, few, small = torch.empty(4, 64, 120, 160), torch.empty(1, 3, 120, 160), torch.empty(1, 64, 120, 160)
    assert plainconv.explain(many, torch.empty(64, 64, 7, 7), padding=3).chosen == "fft"
    assert plainconv.explain(few, torch.empty(8, 3, 7, 7), padding=3).chosen != "fft"
    assert plainconv.explain(small, torch.empty(64, 64, 1, 1)).chosen != "fft"


@pytest.mark.parametrize("dims", [1, 2])
def test_the_transposed_convolution(dims):
    conv = (plainconv.conv_transpose1d, plainconv.conv_transpose2d)[dims - 1]
    theirs = (torch.conv_transpose1d, torch.conv_transpose2d)[dims - 1]
    x, w, b = (reals(shape, torch.float64, 0) for shape in ((2, 4, *(20,) * dims), (4, 3, *(7,) * dims), (3,)))
    for last in (False, True):
        found = conv(channels_last(x) if last else x, w, b, padding=1, algorithm="fft")
        torch.testing.assert_close(found, theirs(x, w, b, padding=1))


# -- transforms ------------------------------------------------------------------------------------------------------


class Numbers(kernels.Emit):
    """Computes what it is told to, with one number for a vector, and counts."""

    def __init__(self):
        super().__init__(4, "double")
        self.zero = self._value(0.0)
        self.operations = 0

    def _value(self, number):
        return kernels.Value(self, repr(float(number)), self.vector)

    def _number(self, result):
        self.operations += 1
        return self._value(result)

    def constant(self, number):
        return self._value(number)

    def add(self, a, b):
        return self._number(float(a.text) + float(b.text))

    def subtract(self, a, b):
        return self._number(float(a.text) - float(b.text))

    def multiply(self, a, b):
        return self._number(float(a.text) * float(b.text))

    def fma(self, a, b, c):
        return self._number(float(a.text) * float(b.text) + float(c.text))


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32, 64])
def test_rows_are_correlated_by_products(length):
    """And with few operations: those of a split in halves."""
    taps, count = max(length // 2, 1), max(length // 2, 1)
    torch.manual_seed(length)
    x, w = torch.randn(length, dtype=torch.float64), torch.randn(taps, dtype=torch.float64)
    e = Numbers()
    rows = kernels.Fourier(e, length)
    left, right = ([e._value(number) for number in tensor.tolist()] for tensor in (x, w))
    numbers = [
        e._value(float(a.text) * float(b.text)) for a, b in zip(rows.forth(left), rows.weigh(right), strict=True)
    ]
    assert len(numbers) == rows.numbers
    found = [float(value.text) for value in rows.back(numbers, count)]
    expected = [float((x[t : t + taps] * w).sum()) for t in range(count)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert e.operations <= 12 * length * max(math.log2(length), 1)
