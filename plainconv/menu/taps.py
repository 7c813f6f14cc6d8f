"""How `narrow` and `depthwise` make the gradient for the weight: how it is cut, and what its kernel is told.

Nothing is padded and nothing is copied; a tile of taps is kept in registers while an item (some images, some rows) is
read.  Threads get parts of the groups, or chunks of the items with sums of their own.  The kernel itself is in
plainconv/cpu/taps.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import taps
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch_all
from plainconv.menu import engine
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors, moved_bytes
from plainconv.menu.engine import STORED, Side, folded, padded, summed
from plainconv.problem import ConvProblem, Request
from plainconv.remember import on_forget, weigh

VECTORS = 2048  # of an item, at most: sums that are no longer lose few digits
ITEM_BYTES = 256 << 10  # of an item that is read more than once
SHORT = 32  # vectors of a row that is short
LEAST_COLUMNS = 4  # of an item
ITEMS = 4  # for each thread, at least, so that shares come out even
ROWS = (8, 7, 6, 5, 4, 3, 2, 1)  # of a tile

# Cycles, fitted by hand on one core with AVX-512; see plainconv/menu/lanes.py.
CYCLES_PER_SECOND = 3.66e9
LOAD = 1.3  # a vector
GATHER = 1.6  # a lane that is loaded by itself
SHUFFLE = 1.9  # lanes picked for a stride
CONVERT = 2.0
HIDDEN = 0.25
ROW = 0.75  # the address of an input row
STEP = 3.0  # rows of a tile
COLUMN = 12.0
WAIT = 4.0  # a product waits for the one before it
PLANE = 25.0
SUM = 4.0  # the lanes of a register added
TILE = 20.0
TOTAL = 2.0  # a weight
BYTES_PER_SECOND = 13e9  # a thread, of memory
CACHED_BYTES = 16 << 20


class Tile(NamedTuple):
    """Outputs x high x wide taps, each a register of sums; and rows of the output's gradient that share loads."""

    outputs: int
    high: int
    wide: int
    rows: int


class Way(NamedTuple):
    """A way to cut a request: lanes of a vector, a tile; planes, rows and columns of an item.

    parts   of the groups that threads share, times chunks of the items: shares
    cycles  of one share
    """

    lanes: int
    outputs: int
    high: int
    wide: int
    rows: int
    block_planes: int
    block_rows: int
    block_columns: int
    parts: int
    chunks: int
    cycles: float


class Sizes(NamedTuple):
    """Counts that follow from a way."""

    output_tiles: int
    high_tiles: int
    wide_tiles: int
    unit: int
    items: int
    row_blocks: int
    column_blocks: int


def _even(count: int, most: int) -> int:
    """The largest of equal parts of so many, none of which is larger than `most`."""
    count = max(count, 1)
    return -(-count // -(-count // most))


def _tiles(request: Request, sides: tuple[Side, Side, Side], registers: int, lanes: int) -> Iterator[Tile]:
    """Outputs, taps of the rows and of the width, and rows, that fit the registers."""
    _, high, width = sides
    spare = registers - (4 if width.stride == 1 else 3 + min(width.stride, taps.PICKED_STRIDE) + 1)
    for outputs in sorted({_even(request.problem.group_out, most) for most in (1, 2, 3, 4, 6)}):
        for wide in sorted({_even(width.kernel, most) for most in (1, 2, 3, 5, 7, 9, 16)}):
            if width.stride == 2 and wide > 1 and (wide - 1) * width.dilation > lanes + 1:
                continue  # what a tap lacks is not in the next vector
            for tall in sorted({_even(high.kernel, most) for most in (1, 2, 3, 5, 7, 9)}):
                sums = outputs * wide * tall
                fitting = (rows for rows in ROWS if rows <= high.out and sums + outputs * rows <= spare)
                if rows := next(fitting, 0):
                    even = {_even(high.out, rows)} if high.out <= 2 * rows else {rows}
                    for one in even | {1}:
                        yield Tile(outputs, tall, wide, one)


def _columns(width: Side, lanes: int, wide: int) -> tuple[int, int, int]:
    """Vectors of a row: all, at the left edge, and inside."""
    count, step = -(-width.out // lanes), lanes * width.stride
    reach = (width.kernel - wide) * width.dilation + taps.reach(lanes, width.stride, (wide - 1) * width.dilation)
    head = min(-(-max(width.padding[0], 0) // step), count)
    good = min((width.size + width.padding[0] - reach) // step + 1, width.out // lanes)
    inside = max(min(good, count) - head, 0)
    return count, head, inside


def _gathers(width: Side, mode: str) -> bool:
    """Whether the input has to be gathered lane by lane even if its rows are contiguous."""
    return width.stride > taps.PICKED_STRIDE or (mode != "zeros" and max(width.padding) > 0)


def _rows_cycles(request: Request, sides: tuple[Side, Side, Side], tile: Tile, count: int, lanes: int) -> float:
    """Cycles of so many rows of a column, for a tile."""
    _, high, width = sides
    convert = CONVERT if summed(request)[1] != request.dtype.itemsize else 0.0
    seen = len({r * high.stride + k * high.dilation for r in range(count) for k in range(tile.high)})
    if _gathers(width, request.problem.padding_mode):
        each = tile.wide * lanes * GATHER
    elif width.stride == 1:
        each = tile.wide * (LOAD + convert)
    else:
        parts = {tap * width.dilation // width.stride for tap in range(tile.wide)}
        each = len(parts) * width.stride * (LOAD + convert) + tile.wide * (width.stride - 1) * SHUFFLE
    loads = seen * each + count * tile.outputs * (LOAD + convert)
    products = count * max(tile.outputs * tile.high * tile.wide, WAIT)
    return max(loads, products) + HIDDEN * min(loads, products) + seen * ROW + STEP


@lru_cache(4096)
def way(request: Request, merge: bool) -> Way:
    """The way to cut a request: the cheapest tile for its rows, and items that are neither long nor few."""
    problem, target = request.problem, cpu.Target.host()
    sides = depth, high, width = folded(problem, merge)
    size, threads = summed(request)[1], max(request.threads, 1)
    lanes = min(target.bits // 8 // size, max(16 // size, 1 << (width.out - 1).bit_length()))

    def tiles(tile: Tile) -> int:
        counts = -(-problem.group_out // tile.outputs), -(-high.kernel // tile.high), -(-width.kernel // tile.wide)
        return math.prod(counts) * problem.group_in * depth.kernel

    def cycles(tile: Tile, count: int) -> float:
        whole, left = divmod(count, tile.rows)
        some = whole * _rows_cycles(request, sides, tile, tile.rows, lanes)
        return some + left * _rows_cycles(request, sides, tile, 1, lanes) + COLUMN

    # Idle rows of a high picture do not count: many sizes have one kernel.
    seen = high.out if high.out <= 2 * ROWS[0] else math.lcm(*ROWS)
    registers = target.registers - (target.machine == "aarch64")  # LLVM loads a row ahead there
    tile = min(_tiles(request, sides, registers, lanes), key=lambda tile: (tiles(tile) * cycles(tile, seen), tile))

    planes, columns = problem.batch * depth.out, -(-width.out // lanes)
    block_columns = _even(columns, VECTORS)
    most = max(VECTORS // block_columns, 1)
    if tiles(tile) > 1:
        row_bytes = (problem.group_in * high.stride * width.size + problem.group_out * width.out) * size
        most = max(min(most, ITEM_BYTES // max(row_bytes, 1)), 1)
    block_rows, block_planes = min(high.out, padded(most, tile.rows)), max(1, min(planes, most // high.out))

    # Threads share the groups, if these come out even, or else the items, of which there are to be enough.
    parts = max(part for part in range(1, threads + 1) if threads % part == 0 and part <= problem.groups)
    if problem.groups % threads and problem.groups < ITEMS * threads:
        parts = 1
    wanted = ITEMS * threads if parts < threads else 1
    block_planes = max(1, min(block_planes, planes * -(-high.out // block_rows) // wanted))
    wanted = -(-wanted // max(-(-planes // block_planes), 1))
    block_rows = min(block_rows, padded(-(-high.out // wanted), tile.rows))
    wanted = -(-wanted // -(-high.out // block_rows))
    block_columns = min(block_columns, max(-(-columns // wanted), LEAST_COLUMNS))
    items = -(-planes // block_planes) * -(-high.out // block_rows) * -(-columns // block_columns)
    chunks = max(1, min(threads // parts, items))

    sums = tile.outputs * tile.high * tile.wide
    plane = block_columns * cycles(tile, block_rows) + PLANE
    spent = problem.groups * items * tiles(tile) * (block_planes * plane + TILE + SUM * sums)
    shares = -(-problem.groups // parts) * parts / problem.groups * -(-items // chunks) * chunks / max(items, 1)
    vector = 1.0 if lanes * size * 8 > 256 else 0.5
    whole = spent * shares / (parts * chunks) * vector
    whole += problem.groups * problem.group_out * problem.group_in * problem.taps * TOTAL * chunks / threads
    return Way(lanes, *tile, block_planes, block_rows, block_columns, parts, chunks, whole)


def _sizes(request: Request, one: Way, sides: tuple[Side, Side, Side]) -> Sizes:
    depth, high, width = sides
    problem = request.problem
    counts = (
        -(-problem.group_out // one.outputs),
        -(-high.kernel // one.high),
        -(-width.kernel // one.wide),
    )
    sums = padded(one.outputs * (one.high * one.wide + request.has_bias), one.lanes)
    row_blocks = -(-high.out // one.block_rows)
    columns = -(-width.out // one.lanes)
    column_blocks = -(-columns // one.block_columns)
    items = -(-problem.batch * depth.out // one.block_planes) * row_blocks * column_blocks
    unit = math.prod(counts) * problem.group_in * depth.kernel * sums
    return Sizes(*counts, unit, items, row_blocks, column_blocks)


def _bytes(request: Request) -> int:
    """Of the workspace, however the tensors lie in memory."""
    most = 0
    for merge in (True, False):
        one = way(request, merge)
        unit = _sizes(request, one, folded(request.problem, merge)).unit
        most = max(most, one.chunks * request.problem.groups * unit * summed(request)[1])
    return -(-most // ALIGNMENT) * ALIGNMENT


# -- what a call needs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors'."""

    kernel: cpu.Kernel
    settled: Tensor
    tables: tuple[Tensor, ...]
    shares: int
    total: cpu.Kernel
    total_sizes: tuple[int, ...]
    total_tasks: int


def _apart(strides: tuple[int, ...], sizes: tuple[int, int, int], merge: bool) -> tuple[int, int, int]:
    """Elements from a depth, row and place to the next."""
    if merge:
        return sizes[1] * sizes[2], sizes[2], 1
    depth, row, col = (0,) * (3 - len(strides)) + tuple(strides)
    return depth, row, col if sizes[2] > 1 else 1


@lru_cache(1024)
def prepare(request: Request, x_strides: tuple[int, ...], y_strides: tuple[int, ...]) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory."""
    problem, target = request.problem, cpu.Target.host()
    steps = engine.step_of(problem.spatial, x_strides[2:]), engine.step_of(problem.out, y_strides[2:])
    merge = steps == (1, 1)
    sides = depth, high, width = folded(problem, merge)
    one = way(request, merge)
    counts = _sizes(request, one, sides)
    x_depth, x_row, x_col = _apart(x_strides[2:], (depth.size, high.size, width.size), merge)
    y_depth, y_row, y_col = _apart(y_strides[2:], (depth.out, high.out, width.out), merge)
    element, _ = summed(request)
    shape = taps.Shape(
        element=element,
        stored=STORED[request.dtype],
        native=natives(target) - {"pairs"},
        lanes=one.lanes,
        kernel=(depth.kernel, high.kernel, width.kernel),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        table=x_col != 1 or _gathers(width, problem.padding_mode),
        spread=y_col != 1,
        long=problem.group_in == 1 and width.out > SHORT * one.lanes and x_col == y_col == 1,
        outputs=one.outputs,
        high=one.high,
        wide=one.wide,
        rows=one.rows,
        bias=request.has_bias,
    )
    columns, head, inside = _columns(width, one.lanes, one.wide)
    tables = _tables(request, sides, shape, (x_depth, x_row))
    sizes = {
        "parts": one.parts,
        "chunks": one.chunks,
        "groups": problem.groups,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        "in_width": width.size,
        "lo": width.padding[0],
        "planes": problem.batch * depth.out,
        "block_planes": one.block_planes,
        "block_rows": one.block_rows,
        "row_blocks": counts.row_blocks,
        "block_columns": one.block_columns,
        "column_blocks": counts.column_blocks,
        "items": counts.items,
        "output_tiles": counts.output_tiles,
        "high_tiles": counts.high_tiles,
        "wide_tiles": counts.wide_tiles,
        "unit": counts.unit,
        "chunk": problem.groups * counts.unit,
        "x_image": x_strides[0],
        "x_channel": x_strides[1],
        "x_col": x_col,
        "y_image": y_strides[0],
        "y_channel": y_strides[1],
        "y_depth": y_depth,
        "y_row": y_row,
        "y_col": y_col,
        "columns": columns,
        "head": head,
        "inside": inside,
    }
    weights = problem.group_out * problem.group_in * problem.taps
    ready = Prepared(
        cpu.compile(taps.text(shape), target),
        torch.tensor([*(table.data_ptr() for table in tables[:-1]), *(sizes[name] for name in taps.SIZES)]),
        tables,
        one.parts * one.chunks,
        cpu.compile(taps.total(shape), target),
        (tables[-1].data_ptr(), one.chunks, sizes["chunk"], counts.unit, weights, problem.group_out),
        problem.groups,
    )
    weigh(ready, sum(table.nbytes for table in tables))
    return ready


on_forget(prepare.cache_clear)


def _tables(
    request: Request, sides: tuple[Side, Side, Side], shape: taps.Shape, apart: tuple[int, int]
) -> tuple[Tensor, ...]:
    """What the kernel looks up: bytes to a depth and to a row, elements of a row, zeros; and where sums are."""
    depth, high, width = sides
    mode, size = request.problem.padding_mode, request.dtype.itemsize
    by_tap = [engine.shown(depth, mode, k * depth.dilation, depth.out, depth.stride) for k in range(depth.kernel)]
    by_depth = torch.stack(by_tap, 1)  # [depth, tap]
    by_row = engine.shown(high, mode, 0, (high.out - 1) * high.stride + (high.kernel - 1) * high.dilation + 1)
    by_depth, by_row = (
        torch.where(shown < 0, -1, shown * (step * size)) for shown, step in zip((by_depth, by_row), apart, strict=True)
    )
    by_width = by_depth[:0, 0]
    if shape.table:
        columns = -(-width.out // shape.lanes) * shape.lanes
        by_width = engine.shown(width, mode, 0, (columns - 1) * width.stride + (width.kernel - 1) * width.dilation + 1)
    bordered = bool((by_row < 0).any()) or bool((by_depth < 0).any())
    zeros = torch.zeros(width.size if bordered and not shape.table else 0, dtype=request.dtype)
    return by_depth, by_row, by_width, zeros, _places(request.problem, sides, shape)


def _places(problem: ConvProblem, sides: tuple[Side, Side, Side], shape: taps.Shape) -> Tensor:
    """Where the sum of each weight of a group, then of each bias, is among the group's; made up to whole vectors."""

    def tiled(count: int, tile: int) -> tuple[Tensor, Tensor]:
        """For each of so many: the number of its tile, and its place there; the last tile may overlap."""
        each = torch.arange(count)
        number = each // tile
        last = -(-count // tile) - 1
        return number, torch.where(number < last, each % tile, each - (count - tile))

    depth, high, width = sides
    tiles = -(-high.kernel // shape.high), -(-width.kernel // shape.wide)
    (to, o), (ty, ky), (tx, kx) = (
        tiled(problem.group_out, shape.outputs),
        tiled(high.kernel, shape.high),
        tiled(width.kernel, shape.wide),
    )
    c, kd = torch.arange(problem.group_in), torch.arange(depth.kernel)

    def along(dim: int, values: Tensor) -> Tensor:
        """The values along one dimension of [o, c, kd, ky, kx]."""
        return values.view([-1 if dim == d else 1 for d in range(5)])

    tile = along(0, to * problem.group_in) + along(1, c)
    tile = ((tile * depth.kernel + along(2, kd)) * tiles[0] + along(3, ty)) * tiles[1] + along(4, tx)
    within = (along(0, o * shape.high) + along(3, ky)) * shape.wide + along(4, kx)
    kinds = [(tile * shape.padded + within).flatten()]
    if shape.bias:  # all tiles of an output have it: the first one's will do
        kinds.append(tile[:, 0, 0, 0, 0] * shape.padded + shape.sums - shape.outputs + o)
    return torch.cat([torch.nn.functional.pad(places, (0, -len(places) % shape.lanes)) for places in kinds])


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the calls."""
    problem, one = request.problem, way(request, True)
    moved = moved_bytes(request)
    memory = max(moved - CACHED_BYTES, 0) / BYTES_PER_SECOND / max(one.parts * one.chunks, 1)
    work = one.cycles / CYCLES_PER_SECOND
    seconds = max(work, memory) + HIDDEN * min(work, memory) + engine.launches_s(one.parts * one.chunks)
    return Cost(problem.multiplies, moved, _bytes(request), seconds)


def filling(ready: Prepared, threads: int) -> Bound:
    """The call of both kernels: chunks of sums in the workspace, and what adds them."""
    settled = ready.settled.data_ptr()

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, y, bias, _ = tensors
        sums, made = workspace.data_ptr(), (out.data_ptr(), 0 if bias is None else bias.data_ptr())
        jobs = (
            (ready.kernel, (x.data_ptr(), y.data_ptr(), sums, settled), ready.shares, False),
            (ready.total, (sums, *made, *ready.total_sizes), ready.total_tasks, True),
        )
        launch_all(jobs, threads)

    return call


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a weight's gradient, and a bias' beside it, for tensors that lie in memory as these."""
    if not request.problem.multiplies:
        return engine.zeros
    return filling(prepare(request, tensors.first.stride(), tensors.second.stride()), request.threads)
