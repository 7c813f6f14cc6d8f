"""The definition of the three directions against torch's own: F.pad, F.conv and autograd, in float64."""

import pytest
import torch
from checks import CASES, DIRECTIONS, integers, problems
from hypothesis import given, settings

from plainconv import reference
from plainconv.problem import ConvProblem


def torch_forward(problem, x, w):
    """torch's convolution of torch's padding, which crops in mode "constant" only."""
    crop = [min(side, 0) for pair in reversed(problem.padding) for side in pair]
    grow = [max(side, 0) for pair in reversed(problem.padding) for side in pair]
    padded = torch.nn.functional.pad(torch.nn.functional.pad(x, crop), grow, **torch_mode(problem))
    function = getattr(torch.nn.functional, f"conv{problem.dims}d")
    return function(padded, w, None, problem.stride, 0, problem.dilation, problem.groups)


def torch_mode(problem):
    return {"mode": "constant" if problem.padding_mode == "zeros" else problem.padding_mode}


def hold(problem, dtype=torch.float64):
    """Small integers in float64: torch is exact on them as well, so all three results are equal to the bit."""
    x = integers(problem.input_shape, dtype, 0).requires_grad_()
    w = integers(problem.weight_shape, dtype, 1).requires_grad_()
    y = torch_forward(problem, x, w)
    cotangent = integers(problem.output_shape, dtype, 2)
    dx, dw = torch.autograd.grad(y, (x, w), cotangent.conj())  # autograd conjugates the other factor
    x, w = x.detach(), w.detach()
    assert torch.equal(reference.forward(problem, x, w), y)
    assert torch.equal(reference.grad_input(problem, cotangent, w), dx.conj().resolve_conj())
    assert torch.equal(reference.grad_weight(problem, x, cotangent), dw.conj().resolve_conj())


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_every_case_is_torchs(text):
    hold(ConvProblem.parse(text))


@pytest.mark.parametrize("text", [CASES["groups"], CASES["reflect, cropped"], CASES["1-D"]])
def test_complex_numbers_are_torchs(text):
    hold(ConvProblem.parse(text), torch.complex128)


@given(problems())
@settings(max_examples=100)
def test_random_problems_are_torchs(problem):
    hold(problem)


@pytest.mark.slow
@given(problems())
@settings(max_examples=800)
def test_many_random_problems_are_torchs(problem):
    hold(problem)


@given(problems())
def test_the_three_directions_are_one_form(problem):
    """<y, FORWARD(x, w)> = <GRAD_INPUT(y, w), x> = <GRAD_WEIGHT(x, y), w>, exactly, in integers that wrap."""
    x, w, y = (integers(problem.shape_of(role), torch.int64, seed) for seed, role in enumerate("xwy"))
    form = (y * reference.forward(problem, x, w)).sum()
    assert form == (reference.grad_input(problem, y, w) * x).sum()
    assert form == (reference.grad_weight(problem, x, y) * w).sum()


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64], ids=str)
def test_integers_wrap(direction, dtype):
    problem = ConvProblem.parse("n2 c3 o2 x5x4 k3x3 p1")
    made = getattr(reference, direction.value)
    given_ = [integers(problem.shape_of(role), dtype, seed) for seed, role in enumerate(direction.given)]
    wide = made(problem, *(tensor.to(torch.int64) for tensor in given_))
    assert made(problem, *given_).dtype is dtype
    assert torch.equal(made(problem, *given_), wide.to(dtype))
