"""direct and pointwise: every way through their kernel, for every vector width, type and layout of memory."""

import dataclasses
from functools import lru_cache, partial

import assembly
import pytest
import torch
from checks import CASES, channels_inside, check, compare, exact, given, integers, reals, request, result_of
from guarded import guarded, guarded_inside, guarded_tables
from torch.utils._python_dispatch import TorchDispatchMode

from plainconv.cpu import compile as cpu
from plainconv.cpu import dense as kernel
from plainconv.cpu.emit import natives
from plainconv.menu import axes, cuts, dense, direct, engine, pointwise, products
from plainconv.menu.base import Tensors
from plainconv.problem import ACTIVATIONS, ConvProblem, Direction

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

# Where the kernel takes another way: one or many tiles of outputs and places, blocks of rows and of parts of a row.
WAYS = {
    "tiles of outputs": "n1 c10 o37 x9x20 k3x3 p1",
    "tiles of places": "n2 c10 o10 x5x301 k3x3 p1x1",
    "parts of a row": "n1 c9 o9 x3x2300 k1x5 p0x2",
    "many rows": "n1 c10 o8 x90x20 k3x3 p1",
    "stride 2": "n1 c4 o10 x19x139 k3x5 s2 p2 g2",
    "stride 3": "n1 c4 o6 x19x139 k3x4 s3 p2 g2",
    "stride over kernel": "n1 c2 o9 x70x90 k2x2 s9",
    "reflect": "n1 c4 o10 x6x130 k3x5 p2x4 mreflect g2",
    "replicate, stride": "n1 c4 o6 x6x130 k3x5 s1x2 p2x40 mreplicate",
    "1-D": "n2 c4 o8 x333 k31 p15 g2",
    "1-D, dilation": "n1 c6 o33 x400 k3 d16 p16",
    "1-D, blocks": "n2 c3 o20 x9001 k3 p1",
    "1-D, many channels": "n2 c40 o8 x150 k2",
    "1-D, short": "n3 c5 o9 x20 k4 p3",
    "1-D, reach": "n2 c2 o5 x90 k3 d40 p7",
    "1-D, channels that meet": "n1 c5 o7 x32768 k2",
    "cropped": "n1 c9 o20 x9x90 k3x3 p-2:1x-3:-4",
    "3-D": "n1 c4 o12 x4x7x35 k3x3x3 s2x1x1 p1 g2",
    "lines, tiles of outputs": "n2 c3 o37 x9x20 k3x3 p1",
    "lines, parts of a row": "n1 c3 o9 x3x2300 k1x5 p0x2",
    "lines, strides": "n1 c5 o10 x19x139 k4x5 s3x2 p2x1",
    "lines, no borders": "n2 c3 o20 x32x48 k8x8 s8",
    "lines, cropped": "n1 c3 o20 x9x90 k3x3 p-2:1x-3:-4",
    "lines, 3-D": "n1 c3 o12 x4x7x35 k3x3x3 s2x1x1 p2x1x1",
    "pointwise": "n2 c6 o71 x9x13 k1x1",
    "pointwise, few places": "n1 c8 o40 x2x2 k1x1",
    "pointwise, many": "n1 c16 o20 x40x40 k1x1",
    "pointwise, stride": "n2 c8 o24 x9x13 k1x1 s2",
    "pointwise, padded": "n1 c8 o24 x9x13 k1x1 p1",
    "pointwise, odd": "n2 c7 o9 x9x13 k1x1",
    "pointwise, groups": "n2 c12 o36 x9x9 k1x1 g3",
}
ALL = CASES | WAYS


def algorithm_for(text):
    return (pointwise if ConvProblem.parse(text).taps == 1 else direct).ALGORITHM


def asked_for(text, dtype=torch.float32, direction=Direction.FORWARD, **more):
    problem = ConvProblem.parse(text)
    if more.get("channels_last") and problem.dims == 1:
        pytest.skip("torch has no channels_last in one dimension")
    return request(problem, direction, dtype, **more)


def forget():
    for cached in (cuts.kind, cuts.layout, cuts.natural, dense.workspace_bytes, dense.prepare, axes.work):
        cached.cache_clear()


@every_width_in_time
@both_layouts
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_every_way_through_the_kernel(bits, channels_last, text, as_if):
    as_if(bits)
    asked = asked_for(text, channels_last=channels_last)
    check(algorithm_for(text), asked, integers, channels_inside if channels_last else None)
    more = dataclasses.replace(asked, has_bias=True, has_residual=True, activation="relu", threads=2)
    check(algorithm_for(text), more, integers, channels_inside if channels_last else None)


@every_width_in_time
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_without_gathering(bits, dtype, text, as_if, monkeypatch):
    """Where pixels lie in one piece, their taps may be read through a list, whatever the estimates say of it."""
    as_if(bits)
    asked = asked_for(text, dtype, channels_last=True, has_bias=True)
    if dtype is torch.bfloat16 and not cuts.kind(axes.work(asked)).pairs:
        pytest.skip("single numbers of half types are converted, which is done when they are gathered")
    listed = cuts.layout(axes.work(asked), True, cuts.Reads.LIST)
    monkeypatch.setattr(cuts, "natural", lru_cache(lambda *_: listed))
    for layout in (channels_inside, ODD["a window of pixels"]):
        check(algorithm_for(text), asked, integers, layout)


class Fresh(TorchDispatchMode):
    """The sizes of tensors that operators of torch make, and of those that they fill from others."""

    def __init__(self):
        super().__init__()
        self.made, self.filled = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.copy_.default:
            self.filled.append(result.numel())
        elif not function.is_view:
            self.made.append(result.numel())
        return result


LINES = {name: text for name, text in WAYS.items() if name.startswith("lines")}


@every_width_in_time
@every_type
@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_few_channels_are_read_in_lines(bits, text, dtype, as_if, monkeypatch):
    """Whatever order the weight is in; an input whose pixels have a gap, or are no pixels, is gathered."""
    as_if(bits)
    asked = asked_for(text, dtype, channels_last=True, has_bias=True)
    seen = axes.work(asked)
    lines = partial(cuts.layout, reads=cuts.Reads.LINES)
    monkeypatch.setattr(cuts, "natural", lru_cache(lambda work, merge=True: lines(work, merge)))
    tensors = given(asked)
    window = ODD["a window of pixels"](tensors.first)
    apart = torch.cat([tensors.first] * 2, 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : seen.group_in]
    for first, reads in (
        (tensors.first, False),
        (window, True),
        (apart, False),
        (channels_inside(tensors.first), True),
    ):
        assert (dense._source(seen, dense._places_of(seen, first.stride()))[0] == "lines") == reads
        for second in (tensors.second, channels_inside(tensors.second)):
            found = Tensors(first, second, *tensors[2:])
            compare(direct.ALGORITHM, asked, result_of(direct.ALGORITHM, asked, *found), *found, to_the_bit=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lines_copy_nothing_beside_the_workspace(dtype, packed):
    """A contiguous weight is put in order there; one that stays was packed before."""
    asked = asked_for("n1 c3 o64 x56x56 k7x7 s2 p3", dtype, channels_last=True, packed=packed)
    assert cuts.natural(axes.work(asked)).reads is cuts.Reads.LINES
    tensors = given(asked, integers)
    tensors = tensors._replace(first=channels_inside(tensors.first))
    out = channels_inside(torch.empty(asked.problem.output_shape, dtype=dtype))
    call = direct.ALGORITHM.pack(asked, tensors, {}) if packed else direct.ALGORITHM.bind(asked, tensors)
    size = direct.ALGORITHM.cost(asked).workspace
    for at_end in (True, False):
        workspace = guarded(torch.full((size,), 0xFF, dtype=torch.uint8), at_end=at_end)
        with Fresh() as fresh:
            call(tensors, out, workspace)
        compare(direct.ALGORITHM, asked, out, *tensors, to_the_bit=True)
        assert not fresh.made
        assert fresh.filled == ([] if packed else [tensors.second.numel()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", ["first", "second"])
def test_the_last_of_an_odd_number_meets_no_neighbour(role, dtype):
    """In lines, what lies behind the last number of a kernel's row belongs to another place, and may be infinite."""
    asked = asked_for("n1 c3 o18 x7x20 k3x3 p1", dtype, channels_last=True)
    for place in range(0, 54, 5):
        tensors = given(asked)
        broken = channels_inside(getattr(tensors, role))
        broken.movedim(1, -1).view(-1)[place] = torch.inf
        found = tensors._replace(**{role: broken})
        result = result_of(direct.ALGORITHM, asked, *map(channels_inside, found[:2]), None, None)
        right = exact(asked, *found[:2], None, None)
        assert torch.equal(result.isfinite(), right.isfinite())


@every_width
@both_layouts
@pytest.mark.parametrize("text", ["n1 c4 o10 x19x39 k3x5 s2 p2 g2", "n2 c6 o20 x9x13 k1x1"])
def test_narrower_registers(bits, channels_last, text, as_if):
    as_if(bits)
    for dtype in DTYPES:
        asked = asked_for(text, dtype, channels_last=channels_last, has_bias=True)
        check(algorithm_for(text), asked, integers, channels_inside if channels_last else None)


@every_width_in_time
@every_type
@both_layouts
@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_every_type(bits, dtype, channels_last, text, as_if):
    as_if(bits)
    asked = asked_for(text, dtype, channels_last=channels_last, has_bias=True)
    check(algorithm_for(text), asked, integers, channels_inside if channels_last else None)
    check(algorithm_for(text), asked, reals, channels_inside if channels_last else None)


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_fused(activation, dtype, channels_last):
    asked = asked_for("n2 c6 o20 x9x13 k3x3 p1", dtype, channels_last=channels_last, activation=activation)
    # Bias and residual are added before any activation: alone, they are tried with one.
    for has_bias, has_residual in [(True, True), *([(False, True), (False, False)] if activation == "relu" else [])]:
        one = dataclasses.replace(asked, has_bias=has_bias, has_residual=has_residual)
        check(direct.ALGORITHM, one, reals, channels_inside if channels_last else None)


# Where a stride is turned round: phases of unequal length, with many taps, one or none, and blocks of all kinds.
TURNED = {
    "transposed": "n2 c20 o6 x16x16 k4x4 s2 p1",
    "few channels": "n1 c3 o7 x40x44 k4x4 s2 p1",
    "output padding": "n2 c9 o4 x10x15 k3x3 s2x3 p1",
    "kernel is the stride": "n2 c17 o6 x12x26 k2x2 s2",
    "kernel is the stride, pairs": "n1 c18 o5 x9x33 k1x3 s1x3",
    "1-D, long": "n1 c9 o4 x1499 k16 s8 p4",
    "one row of many parts": "n1 c2 o3 x2x5001 k2x5 s1x2 p0x2",
    "1-D, two phases": "n2 c9 o13 x2051 k4 s2 p1",
    "1-D, four phases, one without taps": "n1 c9 o4 x1030 k3 s4",
    "dilation shares a factor": "n1 c5 o4 x23x31 k3x4 s4x6 d2x4 p3",
    "cropped": "n1 c5 o4 x23x31 k3x4 s2x3 p-2:1x-3:-4",
    "3-D": "n1 c10 o4 x7x9x12 k3x3x4 s2x3x2 p1 g2",
    "3-D, depth alone": "n1 c10 o4 x7x9x12 k3x3x1 s3x1x1 p1x1x0",
    "1-D, one phase": "n2 c20 o6 x777 k3 p1",
    "a single pixel": "n3 c20 o5 x4x4 k4x4",
    "a single pixel, padded": "n2 c5 o5 x2x2 k3x3 s2 p1",
    "nothing reaches it": "n1 c3 o2 x1x1 k1x1 p5:-1x5:-1",
}
ZEROS = {name: text for name, text in (ALL | TURNED).items() if ConvProblem.parse(text).padding_mode == "zeros"}


def take_images(asked, monkeypatch):
    """Choose to read several images at once, where pixels are at one distance."""
    taken, natural = cuts.layout(axes.work(asked), True, cuts.Reads.IMAGES), cuts.natural
    monkeypatch.setattr(cuts, "natural", lru_cache(lambda work, merge=True: taken if merge else natural(work, False)))


@every_width_in_time
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])], ids=str
)
@pytest.mark.parametrize("images", [3, 19])
@pytest.mark.parametrize("text", ZEROS.values(), ids=ZEROS)
def test_the_gradient_of_several_images_at_once(bits, images, dtype, text, as_if, monkeypatch):
    """Scalars of a tile may be one place of several images, whatever the estimates say of it."""
    as_if(bits)
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=True, has_bias=True, threads=2)
    asked = dataclasses.replace(asked, problem=dataclasses.replace(asked.problem, batch=images))
    take_images(asked, monkeypatch)
    check(algorithm_for(text), asked, integers, channels_inside)
    check(algorithm_for(text), asked, integers, ODD["a window of pixels"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])], ids=str
)
@both_layouts
@pytest.mark.parametrize("text", ZEROS.values(), ids=ZEROS)
def test_the_gradient_for_the_input(dtype, channels_last, text):
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=channels_last, has_bias=True)
    for layout in (None, channels_inside):
        check(algorithm_for(text), asked, integers, layout)
    check(algorithm_for(text), asked, reals, channels_inside if channels_last else None)


@every_type
@both_layouts
@pytest.mark.parametrize("text", ["n2 c20 o6 x16x16 k4x4 s2 p1", "n1 c5 o4 x23x31 k3x4 s2x3 p-2:1x-3:-4"])
def test_what_is_fused_into_the_gradient(dtype, channels_last, text):
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=channels_last, has_residual=True, threads=2)
    check(algorithm_for(text), dataclasses.replace(asked, activation="relu", has_bias=True), integers)
    check(algorithm_for(text), asked, integers, channels_inside)


def test_no_zeros_are_multiplied():
    """Each of the products is done once: a phase has its part of the taps, some have none."""
    for text in (*TURNED.values(), "n1 c2 o2 x9x9 k1x1 s2", "n1 c2 o2 x40x40 k5x3 s3x4 p2x1"):
        seen = axes.work(asked_for(text, direction=Direction.GRAD_INPUT))
        for axis in seen.axes(False):
            assert sorted(tap.number for tap in axis.taps) == sorted({tap.number for tap in axis.taps})
            assert all(any(row[k] >= 0 for row in axes.elements(axis, "zeros")) for k in range(len(axis.taps)))


@every_type
@both_layouts
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_border_of_a_mode_is_folded_back(mode, dtype, channels_last):
    """Half types are rounded once, behind what is fused."""
    text = f"n2 c5 o6 x7x9 k3x4 s2x1 p2x-1:3 m{mode}"
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=channels_last, has_bias=True, has_residual=True)
    check(direct.ALGORITHM, asked, integers, channels_inside if channels_last else None)
    check(direct.ALGORITHM, dataclasses.replace(asked, activation="silu"), reals)


ODD = {
    "every other place": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "the first of many channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "rows and columns exchanged": lambda t: t.mT.contiguous().mT,
    "channels innermost": channels_inside,
    "images innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "a window of pixels": lambda t: channels_inside(torch.cat([t, t], -1))[..., : t.shape[-1]],
    "a window": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
}


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "text", ["n2 c6 o20 x9x13 k3x3 p1 s2x1", "n2 c6 o20 x9x13 k1x1", "n3 c6 o9 x5x7 k2x3 mreflect p1"]
)
def test_memory_of_any_strides(text, layout, dtype, channels_last):
    check(algorithm_for(text), asked_for(text, dtype, channels_last=channels_last), integers, layout)
    if ConvProblem.parse(text).padding_mode == "zeros":
        asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=channels_last)
        check(algorithm_for(text), asked, integers, layout)


@every_width_in_time
@both_layouts
@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_nothing_outside_is_touched(bits, text, dtype, channels_last, as_if, monkeypatch):
    """Every tensor, every table and the workspace, right before and right behind memory that faults."""
    as_if(bits)
    between_guards(text, dtype, Direction.FORWARD, channels_last, monkeypatch)


@every_width_in_time
@both_layouts
@pytest.mark.parametrize("text", TURNED.values(), ids=TURNED)
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])], ids=str
)
def test_nothing_outside_is_touched_by_the_gradient(bits, text, dtype, channels_last, as_if, monkeypatch):
    as_if(bits)
    between_guards(text, dtype, Direction.GRAD_INPUT, channels_last, monkeypatch)


@pytest.mark.parametrize("text", TURNED.values(), ids=TURNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_is_touched_by_several_images_at_once(text, dtype, monkeypatch):
    text = str(dataclasses.replace(ConvProblem.parse(text), batch=3))
    asked = asked_for(text, dtype, Direction.GRAD_INPUT, channels_last=True, has_bias=True, has_residual=True)
    take_images(asked, monkeypatch)
    forget()
    between_guards(text, dtype, Direction.GRAD_INPUT, True, monkeypatch)
    forget()


ONE_PLACE = ["n5 c70 o61 x4x4 k4x4", "n3 c9 o800 x11 k11"]


@every_type
@both_layouts
@pytest.mark.parametrize("text", ONE_PLACE)
def test_a_kernel_as_large_as_the_image_is_a_product_of_matrices(text, channels_last, dtype):
    for direction in Direction:
        asked = asked_for(text, dtype, direction, channels_last=channels_last, threads=2)
        if direction is not Direction.GRAD_WEIGHT:
            asked = dataclasses.replace(asked, has_residual=True, has_bias=direction is Direction.FORWARD)
        assert products._product(asked)
        for layout in (None, channels_inside, ODD["every other place"]):
            check(direct.ALGORITHM, asked, integers, layout)


@pytest.mark.parametrize("packed", [False, True])
@both_layouts
@pytest.mark.parametrize("direction", list(Direction), ids=lambda d: d.value)
def test_a_product_of_matrices_copies_nothing_beside_the_workspace(direction, channels_last, packed):
    """Nor the weight, in whichever order it lies; images that lie in another one are put in order."""
    if packed and direction is Direction.GRAD_WEIGHT:
        pytest.skip("it makes the weight")
    asked = asked_for(ONE_PLACE[0], direction=direction, channels_last=channels_last, packed=packed)
    tensors, out = given(asked, reals), torch.empty(asked.problem.shape_of(direction.makes))
    workspace = torch.empty(direct.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    for order in (torch.Tensor.contiguous, channels_inside):
        tensors = tensors._replace(first=order(tensors.first))
        out = channels_inside(out) if channels_last else out
        for weight in (torch.Tensor.contiguous, channels_inside):
            found = tensors._replace(second=weight(tensors.second))
            call = products.pack(asked, found, {}) if packed else products.bind(asked, found)
            with Fresh() as fresh:
                call(found, out, workspace)
            assert not fresh.made
            assert set(fresh.filled) <= {asked.problem.batch * asked.problem.in_channels * asked.problem.taps}


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
@pytest.mark.parametrize("text", ONE_PLACE)
def test_nothing_outside_of_a_product_of_matrices_is_touched(text, direction, dtype, channels_last, monkeypatch):
    between_guards(text, dtype, direction, channels_last, monkeypatch)


def between_guards(text, dtype, direction, channels_last, monkeypatch):
    asked = asked_for(text, dtype, direction, channels_last=channels_last, has_bias=True, has_residual=True)
    algorithm, tables = algorithm_for(text), dense._tables

    place = partial(guarded_inside, channels_last=channels_last)
    for at_end in (True, False):
        held = []
        monkeypatch.setattr(dense, "_tables", guarded_tables(tables, held, at_end=at_end))
        dense.prepare.cache_clear()
        tensors = Tensors(*(place(tensor, at_end=at_end) for tensor in given(asked, reals)))
        out = place(torch.full(asked.problem.shape_of(direction.makes), torch.nan, dtype=dtype), at_end=at_end)
        workspace = guarded(torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        algorithm.run(asked, tensors, out, workspace)
        assert held, "the tables were not guarded"
        compare(algorithm, asked, out, *tensors, to_the_bit=False)


def kernel_of(text, **more):
    """The text of the kernel that serves a request whose tensors lie as its output will."""
    texts = []
    asked = asked_for(text, **more)
    x, w = (torch.empty(asked.problem.shape_of(role), device="meta") for role in asked.direction.given)
    if asked.channels_last:
        x, w = channels_inside(x), channels_inside(w)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dense.cpu, "compile", lambda text, target: texts.append(text))
        dense.prepare.__wrapped__(axes.work(asked), x.stride(), w.stride(), asked.channels_last)
    return texts[-1]


@both_layouts
@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("n{n} c64 o64 x{h}x{w} k3x3 p1", Direction.FORWARD),
        ("n{n} c32 o64 x{h}x{w} k1x1", Direction.FORWARD),
        ("n{n} c64 o64 x{h}x{w} k4x4 s2 p1", Direction.GRAD_INPUT),
    ],
)
def test_a_new_size_compiles_nothing(text, direction, channels_last):
    """Batch, height and width are arguments, and so are kernel and dilation; tiles have a few forms."""
    texts = set()
    for n, h, w in [(1, 56, 56), (2, 57, 160), (3, 77, 1001), (4, 1000, 64), (8, 130, 131)]:
        texts.add(kernel_of(text.format(n=n, h=h, w=w), channels_last=channels_last, direction=direction))
    assert len(texts) <= 2


@assembly.every_target
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["n1 c64 o64 x56x56 k3x3 p1", "n1 c256 o64 x56x56 k1x1", "n1 c512 o512 x7x7 k3x3 p1"])
def test_no_sum_is_spilled(target, text, dtype, channels_last, as_if):
    """In the assembly no vector register goes to the stack where products are summed."""
    as_if(target)
    if dtype is torch.float16 and ("half" not in natives(target) or target.machine == "aarch64"):
        pytest.skip(
            "without F16C, half numbers are converted by arithmetic that takes many registers; on ARM too early"
        )
    code = cpu.assembly(kernel_of(text, dtype=dtype, channels_last=channels_last), target)
    sums = [block for block in assembly.blocks(code) if assembly.products(block) >= 4]
    assert max(map(assembly.products, sums)) >= 8
    for block in sums:
        assert not assembly.spills(block, code), "a vector is written to the stack"


@assembly.every_target
@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize(
    ("text", "direction", "channels_last", "reads"),
    [
        ("n1 c3 o64 x56x56 k7x7 s2 p3", Direction.FORWARD, True, cuts.Reads.LINES),
        ("n16 c512 o256 x4x4 k4x4 s2 p1", Direction.GRAD_INPUT, True, cuts.Reads.IMAGES),
        ("n1 c64 o64 x56x56 k3x3 p1", Direction.GRAD_INPUT, False, None),
        ("n1 c64 o64 x56x56 k3x3 p1", Direction.GRAD_INPUT, True, None),
        ("n1 c64 o64 x56x56 k3x3 s2 p1", Direction.GRAD_INPUT, False, None),
        ("n1 c64 o64 x56x56 k3x3 s2 p1", Direction.GRAD_INPUT, True, None),
        ("n1 c32 o32 x4000 k4 s2 p1", Direction.GRAD_INPUT, False, None),
    ],
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_no_sum_is_spilled_of_any_form(target, text, direction, channels_last, reads, dtype, as_if):
    """Lines, several images, and phases of a stride that is turned round."""
    as_if(target)
    if dtype is torch.float16 and ("half" not in natives(target) or target.machine == "aarch64"):
        pytest.skip("see above")
    asked = asked_for(text, dtype, direction, channels_last=channels_last)
    if reads is not None and cuts.natural(axes.work(asked)).reads is not reads:
        pytest.skip("another form is estimated to be quicker")
    code = cpu.assembly(kernel_of(text, dtype=dtype, direction=direction, channels_last=channels_last), target)
    sums = [block for block in assembly.blocks(code) if assembly.products(block) >= 4]
    assert max(map(assembly.products, sums)) >= 6
    for block in sums:
        assert not assembly.spills(block, code), "a vector is written to the stack"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_places_that_lie_apart_are_no_branch_each(dtype):
    """LLVM unrolls scatters and gathers of half types lane by lane: kernels would be many times as long as float's."""
    fused = {"direction": Direction.GRAD_INPUT, "has_residual": True}
    lengths = [
        cpu.assembly(kernel_of("n1 c32 o64 x64x64 k4x4 s2 p1", dtype=of, **fused)).count("\n\tj")
        for of in (torch.float32, dtype)
    ]
    assert lengths[1] <= 1.5 * lengths[0]


def test_the_weight_of_a_small_map_is_not_packed():
    asked = asked_for("n1 c512 o512 x7x7 k3x3 p1")
    assert dense.prepare(axes.work(asked), (25088, 49, 7, 1), (4608, 9, 3, 1), False).weight is None
    assert direct.ALGORITHM.cost(asked).workspace < 4 * 512 * 512 * 9


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
@pytest.mark.parametrize("text", ["n1 c512 o512 x7x7 k1x1", "n1 c256 o512 x7x7 k3x3 p1", "n1 c64 o32 x7x7 k1x1 s2"])
def test_packing_is_dealt_to_all_threads(text, direction):
    """Also that of a 1x1 weight, which lies in both orders."""
    asked = asked_for(text, direction=direction, channels_last=True, threads=2)
    tensors = [channels_inside(tensor) for tensor in given(asked, reals)[:2]]
    for w in (tensors[1], tensors[1].contiguous()):
        inside = not w.is_contiguous()
        packs = dense.prepare(axes.work(asked), tensors[0].stride(), w.stride(), inside).weight
        assert packs.tasks >= 2
        assert packs.tasks % 2 == 0 or packs.tasks >= cuts.PARTS


@pytest.mark.parametrize(
    ("text", "direction", "least", "most"),
    [
        ("n1 c8 o32 x1001 k2", Direction.FORWARD, 0, 0.2),
        ("n1 c8 o32 x1001 k3 p1", Direction.FORWARD, 0, 0.3),
        ("n1 c32 o8 x1001 k2", Direction.GRAD_INPUT, 0, 0.3),
        ("n1 c5 o32 x32768 k2", Direction.FORWARD, 0.9, 1.1),  # a power of two apart
        ("n1 c33 o32 x1001 k2", Direction.FORWARD, 0.9, 1.1),
        ("n1 c8 o129 x1001 k2", Direction.FORWARD, 0.9, 1.1),
    ],
)
def test_a_row_is_read_where_it_lies(text, direction, least, most):
    """Where products are few, no more of it is gathered than what meets the border."""
    asked = asked_for(text, direction=direction)
    seen = axes.work(asked)
    tensors = given(asked, reals)
    workspace = torch.full((direct.ALGORITHM.cost(asked).workspace,), 0xFF, dtype=torch.uint8)
    direct.ALGORITHM.run(asked, tensors, torch.empty(asked.problem.shape_of(direction.makes)), workspace)
    one, is_ = cuts.natural(seen), cuts.kind(seen)
    strip, _ = dense._share(is_, one, "rows", *cuts.pitches(one.strip, one.lanes, is_.size, is_.channels))
    gathered = workspace[:strip].view(torch.float32).isnan().logical_not().sum().item()
    share = gathered / (seen.group_in * one.strip.length)
    assert least <= share <= most


def test_a_workspace_is_kept_small_on_request():
    asked = asked_for("n1 c256 o16 x64x64 k3x3 p1")
    few = dataclasses.replace(asked, max_workspace=direct.ALGORITHM.cost(asked).workspace // 2)
    assert direct.ALGORITHM.cost(few).workspace <= few.max_workspace
    check(direct.ALGORITHM, few, integers)


@both_layouts
@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("n1 c512 o486 x75x75 k3x3 s3x3 p1x1", Direction.FORWARD),
        ("n1 c256 o512 x82x82 k3x3 s2x2 p1x1", Direction.FORWARD),
        ("n1 c64 o128 x166x166 k3x3", Direction.GRAD_INPUT),
    ],
)
def test_strips_stay_in_the_caches(text, direction, channels_last):
    """A strip of the whole image would be read again from memory for each tile of outputs."""
    asked = asked_for(text, direction=direction, channels_last=channels_last, threads=2)
    one, is_ = cuts.natural(axes.work(asked)), cuts.kind(axes.work(asked))
    by_row, _ = cuts.pitches(one.strip, one.lanes, is_.size, is_.channels)
    if channels_last:
        assert one.reads is cuts.Reads.LIST
    else:
        assert asked.threads * is_.channels * by_row * is_.size <= cuts.CACHE // 2


@pytest.mark.parametrize(
    ("text", "slow"), [("n1 c512 o512 x7x7 k3x3 p1x1", True), ("n1 c512 o1024 x19 k3 p6 d6", False)]
)
def test_a_large_turned_weight_is_estimated_to_be_slow(text, slow):
    """Of a contiguous weight, each step of the gradient for the input reads another page; narrow vectors wait less."""
    forward, turned = (
        direct.ALGORITHM.cost(asked_for(text, direction=direction)).seconds
        for direction in (Direction.FORWARD, Direction.GRAD_INPUT)
    )
    assert (turned > (2 if cpu.Target.host().bits == 512 else 1.2) * forward) is slow


@both_layouts
def test_taps_wholly_in_the_padding_are_skipped(channels_last):
    """Of 3 depths of the kernel only one meets an input of depth 1: an infinity in the others is not seen."""
    asked = asked_for("n1 c2 o8 x1x5x20 k3x3x3 p1", channels_last=channels_last)
    first, second, *_ = given(asked, integers)
    second[:, :, 0], second[:, :, 2] = torch.inf, torch.nan
    expected = torch.nn.functional.conv2d(first[:, :, 0], second[:, :, 1], padding=1)
    out = torch.full(asked.problem.output_shape, torch.nan)
    if channels_last:
        first, second, out = map(channels_inside, (first, second, out))
    workspace = torch.empty(direct.ALGORITHM.cost(asked).workspace, dtype=torch.uint8)
    direct.ALGORITHM.run(asked, Tensors(first, second), out, workspace)
    assert torch.equal(out[:, :, 0], expected)


def test_tile_counts_of_the_kernel():
    """Of all that a shape can say, only what the tile and the types are makes a new text."""
    shape = kernel.Shape(
        "float", "float", frozenset(), False, 16, "places", "rows", 1, 0, False, False, 0, False, False, None, 8, 3
    )
    assert kernel.text(shape) is kernel.text(dataclasses.replace(shape))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_depth_that_no_tap_reaches_is_zero(channels_last):
    """One tap, and a stride of the depth: every second plane of the gradient has no product at all."""
    asked = asked_for(
        "n2 c3 o2 x2x1x1 k1x1x1 s2x1x1 p0x0x0:1", direction=Direction.GRAD_INPUT, channels_last=channels_last
    )
    check(pointwise.ALGORITHM, asked, integers)


@pytest.mark.parametrize(
    ("along", "size", "bits", "lanes"),
    [
        *((19, 4, 512, 8), (36, 4, 512, 8), (24, 4, 512, 8), (9, 4, 512, 16), (32, 4, 512, 16), (7, 4, 512, 8)),
        *((3, 4, 512, 4), (19, 4, 256, 8), (4, 4, 256, 8), (9, 8, 512, 4), (8, 8, 512, 8), (2, 8, 128, 2)),
    ],
)
def test_lanes_of_the_fewest_cycles(along, size, bits, lanes):
    """A quarter of a register takes as long as half of one, so more of them are no gain."""
    assert engine.fewer_idle(along, size, cpu.Target("", "", "", bits)) == lanes
