"""Reference: the definition itself (plainconv/reference.py), the last entry of the menu, which cannot refuse.

It multiplies element by element, in the type that sums are kept in, and rounds once.  Exact on integers; slow.
"""

from __future__ import annotations

import math

from torch import Tensor

from plainconv import reference
from plainconv.menu.base import Algorithm, Cost, Tensors, compute_dtype, machine, sum_error
from plainconv.problem import Direction, Request

_DIRECTIONS = {
    Direction.FORWARD: reference.forward,
    Direction.GRAD_INPUT: reference.grad_input,
    Direction.GRAD_WEIGHT: reference.grad_weight,
}


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    dtype = compute_dtype(request.dtype)
    first, second, bias, _ = tensors
    result = _DIRECTIONS[request.direction](request.problem, first.to(dtype), second.to(dtype))
    if bias is not None and not request.makes_bias:
        result += bias.view(-1, *(1,) * request.problem.dims)
    out.copy_(result)


def _why_not(request: Request) -> str | None:
    return None


def _cost(request: Request) -> Cost:
    problem = request.problem
    passes = problem.taps * problem.group_in
    moved = 6 * passes * math.prod(problem.output_shape) * compute_dtype(request.dtype).itemsize
    seconds = 4 * passes * machine(request).call + moved / machine(request).bytes
    return Cost(problem.multiplies, moved, 0, seconds)


ALGORITHM = Algorithm("reference", _why_not, _cost, sum_error, _run)
