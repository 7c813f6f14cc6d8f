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
from plainconv.problem import Direction, Request


class Tile(NamedTuple):
    """How many outputs a tile has, and in how many places threads begin, which have so many rows and columns each."""

    outputs: int
    places: int
    rows: int
    columns: int


# Of lines alone, of rows, and in channels_last: the first that holds the channels, or the last.
TILES_OF_LINES = (Tile(1, 128, 1, 2), Tile(4, 64, 1, 4), Tile(16, 32, 1, 2))
TILES_OF_ROWS = (Tile(1, 32, 8, 2), Tile(4, 32, 4, 2), Tile(16, 32, 2, 1))
TILES_BESIDE = (Tile(4, 64, 1, 8), Tile(16, 16, 1, 8), Tile(32, 8, 1, 8))
FEW_TAPS = 5  # along the rows: with more, a tile has fewer of them, since what is written out takes long to compile
ACROSS = 8  # taps along the width that a row is loaded for
ALONE = Blocks(0, 1, 3)  # a warp for each program: small maps and few channels are to busy all multiprocessors
PAIR = Blocks(0, 2, 3)  # in channels_last: with one, Triton moves what is loaded through shared memory


def tile_of(request: Request) -> Tile:
    """The tile of FORWARD and GRAD_INPUT."""
    problem, last, outputs = request.problem, request.channels_last, _outputs(request)
    table = TILES_BESIDE if last else TILES_OF_LINES if problem.dims == 1 else TILES_OF_ROWS
    tile = next((tile for tile in table if outputs <= tile.outputs), table[-1])
    if not last:
        tile = tile._replace(outputs=max(min(outputs, tile.outputs), 1))
        if problem.dims > 1 and problem.kernel[-2] > FEW_TAPS:
            tile = tile._replace(rows=min(tile.rows, 4))
    elif problem.groups == 1:  # all lanes see the same: a column at a time moves between them
        return tile._replace(rows=4 if problem.dims > 1 else 1, columns=1)
    crowded = [request.dtype.itemsize > 4]  # registers hold half as many, for each
    if last:
        crowded += [problem.stride[-1] > 1, problem.group_in * problem.group_out > 1]
    return tile._replace(columns=max(tile.columns >> sum(crowded), 1))


def _across(request: Request, tile: Tile) -> tuple[int, ...]:
    """Into what blocks the taps along the width are cut: how many taps, how often; and those that are left, once."""
    problem = request.problem
    taps = problem.kernel[-1]
    unknown = request.direction is Direction.GRAD_INPUT and problem.stride[-1] > 1  # how many a phase has
    if unknown or (request.channels_last and problem.groups == 1):
        return 1, taps
    block = tiles(taps, tiles(taps, ACROSS if tile.outputs <= 4 or request.channels_last else ACROSS // 2))
    return (block, taps // block, taps % block, 1) if taps % block else (block, taps // block)


def _unrolled(request: Request, tile: Tile) -> int:
    """Taps along the rows that are written out, so that the rows in registers need not move."""
    taps = three(request.problem.kernel, 1)[1]
    if tile.outputs == 1:
        return taps if taps < ACROSS else tile.rows
    return taps if tile.rows > 1 and taps <= 3 and tile.outputs <= 4 else 1


class Cut(NamedTuple):
    """How the outputs and places of a request are cut."""

    tile: Tile
    outputs: int  # that are cut into tiles: those of a group, or in channels_last all
    starts: tuple[int, int, int]  # as `starts_of`, or where tiles begin in a line
    places: int  # tiles of them
    programs: int


def cut_of(request: Request) -> Cut:
    """By the sizes alone."""
    problem, tile, outputs = request.problem, tile_of(request), _outputs(request)
    deep, down, right = starts_of(request, tile)
    if problem.dims == 1:  # a tile is of one line
        right = tiles(right, tile.places)
        places = problem.batch * right
    else:
        places = tiles(problem.batch * deep * down * right, tile.places)
    groups = 1 if request.channels_last else problem.groups
    starts = deep, down, right
    return Cut(tile, outputs, starts, places, places * tiles(outputs, tile.outputs) * groups * mapped(request).phases)


def _outputs(request: Request) -> int:
    return mapped(request).outer * (request.problem.groups if request.channels_last else 1)


def divisor(d: int) -> tuple[int, int]:
    """A number, and what `quotient` of kernels/places.py is told of it: the factor, and behind it the shift.

        m // d  =  m * factor >> (31 + shift)         2^shift >= d,  factor = floor(2^(31 + shift) / d) + 1 < 2^32

    It is exact for m < 2^31: factor * d is above 2^(31 + shift) by d <= 2^shift at most, and m times that is less than
    2^(31 + shift), one unit of the quotient.  Divisions of numbers that are not known before take 20 instructions.
    """
    shift = max(d - 1, 0).bit_length()
    return d, (2 ** (31 + shift) // max(d, 1) + 1) << 5 | shift


def rolling(request: Request, read: Tensor, weight: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) without matrix units, in rows that share what they load.

    read, weight: lying as in the calls; made: the strides of the result.  Call it with what is read, the weight, bias
    and residual or None, and the result.
    """
    from plainconv.gpu.kernels.rolling import rolling as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer, end, size, period, *_ = mapped(request)
    widest = VECTOR // max(read.dtype.itemsize, 4)  # of sums, that a thread keeps in registers
    read_last, made_last = channels_last(read, request), request.channels_last
    each = outer if made_last and problem.groups > 1 else 0
    tile, tiled, starts, places, programs = cut_of(request)
    reads = strides(read.shape, read.stride())
    makes = strides(problem.shape_of(request.direction.makes), made)
    read_unit = math.gcd(widest, tiled, *reads) if read_last and each == inner == 1 else 1
    made_unit = math.gcd(widest, tiled, *makes) if made_last else 1

    gaps, turns = zip(*(_gap(request, axis) for axis in (1, 2)), strict=True)
    weighs = weight.stride()
    return Launch(
        kernel,
        programs,
        (
            problem.batch,
            tiled // made_unit,
            *(number for each in (places, *starts) for number in divisor(each)),
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
            "DIMS": problem.dims,
            "PERIOD": three(period, 1),
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "READ_ALONG": read.stride(-1) == 1 and not read_last,
            "MADE_ALONG": made[-1] == 1 and not made_last,
            "TAPS_ALONG": weight[:1, :1].is_contiguous(),
            "READ_UNIT": read_unit,
            "MADE_UNIT": made_unit,
            "INNER": inner,
            "EACH": each,
            "WHOLE": tile.outputs == tiled and not made_last,
            "ACTIVATION": activation_of(request),
            "PLACES": tile.places,
            "OUTPUTS": tile.outputs,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "GAP": gaps,
            "TURN": turns,
            "ACROSS": _across(request, tile),
            "UNROLLED": _unrolled(request, tile),
            **(PAIR if made_last else ALONE).options,
        },
    )


def _gap(request: Request, axis: int) -> tuple[int, int]:
    """Places from one of a thread to the next, and taps until it sees what that one saw: see kernels/rolling.py."""
    problem = request.problem
    taps, stride, dilation, period = (
        three(sides, 1)[axis] for sides in (problem.kernel, problem.stride, problem.dilation, mapped(request).period)
    )
    if taps == 1:
        return 1, 1
    adjoint = request.direction is Direction.GRAD_INPUT
    along, between = (1, dilation * period // stride) if adjoint else (stride, dilation)
    shared = math.gcd(along, between)
    return between // shared, along // shared


def starts_of(request: Request, tile: Tile) -> tuple[int, int, int]:
    """In how many depths, rows and columns threads begin, in each image (and phase)."""
    deep, high, wide = three(mapped(request).places, 1)
    (down, _), (right, _) = (_gap(request, axis) for axis in (1, 2))
    return deep, tiles(high, down * tile.rows) * down, tiles(wide, right * tile.columns) * right
