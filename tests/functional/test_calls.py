"""Plain calls that were made before: found again, told apart, bounded, and forgotten when plans change."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import channels_last, spread
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import plainconv
from plainconv import functional, ops
from plainconv import plan as plans
from plainconv.problem import Direction, Geometry

X, W, B = (2, 4, 9, 8), (6, 4, 3, 3), (6,)
PLAIN = Geometry((1, 1), ((0, 0), (0, 0)), (1, 1))


@pytest.fixture(autouse=True)
def _forgotten():
    plans.forget()
    yield
    plans.forget()


def test_a_call_is_settled_and_planned_once(monkeypatch):
    calls, real = [], functional.settled
    monkeypatch.setattr(functional, "settled", lambda *how: calls.append(how) or real(*how))
    for _ in range(3):
        x, w = torch.randn(X), torch.randn(W)  # other values each time
        torch.testing.assert_close(plainconv.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plainconv.conv2d(x[0], w), F.conv2d(x[0], w), rtol=1e-4, atol=1e-4)
    assert len(calls) == len(functional._READY) == 2


OTHERS = ("loops", "pointwise", "separable")  # for every pixel, for kernels of one tap, and for those of rank 1


@pytest.mark.parametrize("algorithm", [name for name in plainconv.algorithms() if name not in OTHERS])
def test_calls_in_turn_on_tensors_that_lie_differently(algorithm):
    """What was bound for one layout of input, weight or bias must not serve another."""
    groups = 4 if algorithm == "depthwise" else 1
    layouts = (torch.Tensor.contiguous, channels_last, spread, lambda t: t[:1].expand(t.shape))
    held = []
    for one, two, three in itertools.product(layouts, layouts, (None, *layouts[:3])):
        x, w = one(torch.randn(X)), two(torch.randn(8 if groups == 4 else 6, 4 // groups, 3, 3))
        held.append((x, w, None if three is None else three(torch.randn(len(w)))))
    how, right = {"groups": groups, "algorithm": algorithm, "allow_builtin": True}, 0
    for x, w, b in held + held[::-1]:
        if plainconv.explain(x, w, b, **how).chosen:
            expected = F.conv2d(x, w, b, groups=groups)
            torch.testing.assert_close(plainconv.conv2d(x, w, b, **how), expected, rtol=1e-4, atol=1e-4)
            right += 1
    assert right > len(held) / 2, "the others are refused: channels_last, by some"


@pytest.mark.parametrize("wrong", [1.0, True, (1.0, 1), (1, True), "1"])
def test_what_python_calls_equal_is_told_apart(wrong):
    x, w = torch.randn(X), torch.randn(W)
    plainconv.conv2d(x, w, stride=1)
    plainconv.conv2d(x, w, stride=(1, 1))
    with pytest.raises(TypeError, match="argument 'stride' must be tuple of ints"):
        plainconv.conv2d(x, w, stride=wrong)


def test_wrong_types_are_seen_after_right_ones():
    x, w, b = torch.randn(X), torch.randn(W), torch.randn(B)
    plainconv.conv2d(x, w, b)
    for tensors in ((x.double(), w, b), (x, w.double(), b), (x, w, b.double())):
        with pytest.raises(RuntimeError, match="should be the same"):
            plainconv.conv2d(*tensors)
    with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional"):
        plainconv.conv2d(x, w, b[1:])


def test_arguments_that_cannot_be_written_serve_all_the_same():
    class Two(int):
        pass

    x, w = torch.randn(X), torch.randn(W)
    expected = F.conv2d(x, w, stride=2)
    for stride in (Two(2), torch.Size((2, 2)), [2, 2], torch.tensor(2)):
        torch.testing.assert_close(plainconv.conv2d(x, w, stride=stride), expected, rtol=1e-4, atol=1e-4)
    changing = [1, 1]
    plainconv.conv2d(x, w, stride=changing)
    changing[:] = 2, 2
    torch.testing.assert_close(plainconv.conv2d(x, w, stride=changing), expected, rtol=1e-4, atol=1e-4)


def test_threads_and_settings_are_part_of_it(served):
    x, w = torch.randn(X), torch.randn(W)
    before, threads = plainconv.get_max_workspace(), torch.get_num_threads()
    try:
        for count, most in ((1, 1000), (2, 1000), (2, 2000), (1, 1000)):
            torch.set_num_threads(count)
            plainconv.set_max_workspace(most)
            plainconv.conv2d(x, w, algorithm="reference")
            assert (served[-1][0].request.threads, served[-1][0].request.max_workspace) == (count, most)
    finally:
        plainconv.set_max_workspace(before)
        torch.set_num_threads(threads)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(ops, "MOST_READY", 5)
    w = torch.randn(W)
    for size in range(3, 30):
        x = torch.randn(1, 4, size, 5)
        torch.testing.assert_close(plainconv.conv2d(x, w), F.conv2d(x, w), rtol=1e-4, atol=1e-4)
        ops.convolve(x, w, None, ops.Make(Direction.FORWARD, (1, 6, size - 2, 3), PLAIN))
        assert 0 < len(functional._READY) <= 5
        assert 0 < len(ops._READY) <= 5
    plans.forget()
    assert not functional._READY
    assert not ops._READY


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func is plainconv.conv2d else func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return True if func is plainconv.conv2d else super().__torch_function__(func, types, args, kwargs or {})


def _dual(x, w):
    with forward_ad.dual_level():
        y = plainconv.conv2d(forward_ad.make_dual(x, x), w)
        return [part.clone() for part in forward_ad.unpack_dual(y)]


def _within(context, x, w):
    with context:
        return plainconv.conv2d(x, w)


def _traced(x, w):
    return torch.jit.trace(lambda t: plainconv.conv2d(t, w) + 1, (x,), check_trace=False)(x * 2)


def _twice(x, w):
    leaf = w.clone().requires_grad_()
    (once,) = torch.autograd.grad((plainconv.conv2d(x, leaf) ** 3).sum(), leaf, create_graph=True)
    return torch.autograd.grad(once.sum(), leaf)


CHANGES = {
    "autocast": lambda x, w: _within(torch.autocast("cpu", torch.bfloat16), x, w),
    "inference mode": lambda x, w: _within(torch.inference_mode(), x, w),
    "made in inference mode": lambda x, w: plainconv.conv2d(torch.inference_mode()(x.clone)(), w),
    "function mode": lambda x, w: _within(Mode(), x, w),
    "dispatch mode": lambda x, w: _within(Operators(), x, w),
    "subclass": lambda x, w: plainconv.conv2d(x.as_subclass(Subclass), w),
    "negative bit": lambda x, w: plainconv.conv2d(torch._neg_view(x), w),
    "requires grad": lambda x, w: plainconv.conv2d(x, w.clone().requires_grad_()).grad_fn is not None,
    "requires grad, but disabled": lambda x, w: _within(torch.no_grad(), x.clone().requires_grad_(), w).grad_fn is None,
    "parameter": lambda x, w: plainconv.conv2d(x, torch.nn.Parameter(w)).grad_fn is not None,
    "vmap": lambda x, w: torch.func.vmap(plainconv.conv2d, (0, None))(torch.stack([x, x + 1]), w),
    "vmap over others": lambda x, w: torch.func.vmap(lambda t: t + plainconv.conv2d(x, w))(torch.zeros(2, 1)),
    "grad": lambda x, w: torch.func.grad(lambda t: plainconv.conv2d(t, w).sum())(x),
    "jvp": lambda x, w: torch.func.jvp(lambda t: plainconv.conv2d(t, w), (x,), (x,)),
    "forward AD": _dual,
    "trace": _traced,
    "double": lambda x, w: plainconv.conv2d(x.double(), w.double()),
    "channels_last": lambda x, w: plainconv.conv2d(channels_last(x), w).stride(),
    "meta": lambda x, w: plainconv.conv2d(x.to("meta"), w.to("meta")).is_meta,
    "gradient of a gradient": _twice,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_remembered_call_must_not_serve(change):
    """After plain calls of the same sizes, each answers as it does when nothing is remembered."""
    x, w = torch.randn(X), torch.randn(W)
    first = CHANGES[change](x, w)
    plans.forget()
    plain = plainconv.conv2d(x, w)
    leaf = w.clone().requires_grad_()
    plainconv.conv2d(x, leaf).sum().backward()
    with torch.no_grad():
        plainconv.conv2d(x, leaf)
    torch.testing.assert_close(CHANGES[change](x, w), first, rtol=0, atol=0)
    assert torch.equal(plainconv.conv2d(x, w), plain)
    assert functional._READY, "the plain ones were remembered"


def test_sizes_that_are_symbols():
    """What torch traces with open sizes has none that can be looked up."""
    x, w = torch.randn(X), torch.randn(W)
    traced = make_fx(lambda x, w: plainconv.conv2d(x, w, padding=1), tracing_mode="symbolic")(x, w)
    more = torch.randn(X[0] + 1, *X[1:])
    torch.testing.assert_close(traced(more, w), F.conv2d(more, w, padding=1), rtol=1e-4, atol=1e-4)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        first, second = (mode.from_tensor(tensor, static_shapes=False) for tensor in (x, w))
        assert isinstance(plainconv.conv2d(first, second), FakeTensor)


def test_torch_jit_traces_a_function_or_says_why_not():
    x, w = torch.randn(X), torch.nn.Parameter(torch.randn(W))
    with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
        torch.jit.trace(lambda x: plainconv.conv2d(x, w), x)
    fixed = w.detach()
    traced = torch.jit.trace(lambda x: plainconv.conv2d(x, fixed), x)
    torch.testing.assert_close(traced(x), F.conv2d(x, fixed), rtol=1e-4, atol=1e-4)


def test_one_tensor_twice():
    """Torch's guard says no where one object is given twice: nothing is kept that would never fit."""
    x = torch.randn(4, 4, 3, 3)
    for _ in range(3):
        torch.testing.assert_close(plainconv.conv2d(x, x), F.conv2d(x, x), rtol=1e-4, atol=1e-4)
    assert not functional._READY
