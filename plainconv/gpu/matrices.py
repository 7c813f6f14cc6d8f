"""Matrix units: the launches of kernels/implicit.py and kernels/weights.py, and the tables of their tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.gpu.launch import (
    VECTOR,
    Blocks,
    Launch,
    activation_of,
    channels_last,
    compiled_for,
    mapped,
    strides,
    three,
    tiles,
)
from plainconv.gpu.parts import Made, Meeting, parts_of
from plainconv.problem import Direction, Request

SHALLOWEST = 16  # channels of a step, at least: what matrix units take
SHARE = 8  # tiles of places that run beside each other, so that they find the weight in the cache
# The first that holds a group's channels, or the last.
IMPLICIT = (Blocks(16, 4, 3), Blocks(32, 4, 3), Blocks(64, 4, 3), Blocks(128, 8, 3))
# Of FORWARD and GRAD_INPUT: places of a tile, channels of a step; by the bytes of a number, 0 for float32 that is not
# rounded to TF32.  Products without matrix units have both factors of a step in registers.
TILES = {2: (128, 64), 4: (128, 32), 8: (32, 16), 0: (64, 16)}
FEW_PLACES, FEW_CHANNELS = 64, 32  # at most, where fewer than 16 bytes are moved at once


class Turned(NamedTuple):
    """A tile of kernels/turned.py."""

    places: int
    channels: int
    blocks: Blocks


TURNED = Turned(64, 64, Blocks(0, 4, 1))


class Summed(NamedTuple):
    """A step of a gradient for a weight."""

    channels: int  # of all taps beside each other, at most, where they are neighbours
    few: int  # the same in tiles of 4 warps
    apart: int  # the same where fewer than 16 bytes are moved at once: each number takes registers for its address
    depth: int  # places, at most
    products: int  # that a multiprocessor makes in a cycle


# By the bytes of a number, as TILES.
SUMMED = {
    2: Summed(128, 128, 64, 64, 1400),
    4: Summed(128, 64, 64, 32, 700),
    8: Summed(32, 32, 32, 16, 100),
    0: Summed(64, 64, 32, 16, 100),
}
SPARE = 8  # of so many taps of a tile, one may be none
STEP = 300  # cycles of a step, beside its products


def blocks_of(outputs: int) -> Blocks:
    """The row of the table for so many channels of a group."""
    return next((row for row in IMPLICIT if outputs <= row.outputs), IMPLICIT[-1])


def kind_of(request: Request) -> int:
    """The key of the tables."""
    return 0 if request.dtype is torch.float32 and not request.tf32 else request.dtype.itemsize


def product_tile_of(request: Request, last: bool) -> tuple[int, int]:
    """Places along a tile of FORWARD and GRAD_INPUT, and depth of a step.

    last: whether the channels of what is read are neighbours.  Of numbers that lie apart each that a thread loads or
    stores takes registers for its address.
    """
    places, depth = TILES[kind_of(request)]
    return places if request.channels_last else min(places, FEW_PLACES), depth if last else min(depth, FEW_CHANNELS)


def precision(request: Request) -> str:
    """How float32 is multiplied, in Triton's words."""
    return "tf32" if request.tf32 else "ieee"


def enough(size: int, most: int) -> int:
    """The power of two that holds so many, or the most; what matrix units take at least."""
    power = SHALLOWEST
    while power < min(size, most):
        power *= 2
    return power


def implicit(request: Request, read: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) as an implicit matrix product.

    read: x or y, lying as in the calls; made: the strides of the result.  Call it with what is read, the weight as
    [o, taps, c/g] (contiguous), bias and residual or None, and the result.
    """
    from plainconv.gpu.kernels.implicit import implicit as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer, end, size, period, places, phases = mapped(request)
    read_last, made_last = channels_last(read, request), request.channels_last
    blocks, (rows, most), widest = blocks_of(outer), product_tile_of(request, read_last), VECTOR // read.dtype.itemsize
    reads = strides(read.shape, read.stride())
    makes = strides(problem.shape_of(request.direction.makes), made)
    inner_unit = math.gcd(widest, inner, *(reads if read_last else ()))
    outer_unit = math.gcd(widest, outer, *(makes if made_last else ()))
    if made_last and min(inner_unit, outer_unit) < widest:  # each number takes registers for its address here, too
        rows, most = min(rows, FEW_PLACES), min(most, FEW_CHANNELS)
    depth = enough(inner, most)
    programs = tiles(problem.batch * math.prod(places), rows) * tiles(outer, blocks.outputs)
    return Launch(
        kernel,
        programs * problem.groups * phases,
        (
            problem.batch,
            inner // inner_unit,
            outer // outer_unit,
            problem.groups,
            *three((lo for lo, _ in problem.padding), 0),
            *three(end, 1),
            *three(size, 1),
            read.stride(1),
            *(tuple(stride // inner_unit for stride in reads) if read_last else reads),
            made[1],
            *(tuple(stride // outer_unit for stride in makes) if made_last else makes),
        ),
        {
            **compiled_for(problem),
            "PERIOD": three(period, 1),
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "DIMS": problem.dims,
            "WHOLE": inner % depth == 0,
            "INNER_UNIT": inner_unit,
            "OUTER_UNIT": outer_unit,
            "ACTIVATION": activation_of(request),
            "PRECISION": precision(request),
            "PLACES": rows,
            "OUTPUTS": blocks.outputs,
            "DEPTH": depth,
            "SHARE": SHARE,
            **blocks.options,
        },
    )


def turned(read: Tensor) -> Launch:
    """What is read, lying as in the calls, with channels as neighbours; call it with that, and room for as much."""
    from plainconv.gpu.kernels.turned import turned as kernel

    images, channels, *sides = read.shape
    unit = math.gcd(VECTOR // read.dtype.itemsize, channels)
    return Launch(
        kernel,
        tiles(images * math.prod(sides), TURNED.places) * tiles(channels, TURNED.channels),
        (images, channels // unit, *three(sides, 1), read.stride(1), *strides(tuple(read.shape), read.stride())),
        {
            "DIMS": len(sides),
            "UNIT": unit,
            "PLACES": TURNED.places,
            "CHANNELS": TURNED.channels,
            **TURNED.blocks.options,
        },
    )


class Split(NamedTuple):
    """How the gradient for a weight is cut: its tiles, and the long sum into parts of so many steps."""

    outputs: int
    inputs: int  # of each tap
    beside: int  # taps
    depth: int  # places of a step
    tiles: int
    parts: int
    part: int


def split_of(request: Request, most_parts: int) -> Split:
    """By the sizes alone.  As many taps are beside each other as fit, unless too many places are left over."""
    problem = request.problem
    summed, blocks = SUMMED[kind_of(request)], blocks_of(problem.group_out)
    outputs, depth = blocks.outputs, summed.depth
    most = summed.few if blocks.warps == 4 else summed.channels
    widest = VECTOR // request.dtype.itemsize
    if not request.channels_last or problem.group_in % widest or problem.group_out % widest:
        most, depth = summed.apart, min(depth, FEW_CHANNELS)
    inputs, beside = enough(problem.group_in, most), 1
    while 2 * beside * inputs <= most and tiles(problem.taps, 2 * beside) * 2 * beside * SPARE <= problem.taps * (
        SPARE + 1
    ):
        beside *= 2
    count = problem.groups * tiles(problem.taps, beside) * tiles(problem.group_out, outputs)
    count *= tiles(problem.group_in, inputs)
    steps = tiles(problem.batch * math.prod(problem.out), depth)
    cycles = STEP + outputs * beside * inputs * depth / summed.products
    return Split(outputs, inputs, beside, depth, count, *parts_of(problem, count, steps, cycles, most_parts))


def weights(request: Request, split: Split, x: Tensor, y: Tensor, made: Made) -> Launch:
    """GRAD_WEIGHT in the parts of `split_of`.

    x, y: lying as in the calls.  Call it with both, and the sums of the parts to fill, in the type of the sums.
    """
    from plainconv.gpu.kernels.weights import weights as kernel

    problem, widest = request.problem, VECTOR // x.dtype.itemsize
    blocks = blocks_of(problem.group_out)
    x_last, y_last = channels_last(x, request), channels_last(y, request)
    of_x, of_y = strides(x.shape, x.stride()), strides(y.shape, y.stride())
    x_unit = math.gcd(widest, problem.group_in, *of_x) if x_last else 1
    y_unit = math.gcd(widest, problem.group_out, *of_y) if y_last else 1
    places = Meeting.of(problem, of_x, of_y).simply(problem, x_last, y_last)
    return Launch(
        kernel,
        split.tiles * split.parts,
        (
            places.images,
            problem.group_in // x_unit,
            problem.group_out // y_unit,
            problem.groups,
            split.part,
            *places.numbers(x.stride(1), x_unit, y.stride(1), y_unit),
            *made,
        ),
        {
            **compiled_for(problem),
            "DIMS": places.dims,
            "Y_DIMS": places.y_dims,
            "X_LAST": x_last,
            "Y_LAST": y_last,
            "X_UNIT": x_unit,
            "Y_UNIT": y_unit,
            "PRECISION": precision(request),
            "OUTPUTS": split.outputs,
            "INPUTS": split.inputs,
            "BESIDE": split.beside,
            "DEPTH": split.depth,
            **blocks.options,
        },
    )
