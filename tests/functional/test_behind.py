"""activation= and residual= of the six functions: one call where nothing watches, else torch's operations behind it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import TORCHS, channels_last
from torch.fx import symbolic_trace

import plainconv
from plainconv import functional, profiling
from plainconv.plan import forget

X, W, B, R = (2, 6, 9, 8), (10, 6, 3, 3), (10,), (2, 10, 9, 8)


@pytest.fixture(autouse=True)
def _forgotten():
    forget()
    yield
    forget()


def drawn(*shapes):
    return tuple(torch.randn(shape) for shape in shapes)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def in_one(served):
    """What the plans that ran were asked to do behind the convolution."""
    return [(plan.request.activation, plan.request.has_residual) for plan, _ in served]


# -- one call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", TORCHS)
def test_it_is_fused_and_is_what_torch_makes(activation, served):
    x, w, b, r = drawn(X, W, B, R)
    ways = [(r, b, False), (r, b, True)]
    if activation in (None, "relu"):
        ways += itertools.product((None, r), (None, b), (False, True))
    for residual, bias, last in ways:
        given = channels_last(x) if last else x
        expected = F.conv2d(x, w, bias, padding=1)
        expected = TORCHS[activation](expected if residual is None else expected + residual)
        for _ in range(2):  # the second call is found again
            result = plainconv.conv2d(given, w, bias, padding=1, activation=activation, residual=residual)
            close(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert in_one(served)[-2:] == [(activation, residual is not None)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slope", [0.1, 0.0, -1.5])
def test_a_slope_in_other_types(slope, dtype, served):
    x, w, b, r = (tensor.to(dtype) for tensor in drawn(X, W, B, R))
    expected = F.leaky_relu(F.conv2d(x.double(), w.double(), b.double(), padding=1) + r.double(), slope)
    for given in (x, channels_last(x)):
        result = plainconv.conv2d(given, w, b, padding=1, activation=f"leaky_relu({slope})", residual=r)
        assert result.dtype is dtype
        torch.testing.assert_close(result.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    assert in_one(served) == [(f"leaky_relu({slope})", True)] * 2


@pytest.mark.parametrize(
    ("spelled", "other"),
    [("leaky_relu", "leaky_relu(0.01)"), ("leaky_relu", "leaky_relu( 1e-2)"), ("leaky_relu(2.0)", "leaky_relu(2)")],
)
def test_a_slope_is_one_plan_however_it_is_written(spelled, other, served):
    x, w = drawn(X, W)
    made = [plainconv.conv2d(x, w, activation=activation) for activation in (spelled, other)]
    assert torch.equal(*made)
    assert in_one(served) == [(spelled, False)] * 2
    assert len({id(plan) for plan, _ in served}) == 1


SIX = {
    "conv1d": ((2, 4, 11), (6, 4, 3)),
    "conv2d": ((2, 4, 7, 8), (6, 4, 3, 2)),
    "conv3d": ((1, 4, 5, 6, 7), (6, 4, 2, 3, 3)),
    "conv_transpose1d": ((2, 4, 11), (4, 6, 3)),
    "conv_transpose2d": ((2, 4, 7, 8), (4, 6, 3, 2)),
    "conv_transpose3d": ((1, 4, 5, 6, 7), (4, 6, 2, 3, 3)),
}


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("batched", [True, False])
def test_all_six_take_both(name, batched, served):
    x, w = drawn(*SIX[name])
    x = x if batched else x[0]
    theirs = getattr(F, name)(x, w, stride=2)
    r = torch.randn_like(theirs)
    for _ in range(2):
        close(getattr(plainconv, name)(x, w, stride=2, activation="silu", residual=r), F.silu(theirs + r))
    assert in_one(served) == [("silu", True)] * 2


@pytest.mark.parametrize(
    "algorithm", [name for name in plainconv.algorithms() if name not in ("pointwise", "separable")]
)
def test_every_algorithm_does_it(algorithm):
    groups = 6 if algorithm == "depthwise" else 1
    x, w, b, r = drawn((1, 6, 5, 4), (12, 6 // groups, 3, 3), (12,), (1, 12, 5, 4))
    how = {"padding": 1, "groups": groups}
    result = plainconv.conv2d(x, w, b, **how, activation="gelu", residual=r, algorithm=algorithm, allow_builtin=True)
    close(result, F.gelu(F.conv2d(x, w, b, **how) + r))


def test_the_residual_may_be_the_input_or_lie_otherwise(served):
    x, w, r = drawn(X, (6, 6, 3, 3), X)
    for residual in (x, r, channels_last(r), r[:1].expand(X), x, w[0, 0, 0, 0].expand(X)):
        for _ in range(2):
            close(plainconv.conv2d(x, w, padding=1, residual=residual), F.conv2d(x, w, padding=1) + residual)
    assert in_one(served) == [(None, True)] * 12
    close(plainconv.conv2d(w, w, padding=1, residual=w), F.conv2d(w, w, padding=1) + w)


def test_an_empty_batch_and_a_sum_of_no_products():
    x, w, b = torch.randn(0, 2, 5, 5), torch.randn(4, 2, 3, 3), torch.randn(4)
    assert plainconv.conv2d(x, w, activation="relu", residual=torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    r = torch.randn(2, 4, 5, 5)
    result = plainconv.conv2d(torch.randn(2, 0, 5, 5), torch.randn(4, 0, 1, 1), b, activation="relu", residual=r)
    close(result, F.relu(r + b.view(-1, 1, 1)))


def test_explain_tells_of_it():
    x, w, r = drawn(X, W, R)
    asked = plainconv.explain(x, w, padding=1, activation="relu", residual=r).request
    assert (asked.activation, asked.has_residual) == ("relu", True)
    asked = plainconv.explain(x, w, padding=1, activation="relu", residual=r, direction="grad_input").request
    assert (asked.activation, asked.has_residual) == (None, False)


# -- what watches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", TORCHS)
@pytest.mark.parametrize("asks", range(4))
def test_gradients_are_torch_s(activation, asks, served):
    given = drawn(X, W, B, R)
    given[asks].requires_grad_()
    x, w, b, r = given
    ours = plainconv.conv2d(x, w, b, padding=1, activation=activation, residual=r)
    theirs = TORCHS[activation](F.conv2d(x, w, b, padding=1) + r)
    close(ours, theirs)
    close(*(torch.autograd.grad(y.square().sum(), given[asks])[0] for y in (ours, theirs)))
    assert set(in_one(served)) == {(None, False)}
    with torch.no_grad():
        close(plainconv.conv2d(x, w, b, padding=1, activation=activation, residual=r), theirs)
    assert in_one(served)[-1] == (activation, True)
    again = plainconv.conv2d(
        x, w, b, padding=1, activation=activation, residual=r
    )  # found again, and with its gradient
    assert again.requires_grad


def test_transforms_modes_and_autocast(served):
    x, w, r = drawn(X, W, R)
    expected = F.relu(F.conv2d(x, w, padding=1) + r)
    mapped = torch.vmap(lambda x, r: plainconv.conv2d(x, w, padding=1, activation="relu", residual=r))(x, r)
    close(mapped, expected)
    _, change = torch.func.jvp(lambda r: plainconv.conv2d(x, w, padding=1, activation="relu", residual=r), (r,), (r,))
    close(change, torch.where(expected > 0, r, 0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = plainconv.conv2d(x, w, padding=1, activation="relu", residual=r)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)


class Step(torch.nn.Module):
    def __init__(self, activation="hardswish"):
        super().__init__()
        self.activation = activation

    def forward(self, x, w, r):
        return plainconv.conv2d(x, w, padding=1, activation=self.activation, residual=r)


@pytest.mark.parametrize("activation", ["hardswish", "leaky_relu(0.2)"])
def test_compiled_exported_and_traced(activation):
    x, w, r = drawn(X, W, R)
    step, expected = Step(activation), TORCHS[activation](F.conv2d(x, w, padding=1) + r)
    close(torch.compile(step, fullgraph=True, backend="eager", dynamic=True)(x, w, r), expected)
    close(torch.export.export(step, (x, w, r)).module()(x, w, r), expected)
    graph = symbolic_trace(step)
    (node,) = (node for node in graph.graph.nodes if node.target is plainconv.conv2d)
    assert node.kwargs["activation"] == activation
    close(graph(x, w, r), expected)


def test_profile_times_both_sides_with_it(monkeypatch):
    monkeypatch.setattr(profiling, "MODEL_S", 0.0)
    seen, real = [], functional.finished
    monkeypatch.setattr(functional, "finished", lambda *how: seen.append(how[1]) or real(*how))
    (row,) = plainconv.profile(Step(), *drawn(X, W, R), seconds=0).rows
    assert row.torchs is not None
    assert set(seen) == {"hardswish"}


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"activation": "tanh"}, ValueError, r"activation must be None or one of \('relu', .*but got 'tanh'"),
        ({"activation": ["relu"]}, ValueError, r"activation must be None or one of .*but got \['relu'\]"),
        ({"activation": F.relu}, ValueError, "activation must be None or one of"),
        ({"activation": "leaky_relu(x)"}, ValueError, r"activation='leaky_relu\(x\)' must have a finite number"),
        ({"residual": 1.0}, TypeError, "argument 'residual' must be Tensor, not float"),
        ({"residual": torch.ones(1)}, RuntimeError, r"shape of the result, \[2, 10, 9, 8\], but got \[1\]"),
        ({"residual": torch.ones(R).double()}, RuntimeError, "and residual type .* should be the same"),
        ({"residual": torch.ones(R).to_sparse()}, NotImplementedError, "sparse.* as residual"),
    ],
)
def test_errors(wrong, error, says, gradient):
    x, w, r = drawn(X, W, R)
    plainconv.conv2d(x, w, padding=1, activation="relu", residual=r)
    with pytest.raises(error, match=says):
        plainconv.conv2d(x.requires_grad_(gradient), w, padding=1, **wrong)


def test_integers_have_no_activation_and_complex_numbers_none():
    x, w, r = (torch.ones(shape, dtype=torch.int64) for shape in (X, W, R))
    assert torch.equal(plainconv.conv2d(x, w, padding=1, residual=r), plainconv.conv2d(x, w, padding=1) + 1)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="activation='relu' is for floating types, but the tensors are"):
            plainconv.conv2d(x.to(dtype), w.to(dtype), activation="relu")
