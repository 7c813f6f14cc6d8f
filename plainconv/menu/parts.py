"""The gradient for the input as forward convolutions: one for each phase of the stride.

Along one dimension, tap k of the kernel takes place y of the output to place  y * stride + k * dilation - lo  of the
gradient.  The places  i = stride * t + phase  are reached by every (stride / common)-th tap alone, common being the
greatest factor of stride and dilation, and what they are is a convolution with stride 1 and dilation / common, whose
taps are these in the opposite order.  (Unless common is 1, there are phases that nothing reaches.)  With stride 1 there
is one phase, and it has all taps.  Channels change places.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from plainconv.cpu.weight import Weight
from plainconv.problem import ConvProblem, Direction, Pair, Request


class Part(NamedTuple):
    """A convolution that makes a part of the result.

    request  it, as one for FORWARD
    weight   where it finds its taps in the weight
    start    the first place of the result, along each dimension, and
    step     from one to the next
    """

    request: Request
    weight: Weight
    start: tuple[int, ...]
    step: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether it is a part indeed, whose places do not follow each other in the result."""
        return any(step > 1 for step in self.step)


class _Side(NamedTuple):
    """One phase along one dimension: its taps are first, first + step, ... of the weight, first the last of them."""

    kernel: int
    padding: Pair
    dilation: int
    first: int
    step: int
    start: int


@lru_cache(4096)
def parts(request: Request) -> tuple[Part, ...] | None:
    """What a request is made of, itself if it is FORWARD; None if there are places that no output reaches."""
    problem = request.problem
    sizes = [math.prod(problem.kernel[dim + 1 :]) for dim in range(problem.dims)]
    if request.direction is Direction.FORWARD:
        steps = _three(sizes)
        ones = (1,) * problem.dims
        return (Part(request, Weight(False, problem.taps, 0, steps), (0,) * problem.dims, ones),)
    sides = [_phases(problem, dim) for dim in range(problem.dims)]
    found = []
    for phases in product(*sides):
        if any(side is None for side in phases):
            return None
        real = [side for side in phases if side is not None]
        turned = dataclasses.replace(
            problem,
            in_channels=problem.out_channels,
            out_channels=problem.in_channels,
            spatial=problem.out,
            kernel=tuple(side.kernel for side in real),
            stride=(1,) * problem.dims,
            padding=tuple(side.padding for side in real),
            dilation=tuple(side.dilation for side in real),
        )
        first = sum(side.first * size for side, size in zip(real, sizes, strict=True))
        steps = _three([side.step * size for side, size in zip(real, sizes, strict=True)])
        found.append(
            Part(
                dataclasses.replace(request, problem=turned, direction=Direction.FORWARD),
                Weight(True, problem.taps, first, steps),
                tuple(side.start for side in real),
                problem.stride,
            )
        )
    return tuple(found)


def _three(steps: list[int]) -> tuple[int, int, int]:
    depth, high, width = [0] * (3 - len(steps)) + steps
    return depth, high, width


def _phases(problem: ConvProblem, dim: int) -> list[_Side | None]:
    size, out, kernel = problem.spatial[dim], problem.out[dim], problem.kernel[dim]
    stride, dilation, (lo, _) = problem.stride[dim], problem.dilation[dim], problem.padding[dim]
    if min(stride, size) > kernel:
        return [None]  # fewer taps than phases
    common = math.gcd(stride, dilation)
    every, apart = stride // common, dilation // common  # from a tap of a phase to its next, in the weight and in y
    phases: list[_Side | None] = []
    for start in range(min(stride, size)):
        taps = [k for k in range(kernel) if (start + lo - k * dilation) % stride == 0]
        if not taps:
            phases.append(None)
            continue
        before = -(start + lo - taps[-1] * dilation) // stride  # what the last tap reads first is so far outside
        reach, made = (len(taps) - 1) * apart, -(-(size - start) // stride)
        after = made - out - before + reach
        inside = out + min(before, 0) + min(after, 0)
        side = _Side(len(taps), (before, after), apart, taps[-1], -every, start)
        phases.append(side if inside > 0 else None)
    return phases
