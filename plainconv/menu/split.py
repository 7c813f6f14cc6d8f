"""Split sums: how the gradient for a weight is made on a GPU.

    w[o, t, c]  =  sum over parts p  of  sum over m in p  of  y[m, o] * x[place(m) meets tap t, c]

m counts the places of all images.  A weight has few tiles, so the long sum is cut into parts, as many as take the least
time and as the workspace has room for; their sums lie side by side there, in the type of the sums, and are added in
order.  A single part is the result itself.  How many there are depends on the sizes alone, so that the same call gives
the same bits on the same GPU.

Cost: n * o * c/g * taps * out multiplies, sizes rounded up to those of a tile.  The workspace is a weight for each of
several parts, and of half types one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from plainconv.gpu import launch, matrices
from plainconv.gpu.parts import Made
from plainconv.menu import implicit
from plainconv.menu.base import (
    Bound,
    Buffer,
    Cost,
    Tensors,
    carve,
    compute_dtype,
    machine,
    moved_bytes,
    sum_for_bias,
    workspace_bytes,
)
from plainconv.menu.engine import padded
from plainconv.problem import Request


def cost(request: Request) -> Cost:
    """Sizes rounded up to those of the tiles; the sums of the parts are written, and read."""
    problem, split = request.problem, matrices.split_of(request, most_parts(request))
    multiplies = problem.groups * padded(problem.taps, split.beside) * padded(problem.group_out, split.outputs)
    multiplies *= padded(problem.group_in, split.inputs) * padded(problem.batch * math.prod(problem.out), split.depth)
    return priced(request, split.parts, multiplies, implicit.speed(request))


def priced(request: Request, parts: int, multiplies: int, speed: float) -> Cost:
    """What so many multiplications cost, so many a second, and parts that are added."""
    speeds, room = machine(request), workspace_bytes(kept(request, parts))
    moved = moved_bytes(request) + 2 * room
    seconds = max(multiplies / speed, moved / speeds.bytes)
    launches = 1 + (parts > 1) + _widens(request) + request.makes_bias
    return Cost(multiplies, moved, room, launches * speeds.call + seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills the gradient, and a bias' beside it, for tensors that lie in memory as these."""
    split = matrices.split_of(request, most_parts(request))
    return added(request, split.parts, partial(matrices.weights, request, split, tensors.first, tensors.second))


def added(request: Request, parts: int, launched: Callable[[Made], launch.Launch]) -> Bound:
    """The same, of a kernel that fills the sums of so many parts, of these strides."""
    buffers = kept(request, parts)
    if buffers:
        o, c, *kernel = request.problem.weight_shape
        taps = math.prod(kernel)
        fill = launched((o * taps * c, taps * c, c, 1))
    else:
        of_o, of_c, *_, of_tap = implicit.strides(request)
        fill = launched((0, of_o, of_tap, of_c))

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        if buffers:
            sums, *total = carve(workspace, buffers)
            fill(tensors.first, tensors.second, sums)
            made = out.movedim(1, -1)  # [o, *kernel, c/g]
            if parts > 1:
                sums = torch.sum(sums, 0, out=total[0] if total else made)
            if _widens(request):
                made.copy_(sums.view(made.shape))
        else:
            fill(tensors.first, tensors.second, out)
        if tensors.bias is not None:
            sum_for_bias(tensors.second, tensors.bias)

    return run


def kept(request: Request, parts: int) -> list[Buffer]:
    """The sums of each part, channels innermost, and of half types their sum; none where the result is the one part."""
    one = _whole(request)
    sums = [one._replace(shape=(parts, *one.shape))] if parts > 1 or _widens(request) else []
    return [*sums, one] if parts > 1 and _widens(request) else sums


def most_parts(request: Request) -> int:
    """For which there is room; one, if there is none."""
    return max(request.max_workspace // max(_whole(request).bytes, 1) - _widens(request), 1)


def _whole(request: Request) -> Buffer:
    """A weight in the type of the sums, channels innermost."""
    o, c, *kernel = request.problem.weight_shape
    return Buffer((o, *kernel, c), compute_dtype(request.dtype))


def _widens(request: Request) -> bool:
    return compute_dtype(request.dtype) != request.dtype
