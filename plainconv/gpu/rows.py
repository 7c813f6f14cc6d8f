"""Rolling rows: the launches of kernels/rolling.py, which needs no matrix units, and its tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

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
from plainconv.problem import ConvProblem, Direction, Request


class Rolling(NamedTuple):
    """How many outputs and places a row of a tile has."""

    outputs: int
    places: int


# The first that holds the channels, or the last: those that lie apart from each other, and neighbours.
APART = (Rolling(1, 256), Rolling(4, 128), Rolling(16, 32))
BESIDE = (Rolling(4, 128), Rolling(16, 32), Rolling(64, 8))
ROWS = 4  # of a tile, where there are rows
ROLLING = Blocks(0, 4, 3)


def rolling_of(request: Request, outputs: int) -> Rolling:
    """The tile for so many outputs."""
    table = BESIDE if request.channels_last else APART
    row = next((row for row in table if outputs <= row.outputs), table[-1])
    return row._replace(places=max(row.places * 4 // max(request.dtype.itemsize, 4), 1))


def rolling(request: Request, read: Tensor, weight: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) without matrix units, in rows that share what they load.

    read, weight: lying as in the calls; made: the strides of the result.  Call it with what is read, the weight, bias
    and residual or None, and the result.
    """
    from plainconv.gpu.kernels.rolling import rolling as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer, end, size, period, _, phases = mapped(request)
    widest = VECTOR // read.dtype.itemsize
    read_last, made_last = channels_last(read, request), request.channels_last
    each = outer if made_last and problem.groups > 1 else 0
    groups = 1 if each else problem.groups
    tiled = outer * problem.groups // groups
    reads = strides(read.shape, read.stride())
    makes = strides(problem.shape_of(request.direction.makes), made)
    read_unit = math.gcd(widest, *reads) if read_last and each == inner == 1 else 1
    made_unit = math.gcd(widest, tiled, *makes) if made_last else 1

    gap, turn = _gaps(request)
    tile = rolling_of(request, tiled)
    programs = tiles(starts_of(request), tile.places)
    weighs = weight.stride()
    return Launch(
        kernel,
        programs * tiles(tiled, tile.outputs) * groups * phases,
        (
            problem.batch,
            tiled // made_unit,
            groups,
            *three((lo for lo, _ in problem.padding), 0),
            *three(end, 1),
            *three(size, 1),
            read.stride(1),
            *(stride // read_unit for stride in reads),
            made[1],
            *(stride // made_unit for stride in makes),
            weighs[0],
            weighs[1],
            *three(weighs[2:], 0),
        ),
        {
            **compiled_for(problem),
            "PERIOD": three(period, 1),
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "READ_UNIT": read_unit,
            "MADE_UNIT": made_unit,
            "INNER": inner,
            "EACH": each,
            "ACTIVATION": activation_of(request),
            "PLACES": tile.places,
            "OUTPUTS": tile.outputs,
            "ROWS": _rows(problem),
            "GAP": gap,
            "TURN": turn,
            **ROLLING.options,
        },
    )


def _rows(problem: ConvProblem) -> int:
    return ROWS if problem.dims > 1 else 1


def _gaps(request: Request) -> tuple[int, int]:
    """Rows from one of a tile to the next, and taps until it sees what that one saw: see kernels/rolling.py."""
    taps, stride, dilation, period = (
        three(sides, 1)[1]
        for sides in (request.problem.kernel, request.problem.stride, request.problem.dilation, mapped(request).period)
    )
    if taps == 1:
        return 1, 1
    adjoint = request.direction is Direction.GRAD_INPUT
    along, between = (1, dilation * period // stride) if adjoint else (stride, dilation)
    shared = math.gcd(along, between)
    return between // shared, along // shared


def starts_of(request: Request) -> int:
    """Places where tiles of rows begin, of all images (and of one phase)."""
    deep, high, wide = three(mapped(request).places, 1)
    gap, _ = _gaps(request)
    return request.problem.batch * deep * tiles(high, gap * _rows(request.problem)) * gap * wide
