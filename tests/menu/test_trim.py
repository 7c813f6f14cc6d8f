"""Taps that see nothing but padding: the same results without them, and less work."""

import dataclasses

import pytest
import torch
from checks import (
    BY_NAME,
    channels_inside,
    check,
    exact,
    given,
    integers,
    problems,
    reals,
    refuses,
    request,
    result_of,
    spread,
)
from checks import DIRECTIONS as ALL
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import plainconv
from plainconv.menu.trim import trimmed
from plainconv.problem import ConvProblem, Direction

TRIMMING = [BY_NAME[name] for name in ("direct", "depthwise", "narrow")]
algorithms = pytest.mark.parametrize("algorithm", TRIMMING, ids=lambda algorithm: algorithm.name)
directions = pytest.mark.parametrize("direction", ALL, ids=lambda direction: direction.value)
CASES = {  # and the kernel that is left
    "a kernel larger than it can see": ("n2 c3 o3 x4x5 k13x15 p6x7 g3", (7, 9)),
    "one side": ("n1 c4 o4 x5x6 k9x3 p8:0x1 g4", (5, 3)),
    "one pixel": ("n2 c2 o3 x1x1 k3x3 p1", (1, 1)),
    "far apart": ("n1 c5 o4 x7x7 k3x3 d8 p8", (1, 1)),
    "dilation": ("n1 c4 o2 x6x5 k5x5 d3 p6", (3, 3)),
    "stride": ("n2 c3 o3 x5x3 k11x7 s2x1 p5x3 g3", (9, 5)),
    "a stride over the picture": ("n1 c2 o2 x2x9 k3x3 s4x1 p5x1", (3, 3)),
    "cropped": ("n1 c3 o2 x6x9 k3x2 d5x4 p5:3x-1:2", (2, 2)),
    "1-D": ("n2 c3 o4 x6 k17 p8", (11,)),
    "1-D, a multiplier": ("n1 c2 o4 x6 k17 p8 g2", (11,)),
    "3-D": ("n1 c2 o4 x2x3x4 k5x7x3 p2x3x1", (3, 5, 3)),
    "3-D, groups": ("n2 c4 o4 x1x3x4 k3x7x5 p1x3x2 g4", (1, 5, 5)),
}


def asked_for(algorithm, text, direction=Direction.FORWARD, dtype=torch.float32, **more):
    asked = request(ConvProblem.parse(text), direction, dtype, **more)
    if refuses(algorithm, asked):
        pytest.skip("refused")
    return asked


@pytest.mark.parametrize(("text", "kernel"), CASES.values(), ids=CASES)
def test_what_is_left(text, kernel):
    """All taps that see something, and by stride 1 no others; the output stays as large."""
    problem = ConvProblem.parse(text)
    trim = trimmed(request(problem, Direction.FORWARD, torch.float32))
    left = problem if trim is None else trim.request.problem
    assert left.kernel == kernel
    assert left.out == problem.out


@drawn(problem=problems(modes=("zeros",)), more=st.integers(0, 12))
@settings(max_examples=300)
def test_no_tap_is_left_out_that_sees_something(problem, more):
    """Nor is one kept at either end that sees nothing, unless a stride jumps over the picture."""
    sides = zip(problem.padding, problem.dilation, strict=True)
    problem = dataclasses.replace(  # larger kernels, the same output
        problem,
        kernel=tuple(size + more for size in problem.kernel),
        padding=tuple((lo + more // 2 * d, hi + (more - more // 2) * d) for (lo, hi), d in sides),
    )
    trim = trimmed(request(problem, Direction.FORWARD, torch.float32))
    kept = trim.taps if trim else [(0, kernel) for kernel in problem.kernel]
    for dim, (first, behind) in enumerate(kept):
        size, (lo, _) = problem.spatial[dim], problem.padding[dim]
        stride, dilation = problem.stride[dim], problem.dilation[dim]
        seeing = [
            k
            for k in range(problem.kernel[dim])
            if any(0 <= t * stride + k * dilation - lo < size for t in range(problem.out[dim]))
        ]
        assert all(first <= k < behind for k in seeing)
        if seeing and stride <= size:
            assert (first, behind) == (seeing[0], seeing[-1] + 1)
    if trim:
        assert trim.request.problem.out == problem.out


@algorithms
@directions
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("text", [text for text, _ in CASES.values()], ids=CASES)
def test_every_case(algorithm, direction, last, text):
    """Values, a bias beside them, and of the gradient for the weight the zeros around what is left."""
    check(algorithm, asked_for(algorithm, text, direction, has_bias=True, channels_last=last), integers)


@algorithms
@directions
@pytest.mark.parametrize("layout", [channels_inside, spread], ids=lambda layout: layout.__name__)
def test_memory_of_any_strides(algorithm, direction, layout):
    text = CASES["dilation" if algorithm.name == "direct" else "one side"][0]
    for dtype in (torch.float32, torch.bfloat16):
        check(algorithm, asked_for(algorithm, text, direction, dtype), integers, layout)


@pytest.mark.parametrize("name", ["depthwise", "direct"])
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_agrees(transposed, name):
    """Through the front door, with every gradient, and with a size of the output that is asked for."""
    conv = "conv_transpose2d" if transposed else "conv2d"
    how = {"stride": 2, "padding": (7, 8), "groups": 3} | ({"output_padding": 1} if transposed else {})
    made = []
    for ask, more in ((getattr(plainconv, conv), {"algorithm": name}), (getattr(torch.nn.functional, conv), {})):
        asked = [
            reals(shape, torch.float64, i).requires_grad_()
            for i, shape in enumerate(((2, 3, 4, 3), (3, 1, 15, 17), (3,)))
        ]
        y = ask(*asked, **how, **more)
        made.append([y, *torch.autograd.grad(y.square().sum(), asked)])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs)


@algorithms
@directions
def test_only_what_is_left_is_multiplied(algorithm, direction):
    """169 of 961 taps, as if there were no others; but their gradient is to be written."""
    groups = 1 if algorithm.name == "direct" else 8
    text = "n1 c8 o{} x7x7 k{k}x{k} p{p} g{}"
    o = 16 if algorithm.name == "narrow" and direction is Direction.FORWARD else 8
    whole, left = (
        algorithm.cost(asked_for(algorithm, text.format(o, groups, k=k, p=k // 2), direction)) for k in (31, 13)
    )
    assert whole.multiplies == left.multiplies
    if direction is Direction.GRAD_WEIGHT:
        assert left.seconds < whole.seconds < left.seconds + 1e-3
    else:
        assert whole == left


@algorithms
def test_what_is_left_out_is_not_looked_at(algorithm):
    """Not even if it is not finite: it would meet zeros alone."""
    text = "n1 c2 o4 x3x4 k7x9 p3x4 g1" if algorithm.name != "depthwise" else "n1 c2 o2 x3x4 k7x9 p3x4 g2"
    for last in (False, True):
        asked = asked_for(algorithm, text, channels_last=last)
        x, w, *_ = given(asked)
        expected = exact(asked, x, w).float()
        w[:, :, 0], w[..., 8] = torch.inf, torch.nan
        assert torch.equal(result_of(algorithm, asked, x, w), expected)
