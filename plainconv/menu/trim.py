"""Taps that see nothing but padding are left out: what remains is a convolution with a smaller kernel.

Along one dimension tap k reads, for place t of the output, element  t * stride + k * dilation - lo  of the input.  If
even the last place reads before the first element, or the first place behind the last one, the tap meets zeros alone.
So only these taps count:

    ceil((lo - (out - 1) * stride) / dilation)  <=  k  <=  floor((size - 1 + lo) / dilation)

Of 31x31 taps with padding 15 on a 7x7 map they are the 13x13 in the middle; of 3x3 taps with dilation and padding 36 on
a 33x33 map, one.  The algorithm is asked for these alone, with a view of the weight and less padding, and never hears
of the others.  The gradient for those is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from plainconv.menu.base import (
    Algorithm,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    kept_apart,
    laid,
    machine,
)
from plainconv.problem import ConvProblem, Direction, Request


class Trim(NamedTuple):
    """What is left of a request, and which taps that are: (first, behind the last) along each dimension."""

    request: Request
    taps: tuple[tuple[int, int], ...]

    def of(self, w: Tensor) -> Tensor:
        """These taps of a weight."""
        return w[(slice(None), slice(None), *(slice(first, behind) for first, behind in self.taps))]

    @property
    def room(self) -> Buffer:
        """That of their gradient, where the weight's is made."""
        return Buffer(self.request.problem.weight_shape, self.request.dtype)


@lru_cache(4096)
def trimmed(request: Request) -> Trim | None:
    """None if all taps see something, or none does."""
    problem = request.problem
    taps = tuple(_seeing(problem, dim) for dim in range(problem.dims))
    kernel = tuple(behind - first for first, behind in taps)
    if problem.padding_mode != "zeros" or kernel == problem.kernel:
        return None
    padding = tuple(
        (lo - first * dilation, hi - (size - behind) * dilation)
        for (lo, hi), (first, behind), size, dilation in zip(
            problem.padding, taps, problem.kernel, problem.dilation, strict=True
        )
    )
    left = Trim(
        dataclasses.replace(request, problem=dataclasses.replace(problem, kernel=kernel, padding=padding)), taps
    )
    if request.direction is not Direction.GRAD_WEIGHT:
        return left
    room = max(request.max_workspace - left.room.bytes, 0)  # the rest is the part's own
    return left._replace(request=dataclasses.replace(left.request, max_workspace=room))


def _seeing(problem: ConvProblem, dim: int) -> tuple[int, int]:
    size, kernel, (lo, _) = problem.spatial[dim], problem.kernel[dim], problem.padding[dim]
    last_place, dilation = (problem.out[dim] - 1) * problem.stride[dim], problem.dilation[dim]
    first, behind = max(-((last_place - lo) // dilation), 0), min((size - 1 + lo) // dilation + 1, kernel)
    return (first, behind) if first < behind else (0, kernel)


def trimming(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, which has `bind`, asked for the taps that see something."""
    bind, pack = algorithm.bind, algorithm.pack
    if bind is None:
        raise ValueError(f"{algorithm.name} has no bind")

    def left(request: Request) -> Request:
        trim = trimmed(request)
        return request if trim is None else trim.request

    def cost(request: Request) -> Cost:
        found, trim = algorithm.cost(left(request)), trimmed(request)
        if trim is None or request.direction is not Direction.GRAD_WEIGHT:
            return found
        speed, moved = machine(request), Buffer(request.problem.weight_shape, request.dtype).bytes + 2 * trim.room.bytes
        return found._replace(
            bytes=found.bytes + moved,
            workspace=found.workspace + trim.room.bytes,
            seconds=found.seconds + 2 * speed.call + moved / speed.bytes,
        )

    def bound(request: Request, tensors: Tensors) -> Bound:
        trim = trimmed(request)
        if trim is None:
            return bind(request, tensors)
        if request.direction is Direction.GRAD_WEIGHT:
            return _padded(trim, bind(trim.request, tensors))
        return _viewed(trim, tensors, lambda given: bind(trim.request, given))

    def packed(request: Request, tensors: Tensors, made: Made) -> Bound:
        assert pack is not None
        trim = trimmed(request)
        if trim is None:
            return pack(request, tensors, made)
        with kept_apart(made, trim.taps) as own:
            return _viewed(trim, tensors, lambda given: pack(trim.request, given, own))

    def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        bound(request, tensors)(tensors, out, workspace)

    return dataclasses.replace(
        algorithm,
        why_not=lambda request: algorithm.why_not(left(request)),
        cost=cost,
        error=lambda request: algorithm.error(left(request)),
        run=run,
        bind=bound,
        pack=packed if pack else None,
    )


def _viewed(trim: Trim, tensors: Tensors, bind: Callable[[Tensors], Bound]) -> Bound:
    def view(tensors: Tensors) -> Tensors:
        return tensors._replace(second=trim.of(tensors.second))

    bound = bind(view(tensors))
    return lambda tensors, out, workspace: bound(view(tensors), out, workspace)


def _padded(trim: Trim, bound: Bound) -> Bound:
    """The gradient for the weight, zeros around that of the taps that are left."""
    room = trim.room

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        part = laid(workspace[: room.bytes].view(room.dtype), room.shape, trim.request.channels_last)
        bound(tensors, part, workspace[room.bytes :])
        trim.of(out.zero_()).copy_(part)

    return call
