"""fft of single channels in channels_last: every length, border and direction, and nothing outside its tensors."""

import cmath
import dataclasses
from functools import partial

import pytest
import torch
from checks import SPECTRAL as ALGORITHM
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
from guarded import guarded, guarded_inside
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import plainconv
from plainconv.cpu import compile as cpu
from plainconv.cpu import spectral as kernels
from plainconv.menu import fft, spectral
from plainconv.menu.base import Tensors
from plainconv.problem import PADDING_MODES, ConvProblem, Direction

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

both_directions = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)

WAYS = {
    "one tile that wraps": "n2 c21 o21 x14x14 k11x13 p5x6 g21",
    "one tile": "n1 c16 o16 x9x7 k5x4 g16",
    "tiles": "n2 c18 o18 x50x41 k9x7 p4x2:5 g18",
    "few channels": "n3 c5 o5 x13x11 k7x3 p3x1 g5",
    "one channel": "n2 c1 o1 x13x11 k7x3 p3x1",
    "strides and dilation": "n1 c17 o17 x23x25 k3x4 p2x3 s2x3 d3x2 g17",
    "wide padding": "n1 c4 o4 x3x2 k5x5 p5x4 g4",
    "cropped": "n2 c4 o4 x19x30 k7x7 p-2:1x-3:-4 g4",
    "kernel larger than the picture": "n2 c17 o17 x6x5 k11x9 p5x4 g17",
    "no images": "n0 c4 o4 x9x9 k5x5 p1 g4",
}
BORDERS = {mode: f"n2 c19 o19 x13x17 k5x5 p2x1:3 m{mode} g19" for mode in PADDING_MODES if mode != "zeros"}


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, **{"threads": 2, "channels_last": True, **more})
    assert spectral.why_not(asked) is None
    return asked


def forget():
    for cached in (spectral.lengths, spectral.prepare):
        cached.cache_clear()


def skip_borders(text, direction):
    if ConvProblem.parse(text).padding_mode != "zeros" and direction is Direction.GRAD_INPUT:
        pytest.skip("that is left to tensor operations")


@every_width
@both_directions
@pytest.mark.parametrize("text", (WAYS | BORDERS).values(), ids=WAYS | BORDERS)
def test_every_way_through_the_kernels(bits, direction, text, as_if):
    as_if(bits)
    skip_borders(text, direction)
    check(ALGORITHM, asked_for(text, direction=direction, has_bias=True), reals, channels_inside)


@pytest.mark.parametrize("length", kernels.FACTORS)
def test_every_length(length, monkeypatch):
    """Though the estimate would take another: one tile, tiles, and a tile that wraps."""
    monkeypatch.setattr(spectral, "LENGTHS", (length,))
    forget()
    half = length // 2
    for text in (f"n1 c5 o5 x{half}x{half} k{half}x{half - 1} g5", f"n1 c5 o5 x{length}x{length + 3} k7x3 p3x1 g5"):
        asked = asked_for(text)
        assert spectral.lengths(asked) == (length, length)
        check(ALGORITHM, asked, reals, channels_inside)
    forget()


def test_a_circular_border_wraps_by_itself():
    """As long as the picture, a transform needs no border."""
    asked = asked_for("n1 c16 o16 x24x32 k9x9 p4 mcircular g16")
    assert spectral.lengths(asked) == (24, 32)
    check(ALGORITHM, asked, reals, channels_inside)
    assert spectral.lengths(asked_for("n1 c16 o16 x24x32 k9x9 p4 g16")) == (32, 36)


@both_directions
@pytest.mark.parametrize("text", [WAYS["tiles"], WAYS["few channels"]])
def test_float64(direction, text):
    check(ALGORITHM, asked_for(text, torch.float64, direction), reals, channels_inside)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same(threads):
    asked = asked_for(WAYS["tiles"], threads=threads)
    tensors = given(asked, reals)
    right = result_of(ALGORITHM, asked_for(WAYS["tiles"]), *tensors)
    assert torch.equal(result_of(ALGORITHM, asked, *tensors), right)


@both_directions
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, spread, lambda t: t[:1].expand(t.shape)])
def test_memory_of_any_strides(layout, direction):
    for text in (WAYS["tiles"], WAYS["few channels"]):
        check(ALGORITHM, asked_for(text, direction=direction), reals, layout)


@st.composite
def problems(draw):
    mode, channels = draw(st.sampled_from(PADDING_MODES)), draw(st.integers(1, 40))
    kernel = tuple(draw(st.integers(1, 12)) for _ in range(2))
    spatial = tuple(k + draw(st.integers(2, 40)) for k in kernel)
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(-1, 2))) for _ in range(2))
    return ConvProblem(
        draw(st.integers(1, 3)), channels, channels, spatial, kernel, (1, 1), padding, (1, 1), channels, mode
    )


@both_directions
@drawn(problem=problems(), wide=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_random_problems(direction, problem, wide, seed):
    asked = request(problem, direction, torch.float64 if wide else torch.float32, channels_last=True, threads=2)
    if spectral.why_not(asked) is None:
        check(ALGORITHM, asked, reals, channels_inside, seed=seed)


@every_width
@both_directions
@pytest.mark.parametrize("text", [*WAYS.values(), BORDERS["reflect"]])
def test_nothing_outside_is_touched(bits, direction, text, as_if, monkeypatch):
    """Every tensor, the tables and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    skip_borders(text, direction)
    asked, place = asked_for(text, direction=direction, has_bias=True), partial(guarded_inside, channels_last=True)
    tensors = given(asked, reals)
    for at_end in (True, False):
        ready = spectral.prepare(asked, False)
        tables = {
            name: tuple(guarded(table, at_end=at_end) for table in getattr(ready, name))
            for name in ("of_weight", "of_image")
        }
        apart = dataclasses.replace(ready, **tables)
        monkeypatch.setattr(spectral, "prepare", lambda asked, spread, apart=apart: apart)
        x = place(tensors.first, at_end=at_end)
        w, b = (guarded(tensor, at_end=at_end) for tensor in tensors[1:3])
        out = place(torch.full(asked.problem.shape_of(direction.makes), torch.nan), at_end=at_end)
        workspace = guarded(torch.full((ALGORITHM.cost(asked).workspace,), 255, dtype=torch.uint8), at_end=at_end)
        ALGORITHM.run(asked, Tensors(x, w, b), out, workspace)
        compare(ALGORITHM, asked, out, *tensors[:3], to_the_bit=False)
        monkeypatch.undo()
        as_if(bits)


def test_a_weight_that_stays_is_transformed_once():
    asked = asked_for(WAYS["tiles"], packed=True, has_bias=True)
    x, w, b, _ = given(asked, reals)
    x, made = channels_last(x), {}
    packed, whole = ALGORITHM.cost(asked), ALGORITHM.cost(dataclasses.replace(asked, packed=False))
    assert packed.workspace < whole.workspace
    assert packed.seconds < whole.seconds
    for _ in range(2):
        call = spectral.bind(asked, Tensors(x, w, b), made)
        out = channels_last(torch.full(asked.problem.output_shape, torch.nan))
        call(Tensors(x, w, b), out, torch.full((ALGORITHM.cost(asked).workspace,), 255, dtype=torch.uint8))
        compare(ALGORITHM, asked, out, x, w, b, to_the_bit=False)
        assert len(made) == 1


# -- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("text", ["n1 c16 o16 x56x56 k31x31 p15 g16", "n1 c16 o16 x80x80 k5x5 g16"])
def test_the_error_that_is_stated(text, positive):
    asked = asked_for(text)
    tensors = given(asked, lambda *how: reals(*how).abs() if positive else reals(*how))
    right = exact(asked, *tensors[:2])
    error = result_of(ALGORITHM, asked, *tensors).double() - right
    assert bool((error.abs() <= tolerance(ALGORITHM, asked, *tensors)).all())
    assert error.norm() <= 1e-6 * right.norm()


def test_a_nan_stays_in_its_picture_and_vector():
    asked = asked_for("n2 c32 o32 x12x12 k5x5 p2 g32")
    first, second, *_ = given(asked, reals)
    right = result_of(ALGORITHM, asked, channels_last(first), second)
    first[1, 3, 6, 6] = torch.nan
    found = result_of(ALGORITHM, asked, channels_last(first), second)
    lost = found.isnan()
    assert bool(lost[1, 3].all())
    assert int(lost.flatten(2).any(2).sum()) == 1
    assert torch.equal(found[~lost], right[~lost])


def test_what_is_refused_is_said():
    for text, more, words in [
        ("n1 c2 o2 x8x8 k3x3 g2", {"device": "cuda"}, "another device"),
        ("n1 c2 o2 x8x8 k3x3 g2", {"dtype": torch.bfloat16}, "float32 and float64"),
        ("n1 c2 o2 x8x8 k3x3 g2", {"direction": Direction.GRAD_WEIGHT}, "not those for the weight"),
        ("n1 c2 o2 x8x8 k3x3 p1 g2 mreflect", {"direction": Direction.GRAD_INPUT}, "no border but zeros"),
        ("n1 c2 o2 x8x8 k3x3 g2", {"channels_last": False}, "in channels_last"),
        ("n1 c2 o2 x8x8 k3x3", {}, "do not meet"),
        ("n1 c2 o2 x8x8x8 k3x3x3 g2", {}, "pictures"),
        ("n1 c2 o2 x99x99 k96x1 g2", {}, "span fewer than"),
    ]:
        how = {"direction": Direction.FORWARD, "dtype": torch.float32, "channels_last": True, **more}
        asked = request(ConvProblem.parse(text), **how)
        assert words in spectral.why_not(asked)
        assert fft.ALGORITHM.why_not(asked) is None, "tensor operations serve it"


def test_auto_takes_it_where_it_wins():
    """Large kernels on large pictures; of a small one, most taps see padding, which `depthwise` leaves out."""
    for size, kernel, wins in [(56, 31, True), (28, 29, True), (14, 27, True), (7, 13, False), (56, 7, False)]:
        x, w = channels_last(torch.empty(8, 64, size, size)), torch.empty(64, 1, kernel, kernel)
        chosen = plainconv.explain(x, w, padding=kernel // 2, groups=64).chosen
        assert (chosen == "fft") is wins, (size, kernel, chosen)


def test_memory_that_is_not_there_is_not_used():
    """What it needs is what it says, and with less another way is taken."""
    asked = asked_for("n1 c64 o64 x56x56 k31x31 p15 g64", max_workspace=1 << 20)
    assert spectral.cost(asked).workspace > 1 << 20
    assert fft._served(asked)[1] is not spectral
    assert fft._served(dataclasses.replace(asked, max_workspace=1 << 30))[1] is spectral


# -- transforms ------------------------------------------------------------------------------------------------------


class Numbers(kernels.Emit):
    """Computes what it is told to, with one number for a vector."""

    def __init__(self):
        super().__init__(4, "double")
        self.zero = self.constant(0.0)

    def constant(self, number):
        return kernels.Value(self, repr(float(number)), self.vector)

    def add(self, a, b):
        return self.constant(float(a.text) + float(b.text))

    def subtract(self, a, b):
        return self.constant(float(a.text) - float(b.text))

    def multiply(self, a, b):
        return self.constant(float(a.text) * float(b.text))

    def fma(self, a, b, c):
        return self.constant(float(a.text) * float(b.text) + float(c.text))


@pytest.mark.parametrize("count", sorted({n for pair in kernels.FACTORS.values() for n in pair}))
def test_butterflies_are_transforms(count):
    e = Numbers()
    numbers = [complex(n * n % 7 - 3, n % 3) for n in range(count)]
    points = [(e.constant(number.real), e.constant(number.imag)) for number in numbers]
    found = [complex(float(a.text), float(b.text)) for a, b in kernels.Butterflies(e).transform(points)]
    for k, value in enumerate(found):
        right = sum(number * cmath.exp(-2j * cmath.pi * n * k / count) for n, number in enumerate(numbers))
        assert abs(value - right) < 1e-12
