"""Split sums: how the gradient for a weight is made on a GPU.

    w[o, t, c]  =  sum over parts p  of  sum over m in p  of  y[m, o] * x[place(m) meets tap t, c]

m counts the places of all images.  A weight has few tiles, so the long sum is cut into as many parts as keep a GPU
busy; their sums lie side by side in the workspace, in the type of the sums, and are added in order.  How many there are
depends on the sizes alone, so that the same call gives the same bits on the same GPU.

Cost: n * o * c/g * taps * out multiplies, sizes rounded up to those of a tile.  The workspace is a weight for each
part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plainconv.gpu import launch
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
    problem, split = request.problem, launch.split_of(request)
    multiplies = problem.groups * problem.taps * padded(problem.group_out, split.outputs)
    multiplies *= padded(problem.group_in, split.inputs) * padded(problem.batch * math.prod(problem.out), split.depth)
    return priced(request, split.parts, multiplies, implicit.speed(request))


def priced(request: Request, parts: int, multiplies: int, speed: float) -> Cost:
    """What so many multiplications cost, so many a second, and parts that are added."""
    speeds, room = machine(request), workspace_bytes(kept(request, parts))
    moved = moved_bytes(request) + 2 * room
    seconds = max(multiplies / speed, moved / speeds.bytes)
    return Cost(multiplies, moved, room, (3 + request.makes_bias) * speeds.call + seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills the gradient, and a bias' beside it, for tensors that lie in memory as these."""
    parts = launch.split_of(request).parts
    return added(request, parts, launch.weights(request, tensors.first, tensors.second))


def added(request: Request, parts: int, fill: launch.Launch) -> Bound:
    """The same, of a kernel that fills the sums of so many parts."""
    buffers = kept(request, parts)

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        parts, total = carve(workspace, buffers)
        fill(tensors.first, tensors.second, parts)
        torch.sum(parts, 0, out=total)
        out.copy_(total.movedim(-1, 1))
        if tensors.bias is not None:
            sum_for_bias(tensors.second, tensors.bias)

    return run


def kept(request: Request, parts: int) -> list[Buffer]:
    """The sums of each part, and their sum: channels innermost."""
    o, c, *kernel = request.problem.weight_shape
    dtype = compute_dtype(request.dtype)
    return [Buffer((parts, o, *kernel, c), dtype), Buffer((o, *kernel, c), dtype)]
