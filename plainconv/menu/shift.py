"""Shift: one product over channels for each tap of the kernel, added into a shifted view.

    Y[o, :]  +=  W[k][o, c] @ X[c, :] moved by k          for every tap k of the kernel

This is the seed of the project.  A picture in memory is one long row of numbers, so moving it by (ky, kx) is moving
the row by  ky * width + kx:  no copy, only another starting point.  The flat product also fills the few columns where
the kernel hangs over the end of a line and wraps into the next; they are simply not stored.  Images lie side by side
in the same long row, so that one product serves them all.

A stride s splits the padded input into s phases along each dimension, x[phase + s*j].  Tap k belongs to phase
(k*d) mod s and moves within it by (k*d) div s, where the stride has become 1; nothing is computed and thrown away.

The other directions read the same equation the other way round:

    GRAD_INPUT    X moved by k  +=  W[k].T @ Y             GRAD_WEIGHT   W[k]  +=  Y @ (X moved by k).T

Cost: n * o * c/g * taps * out multiplies, and each tap passes once over the slab, which is kept within the cache.
A column that is not stored is multiplied by zero in the gradients, so a NaN or infinity may spread to its neighbours
there; FORWARD is exact about them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

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
def _phases(problem: ConvProblem) -> strips.Strips:
    used = [
        sorted({k * d % s for k in range(size)})
        for size, d, s in zip(problem.kernel, problem.dilation, problem.stride, strict=True)
    ]
    last = zip(problem.kernel, problem.dilation, problem.stride, strict=True)
    return strips.Strips(tuple(product(*used)), tuple((size - 1) * d // s for size, d, s in last))


@lru_cache(1024)
def _moves(problem: ConvProblem, lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """For every tap, the index of its phase and how far it moves in the flat row of that phase."""
    offsets = _phases(problem).offsets
    weights = [math.prod(lengths[dim + 1 :]) for dim in range(problem.dims)]
    moves = []
    for place in strips.taps(problem):
        phase = tuple(p % s for p, s in zip(place, problem.stride, strict=True))
        steps = (p // s for p, s in zip(place, problem.stride, strict=True))
        moves.append((offsets.index(phase), sum(step * weight for step, weight in zip(steps, weights, strict=True))))
    return tuple(moves)


def _multiply(request: Request, lengths: tuple[int, ...], xs: Tensor, w: Tensor, ys: Tensor) -> None:
    moves = _moves(request.problem, lengths)
    length = ys.shape[2] - moves[-1][1]  # the last tap moves farthest
    y = ys[:, :, :length]  # [g, o, L]
    for tap, (phase, move) in enumerate(moves):
        x = xs[:, phase, :, move : move + length]  # [g, c, L]
        if request.direction is Direction.FORWARD:
            add_product(y, w[:, tap], x)
        elif request.direction is Direction.GRAD_INPUT:
            add_product(x, w[:, tap].mT, y)
        else:
            add_product(w[:, tap], y, x.mT)


def _cost(request: Request) -> Cost:
    problem, phases = request.problem, _phases(request.problem)
    plan = strips.layout(request, phases)
    pitch = math.prod(strips.pitch(phases, plan.block))
    slabs, columns = plan.slabs(problem), plan.images * pitch
    multiplies = slabs * columns * problem.out_channels * problem.group_in * problem.taps
    size = compute_dtype(request.dtype).itemsize
    per_tap = slabs * columns * (problem.in_channels + 2 * problem.out_channels) * size
    moved = 3 * slabs * columns * (len(phases.offsets) * problem.in_channels + problem.out_channels) * size
    seconds = (
        slabs * (problem.taps + 4 * len(phases.offsets) + 6) * machine(request).call
        + product_seconds(request, multiplies, problem.group_out, problem.group_in) * (1.5 if problem.groups > 1 else 1)
        # A slab stays in the cache; the weight is copied.
        + (moved + per_tap * problem.taps / 8 + 1.5 * math.prod(problem.weight_shape) * size) / machine(request).bytes
    )
    return Cost(multiplies, moved, plan.workspace, seconds)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    strips.run(request, tensors, out, workspace, _phases(request.problem), _multiply)


ALGORITHM = Algorithm("shift", no_integers_on_cuda, _cost, sum_error, _run)
