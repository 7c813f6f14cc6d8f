"""How `winograd` makes the gradient for the weight: how it is cut, and what its kernels are told.

    dw  =  A^T [ sum over tiles of  (G gy) * (B^T x) ]

The tiles of all images are cut into chunks whose transformed factors the caches keep.  Each chunk is brought forth, and
multiplied: threads share blocks of input channels x tiles of output channels, and where these are fewer than threads,
slices of the chunk with sums of their own.  The kernels are in plainconv/cpu/winograd_weight.py.

Cost: tiles * o * c/g * (m + k - 1)^d multiplies, instead of m^d k^d.  The workspace is the panels of a chunk, the sums
of the taps, and for each thread those of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import weights
from plainconv.cpu import winograd_weight as kernels
from plainconv.cpu.launch import Job, launch_all
from plainconv.cpu.transforms import Three, three
from plainconv.menu import engine
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors, moved_bytes
from plainconv.menu.engine import STORED, Side, folded, padded
from plainconv.problem import ConvProblem, Request
from plainconv.remember import on_forget, weigh

MOST_TAPS = 3  # along a dimension; in winograd.py of each part that a stride makes
PANEL_BYTES = 6 << 20  # of a chunk, which the cache that cores share keeps
MOST_PANEL_BYTES = 24 << 20  # the same, if it is that or
LEAST_TILES = 64
MOST_JOBS = 48  # for which threads are woken once: what they are told lies on the stack
SUMS_BYTES = 640 << 10  # of a block, which a core's own cache keeps
STRIP_BYTES = 256 << 10
MOST_SCALARS = 12
LEAST_SUMS = 8  # fewer wait for each other

# Cycles, measured on one core with AVX-512; each of a vector, or of a vector in each matrix.
CYCLES_PER_SECOND = 3.67e9
PRODUCT = 1.03  # multiplied and added
STEP = 0.1  # and of the product's loop
TILE = 40.0  # a product's beginning and end
FORTH = 20.0
BACK = 4.0
DEEP = 4.0  # and along the depth, too
TOTAL = 6.0  # a vector of the weight, added and written
BYTES_PER_SECOND = 20e9  # of memory
CACHED = 60e9
CHUNK_S = 3e-6  # the jobs of a chunk
NARROW = 0.5  # the same as STEP where tiles are chosen, lest products wait for what they load


def why_not(problem: ConvProblem) -> str | None:
    """The sentence for a kernel whose gradient is not made so."""
    if max(problem.kernel) > MOST_TAPS or any(side.stride > 1 for side in folded(problem, False)):
        return f"the gradient for the weight is made for kernels of at most {MOST_TAPS} taps and stride 1"
    return None


class Way(NamedTuple):
    """How a request is cut.

    tile      places of the output's gradient of a tile, along depth, rows and width
    tiles     how many there are, of an image
    scalars   x vectors: input channels and vectors of output channels, the registers of a product
    block     vectors of input channels of a block
    cols      tiles of a piece of a row of tiles
    pieces    of a chunk
    slices    of a chunk, that are summed apart
    """

    tile: tuple[int, int, int]
    tiles: tuple[int, int, int]
    lanes: int
    scalars: int
    vectors: int
    block: int
    cols: int
    pieces: int
    slices: int

    @property
    def width(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes


class Room(NamedTuple):
    """Elements of the workspace's pieces, and of what they are made of.

    x_matrix, y_matrix  of a panel, of one matrix
    unit      sums of a block of input channels and a tile of output channels
    piece     sums of the output's gradient of a piece
    """

    matrices: int
    channel_blocks: int
    tiles: int
    x_matrix: int
    y_matrix: int
    length: int
    strip: int
    unit: int
    slice: int
    piece: int
    x: int
    y: int
    biases: int
    sums: int
    taps: int
    forth_share: int
    share: int


def _tile(side: Side, sizes: Sequence[int]) -> int:
    """Places of a tile along a dimension, of those: what takes the fewest products, and then the fewest digits."""
    return 1 if side.kernel == 1 else min(sizes, key=partial(_products, side))


def _products(side: Side, places: int) -> int:
    """Along a dimension, with tiles of so many."""
    return -(-side.out // places) * (places + side.kernel - 1)


def _tiles(request: Request) -> Three:
    """The tile along all dimensions, chosen as along one."""
    sides = folded(request.problem, False)
    if request.precision == "highest":
        return three(_tile(side, (2,)) for side in sides)
    taps = [side.kernel for side in sides if side.kernel > 1]
    choices = [(2, 4), (5,)] if len(taps) > 1 and set(taps) == {3} else [(2, 4)]
    # In three dimensions, large tiles along all of them would lose too many digits.
    deep = (2,) if len(taps) == len(sides) else None
    found = [three(_tile(side, deep if deep and not i else some) for i, side in enumerate(sides)) for some in choices]
    return min(found, key=lambda tile: math.prod(map(_products, sides, tile)))


def _vectors(request: Request, lanes: int) -> tuple[int, int]:
    """Vectors of input and of output channels of a group."""
    return -(-request.problem.group_in // lanes), -(-request.problem.group_out // lanes)


@lru_cache(4096)
def way(request: Request) -> Way:
    """The way whose chunks are largest, of those that fit the workspace; or else the smallest."""
    for one in _ways(request):
        if _bytes(request, one) <= request.max_workspace:
            break
    return one


def _ways(request: Request) -> Iterator[Way]:
    problem, target = request.problem, cpu.Target.host()
    sides = folded(problem, False)
    size, threads = request.dtype.itemsize, max(request.threads, 1)
    tile = depth, high, width = _tiles(request)
    tiles = three(-(-side.out // m) for side, m in zip(sides, tile, strict=True))
    matrices = math.prod(m + side.kernel - 1 for side, m in zip(sides, tile, strict=True))
    lanes = engine.lanes_of_outputs(problem.group_out, size, target)
    channels, outputs = _vectors(request, lanes)
    spare = target.registers - (2 if target.fma else 3)
    vectors = engine.vectors_of_outputs(outputs, spare, NARROW)
    most = max(SUMS_BYTES // (matrices * vectors * lanes * lanes * size), 1)
    block = -(-channels // max(-(-channels // most), 1))
    held = min(block * lanes, problem.group_in)
    scalars = min(
        range(1, min(spare // vectors - 1, MOST_SCALARS) + 1), key=lambda s: padded(held, s) * (1 + NARROW / s)
    )
    column = (high + 2 * (high + sides[1].kernel - 1)) * math.prod((depth + sides[0].kernel - 1, width)) * lanes * size
    rows, units = (
        problem.batch * tiles[0] * tiles[1],
        problem.groups * -(-channels // max(block, 1)) * -(-outputs // vectors),
    )
    each = problem.groups * matrices * (padded(channels, max(block, 1)) + padded(outputs, vectors)) * lanes * size
    panel = min(max(PANEL_BYTES, LEAST_TILES * each), MOST_PANEL_BYTES)
    while True:
        at_once = max(panel // max(each, 1), 1)
        cols = max(min(at_once, STRIP_BYTES // column, tiles[2]), 1)
        cols = -(-tiles[2] // max(-(-tiles[2] // cols), 1))
        pieces = rows * -(-tiles[2] // max(cols, 1))
        some = max(at_once // max(cols, 1), 1)
        some = -(-pieces // max(-(-pieces // some), 1))
        # Few slices: each has sums of its own.
        slices = min(
            range(1, max(min(threads, some), 1) + 1),
            key=lambda n: (-(-units * n // threads) / max(units * n, 1)) * (1 + 0.02 * n),
        )
        yield Way(tile, tiles, lanes, scalars, vectors, block, cols, some, slices)
        if at_once == 1:
            return
        panel //= 2


def _shape(request: Request, cut: Way) -> kernels.Shape:
    """Of the kernel that multiplies."""
    taps = _taps(request)
    return kernels.Shape(STORED[request.dtype], cut.lanes, cut.tile, taps, cut.scalars, cut.vectors, request.has_bias)


def _pieces(request: Request, cut: Way) -> int:
    """Of all rows of tiles."""
    return request.problem.batch * cut.tiles[0] * cut.tiles[1] * -(-cut.tiles[2] // max(cut.cols, 1))


def _alone(request: Request, cut: Way) -> bool:
    """Whether nothing is added to what a task sums."""
    return cut.slices == 1 and cut.pieces == _pieces(request, cut)


def _taps(request: Request) -> tuple[int, int, int]:
    """Along depth, rows and width."""
    depth, high, width = folded(request.problem, False)
    return depth.kernel, high.kernel, width.kernel


@lru_cache(4096)
def _room(request: Request, cut: Way) -> Room:
    problem, lanes, size = request.problem, cut.lanes, request.dtype.itemsize
    sides, threads = folded(problem, False), max(request.threads, 1)
    line = ALIGNMENT // size
    channels, outputs = _vectors(request, lanes)
    patch = [m + side.kernel - 1 for m, side in zip(cut.tile, sides, strict=True)]
    matrices, tiles = math.prod(patch), -(-outputs // cut.vectors)
    blocks = -(-channels // max(cut.block, 1))
    count = cut.pieces * cut.cols
    # Neighbours are an odd number of vectors apart, so that they do not meet in the same places of a cache.
    x_matrix, y_matrix = ((count * vectors | 1) * lanes for vectors in (cut.block, cut.vectors))
    held = min(cut.block * lanes, problem.group_in)
    length = padded(cut.cols * cut.tile[2] + patch[2] - cut.tile[2], lanes)
    strip = patch[0] * patch[1] * length * lanes
    unit = (cut.block * lanes * problem.taps + request.has_bias) * cut.width
    sums = problem.groups * blocks * tiles * unit
    taps = padded(held, cut.scalars) * _shape(request, cut).sums
    piece = problem.groups * tiles * cut.width
    spare = padded(cut.scalars, line)  # what is read behind the last channel of all
    return Room(
        matrices,
        blocks,
        tiles,
        x_matrix,
        y_matrix,
        length,
        strip,
        unit,
        sums,
        piece,
        padded(problem.groups * blocks * matrices * x_matrix + spare, line),
        padded(problem.groups * tiles * matrices * y_matrix, line),
        padded(cut.pieces * piece * request.has_bias, line),
        0 if _alone(request, cut) else padded(cut.slices * sums, line),
        taps,
        padded(strip + patch[1] * length * lanes, line) * threads,
        padded(taps + unit, line) * threads,
    )


def _bytes(request: Request, cut: Way) -> int:
    """Of the workspace: both panels, the sums of pieces and of taps, and what each thread has, one after the other."""
    room = _room(request, cut)
    return (room.x + room.y + room.biases + room.sums + max(room.forth_share, room.share)) * request.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors'."""

    forth: tuple[tuple[cpu.Kernel, Tensor], ...]
    multiply: cpu.Kernel
    settled: Tensor
    tables: tuple[Tensor, ...]
    total: cpu.Kernel | None  # if there are several chunks, or slices
    total_sizes: tuple[int, ...]
    units: int


@lru_cache(1024)
def prepare(request: Request, x_strides: tuple[int, ...], y_strides: tuple[int, ...]) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory."""
    problem, cut, target = request.problem, way(request), cpu.Target.host()
    room, sides = _room(request, cut), folded(problem, False)
    element, threads = STORED[request.dtype], max(request.threads, 1)
    taps = _taps(request)
    row_pieces = -(-cut.tiles[2] // max(cut.cols, 1))
    vectors = _vectors(request, cut.lanes)
    flat = tuple(Side(side.out, 1, 1, (0, 0), 1, side.out) for side in sides)
    steps, all_tables = [], []
    for role, seen, strides, channels, count, width, matrix, blocks in (
        (
            "x",
            sides,
            x_strides,
            problem.group_in,
            vectors[0],
            cut.block * cut.lanes,
            room.x_matrix,
            room.channel_blocks,
        ),
        ("y", flat, y_strides, problem.group_out, vectors[1], cut.width, room.y_matrix, room.tiles),
    ):
        mode = problem.padding_mode if role == "x" else "zeros"
        depth, row, col = (0,) * (3 - problem.dims) + tuple(strides[2:])
        channel = strides[1] if channels * problem.groups > 1 else 1
        lo, hi = seen[2].padding
        source = "table"
        if channel == 1 and channels > 1:
            source = "pixels"
        elif col == 1 and (mode == "zeros" or max(lo, hi) <= 0):
            source = "rows"
        tables, addresses = _tables(mode, seen, cut, room)
        brings = kernels.Forth(element, cut.lanes, cut.tile, taps, role, source, role == "y" and request.has_bias)
        sizes = {
            "share": room.forth_share // threads,
            "columns_at": room.strip,
            "image": strides[0],
            "channel": channel,
            "depth": depth,
            "row": row,
            "col": col,
            "width": seen[2].size + min(hi, 0),
            "lo": lo,
            "groups": problem.groups,
            "channels": channels,
            "vectors": count,
            "depth_tiles": cut.tiles[0],
            "high_tiles": cut.tiles[1],
            "row_pieces": row_pieces,
            "cols": cut.cols,
            "length": room.length,
            "group_panel": blocks * room.matrices * matrix,
            "block_panel": room.matrices * matrix,
            "matrix_panel": matrix,
            "tile_panel": width,
            "piece_bias": room.piece,
            "group_bias": room.tiles * cut.width,
        }
        settled = torch.tensor([*addresses, *(sizes[name] for name in kernels.FORTH_SIZES)])
        steps.append((cpu.compile(kernels.forth(brings), target), settled))
        all_tables.append(tables)
    shape, units = _shape(request, cut), problem.groups * room.channel_blocks * room.tiles
    inside, each = request.channels_last, problem.taps * problem.group_in
    sizes = {
        "share": room.share // threads,
        "taps_at": room.taps,
        "alone": int(_alone(request, cut)),
        "cols": cut.cols,
        "slices": cut.slices,
        "units": units,
        "inside": int(inside),
        "x_block": room.matrices * room.x_matrix,
        "x_matrix": room.x_matrix,
        "x_tile": cut.block * cut.lanes,
        "y_block": room.matrices * room.y_matrix,
        "y_matrix": room.y_matrix,
        "piece_bias": room.piece,
        "group_bias": room.tiles * cut.width,
    }
    total_sizes = {
        "chunks": cut.slices,
        "chunk": room.slice,
        "unit": room.unit,
        "channel_blocks": room.channel_blocks,
        "tiles": room.tiles,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "block_channels": cut.block * cut.lanes,
        "w_group": problem.group_out * each,
        "w_output": each,
        "w_block": cut.block * cut.lanes * (1 if inside else problem.taps),
        "u_count": problem.taps if inside else 1,
        "w_u": problem.group_in,
        "v_each": 1 if inside else problem.taps,
    }
    numbers = tuple(total_sizes[name] for name in weights.TOTAL_SIZES)
    ready = Prepared(
        tuple(steps),
        cpu.compile(kernels.multiply(shape), target),
        torch.tensor([*(sizes[name] for name in kernels.SIZES), *numbers]),
        tuple(all_tables),
        None if _alone(request, cut) else cpu.compile(weights.total(shape.weight), target),
        numbers,
        units,
    )
    weigh(ready, sum(tables.nbytes for tables in all_tables))
    return ready


on_forget(prepare.cache_clear)


def _tables(mode: str, sides: tuple[Side, ...], cut: Way, room: Room) -> tuple[Tensor, tuple[int, ...]]:
    """Which element each place of depth, rows and width shows, one table behind the other, and where each begins."""
    counts = [count * m + m + 4 for count, m in zip(cut.tiles, cut.tile, strict=True)]
    counts[2] += room.length
    return engine.joined([engine.shown(side, mode, 0, count) for side, count in zip(sides, counts, strict=True)])


def summed(request: Request) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """What is made of a tile, the taps; the tile; and how many numbers are added for each."""
    cut, taps = way(request), _taps(request)
    patch = sum(m + k - 1 for m, k in zip(cut.tile, taps, strict=True))
    return taps, cut.tile, request.problem.batch * math.prod(cut.tiles) + patch


def cost(request: Request) -> Cost:
    """Cycles of the transforms and of the products, memory, and the calls."""
    problem, cut, target = request.problem, way(request), cpu.Target.host()
    room, size, threads = _room(request, cut), request.dtype.itemsize, max(request.threads, 1)
    channels, outputs = _vectors(request, cut.lanes)
    pieces = _pieces(request, cut)
    tiles, chunks = pieces * cut.cols, -(-pieces // max(cut.pieces, 1))
    units = problem.groups * room.channel_blocks * room.tiles
    scalars = -(-problem.group_in // max(room.channel_blocks, 1) // cut.scalars) if problem.group_in else 0
    sums = max(cut.scalars * cut.vectors, LEAST_SUMS)
    cycles = units * scalars * (tiles * (sums * PRODUCT + STEP * cut.vectors) + chunks * cut.slices * TILE)
    cycles += problem.groups * tiles * FORTH * (channels + outputs)
    back = BACK + DEEP * (cut.tile[0] > 1)
    cycles += problem.groups * chunks * cut.slices * problem.group_in * room.tiles * cut.vectors * back
    cycles *= room.matrices
    cycles += problem.groups * problem.taps * problem.group_in * outputs * TOTAL * (cut.slices + 1)
    cycles *= engine.vector_cycles(cut.lanes * size * 8, target)
    tasks = units * cut.slices
    busy = -(-tasks // threads) / tasks if tasks else 1.0
    moved = moved_bytes(request)
    # Nothing is multiplied while the tensors are read.
    seconds = cycles * busy / CYCLES_PER_SECOND + moved / (CACHED if moved < 16 << 20 else BYTES_PER_SECOND)
    seconds += engine.launches_s(threads) + chunks * CHUNK_S
    multiplies = problem.groups * tiles * room.matrices * problem.group_in * problem.group_out
    return Cost(multiplies, moved, _bytes(request, cut), seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a weight's gradient, and a bias' beside it, for tensors that lie in memory as these."""
    problem = request.problem
    if not problem.multiplies:
        return engine.zeros
    ready, threads = prepare(request, tensors.first.stride(), tensors.second.stride()), max(request.threads, 1)
    cut, size = way(request), request.dtype.itemsize
    room, pieces = _room(request, cut), _pieces(request, cut)
    chunks = [(first, min(cut.pieces, pieces - first)) for first in range(0, pieces, cut.pieces)]

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        panels = (workspace.data_ptr(), workspace.data_ptr() + room.x * size)
        biases = panels[1] + room.y * size
        sums = biases + room.biases * size
        scratch = sums + room.sums * size
        pointers = tensors.first.data_ptr(), tensors.second.data_ptr()
        made = (out.data_ptr(), 0 if tensors.bias is None else tensors.bias.data_ptr())
        jobs: list[Job] = []
        for first, some in chunks:
            if len(jobs) > MOST_JOBS:
                launch_all(jobs, threads)
                jobs = []
            for (kernel, settled), pointer, panel in zip(ready.forth, pointers, panels, strict=True):
                brought = (pointer, panel, biases, scratch, first, some, threads, settled.data_ptr())
                jobs.append((kernel, brought, threads, panel == panels[0]))
            given = (*panels, biases, sums, *made, scratch, int(first > 0), some, threads, ready.settled.data_ptr())
            jobs.append((ready.multiply, given, threads, True))
        if ready.total is not None:
            jobs.append((ready.total, (sums, *made, *ready.total_sizes), ready.units, True))
        launch_all(jobs, threads)

    return call
