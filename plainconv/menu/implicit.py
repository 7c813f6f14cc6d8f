"""Implicit GEMM: the product of matrices that `direct` and `pointwise` are on a GPU.

    y[m, o]  =  sum over t, c  of  x[place(m) meets tap t, c] * w[o, t, c]         m: the places of all images

The windows are not written down: each step of the product loads its tile of them from where the tap lies, borders and
strides taken care of, and of the weight, whose channels are made neighbours first if they are none.  The gradient for
the input is the same product, of y, in phases of the stride: plainconv/gpu/kernels/implicit.py.

Half types whose channels lie apart are loaded number by number, through the registers, and wait for each step's; where
there are many products for each, all are turned first, so that channels are neighbours (gpu/kernels/turned.py).

Cost: n * o * c/g * taps * out multiplies, sizes rounded up to those of a tile.  The workspace is room for the weight,
and for what is turned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plainconv.gpu import launch, matrices
from plainconv.menu.base import (
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    kept_tensor,
    machine,
    moved_bytes,
    workspace_bytes,
)
from plainconv.menu.engine import padded, unlike
from plainconv.problem import FORMATS, Direction, Request

MOST_PLACES = 1 << 30  # a kernel counts them in 32 bits; places in memory have 64
SPEED = {2: 8.0, 4: 1.0, 8: 0.5}  # of a product, by bytes of a number, beside float32 as it is
TF32 = 4.0  # the same
# Counted, not measured (H200): a multiprocessor makes some 1200 products of half types in a cycle (shared memory binds
# a tile of 64x128), or some 550 where each step waits for numbers that are loaded one by one, and moves 18 bytes.  To
# turn a number moves 4 bytes, which is what 220 products gain; a launch of 2 us is what 470 million gain.
TURNED_FROM = 256, 1 << 29  # products for each number, and in all


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
    turns = _turns(request)
    tile = matrices.product_tile_of(request, request.channels_last or turns)
    multiplies = padded(problem.batch * math.prod(places), tile[0])
    multiplies *= padded(outer, matrices.blocks_of(outer).outputs)
    multiplies *= problem.groups * problem.taps * padded(inner, matrices.SHALLOWEST)
    speeds, room = machine(request), workspace_bytes(_rooms(request))
    moved = moved_bytes(request) + 2 * room
    seconds = max(multiplies / speed(request), moved / speeds.bytes)
    return Cost(multiplies, moved, room, (1 + (not request.packed) + turns) * speeds.call + seconds)


def speed(request: Request) -> float:
    """Multiplications in a second."""
    return machine(request).multiplies * (TF32 if request.tf32 else SPEED[request.dtype.itemsize])


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: of a weight that stays."""
    rooms, first, turn = _rooms(request), tensors.first, None
    if _turns(request) and not launch.channels_last(first, request):
        turn = matrices.turned(first)
        first = _turned(torch.empty(_seen(request).shape, dtype=first.dtype, device="meta"))
    fill = matrices.implicit(request, first, strides(request))
    copies = made is None and not tensors.second.movedim(1, -1).is_contiguous()  # to [o, taps, c/g]
    stays = None
    if made is not None:
        key = "channels innermost", request.dtype
        stays = kept_tensor(made, key, tensors.second.movedim(1, -1).contiguous)

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        read, w, bias, residual = tensors
        room = carve(workspace, rooms) if copies or turn is not None else []
        if turn is not None:
            turn(read, room[-1])
            read = _turned(room[-1])
        if stays is not None:
            w = stays
        elif copies:
            w = room[0].copy_(w.movedim(1, -1))
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


def _turns(request: Request) -> bool:
    """Whether what is read is turned first: by the sizes alone, and if there is room beside what others may need."""
    if request.dtype.itemsize != 2 or request.channels_last:
        return False
    problem, seen, (each, least) = request.problem, _seen(request), TURNED_FROM
    many = problem.multiplies >= max(least, each * math.prod(seen.shape))
    whole = seen.shape[-1] // problem.groups % (launch.VECTOR // 2) == 0  # else they are not moved 16 bytes at once
    return many and whole and workspace_bytes([_room(request), seen]) <= request.max_workspace // 2


def _turned(places: Tensor) -> Tensor:
    """As it was before: channels follow the images."""
    return places.movedim(-1, 1)


def _seen(request: Request) -> Buffer:
    """For what is read, channels innermost."""
    n, c, *sides = request.problem.shape_of("x" if request.direction is Direction.FORWARD else "y")
    return Buffer((n, *sides, c), request.dtype)


def _room(request: Request) -> Buffer:
    """For the weight, channels innermost."""
    o, c, *kernel = request.problem.weight_shape
    return Buffer((o, *kernel, c), request.dtype)


def _rooms(request: Request) -> list[Buffer]:
    """For the weight, unless it stays, and for what is turned."""
    return [_room(request)] * (not request.packed) + [_seen(request)] * _turns(request)
