"""Loops: convolution as it is defined, in nothing but Python.

    for every image n, group g, output channel o, place p of the output, tap k of the kernel, input channel c:
        y[n, o, p]  +=  x[n, c, p*stride + k*dilation - lo]  *  w[o, c, k]

All three directions are this one nest of loops; they differ only in which of the three tensors is written.  No tensor
arithmetic takes part: tensors become lists, sums are Python numbers (floats of 64 bits, integers without bound), and
the result is rounded, or wrapped, once.  Cost: about a million products a second.  For teaching, and for small inputs;
on a GPU only where it is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from plainconv.border import Run, runs
from plainconv.menu.base import INTEGERS, Algorithm, Cost, Tensors, compute_dtype, sum_error
from plainconv.problem import ConvProblem, Direction, Request

PRODUCTS_PER_SECOND = 2e6

Number = int | float | complex


def _products(problem: ConvProblem) -> Iterator[tuple[int, int, int]]:
    """Index triples (x, w, y) into the flat tensors, one for each product; -1 for x where the padding is zero."""
    shown = _shown(problem)
    steps = [math.prod(problem.spatial[dim + 1 :]) for dim in range(problem.dims)]
    places, area = list(product(*map(range, problem.out))), math.prod(problem.spatial)
    taps = list(product(*map(range, problem.kernel)))
    for n, g, o in product(range(problem.batch), range(problem.groups), range(problem.group_out)):
        out_channel = g * problem.group_out + o
        for p, place in enumerate(places):
            iy = (n * problem.out_channels + out_channel) * len(places) + p
            for k, tap in enumerate(taps):
                within = 0
                for rows, i, j, step in zip(shown, place, tap, steps, strict=True):
                    source = rows[j][i]
                    within = -1 if source < 0 or within < 0 else within + source * step
                for c in range(problem.group_in):
                    in_channel = g * problem.group_in + c
                    ix = -1 if within < 0 else (n * problem.in_channels + in_channel) * area + within
                    yield ix, (out_channel * problem.group_in + c) * len(taps) + k, iy


def _shown(problem: ConvProblem) -> list[list[list[int]]]:
    """For each dimension, tap and output place: the element of the input that is read there, -1 for a zero."""
    shown = []
    for size, padding, kernel, out, stride, dilation in zip(
        problem.spatial, problem.padding, problem.kernel, problem.out, problem.stride, problem.dilation, strict=True
    ):
        strips = [runs(size, padding, problem.padding_mode, k * dilation, out, stride) for k in range(kernel)]
        shown.append([[_element(run, i) for run in strip for i in range(run.length)] for strip in strips])
    return shown


def _element(run: Run, i: int) -> int:
    return run.source + run.step * i if run.source >= 0 else -1


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    problem, direction = request.problem, request.direction
    numbers = {role: _numbers(tensor) for role, tensor in zip(direction.given, tensors[:2], strict=True)}
    sums = _start(out, None if request.makes_bias else tensors.bias)
    numbers[direction.makes] = sums
    x, w, y = numbers["x"], numbers["w"], numbers["y"]
    x.append(0)  # what the padding shows, at index -1, and where GRAD_INPUT drops what falls into it
    for ix, iw, iy in _products(problem):
        if direction is Direction.FORWARD:
            y[iy] += x[ix] * w[iw]
        elif direction is Direction.GRAD_INPUT:
            x[ix] += y[iy] * w[iw]
        else:
            w[iw] += x[ix] * y[iy]
    out.copy_(torch.tensor(_wrapped(sums[: out.numel()], out.dtype), dtype=out.dtype).view(out.shape))


def _numbers(tensor: Tensor) -> list[Number]:
    values: list[Number] = tensor.to(compute_dtype(tensor.dtype)).flatten().tolist()
    return values


def _start(out: Tensor, bias: Tensor | None) -> list[Number]:
    """One sum for every element of the result, starting at the bias of its channel."""
    if bias is None:
        return [0] * out.numel()
    area = math.prod(out.shape[2:])
    return [value for _ in range(out.shape[0]) for value in _numbers(bias) for _ in range(area)]


def _wrapped(sums: list[Number], dtype: torch.dtype) -> list[Number]:
    if dtype not in INTEGERS:
        return sums
    lowest, count = torch.iinfo(dtype).min, 1 << torch.iinfo(dtype).bits
    return [(value - lowest) % count + lowest for value in sums]  # type: ignore[operator]


def _why_not(request: Request) -> str | None:
    return None


def _cost(request: Request) -> Cost:
    multiplies = request.problem.multiplies
    return Cost(multiplies, 0, 0, multiplies / PRODUCTS_PER_SECOND)


def _error(request: Request) -> float:
    return 1.0 if compute_dtype(request.dtype).itemsize < 8 else sum_error(request)


ALGORITHM = Algorithm("loops", _why_not, _cost, _error, _run, on_host=True)
