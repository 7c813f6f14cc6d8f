"""What every algorithm is held to, and the problems that the tests are made of.

`check` runs one algorithm on one request, in memory that starts as NaN (integers: a poison value) with guards around
the workspace, and compares the result with `exact`, the definition in a wider type:

- to the bit on small integers, if the algorithm is exact on them (all but fft, winograd and separable);
- else within `tolerance`, which is the algorithm's own claim and nothing more.

What is wrong is raised as an AssertionError that begins with the request's text: `ConvProblem.parse` reads it back.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from plainconv import reference
from plainconv.cpu import compile as cpu
from plainconv.menu import ALGORITHMS, fft
from plainconv.menu.base import INTEGERS, Algorithm, Tensors, compute_dtype, finish, summation_error
from plainconv.problem import PADDING_MODES, ConvProblem, Direction, Request

DIRECTIONS = tuple(Direction)
BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
every_width = pytest.mark.parametrize(  # of a vector, by `as_if`; the widest is quick
    "bits", [pytest.param(bits, marks=[pytest.mark.slow] if i else []) for i, bits in enumerate(BITS)]
)
BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
ROUNDING = frozenset({"fft", "winograd"})
INEXACT = ROUNDING | {"separable"}  # every other algorithm is exact on small integers
FORWARD_ONLY = ("narrow", "depthwise", "direct", "pointwise")  # and what else they refuse is tested by name
EVERYWHERE = tuple(name for name in BY_NAME if name not in (*FORWARD_ONLY, "winograd", "separable", "builtin"))
# fft on the engine alone: the algorithm itself takes the quickest way, which for small problems is tensor operations.
FOURIER, SPECTRAL = (
    Algorithm(
        "fft",
        way.why_not,
        way.cost,
        way.error,
        lambda asked, tensors, out, workspace, way=way: way.bind(asked, tensors)(tensors, out, workspace),  # type: ignore
        fuses=True,
    )
    for way in fft.ENGINE
)
GUARD = 4096  # bytes before and behind the workspace
CANARY = 0xA5
LOOPS_LIMIT = 20_000  # products that `loops` is given, at most
ACTIVATIONS = {  # the definitions, in the type of their argument
    None: lambda t: t,
    "relu": lambda t: t.clamp(min=0),
    "relu6": lambda t: t.clamp(0, 6),
    "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
    "leaky_relu(0.2)": lambda t: torch.where(t > 0, t, 0.2 * t),
    "leaky_relu(-0.5)": lambda t: torch.where(t > 0, t, -0.5 * t),
    "hardswish": lambda t: t * (t + 3).clamp(0, 6) / 6,
    "sigmoid": lambda t: 1 / (1 + (-t).exp()),
    "silu": lambda t: t / (1 + (-t).exp()),
    "gelu": lambda t: t / 2 * (1 + torch.erf(t / math.sqrt(2))),
}
TORCHS = {  # torch's own
    None: lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.2)": lambda t: F.leaky_relu(t, 0.2),
    "leaky_relu(-0.5)": lambda t: F.leaky_relu(t, -0.5),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}
STEEPEST = 1.5  # slope of any of them

_MAKERS = {
    Direction.FORWARD: reference.forward,
    Direction.GRAD_INPUT: reference.grad_input,
    Direction.GRAD_WEIGHT: reference.grad_weight,
}

# -- problems --------------------------------------------------------------------------------------------------------

# Few, well chosen: one idea each.
CASES = {
    "one tap": "n2 c3 o4 x5x6 k1x1",
    "one tap, one pixel": "n1 c1 o1 x1x1 k1x1",
    "3x3": "n2 c3 o4 x9x8 k3x3 p1",
    "even kernel": "n2 c2 o3 x7x6 k2x4 p1x2",
    "stride over kernel": "n2 c2 o3 x11x10 k2x2 s3 p1",
    "stride under kernel": "n2 c2 o3 x11x10 k5x4 s2x3 p2",
    "dilation": "n2 c2 o2 x11x9 k3x2 d2x3 p2",
    "dilation and stride": "n2 c2 o2 x13x12 k3x3 s2x4 d3x2 p3",
    "groups": "n2 c6 o4 x7x6 k3x3 p1 g2",
    "depthwise": "n2 c5 o5 x7x6 k3x3 p1 g5",
    "depthwise with multiplier": "n2 c3 o6 x7x6 k3x3 s2 p1 g3",
    "channels enough for matrix products": "n2 c13 o14 x6x5 k3x3 p1",
    "asymmetric padding": "n2 c2 o3 x6x7 k3x3 p0:2x3:1",
    "padding wider than the input": "n1 c2 o2 x2x3 k3x3 p5x4",
    "negative padding": "n2 c2 o3 x9x9 k3x2 p-2:1x0:-3",
    "negative padding, stride": "n2 c2 o3 x9x9 k3x2 s2 p-1:-2x1:-1",
    "last rows not read": "n1 c2 o2 x8x9 k3x3 s4",
    "reflect": "n2 c2 o3 x6x7 k3x3 p2x1:3 mreflect",
    "replicate": "n2 c2 o3 x5x3 k3x3 p2x5:1 mreplicate",
    "circular": "n2 c2 o3 x5x4 k3x3 p5x4:1 mcircular",
    "reflect, cropped": "n1 c2 o2 x8x7 k3x3 s2 p-2:3x2:-1 mreflect",
    "replicate, stride and dilation": "n1 c2 o2 x7x6 k2x3 s2x3 d3x2 p3x4 mreplicate",
    "circular, stride": "n1 c2 o2 x7x6 k3x3 s3x2 p3:-1x2 mcircular",
    "prime sizes": "n3 c5 o7 x13x11 k3x5 p1x2",
    "1-D": "n3 c3 o4 x17 k5 s2 p2",
    "1-D, reflect": "n2 c2 o2 x9 k4 d2 p3:5 mreflect",
    "3-D": "n2 c2 o3 x5x4x6 k3x2x3 s1x2x1 p1",
    "3-D, circular and groups": "n1 c4 o2 x4x5x3 k2x3x2 p1:2x2x0:1 g2 mcircular",
    "whole kernel": "n2 c3 o2 x5x4 k5x4",
    "one long row": "n1 c1 o2 x1x97 k1x7 p0x3",
    "many images": "n17 c1 o1 x3x3 k3x3 p1",
}


@st.composite
def problems(draw: st.DrawFn, dims: tuple[int, ...] = (1, 2, 3), modes: tuple[str, ...] = PADDING_MODES) -> ConvProblem:
    """Small problems of every kind; every algorithm can serve them in a few milliseconds."""
    rank, mode = draw(st.sampled_from(dims)), draw(st.sampled_from(modes))
    largest = {1: 24, 2: 9, 3: 5}[rank]
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    sides = [draw(_sides(largest, mode)) for _ in range(rank)]
    spatial, kernel, stride, padding, dilation = zip(*sides, strict=True)
    batch, c, o = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ConvProblem(batch, c * groups, o * groups, spatial, kernel, stride, padding, dilation, groups, mode)


@st.composite
def _sides(draw: st.DrawFn, largest: int, mode: str) -> tuple[int, int, int, tuple[int, int], int]:
    size = draw(st.integers(1, largest))
    lo = draw(st.integers(-(size - 1) // 2, 5))
    hi = draw(st.integers(-(size - 1 + min(lo, 0)), 5))
    inside = size + min(lo, 0) + min(hi, 0)
    most = {"reflect": inside - 1, "circular": inside}.get(mode, 5)
    lo, hi = min(lo, most), min(hi, most)
    dilation = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, min(5, (size + lo + hi - 1) // dilation + 1)))
    return size, kernel, draw(st.integers(1, 4)), (lo, hi), dilation


# -- requests and tensors --------------------------------------------------------------------------------------------


def request(problem: ConvProblem, direction: Direction, dtype: torch.dtype, **more: object) -> Request:
    more.setdefault("threads", torch.get_num_threads())
    return Request(problem, direction, dtype, **more)  # type: ignore[arg-type]


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Small integers (for integer types: all there are), so that sums of products are exact in every type."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in INTEGERS:
        span = torch.iinfo(dtype if dtype.itemsize < 8 else torch.int32)
        return torch.randint(span.min, span.max, shape, dtype=torch.int64, generator=generator).to(dtype)
    if dtype.is_complex:
        parts = torch.randint(-2, 3, (*shape, 2), generator=generator).to(torch.float32)
        return torch.view_as_complex(parts).to(dtype)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def reals(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normally distributed numbers."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def spread(tensor: Tensor) -> Tensor:
    """The same values, every second element of memory, dimensions laid out backwards: as irregular as views get."""
    around = tensor.new_zeros([2 * size for size in reversed(tensor.shape)])
    view = around[(slice(None, None, 2),) * tensor.dim()].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first along the first dimension, in place of all others: one number in memory, of a bias."""
    return tensor[:1].clone().expand(tensor.shape)


def channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def channels_inside(tensor: Tensor) -> Tensor:
    """Channels side by side, in any number of dimensions."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def given(asked: Request, values: object = integers, seed: int = 0) -> Tensors:
    """Tensors for a request: the two that its direction is given, and a bias and a residual if it has them.

    Where the bias is made and not given, it is poisoned.
    """
    first, second = (asked.problem.shape_of(role) for role in asked.direction.given)
    makes = asked.problem.shape_of(asked.direction.makes)
    bias = values(asked.bias_shape, asked.dtype, seed + 2) if asked.has_bias else None  # type: ignore[operator]
    if asked.makes_bias:
        poison(bias)
    residual = values(makes, asked.dtype, seed + 3) if asked.has_residual else None  # type: ignore[operator]
    if residual is not None and asked.channels_last:
        residual = channels_last(residual)
    return Tensors(
        values(first, asked.dtype, seed),  # type: ignore[operator]
        values(second, asked.dtype, seed + 1),  # type: ignore[operator]
        bias,
        residual,
    )


def product_of_lines(w: Tensor) -> Tensor:
    """A weight of rank 1, out of those lines of this one that begin at its first element; its zeros are ones."""
    product = torch.ones_like(w)
    for dim in range(2, w.dim()):
        line = w[tuple(slice(None) if d in (0, 1, dim) else slice(0, 1) for d in range(w.dim()))]
        product = product * torch.where(line == 0, 1, line)
    return product


# -- what is right ---------------------------------------------------------------------------------------------------


def wide(tensor: Tensor) -> Tensor:
    """In the type that nothing is lost in: float64, complex128 or int64."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)


def sums(
    asked: Request, first: Tensor, second: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """What the activation is applied to, by definition, in a wide type."""
    result = _MAKERS[asked.direction](asked.problem, wide(first), wide(second))
    if bias is not None and not asked.makes_bias:
        result = result + wide(bias).view(-1, *(1,) * asked.problem.dims)
    return result if residual is None else result + wide(residual)


def exact(
    asked: Request, first: Tensor, second: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The result by definition, in a wide type."""
    return ACTIVATIONS[asked.activation](sums(asked, first, second, bias, residual))


def tolerance(
    algorithm: Algorithm,
    asked: Request,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """How far each element of a result may lie from the exact one; the only tolerance there is.

    algorithm.error(request) * eps(type of the sums) * sum of |products|, and, where the result has a narrower type
    than the sums, half its eps times that sum for the one rounding at the end (half the smallest number, if that is
    more).  An algorithm that rounds everywhere (fft, winograd) is held to the largest such sum instead of each one's
    own, or to the largest product there is, if no sum contains it: that is what its page says.

    A residual adds its own size to the sum of |products|, and its addition one unit of eps; an activation makes
    differences STEEPEST times as large, and is itself right to 8 units of eps of what it is applied to (and of 1, for
    sigmoid).  Where they are not fused, a narrower result is rounded once more for each.
    """
    parts = sums(asked, first.abs(), second.abs(), None if bias is None else bias.abs())
    if algorithm.name in ROUNDING and parts.numel() and first.numel() and second.numel():
        parts = torch.maximum(parts.amax(), wide(first).abs().amax() * wide(second).abs().amax()).expand_as(parts)
    kept, steps = compute_dtype(asked.dtype), asked.has_residual + (asked.activation is not None)
    eps = torch.finfo(kept).eps
    bound = algorithm.error(asked) * eps * parts
    if residual is not None:
        parts = parts + wide(residual).abs()
        bound = bound + eps * parts
    if asked.activation is not None:
        parts = STEEPEST * parts + 1
        bound = STEEPEST * bound + 8 * eps * parts
    if kept != asked.dtype:
        narrow = torch.finfo(asked.dtype)
        rounded = (narrow.eps / 2 * parts).clamp_min(narrow.tiny * narrow.eps / 2)
        bound = bound + rounded * (1 if algorithm.fuses else 1 + steps * STEEPEST)
    return bound


# -- the check -------------------------------------------------------------------------------------------------------


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or for integers with a value that no sum happens to be."""
    return tensor.fill_(math.nan if tensor.dtype not in INTEGERS else 0x5A)


def result_of(
    algorithm: Algorithm,
    asked: Request,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run the algorithm as the contract says: poisoned result, guarded and poisoned workspace of the declared size.

    Where a bias is made, it is filled, too.
    """
    tensors = Tensors(first, second, bias, residual)
    out = torch.empty(asked.problem.shape_of(asked.direction.makes), dtype=asked.dtype, device=first.device)
    if asked.channels_last:
        out = channels_last(out)
    poison(out)
    size = algorithm.cost(asked).workspace
    block = torch.full((GUARD + size + GUARD,), CANARY, dtype=torch.uint8, device=first.device)
    workspace = block[GUARD : GUARD + size]
    workspace.fill_(0xFF)  # NaN in every floating type
    strides, before = out.stride(), [t if t is None else t.clone() for t in tensors]
    algorithm.run(asked, tensors, out, workspace)
    if not algorithm.fuses:
        finish(asked, tensors, out)
    told = f"{algorithm.name}: {asked}"
    assert bool((block[:GUARD] == CANARY).all() and (block[GUARD + size :] == CANARY).all()), (
        f"{told}: wrote outside its workspace of {size} bytes"
    )
    assert out.stride() == strides, f"{told}: changed the strides of the result"
    for tensor, copy in zip(tensors, before, strict=True):
        made = tensor is bias and asked.makes_bias
        assert tensor is None or made or same(tensor, copy), f"{told}: wrote into an argument"  # type: ignore[arg-type]
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values of one type; NaN equals NaN."""
    if a.dtype is torch.complex32:
        a, b = a.to(torch.complex64), b.to(torch.complex64)
    return (a.dtype == b.dtype and torch.equal(a, b)) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def check(
    algorithm: Algorithm,
    asked: Request,
    values: object = integers,
    layout: object = None,
    seed: int = 0,
    device: str = "cpu",
    of_bias: object = None,
) -> None:
    """Hold one algorithm to the definition on one request, with tensors on a device.

    layout: of the two that are given; of_bias: of the bias.
    """
    tensors = Tensors(*(None if tensor is None else tensor.to(device) for tensor in given(asked, values, seed)))
    if algorithm.name == "separable":
        tensors = tensors._replace(second=product_of_lines(tensors.second))
    if layout is not None:
        tensors = tensors._replace(first=layout(tensors.first), second=layout(tensors.second))  # type: ignore[operator]
    if of_bias is not None:
        tensors = tensors._replace(bias=of_bias(tensors.bias))  # type: ignore[operator]
    result = result_of(algorithm, asked, *tensors)
    at_home = (None if tensor is None else tensor.cpu() for tensor in tensors)
    compare(algorithm, asked, result.cpu(), *at_home, to_the_bit=values is integers)  # type: ignore[arg-type]


def compare(
    algorithm: Algorithm,
    asked: Request,
    result: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    to_the_bit: bool,
) -> None:
    """Hold a result, and a bias that was made, to the definition."""
    told = f"{algorithm.name}: {asked}" + (" with bias" if asked.has_bias else "")
    exactly = to_the_bit and asked.activation in (None, "relu", "relu6") and algorithm.name not in INEXACT
    bound = None if exactly else tolerance(algorithm, asked, first, second, bias, residual)
    _hold(told, result, exact(asked, first, second, bias, residual), bound)
    if asked.makes_bias:
        assert bias is not None
        dims = (0, *range(2, second.dim()))
        bound = None if to_the_bit else _tolerance_of_bias(asked, wide(second).abs().sum(dims))
        _hold(f"{told}, the bias", bias, wide(second).sum(dims), bound)


def _tolerance_of_bias(asked: Request, parts: Tensor) -> Tensor:
    """The same for the gradient of a bias, a sum of y's: `parts` are those of their absolute values."""
    kept = compute_dtype(asked.dtype)
    bound = summation_error(asked.problem.terms(asked.direction)) * torch.finfo(kept).eps * parts
    return bound if kept == asked.dtype else bound + torch.finfo(asked.dtype).eps / 2 * parts


def _hold(told: str, result: Tensor, expected: Tensor, bound: Tensor | None) -> None:
    """A result may be off by the bound; without one, by nothing but its rounding."""
    assert result.shape == expected.shape, f"{told}: shape {tuple(result.shape)}, not {tuple(expected.shape)}"
    if bound is None:
        rounded = expected.to(result.dtype)
        wrong = wide(result) != wide(rounded)
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{told}: {int(wrong.sum())} of {wrong.numel()} elements differ, "
                f"first at {where}: {result[where].item()}, not {rounded[where].item()}"
            )
        return
    error = (wide(result) - expected).abs()
    wrong = ~(error <= bound)  # a NaN is wrong
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{told}: {int(wrong.sum())} of {wrong.numel()} elements beyond the stated error, first at {where}: "
            f"off by {error[where].item():.3g}, allowed {bound[where].item():.3g}"
        )


def refuses(algorithm: Algorithm, asked: Request) -> bool:
    """Whether there is nothing to check: the algorithm refuses, or it is `loops` and the problem is not tiny."""
    too_long = algorithm.name == "loops" and asked.problem.multiplies > LOOPS_LIMIT
    return too_long or algorithm.why_not(asked) is not None


def dropping_a_tap(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, but blind to the last tap of the kernel: no check may pass it."""

    def run(asked: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        last = (..., *(size - 1 for size in asked.problem.kernel))
        if algorithm.name == "separable":
            last = (..., -1)  # a line of them, or it would be refused
        if asked.direction is not Direction.GRAD_WEIGHT:
            tensors = tensors._replace(second=tensors.second.clone())
            tensors.second[last] = 0
        algorithm.run(asked, tensors, out, workspace)
        if asked.direction is Direction.GRAD_WEIGHT:
            out[last] = 0

    return dataclasses.replace(algorithm, run=run)
