"""The operators: three ways in and one answer, every derivative, transforms, fake tensors, compilation, autocast."""

import contextlib
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from checks import CASES, DIRECTIONS, EVERYWHERE, channels_last, integers, reals
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

import plainconv
from plainconv import ops
from plainconv import plan as plans
from plainconv.problem import ConvProblem, Direction
from plainconv.settings import Settings

directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)


@contextlib.contextmanager
def ways():
    """A list of the answers of the predicate: True where a call went the plain way."""
    plans.forget()  # a call that is remembered is not looked at again
    answers, real = [], ops.watching

    def watched(*tensors):
        watch = real(*tensors)
        answers.append(watch is ops.Watch.NOTHING)
        return watch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "watching", watched)
        yield answers


def test_a_request_knows_which_gpu_its_tensors_are_on(monkeypatch):
    """And does not depend on the CPU's threads there."""
    asked = []

    def plan(request, name):
        asked.append((request.place, request.threads))
        raise LookupError

    monkeypatch.setattr(ops, "plan", plan)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    make = ops.Make(Direction.FORWARD, (1, 3, 6), ConvProblem.parse("n1 c2 o3 x8 k3").geometry)
    for name, cuda in (("cuda:1", True), ("cpu", False)):
        first, second = (
            SimpleNamespace(shape=shape, dtype=torch.float64, device=torch.device(name), is_cuda=cuda)
            for shape in ((1, 2, 8), (3, 2, 3))
        )
        with pytest.raises(LookupError):
            ops.ready(first, second, None, make)
    assert asked == [(torch.device("cuda:1"), 1), (torch.device("cpu"), 7)]


@contextlib.contextmanager
def always_plain():
    """What would happen without the predicate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "watching", lambda *tensors: ops.Watch.NOTHING)
        plans.forget()
        yield
    plans.forget()


class Seen(TorchDispatchMode):
    """Every operator that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def ours(self):
        return sorted(name.split(".")[1] for name in self.names if name.startswith("plainconv"))


def images(*shape, dtype=torch.float64, grad=False):
    return reals(shape, dtype, sum(shape)).requires_grad_(grad)


def of_problem(text, direction, dtype=torch.float64, bias=False, last=False, algorithm="auto"):
    """The arguments of `convolve` for a problem's text."""
    problem = ConvProblem.parse(text)
    first, second = (reals(problem.shape_of(role), dtype, seed) for seed, role in enumerate(direction.given))
    shape = problem.shape_of(direction.makes)
    bias = reals((shape[1],), dtype, 7) if bias and direction is not Direction.GRAD_WEIGHT else None
    return first, second, bias, ops.Make(direction, shape, problem.geometry, last, Settings(algorithm))


X, W, B = (2, 3, 6, 7), (4, 3, 3, 2), (4,)


# -- the direct way in -----------------------------------------------------------------------------------------------


def test_plain_tensors_and_parameters_go_the_plain_way():
    x, w, b = images(*X), torch.nn.Parameter(images(*W)), images(*B)
    expected = F.conv2d(x, w, b)
    with ways() as answers, torch.no_grad():
        torch.testing.assert_close(plainconv.conv2d(x, w, b), expected)
        plainconv.conv_transpose2d(expected.detach(), w)
    plain = plainconv.conv2d(x, w.detach())
    with ways() as more:
        assert torch.equal(plainconv.conv2d(x, w.detach(), algorithm="auto"), plain)
        torch.testing.assert_close(plainconv.conv2d(channels_last(x), w.detach()[:]), plain)
    assert answers == [True, True]
    assert more == [True, True]


def test_condition_requires_grad():
    x, w, b = images(*X), images(*W), images(*B)
    for watched in (x, w, b):
        watched.requires_grad_()
        with ways() as answers:
            assert plainconv.conv2d(x, w, b).requires_grad
        assert answers[0] is False
        with always_plain():
            y = None
            with contextlib.suppress(RuntimeError):
                y = plainconv.conv2d(x, w, b, algorithm="im2col")
            assert y is None or "_Recorded" not in str(y.grad_fn)
        with ways() as answers, torch.no_grad():
            assert not plainconv.conv2d(x, w, b).requires_grad
        assert answers == [True]
        watched.requires_grad_(False)


def test_a_gradient_alone_is_recorded_by_the_small_function():
    """The other Function has rules for all that may watch, and would do as well, but for its cost."""
    x, w, b = images(*X, grad=True), images(*W, grad=True), images(*B, grad=True)
    y = plainconv.conv2d(x, w, b, padding=1)
    assert type(y.grad_fn).__name__ == "_RecordedBackward"
    with torch.autocast("cpu"):
        assert type(plainconv.conv2d(x, w, b).grad_fn).__name__ == "_ConvolutionBackward"
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    theirs = F.conv2d(x, w, b, padding=1)
    (expected,) = torch.autograd.grad(theirs.square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    for ours, torchs in zip(
        torch.autograd.grad(first.square().sum(), (x, w, b)),
        torch.autograd.grad(expected.square().sum(), (x, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


def test_what_was_recorded_outside_a_transform_is_differentiated_within():
    x, w = images(*X, grad=True), images(*W, grad=True)
    y, theirs = plainconv.conv2d(x, w), F.conv2d(x, w)
    cotangents, tangents = images(3, *y.shape), images(*y.shape) + 1

    def pull(y, c):
        return torch.autograd.grad(y, (x, w), c, retain_graph=True, create_graph=True)

    mapped = torch.func.vmap(lambda c: pull(y, c))(cotangents)
    for ours, *each in zip(mapped, *(pull(theirs, c) for c in cotangents), strict=True):
        torch.testing.assert_close(ours, torch.stack(each))
    with forward_ad.dual_level():
        for ours, torchs in zip(pull(y, forward_ad.make_dual(tangents, tangents)), pull(theirs, tangents), strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(ours).tangent, torchs)


class Wrapped(torch.Tensor):
    """A wrapper that keeps its numbers in `inner` and counts what is done to it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        wrapped = tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


@pytest.mark.parametrize("grad", [False, True])
def test_condition_subclass_of_dispatch(grad):
    x, w = images(*X), images(*W)
    Wrapped.seen.clear()
    with ways() as answers:
        y = plainconv.conv2d(Wrapped(x.requires_grad_(grad)), w, padding=1)
    assert answers[0] is False
    assert type(y) is Wrapped
    assert Wrapped.seen == ["plainconv.forward.default"]
    torch.testing.assert_close(y.inner, F.conv2d(x, w, padding=1).detach())
    if not grad:
        with always_plain():  # the numbers do not lie in the wrapper, and its result would be no wrapper
            assert type(plainconv.conv2d(Wrapped(x), torch.zeros_like(w), algorithm="shift")) is torch.Tensor


def test_a_wrapper_gets_wrapped_gradients():
    x, w = Wrapped(images(*X, grad=True)), images(*W, grad=True)
    y = plainconv.conv2d(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    plain = images(*X, grad=True)
    expected = torch.autograd.grad(F.conv2d(plain, w).sum(), (plain, w))
    assert type(dx) is Wrapped
    torch.testing.assert_close(dx.inner, expected[0])
    torch.testing.assert_close(dw.inner, expected[1])


def test_condition_subclass_of_function():
    """has_torch_function is asked at the door, so that a subclass sees the call itself, by name."""
    calls = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append((func, kwargs))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, w = images(*X), images(*W)
    for which in ((x.as_subclass(Named), w), (x, w.as_subclass(Named))):
        calls.clear()
        y = plainconv.conv2d(*which, stride=2, padding="causal", padding_mode="reflect", algorithm="im2col")
        assert type(y) is Named
        assert calls[0][0] is plainconv.conv2d
        assert calls[0][1]["padding"] == "causal"
        assert calls[0][1]["algorithm"] == "im2col"
        expected = plainconv.conv2d(x, w, stride=2, padding="causal", padding_mode="reflect")
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
    y = plainconv.conv_transpose2d(expected.as_subclass(Named), w, output_padding=1, stride=2)
    assert calls[-1][0] is plainconv.conv_transpose2d or any(f is plainconv.conv_transpose2d for f, _ in calls)
    assert type(y) is Named


def test_condition_conjugate_bit():
    x, w, b = (images(*shape, dtype=torch.complex128) for shape in (X, W, B))
    expected = F.conv2d(x.conj().resolve_conj(), w, b)
    for algorithm in ("auto", *EVERYWHERE):
        assert x.conj().is_conj()
        with ways() as answers:
            torch.testing.assert_close(plainconv.conv2d(x.conj(), w, b, algorithm=algorithm), expected)
            torch.testing.assert_close(
                plainconv.conv2d(x, w.conj(), b.conj(), algorithm=algorithm), expected.conj().resolve_conj()
            )
        assert answers == [False, False]


def test_condition_negative_bit():
    z = images(*X, dtype=torch.complex128)
    x, w = z.conj().imag, images(*W)
    assert x.is_neg()
    for algorithm in EVERYWHERE:
        with ways() as answers:
            torch.testing.assert_close(plainconv.conv2d(x, w, algorithm=algorithm), F.conv2d(x.resolve_neg(), w))
        assert answers == [False]


def test_condition_forward_level():
    x, w, t = images(*X), images(*W), images(*X) + 1
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        with ways() as answers:
            y, tangent = forward_ad.unpack_dual(plainconv.conv2d(dual, w))
        assert answers[0] is False
        torch.testing.assert_close(y, F.conv2d(x, w))
        torch.testing.assert_close(tangent, F.conv2d(t, w))
        with always_plain():
            lost = None
            with contextlib.suppress(RuntimeError, NotImplementedError):
                lost = forward_ad.unpack_dual(plainconv.conv2d(dual, w, algorithm="loops")).tangent
            assert lost is None


def test_condition_functorch_level():
    x, w = images(5, *X), images(*W)
    expected = torch.stack([F.conv2d(one, w) for one in x])
    with ways() as answers:
        torch.testing.assert_close(torch.func.vmap(lambda one: plainconv.conv2d(one, w))(x), expected)
    assert answers[0] is False
    with always_plain(), pytest.raises(RuntimeError):
        torch.func.vmap(lambda one: plainconv.conv2d(one, w, algorithm="loops"))(x)


def test_condition_legacy_vmap():
    """torch.autograd.grad(is_grads_batched=True) maps by other means than torch.func."""
    x, w = images(*X, grad=True), images(*W, grad=True)
    y, theirs = plainconv.conv2d(x, w), F.conv2d(x, w)
    cotangents = images(3, *y.shape)
    with ways() as answers:
        found = torch.autograd.grad(y, (x, w), cotangents, is_grads_batched=True)
    assert answers
    assert not any(answers)
    for ours, each in zip(
        found,
        zip(*(torch.autograd.grad(theirs, (x, w), c, retain_graph=True) for c in cotangents), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, torch.stack(each))


def test_condition_dispatch_mode():
    x, w = images(*X), images(*W)
    with ways() as answers, Seen() as seen:
        plainconv.conv2d(x, w)
    assert answers == [False]
    assert seen.ours == ["forward"]
    with always_plain(), Seen() as seen:
        plainconv.conv2d(x, w)
    assert seen.ours == [], "the plain way is not seen by a mode"


def test_condition_function_mode():
    calls = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x, w = images(*X), images(*W)
    with Watch():
        y = plainconv.conv2d(x, w)
    assert calls[0] is plainconv.conv2d
    torch.testing.assert_close(y, F.conv2d(x, w))


@pytest.mark.parametrize("algorithm", EVERYWHERE)
def test_condition_a_default_device_is_a_function_mode(algorithm):
    x, w = images(*X), images(*W)
    with torch.device("meta"):
        y = plainconv.conv2d(x, w, algorithm=algorithm)
    torch.testing.assert_close(y, F.conv2d(x, w))


def test_condition_jit_tracing():
    x, w = images(*X), images(*W)
    with ways() as answers:
        traced = torch.jit.trace(lambda x, w: plainconv.conv2d(x, w, padding=1), (x, w), check_trace=False)
    assert answers == [False]
    torch.testing.assert_close(traced(x + 1, w), F.conv2d(x + 1, w, padding=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", *EVERYWHERE])
def test_condition_autocast(dtype, algorithm):
    x, w, b = (images(*shape, dtype=torch.float32) for shape in (X, W, B))
    narrow = plainconv.conv2d(x.to(dtype), w.to(dtype), b.to(dtype), algorithm=algorithm)
    with ways() as answers, torch.autocast("cpu", dtype):
        y = plainconv.conv2d(x, w, b, algorithm=algorithm)
    assert answers == [False]
    assert torch.equal(y, narrow), "products inside are in the types that the algorithm chose"
    with ways() as answers, torch.autocast("cpu", enabled=False):
        plainconv.conv2d(x, w, b)
    assert answers == [True]


def test_condition_meta():
    x, w = images(*X).to("meta"), images(*W).to("meta")
    with ways() as answers:
        y = plainconv.conv2d(channels_last(x), w, padding=1)
    assert answers == [False]
    assert (y.device.type, y.shape) == ("meta", (2, 4, 6, 8))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "nested", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused_in_a_sentence(make):
    x, w = images(*X, dtype=torch.float32), images(*W, dtype=torch.float32)
    with pytest.raises((NotImplementedError, RuntimeError)) as caught:
        plainconv.conv2d(make(x), w)
    assert len(str(caught.value)) > 20


# -- gradients -------------------------------------------------------------------------------------------------------

CALLS = {
    "conv1d": (plainconv.conv1d, (2, 4, 7), (2, 2, 3), (2,), {"stride": 2, "padding": ((2, 1),), "groups": 2}),
    "conv2d": (plainconv.conv2d, (2, 2, 4, 5), (3, 2, 2, 3), (3,), {"padding": "same_lower", "stride": (2, 1)}),
    "conv2d reflect": (
        plainconv.conv2d,
        (1, 2, 4, 3),
        (2, 2, 3, 3),
        (2,),
        {"padding": ((2, -1), (1, 2)), "padding_mode": "reflect"},
    ),
    "conv3d": (plainconv.conv3d, (1, 1, 3, 3, 4), (2, 1, 2, 2, 2), (2,), {"padding": 1, "dilation": (1, 2, 1)}),
    "transposed": (
        plainconv.conv_transpose2d,
        (2, 2, 3, 3),
        (2, 1, 2, 3),
        (2,),
        {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2},
    ),
    "transposed circular": (
        plainconv.conv_transpose1d,
        (2, 2, 6),
        (2, 3, 3),
        (3,),
        {"padding": ((2, 1),), "padding_mode": "circular"},
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


def call_of(name, dtype, grad=True):
    function, x, w, b, options = CALLS[name]
    tensors = [images(*shape, dtype=dtype).requires_grad_(grad) for shape in (x, w, b)]
    return (lambda *given: function(*given, **options)), tensors


@calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_first_derivatives(name, dtype):
    function, tensors = call_of(name, dtype)
    assert gradcheck(
        function,
        tensors,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_second_derivatives(name, dtype):
    function, tensors = call_of(name, dtype)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv1d", "transposed circular"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_entry_by_entry(name, dtype):
    """What fast_mode projects on random vectors, in full."""
    function, tensors = call_of(name, dtype)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    if dtype is torch.float64:
        assert gradgradcheck(function, tensors)


@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_of_each_direction(direction, dtype):
    first, second, bias, make = of_problem("n2 c2 o4 x5x4 k3x2 s2x1 p1:2x1 g2 mreplicate", direction, dtype, bias=True)
    tensors = [t.requires_grad_() for t in (first, second, bias) if t is not None]

    def function(first, second, bias=None):
        return ops.convolve(first, second, bias, make)

    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


def test_third_derivatives_are_torchs():
    def third(convolution):
        x, w = images(1, 2, 5, 5, grad=True), images(2, 2, 3, 3, grad=True)
        total = convolution(x, w, padding=1).pow(3).sum()
        for _ in range(2):
            total = sum((g * g).sum() for g in torch.autograd.grad(total, (x, w), create_graph=True))
        return torch.autograd.grad(total, (x, w))

    for ours, theirs in zip(third(plainconv.conv2d), third(F.conv2d), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    "wanted", [set(s) for n in (1, 2, 3) for s in itertools.combinations("xwb", n)], ids=lambda s: "".join(sorted(s))
)
def test_only_what_needs_a_gradient_is_computed(wanted):
    x, w, b = images(*X), images(*W), images(*B)
    leaves = [t.requires_grad_() for name, t in zip("xwb", (x, w, b), strict=True) if name in wanted]
    y = plainconv.conv2d(x, w, b)
    with Seen() as seen:
        torch.autograd.grad(y.sum(), leaves)
    assert seen.ours == sorted({"x": "grad_input", "w": "grad_weight"}[name] for name in wanted - {"b"})


@pytest.mark.parametrize("wanted", ["y", "w"])
def test_only_what_needs_a_gradient_is_computed_transposed(wanted):
    y, w = images(2, 4, 5, 5), images(4, 3, 3, 3)
    leaf = {"y": y, "w": w}[wanted].requires_grad_()
    x = plainconv.conv_transpose2d(y, w)
    with Seen() as seen:
        torch.autograd.grad(x.sum(), leaf)
    assert seen.ours == [{"y": "forward", "w": "grad_weight"}[wanted]]


def test_a_gradient_that_nobody_asks_for_is_not_computed_either():
    x, w = images(*X, grad=True), images(*W, grad=True)
    y = plainconv.conv2d(x, w)
    with Seen() as seen:
        torch.autograd.grad(y.sum(), x)
    assert seen.ours == ["grad_input"]


@pytest.mark.parametrize("algorithm", EVERYWHERE)
def test_gradients_use_the_algorithm_of_the_call(algorithm, served):
    x, w = images(1, 1, 4, 4, grad=True), images(1, 1, 2, 2, grad=True)
    plainconv.conv2d(x, w, algorithm=algorithm).sum().backward()
    assert [plan.algorithm.name for plan, _ in served] == [algorithm] * 3


@pytest.mark.parametrize("wanted", ["xwb", "wb", "xb", "w", "b"])
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_a_bias_is_made_beside_the_weights(wanted, last, served):
    """If both are wanted; else by itself, or not at all."""
    x, w, b = images(2, 3, 9, 8), images(4, 3, 3, 2), images(4)
    leaves = [t.requires_grad_() for name, t in zip("xwb", (x, w, b), strict=True) if name in wanted]
    y = plainconv.conv2d(channels_last(x) if last else x, w, b, stride=2)
    cotangent = images(*y.shape)
    for grads in (lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True), lambda: y.backward(cotangent)):
        served.clear()
        made = grads() or [leaf.grad for leaf in leaves]
        beside = [plan.request.makes_bias for plan, _ in served if plan.request.direction is Direction.GRAD_WEIGHT]
        assert beside == ["b" in wanted] * ("w" in wanted)
        torch.testing.assert_close(
            list(made), list(torch.autograd.grad(F.conv2d(x, w, b, stride=2), leaves, cotangent))
        )


@pytest.mark.parametrize("algorithm", ["auto", "shift", "im2col", "fft", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_the_gradient_of_a_bias_is_rounded_once(algorithm, dtype):
    x, w, b = (images(*shape, dtype=dtype, grad=True) for shape in ((3, 2, 21, 20), (4, 2, 2, 3), (4,)))
    y = plainconv.conv2d(x, w, b, algorithm=algorithm)
    cotangent = images(*y.shape, dtype=dtype)
    y.backward(cotangent)
    exact, size = (t.to(torch.complex128).sum((0, 2, 3)) for t in (cotangent, cotangent.abs()))
    assert ((b.grad - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * size.abs()).all()


def test_the_bias_of_a_transposed_layer_has_its_gradient_too(served):
    y, w, b = images(2, 4, 5, 5, grad=True), images(4, 3, 3, 3, grad=True), images(3, grad=True)
    cotangent = images(2, 3, 7, 7)
    plainconv.conv_transpose2d(y, w, b).backward(cotangent)
    assert not any(plan.request.makes_bias for plan, _ in served), "it was added to the weight's input"
    torch.testing.assert_close(b.grad, cotangent.sum((0, 2, 3)))


def test_weight_and_bias_without_input_channels():
    x, w, b = images(2, 0, 5, 5), images(4, 0, 3, 3, grad=True), images(4, grad=True)
    y = plainconv.conv2d(x, w, b)
    y.sum().backward()
    assert w.grad.shape == w.shape
    assert torch.equal(b.grad, torch.full((4,), 18.0, dtype=b.dtype))


@pytest.mark.parametrize("cotangent", ["stride 0", "channels last", "irregular"])
def test_cotangents_of_every_layout(cotangent):
    def gradients(convolution):
        x, w, b = images(*X, grad=True), images(*W, grad=True), images(*B, grad=True)
        y = convolution(x, w, b, padding=1)
        g = images(*y.shape)
        g = {
            "stride 0": torch.full((), 2.0, dtype=g.dtype).expand(y.shape),
            "channels last": channels_last(g),
            "irregular": g.mT.contiguous().mT,
        }[cotangent]
        return torch.autograd.grad(y, (x, w, b), g)

    for ours, theirs in zip(gradients(plainconv.conv2d), gradients(F.conv2d), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sums_cotangent():
    x, w = images(*X, grad=True), images(*W, grad=True)
    plainconv.conv2d(x, w).sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, w).sum(), (x, w))
    torch.testing.assert_close((x.grad, w.grad), expected)


EXPANDED = {
    "all": (slice(1), slice(1), slice(1), slice(1)),
    "batch": (slice(1),),
    "channels": (slice(None), slice(1)),
    "space": (slice(None), slice(None), slice(1), slice(1)),
    "rows": (slice(None), slice(None), slice(1)),
    "columns": (slice(None), slice(None), slice(None), slice(1)),
}
expanded = pytest.mark.parametrize("seen", EXPANDED.values(), ids=EXPANDED)


@expanded
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_expanded_cotangents_of_every_layout(groups, last, seen):
    x, w = images(3, 8, 9, 21), images(8, 8 // groups, 3, 3, grad=True)
    x = (channels_last(x) if last else x).requires_grad_()
    y = F.conv2d(x, w, padding=1, groups=groups)
    g = images(*y.shape)[seen]
    expected = torch.autograd.grad(y, (x, w), g.expand(y.shape).contiguous())
    names = {*EVERYWHERE, "winograd"} - {"loops", "reference"}
    for name, kept in itertools.product(sorted(names), (g, channels_last(g))):
        with contextlib.suppress(plainconv.AlgorithmRefused):
            ours = plainconv.conv2d(x, w, padding=1, groups=groups, algorithm=name)
            torch.testing.assert_close(torch.autograd.grad(ours, (x, w), kept.expand(y.shape)), expected)


@expanded
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_of_an_expanded_cotangent_rows_are_copied_at_most(last, seen, served):
    x, w = images(2, 8, 9, 10), images(6, 8, 3, 3, grad=True)
    x = (channels_last(x) if last else x).requires_grad_()
    y = plainconv.conv2d(x, w, padding=1)
    held = images(*y.shape)[seen].clone()
    g = held.expand(y.shape)
    for _ in range(2):  # the second finds its calls bound
        served.clear()
        torch.autograd.grad(y, (x, w), g, retain_graph=True)
        given = [tensor for _, tensors in served for tensor in tensors[:2] if tensor.shape == g.shape]
        assert len(given) == 2
        for tensor in given:
            assert torch.equal(tensor, g)
            if tensor.data_ptr() != g.data_ptr():
                assert tensor.untyped_storage().nbytes() in (held.nbytes * y.shape[1], held.nbytes * y.shape[-1])
                assert tensor.untyped_storage().nbytes() * 6 <= y.nbytes


def test_batch_0_and_its_gradients():
    x, w, b = images(0, 3, 6, 6, grad=True), images(*W, grad=True), images(*B, grad=True)
    y = plainconv.conv2d(x, w, b)
    assert y.shape == (0, 4, 4, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(b.grad, torch.zeros_like(b))


# -- memory formats --------------------------------------------------------------------------------------------------

layouts = pytest.mark.parametrize(
    "formats", list(itertools.product([False, True], repeat=2)), ids=lambda f: "".join("-L"[v] for v in f)
)


@layouts
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_results_have_torchs_strides_and_gradients_those_of_their_tensors(formats, transposed, dims):
    x, w = images(2, 3, *(5,) * dims, dtype=torch.float32), images(3, 3, *(3,) * dims, dtype=torch.float32)
    x, w = (channels_last(t) if last else t for t, last in zip((x, w), formats, strict=True))
    x.requires_grad_()
    w.requires_grad_()
    ours, theirs = (
        getattr(where, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")(x, w) for where in (plainconv, F)
    )
    assert (
        ours.stride()
        == torch.empty_like(
            ours,
            memory_format=[torch.contiguous_format, (torch.channels_last, torch.channels_last_3d)[dims - 2]][
                any(formats)
            ],
        ).stride()
    )
    if dims == 2:
        assert ours.stride() == theirs.stride()
    dx, dw = torch.autograd.grad(ours, (x, w), torch.randn_like(ours))
    assert dx.stride() == x.stride()
    assert dw.stride() == w.stride()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 3, 1, 5)])
def test_what_counts_as_channels_last_is_what_torch_suggests(shape):
    """torch.empty_like preserves what it takes a dense tensor to be; conv2d tells what it suggests."""
    x = torch.randn(shape)
    w = torch.randn(4, shape[1], 1, 1).as_strided((4, shape[1], 1, 1), (shape[1], 1, 1, 1))
    for tensor in (x, channels_last(x), x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        expected = F.conv2d(tensor, w)
        assert plainconv.conv2d(tensor, w).stride() == expected.stride(), tensor.stride()


# -- vmap and torch.func ---------------------------------------------------------------------------------------------

DIMS = [d for d in itertools.product((None, 0, 1), (None, 0, 2), (None, 0, 1)) if d != (None, None, None)]


def mapped_tensors(shapes, in_dims, size=3):
    tensors = []
    for seed, (shape, dim) in enumerate(zip(shapes, in_dims, strict=True)):
        full = list(shape)
        if dim is not None:
            full.insert(dim, size)
        tensors.append(reals(tuple(full), torch.float64, seed))
    return tensors


def one_by_one(function, in_dims, tensors, size=3):
    parts = [
        function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)))
        for i in range(size)
    ]
    return tree_map(lambda *each: torch.stack(each), parts[0], *parts[1:])


@pytest.mark.parametrize("in_dims", DIMS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_vmap_over_every_choice_of_dimensions(in_dims, transposed):
    shapes = ((2, 4, 6, 5), (4, 2, 3, 2), (4,))
    options = {"padding": ((1, 2), (1, 0)), "stride": (2, 1), "groups": 2, "padding_mode": "circular"}
    function = plainconv.conv_transpose2d if transposed else plainconv.conv2d

    def call(x, w, b):
        return function(x, w, b, **options)

    tensors = mapped_tensors(shapes, in_dims)
    torch.testing.assert_close(
        torch.func.vmap(call, in_dims)(*tensors), one_by_one(call, in_dims, tensors), rtol=1e-10, atol=1e-10
    )


@directions
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0), (2, 2), (-1, -1)], ids=str)
def test_vmap_of_each_direction(direction, in_dims):
    first, second, _, make = of_problem("n2 c4 o6 x5x4 k3x2 s2x1 p1 g2 mreplicate", direction)
    tensors = mapped_tensors(
        (first.shape, second.shape), [d if d is None or d >= 0 else first.dim() + 1 + d for d in in_dims]
    )

    def call(first, second):
        return ops.convolve(first, second, None, make)

    def operator(first, second):
        return getattr(torch.ops.plainconv, direction.value)(first, second, None, *make.operands())

    plain_dims = tuple(d if d is None or d >= 0 else first.dim() + 1 + d for d in in_dims)
    expected = one_by_one(call, plain_dims, tensors)
    for function in (call, operator):
        found = torch.func.vmap(function, in_dims)(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_vmap_within_vmap():
    x, w = images(3, 2, *X), images(2, *W)
    both = torch.func.vmap(torch.func.vmap(plainconv.conv2d), in_dims=(0, None))
    expected = torch.stack([torch.stack([F.conv2d(b, c) for b, c in zip(a, w, strict=True)]) for a in x])
    torch.testing.assert_close(both(x, w), expected)


def test_vmap_of_an_unbatched_call_and_out_dims():
    x, w = images(5, 3, 6, 7), images(*W)
    found = torch.func.vmap(lambda x: plainconv.conv2d(x, w), out_dims=1)(x)
    torch.testing.assert_close(found, F.conv2d(x, w).transpose(0, 1))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 0, None), (None, None, 0), (0, None, 0)])
def test_vmap_of_grad(in_dims):
    """Gradients of each sample."""

    def loss(convolution):
        return lambda x, w, b: convolution(x, w, b, padding=1, stride=2).square().sum()

    tensors = mapped_tensors((X, W, B), in_dims)
    found = torch.func.vmap(torch.func.grad(loss(plainconv.conv2d), argnums=(0, 1, 2)), in_dims)(*tensors)
    expected = one_by_one(torch.func.grad(loss(F.conv2d), argnums=(0, 1, 2)), in_dims, tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", ["jacfwd", "jacrev", "hessian", "jvp", "vjp", "linearize"])
@pytest.mark.parametrize("transposed", [False, True])
def test_transforms_are_torchs(transform, transposed):
    x, w = images(1, 2, 3, 4), images(2, 2, 2, 2)

    def by(where):
        function = where.conv_transpose2d if transposed else where.conv2d

        def call(x, w):
            return function(x, w, stride=2, padding=1).pow(2)

        if transform == "jvp":
            return torch.func.jvp(call, (x, w), (x + 1, w - 1))
        if transform == "vjp":
            y, pull = torch.func.vjp(call, x, w)
            return y, pull(y + 1)
        if transform == "linearize":
            y, push = torch.func.linearize(call, x, w)
            return y, push(x + 1, w - 1)
        return getattr(torch.func, transform)(call, argnums=(0, 1))(x, w)

    torch.testing.assert_close(by(plainconv), by(F))


def test_functional_call_of_a_layer_under_grad_and_vmap():
    layer = plainconv.nn.Conv2d(3, 4, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = images(5, 3, 6, 6)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, one).items():
            torch.testing.assert_close(found[name][i], gradient)


# -- fake and meta tensors -------------------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_fake_tensors_have_the_shape_and_strides_of_real_ones(direction, text):
    for last, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        first, second, bias, make = of_problem(text, direction, dtype, bias=True, last=last and text.count("x") > 2)
        if make.channels_last and len(make.shape) not in (4, 5):
            make = make._replace(channels_last=False)
        real = ops.convolve(first, second, bias, make)
        with FakeTensorMode() as mode:
            fakes = [t if t is None else mode.from_tensor(t) for t in (first, second, bias)]
            fake = ops.convolve(*fakes, make)
        meta = ops.convolve(*(t if t is None else t.to("meta") for t in (first, second, bias)), make)
        for made in (fake, meta):
            assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
        assert fake.device == real.device


def test_fake_tensors_have_gradients():
    with FakeTensorMode():
        x, w = torch.randn(*X, requires_grad=True), channels_last(torch.randn(*W)).requires_grad_()
        dx, dw = torch.autograd.grad(plainconv.conv2d(x, w).sum(), (x, w))
    assert (dx.shape, dx.stride(), dw.shape, dw.stride()) == (x.shape, x.stride(), w.shape, w.stride())


def test_fake_tensors_are_refused_as_real_ones_are():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        plainconv.conv2d(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 3, 3))


# -- opcheck ---------------------------------------------------------------------------------------------------------

OPCHECK = ["3x3", "negative padding, stride", "reflect", "1-D", "3-D, circular and groups", "depthwise with multiplier"]


def opcheck(direction, text, dtype, last):
    first, second, bias, make = of_problem(text, direction, dtype, bias=True)
    if last:
        first, second, make = channels_last(first), channels_last(second), make._replace(channels_last=True)
    tensors = [t if t is None else t.requires_grad_() for t in (first, second, bias)]
    torch.library.opcheck(getattr(torch.ops.plainconv, direction.value).default, (*tensors, *make.operands()))


@directions
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(direction, name):
    opcheck(direction, CASES[name], torch.float64, last=name == "reflect")


@pytest.mark.slow
@directions
@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_opcheck_of_every_case(direction, text):
    opcheck(direction, text, torch.complex128, last=False)


# -- compiled and exported -------------------------------------------------------------------------------------------

SIZES = [(5, 8, 9), (3, 11, 7), (6, 13, 12), (4, 6, 6), (7, 20, 31)]


class Counting:
    """A backend that counts graphs."""

    def __init__(self, inner=None):
        self.graphs, self.inner = [], inner

    def __call__(self, graph, examples):
        self.graphs.append(graph)
        return self.inner(graph, examples) if self.inner else graph.forward


TRACED = {
    "plain": lambda x, w: plainconv.conv2d(x, w, padding=1),
    "same_upper, stride": lambda x, w: plainconv.conv2d(x, w, padding="same_upper", stride=2),
    "same": lambda x, w: plainconv.conv2d(x, w, padding="same", dilation=2),
    "causal, mixed": lambda x, w: plainconv.conv2d(x, w, padding=("causal", (2, -1)), stride=(2, 1)),
    "reflect": lambda x, w: plainconv.conv2d(x, w, padding=2, padding_mode="reflect"),
    "transposed": lambda x, w: plainconv.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
    "transposed, same_lower": lambda x, w: plainconv.conv_transpose2d(x, w, stride=3, padding="same_lower"),
}
traced = pytest.mark.parametrize("name", TRACED)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@traced
@pytest.mark.usefixtures("dynamo")
def test_compile_makes_one_graph_for_every_size(name):
    backend = Counting()
    compiled = torch.compile(TRACED[name], fullgraph=True, dynamic=True, backend=backend)
    for n, h, w in SIZES:
        x, weight = images(n, 4, h, w), images(4, 4, 3, 2)
        assert torch.equal(compiled(x, weight), TRACED[name](x, weight))
    assert len(backend.graphs) == 1
    targets = [node.target for node in backend.graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("plainconv" in str(target) for target in targets) == 1


@pytest.mark.parametrize("name", ["same_upper, stride", "transposed, same_lower"])
@pytest.mark.usefixtures("dynamo")
def test_compile_with_gradients_makes_one_graph_for_every_size(name):
    from torch._dynamo.backends.debugging import aot_eager

    backend = Counting(aot_eager)
    compiled = torch.compile(TRACED[name], fullgraph=True, dynamic=True, backend=backend)
    for n, h, w in SIZES:
        x, weight = images(n, 4, h, w, grad=True), channels_last(images(4, 4, 3, 2)).requires_grad_()
        found = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
        expected = torch.autograd.grad(TRACED[name](x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(found, expected)
        assert [g.stride() for g in found] == [x.stride(), weight.stride()]
    assert len(backend.graphs) == 1


@pytest.mark.usefixtures("dynamo")
def test_a_layer_compiles_with_autocast_and_an_unbatched_input():
    layer = plainconv.nn.Conv2d(3, 4, 3, padding=1)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 3, 5, 5), torch.randn(3, 6, 5)):
        assert torch.equal(compiled(x), call(x))
        assert call(x).dtype is torch.bfloat16


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vmap of grad"])
def test_torch_func_under_compile(transform):
    def call(x, w):
        if transform == "grad":
            return torch.func.grad(lambda w: plainconv.conv2d(x, w).square().sum())(w)
        if transform == "jvp":
            return torch.func.jvp(plainconv.conv2d, (x, w), (x, w))
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(lambda w, x: plainconv.conv2d(x, w).square().sum()), (None, 0))(w, x)
        return torch.func.vmap(plainconv.conv2d, in_dims=(0, None))(x, w)

    x, w = (images(2, *X) if "vmap" in transform else images(*X)), images(*W)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(x, w), call(x, w))


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_inductor_runs_the_operator_with_its_neighbours():
    def call(x, w):
        return plainconv.conv2d(x.relu() * 2, w, padding="same_lower", stride=2).sigmoid() + 1

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n, h, w in SIZES:
        x, weight = images(n, 4, h, w, grad=True), images(4, 4, 3, 2, grad=True)
        torch.testing.assert_close(compiled(x, weight), call(x, weight))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, weight).sum(), (x, weight)),
            torch.autograd.grad(call(x, weight).sum(), (x, weight)),
        )


class Net(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight, self.function = torch.nn.Parameter(images(4, 4, 3, 2)), function

    def forward(self, x):
        return self.function(x, self.weight)


@traced
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.usefixtures("dynamo")
def test_export_with_dynamic_batch_height_and_width(name, strict):
    net = Net(TRACED[name])
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(net, (images(5, 4, 8, 9),), dynamic_shapes=dynamic, strict=strict)
    assert any("plainconv" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    for n, h, w in SIZES:
        x = images(n, 4, h, w)
        assert torch.equal(run(x), net(x))


def test_symbolic_trace_records_one_call():
    def function(x, w):
        return plainconv.conv2d(x, w, stride=2, padding="same_upper", algorithm="im2col") + 1

    graph = torch.fx.symbolic_trace(function)
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert nodes[0].target is plainconv.conv2d
    assert [node.target for node in nodes].count(plainconv.conv2d) == 1
    assert len(nodes) == 2
    assert nodes[0].kwargs["algorithm"] == "im2col"
    x, w = images(*X), images(*W)
    assert torch.equal(graph(x, w), function(x, w))
    assert "conv2d" in graph.code


@pytest.mark.parametrize("name", [n for n in plainconv.__all__ if n.startswith("conv")])
def test_symbolic_trace_of_every_function(name):
    function = getattr(plainconv, name)
    graph = torch.fx.symbolic_trace(lambda x, w: function(x, w))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [function]


def test_symbolic_trace_of_a_layer_is_its_module():
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(plainconv.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
    x = torch.randn(1, 3, 5, 5)
    assert graph(x).shape == (1, 4, 3, 3)


# -- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.int32, torch.int32),
        (torch.complex64, torch.complex64),
        (torch.complex64, torch.float32),
    ],
    ids=str,
)
def test_autocast_gives_the_type_that_torch_gives(region, dtypes):
    x, w = (integers(shape, dtype, 0) for shape, dtype in zip((X, W), dtypes, strict=True))

    def outcome(convolution):
        with torch.autocast("cpu", region):
            try:
                return convolution(x, w)
            except RuntimeError as error:
                return type(error)

    ours, theirs = outcome(plainconv.conv2d), outcome(F.conv2d)
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_and_backward(transposed):
    name = "conv_transpose2d" if transposed else "conv2d"
    x, w, b = (integers(shape, torch.float32, 0).requires_grad_() for shape in ((2, 4, 6, 7), (4, 4, 3, 2), (4,)))

    def gradients(where):
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(where, name)(x, w, b)
            assert y.dtype is torch.bfloat16
        return torch.autograd.grad(y.float().sum(), (x, w, b))

    for ours, theirs in zip(gradients(plainconv), gradients(F), strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs)


@directions
@pytest.mark.parametrize("algorithm", EVERYWHERE)
def test_products_inside_an_algorithm_are_not_autocast(direction, algorithm):
    """A float32 operator within a region: its sums and products stay float32."""
    sample = of_problem("n1 c13 o14 x5x4 k2x2", direction, torch.float32, bias=True, algorithm=algorithm)
    expected = ops.convolve(*sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.convolve(*sample), expected)


def test_backward_inside_autocast_stays_in_its_types():
    x, w = images(*X, grad=True), images(*W, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = plainconv.conv2d(x, w)
        found = torch.autograd.grad(y.sum(), (x, w))
    assert y.dtype is torch.float64
    torch.testing.assert_close(found, torch.autograd.grad(F.conv2d(x, w).sum(), (x, w)))


# -- other contexts --------------------------------------------------------------------------------------------------


def test_inference_mode():
    x, w = images(*X), images(*W, grad=True)
    with torch.inference_mode(), ways() as answers:
        y = plainconv.conv2d(x, w)
    assert y.is_inference()
    assert answers == [True]
    torch.testing.assert_close(y, F.conv2d(x, w).detach())
    inside = plainconv.conv2d(y, images(2, 4, 2, 2))  # an inference tensor outside of inference mode
    torch.testing.assert_close(inside, F.conv2d(y, images(2, 4, 2, 2)))


def test_a_tensor_may_be_changed_by_place_but_not_under_a_gradient():
    x, w = images(*X, grad=True), images(*W, grad=True)
    y = plainconv.conv2d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_hooks_unpack_may_lie_otherwise_than_what_was_saved():
    x = integers((2, 4, 9, 7), torch.float32, seed=1).transpose(2, 3).requires_grad_()
    w = integers((4, 1, 3, 3), torch.float32, seed=2).requires_grad_()
    grads = []
    for pack in (lambda t: t, lambda t: t.detach().clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = plainconv.conv2d(x, w, padding=1, groups=4)
        y.backward(torch.full_like(y, 2.0))
        grads.append((x.grad, w.grad))
        x.grad = w.grad = None
    for plain, unpacked in zip(*grads, strict=True):
        assert torch.equal(plain, unpacked)


def test_checkpoint_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    x, w = images(*X, grad=True), images(*W, grad=True)
    expected = torch.autograd.grad(plainconv.conv2d(x, w).square().sum(), (x, w))
    y = checkpoint(plainconv.conv2d, x, w, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, w)), expected)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        plainconv.conv2d(x, w)
    assert {tuple(shape) for shape in packed} == {X, W}


def test_several_python_threads_at_once():
    texts = [CASES[name] for name in ("3x3", "dilation and stride", "groups", "reflect", "prime sizes", "3-D")]
    samples = [of_problem(text, direction, torch.float32) for text in texts for direction in DIRECTIONS]
    expected = [ops.convolve(*sample) for sample in samples]
    wrong, start = [], threading.Barrier(6)

    def work(offset):
        start.wait()
        for _ in range(5):
            for i in range(len(samples)):
                j = (i + offset) % len(samples)
                if not torch.equal(ops.convolve(*samples[j]), expected[j]):
                    wrong.append(j)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(6)]
    plans.forget()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_shapes_than_the_problems_are_refused_by_the_operator():
    first, second, _, make = of_problem(CASES["3x3"], Direction.GRAD_INPUT)
    with pytest.raises(RuntimeError, match="should have shape"):
        ops.convolve(first[..., 1:], second, None, make)


@directions
def test_other_types_or_a_bias_of_another_length_are_refused_by_the_operator(direction):
    first, second, bias, make = of_problem("n1 c3 o4 x6 k3", direction, torch.float32, bias=True)
    operator = ops.OPERATORS[direction]
    with pytest.raises(RuntimeError, match="tensors of one type and device"):
        operator(first.double(), second, None, *make.operands())
    if bias is not None:
        for wrong in (bias[:-1], bias.double()):
            with pytest.raises(RuntimeError, match="a bias of one value a channel"):
                operator(first, second, wrong, *make.operands())
    else:
        with pytest.raises(RuntimeError, match="adds no bias"):
            operator(first, second, torch.empty(3), *make.operands())


# -- gradients without needless copies -------------------------------------------------------------------------------


def test_the_gradient_for_a_depthwise_weight_goes_by_the_format_of_the_input():
    x, w = channels_last(images(2, 5, 9, 10)), images(5, 1, 3, 3)
    for weight in (w, channels_last(w)):
        make = ops.Make(Direction.FORWARD, (2, 5, 7, 8), ConvProblem.parse("n2 c5 o5 x9x10 k3x3 g5").geometry, True)
        assert ops.request(make, x, weight, None, Direction.GRAD_WEIGHT).channels_last
        assert not ops.request(make, x.contiguous(), weight, None, Direction.GRAD_WEIGHT).channels_last
