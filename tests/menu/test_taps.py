"""The gradient for the weight, by narrow and depthwise: every way through the kernels, type and layout of memory."""

import dataclasses

import assembly
import pytest
import torch
from checks import BY_NAME, CASES, channels_inside, check, compare, exact, given, integers, reals, request, same, spread
from guarded import guarded

from plainconv.cpu import compile as cpu
from plainconv.menu import depthwise, narrow, pixels, taps
from plainconv.menu.base import Tensors
from plainconv.problem import ConvProblem, Direction

BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

every_width = pytest.mark.parametrize("bits", BITS)
# Everything with the widest registers, and again with the others when there is time.
every_width_in_time = pytest.mark.parametrize(
    "bits", [pytest.param(bits, marks=[pytest.mark.slow] if i else []) for i, bits in enumerate(BITS)]
)
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The same between guards, where vectors of float64 have half the lanes, and float16's are converted as bfloat16's.
HELD = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1::2])]
held_types = pytest.mark.parametrize("dtype", HELD, ids=str)

# Where the kernel takes another way: tiles of outputs and taps that overlap, edges, many rows and planes, gathering.
WAYS = {
    "columns": "n2 c2 o3 x9x139 k3x3 p1",
    "tiles of outputs": "n1 c2 o7 x9x20 k3x3 p1",
    "tiles of taps": "n1 c2 o2 x23x40 k11x19 p5x9 g2",
    "many taps": "n1 c3 o3 x40x45 k31x37 p15x18 g3",
    "blocks of rows": "n1 c2 o2 x301x200 k3x3 p1",
    "blocks of images": "n37 c3 o6 x12x12 k3x3",
    "stride 2": "n1 c4 o10 x19x139 k3x5 s2 p2 g2",
    "stride 2, dilation": "n1 c2 o2 x9x99 k3x5 s2 d2x3 p2 g2",
    "stride 2, wide": "n1 c2 o2 x9x99 k2x19 s2 p9 g2",
    "stride 2, depthwise": "n3 c4 o4 x18x70 k3x3 s2 p1 g4",
    "stride 3": "n1 c4 o6 x19x139 k3x4 s3 p2 g2",
    "stride 4, dilation": "n1 c2 o2 x19x339 k3x4 s4 d3 p2 g2",
    "stride over kernel": "n1 c2 o9 x70x90 k2x2 s9",
    "reflect": "n1 c4 o10 x6x130 k3x5 p2x4 mreflect g2",
    "replicate, stride": "n1 c4 o6 x6x130 k3x5 s1x2 p2x40 mreplicate",
    "1-D": "n2 c4 o8 x1333 k31 p15 g2",
    "1-D, causal": "n2 c4 o4 x333 k4 p3:0 g4",
    "1-D, dilation": "n1 c6 o3 x400 k3 d16 p16 g3",
    "cropped": "n1 c3 o2 x9x90 k3x3 p-2:1x-3:-4",
    "3-D": "n2 c4 o4 x4x7x35 k3x3x3 s2x1x1 p1 g4",
    "3-D, depth alone": "n1 c2 o2 x8x20x30 k5x1x1 p2x0x0 g2",
    "a long row": "n1 c1 o2 x140000 k3 p1",
    "one tap": "n2 c6 o7 x9x13 k1x1",
    "no image": "n0 c2 o3 x5x5 k3x3",
}
ALL = CASES | WAYS


def asked_for(text, dtype=torch.float32, **more):
    return request(ConvProblem.parse(text), Direction.GRAD_WEIGHT, dtype, **more)


def algorithms_for(text):
    """narrow, and depthwise if it can."""
    able = (BY_NAME[name] for name in ("narrow", "depthwise"))
    return [algorithm for algorithm in able if algorithm.why_not(asked_for(text)) is None]


def forget():
    for cached in (taps.way, taps.prepare, pixels.prepare):
        cached.cache_clear()


@every_width_in_time
@every_type
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_every_way_through_the_kernel(bits, dtype, text, as_if):
    as_if(bits)
    asked = asked_for(text, dtype, threads=1)
    for algorithm in algorithms_for(text):
        check(algorithm, asked, integers)
        check(algorithm, dataclasses.replace(asked, threads=2, has_bias=True), reals)
        check(algorithm, dataclasses.replace(asked, threads=3, has_bias=True), integers)


@every_width
@pytest.mark.parametrize(
    "text", ["n1 c4 o10 x19x39 k3x5 s2 p2 g2", "n2 c6 o6 x9x33 k3x3 p1 g6", "n1 c1 o1 x9x70 k2x9 s2 p4"]
)
def test_narrower_registers(bits, text, as_if):
    as_if(bits)
    for dtype in DTYPES:
        check(narrow.ALGORITHM, asked_for(text, dtype, has_bias=True), integers)


ODD = {
    "every other place": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "the first of many channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "rows and columns exchanged": lambda t: t.mT.contiguous().mT,
    "channels innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "images innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "a window": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "irregular": spread,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "text",
    [
        "n2 c6 o2 x9x33 k3x3 p1 s2x1 g2",
        "n2 c3 o2 x9x43 k3x3 p1 s2",
        "n2 c3 o2 x9x43 k3x3 p2 s2 d2",
        "n2 c3 o2 x9x13 k1x1",
        "n3 c6 o6 x5x7 k2x3 mreflect p1 g6",
    ],
)
def test_memory_of_any_strides(text, layout, dtype):
    asked = asked_for(text, dtype, has_bias=True)
    check(narrow.ALGORITHM, asked, integers, layout)
    first, second, bias, _ = given(asked, integers)
    for mixed in ((layout(first), second, bias), (first, layout(second), bias)):
        out = torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype)
        workspace = torch.empty(narrow.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
        narrow.ALGORITHM.run(asked, Tensors(*mixed), out, workspace)
        compare(narrow.ALGORITHM, asked, out, *mixed, to_the_bit=True)


@every_width_in_time
@held_types
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_nothing_outside_is_touched(bits, text, dtype, as_if, monkeypatch):
    """Every tensor, every table and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    asked, algorithm, tables = asked_for(text, dtype, threads=2, has_bias=True), narrow.ALGORITHM, taps._tables
    for at_end in (True, False):
        monkeypatch.setattr(
            taps, "_tables", lambda *how, at_end=at_end: tuple(guarded(table, at_end=at_end) for table in tables(*how))
        )
        taps.prepare.cache_clear()
        first, second, bias, _ = (t if t is None else guarded(t, at_end=at_end) for t in given(asked, reals))
        out = guarded(torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        algorithm.run(asked, Tensors(first, second, bias), out, workspace)
        compare(algorithm, asked, out, first, second, bias, to_the_bit=False)


@every_width
@pytest.mark.parametrize(
    "text", ["n1 c1 o2 x14x14 k3x3 p1", "n1 c2 o2 x13x37 k3x5 s2 p2 g2", "n1 c1 o1 x13x33 k3x3 s2x3"]
)
def test_infinities_meet_what_they_meet_by_definition(bits, text, as_if):
    """Idle lanes and rows of a tile multiply nothing; a zero of the padding is multiplied."""
    as_if(bits)
    asked = asked_for(text)
    for where in ((..., -1), (..., 0), (..., -1, slice(None)), (..., 0, slice(None)), (..., 5, 7)):
        for which in (0, 1):
            tensors = given(asked, reals)[:2]
            tensors[which][where] = torch.inf
            out = torch.empty(asked.problem.weight_shape)
            workspace = torch.empty(narrow.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
            narrow.ALGORITHM.run(asked, Tensors(*tensors), out, workspace)
            expected = exact(asked, *tensors)
            finite = torch.zeros_like(out)
            assert same(out.where(~out.isfinite(), finite), expected.float().where(~expected.isfinite(), finite))


@pytest.mark.parametrize("text", ["n1 c3 o3 x99x80 k3x3 p1", "n9 c3 o6 x12x12 k3x3", "n4 c8 o8 x200 k5 g8"])
def test_the_same_call_gives_the_same_bits(text):
    """Whatever the workspace held before; for every number of threads."""
    first, second, *_ = given(asked_for(text), reals)
    for threads in (1, 2, 3, 7):
        asked, results, biases = asked_for(text, threads=threads, has_bias=True), [], []
        for byte in (0xFF, 0x11, 0x77):
            workspace = torch.full((narrow.ALGORITHM.cost(asked).workspace,), byte, dtype=torch.uint8)
            results.append(torch.empty(asked.problem.weight_shape))
            biases.append(torch.empty(asked.bias_shape))
            narrow.ALGORITHM.run(asked, Tensors(first, second, biases[-1]), results[-1], workspace)
        alone, out = dataclasses.replace(asked, has_bias=False), torch.empty(asked.problem.weight_shape)
        workspace = torch.empty(narrow.ALGORITHM.cost(alone).workspace, dtype=torch.uint8)
        narrow.ALGORITHM.run(alone, Tensors(first, second), out, workspace)
        assert all(torch.equal(result, out) for result in results), "with the bias beside it, or without"
        assert all(torch.equal(bias, biases[0]) for bias in biases)


def test_a_long_sum_loses_little():
    asked = asked_for("n1 c1 o1 x1000x1000 k1x1", threads=1, has_bias=True)
    first, second = torch.ones(1, 1, 1000, 1000), torch.full((1, 1, 1000, 1000), 0.1)
    out, bias = torch.empty(1, 1, 1, 1), torch.empty(1)
    workspace = torch.empty(narrow.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    narrow.ALGORITHM.run(asked, Tensors(first, second, bias), out, workspace)
    for made in (out, bias):
        assert abs(made.item() / second.double().sum().item() - 1) < 3e-5


def test_a_long_sum_over_pixels_loses_little():
    """Where lanes are channels."""
    asked = asked_for("n1 c16 o16 x1000x1000 k1x1 g16", threads=1, has_bias=True, channels_last=True)
    first, second = torch.ones(1, 16, 1000, 1000), torch.full((1, 16, 1000, 1000), 0.1)
    tensors = Tensors(channels_inside(first), channels_inside(second), torch.empty(16))
    out = torch.empty(16, 1, 1, 1)
    workspace = torch.empty(depthwise.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    depthwise.ALGORITHM.run(asked, tensors, out, workspace)
    for made in (out, tensors.bias):
        assert (made.double() / second[0, 0].double().sum() - 1).abs().max() < 3e-5


# -- channels_last ---------------------------------------------------------------------------------------------------

INSIDE = {
    name: text
    for name, text in ALL.items()
    if (problem := ConvProblem.parse(text)).groups == problem.in_channels == problem.out_channels and problem.dims > 1
} | {"many channels": "n2 c37 o37 x9x33 k3x3 p1 g37", "tiles": "n1 c16 o16 x9x33 k7x9 p1 s2 g16"}


@every_width_in_time
@every_type
@pytest.mark.parametrize("text", INSIDE.values(), ids=INSIDE)
def test_lanes_are_channels(bits, dtype, text, as_if):
    as_if(bits)
    alone = asked_for(text, dtype, channels_last=True, threads=2)
    asked = dataclasses.replace(alone, has_bias=True)
    check(depthwise.ALGORITHM, alone, integers, channels_inside)
    check(depthwise.ALGORITHM, asked, reals, channels_inside)
    check(depthwise.ALGORITHM, asked, integers, spread)
    first, second, *_ = given(asked, integers)
    for mixed in ((channels_inside(first), second), (first, channels_inside(second))):
        results, biases = [], []
        for byte in (0xFF, 0x11):
            results.append(torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype))
            biases.append(torch.full(asked.bias_shape, torch.nan, dtype=dtype))
            workspace = torch.full((depthwise.ALGORITHM.cost(asked).workspace,), byte, dtype=torch.uint8)
            depthwise.ALGORITHM.run(asked, Tensors(*mixed, biases[-1]), results[-1], workspace)
        compare(depthwise.ALGORITHM, asked, results[0], *mixed, biases[0], to_the_bit=True)
        assert torch.equal(*results)
        assert torch.equal(*biases)


@every_width_in_time
@held_types
@pytest.mark.parametrize("text", INSIDE.values(), ids=INSIDE)
def test_nothing_outside_is_touched_in_channels_last(bits, text, dtype, as_if, monkeypatch):
    as_if(bits)
    asked, algorithm = asked_for(text, dtype, threads=2, channels_last=True, has_bias=True), depthwise.ALGORITHM
    tables = pixels._tables
    for at_end in (True, False):
        monkeypatch.setattr(
            pixels, "_tables", lambda *how, at_end=at_end: tuple(guarded(t, at_end=at_end) for t in tables(*how))
        )
        pixels.prepare.cache_clear()
        first, second = (guarded(t.movedim(1, -1), at_end=at_end).movedim(-1, 1) for t in given(asked, reals)[:2])
        bias, out = (
            guarded(torch.full(shape, torch.nan, dtype=dtype), at_end=at_end)
            for shape in (asked.bias_shape, asked.problem.weight_shape)
        )
        workspace = guarded(torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        algorithm.run(asked, Tensors(first, second, bias), out, workspace)
        compare(algorithm, asked, out, first, second, bias, to_the_bit=False)


def test_two_threads_write_no_sums_that_lie_side_by_side():
    """Each core asks for what lies behind its own."""
    asked = asked_for("n1 c32 o32 x9x9 k3x3 p1 g32", threads=2, channels_last=True)
    *_, chunks, chunk = pixels._counts(asked)
    assert (chunks, chunk * 4) == (2, 32 * 9 * 4 + pixels.APART)
    alone = dataclasses.replace(asked, threads=1)
    assert pixels._counts(alone)[2:] == (1, 32 * 9)
    assert depthwise.ALGORITHM.cost(alone).workspace == 32 * 9 * 4


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernels_of(text, **more):
    """The texts of the kernels that serve a request whose tensors are contiguous."""
    texts = []
    asked = asked_for(text, **more)
    x, y = (torch.empty(asked.problem.shape_of(role), device="meta") for role in ("x", "y"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(taps.cpu, "compile", lambda text, target: texts.append(text))
        taps.prepare.__wrapped__(asked, x.stride(), y.stride())
    return texts


@pytest.mark.parametrize(("text", "kinds"), [("n{n} c3 o3 x{h}x{w} k3x3", 1), ("n{n} c32 o32 x{h}x{w} k3x3 p1 g32", 2)])
def test_a_new_size_compiles_nothing(text, kinds):
    """Of one input channel, long rows have a kernel of their own; and one adds the chunks."""
    texts = set()
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 77, 1001), (4, 1000, 64), (8, 130, 131)]:
        texts.update(kernels_of(text.format(n=n, h=h, w=w)))
    assert len(texts) == kinds + 1


NO_SPILLS = [
    "n1 c3 o3 x1080x1920 k3x3",
    "n1 c6 o6 x100x100 k3x3 p1",
    "n1 c3 o3 x100x100 k3x3 p1 g3",
    "n1 c3 o3 x100x100 k3x3 s2 p1 g3",
    "n1 c3 o3 x100x100 k5x5 p2 g3",
    "n1 c3 o3 x100x100 k9x9 p4 g3",
    "n1 c3 o3 x1000 k31 p15 g3",
    "n1 c8 o8 x9x100x100 k3x3x3 p1 g8",
]


@assembly.every_target
@pytest.mark.parametrize("text", NO_SPILLS)
def test_no_sum_is_spilled(target, text, as_if):
    as_if(target)
    code = cpu.assembly(kernels_of(text, has_bias=True)[0], target)
    inside = assembly.main_tile(code)
    assert assembly.products(inside) >= 8
    allowed = 0 if target.fma else 3  # SSE's products need room of their own
    assert len(assembly.spills(inside, code)) <= allowed, "a vector is written to the stack"


@pytest.mark.parametrize(
    "text", ["n1 c32 o32 x9x30 k3x3 p1 g32", "n1 c32 o32 x9x30 k3x3 s2 g32", "n1 c32 o32 x9x30 k5x5 g32"]
)
@assembly.every_target
@pytest.mark.parametrize("bias", [False, True])
def test_in_channels_last_a_pixel_is_loaded_once_for_places_that_are_taken_together(
    target, bias, text, as_if, monkeypatch
):
    """And hardly anything is spilled meanwhile."""
    as_if(target)
    monkeypatch.setattr(pixels.cpu, "compile", lambda text, target: None)
    shapes, real = [], pixels.pixels.text
    monkeypatch.setattr(pixels.pixels, "text", lambda shape: shapes.append(shape) or real(shape))
    asked = asked_for(text, channels_last=True, has_bias=bias)
    x, y = (torch.empty(asked.problem.shape_of(role)) for role in ("x", "y"))
    x, y = (t.to(memory_format=torch.channels_last) for t in (x, y))
    pixels.prepare.__wrapped__(asked, x.stride(), y.stride())
    (shape,) = shapes
    code = cpu.assembly(real(shape), target)
    tile = assembly.main_tile(code)
    assert assembly.products(tile) == shape.places * shape.high * shape.wide
    assert shape.places > 1
    seen = {p * shape.stride[1] + tap * shape.dilation[1] for p in range(shape.places) for tap in range(shape.wide)}
    assert assembly.loads(tile) <= shape.high * len(seen) + shape.places
    # Of 16 registers, 9 sums and 4 pixels leave masks one too few, and the products of SSE three; sums of one row of
    # taps would load every pixel three times.
    allowed = 0 if target.registers == 32 else 1 if target.fma else 3
    assert len(assembly.spills(tile, code)) <= allowed, "a vector is written to the stack"


def test_what_is_refused_is_said():
    assert "channels_last" in narrow.ALGORITHM.why_not(asked_for("n1 c1 o1 x9x9 k3x3", channels_last=True))
    assert "the one of depthwise" in narrow.ALGORITHM.why_not(asked_for("n1 c2 o2 x9x9 k3x3 g2"))


def test_the_gradient_is_chosen_for_few_channels():
    from plainconv.plan import plan

    for text, name in [("n100 c3 o3 x28x28 k3x3", "narrow"), ("n1 c32 o32 x56x56 k3x3 p1 g32", "depthwise")]:
        assert plan(asked_for(text)).algorithm.name == name
