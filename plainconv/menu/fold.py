"""The gradient for the input of a padding mode, by algorithms that know only zeros.

A mode shows elements again in the border; its adjoint adds what falls there to the elements that were shown.  So the
gradient of the padded input is made, an input that has no padding, and its border is folded onto what is inside, piece
by piece in a fixed order.  Sums are kept in the type that they are summed in until bias, residual and activation are
done, and rounded once.

Cost: a workspace of the padded input's size, and a pass over it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from plainconv.border import runs, scatter_add
from plainconv.menu.base import (
    Algorithm,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    compute_dtype,
    finish,
    finish_seconds,
    machine,
    workspace_bytes,
)
from plainconv.problem import Direction, Request


def folding(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, which has `bind`, and also serves the gradient for the input of every padding mode."""
    bind, pack = algorithm.bind, algorithm.pack
    if bind is None:
        raise ValueError(f"{algorithm.name} has no bind")

    def why_not(request: Request) -> str | None:
        if not _folds(request):
            return algorithm.why_not(request)
        # Asked of the tensors' own type, though what is padded is summed in a wider one.
        return algorithm.why_not(dataclasses.replace(_padded(request), dtype=request.dtype))

    def cost(request: Request) -> Cost:
        return _cost(request, algorithm.cost(_padded(request))) if _folds(request) else algorithm.cost(request)

    def bound(request: Request, tensors: Tensors) -> Bound:
        return _bind(request, tensors, bind) if _folds(request) else bind(request, tensors)

    def packed(request: Request, tensors: Tensors, made: Made) -> Bound:
        """Where it folds, the weight is widened once, too."""
        assert pack is not None
        if not _folds(request):
            return pack(request, tensors, made)
        wide = tensors.second.to(compute_dtype(request.dtype))
        return _bind(request, tensors._replace(second=wide), lambda asked, given: pack(asked, given, made), wide)

    def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        bound(request, tensors)(tensors, out, workspace)

    held = packed if pack else None
    return dataclasses.replace(algorithm, why_not=why_not, cost=cost, run=run, bind=bound, pack=held)


def _folds(request: Request) -> bool:
    return request.direction is Direction.GRAD_INPUT and request.problem.padding_mode != "zeros"


@lru_cache(4096)
def _padded(request: Request) -> Request:
    """The gradient of the padded input, before anything is added to it."""
    problem = dataclasses.replace(
        request.problem,
        spatial=request.problem.padded,
        padding=((0, 0),) * request.problem.dims,
        padding_mode="zeros",
    )
    kept = compute_dtype(request.dtype)
    return dataclasses.replace(
        request, problem=problem, dtype=kept, has_bias=False, has_residual=False, activation=None
    )


def _buffers(request: Request) -> list[Buffer]:
    """The padded input's gradient; and of half types the sums, and what is given, wider."""
    problem, kept = request.problem, compute_dtype(request.dtype)
    shapes = [_padded(request).problem.input_shape]
    if kept != request.dtype:
        shapes += [problem.input_shape, problem.output_shape, problem.weight_shape]
    return [Buffer(shape, kept) for shape in shapes]


def _cost(request: Request, inner: Cost) -> Cost:
    buffers = _buffers(request)
    passes = 4 * sum(math.prod(buffer.shape) for buffer in buffers) * buffers[0].dtype.itemsize
    seconds = inner.seconds + passes / machine(request).bytes + 8 * machine(request).call + finish_seconds(request)
    return Cost(inner.multiplies, inner.bytes + passes, workspace_bytes(buffers) + inner.workspace, seconds)


def _laid(buffer: Tensor, like: Request) -> Tensor:
    """A buffer whose memory has the format of the request's tensors."""
    if not like.channels_last:
        return buffer
    batch, channels, *inner = buffer.shape
    return buffer.view(batch, *inner, channels).movedim(-1, 1)


def _bind(
    request: Request, tensors: Tensors, bind: Callable[[Request, Tensors], Bound], stays: Tensor | None = None
) -> Bound:
    """stays: the weight in the type of the sums, if it is not to be made in each call."""
    problem, padded, buffers = request.problem, _padded(request), _buffers(request)
    used, widens = workspace_bytes(buffers), len(buffers) > 1
    axes = [
        runs(size, pair, problem.padding_mode, 0, size + sum(pair))
        for size, pair in zip(problem.spatial, problem.padding, strict=True)
    ]
    given = Tensors(tensors.first, tensors.second)
    if widens:
        y, w = (torch.empty(shape, dtype=padded.dtype, device="meta") for shape, _ in buffers[2:])
        given = Tensors(_laid(y, request), w if stays is None else stays)
    call = bind(padded, given)

    def fold(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        room, *wide = carve(workspace, buffers)
        strip, total, y, w = _laid(room, request), out, tensors.first, tensors.second
        if widens:
            total, y = _laid(wide[0], request), _laid(wide[1], request).copy_(y)
            w = wide[2].copy_(w) if stays is None else stays
        call(Tensors(y, w), strip, workspace[used:])
        total.zero_()
        scatter_add(strip, axes, total)
        if tensors.bias is not None:
            total += tensors.bias.view(-1, *(1,) * problem.dims)
        finish(request, tensors, total)
        if widens:
            out.copy_(total)

    return fold
