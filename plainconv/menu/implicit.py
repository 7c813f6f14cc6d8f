"""Implicit GEMM: the product of matrices that `direct` and `pointwise` are on a GPU.

    y[m, o]  =  sum over t, c  of  x[place(m) meets tap t, c] * w[o, t, c]         m: the places of all images

The windows are not written down: each step of the product loads its tile of them from where the tap lies, borders and
strides taken care of, and of the weight, whose channels are made neighbours first if they are none.  The gradient for
the input is the same product, of y, in phases of the stride: plainconv/gpu/kernels/implicit.py.

Cost: n * o * c/g * taps * out multiplies, sizes rounded up to those of a tile.  The workspace is room for the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plainconv.gpu import launch, matrices
from plainconv.menu.base import Bound, Buffer, Cost, Made, Tensors, carve, machine, moved_bytes, workspace_bytes
from plainconv.menu.engine import padded, unlike
from plainconv.problem import FORMATS, Direction, Request

MOST_PLACES = 1 << 30  # a kernel counts them in 32 bits; places in memory have 64
SPEED = {2: 8.0, 4: 1.0, 8: 0.5}  # of a product, by bytes of a number, beside float32 as it is
TF32 = 4.0  # the same


def why_not(request: Request) -> str | None:
    """The sentence for what the kernels do not do."""
    problem = request.problem
    if problem.batch * max(math.prod(problem.padded), math.prod(problem.spatial)) > MOST_PLACES:
        return f"its kernels count at most {MOST_PLACES} places of all images together"
    return unlike(request) or launch.why_not(request.gpu)


def cost(request: Request) -> Cost:
    """Sizes rounded up to those of the tiles; the weight is copied, as it may have to be."""
    problem = request.problem
    inner, outer, places = problem.group_in, problem.group_out, problem.out
    if request.direction is Direction.GRAD_INPUT:
        inner, outer = outer, inner
    multiplies = padded(problem.batch * math.prod(places), matrices.product_tile_of(request)[0])
    multiplies *= padded(outer, matrices.blocks_of(outer).outputs)
    multiplies *= problem.groups * problem.taps * padded(inner, matrices.SHALLOWEST)
    speeds, room = machine(request), 0 if request.packed else workspace_bytes([_room(request)])
    moved = moved_bytes(request) + 2 * room
    seconds = max(multiplies / speed(request), moved / speeds.bytes)
    return Cost(multiplies, moved, room, (1 if request.packed else 2) * speeds.call + seconds)


def speed(request: Request) -> float:
    """Multiplications in a second."""
    return machine(request).multiplies * (TF32 if request.tf32 else SPEED[request.dtype.itemsize])


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: of a weight that stays."""
    room = _room(request)
    fill = matrices.implicit(request, tensors.first, strides(request))
    lies = tensors.second.movedim(1, -1).is_contiguous()  # as [o, taps, c/g]
    stays = None
    if made is not None:
        key = "channels innermost", request.dtype
        if key not in made:
            made[key] = tensors.second.movedim(1, -1).contiguous()
        stays = made[key]

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        read, w, bias, residual = tensors
        if stays is not None:
            w = stays
        elif not lies:
            w = carve(workspace, [room])[0].copy_(w.movedim(1, -1))
        fill(read, w, in_order(bias), residual, out)

    return run


def in_order(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it, one number after the other; it may be a view, or expanded."""
    return None if bias is None else bias.contiguous()


def strides(request: Request) -> tuple[int, ...]:
    """Of the result."""
    shape = request.problem.shape_of(request.direction.makes)
    lies = FORMATS[len(shape)] if request.channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=lies).stride()


def _room(request: Request) -> Buffer:
    """For the weight, channels innermost."""
    o, c, *kernel = request.problem.weight_shape
    return Buffer((o, *kernel, c), request.dtype)
