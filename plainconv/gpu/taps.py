"""A sum for each tap: the launches of kernels/taps.py, the gradient for the weight of few channels, and its tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from plainconv.gpu.launch import VECTOR, Blocks, Launch, channels_last, compiled_for, strides, three, tiles
from plainconv.gpu.parts import Made, Meeting, parts_of
from plainconv.problem import Request


class Tile(NamedTuple):
    """How many outputs and places a row of a tile has, and how many taps it may have sums for."""

    outputs: int
    places: int
    taps: int


# The first that holds the channels, or the last: those that lie apart from each other, and neighbours.
APART = (Tile(1, 128, 28), Tile(4, 128, 25), Tile(16, 32, 9))
BESIDE = (Tile(4, 128, 25), Tile(16, 32, 25), Tile(64, 8, 16))
ROWS = 4  # of a tile, where there are rows
BLOCKS = Blocks(0, 4, 3)
AT_ONCE = 4  # programs of a multiprocessor
WAIT = 300  # cycles of a step, beside its products
PRODUCTS = 32  # of a program in a cycle of those
MOVE = 12  # loads take as long as to find the places of a step


def tile_of(request: Request, outputs: int) -> Tile:
    """That for so many outputs."""
    table = BESIDE if request.channels_last else APART
    row = next((row for row in table if outputs <= row.outputs), table[-1])
    if request.dtype.itemsize == 8:
        return row._replace(places=row.places // 2, taps=row.taps // 2)
    return row


class Taps(NamedTuple):
    """The same where channels are few: a tile, the taps that it has sums for, and the parts."""

    tile: Tile
    rows: int
    lines: int
    columns: int
    met: tuple[int, ...]  # rows of x
    tiles: int
    parts: int
    part: int


def rows_met(rows: int, lines: int, stride: int, dilation: int) -> tuple[int, ...]:
    """The rows of x that so many rows of y meet by so many lines of taps, from the first."""
    return tuple(sorted({j * stride + line * dilation for j in range(rows) for line in range(lines)}))


def taps_of(request: Request, most_parts: int) -> Taps:
    """By the sizes alone, as `split_of`."""
    problem = request.problem
    deep, high, wide = three(problem.kernel, 1)
    several = request.channels_last and problem.groups > 1
    tiled = problem.out_channels if several else problem.group_out
    tile = tile_of(request, tiled)
    rows = ROWS if problem.dims > 1 else 1
    stride, dilation = three(problem.stride, 1)[1], three(problem.dilation, 1)[1]

    def work(block: tuple[int, int]) -> int:
        """Of a step of all blocks of taps: loads, and products, which take about as long."""
        lines, columns = block
        loads = len(rows_met(rows, lines, stride, dilation)) * columns + rows
        return tiles(high, lines) * tiles(wide, columns) * (MOVE + loads + lines * columns * rows)

    fitting = [(i, j) for i in range(1, high + 1) for j in range(1, wide + 1) if i * j <= tile.taps]
    lines, columns = min(fitting, key=work)
    count = (1 if several else problem.groups) * tiles(tiled, tile.outputs) * problem.group_in
    count *= deep * tiles(high, lines) * tiles(wide, columns)
    out_d, out_h, out_w = three(problem.out, 1)
    steps = tiles(problem.batch * out_d * tiles(out_h, rows) * out_w, tile.places)
    cycles = WAIT + tile.places * tile.outputs * rows * lines * columns / PRODUCTS
    met, parts = rows_met(rows, lines, stride, dilation), parts_of(problem, count, steps, cycles, most_parts, AT_ONCE)
    return Taps(tile, rows, lines, columns, met, count, *parts)


def taps(request: Request, split: Taps, x: Tensor, y: Tensor, made: Made) -> Launch:
    """GRAD_WEIGHT without matrix units, in the parts of `taps_of`; called as `weights`."""
    from plainconv.gpu.kernels.taps import taps as kernel

    problem, widest = request.problem, VECTOR // x.dtype.itemsize
    x_last, y_last = channels_last(x, request), channels_last(y, request)
    each = problem.group_out if request.channels_last and problem.groups > 1 else 0
    groups = 1 if each else problem.groups
    of_x, of_y = strides(x.shape, x.stride()), strides(y.shape, y.stride())
    x_unit = math.gcd(widest, problem.in_channels, *of_x) if x_last and each == problem.group_in == 1 else 1
    y_unit = math.gcd(widest, problem.out_channels // groups, *of_y) if y_last else 1
    return Launch(
        kernel,
        split.tiles * split.parts,
        (
            problem.batch,
            problem.out_channels // groups // y_unit,
            groups,
            split.part,
            *Meeting.of(problem, of_x, of_y).numbers(x.stride(1), x_unit, y.stride(1), y_unit),
            *made,
        ),
        {
            **compiled_for(problem),
            "DIMS": problem.dims,
            "X_LAST": x_last,
            "Y_LAST": y_last,
            "CHANNELS": request.channels_last,
            "X_UNIT": x_unit,
            "Y_UNIT": y_unit,
            "INNER": problem.group_in,
            "EACH": each,
            "PLACES": split.tile.places,
            "OUTPUTS": split.tile.outputs,
            "ROWS": split.rows,
            "LINES": split.lines,
            "COLUMNS": split.columns,
            "MET": split.met,
            **BLOCKS.options,
        },
    )
