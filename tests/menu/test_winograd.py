"""winograd: every way through its kernels, for every vector width, type and layout of memory."""

import dataclasses
import math
from functools import partial

import assembly
import pytest
import torch
from checks import (
    channels_inside,
    channels_last,
    check,
    compare,
    exact,
    given,
    integers,
    reals,
    request,
    result_of,
    spread,
    tolerance,
)
from guarded import guarded, guarded_inside, guarded_tables, guarded_view
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import plainconv
from plainconv.cpu import compile as cpu
from plainconv.cpu import transforms
from plainconv.cpu import winograd as kernels
from plainconv.menu import fft, winograd
from plainconv.menu.base import Tensors
from plainconv.menu.engine import padded
from plainconv.problem import ACTIVATIONS, PADDING_MODES, ConvProblem, Direction

ALGORITHM = winograd.ALGORITHM
BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

# Everything with the widest registers, and again with the others when there is time.
every_width = pytest.mark.parametrize(
    "bits", [pytest.param(bits, marks=[pytest.mark.slow] if i else []) for i, bits in enumerate(BITS)]
)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_types_in_time = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
both_directions = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
both_directions_in_time = pytest.mark.parametrize(
    "direction", [Direction.FORWARD, pytest.param(Direction.GRAD_INPUT, marks=pytest.mark.slow)], ids=lambda d: d.value
)

# Where the kernels take another way.
WAYS = {
    "few tiles": "n1 c20 o77 x9x10 k3x3 p1",
    "few tiles, many channels": "n2 c75 o40 x6x5 k3x3 p1",
    "few tiles of groups": "n2 c20 o150 x9x10 k3x3 p1 g2",
    "blocks of rows": "n2 c5 o19 x37x43 k3x3 p1",
    "parts of a row": "n1 c3 o5 x5x501 k3x3 p1",
    "a thread more than blocks": "n1 c7 o80 x4x401 k3x3 p1",
    "one output channel": "n2 c6 o1 x29x33 k3x3 p1",
    "one input channel": "n2 c1 o18 x29x33 k3x3",
    "groups": "n2 c14 o22 x30x31 k3x3 p1 g2",
    "depthwise": "n1 c5 o5 x30x31 k3x3 p1 g5",
    "small": "n1 c3 o4 x3x3 k3x3",
    "wide padding": "n1 c4 o6 x3x2 k3x3 p5x4",
    "cropped": "n2 c4 o6 x19x30 k3x3 p-2:1x-3:-4",
    "1-D": "n3 c9 o17 x401 k3 p1",
    "1-D, short": "n3 c9 o17 x5 k3 p1",
    "rows alone": "n2 c9 o7 x31x14 k3x1 p1x0",
    "width alone": "n2 c9 o7 x31x14 k1x3 p0x1",
    "3-D": "n2 c6 o18 x5x13x15 k3x3x3 p1",
    "3-D, few": "n1 c18 o18 x3x5x6 k3x3x3 p1",
    "depth alone": "n1 c6 o9 x9x5x7 k3x1x1 p1x0x0",
    "depth and width": "n1 c6 o9 x9x5x7 k3x1x3 p1x2x0",
    "two taps": "n2 c19 o35 x201 k2 p1:0",
    "two taps and three": "n2 c6 o18 x15x14 k2x3 p0x1",
    "stride 2, 1-D": "n2 c19 o35 x201 k3 s2 p1",
    "stride 2": "n2 c9 o18 x19x22 k3x3 s2 p1",
    "stride 2, four taps": "n2 c9 o18 x19x22 k4x4 s2 p1",
    "stride 2, many taps": "n1 c3 o5 x29x23 k5x6 s2 p2x3",
    "stride 2 along rows": "n1 c9 o18 x19x22 k3x2 s2x1 p-1x2",
    "stride 2, 3-D": "n1 c6 o9 x7x9x8 k3x3x2 s2x1x2 p1x1x0",
    "no channels": "n1 c0 o3 x9x9 k3x3 p1",
    "no images": "n0 c4 o3 x9x9 k3x3 p1",
    "no outputs": "n1 c4 o0 x9x9 k3x3 p1",
}
BORDERS = {mode: f"n2 c5 o19 x13x17 k3x3 p2x1:3 m{mode}" for mode in PADDING_MODES if mode != "zeros"}
BORDERS["stride 2, reflect"] = "n2 c5 o19 x13x17 k3x4 s2 p2x1:3 mreflect"


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, **{"threads": 2, **more})
    assert ALGORITHM.why_not(asked) is None
    return asked


def forget():
    for cached in (winograd.way, winograd.cut_by, winograd._room, winograd.prepare):
        cached.cache_clear()


@every_width
@both_layouts
@both_directions_in_time
@pytest.mark.parametrize("text", (WAYS | BORDERS).values(), ids=WAYS | BORDERS)
def test_every_way_through_the_kernels(bits, last, direction, text, as_if):
    as_if(bits)
    if last and ConvProblem.parse(text).dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    asked = asked_for(text, direction=direction, channels_last=last, has_bias=True, has_residual=True)
    check(ALGORITHM, asked, reals, channels_inside if last else None)


@both_layouts
@both_directions
@pytest.mark.parametrize("tile", [2, 4, 5])
@pytest.mark.parametrize("text", [WAYS[name] for name in ("few tiles", "blocks of rows", "3-D, few", "1-D")])
def test_every_form(tile, text, direction, last, monkeypatch):
    """Estimates take one of them for each size."""
    monkeypatch.setattr(
        winograd, "_outputs", lambda made, side, sizes, turned: 1 if side.kernel == 1 else min(tile, max(sizes))
    )
    forget()
    asked = asked_for(text, direction=direction, channels_last=last, has_bias=True)
    check(ALGORITHM, asked, reals, channels_inside if last else None)
    forget()


@every_width
@both_layouts
@both_directions
@pytest.mark.parametrize("text", [WAYS["few tiles"], WAYS["blocks of rows"], WAYS["3-D"]])
def test_float64(bits, last, direction, text, as_if):
    as_if(bits)
    asked = asked_for(text, torch.float64, direction, channels_last=last, has_residual=True)
    check(ALGORITHM, asked, reals)
    check(ALGORITHM, dataclasses.replace(asked, activation="relu", threads=1), reals, channels_inside)


@both_layouts
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_what_is_fused(activation, last):
    for text in (WAYS["few tiles"], WAYS["groups"]):
        asked = asked_for(text, channels_last=last, activation=activation, has_bias=True, has_residual=True)
        check(ALGORITHM, asked, reals)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "text", [WAYS[name] for name in ("few tiles", "few tiles of groups", "blocks of rows", "groups", "parts of a row")]
)
def test_any_number_of_threads_gives_the_same(text, threads):
    """Every tile is made by one thread, so even the bits are the same where the way to cut is."""
    asked = asked_for(text, threads=threads)
    check(ALGORITHM, asked, reals)
    tensors = given(asked, reals)
    assert torch.equal(result_of(ALGORITHM, asked, *tensors), result_of(ALGORITHM, asked, *tensors))


def test_groups_are_blocks_where_there_is_one_for_each_thread():
    """Patches of all groups would leave the cache; one group's stay in it."""
    for text, threads, apart in [
        (WAYS["few tiles"], 1, True),
        (WAYS["few tiles"], 2, True),
        (WAYS["few tiles of groups"], 1, False),
        (WAYS["few tiles of groups"], 2, False),
        (WAYS["few tiles of groups"], 3, True),
    ]:
        assert winograd.way(asked_for(text, threads=threads)).apart is apart
    assert winograd.way(asked_for("n16 c1024 o1024 x7x7 k3x3 p1 g32")).tasks == 32


@both_layouts
@both_directions
@pytest.mark.parametrize("layout", [spread, lambda t: t[:1].expand(t.shape), lambda t: t.mT.contiguous().mT])
def test_memory_of_any_strides(layout, direction, last):
    for text in (WAYS["few tiles"], WAYS["blocks of rows"], BORDERS["circular"]):
        check(ALGORITHM, asked_for(text, direction=direction, channels_last=last), reals, layout)


@st.composite
def problems(draw):
    """Kernels of up to three taps that move by one place, or twice as many that move by two."""
    dims, mode = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(PADDING_MODES))
    sides = draw(
        st.lists(
            st.sampled_from(((3, 1), (3, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2))), min_size=dims, max_size=dims
        ).filter(lambda sides: any(taps > stride for taps, stride in sides))
    )
    kernel, stride = zip(*sides, strict=True)
    largest = {1: 70, 2: 24, 3: 9}[dims]
    spatial = tuple(draw(st.integers(6, largest)) for _ in range(dims))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(-1, 2))) for _ in range(dims))
    groups, c, o = draw(st.sampled_from((1, 1, 2))), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ones = (1,) * dims
    return ConvProblem(
        draw(st.integers(1, 3)), c * groups, o * groups, spatial, kernel, stride, padding, ones, groups, mode
    )


@both_directions
@drawn(problem=problems(), last=st.booleans(), wide=st.booleans(), bias=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_random_problems(direction, problem, last, wide, bias, seed):
    dtype = torch.float64 if wide else torch.float32
    asked = request(problem, direction, dtype, channels_last=last and problem.dims > 1, has_bias=bias, threads=2)
    check(ALGORITHM, asked, reals, seed=seed)


# -- memory ----------------------------------------------------------------------------------------------------------


@every_width
@both_layouts
@both_types_in_time
@both_directions_in_time
@pytest.mark.parametrize("text", [*WAYS.values(), BORDERS["reflect"]], ids=[*WAYS, "reflect"])
def test_nothing_outside_is_touched(bits, direction, dtype, last, text, as_if, monkeypatch):
    """Every tensor, the tables and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    problem = ConvProblem.parse(text)
    if problem.padding_mode != "zeros" and direction is Direction.GRAD_INPUT:
        pytest.skip("the border is folded elsewhere")
    if last and problem.dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    tables = winograd._tables
    asked = asked_for(text, dtype, direction, channels_last=last, has_bias=True, has_residual=True)

    place = partial(guarded_inside, channels_last=last)
    for at_end in (True, False):
        held = []
        monkeypatch.setattr(winograd, "_tables", guarded_tables(tables, held, at_end=at_end))
        winograd.prepare.cache_clear()
        tensors = Tensors(*(place(tensor, at_end=at_end) for tensor in given(asked, reals)))
        out = place(torch.full(asked.problem.shape_of(direction.makes), torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((ALGORITHM.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        winograd.run(asked, tensors, out, workspace)
        assert held, "the tables were not guarded"
        compare(ALGORITHM, asked, out, *tensors, to_the_bit=False)


@both_layouts
@both_directions
@pytest.mark.parametrize("step", [1, 2])
def test_nothing_outside_a_view_is_touched(step, direction, last):
    asked = asked_for("n2 c5 o19 x9x21 k3x3 p1", direction=direction, channels_last=last)
    for at_end in (True, False):
        first, second = (guarded_view(tensor, at_end=at_end, step=step) for tensor in given(asked, reals)[:2])
        compare(ALGORITHM, asked, result_of(ALGORITHM, asked, first, second), first, second, to_the_bit=False)


@both_layouts
def test_a_new_size_compiles_nothing(last, monkeypatch):
    """Batch, height and width are arguments; F(4,3) and F(5,3), and few tiles or many, are ways of their own."""
    texts, tiles = set(), set()
    monkeypatch.setattr(winograd.cpu, "compile", lambda text, target: texts.add(text))
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 77, 1001), (4, 200, 64), (8, 130, 131), (1, 64, 64)]:
        asked = asked_for(f"n{n} c64 o64 x{h}x{w} k3x3 p1", channels_last=last)
        x = torch.empty(asked.problem.input_shape, device="meta")
        cut = winograd.way(asked)
        tiles.add(cut.form.tile)
        winograd.prepare.__wrapped__(asked, cut, (channels_inside(x) if last else x).stride(), last)
    assert tiles == {(1, 4, 4), (1, 5, 5)}
    assert len(texts) == 2 * len(tiles)


@assembly.every_target
@pytest.mark.parametrize("text", ["n1 c64 o64 x56x56 k3x3 p1", "n1 c256 o256 x14x14 k3x3 p1"])
def test_the_sums_stay_in_registers(text, target, monkeypatch):
    monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
    texts = []
    monkeypatch.setattr(winograd.cpu, "compile", lambda text, target: texts.append(text))
    forget()
    asked = asked_for(text)
    cut = winograd.way(asked)
    winograd.prepare.__wrapped__(asked, cut, torch.empty(asked.problem.input_shape, device="meta").stride(), False)
    forget()
    code = cpu.assembly(texts[-1], target)
    blocks = [block for block in assembly.blocks(code) if assembly.products(block) >= cut.scalars * cut.vectors]
    inner = [block for block in blocks if assembly.products(block) == cut.scalars * cut.vectors]
    assert inner, "the step of a product is one block"
    for block in inner:
        assert not assembly.spills(block, code), "a vector is written to the stack"


# -- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("tile", "most"), [(2, 2e-6), (4, 4e-6), (5, 8e-6)])
def test_the_error_that_is_stated(tile, most, positive, monkeypatch):
    """Against float64, beside that of a direct sum, and how it grows with channels."""
    monkeypatch.setattr(winograd, "_outputs", lambda made, side, sizes, turned: 1 if side.kernel == 1 else tile)
    forget()
    for channels in (4, 64, 512):
        asked = asked_for(f"n1 c{channels} o16 x12x12 k3x3 p1")
        assert winograd.way(asked).form.tile == (1, tile, tile)
        tensors = given(asked, lambda *how: reals(*how).abs() if positive else reals(*how))
        error = result_of(ALGORITHM, asked, *tensors).double() - exact(asked, *tensors[:2])
        assert bool((error.abs() <= tolerance(ALGORITHM, asked, *tensors)).all())
        assert error.norm() <= most * exact(asked, *tensors[:2]).norm()
    forget()


def test_larger_tiles_lose_more():
    growths = [winograd.growth((transforms.ahead(m, 3, 1),) * 2) for m in (2, 4, 5)]
    assert growths == sorted(growths)
    assert growths[0] < 2 < 7 < growths[1] < 8 < 18 < growths[2] < 19
    assert winograd.growth((transforms.ahead(1, 1, 1),)) == 1
    # Of its two parts, one loses as F(4,2) does, and the other nothing.
    assert 1 < winograd.growth((transforms.ahead(4, 3, 2),)) < winograd.growth((transforms.ahead(4, 2, 1),))
    assert winograd.growth((transforms.turned(4, 3, 2, 1),)) == winograd.growth((transforms.ahead(4, 2, 1),))


@pytest.mark.parametrize(
    "text", ["n1 c64 o64 x56x56 k3x3 p1", "n1 c128 o128 x28x28 k3x3 p1", "n1 c256 o256 x14x14 k3x3 p1"]
)
def test_layers_of_resnet_50_are_right_to_a_hundred_thousandth(text):
    asked = asked_for(text)
    tensors = given(asked, reals)
    right = exact(asked, *tensors[:2])
    assert (result_of(ALGORITHM, asked, *tensors) - right).norm() < 1e-5 * right.norm()


@both_directions
def test_a_nan_stays_in_its_tiles(direction):
    asked = asked_for("n1 c3 o4 x40x41 k3x3 p1", direction=direction)
    first, second, *_ = given(asked, reals)
    right = result_of(ALGORITHM, asked, first, second)
    first[0, 1, 20, 21] = torch.nan
    found = result_of(ALGORITHM, asked, first, second)
    lost = found.isnan().any(1)[0]
    rows, cols = lost.any(1).nonzero().flatten().tolist(), lost.any(0).nonzero().flatten().tolist()
    _, high, wide = winograd.way(asked).form.tile
    assert {19, 20, 21} <= set(rows) <= set(range(19 // high * high, (21 // high + 1) * high))
    assert {20, 21, 22} <= set(cols) <= set(range(20 // wide * wide, (22 // wide + 1) * wide))
    assert torch.equal(found[:, :, ~lost], right[:, :, ~lost])


@pytest.mark.parametrize(
    ("text", "tile"),
    [
        ("n1 c512 o512 x7x7 k3x3 p1", 4),
        ("n4 c512 o512 x14x14 k3x3 p1", 5),
        ("n1 c128 o128 x28x28 k3x3 p1", 4),
        ("n1 c64 o64 x224x224 k3x3 p1", 5),
    ],
)
def test_tiles_are_those_that_the_map_is_whole_of(text, tile):
    assert winograd.way(asked_for(text)).form.tile == (1, tile, tile)


def test_what_is_refused_is_said():
    for text, more, words in [
        ("n1 c2 o2 x8x8 k3x3", {"device": "mps"}, "another device"),
        ("n1 c2 o2 x8x8 k3x3", {"dtype": torch.bfloat16}, "bfloat16 has none to lose"),
        ("n1 c2 o2 x8x8 k3x3", {"dtype": torch.int32}, "not int32"),
        ("n1 c2 o2 x8x8 k3x3 s2", {"direction": Direction.GRAD_WEIGHT}, "stride 1"),
        ("n1 c2 o2 x8x8 k5x3", {"direction": Direction.GRAD_WEIGHT}, "3 taps"),
        ("n1 c2 o2 x8x8 k5x3", {}, "this one is 5x3"),
        ("n1 c2 o2 x8x8 k1x1", {}, "this one is 1x1"),
        ("n1 c2 o2 x8x8 k2x2 s2", {}, "this one is 2x2"),
        ("n1 c2 o2 x8x8 k1x3 s2", {}, "this one is 1x3"),
        ("n1 c2 o2 x8x8 k3x3 s3", {}, "strides up to 2"),
        ("n1 c2 o2 x8x8 k3x3 d2", {}, "no dilation"),
        (f"n1 c2 o2 x8x8 k3x3 p{1 << 21}", {}, "tables list every place"),
    ]:
        asked = request(ConvProblem.parse(text), **{"direction": Direction.FORWARD, "dtype": torch.float32, **more})
        assert words in ALGORITHM.why_not(asked)


def test_a_stride_without_a_second_place_is_no_stride():
    check(ALGORITHM, asked_for(f"n1 c2 o3 x3x3 k3x3 s{1 << 40}"), reals)


def test_auto_takes_it_where_it_wins():
    many, few = (1, 128, 56, 56), (1, 3, 56, 56)
    assert plainconv.explain(torch.empty(many), torch.empty(128, 128, 3, 3), padding=1).chosen == "winograd"
    assert plainconv.explain(torch.empty(few), torch.empty(8, 3, 3, 3), padding=1).chosen != "winograd"
    assert plainconv.explain(torch.empty(1, 512, 4999), torch.empty(512, 512, 3), stride=2).chosen == "winograd"


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_transposed_convolution(dims):
    conv = (plainconv.conv_transpose1d, plainconv.conv_transpose2d, plainconv.conv_transpose3d)[dims - 1]
    theirs = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[dims - 1]
    x, w, b = (reals(shape, torch.float64, 0) for shape in ((2, 4, *(7,) * dims), (4, 3, *(3,) * dims), (3,)))
    for last in (False, True):
        found = conv(channels_last(x) if last else x, w, b, padding=1, algorithm="winograd")
        torch.testing.assert_close(found, theirs(x, w, b, padding=1))


def test_integers_come_out_nearly_whole():
    """F(2,3) has halves, and is exact on them; the sixths of F(4,3) are not."""
    asked = asked_for("n1 c4 o5 x2x2 k3x3 p1")
    assert winograd.way(asked).form.tile == (1, 2, 2)
    tensors = given(asked, integers)
    assert torch.equal(result_of(ALGORITHM, asked, *tensors).double(), exact(asked, *tensors[:2]))


def test_the_slab_of_the_kernel_is_that_of_the_menu():
    for lanes in (4, 8, 16):
        for vectors in (1, 2, 3, 4):
            asked = asked_for(WAYS["small"])
            cut = winograd.way(asked)._replace(lanes=lanes, vectors=vectors)
            form, forward = cut.form, (False, False, "all", 0, False, False, None)
            shape = kernels.Shape("float", lanes, form.tile, (1, 3, 3), form.along, "rows", False, 1, vectors, *forward)
            assert shape.slab == winograd._slab(lanes, vectors)


@both_directions
@pytest.mark.parametrize(
    "way", ["few tiles, many channels", "groups", "one input channel", "stride 2, four taps", "3-D"]
)
def test_a_weight_in_channels_last_is_read_where_it_lies(way, direction):
    asked = asked_for(WAYS[way], direction=direction, channels_last=True)
    first, weight, *_ = given(asked, reals)
    first, last = channels_last(first), channels_last(weight)
    assert torch.equal(*(result_of(ALGORITHM, asked, first, each) for each in (weight, last)))


def test_a_weight_in_channels_last_takes_no_more_memory():
    """It is put in order for Fourier transforms alone, and then in the workspace."""
    for algorithm, text in (
        (winograd.ALGORITHM, "n1 c64 o64 x40x40 k3x3 p1"),
        (fft.ALGORITHM, "n1 c8 o9 x40x40 k7x7 p3"),
    ):
        asked = request(ConvProblem.parse(text), Direction.FORWARD, torch.float32)
        last = dataclasses.replace(asked, channels_last=True)
        size = math.prod(asked.problem.weight_shape) * 4
        costs = [algorithm.cost(each).workspace for each in (asked, last)]
        assert costs[1] - costs[0] == (padded(size, 64) if algorithm is fft.ALGORITHM else 0)
        check(algorithm, last, reals, channels_last)
