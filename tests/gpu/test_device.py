"""On a GPU, where there is one: what the interpreter and the compiler cannot say.

    python -m pytest tests/gpu/test_device.py -n 8                  values, gradients, graphs, streams, far memory
    compute-sanitizer python -m pytest tests/gpu/test_device.py -k small

Kernels are compiled for nearly every case, so several processes help.
"""

import functools

import checks
import pytest
import torch
from ahead import TYPES, typical
from checks import ACTIVATIONS, CASES, channels_last, expanded, reals, spread
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch_samples import (
    FUNCTIONS,
    assert_served,
    assert_within,
    call,
    exact_result,
    explained,
    our_function,
    samples,
    small,
    torch_function,
)

import plainconv
from plainconv import bench
from plainconv.bench import calls
from plainconv.bench.cuda import Cuda, Gpu
from plainconv.gpu import launch, matrices
from plainconv.inference import MOST_MADE
from plainconv.menu.base import FLOATS
from plainconv.problem import ConvProblem, Direction, Request

DEVICE = "cuda"
SWITCH = torch.backends.cudnn.conv
OURS = ("direct", "pointwise", "narrow", "depthwise", "winograd")  # kernels of our own
OTHERS = ("shift", "im2col", "fft", "reference")
FAR_BYTES = 40 << 30  # of memory, for tensors of more than 2^31 elements

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not())),
]
directions = pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
formats = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def _exact():
    """float32 as it is, unless a test says otherwise."""
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "ieee"
    plainconv.plan.forget()
    yield
    SWITCH.fp32_precision = before
    plainconv.plan.forget()


def asked(text: str, direction: Direction, dtype: torch.dtype = torch.float32, **more: object) -> Request:
    return Request(ConvProblem.parse(text), direction, dtype, DEVICE, **more)


def able(request: Request) -> list[str]:
    """Those of our own that serve it."""
    return [name for name in OURS if checks.BY_NAME[name].why_not(request) is None]


def check(name: str, request: Request, values=checks.integers, layout=None) -> None:
    checks.check(checks.BY_NAME[name], request, values, layout, device=DEVICE)


# -- values ----------------------------------------------------------------------------------------------------------

# Each case in one format, in turn; in the other it is slow.
EVERY = [
    pytest.param(text, direction, last, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)
    for i, text in enumerate(CASES.values())
    for j, direction in enumerate(Direction)
    for k, last in enumerate((False, True))
]


@pytest.mark.parametrize(("text", "direction", "last"), EVERY)
def test_every_border_stride_and_rank(text, direction, last):
    request = asked(text, direction, channels_last=last)
    names = able(request)
    assert names, "direct or pointwise serve everything"
    for name in names:
        check(name, request, layout=channels_last if last else None)


@directions
@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_small_problems_of_every_type(dtype, direction, last):
    for text in ("n2 c6 o16 x5x6 k3x3 s1x2 p1 g2", "n2 c8 o8 x7x6 k3x3 s1x2 p1 g8", "n2 c9 o12 x5x4 k1x1"):
        request = asked(text, direction, dtype, channels_last=last)
        for name in able(request):
            check(name, request, layout=channels_last if last else None)
            check(name, request, reals, channels_last if last else spread)


@pytest.mark.parametrize("row", matrices.IMPLICIT, ids=lambda row: f"{row.outputs} outputs")
@pytest.mark.parametrize("name", TYPES)
@directions
def test_every_row_of_the_tables(row, name, direction):
    """Real sizes: many programs, steps and parts."""
    dtype, tf32 = TYPES[name]
    for last in (False, True):
        request = asked(typical(row.outputs, direction), direction, dtype, channels_last=last, tf32=tf32)
        check("direct", request, reals, channels_last if last else None)


FEW = ("n8 c64 o64 x28x28 k3x3 p1 g64", "n8 c3 o8 x64x60 k5x5 p2", "n4 c32 o32 x999 k4 p3 g32")


@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@directions
def test_few_channels(text, dtype, direction):
    for last in (False, True):
        request = asked(text, direction, dtype, channels_last=last)
        for name in set(able(request)) - {"direct"}:
            check(name, request, reals, channels_last if last else None)


MANY = ("n8 c64 o48 x56x54 k3x3 p1", "n4 c48 o80 x999 k3 p1 g2", "n2 c32 o32 x9x20x21 k3x3x2 p1")


@pytest.mark.parametrize("text", MANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@directions
def test_winograd_of_many_tiles(text, dtype, direction):
    """At once, and in several chunks."""
    for last in (False, True):
        whole = asked(text, direction, dtype, channels_last=last)
        check("winograd", whole, reals, channels_last if last else None)
        room = checks.BY_NAME["winograd"].cost(whole).workspace // 2
        check("winograd", asked(text, direction, dtype, channels_last=last, max_workspace=room), reals)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
def test_small_problems_with_what_is_fused(activation, direction):
    for text in ("n2 c4 o6 x4x5 k2x3 s2x1 p1 g2", "n2 c12 o16 x6x7 k3x3 p1"):
        more = {"has_bias": True, "has_residual": True, "activation": activation}
        request = asked(text, direction, torch.bfloat16, **more)
        for name in able(request):
            check(name, request, reals)


@pytest.mark.parametrize("layout", [spread, expanded])
def test_a_small_bias_that_lies_otherwise(layout):
    for text in ("n2 c12 o6 x4x5 k2x3 s2x1 p1 g2", "n2 c9 o12 x5x4 k1x1", "n2 c8 o8 x7x6 k3x3 p1 g8"):
        request = asked(text, Direction.FORWARD, has_bias=True)
        for name in able(request):
            checks.check(checks.BY_NAME[name], request, device=DEVICE, of_bias=layout)


@directions
def test_the_same_call_gives_the_same_bits(direction):
    for text in ("n8 c64 o64 x28x28 k3x3 p1", "n8 c64 o64 x28x28 k3x3 p1 g64"):
        request = asked(text, direction, torch.float32)
        given = [tensor.to(DEVICE) for tensor in checks.given(request, reals)[:2]]
        for name in able(request):
            first, *others = (checks.result_of(checks.BY_NAME[name], request, *given) for _ in range(5))
            assert all(torch.equal(first, other) for other in others)


# -- torch's samples -------------------------------------------------------------------------------------------------


def on_device(sample):
    return sample.transform(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf)


@every_function
@pytest.mark.parametrize("algorithm", ["auto", *OURS, *OTHERS])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float16, torch.complex64)),
    ],
    ids=str,
)
def test_values_are_torchs(name, algorithm, dtype):
    for sample in samples(name, dtype):
        there = on_device(sample)
        told = explained(name, there, algorithm)
        if algorithm in ("auto", told.chosen):
            made = call(our_function(name), there, algorithm=algorithm)
            assert made.device.type == DEVICE
            assert_served(made.cpu(), *exact_result(torch_function(name), sample), told)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_torchs(name, dtype):
    for sample in small(samples(name, dtype), 300):
        tensors = [sample.input, *(arg for arg in sample.args if arg is not None)]
        leaves = [tensor.detach().to(DEVICE).requires_grad_() for tensor in tensors]
        exact_leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
        absolute_leaves = [tensor.detach().double().abs().requires_grad_() for tensor in tensors]
        ours = our_function(name)(*leaves, **sample.kwargs)
        theirs = torch_function(name)(*exact_leaves, **sample.kwargs)
        absolute = torch_function(name)(*absolute_leaves, **sample.kwargs)
        cotangent = torch.randn(ours.shape, dtype=dtype)
        got = torch.autograd.grad(ours, leaves, cotangent.to(DEVICE))
        wanted = torch.autograd.grad(theirs, exact_leaves, cotangent.double())
        sums = torch.autograd.grad(absolute, absolute_leaves, cotangent.double().abs())
        terms = max(sample.input.numel(), ours.numel(), sample.args[0].numel())
        for gradient, exact, total in zip(got, wanted, sums, strict=True):
            assert_within(gradient.cpu(), exact, total, terms + 60, spread=True)


@every_function
def test_gradcheck_passes(name):
    for sample in small(samples(name, torch.float64), 60)[:4]:
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (sample.input, *sample.args) if t is not None]

        def function(*given, kwargs=sample.kwargs):
            return our_function(name)(*given, **kwargs)

        assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


# -- how torch calls -------------------------------------------------------------------------------------------------

SHAPES = {
    "direct": ((2, 32, 12, 12), (48, 32, 3, 3), 1),
    "pointwise": ((2, 32, 12, 12), (48, 32, 1, 1), 1),
    "narrow": ((2, 3, 20, 20), (4, 3, 3, 3), 1),
    "depthwise": ((2, 8, 12, 12), (8, 1, 3, 3), 8),
}


@pytest.mark.parametrize("name", [*OURS, *OTHERS, "auto"])
def test_a_graph_captures_a_step_after_a_first_one(name):
    """And replays it on other values."""
    shape, weight, groups = SHAPES.get(name, SHAPES["direct"])
    x, w = (torch.randn(sizes, device=DEVICE, requires_grad=True) for sizes in (shape, weight))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        x.grad = w.grad = None
        y = plainconv.conv2d(x, w, padding=1, groups=groups, algorithm=name)
        y.sum().backward()
        return y

    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = step()
    held = y, x.grad, w.grad
    with torch.no_grad():
        x.normal_()
        w.normal_()
    graph.replay()
    torch.cuda.synchronize()
    captured = [tensor.clone() for tensor in held]
    eager = step(), x.grad, w.grad
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_work_goes_to_the_current_stream(name):
    """Behind what is under way there, and nowhere else."""
    shape, weight, groups = SHAPES.get(name, SHAPES["direct"])
    x, w = torch.zeros(shape, device=DEVICE), torch.randn(weight, device=DEVICE)
    filled = torch.randn(shape, device=DEVICE)
    expected = plainconv.conv2d(filled, w, padding=1, groups=groups, algorithm=name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(filled)
        made = plainconv.conv2d(x, w, padding=1, groups=groups, algorithm=name)
    assert not stream.query(), "nothing waited for it"
    stream.synchronize()
    assert torch.equal(made, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_device_that_is_not_the_current_one():
    x, w = torch.randn(2, 32, 9, 9), torch.randn(32, 32, 3, 3)
    with torch.cuda.device(0):
        made = plainconv.conv2d(x.to("cuda:1"), w.to("cuda:1"), algorithm="direct")
        again = plainconv.conv2d(x.to("cuda:0"), w.to("cuda:0"), algorithm="direct")
    assert (made.device.index, again.device.index) == (1, 0)
    assert torch.equal(made.cpu(), again.cpu())


def test_the_switch_for_tf32():
    x, w = torch.randn(4, 64, 20, 20, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)

    def made(precision: str, **more: object) -> Tensor:
        SWITCH.fp32_precision = precision
        return plainconv.conv2d(x, w, **more)

    exact = made("ieee", algorithm="direct")
    rounded = made("tf32", algorithm="direct")
    assert not torch.equal(exact, rounded)
    assert torch.equal(exact, made("tf32", algorithm="direct", precision="highest"))
    assert torch.allclose(exact, rounded, rtol=0, atol=0.5)
    x, w = x[:, :3], w[:3, :3]
    assert torch.equal(made("ieee", algorithm="narrow"), made("tf32", algorithm="narrow"))


@pytest.mark.slow
def test_autocast_and_compile():
    layer = plainconv.nn.Conv2d(16, 32, 3, padding=1).to(DEVICE)
    x = torch.randn(2, 16, 12, 12, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.allclose(compiled(x), layer(x))


def test_a_weight_that_stays():
    for dtype in (torch.float32, torch.bfloat16):
        layer = plainconv.nn.Conv2d(16, 32, 3, padding=1).to(DEVICE, dtype).requires_grad_(False)
        x = torch.randn(2, 16, 12, 12, device=DEVICE, dtype=dtype)
        assert torch.equal(plainconv.prepack(layer, x.shape)(x), layer(x))


def test_a_graph_keeps_a_weight_that_stays_whatever_is_packed_after():
    w, x = torch.randn(16, 16, 9, 9, device=DEVICE), torch.randn(2, 16, 20, 20, device=DEVICE)
    fast = plainconv.prepack(w, x.shape, padding=4, algorithm="direct")
    expected = fast(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    for size in range(1, 2 + MOST_MADE):  # in each of these maps other taps see nothing but padding
        fast(x[..., :size, :size])
        torch.randn(1 << 20, device=DEVICE)
    assert len(fast._made) > MOST_MADE
    graph.replay()
    assert torch.equal(y, expected)


# -- far memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["direct", "narrow", "depthwise", "winograd"])
def test_more_than_2_31_elements(name, last):
    """The last image lies behind them; alone it must give the same bits, and a gradient of nothing else."""
    if torch.cuda.mem_get_info()[0] < FAR_BYTES:
        pytest.skip("it takes 40 GB of a GPU's memory")
    c, size, groups = {"narrow": (4, 8192, 1), "depthwise": (16, 4096, 16)}.get(name, (16, 4096, 1))
    like = torch.channels_last if last else torch.contiguous_format
    dtype, same = torch.bfloat16, torch.equal
    if name == "winograd":  # its transforms round, and tiles of the image alone begin elsewhere
        dtype, same = torch.float32, functools.partial(torch.allclose, rtol=1e-4, atol=1e-2)
    x = torch.zeros(9, c, size, size, device=DEVICE, dtype=dtype).contiguous(memory_format=like)
    assert x.numel() > 1 << 31
    x[-1, :, -64:, -64:] = torch.randint(-2, 3, (c, 64, 64), device=DEVICE).to(x.dtype)
    w = torch.randint(-2, 3, (c, c // groups, 3, 3), device=DEVICE).to(x.dtype)
    options = {"padding": 1, "groups": groups, "algorithm": name}

    y = plainconv.conv2d(x, w, **options)
    alone = x[-1:, :, -70:, -70:].clone(memory_format=like)
    expected = plainconv.conv2d(alone, w, **options)
    assert same(y[-1:, :, -64:, -64:], expected[:, :, -64:, -64:])
    assert not y[:-1].any()
    del y

    one = x[-1:, :, -70:, -70:].clone(memory_format=like)
    y = plainconv.conv_transpose2d(x, w, **options)
    assert same(y[-1:, :, -64:, -64:], plainconv.conv_transpose2d(one, w, **options)[:, :, -64:, -64:])
    del y

    def gradient(x: Tensor) -> Tensor:
        weight = w.clone().requires_grad_()
        y = plainconv.conv2d(x, weight, **options)
        return torch.autograd.grad(y, weight, x)[0]

    assert same(gradient(x), gradient(one))


# -- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", calls.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_right_and_have_a_speed(direction, dtype):
    layers = [bench.load()[suite][0] for suite in ("seed_mnist", "mobilenet_v1_depthwise", "dcgan_transposed")]
    place = Cuda(Gpu(torch.device(DEVICE)))
    with bench.alone(1, place):
        peaks = place.peaks(dtype, 1, direction, 0.05)
        setting = bench.Setting(direction, dtype, 1, peaks, seconds=0.05, device=place)
        for layer in layers:
            row = bench.measure(layer, setting)
            assert row.right, row.checks
            assert row.share < 1.3, "a layer is not quicker than the machine allows"
            assert row.eager["ours"].median_s > 0.9 * row.ours[row.our_best].median_s
        assert {"gpu", "cuda", "triton"} <= set(place.told())
