"""depthwise in channels_last: right for every type and vector width; nothing outside is touched; no spilled sums."""

import assembly
import pytest
import torch
from checks import CASES, channels_last, check, compare, exact, given, integers, reals, request, result_of
from guarded import guarded

from plainconv.bench.scratch import torchs_peak
from plainconv.cpu import channels as kernels
from plainconv.cpu import compile as cpu
from plainconv.menu import channels
from plainconv.menu.depthwise import ALGORITHM
from plainconv.menu.parts import parts
from plainconv.problem import ACTIVATIONS, ConvProblem, Direction

BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

every_width = pytest.mark.parametrize("bits", BITS)
OTHERS = [torch.float64, torch.bfloat16, torch.float16]

# Where the kernel takes another way: blocks and tails of channels, tiles inside, at the edges and at the end of a row.
WAYS = {
    "whole blocks": "n2 c64 o64 x5x9 k3x3 p1 g64",
    "a whole block and a tail": "n1 c37 o37 x4x30 k3x3 g37",
    "a few channels": "n1 c3 o3 x9x33 k3x3 p1 g3",
    "one channel": "n1 c1 o1 x7x16 k3x3 p1 g1",
    "an odd number of rows": "n1 c17 o17 x37x8 k3x3 p1 g17",
    "more tiles than a span has": "n1 c16 o16 x2x1801 k2x3 p1 g16",
    "stride 2": "n1 c20 o20 x9x31 k3x5 s2 p1x2 g20",
    "stride 3, dilation": "n1 c20 o20 x19x40 k3x3 s3 d1x2 p1x2 g20",
    "stride and dilation of rows": "n1 c20 o20 x19x16 k3x3 s2x1 d3x1 p4x1 g20",
    "rows in turn": "n1 c20 o20 x5x16 k7x7 p3 g20",
    "stride over kernel": "n1 c20 o20 x20x40 k2x2 s5 g20",
    "kernel over its group of taps": "n1 c18 o18 x3x90 k2x31 p1x15 g18",
    "reflect": "n1 c18 o18 x6x30 k3x5 p2x4 mreflect g18",
    "replicate, stride": "n1 c18 o18 x6x13 k3x5 s1x2 p2x40 mreplicate g18",
    "circular": "n2 c18 o18 x6x13 k3x5 p2x9 mcircular g18",
    "cropped": "n1 c18 o18 x9x40 k3x3 p-2:1x-3:-4 g18",
    "all border": "n1 c18 o18 x2x2 k3x3 p6 g18",
    "one column": "n1 c18 o18 x9x1 k3x1 p1x0 g18",
    "two columns": "n1 c18 o18 x9x2 k3x3 p1 g18",
    "three columns": "n1 c18 o18 x9x3 k3x3 p1 g18",
    "3-D": "n1 c40 o40 x4x7x15 k3x3x3 s2x1x1 p1 g40",
    "3-D, replicate": "n2 c18 o18 x4x3x8 k3x2x3 p1x1x2 mreplicate g18",
    "3-D, depth only": "n1 c24 o24 x6x7x8 k5x1x1 p2x0x0 g24",
}
ALL = WAYS | {name: text for name, text in CASES.items() if name == "depthwise"}


# The stride turned round: phases with more and fewer taps, of depth, rows and width.
TURNED = {
    "taps of 3 by 2": "n2 c37 o37 x17x31 k3x3 s2 p1 g37",
    "taps of 5 by 2": "n1 c20 o20 x18x75 k5x5 s2 p2 g20",
    "few channels, cropped": "n1 c3 o3 x19x40 k3x4 s1x2 p-2:1x-3:-4 g3",
    "dilation": "n1 c20 o20 x40x41 k4x4 s2x3 d3x2 p3 g20",
    "kernel over its group of taps": "n1 c18 o18 x9x90 k4x39 s2x1 p1x15 g18",
    "3-D": "n1 c18 o18 x5x7x20 k3x3x3 s2 p1 g18",
    "3-D, depth alone": "n1 c18 o18 x7x6x9 k3x3x3 s2x1x1 p1 g18",
}
NO_STRIDE = {
    name: text
    for name, text in ALL.items()
    if set(ConvProblem.parse(text).stride) == {1} and ConvProblem.parse(text).padding_mode == "zeros"
}


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, channels_last=True, **more)
    assert channels.why_not(asked) is None
    return asked


def last(tensor):
    """Channels side by side."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_first(tensor):
    return tensor if tensor.dim() < 3 else tensor.contiguous()


def apart(tensor):
    """Every stride but the channels' is larger than it need be."""
    if tensor.shape[1] == 1:
        return tensor
    room = tensor.new_full([size + 1 for size in tensor.shape], torch.nan)
    view = last(room)[tuple(slice(0, size) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.fixture
def as_if(monkeypatch):
    """A function that pretends the processor has vectors of so many bits, and that every input is a large one."""

    def pretend(bits):
        monkeypatch.setattr(channels, "ASKED", 0)
        monkeypatch.setattr(channels, "STREAMED", 0)
        target = cpu.Target.host(bits)
        monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
        monkeypatch.setattr(channels, "prepare", channels.prepare.__wrapped__)
        return target

    return pretend


EVERY_WAY = [(text, torch.float32) for text in ALL.values()]
SOME = [WAYS[name] for name in ("a whole block and a tail", "replicate, stride", "3-D")]
EVERY_WAY += [(text, dtype) for text in SOME for dtype in OTHERS]
every_way = pytest.mark.parametrize(("text", "dtype"), EVERY_WAY, ids=str)


@every_width
@every_way
def test_every_way_through_the_kernel(bits, dtype, text, as_if):
    as_if(bits)
    check(ALGORITHM, asked_for(text, dtype, has_bias=True, has_residual=True, threads=3), integers, last)


@pytest.mark.parametrize("text", [WAYS["a whole block and a tail"], WAYS["3-D"]])
def test_nothing_but_the_sum(text):
    check(ALGORITHM, asked_for(text), integers, last)


@pytest.mark.parametrize("layout", [channels_first, apart, last])
def test_any_strides_of_the_input(layout):
    for text in (WAYS["a whole block and a tail"], WAYS["3-D"]):
        check(ALGORITHM, asked_for(text), integers, layout)


def every_second(tensor):
    """Neither channels nor pixels side by side."""
    return torch.stack([tensor] * 2, -1)[..., 0] if tensor.dim() > 2 else tensor


APART = WAYS | {"dilation over rows": "n2 c20 o20 x30x31 k3x3 d16 p16 g20"}


@every_width
@pytest.mark.parametrize("text", APART.values(), ids=APART)
def test_channels_that_lie_apart(bits, text, as_if):
    as_if(bits)
    asked = asked_for(text, has_bias=True, has_residual=True, threads=3)
    check(ALGORITHM, asked, integers, channels_first)
    check(ALGORITHM, asked, integers, every_second)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("layout", [channels_first, every_second], ids=["pixels", "nothing"])
def test_channels_that_lie_apart_in_every_type(layout, dtype):
    for text in SOME:
        check(ALGORITHM, asked_for(text, dtype), integers, layout)


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1,), (2, 3), (0,), (2,)], ids=str)
def test_an_expanded_input(dims):
    asked = asked_for(APART["a whole block and a tail"])
    for layout in (last, channels_first):

        def expanded(tensor, layout=layout):
            if tensor.shape != asked.problem.input_shape:
                return tensor
            for dim in dims:
                tensor = tensor.narrow(dim, 0, 1)
            return layout(tensor).expand(asked.problem.input_shape)

        first, second, *_ = given(asked, integers)
        compare(
            ALGORITHM,
            asked,
            result_of(ALGORITHM, asked, expanded(first), second),
            expanded(first),
            second,
            to_the_bit=True,
        )


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_nothing_is_copied_outside_the_workspace(direction):
    """And that is small beside the tensor, however its channels lie."""
    asked = asked_for("n2 c64 o64 x56x56 k3x3 p1 g64", direction=direction)
    tensors, size = given(asked, reals), channels.cost(asked).workspace
    out = channels_last(torch.empty(asked.problem.input_shape))
    call, workspace = channels.bind(asked, tensors), torch.empty(size, dtype=torch.uint8)

    def run():
        call(tensors, out, workspace)
        return (torch.empty(0),)

    assert torchs_peak(run) == 0
    assert size < out.nbytes // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("text", APART.values(), ids=APART)
def test_nothing_outside_is_touched_where_channels_lie_apart(text, at_end, dtype, as_if, monkeypatch):
    as_if(BITS[0])
    asked = asked_for(text, dtype, has_bias=True, has_residual=True)
    between_guards(asked, at_end, monkeypatch, lambda tensor: guarded(tensor, at_end=at_end))


@pytest.mark.parametrize("dtype", [torch.float32, *OTHERS], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_comes_behind_is_done_in_the_store(dtype, activation):
    asked = asked_for("n1 c20 o20 x5x2 k2x1 g20", dtype, activation=activation, has_bias=True, has_residual=True)
    check(ALGORITHM, asked, reals, last)


@every_width
@every_way
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_is_touched(bits, dtype, at_end, text, as_if, monkeypatch):
    """Every tensor, every table and the workspace right before or right behind memory that faults."""
    as_if(bits)
    between_guards(asked_for(text, dtype, has_bias=True, has_residual=True), at_end, monkeypatch)


@pytest.mark.parametrize("text", (NO_STRIDE | TURNED).values(), ids=NO_STRIDE | TURNED)
def test_the_gradient_for_the_input(text, as_if):
    as_if(BITS[0])
    asked = asked_for(text, torch.float32, Direction.GRAD_INPUT, has_bias=True, has_residual=True, threads=3)
    for layout in (last, channels_first, apart):
        check(ALGORITHM, asked, integers, layout)


@every_width
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_the_gradient_in_every_type(bits, dtype, as_if):
    as_if(bits)
    asked = asked_for(TURNED["taps of 3 by 2"], dtype, Direction.GRAD_INPUT, has_bias=True)
    check(ALGORITHM, asked, integers, last)
    check(ALGORITHM, asked, reals, last)


def test_the_border_of_a_gradient_is_not_even_zeros():
    """An infinite weight meets no zero there, so it makes no NaN."""
    asked = asked_for("n1 c2 o2 x4x4 k3x3 p1 g2", direction=Direction.GRAD_INPUT)
    first, second, *_ = given(asked, lambda shape, dtype, seed: integers(shape, dtype, seed).abs() + 1)
    second[0, 0, 0, 0] = torch.inf
    assert torch.equal(result_of(ALGORITHM, asked, last(first), second), exact(asked, first, second).float())


TURNED_GUARDED = [(BITS[0], text, torch.float32) for text in TURNED.values()]
TURNED_GUARDED += [
    (bits, TURNED[name], dtype)
    for bits in BITS
    for name in ("taps of 3 by 2", "few channels, cropped")
    for dtype in (torch.float32, *OTHERS)
    if (bits, dtype) != (BITS[0], torch.float32)
]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("apart", [False, True], ids=["channels side by side", "apart"])
@pytest.mark.parametrize(("bits", "text", "dtype"), TURNED_GUARDED, ids=str)
def test_nothing_outside_is_touched_by_the_gradient(bits, text, dtype, apart, at_end, as_if, monkeypatch):
    as_if(bits)
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, has_bias=True, has_residual=True)
    between_guards(asked, at_end, monkeypatch, (lambda tensor: guarded(tensor, at_end=at_end)) if apart else None)


def between_guards(asked, at_end, monkeypatch, lay=None):
    tables = channels._tables
    monkeypatch.setattr(
        channels, "_tables", lambda *how: tuple(guarded(table, at_end=at_end) for table in tables(*how))
    )

    def enclosed(tensor):
        return guarded(tensor.movedim(1, -1), at_end=at_end).movedim(-1, 1)

    tensors = given(asked, reals)
    tensors = tensors._replace(
        first=(lay or enclosed)(tensors.first),
        second=guarded(tensors.second, at_end=at_end),
        bias=guarded(tensors.bias, at_end=at_end),
        residual=enclosed(tensors.residual),
    )
    out = enclosed(torch.full(asked.problem.shape_of(asked.direction.makes), torch.nan, dtype=asked.dtype))
    workspace = guarded(torch.full((channels.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
    channels.run(asked, tensors, out, workspace)
    compare(ALGORITHM, asked, out, *tensors, to_the_bit=False)


@pytest.mark.parametrize(
    ("text", "direction", "dtype"),
    [
        (WAYS["whole blocks"], Direction.FORWARD, torch.float32),
        (WAYS["whole blocks"], Direction.FORWARD, torch.float64),
        ("n1 c32 o32 x18x25 k3x3 s2 p1 g32", Direction.GRAD_INPUT, torch.float32),
    ],
)
def test_a_large_result_is_written_past_the_caches(text, direction, dtype, monkeypatch):
    """The same bits, wherever the result begins: vectors that are not whole lines cannot be written so."""
    asked = asked_for(text, dtype, direction, has_bias=True, has_residual=True, threads=3)
    tensors = given(asked, reals)
    tensors = tensors._replace(first=last(tensors.first), residual=last(tensors.residual))
    n, c, *inner = shape = asked.problem.shape_of(direction.makes)
    workspace = torch.empty(channels.cost(asked).workspace, dtype=torch.uint8)
    room, results = torch.empty(tensors.residual.numel() + 1, dtype=dtype), []
    for least, first in [(1 << 40, 0), (0, 0), (0, 1)]:
        monkeypatch.setattr(channels, "STREAMED", least)
        out = room[first:][: room.numel() - 1].view(n, *inner, c).movedim(-1, 1).fill_(torch.nan)
        channels.run(asked, tensors, out, workspace)
        results.append(out.clone())
    assert room.data_ptr() % kernels.LINE == 0
    assert results[0].shape == shape
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("text", "fills"), [("n1 c64 o64 x56x56 k3x3 p1 g64", True), ("n1 c3 o3 x9x9 k3x3 g3", False)])
def test_whole_lines_alone_are_written_past_the_caches(text, fills):
    shape = channels.shape_of(parts(asked_for(text))[0], cpu.Target.host())
    assert shape.fills_lines == (fills and cpu.Target.host().bits == 8 * kernels.LINE)
    assert ("!nontemporal" in kernels.text(shape)) == shape.fills_lines


@pytest.mark.parametrize("text", ["n{n} c40 o40 x{h}x{w} k3x3 p1 g40", "n{n} c24 o24 x{h}x{w} k5x3 s2 p{n} g24"])
def test_a_new_size_compiles_nothing(text):
    """Batch, height, width and the width of the border are arguments; only very narrow pictures have their own."""
    texts = set()
    for n, h, w in [(1, 20, 50), (2, 21, 400), (3, 77, 101), (4, 100, 64)]:
        shape = channels.shape_of(parts(asked_for(text.format(n=n, h=h, w=w)))[0], cpu.Target.host())
        texts.add(kernels.text(shape))
    assert len(texts) == 1


@assembly.every_target
@pytest.mark.parametrize(
    "text",
    [
        "n1 c64 o64 x56x56 k3x3 p1 g64",
        "n1 c64 o64 x56x56 k3x3 s2 p1 g64",
        "n1 c64 o64 x56x56 k5x5 p2 g64",
        "n1 c64 o64 x56x56 k7x7 p3 g64",
        "n1 c64 o64 x8x56x56 k3x3x3 p1 g64",
    ],
)
def test_the_sums_stay_in_registers(text, target):
    shape = channels.shape_of(parts(asked_for(text))[0], target)
    code = cpu.assembly(kernels.text(shape), target)
    products = [len(meets) * shape.pixels * shape.kernel[2] for meets in shape.meets.values()]  # of each input row
    counted = [assembly.products(block) for block in assembly.blocks(code)]
    assert counted.count(max(products)) >= products.count(max(products)), "inside, each input row is one block"
    for block, count in zip(assembly.blocks(code), counted, strict=True):
        assert not count or not assembly.spills(block, code), "a vector is written to the stack"


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_padding_is_a_zero_that_is_multiplied(padding):
    """An infinite weight over the padding gives NaN, also where rows of the border are otherwise left out."""
    mode = "" if padding == "zeros" else f" m{padding}"
    asked = asked_for(f"n1 c20 o20 x5x6 k3x3 p1{mode} g20")
    x, w = torch.ones(asked.problem.input_shape), torch.ones(asked.problem.weight_shape)
    w[17, 0, 0, 2] = torch.inf
    found = result_of(ALGORITHM, asked, last(x), w)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), "constant" if padding == "zeros" else padding)
    expected = torch.nn.functional.conv2d(padded, w, groups=20)
    assert expected.isnan().any() == (padding == "zeros")
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_what_is_refused_is_said():
    small = ConvProblem.parse("n1 c2 o2 x8x8 k3x3 g2")
    for problem, direction, more, words in [
        (ConvProblem.parse("n1 c4 o2 x8x8 k3x3 g2"), Direction.GRAD_INPUT, {}, "one input channel a group"),
        (small, Direction.FORWARD, {"device": "cuda"}, "another device"),
        (ConvProblem.parse("n1 c2 o4 x8x8 k3x3 g2"), Direction.FORWARD, {}, "one output channel a group"),
    ]:
        assert words in channels.why_not(request(problem, direction, torch.float32, channels_last=True, **more))
    whole = request(small, Direction.FORWARD, torch.int32, channels_last=True)
    assert "int32" in channels.why_not(whole)
