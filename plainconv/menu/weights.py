"""How `direct` and `pointwise` make the gradient for the weight: how it is cut, and what its kernel is told.

The output is cut into blocks as in the other directions; a block of some images, a strip of some input channels and a
tile of output channels at a time are multiplied, and the sums over all blocks are kept in the workspace.  Threads get
parts of the weight, or chunks of the blocks with sums of their own, whichever is cheaper by a count of cycles.  The
kernel itself is in plainconv/cpu/weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import gather, weights
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import Job, launch_all
from plainconv.menu import cuts, engine
from plainconv.menu.axes import Axes, elements, work
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors, moved_bytes
from plainconv.menu.cuts import Strip, Tile, strip_of
from plainconv.menu.engine import STORED, padded, summed
from plainconv.problem import ConvProblem, Request
from plainconv.remember import on_forget, weigh

STRIP_BYTES = 384 << 10  # of the strips of a block; they stay in a core's own cache, beside the output's gradient
PLACES = 512  # of a block, of as many images as it takes

# Cycles, as in plainconv/menu/cuts.py.
PRODUCT = 1.02  # a vector multiplied and added
STEP = 0.6
TILE = 30.0  # a tile's beginning and end
ADD = 2.5  # a vector of sums added to those in memory
IMAGE = 8.0  # an image of a tile
TURN = 6.0  # a vector of the output's gradient, transposed
MOVE = 3.0  # and copied
TOTAL = 6.0  # a vector of sums, added and written


# -- how to cut ------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """A way to cut a request.

    rows, cols  of a block, and of how many images; strip: what it reads of one
    channels    input channels of a strip
    blocks      how many there are
    parts       of the units that threads share, times chunks of the blocks: shares
    cycles      of one share
    """

    rows: int
    cols: int
    images: int
    strip: Strip
    channels: int
    tile: Tile
    lanes: int
    blocks: int
    parts: int
    chunks: int
    cycles: float

    @property
    def single(self) -> bool:
        """Whether a unit has all its sums after one block: they are written before the next unit's are made."""
        return self.blocks == self.chunks == 1

    @property
    def width(self) -> int:
        """Output channels of a tile."""
        return self.tile.vectors * self.lanes


def _tiles(problem: ConvProblem, lanes: int, registers: int) -> Iterator[Tile]:
    """Tiles that fit the registers; even ones: 27 scalars are 4 times 7, not 8, 8, 8 and 3."""
    scalars, vectors = max(problem.group_in, 1) * problem.taps, max(-(-problem.group_out // lanes), 1)
    for wide in sorted({-(-vectors // count) for count in range(1, vectors + 1) if -(-vectors // count) <= 4} | {1}):
        most = min((registers - 2 - wide) // wide, cuts.MOST_SCALARS)
        if most >= 1:
            yield Tile(-(-scalars // -(-scalars // most)), wide)


def _blocks(axes: Axes) -> Iterator[tuple[int, int, bool]]:
    """Rows, columns, and whether rows are whole, of the blocks to choose from."""
    _, high, width = axes
    for places in (2 * PLACES, PLACES, PLACES // 2, PLACES // 8):
        count = max(1, round(width.out / places))
        yield 1, -(-width.out // count), False
        if width.out <= 2 * PLACES:  # a longer sum would lose digits
            count = min(max(1, round(high.out * width.out / places)), high.out)
            yield -(-high.out // count), width.out, True


@lru_cache(4096)
def way(request: Request, merge: bool) -> Way:
    """The cheapest way that fits the workspace; the one of the smallest workspace, if none does."""
    found = [(_bytes(request, one), one) for one in _ways(request, merge)]
    fit = [one for size, one in found if size <= request.max_workspace]
    return min(fit, key=lambda one: one.cycles) if fit else min(found, key=lambda pair: pair[0])[1]


def _ways(request: Request, merge: bool) -> Iterator[Way]:
    problem, target = request.problem, cpu.Target.host()
    axes = depth, high, width = work(request).axes(merge)
    size, threads = summed(request)[1], max(request.threads, 1)
    lanes = engine.fewer_idle(problem.group_out, size, target)
    vector = engine.vector_cycles(lanes * size * 8, target)
    planes = depth.out * problem.batch
    for rows, cols, whole in dict.fromkeys(_blocks(axes)):
        strip = strip_of(axes, rows, cols, whole)
        pieces = depth.out * -(-high.out // rows) * -(-width.out // cols)
        images = max(1, min(problem.batch, PLACES // max(rows * cols, 1)))
        by_row, _ = cuts.pitches(strip, lanes, size, problem.group_in)
        most = max(1, min(STRIP_BYTES, request.max_workspace // (4 * threads)) // (images * by_row * size))
        channels = -(-problem.group_in // max(1, -(-problem.group_in // most)))
        channel_blocks = -(-problem.group_in // max(channels, 1))
        blocks = pieces * -(-problem.batch // images)
        places = planes * high.out * width.out
        if request.channels_last:
            copies = strip.slots * strip.length * (-(-channels // lanes) * cuts.COPY + cuts.PIXEL)
            turn = MOVE
        else:
            copies = channels * strip.slots * -(-strip.length // lanes) * cuts.COPY * min(width.stride, 8)
            turn = TURN
        gathers = pieces * problem.batch * copies
        gathers += pieces * strip.slots * -(-strip.length // lanes) * cuts.ENTRY
        for tile in _tiles(problem, lanes, target.registers):
            tiles = -(-problem.group_out // (tile.vectors * lanes))
            count, sums = -(-channels * problem.taps // tile.scalars), tile.scalars * tile.vectors
            one = max(sums * PRODUCT, 8) + STEP
            spent = count * (places * one + blocks * (TILE + ADD * sums + IMAGE * images))
            spent += places * tile.vectors * turn
            units = problem.groups * channel_blocks * tiles
            for parts in (part for part in range(1, threads + 1) if threads % part == 0):
                chunks = min(threads // parts, max(blocks, 1))
                share = -(-units // parts) * -(-blocks // chunks) / max(blocks, 1)
                seen = -(-max(1, -(-units // parts)) // tiles) if tiles > 1 else -(-units // parts)
                cycles = share * spent + max(seen, 1) * gathers / chunks
                cycles += units * count * sums * (chunks + 1) * TOTAL / threads
                yield Way(rows, cols, images, strip, channels, tile, lanes, blocks, parts, chunks, cycles * vector)


class Room(NamedTuple):
    """Elements of the pieces of the workspace; those of a share: strips, the output's gradient, the list of copies.

    unit, chunk: sums of one; sums: of all that there is room for.
    """

    pitch: int
    place: int
    strip: int
    turned: int
    entries: int
    share: int
    unit: int
    chunk: int
    sums: int


def _room(request: Request, way: Way, source: str) -> Room:
    """How large everything is, if the strip is gathered from there."""
    problem, size = request.problem, summed(request)[1]
    line, slots, length = ALIGNMENT // size, way.strip.slots, way.strip.length
    by_row, by_pixel = cuts.pitches(way.strip, way.lanes, size, way.channels)
    pixels = source == "pixels"
    strip = slots * length * by_pixel if pixels else padded(way.channels * by_row, line)
    turned = way.images * strip
    entries = turned + (way.images * way.rows * way.cols + way.lanes) * way.width
    copies = slots * (length if pixels else -(-length // way.lanes))
    share = entries + padded(8 * copies * gather.MOST_FIELDS, ALIGNMENT) // size
    unit = (padded(way.channels * problem.taps, way.tile.scalars) + request.has_bias) * way.width
    units = problem.groups * -(-problem.group_in // max(way.channels, 1)) * -(-problem.group_out // way.width)
    pitch, place = (by_pixel, by_pixel) if pixels else (by_row, 1)
    sums = way.parts * unit if way.single else way.chunks * units * unit
    return Room(pitch, place, strip, turned, entries, padded(share, line), unit, units * unit, sums)


def _bytes(request: Request, way: Way) -> int:
    """Of the workspace, however the tensors lie in memory."""
    rooms = [_room(request, way, source) for source in ("rows", "pixels")]
    share = max(room.share for room in rooms)
    return (rooms[0].sums + way.parts * way.chunks * share) * summed(request)[1]


# -- what a call needs -----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """How a tensor lies in memory: elements from a depth, row and column to the next."""

    depth: int
    row: int
    col: int


def _lies(strides: tuple[int, ...], sides: tuple[int, int, int], step: int | None) -> Places:
    if step is not None:
        return Places(step * sides[2] * sides[1], step * sides[2], step)
    depth, row, col = (0,) * (3 - len(strides)) + tuple(strides)
    return Places(depth, row, col)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors'."""

    kernel: cpu.Kernel
    settled: Tensor
    tables: Tensor
    shares: int
    sums_bytes: int
    total: cpu.Kernel | None  # if there are several chunks
    total_sizes: tuple[int, ...]
    total_tasks: int


@lru_cache(1024)
def prepare(request: Request, x_strides: tuple[int, ...], y_strides: tuple[int, ...]) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory."""
    problem, target = request.problem, cpu.Target.host()
    x_step, y_step = engine.step_of(problem.spatial, x_strides[2:]), engine.step_of(problem.out, y_strides[2:])
    merge = x_step is not None and y_step is not None
    axes = depth, high, width = work(request).axes(merge)
    x = _lies(x_strides[2:], (depth.size, high.size, width.size), x_step if merge else None)
    y = _lies(y_strides[2:], (depth.out, high.out, width.out), y_step if merge else None)
    x_channel = x_strides[1] if problem.in_channels > 1 else 1
    y_channel = y_strides[1] if problem.out_channels > 1 else 1
    one = way(request, merge)
    bordered = problem.padding_mode != "zeros" and max(width.padding) > 0
    if x.col == 1 and width.stride <= gather.PICKED_STRIDE and not bordered:
        source = "rows"
    else:
        source = "pixels" if x_channel == 1 else "table"
    element, size = summed(request)
    shape = weights.Shape(
        element=element,
        stored=STORED[request.dtype],
        native=natives(target) - {"pairs"},
        lanes=one.lanes,
        source=source,
        stride=width.stride if source == "rows" else 1,
        turns="rows" if y.col == 1 else "pixels" if y_channel == 1 else "any",
        scalars=one.tile.scalars,
        vectors=one.tile.vectors,
        bias=request.has_bias,
    )
    room = _room(request, one, source)
    channel_blocks, tiles = -(-problem.group_in // one.channels), -(-problem.group_out // one.width)
    inside = request.channels_last  # channels side by side in the weight
    step = 1 if source == "pixels" else room.pitch
    last = problem.group_in - (channel_blocks - 1) * one.channels
    factors = []
    for channels in (one.channels, last):
        in_strip, in_kernel = [c * step for c in range(channels)], [tap * room.place for tap in one.strip.taps]
        offsets = [sum(pair) for pair in (product(in_kernel, in_strip) if inside else product(in_strip, in_kernel))]
        factors += offsets + [0] * (-len(offsets) % one.tile.scalars)
    row_blocks, col_blocks = -(-high.out // one.rows), -(-width.out // one.cols)
    image_blocks, units = -(-problem.batch // one.images), problem.groups * channel_blocks * tiles
    tables, addresses = _tables(problem.padding_mode, axes, one, source, factors)
    sizes = {
        "share": room.share,
        "entries": room.entries,
        "turned": room.turned,
        "parts": one.parts,
        "units": units,
        "part": room.unit * one.single,
        "next": room.unit * (not one.single),
        "blocks": one.blocks,
        "image_blocks": image_blocks,
        "block_images": one.images,
        "batch": problem.batch,
        "taps": problem.taps,
        "last_factors": padded(one.channels * problem.taps, one.tile.scalars),
        "x_image": x_strides[0],
        "x_channel": x_channel,
        "x_depth": x.depth,
        "x_row": x.row,
        "x_col": x.col,
        "ahead": x_strides[0] if problem.batch > 1 else 0,
        "in_width": width.size,
        "y_image": y_strides[0],
        "y_channel": y_channel,
        "y_depth": y.depth,
        "y_row": y.row,
        "y_col": y.col,
        "y_merge": int(one.cols == width.out and y.row == width.out * y.col),
        "out_rows": high.out,
        "out_width": width.out,
        "stride_depth": len(depth.taps),
        "stride_rows": high.stride,
        "stride_cols": width.stride,
        "lo": width.padding[0],
        "block_rows": one.rows,
        "block_cols": one.cols,
        "row_blocks": row_blocks,
        "col_blocks": col_blocks,
        "slot_count": one.strip.slots,
        "slot_length": one.strip.length,
        "pitch": room.pitch,
        "strip": room.strip,
        "block": one.rows * one.cols * one.width,
        "place": room.place,
    }
    each = problem.taps * problem.group_in
    total_sizes = {
        "chunks": one.chunks,
        "chunk": room.chunk,
        "unit": room.unit,
        "channel_blocks": channel_blocks,
        "tiles": tiles,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "block_channels": one.channels,
        "w_group": problem.group_out * each,
        "w_output": each,
        "w_block": one.channels * (1 if inside else problem.taps),
        "u_count": problem.taps if inside else 1,
        "w_u": problem.group_in,
        "v_each": 1 if inside else problem.taps,
    }
    numbers = tuple(total_sizes[name] for name in weights.TOTAL_SIZES)
    ready = Prepared(
        cpu.compile(weights.text(shape), target),
        torch.tensor([*addresses, *(sizes[name] for name in weights.SIZES), *numbers]),
        tables,
        one.parts * one.chunks,
        room.sums * size,
        cpu.compile(weights.total(shape), target) if one.chunks > 1 else None,
        numbers,
        units,
    )
    weigh(ready, tables.nbytes)
    return ready


on_forget(prepare.cache_clear)


def _tables(mode: str, axes: Axes, one: Way, source: str, factors: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The tables of the kernel, one behind the other, and where each begins."""
    depth, high, width = axes
    rows = (padded(high.out, one.rows) - 1) * high.stride + high.reach + 1
    cols = (padded(width.out, one.cols) + one.strip.length + one.lanes) * width.stride + width.reach + 1
    by_row, by_col = engine.shown(high, mode, 0, rows), engine.shown(width, mode, 0, cols if source != "rows" else 0)
    reach = [[0, 0, 0, one.strip.slots]] * depth.out  # what lies in the padding is gathered, too: zeros
    numbers = (one.strip.rows(), factors, reach, elements(depth, mode))
    parts = [*(torch.tensor(table).flatten() for table in numbers), by_row, by_col]
    return engine.joined(parts)


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the calls."""
    problem, one = request.problem, way(request, True)
    moved = moved_bytes(request)
    memory = moved / (cuts.CACHED if moved < cuts.CACHE else cuts.BYTES_PER_SECOND)
    seconds = max(one.cycles / cuts.CYCLES_PER_SECOND, memory) + engine.launches_s(one.parts * one.chunks)
    workspace = max(_bytes(request, way(request, merge)) for merge in (True, False))
    return Cost(problem.multiplies, moved, workspace, seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a weight's gradient, and a bias' beside it, for tensors that lie in memory as these."""
    if not request.problem.multiplies:
        return engine.zeros
    ready, threads = prepare(request, tensors.first.stride(), tensors.second.stride()), request.threads
    settled = ready.settled.data_ptr()

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, y, bias, _ = tensors
        sums, made = workspace.data_ptr(), (out.data_ptr(), 0 if bias is None else bias.data_ptr())
        pointers = (x.data_ptr(), y.data_ptr(), *made, sums, sums + ready.sums_bytes, settled)
        jobs: list[Job] = [(ready.kernel, pointers, ready.shares, False)]
        if ready.total is not None:
            jobs.append((ready.total, (sums, *made, *ready.total_sizes), ready.total_tasks, True))
        launch_all(jobs, threads if ready.shares > 1 else 1)

    return call
