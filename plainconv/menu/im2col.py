"""im2col: lay every window of the input out as a column, and convolution is one matrix product.

    COLUMNS[(k, c), (n, y)]  =  pad(x)[n, c, y*stride + k*dilation]         Y = W[o, (k, c)] @ COLUMNS

The weight is a matrix already; the columns repeat the input taps / stride^dims times, which is what it costs.  They
are made slab by slab, so that the workspace stays within its limit and the columns within the cache.

    GRAD_INPUT    COLUMNS = W.T @ Y, then every column is added back where it was read (col2im)
    GRAD_WEIGHT   W = sum over slabs of  Y @ COLUMNS.T

Cost: n * o * c/g * taps * out multiplies in as few products as there are slabs.
Source: Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing" (2006).
"""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from plainconv.menu import strips
from plainconv.menu.base import (
    Algorithm,
    Cost,
    Tensors,
    add_product,
    compute_dtype,
    machine,
    no_integers_on_cuda,
    product_seconds,
    sum_error,
)
from plainconv.problem import ConvProblem, Direction, Request


@lru_cache(1024)
def _columns(problem: ConvProblem) -> strips.Strips:
    return strips.Strips(tuple(strips.taps(problem)), (0,) * problem.dims)


def _multiply(request: Request, lengths: tuple[int, ...], xs: Tensor, w: Tensor, y: Tensor) -> None:
    columns = xs.flatten(1, 2)  # [g, taps*c, m*S]
    w_rows = w.permute(0, 2, 1, 3)  # [g, o, taps, c]
    if request.direction is Direction.FORWARD:
        add_product(y, w_rows.flatten(2), columns)
    elif request.direction is Direction.GRAD_INPUT:
        add_product(columns, w_rows.flatten(2).mT, y)
    else:
        w_rows += (y @ columns.mT).view(w_rows.shape)


def _cost(request: Request) -> Cost:
    problem, columns = request.problem, _columns(request.problem)
    plan = strips.layout(request, columns)
    slabs = plan.slabs(problem)
    size = compute_dtype(request.dtype).itemsize
    moved = (
        3 * (problem.taps * problem.in_channels + problem.out_channels) * problem.batch * math.prod(problem.out) * size
    )
    weight = math.prod(problem.weight_shape) * size
    seconds = (
        slabs * (5 * problem.taps + 10) * machine(request).call
        + product_seconds(request, problem.multiplies, problem.group_out, problem.group_in * problem.taps)
        + (moved + weight * (slabs + 2)) / machine(request).bytes  # the weight is copied, and read again for each slab
    )
    return Cost(problem.multiplies, moved, plan.workspace, seconds)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    strips.run(request, tensors, out, workspace, _columns(request.problem), _multiply)


ALGORITHM = Algorithm("im2col", no_integers_on_cuda, _cost, sum_error, _run)
