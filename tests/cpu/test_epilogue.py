"""Activations in machine code against torch's, in float32 and float64, for every vector width."""

import pytest
import torch
import torch.nn.functional as F
from checks import TORCHS

from plainconv.cpu import compile as cpu
from plainconv.cpu.compile import Target
from plainconv.cpu.emit import Emit
from plainconv.cpu.epilogue import activate, exp, finish
from plainconv.cpu.launch import launch
from plainconv.problem import ACTIVATIONS, read_activation

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

TARGETS = [Target.host(bits) for bits in (512, 256, 128) if cpu.why_not() is None and bits <= Target.host().bits]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.bits))
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# Units of eps of |x| (sigmoid: of 1) that the result may be off the exact one.
ERROR = {"relu": 0, "relu6": 0, "leaky_relu": 1, "hardswish": 2, "sigmoid": 2, "silu": 2, "gelu": 3}
every_activation = pytest.mark.parametrize("activation", [text for text in TORCHS if text])


def applied(function, target, *tensors):
    """function(e, *vectors), of whole vectors of the tensors."""
    dtype = tensors[0].dtype
    e = Emit(target.bits // 8 // dtype.itemsize, {torch.float32: "float", torch.float64: "double"}[dtype])
    *sources, result = e.arguments(*["ptr"] * (len(tensors) + 1))

    def step(i, _):
        at = (e.begin + i) * e.lanes
        e.store(function(e, *(e.load(source, at) for source in sources)), result, at)
        return []

    e.loop(e.end - e.begin, [], step)
    assert tensors[0].numel() % e.lanes == 0
    out = torch.full_like(tensors[0], torch.nan)
    launch(cpu.compile(e.module(), target), [t.data_ptr() for t in (*tensors, out)], out.numel() // e.lanes, 1)
    return out


def activated(activation, target, x):
    return applied(lambda e, value: finish(e, value, None, activation), target, x)


def wide_range(dtype):
    """From denormals to what overflows, both signs; and densely where the functions bend."""
    limit = 126 if dtype is torch.float32 else 1020
    x = torch.cat([
        torch.linspace(-limit, limit, 20_000, dtype=torch.float64).exp2(),
        torch.linspace(0, 30, 20_000, dtype=torch.float64),
        torch.linspace(60, 120, 5_000, dtype=torch.float64),
        torch.linspace(700, 760, 5_000, dtype=torch.float64),
        torch.randn(14_000, dtype=torch.float64),
    ])  # fmt: skip
    return torch.cat([x, -x]).to(dtype)


def exact(activation, x):
    """In float64, without the digits that 1 + erf loses."""
    x = x.double()
    return x * torch.special.ndtr(x) if activation == "gelu" else TORCHS[activation](x)


@every_target
@every_type
@every_activation
def test_every_activation_over_the_whole_range(activation, dtype, target):
    name, _ = read_activation(activation)
    x = wide_range(dtype)
    result, expected = activated(activation, target, x), exact(activation, x)
    eps = torch.finfo(dtype).eps
    size = torch.ones_like(x) if name == "sigmoid" else x.abs()
    bound = ERROR[name] * eps * size.double() + torch.finfo(dtype).tiny
    error = (result.double() - expected).abs()
    overflow = expected.abs() > torch.finfo(dtype).max / 6  # hardswish multiplies by 6 on its way, as torch does
    wrong = ~(error <= bound) & ~overflow
    assert not wrong.any(), (x[wrong][:5], result[wrong][:5], expected[wrong][:5], (error / size / eps).max())


@every_target
@every_type
@every_activation
def test_what_is_not_a_number_and_what_is_not_finite(activation, dtype, target):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e300, -1e300, 1.0] * 2, dtype=torch.float64)
    result = activated(activation, target, x.to(dtype))
    expected = TORCHS[activation](x.to(dtype).double())  # torch's gelu of float32 makes a NaN of inf, of float64 inf
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-36, equal_nan=True)


@every_target
@every_type
@pytest.mark.parametrize("slope", [0.01, 0.1, 0.0, -0.0, -0.3, 1.0, 7.5, 1e30])
def test_every_slope_gives_the_bits_that_torch_gives(slope, dtype, target):
    edges = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, -1e30], dtype=dtype)
    x = torch.cat([edges, edges, torch.randn(64, dtype=dtype)])
    result, expected = activated(f"leaky_relu({slope})", target, x), F.leaky_relu(x, slope)
    number = ~expected.isnan()
    assert torch.equal(result.isnan(), ~number)
    assert torch.equal(result[number], expected[number])
    assert torch.equal(result[number].signbit(), expected[number].signbit())


@every_target
@every_type
def test_exp_fades_into_zero_and_infinity(dtype, target):
    low, high = (-104, 89) if dtype is torch.float32 else (-746, 710)
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0, high, low], dtype=dtype)
    x = torch.cat([torch.linspace(low, high, 100_000, dtype=dtype), edges, edges])
    result, expected = applied(exp, target, x), x.double().exp()
    if dtype is torch.float64:
        expected = x.exp()
    info = torch.finfo(dtype)
    bound = (1.5 if target.fma else 2) * info.eps * expected.abs() + info.tiny * info.eps
    finite = expected.to(dtype).isfinite()
    assert ((result.double() - expected).abs() <= bound)[finite].all()
    assert torch.equal(result[~finite].nan_to_num(-1), expected[~finite].to(dtype).nan_to_num(-1))
    assert result[-1] <= info.tiny * info.eps


@every_target
@every_type
def test_gelu_keeps_its_digits_far_to_the_left(dtype, target):
    x = -torch.linspace(0, 12 if dtype is torch.float32 else 36, 16_000, dtype=torch.float64).to(dtype)
    expected = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    result = activated("gelu", target, x)
    relative = ((result.double() - expected) / expected).abs()[1:]
    assert (relative <= 5 * torch.finfo(dtype).eps * (1 + x.double()[1:] ** 2 / 2)).all()


@every_type
def test_the_residual_comes_before_the_activation(dtype):
    x, residual = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    target = Target.host()
    result = applied(lambda e, a, b: finish(e, a, b, "relu"), target, x, residual)
    assert torch.equal(result, (x + residual).relu())
    assert torch.equal(applied(lambda e, a, b: finish(e, a, b, None), target, x, residual), x + residual)
    assert torch.equal(applied(lambda e, a: finish(e, a, None, None), target, x), x)


def test_an_unknown_name_is_refused():
    e = Emit(4)
    with pytest.raises(ValueError, match="activation='tanh' is not known"):
        activate(e, "tanh", e.zero)


def test_every_activation_is_vector_code():
    for activation in ACTIVATIONS:
        e = Emit(Target.host().bits // 32)
        x, y = e.arguments("ptr", "ptr")
        e.store(finish(e, e.load(x), None, activation), y)
        assert "call" not in cpu.assembly(e.module())
