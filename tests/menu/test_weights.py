"""The gradient for the weight, by direct and pointwise: every way through the kernel, type and layout of memory."""

import dataclasses
from functools import partial

import assembly
import pytest
import torch
from checks import CASES, channels_inside, check, compare, given, integers, reals, request, spread
from guarded import guarded, guarded_inside, guarded_tables

from plainconv.cpu import compile as cpu
from plainconv.menu import direct, pointwise, weights
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
HELD = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1::2])]
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])

# Where the kernel takes another way: tiles of outputs, blocks of channels, images, rows and parts of a row.
WAYS = {
    "tiles of outputs": "n3 c4 o137 x9x20 k3x3 p1",
    "blocks of channels": "n2 c301 o9 x12x40 k3x3 p1",
    "images of a block": "n7 c5 o20 x7x7 k3x3 p1",
    "parts of a row": "n1 c3 o9 x3x2300 k1x5 p0x2",
    "many rows": "n1 c2 o18 x90x20 k3x3 p1",
    "stride 2": "n1 c4 o10 x19x139 k3x5 s2 p2 g2",
    "stride over kernel": "n1 c2 o9 x70x90 k2x2 s9",
    "reflect": "n1 c4 o10 x6x130 k3x5 p2x4 mreflect g2",
    "replicate, stride": "n1 c4 o6 x6x130 k3x5 s1x2 p2x40 mreplicate",
    "1-D": "n2 c4 o8 x1333 k31 p15 g2",
    "1-D, dilation": "n1 c6 o33 x400 k3 d16 p16",
    "cropped": "n1 c3 o20 x9x90 k3x3 p-2:1x-3:-4",
    "3-D": "n2 c4 o12 x4x7x35 k3x3x3 s2x1x1 p1 g2",
    "one tap": "n2 c6 o71 x9x13 k1x1",
    "one tap, stride": "n2 c8 o24 x9x13 k1x1 s2",
    "one tap, groups": "n2 c12 o36 x9x9 k1x1 g3",
    "no image": "n0 c2 o3 x5x5 k3x3",
}
ALL = CASES | WAYS


def algorithm_for(text):
    return (pointwise if ConvProblem.parse(text).taps == 1 else direct).ALGORITHM


def asked_for(text, dtype=torch.float32, **more):
    problem = ConvProblem.parse(text)
    if more.get("channels_last") and problem.dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    return request(problem, Direction.GRAD_WEIGHT, dtype, **more)


def forget():
    for cached in (weights.way, weights.prepare):
        cached.cache_clear()


@every_width_in_time
@every_type
@both_layouts
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_every_way_through_the_kernel(bits, dtype, channels_last, text, as_if):
    as_if(bits)
    asked = asked_for(text, dtype, channels_last=channels_last, threads=1)
    check(algorithm_for(text), asked, integers, channels_inside if channels_last else None)
    check(algorithm_for(text), dataclasses.replace(asked, threads=2, has_bias=True), reals)
    check(algorithm_for(text), dataclasses.replace(asked, threads=3, has_bias=True), integers)


@every_width
@both_layouts
@pytest.mark.parametrize("text", ["n1 c4 o10 x19x39 k3x5 s2 p2 g2", "n2 c6 o20 x9x13 k1x1"])
def test_narrower_registers(bits, channels_last, text, as_if):
    as_if(bits)
    for dtype in DTYPES:
        check(algorithm_for(text), asked_for(text, dtype, channels_last=channels_last, has_bias=True), integers)


ODD = {
    "every other place": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "the first of many channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "rows and columns exchanged": lambda t: t.mT.contiguous().mT,
    "channels innermost": channels_inside,
    "images innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "a window": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "irregular": spread,
}


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "text", ["n2 c6 o20 x9x13 k3x3 p1 s2x1", "n2 c6 o20 x9x13 k1x1", "n3 c6 o9 x5x7 k2x3 mreflect p1"]
)
def test_memory_of_any_strides(text, layout, dtype, channels_last):
    asked, algorithm = asked_for(text, dtype, channels_last=channels_last, has_bias=True), algorithm_for(text)
    check(algorithm, asked, integers, layout)
    first, second, bias, _ = given(asked, integers)
    for mixed in ((layout(first), second, bias), (first, layout(second), bias)):
        out = torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype)
        out = channels_inside(out) if channels_last else out
        algorithm.run(asked, Tensors(*mixed), out, torch.empty(algorithm.cost(asked).workspace, dtype=torch.uint8))
        compare(algorithm, asked, out, *mixed, to_the_bit=True)


@every_width_in_time
@both_layouts
@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_nothing_outside_is_touched(bits, text, dtype, channels_last, as_if, monkeypatch):
    """Every tensor, every table and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    asked = asked_for(text, dtype, channels_last=channels_last, threads=2, has_bias=True)
    algorithm, tables = algorithm_for(text), weights._tables

    place = partial(guarded_inside, channels_last=channels_last)
    for at_end in (True, False):
        held = []
        monkeypatch.setattr(weights, "_tables", guarded_tables(tables, held, at_end=at_end))
        weights.prepare.cache_clear()
        first, second, bias, _ = (t if t is None else place(t, at_end=at_end) for t in given(asked, reals))
        out = place(torch.full(asked.problem.weight_shape, torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        algorithm.run(asked, Tensors(first, second, bias), out, workspace)
        assert held or not asked.problem.batch, "the tables were not guarded"
        compare(algorithm, asked, out, first, second, bias, to_the_bit=False)


# -- bits ------------------------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("text", ["n5 c3 o20 x60x60 k3x3 p1", "n2 c70 o300 x7x7 k3x3 p1", "n9 c8 o8 x200 k5 g2"])
def test_the_same_call_gives_the_same_bits(text, channels_last):
    """Whatever the workspace held before; for every number of threads, and where chunks or parts are shared."""
    asked, algorithm = asked_for(text, channels_last=channels_last, has_bias=True), algorithm_for(text)
    first, second, *_ = given(asked, reals)
    for threads in (1, 2, 3, 7):
        one = dataclasses.replace(asked, threads=threads)
        results, biases = [], []
        for byte in (0xFF, 0x11, 0x77):
            workspace = torch.full((algorithm.cost(one).workspace,), byte, dtype=torch.uint8)
            results.append(torch.empty(asked.problem.weight_shape))
            biases.append(torch.empty(asked.bias_shape))
            algorithm.run(one, Tensors(first, second, biases[-1]), results[-1], workspace)
        alone, out = dataclasses.replace(one, has_bias=False), torch.empty(asked.problem.weight_shape)
        workspace = torch.empty(algorithm.cost(alone).workspace, dtype=torch.uint8)
        algorithm.run(alone, Tensors(first, second), out, workspace)
        assert all(torch.equal(result, out) for result in results), "with the bias beside it, or without"
        assert all(torch.equal(bias, biases[0]) for bias in biases)


def test_threads_share_the_weight_or_the_blocks():
    ways = {}
    for text in ("n8 c3 o16 x60x60 k3x3 p1", "n1 c512 o512 x7x7 k3x3 p1"):
        asked = asked_for(text, threads=2)
        ways[text] = weights.way(asked, True)
        check(direct.ALGORITHM, asked, integers)
    assert [(way.parts, way.chunks) for way in ways.values()] == [(1, 2), (2, 1)]


@both_layouts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("text", "single", "chunks"),
    [
        ("n2 c70 o300 x7x7 k3x3 p1", True, 1),
        ("n1 c512 o96 x40x40 k3x3 p1", False, 1),
        ("n8 c3 o16 x60x60 k3x3 p1", False, 2),
    ],
)
def test_units_are_written_when_they_are_whole(text, single, chunks, bias, channels_last):
    """After a single block, after the last of several, or once all chunks are there."""
    asked = asked_for(text, threads=2, has_bias=bias, channels_last=channels_last)
    way = weights.way(asked, True)
    assert (way.single, way.chunks) == (single, chunks)
    check(direct.ALGORITHM, asked, integers, channels_inside if channels_last else None)


def test_a_long_sum_loses_little():
    """A million products: one running sum of float32 would be off by a hundred times this."""
    asked = asked_for("n4 c1 o16 x500x500 k1x1", threads=1, has_bias=True)
    first, second = torch.full((4, 1, 500, 500), 0.1), torch.full((4, 16, 500, 500), 0.1)
    out, bias = torch.empty(16, 1, 1, 1), torch.empty(16)
    workspace = torch.empty(pointwise.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    pointwise.ALGORITHM.run(asked, Tensors(first, second, bias), out, workspace)
    exact = first.double().sum().item()
    assert abs(out.double() / (exact * second[0, 0, 0, 0].double()) - 1).max() < 3e-5
    assert abs(bias.double() / exact - 1).max() < 3e-5


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernels_of(text, **more):
    """The texts of the kernels that serve a request whose tensors lie as its output will."""
    texts = []
    asked = asked_for(text, **more)
    x, y = (torch.empty(asked.problem.shape_of(role), device="meta") for role in ("x", "y"))
    if asked.channels_last:
        x, y = channels_inside(x), channels_inside(y)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights.cpu, "compile", lambda text, target: texts.append(text))
        weights.prepare.__wrapped__(asked, x.stride(), y.stride())
    return texts


@both_layouts
@pytest.mark.parametrize("text", ["n{n} c64 o64 x{h}x{w} k3x3 p1", "n{n} c32 o64 x{h}x{w} k1x1"])
def test_a_new_size_compiles_nothing(text, channels_last):
    texts = set()
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 77, 1001), (4, 1000, 64), (8, 130, 131)]:
        texts.update(kernels_of(text.format(n=n, h=h, w=w), channels_last=channels_last))
    assert len(texts) <= 2, "the kernel, and what adds chunks"


@assembly.every_target
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["n1 c64 o64 x56x56 k3x3 p1", "n1 c256 o96 x56x56 k1x1", "n1 c3 o32 x56x56 k3x3 p1"])
def test_no_sum_is_spilled(target, text, dtype, channels_last, as_if):
    """In the assembly no vector register goes to the stack where products are summed."""
    as_if(target)
    code = cpu.assembly(kernels_of(text, dtype=dtype, channels_last=channels_last, has_bias=True)[0], target)
    sums = [block for block in assembly.blocks(code) if assembly.products(block) >= 4]
    assert max(map(assembly.products, sums)) >= 8
    for block in sums:
        assert not assembly.spills(block, code), "a vector is written to the stack"


def test_a_workspace_is_kept_small_on_request():
    asked = asked_for("n2 c256 o16 x64x64 k3x3 p1", threads=2)
    for part in (2, 3) if cpu.Target.host().bits == 512 else (4 / 3, 5 / 3):  # half as many lanes begin with less
        few = dataclasses.replace(asked, max_workspace=int(direct.ALGORITHM.cost(asked).workspace / part))
        assert direct.ALGORITHM.cost(few).workspace <= few.max_workspace
        check(direct.ALGORITHM, few, integers)


def test_the_gradient_is_chosen_for_dense_layers():
    from plainconv.plan import plan

    for text in ("n2 c64 o64 x56x56 k5x5 p2", "n2 c256 o64 x28x28 k1x1"):
        for last in (False, True):
            assert plan(asked_for(text, channels_last=last)).algorithm.name == algorithm_for(text).name
