"""narrow and depthwise: nothing outside is touched, for every vector width; half types, any strides, the epilogue; no
size compiles twice; no spilled sums."""

import dataclasses

import assembly
import pytest
import torch
from checks import BY_NAME, CASES, check, compare, given, integers, reals, refuses, request, spread
from guarded import guarded

from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.menu import depthwise, lanes, narrow
from plainconv.menu.base import Tensors
from plainconv.menu.engine import folded
from plainconv.menu.parts import parts
from plainconv.problem import ConvProblem, Direction

BITS = [b for b in (512, 256, 128) if cpu.why_not() is None and b <= cpu.Target.host().bits] or [128]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

both = pytest.mark.parametrize("module", [narrow, depthwise], ids=["narrow", "depthwise"])
every_width = pytest.mark.parametrize("bits", BITS)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Where the kernel takes another way: tiles inside and at the edges, tails of rows and outputs, every kind of stride.
WAYS = {
    "tiles inside": "n1 c2 o3 x11x150 k3x3 p1",
    "many outputs": "n1 c2 o9 x5x37 k1x3",
    "rows that fill tiles": "n1 c3 o3 x18x34 k3x3 g3",
    "stride 2": "n1 c2 o2 x9x139 k3x5 s2 p2 g2",
    "stride 3": "n1 c2 o2 x9x139 k3x4 s3 p2 g2",
    "stride 4": "n1 c3 o2 x9x149 k5x6 s4 p1 d2x1",
    "stride 6": "n1 c2 o2 x9x239 k3x3 s6 p2 g2",
    "stride over kernel": "n1 c1 o2 x70x90 k2x2 s9",
    "reflect": "n1 c2 o2 x6x130 k3x5 p2x4 mreflect g2",
    "replicate, stride": "n1 c2 o2 x6x130 k3x5 s1x2 p2x40 mreplicate",
    "circular, stride 5": "n1 c2 o2 x6x130 k3x5 s1x5 p2x9 mcircular",
    "wide kernel": "n1 c1 o2 x2x300 k1x70 p0x3",
    "wide kernel, stride and dilation": "n1 c1 o1 x2x300 k1x70 s1x2 d1x3 p0x3",
    "padding wider than a vector": "n1 c1 o1 x3x5 k3x3 p1x40",
    "1-D": "n2 c2 o4 x333 k31 p15 g2",
    "1-D, dilation": "n1 c2 o3 x400 k3 d16 p16",
    "cropped": "n1 c1 o2 x9x90 k3x3 p-2:1x-3:-4",
    "3-D, one row of taps": "n1 c3 o3 x6x7x8 k5x1x1 p2x0x0 g3",
    "3-D": "n1 c2 o4 x4x7x35 k3x3x3 s2x1x1 p1 g2",
    "3-D, planes outside": "n1 c3 o6 x2x5x9 k5x3x3 s2x1x1 d2x1x1 p6x1x1 g3",
    "3-D, reflected": "n1 c2 o2 x3x5x9 k3x3x3 p2x1x1 mreflect",
    "planes of the border alone": "n1 c2 o4 x2x5x9 k1x3x1 p2x0x0",
    "pointwise": "n2 c5 o7 x9x13 k1x1",
}
ALL = CASES | WAYS


def asked_for(module, text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, **more)
    if refuses(module.ALGORITHM, asked):
        pytest.skip("refused")
    return asked


@pytest.fixture
def as_if(monkeypatch):
    """A function that pretends the processor has vectors of so many bits."""

    def pretend(bits):
        target = cpu.Target.host(bits)
        monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
        monkeypatch.setattr(lanes, "prepare", lanes.prepare.__wrapped__)
        return target

    return pretend


# Every way with numbers of four bytes, and some with the others; all of CASES with the widest vectors, and with the
# narrower ones when there is time.
GUARDED = [(BITS[0], text, torch.float32) for text in ALL.values()]
GUARDED += [
    pytest.param(bits, text, torch.float32, marks=[pytest.mark.slow] if text in CASES.values() else [])
    for bits in BITS[1:]
    for text in ALL.values()
]
GUARDED += [
    (bits, ALL[name], dtype)
    for bits in BITS
    for name in ("stride 2", "reflect", "stride 6", "3-D")
    for dtype in FLOATS[1:]
]


@both
@pytest.mark.parametrize(("bits", "text", "dtype"), GUARDED, ids=str)
def test_nothing_outside_is_touched(module, bits, text, dtype, as_if, monkeypatch):
    """Every tensor, and every table, right before and right behind memory that faults."""
    as_if(bits)
    between_guards(module, asked_for(module, text, dtype, has_bias=True, has_residual=True), monkeypatch)


# The stride turned round: phases with more and fewer taps, long rows whose places lie apart, edges of all kinds.
TURNED = {
    "taps of 3 by 2": "n2 c6 o6 x17x135 k3x3 s2 p1 g6",
    "taps of 5 by 2": "n1 c2 o2 x18x75 k5x5 s2 p2 g2",
    "channels change places": "n1 c5 o3 x18x70 k3x4 s1x2 p1",
    "dilation": "n1 c2 o3 x40x91 k4x4 s2x3 d3x2 p3",
    "3-D": "n1 c3 o3 x5x7x40 k3x3x3 s2 p1 g3",
    "3-D, depth alone": "n1 c3 o3 x7x6x20 k3x3x3 s2x1x1 p1 g3",
    "1-D, a long step": "n1 c4 o4 x700 k19 s9 p3 g4",
    "cropped": "n1 c2 o2 x19x90 k3x3 s2 p-2:1x-3:-4 g2",
    "one row, stride and dilation with a factor": "n1 c4 o4 x1x9 k3x3 s2x1 p2x1 d2x1 g4",
}
SMOOTH = {
    name: text
    for name, text in (WAYS | TURNED).items()
    if name in TURNED or (ConvProblem.parse(text).padding_mode == "zeros" and "stride" not in name)
}


@both
@pytest.mark.parametrize("text", SMOOTH.values(), ids=SMOOTH)
def test_the_gradient_for_the_input(module, text, as_if):
    as_if(BITS[0])
    asked = asked_for(module, text, direction=Direction.GRAD_INPUT, has_bias=True, has_residual=True, threads=2)
    check(module.ALGORITHM, asked, integers)
    check(module.ALGORITHM, dataclasses.replace(asked, activation="relu"), integers, spread)


@both
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_in_every_type(module, bits, dtype, as_if):
    as_if(bits)
    asked = asked_for(module, TURNED["taps of 3 by 2"], dtype, Direction.GRAD_INPUT, has_bias=True)
    check(module.ALGORITHM, asked, integers)
    check(module.ALGORITHM, asked, reals)


# All phases with the widest vectors, and some with narrower ones and in other types.
TURNED_GUARDED = [(BITS[0], text, torch.float32) for text in TURNED.values()]
TURNED_GUARDED += [
    pytest.param(
        bits, TURNED[name], dtype, marks=[] if name == "taps of 3 by 2" or dtype is FLOATS[0] else [pytest.mark.slow]
    )
    for bits in BITS
    for name in ("taps of 3 by 2", "dilation", "3-D", "1-D, a long step")
    for dtype in FLOATS
    if (bits, dtype) != (BITS[0], FLOATS[0])
]


@both
@pytest.mark.parametrize(("bits", "text", "dtype"), TURNED_GUARDED, ids=str)
def test_nothing_outside_is_touched_by_the_gradient(module, bits, text, dtype, as_if, monkeypatch):
    as_if(bits)
    asked = asked_for(module, text, dtype, Direction.GRAD_INPUT, has_bias=True, has_residual=True)
    between_guards(module, asked, monkeypatch)


def between_guards(module, asked, monkeypatch):
    tables = lanes._tables
    for at_end in (True, False):
        held = []

        def guarded_tables(*how, at_end=at_end, held=held):
            made = [guarded(table, at_end=at_end) for table in tables(*how)]
            held += made
            return tuple(made)

        monkeypatch.setattr(lanes, "_tables", guarded_tables)
        tensors = [guarded(tensor, at_end=at_end) for tensor in given(asked, reals)]
        out = guarded(
            torch.full(asked.problem.shape_of(asked.direction.makes), torch.nan, dtype=asked.dtype), at_end=at_end
        )
        room = torch.full((module.ALGORITHM.cost(asked).workspace,), 0xFF, dtype=torch.uint8)
        module.ALGORITHM.run(asked, Tensors(*tensors), out, guarded(room, at_end=at_end))
        assert held, "the tables were not guarded"
        compare(module.ALGORITHM, asked, out, *tensors, to_the_bit=False)


@both
@pytest.mark.parametrize(("bits", "dtype"), [*((bits, torch.float32) for bits in BITS), (BITS[0], torch.float64)])
@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_every_way_through_the_kernel(module, bits, dtype, text, as_if):
    as_if(bits)
    asked = asked_for(module, text, dtype)
    check(module.ALGORITHM, asked, integers)
    check(module.ALGORITHM, dataclasses.replace(asked, has_bias=True, threads=2), integers)


@both
@every_width
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["3x3", "stride 2", "reflect", "stride 6", "rows that fill tiles", "3-D", "1-D"])
def test_half_types_are_read_and_written(module, bits, dtype, name, as_if):
    as_if(bits)
    asked = asked_for(module, ALL[name], dtype, has_bias=True)
    check(module.ALGORITHM, asked, integers)
    check(module.ALGORITHM, asked, reals)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_epilogue_is_in_the_store(module, dtype):
    for activation in ("relu", "gelu"):
        asked = asked_for(module, "n2 c3 o6 x9x37 k3x3 s1x2 p1 g3", dtype)
        asked = dataclasses.replace(asked, has_bias=True, has_residual=True, activation=activation)
        check(module.ALGORITHM, asked, integers if activation == "relu" else reals)


def window(tensor):
    """The same values, out of a larger tensor: no dimension follows right behind the one before."""
    around = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    view = around[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


@both
@pytest.mark.parametrize("layout", [window, spread])
@pytest.mark.parametrize("name", ["3x3", "depthwise", "stride 2", "circular", "stride 6", "3-D", "1-D", "one tap"])
def test_strides_of_memory_are_followed(module, layout, name, as_if):
    as_if(BITS[0])
    for dtype in (torch.float32, torch.bfloat16):
        check(module.ALGORITHM, asked_for(module, ALL[name], dtype, has_bias=True), integers, layout)


@both
def test_no_input_is_copied(module, monkeypatch):
    """Not even one that is read element by element."""
    asked = asked_for(module, "n1 c3 o3 x9x8 k3x3 p1 g3")
    x, w, *rest = given(asked)
    for name in ("contiguous", "clone", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor is copied"))
    out = torch.empty(asked.problem.output_shape)
    for view in (x, x.mT.mT, torch.cat([x, x], 3)[..., ::2]):
        module.ALGORITHM.run(asked, Tensors(view, w, *rest), out, torch.empty(0, dtype=torch.uint8))


@both
def test_a_weight_that_is_not_finite_meets_the_zeros_of_a_plane_that_is_left_out(module):
    asked = asked_for(module, "n1 c3 o3 x2x4x9 k3x1x1 p1x0x0 g3")
    x, w, *_ = given(asked)
    x = x.abs() + 1
    w[0, 0, 0], w[1, 0, 2], w[2] = torch.inf, torch.nan, 1.0
    out = torch.empty(asked.problem.output_shape)
    module.ALGORITHM.run(asked, Tensors(x, w), out, torch.empty(0, dtype=torch.uint8))
    assert out[0, 0, 0].isnan().all()
    assert (out[0, 0, 1] == torch.inf).all()
    assert out[0, 1].isnan().all()
    assert not out[0, 2].isnan().any()


@both
@pytest.mark.parametrize(
    ("text", "direction", "count"),
    [
        ("n{n} c3 o3 x{h}x{w} k3x3 p1 g3", Direction.FORWARD, 1),
        ("n{n} c1 o3 x{w} k5 s2 p{n}", Direction.FORWARD, 1),
        ("n{n} c3 o3 x{h}x{w} k3x3 p1 g3", Direction.GRAD_INPUT, 1),
        ("n{n} c3 o3 x{h}x{w} k3x3 s2 p1 g3", Direction.GRAD_INPUT, 4),
    ],
)
def test_a_new_size_compiles_nothing(module, text, direction, count):
    """Batch, height, width and the width of the border are arguments; only small pictures have their own kernels."""

    def texts(sizes):
        target, found = cpu.Target.host(), set()
        for n, h, w in sizes:
            asked = request(ConvProblem.parse(text.format(n=n, h=h, w=w)), direction, torch.float32)
            for part in parts(asked):
                layout, sides = lanes.Layout.PLAIN, folded(part.request.problem, not part.apart)
                if part.apart:
                    layout = lanes.Layout.ROWS
                found.add(rows.text(lanes.shape_of(part, target, module._tile(part.request, target, sides), layout)))
        return found

    assert len(texts([(1, 60, 1100), (2, 61, 2400), (3, 77, 5001), (4, 1000, 1664)])) == count
    small = texts([(1, h, w) for h in range(3, 40) for w in (5, 9, 17, 40)])
    assert len(small) <= 3 * count * (lanes.ROWS + len(lanes.HIGH))
    assert len(texts([(1, h, w) for h in (50, 77, 300) for w in range(40, 2000, 37)])) <= 8 * count


@pytest.mark.parametrize("bits", [256, 128])
@pytest.mark.parametrize(
    "text",
    ["n1 c4 o4 x5x3x900 k3x3x3 s1x1x2 g4", "n1 c4 o4 x5000 k3 s2 g4", "n1 c3 o6 x5000 k3 s2", "n1 c2 o2 x3000 k9"],
)
def test_long_rows_where_registers_are_few(bits, text, as_if):
    as_if(bits)
    module = depthwise if " g4" in text else narrow
    check(module.ALGORITHM, asked_for(module, text), integers)


NO_SPILLS = [
    (narrow, "n1 c3 o3 x1080x1920 k3x3"),
    (narrow, "n1 c6 o6 x100x100 k3x3 p1"),
    (narrow, "n1 c3 o16 x100x100 k3x3 s2 p1"),
    (depthwise, "n1 c3 o3 x100x100 k3x3 p1 g3"),
    (depthwise, "n1 c3 o3 x100x100 k5x5 p2 g3"),
    (narrow, "n1 c8 o8 x9x100x100 k3x3x3 p1 g2"),
    (depthwise, "n1 c3 o3 x1000 k31 p15 g3"),
    (depthwise, "n1 c3 o3 x100x100 k3x3 s2 p1 g3"),
]


@pytest.mark.parametrize(("module", "text"), NO_SPILLS, ids=[text for _, text in NO_SPILLS])
@assembly.every_target
def test_the_sums_stay_in_registers(module, text, target):
    asked = asked_for(module, text)
    shape = lanes.shape_of(parts(asked)[0], target, module._tile(asked, target, folded(asked.problem)))
    code = cpu.assembly(rows.text(shape), target)
    inside = assembly.main_tile(code)
    taps = shape.kernel[2] if shape.unrolled else 1
    assert assembly.products(inside) == shape.outputs * shape.rows * shape.vectors * shape.inner * taps > 1
    # 7 sums and 5 weights leave SSE, whose products need room of their own, one too few; fewer rows would be slower.
    allowed = int(target.bits == 128 and not target.fma and (shape.rows, shape.inner) == (7, 5))
    assert len(assembly.spills(inside, code)) <= allowed, "a vector is written to the stack"


@both
def test_what_is_refused_is_said(module):
    small = ConvProblem.parse("n1 c2 o6 x8x8 k3x3 g2")
    for direction, dtype, more, words in [
        (Direction.FORWARD, torch.int32, {}, "int32"),
        (Direction.FORWARD, torch.float32, {"channels_last": True}, "channels_last"),
        (Direction.FORWARD, torch.float32, {"device": "mps"}, "another device"),
    ]:
        assert words in module.ALGORITHM.why_not(request(small, direction, dtype, **more))
    gaps = request(ConvProblem.parse("n1 c2 o2 x8x8 k2x2 s3 g2"), Direction.GRAD_INPUT, torch.float32)
    assert "no output reaches" in module.ALGORITHM.why_not(gaps)
    many = request(ConvProblem.parse("n1 c2 o2 x90x90 k18x18 s9 g2"), Direction.GRAD_INPUT, torch.float32)
    assert "(9, 9) has more than 64" in module.ALGORITHM.why_not(many)
    wide = request(ConvProblem.parse("n1 c2 o4 x9 k3 g2"), Direction.GRAD_INPUT, torch.float32)
    assert "one output channel a group" in BY_NAME["depthwise"].why_not(wide)
    assert BY_NAME["depthwise"].why_not(request(ConvProblem.parse("n1 c4 o2 x9 k3"), Direction.FORWARD, torch.float32))
