"""winograd's gradient for the weight: every way through its kernels, for every vector width, type and layout."""

import dataclasses
from functools import partial

import assembly
import pytest
import torch
from checks import channels_inside, check, compare, exact, given, integers, reals, request, result_of, spread, tolerance
from guarded import guarded, guarded_inside, guarded_tables, guarded_view
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import plainconv
from plainconv.cpu import compile as cpu
from plainconv.cpu import winograd_weight as kernels
from plainconv.menu import winograd, winograd_weight
from plainconv.menu.base import Tensors
from plainconv.problem import PADDING_MODES, ConvProblem, Direction

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

# Where the kernels take another way.
WAYS = {
    "few tiles": "n1 c20 o37 x9x10 k3x3 p1",
    "blocks of channels": "n1 c150 o70 x11x13 k3x3 p1",
    "rows": "n2 c5 o19 x37x43 k3x3 p1",
    "a long row": "n1 c3 o5 x5x501 k3x3 p1",
    "one output channel": "n2 c6 o1 x29x33 k3x3 p1",
    "one input channel": "n2 c1 o18 x29x33 k3x3",
    "groups": "n2 c14 o22 x30x31 k3x3 p1 g2",
    "depthwise": "n1 c5 o5 x30x31 k3x3 p1 g5",
    "small": "n1 c3 o4 x3x3 k3x3",
    "wide padding": "n1 c4 o6 x3x2 k3x3 p5x4",
    "cropped": "n2 c4 o6 x19x30 k3x3 p-2:1x-3:-4",
    "1-D": "n3 c9 o17 x401 k3 p1",
    "rows alone": "n2 c9 o7 x31x14 k3x1 p1x0",
    "width alone": "n2 c9 o7 x31x14 k1x3 p0x1",
    "3-D": "n2 c6 o18 x5x13x15 k3x3x3 p1",
    "depth alone": "n1 c6 o9 x9x5x7 k3x1x1 p1x0x0",
    "depth and width": "n1 c6 o9 x9x5x7 k3x1x3 p1x2x0",
    "no channels": "n1 c0 o3 x9x9 k3x3 p1",
    "no images": "n0 c4 o3 x9x9 k3x3 p1",
    "no outputs": "n1 c4 o0 x9x9 k3x3 p1",
}
BORDERS = {mode: f"n2 c5 o19 x13x17 k3x3 p2x1:3 m{mode}" for mode in PADDING_MODES if mode != "zeros"}


def asked_for(text, dtype=torch.float32, **more):
    asked = request(ConvProblem.parse(text), Direction.GRAD_WEIGHT, dtype, **{"threads": 2, **more})
    assert ALGORITHM.why_not(asked) is None
    return asked


def forget():
    for cached in (winograd_weight.way, winograd_weight._room, winograd_weight.prepare):
        cached.cache_clear()


@pytest.fixture
def as_if(as_if, monkeypatch):
    """The same, and that a cache keeps so many bytes of panels."""

    def pretend(bits, panel=winograd_weight.MOST_PANEL_BYTES):
        monkeypatch.setattr(winograd_weight, "MOST_PANEL_BYTES", panel)
        as_if(bits)

    return pretend


@every_width
@both_layouts
@pytest.mark.parametrize("panel", [24 << 20, 100 << 10], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("text", (WAYS | BORDERS).values(), ids=WAYS | BORDERS)
def test_every_way_through_the_kernels(bits, panel, last, text, as_if):
    as_if(bits, panel)
    if last and ConvProblem.parse(text).dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    asked = asked_for(text, channels_last=last, has_bias=True)
    check(ALGORITHM, asked, reals, channels_inside if last else None)


def test_the_ways_are_what_their_names_say(as_if):
    as_if(BITS[0], 100 << 10)
    for text, one in [(WAYS["rows"], False), (WAYS["a long row"], False), (WAYS["small"], True)]:
        asked = asked_for(text)
        cut = winograd_weight.way(asked)
        assert (cut.pieces * cut.cols >= asked.problem.batch * cut.tiles[1] * cut.tiles[2]) == one
    assert winograd_weight.way(asked_for(WAYS["a long row"])).cols < 126
    as_if(BITS[0])
    assert winograd_weight.way(asked_for(WAYS["rows"])).slices == 2
    blocks = asked_for(WAYS["blocks of channels"])
    if cpu.Target.host().bits == 512:  # of narrower vectors more channels are one block
        assert winograd_weight._room(blocks, winograd_weight.way(blocks)).channel_blocks > 1


@every_width
@both_layouts
@pytest.mark.parametrize("text", [WAYS["few tiles"], WAYS["rows"], WAYS["3-D"]])
def test_float64(bits, last, text, as_if):
    as_if(bits)
    asked = asked_for(text, torch.float64, channels_last=last, has_bias=True)
    check(ALGORITHM, asked, reals)
    check(ALGORITHM, dataclasses.replace(asked, has_bias=False, threads=1), reals, channels_inside)


@both_types
@both_layouts
@pytest.mark.parametrize("layout", [spread, channels_inside, None], ids=["spread", "channels last", "contiguous"])
def test_tensors_may_lie_in_any_way(layout, last, dtype):
    for text in (WAYS["few tiles"], WAYS["groups"], BORDERS["reflect"], WAYS["3-D"]):
        check(ALGORITHM, asked_for(text, dtype, channels_last=last, has_bias=True), reals, layout)


@both_layouts
def test_the_gradient_of_a_bias_is_a_plain_sum(last, as_if):
    """Whole numbers are exact in it: nothing is transformed."""
    as_if(BITS[0], 100 << 10)
    for text in (WAYS["rows"], WAYS["groups"], WAYS["blocks of channels"]):
        asked = asked_for(text, channels_last=last, has_bias=True)
        tensors = given(asked, integers)
        result_of(ALGORITHM, asked, *tensors)
        assert torch.equal(tensors.bias, tensors.second.sum((0, 2, 3)))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_same_call_gives_the_same_bits(threads):
    """And so it does with the bias beside it, or without."""
    asked = asked_for("n2 c33 o40 x30x31 k3x3 p1", threads=threads, has_bias=True)
    first, second, *_ = given(asked, reals)
    alone = dataclasses.replace(asked, has_bias=False)
    results = [result_of(ALGORITHM, asked, first, second, torch.empty(40)) for _ in range(3)]
    results.append(result_of(ALGORITHM, alone, first, second))
    assert all(torch.equal(result, results[0]) for result in results)
    check(ALGORITHM, asked, reals)


@st.composite
def problems(draw):
    """Of kernels with three taps, or one."""
    dims, mode = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(PADDING_MODES))
    kernel = (*(draw(st.sampled_from((3, 3, 1))) for _ in range(dims - 1)), 3)
    spatial = tuple(draw(st.integers(4, {1: 150, 2: 25, 3: 9}[dims])) for _ in range(dims))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(-1, 2))) for _ in range(dims))
    groups, c, o = draw(st.sampled_from((1, 1, 2))), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ones = (1,) * dims
    return ConvProblem(
        draw(st.integers(1, 3)), c * groups, o * groups, spatial, kernel, ones, padding, ones, groups, mode
    )


@drawn(problem=problems(), last=st.booleans(), wide=st.booleans(), bias=st.booleans(), threads=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_random_problems(problem, last, wide, bias, threads):
    dtype = torch.float64 if wide else torch.float32
    more = {"channels_last": last and problem.dims > 1, "has_bias": bias, "threads": threads}
    check(ALGORITHM, request(problem, Direction.GRAD_WEIGHT, dtype, **more), reals)


# -- memory ----------------------------------------------------------------------------------------------------------


@every_width
@both_layouts
@both_types_in_time
@pytest.mark.parametrize("text", [*WAYS.values(), BORDERS["reflect"]], ids=[*WAYS, "reflect"])
def test_nothing_outside_is_touched(bits, dtype, last, text, as_if, monkeypatch):
    """Every tensor, the tables and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    if last and ConvProblem.parse(text).dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    tables = winograd_weight._tables
    asked = asked_for(text, dtype, channels_last=last, has_bias=True)

    place = partial(guarded_inside, channels_last=last)
    for at_end in (True, False):
        held = []
        monkeypatch.setattr(winograd_weight, "_tables", guarded_tables(tables, held, at_end=at_end))
        winograd_weight.prepare.cache_clear()
        first, second, bias, _ = (t if t is None else place(t, at_end=at_end) for t in given(asked, reals))
        out = place(torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((ALGORITHM.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        winograd.run(asked, Tensors(first, second, bias), out, workspace)
        empty = 0 in (*first.shape, *second.shape, *out.shape)
        assert held or empty, "the tables were not guarded"
        compare(ALGORITHM, asked, out, first, second, bias, to_the_bit=False)


@both_layouts
@pytest.mark.parametrize("step", [1, 2])
def test_nothing_outside_a_view_is_touched(step, last):
    asked = asked_for("n2 c5 o19 x9x21 k3x3 p1", channels_last=last)
    for at_end in (True, False):
        first, second = (guarded_view(tensor, at_end=at_end, step=step) for tensor in given(asked, reals)[:2])
        compare(ALGORITHM, asked, result_of(ALGORITHM, asked, first, second), first, second, to_the_bit=False)


def test_a_workspace_is_kept_small_on_request():
    asked = asked_for("n2 c40 o16 x64x64 k3x3 p1", has_bias=True)
    for part in (2, 3):
        few = dataclasses.replace(asked, max_workspace=ALGORITHM.cost(asked).workspace // part)
        assert ALGORITHM.cost(few).workspace <= few.max_workspace
        check(ALGORITHM, few, reals)


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernels_of(asked):
    """The texts of the kernels that serve a request whose tensors lie as its output will."""
    texts = []
    x, y = (torch.empty(asked.problem.shape_of(role), device="meta") for role in ("x", "y"))
    if asked.channels_last:
        x, y = channels_inside(x), channels_inside(y)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(winograd_weight.cpu, "compile", lambda text, target: texts.append(text))
        winograd_weight.prepare.__wrapped__(asked, x.stride(), y.stride())
    return texts


@both_layouts
def test_a_new_size_compiles_nothing(last):
    texts, tiles = set(), set()
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 76, 1001), (4, 200, 64), (8, 130, 131)]:
        asked = asked_for(f"n{n} c64 o64 x{h}x{w} k3x3 p1", channels_last=last)
        texts |= set(kernels_of(asked))
        tiles.add(winograd_weight.way(asked).tile)
    assert tiles == {(1, 4, 4), (1, 5, 5)}
    assert len(texts) == 3 * len(tiles) + 1


@assembly.every_target
def test_the_sums_stay_in_registers(target, monkeypatch):
    monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
    forget()
    asked = asked_for("n1 c64 o64 x56x56 k3x3 p1")
    cut = winograd_weight.way(asked)
    texts = kernels_of(asked)
    forget()
    code = cpu.assembly(texts[2], target)
    inner = [one for one in assembly.blocks(code) if assembly.products(one) == cut.scalars * cut.vectors]
    assert inner, "the step of a product is one block"
    for block in inner:
        assert not assembly.spills(block, code), "a vector is written to the stack"


# -- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("tile", "most"), [(2, 1e-6), (4, 3e-6), (5, 6e-6)])
def test_the_error_that_is_stated(tile, most, positive, monkeypatch):
    """Against float64, and how it grows with the tiles that are summed; narrower vectors have other, longer sums."""
    if tile == 2 and cpu.Target.host().bits < 512:
        most = 1.5e-6
    monkeypatch.setattr(winograd_weight, "_tile", lambda side, sizes: 1 if side.kernel == 1 else tile)
    forget()
    for size in (4, 32, 160):
        asked = asked_for(f"n1 c8 o16 x{size}x{size} k3x3 p1")
        assert winograd_weight.way(asked).tile == (1, tile, tile)
        tensors = given(asked, lambda *how: reals(*how).abs() if positive else reals(*how))
        error = result_of(ALGORITHM, asked, *tensors).double() - exact(asked, *tensors[:2])
        assert bool((error.abs() <= tolerance(ALGORITHM, asked, *tensors)).all())
        assert error.norm() <= most * exact(asked, *tensors[:2]).norm()
    forget()


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_what_is_cropped_is_not_read(mode):
    asked = asked_for(f"n1 c3 o4 x13x14 k3x3 p-2:-1x-1:-3 m{mode}")
    first, second, *_ = given(asked, reals)
    right = result_of(ALGORITHM, asked, first, second)
    first[:, :, :2] = first[:, :, -1:] = torch.nan
    first[..., :1] = first[..., -3:] = torch.inf
    assert torch.equal(result_of(ALGORITHM, asked, first, second), right)


@both_layouts
def test_auto_takes_it_where_it_wins(last):
    from plainconv.plan import plan

    for text, chosen in [("n1 c128 o128 x56x56 k3x3 p1", True), ("n1 c3 o64 x56x56 k3x3 p1", False)]:
        assert (plan(asked_for(text, channels_last=last)).algorithm is ALGORITHM) == chosen


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_training_goes_through_it(dims):
    conv = (plainconv.conv1d, plainconv.conv2d, plainconv.conv3d)[dims - 1]
    theirs = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
    tensors = [
        reals(shape, torch.float64, 0).requires_grad_() for shape in ((2, 4, *(7,) * dims), (3, 4, *(3,) * dims), (3,))
    ]
    found = torch.autograd.grad(conv(*tensors, padding=1, algorithm="winograd").square().sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(theirs(*tensors, padding=1).square().sum(), tensors))


def test_the_matrices_are_those_of_the_output_turned_round():
    """F(3, 4): what makes 3 taps of 4 places has as many products as what makes 4 places of 3 taps."""
    shape = kernels.Forth("float", 16, (1, 4, 4), (1, 3, 3), "x", "rows", False)
    assert [(len(matrix), len(matrix[0])) for matrix in shape.matrices] == [(1, 1), (6, 6), (6, 6)]
    other = dataclasses.replace(shape, role="y")
    assert [(len(matrix), len(matrix[0])) for matrix in other.matrices] == [(1, 1), (6, 4), (6, 4)]
