"""What `direct` and `pointwise` share: how a convolution is cut into blocks, and what its kernel is told.

The problem is folded to three dimensions, (depth, rows, width).  A block is some whole rows of the output, or a part of
one row; its strip holds what all taps of the block read.  Which of the two, and how large, is the cheapest by a count
of cycles: gathering, products with the lanes that stay idle, and the weight read again for each block.  Where the
channels of a pixel lie side by side there may be no strip, but a list of where each tap of each place is.  The kernel
itself is in plainconv/cpu/dense.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from itertools import accumulate, compress, product
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import dense, gather, pack
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors, summation_error
from plainconv.menu.lanes import Side, _shown, folded
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import on_forget, weigh

STORED = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "half"}
STRIP_BYTES = 768 << 10  # what a core's own cache keeps beside the weight
MOST_STRIP_BYTES = 16 << 20
PARTS = 16  # of the output channels, at most, so that threads get equal shares
MOST_SCALARS = 8  # of a tile; each has its own address, and integer registers are few
PLACES = (8192, 4096, 2048, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)  # of a block

# Cycles, fitted to some 1,000 measured ways of 78 layers on one core with AVX-512; they rank ways and algorithms.
CYCLES_PER_SECOND = 3.67e9
PRODUCT = 1.01  # a vector multiplied and added
STEP = 0.4  # what a step of a tile costs beside its products
LOAD = 0.05  # and beside each vector it loads
UNALIGNED = 1.2  # more, if vectors begin anywhere in a line of the cache
BROADCAST = 1.3  # a scalar, which is what tiles of one vector wait for
FIRST = 3.2  # a vector's beginning and end
COPY = 3.2  # a vector gathered
TILE = 7.6  # a tile's beginning and end
ENTRY = 14.0  # an entry in the list of what to copy
PIXEL = 6.0  # a pixel gathered
LISTED = 4.0  # an entry in the list of where taps are
TAP = 6.0  # a tap of a tile, if taps are listed
ADDRESS = 1.5  # and of each of its scalars
RUN = 20.0  # a row of a channel, in or out, where memory goes on elsewhere
BLOCK = 100.0  # a block's beginning and end
FAR = 1.08  # a strip that the core's own cache does not keep
NEAR_BYTES = 8.0  # a cycle, of a weight that some cache holds
FAR_BYTES = 2.7  # and of a larger one
FAR_WEIGHT = 4 << 20
HALF_REGISTER = 1.1  # narrower vectors do a little less than their share
BYTES_PER_SECOND = 25e9  # of memory
CACHED = 100e9  # of the cache that cores share
CACHE = 16 << 20
LAUNCH_S = 6e-6
THREADS_S = 4e-6


# -- strips ----------------------------------------------------------------------------------------------------------

Sides = tuple[Side, Side, Side]


class Strip(NamedTuple):
    """Rows of the padded input that the places of a block read.

    runs    (depth, row, column, count): so many rows, `step` apart; where they begin, relative to the block's corner
    length  places of each row
    taps    how far each tap's places are shifted in the strip
    """

    runs: tuple[tuple[int, int, int, int], ...]
    step: int
    length: int
    taps: tuple[int, ...]

    @property
    def slots(self) -> int:
        """How many rows there are."""
        return sum(count for *_, count in self.runs)

    def rows(self) -> list[tuple[int, int, int]]:
        """(depth, row, column) where each begins."""
        return [(z, y + i * self.step, x) for z, y, x, count in self.runs for i in range(count)]


def strip_of(sides: Sides, rows: int, cols: int, whole: bool) -> Strip:
    """The strip of a block of `rows` x `cols` places: `whole` rows of the output, or a part of one."""
    _, high, width = sides
    taps = list(product(*(range(0, side.kernel * side.dilation, side.dilation) for side in sides)))
    if whole:
        # A copy of the rows for each tap along the width; taps of the rows share the copy of their stride's phase.
        last: dict[tuple[int, int, int], int] = {}
        for z, y, x in taps:
            key = z, y % high.stride, x
            last[key] = max(last.get(key, 0), y // high.stride)
        runs = tuple((*key, rows + shift) for key, shift in last.items())
        begins = dict(zip(last, accumulate((count for *_, count in runs), initial=0), strict=False))
        shifts = [(begins[z, y % high.stride, x] + y // high.stride) * cols for z, y, x in taps]
        return Strip(runs, high.stride, cols, tuple(shifts))
    # A part of one row: taps along the width are shifts in the copy of their stride's phase.
    keys = {key: i for i, key in enumerate(dict.fromkeys((z, y, x % width.stride) for z, y, x in taps))}
    length = cols + (width.kernel - 1) * width.dilation // width.stride
    shifts = [keys[z, y, x % width.stride] * length + x // width.stride for z, y, x in taps]
    return Strip(tuple((*key, 1) for key in keys), 1, length, tuple(shifts))


def list_of(sides: Sides, rows: int, cols: int) -> Strip:
    """The same where nothing is gathered: for each tap, where it is for every place of a block."""
    taps = product(*(range(0, side.kernel * side.dilation, side.dilation) for side in sides))
    runs = tuple((z, y, x, 1) for z, y, x in taps)
    return Strip(runs, 1, rows * cols, tuple(range(0, len(runs) * rows * cols, rows * cols)))


def _reach_of(side: Side, count: int) -> int:
    """How many places of the input so many of the output read along a side."""
    return min((count - 1) * side.stride + (side.kernel - 1) * side.dilation + 1, side.size)


# -- how to cut ------------------------------------------------------------------------------------------------------


class Reads(Enum):
    """What a product reads: a strip gathered before, the input as it lies, or the input through a list of its taps."""

    STRIP = "strip"
    INPUT = "input"
    LIST = "list"


class Tile(NamedTuple):
    """Registers of sums: broadcast scalars x vectors."""

    scalars: int
    vectors: int


class Layout(NamedTuple):
    """A way to cut a request: rows and columns of a block, its strip and its tile, and what it costs."""

    rows: int
    cols: int
    strip: Strip
    tile: Tile
    lanes: int
    reads: Reads
    parts: int  # of the output channels
    shares: int  # threads at most, each with a strip
    cycles: float  # of the thread with the most to do


class Kind(NamedTuple):
    """What follows from a request alone: roles and types."""

    places: bool  # are the lanes, else the output channels
    pairs: bool
    element: str
    size: int  # bytes of an element, or of a pair
    channels: int  # of a group, or pairs of them
    native: frozenset[str]


@lru_cache(4096)
def seen(request: Request) -> tuple[Request, bool]:
    """The request as one for FORWARD, and whether the weight is turned round in it.

    With stride 1 the gradient for the input is a convolution of the output's: channels change places, taps come in the
    opposite order, and what was padding before is what the kernel's reach leaves of it behind.
    """
    if request.direction is Direction.FORWARD:
        return request, False
    problem = request.problem
    reaches = [(k - 1) * d for k, d in zip(problem.kernel, problem.dilation, strict=True)]
    turned = dataclasses.replace(
        problem,
        in_channels=problem.out_channels,
        out_channels=problem.in_channels,
        spatial=problem.out,
        padding=tuple((reach - lo, reach - hi) for reach, (lo, hi) in zip(reaches, problem.padding, strict=True)),
    )
    return dataclasses.replace(request, problem=turned, direction=Direction.FORWARD), True


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to


@lru_cache(4096)
def kind(request: Request) -> Kind:
    """Roles and types of a request."""
    native = natives(cpu.Target.host())
    places, channels = not request.channels_last, request.problem.group_in
    pairs = request.dtype is torch.bfloat16 and "pairs" in native and (channels % 2 == 0 or (places and channels > 1))
    element = "double" if request.dtype is torch.float64 else "float"
    channels = -(-channels // 2) if pairs else channels
    return Kind(places, pairs, element, 8 if element == "double" else 4, channels, native)


def _lanes(request: Request, target: cpu.Target) -> int:
    """Lanes of the widest register, or of half of it where that leaves many fewer of them idle."""
    is_ = kind(request)
    lanes = target.bits // 8 // is_.size
    along = math.prod(request.problem.out) if is_.places else request.problem.group_out
    while lanes > 16 // is_.size and HALF_REGISTER * _padded(along, lanes // 2) < _padded(along, lanes):
        lanes //= 2
    return lanes


def _tiles(scalars: int, vectors: int, spare: int) -> Iterator[Tile]:
    """Tiles that fit the registers to spare; even ones: 10 scalars are 5 and 5, not 8 and 2."""
    for wide in sorted({min(wide, vectors) for wide in (1, 2, 3, 4, 6, 8)}):
        most = min((spare - wide) // wide, MOST_SCALARS)
        if most >= 1:
            yield Tile(-(-scalars // -(-scalars // most)), wide)


def _tile_cycles(scalars: int, vectors: int, tile: Tile, steps: int, load: float, listed: int) -> float:
    """Of the product of `scalars` x `vectors`, each a sum over `steps`, for which `listed` taps are looked up."""
    whole, single = divmod(vectors, tile.vectors)

    def step(wide: int) -> float:
        sums = max(tile.scalars * wide, 8)  # fewer wait for each other
        return max(PRODUCT * sums, BROADCAST * tile.scalars) + STEP + load * wide

    sums = tile.scalars * (whole * tile.vectors + single)
    return -(-scalars // tile.scalars) * (
        steps * (whole * step(tile.vectors) + single * step(1))
        + FIRST * sums
        + (TILE + listed * (TAP + tile.scalars * ADDRESS)) * (whole + single)
    )


def _blocks(sides: Sides, lanes: int) -> Iterator[tuple[int, int, bool]]:
    """Rows, columns, and whether rows are whole, of the blocks to choose from."""
    _, high, width = sides
    for count in sorted({max(1, round(width.out / places)) for places in PLACES}):
        yield 1, min(_padded(-(-width.out // count), lanes), width.out), False
    if high.out > 1:
        for count in sorted({min(max(1, round(high.out * width.out / places)), high.out) for places in PLACES}):
            yield -(-high.out // count), width.out, True


@lru_cache(4096)
def layout(request: Request, merge: bool, reads: Reads) -> Layout:
    """The cheapest way whose strips fit the workspace; the one of the smallest strip, if none does."""
    found = ways(request, merge, reads)
    limit = min(request.max_workspace // (2 * max(request.threads, 1)), MOST_STRIP_BYTES)
    fit = [one for strip_bytes, one in found if strip_bytes <= limit]
    return min(fit, key=lambda one: one.cycles) if fit else min(found, key=lambda pair: pair[0])[1]


def ways(request: Request, merge: bool, reads: Reads) -> list[tuple[int, Layout]]:
    """All ways to cut a request that are worth a thought, with the bytes of their strips."""
    problem, target, is_ = request.problem, cpu.Target.host(), kind(request)
    sides = folded(problem, merge)
    depth, high, width = sides
    lanes = _lanes(request, target)
    register = lanes * is_.size * 8
    vector = 1.0 if register > 256 else 0.5 * (HALF_REGISTER if register < target.bits else 1.0)  # cycles
    spare = target.registers - (2 if target.fma else 3)
    steps = is_.channels * problem.taps
    weight = problem.group_out * steps * is_.size
    aligned = reads is not Reads.INPUT or not is_.places or math.prod(problem.spatial) % lanes == 0
    load = LOAD if aligned else LOAD + UNALIGNED
    found: list[tuple[int, Layout]] = []
    listed = reads is Reads.LIST
    for rows, cols, whole in _blocks(sides, lanes):
        strip = list_of(sides, rows, cols) if listed else strip_of(sides, rows, cols, whole)
        by_row, by_pixel = _pitches(is_, strip, lanes)
        if listed:
            read = (
                _reach_of(high, rows) * _reach_of(width, cols) * min(depth.kernel, depth.size)
            )  # pixels, of all groups
            strip_bytes = read * problem.in_channels * request.dtype.itemsize
        else:
            strip_bytes = max(is_.channels * by_row, strip.slots * strip.length * by_pixel) * is_.size
        planes = problem.batch * problem.groups
        blocks = planes * depth.out * -(-high.out // rows) * -(-width.out // cols)
        entries = strip.slots * (-(-strip.length // lanes) if is_.places else strip.length)
        if reads is not Reads.STRIP:
            copies = 0.0
        elif is_.places:
            copies = is_.channels * entries * COPY * min(width.stride, 8)
        else:
            copies = entries * (-(-is_.channels // lanes) * COPY + PIXEL)
        # Places of a block, and of the last one of a row (or of an image), which may be smaller.
        count = -(-high.out // rows) if whole else -(-width.out // cols)
        most, last = rows * cols, ((high.out - (count - 1) * rows) * cols if whole else width.out - (count - 1) * cols)
        for tile in _tiles(*_factors(is_, problem, most, lanes), spare):
            full, less = (
                _tile_cycles(*_factors(is_, problem, places, lanes), tile, steps, load, problem.taps * listed)
                for places in (most, last)
            )
            work = (full * (count - 1) + less) / count * vector
            scalars, vectors = _factors(is_, problem, most, lanes)
            work *= FAR if strip_bytes > STRIP_BYTES else 1.0
            if (
                listed and strip_bytes > STRIP_BYTES
            ):  # groups meet the same lines of the cache, and not while they are near
                work += read * max(problem.group_in * request.dtype.itemsize, ALIGNMENT) / NEAR_BYTES
            # The weight arrives while the first of a block's tiles along the other factor is at work.
            first = tile.vectors / vectors if is_.places else tile.scalars / scalars
            work += max(0.0, weight / (FAR_BYTES if weight > FAR_WEIGHT else NEAR_BYTES) - work * min(first, 1.0))
            work += BLOCK + (RUN * (is_.channels * strip.slots + problem.group_out) if is_.places else 0.0)
            work += copies * vector
            work += {Reads.STRIP: ENTRY, Reads.LIST: LISTED, Reads.INPUT: 0.0}[reads] * entries / max(planes, 1)
            outputs = -(-scalars // tile.scalars) if is_.places else -(-vectors // tile.vectors)
            parts = min(outputs, PARTS)
            shares = max(min(request.threads, blocks * parts), 1)
            most_of = -(-blocks * parts // shares) / max(blocks * parts, 1)  # the share of one thread
            one = Layout(rows, cols, strip, tile, lanes, reads, parts, shares, blocks * work * most_of)
            found.append((strip_bytes if reads is Reads.STRIP else 0, one))
    return found


def _factors(is_: Kind, problem: ConvProblem, places: int, lanes: int) -> tuple[int, int]:
    """How many scalars and vectors the product of a block has."""
    outputs = max(problem.group_out, 1)  # a tensor may have no channels
    return (outputs, -(-places // lanes)) if is_.places else (places, -(-outputs // lanes))


def _pitches(is_: Kind, strip: Strip, lanes: int) -> tuple[int, int]:
    """Elements from a channel of the strip to the next, and from a place to the next if channels lie side by side.

    Both are an odd number of cache lines, so that neighbours do not meet in the same places of a cache; a channel ends
    with a vector to spare.
    """
    line = ALIGNMENT // is_.size
    by_row, by_pixel = _padded(strip.slots * strip.length + lanes, line), _padded(is_.channels, line)
    return by_row | line, by_pixel | line


def _is_plain(sides: Sides) -> bool:
    """Whether each place of the output reads the one place of the input that has its number."""
    depth, high, width = sides
    return depth.plain and high.plain and width.plain and depth.size == high.size == 1


@lru_cache(4096)
def natural(request: Request, merge: bool = True) -> Layout:
    """The way to cut a request whose input lies in memory as its output will."""
    is_ = kind(request)
    ways = [layout(request, merge, Reads.STRIP)]
    converted = STORED[request.dtype] != is_.element and not is_.pairs
    if merge and _is_plain(folded(request.problem)):
        if not (is_.places and STORED[request.dtype] != is_.element):
            ways.append(layout(request, True, Reads.INPUT))
    elif not (is_.places or converted):
        ways.append(layout(request, merge, Reads.LIST))
    return min(ways, key=lambda way: way.cycles)


# -- what a call needs -----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """How the input lies in memory: whether its places follow each other at one distance, and the distances."""

    merge: bool
    channel: int
    depth: int
    row: int
    col: int


def _places_of(request: Request, x_strides: tuple[int, ...]) -> Places:
    sizes, strides = request.problem.spatial, x_strides[2:]
    step = next((stride for size, stride in zip(sizes[::-1], strides[::-1], strict=True) if size > 1), 1)
    merge, expected = True, step
    for size, stride in zip(sizes[::-1], strides[::-1], strict=True):
        merge &= size == 1 or stride == expected
        expected *= size
    channel = x_strides[1] if request.problem.in_channels > 1 else 1
    if merge:
        _, high, width = folded(request.problem)
        return Places(True, channel, step * width.size * high.size, step * width.size, step)
    depth, row, col = (0,) * (3 - len(strides)) + tuple(strides)
    return Places(False, channel, depth, row, col if sizes[-1] > 1 else 1)


def _source(request: Request, x: Places) -> tuple[str, Layout]:
    """How the kernel reads the input (see `dense.Shape`), and how the request is cut then."""
    is_ = kind(request)
    way = natural(request, x.merge)
    side_by_side = x.col == 1 if is_.places else x.channel == 1 or (way.reads is Reads.INPUT and not is_.pairs)
    if way.reads is not Reads.STRIP and side_by_side:
        return "none" if way.reads is Reads.INPUT else "list", way
    if way.reads is not Reads.STRIP:
        way = layout(request, x.merge, Reads.STRIP)
    if x.channel == 1 and not is_.places:
        return "pixels", way
    _, _, width = folded(request.problem, x.merge)
    bordered = request.problem.padding_mode != "zeros" and max(width.padding) > 0
    return "rows" if x.col == 1 and width.stride <= gather.PICKED_STRIDE and not bordered else "table", way


class Packing(NamedTuple):
    """A weight seen as w[o, u, v], v side by side (see plainconv/cpu/pack.py), and bytes of it packed.

    pairs   where the other number of a pair is: "near", "far" or nowhere
    vectors of output channels (or output channels, if they are no lanes) of a group, made up to whole tiles
    """

    pairs: str | None
    u_count: int
    v_count: int
    u_stride: int
    far: int
    r_u: int
    r_v: int
    vectors: int
    bytes: int


def _packing(request: Request, way: Layout, turned: bool, channels_inside: bool) -> Packing | None:
    """None if the weight is used as it lies: its outputs are no lanes, and its pairs are side by side."""
    is_, problem = kind(request), request.problem
    if is_.places and not (is_.pairs and (problem.taps > 1 or problem.group_in % 2 or turned)):
        return None
    vectors, rows = problem.group_out, problem.group_out
    if not is_.places:
        vectors = _padded(-(-problem.group_out // way.lanes), way.tile.vectors)
        rows = vectors * way.lanes
    size = problem.groups * rows * is_.channels * problem.taps * is_.size
    near, taps, channels = "near" if is_.pairs else None, problem.taps, is_.channels
    if not (turned or is_.places) and (channels_inside or taps == 1):
        return Packing(near, taps, channels, problem.group_in, 0, channels, 1, vectors, size)
    each = problem.group_out * taps if turned else taps  # from a channel to the next
    r_u, r_v = (taps, 1) if is_.places else (1, channels)
    pairs, step = ("far", 2) if is_.pairs else (None, 1)
    return Packing(pairs, channels, taps, step * each, each, r_u, r_v, vectors, size)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors'."""

    kernel: cpu.Kernel
    settled: Tensor  # where the tables are, and the sizes
    tables: Tensor
    shares: int
    packs: cpu.Kernel | None
    pack_sizes: tuple[int, ...]
    pack_tasks: int
    packed_bytes: int


def _taps_of_weight(problem: ConvProblem, w_strides: Sequence[int]) -> list[int]:
    places = product(*map(range, problem.kernel))
    return [sum(k * stride for k, stride in zip(place, w_strides[2:], strict=True)) for place in places]


@lru_cache(1024)
def prepare(
    request: Request, turned: bool, x_strides: tuple[int, ...], w_strides: tuple[int, ...], channels_inside: bool
) -> Prepared:
    """The kernels, the tables and the sizes of a request for FORWARD whose tensors lie so in memory.

    channels_inside: whether the channels of the weight are innermost, for a weight that is packed.
    """
    problem, target, is_ = request.problem, cpu.Target.host(), kind(request)
    x = _places_of(request, x_strides)
    depth, high, width = folded(problem, x.merge)
    source, way = _source(request, x)
    strip, tile, lanes = way.strip, way.tile, way.lanes
    by_row, by_pixel = _pitches(is_, strip, lanes)
    packing = _packing(request, way, turned, channels_inside)
    shape = dense.Shape(
        element=is_.element,
        stored=STORED[request.dtype],
        native=is_.native,
        pairs=is_.pairs,
        lanes=lanes,
        over="places" if is_.places else "outputs",
        source=source,
        stride=width.stride if source == "rows" else 1,
        one_tap=problem.taps == 1,
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
        scalars=tile.scalars,
        vectors=tile.vectors,
    )
    per = 2 if is_.pairs else 1
    # Of the strip: from a place to the next, and from a channel (or a pair) to the next.
    place, channel = {"none": (x.col // per, x.channel), "pixels": (by_pixel, 1)}.get(source, (1, by_row))
    strip_taps = list(strip.taps) if source == "list" else [tap * place for tap in strip.taps]
    terms, columns = is_.channels * problem.taps, tile.vectors * lanes
    w_output, w_channel = (w_strides[1], w_strides[0]) if turned else w_strides[:2]
    w_group = w_strides[0] * (problem.group_in if turned else problem.group_out)
    factors: dict[str, int]
    if is_.places and packing is None:
        w_taps = _taps_of_weight(problem, w_strides)
        factors = {"b_scalar": w_output // per, "b_channel": 1 if is_.pairs else w_channel, "b_group": w_group // per}
    elif is_.places:
        w_taps = list(range(problem.taps))
        factors = {"b_scalar": terms, "b_channel": problem.taps, "b_group": problem.group_out * terms}
    else:
        w_taps = [tap * is_.channels * columns for tap in range(problem.taps)]
        factors = {"a_channel": columns}
    if turned:
        w_taps.reverse()
    if is_.places:
        factors |= {"a_channel": channel, "a_tile": columns}
        taps = list(zip(strip_taps, w_taps, strict=True))
    else:
        tiles = -(-problem.group_out // columns)
        factors |= {"a_tile": terms * columns, "a_group": tiles * terms * columns}
        factors |= {"b_scalar": place, "b_channel": channel}
        taps = list(zip(w_taps, strip_taps, strict=True))
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    strip_bytes, share_bytes = _share(is_, way, source, by_row, by_pixel)
    sizes = {
        **dict.fromkeys(dense.SIZES, 0),
        "tasks": problem.batch * problem.groups * depth.out * math.prod(blocks) * way.parts,
        "shares": way.shares,
        "share": share_bytes // is_.size,
        "entries": strip_bytes // is_.size,
        "planes": problem.batch * problem.groups,
        "groups": problem.groups,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "x_image": x_strides[0],
        "x_channel": x.channel,
        "x_depth": x.depth,
        "x_row": x.row,
        "x_col": x.col,
        "ahead": _ahead(problem, x, x_strides[0], way, (high, width)),
        "in_width": width.size,
        "y_image": problem.out_channels * math.prod(problem.out),
        "y_channel": math.prod(problem.out) if is_.places else 1,
        "y_place": 1 if is_.places else problem.out_channels,
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        "stride_depth": depth.stride,
        "stride_rows": high.stride,
        "stride_cols": width.stride,
        "lo": width.padding[0],
        "block_rows": way.rows,
        "block_cols": way.cols,
        "row_blocks": blocks[0],
        "col_blocks": blocks[1],
        "parts": way.parts,
        "slot_count": strip.slots,
        "slot_length": strip.length,
        "pitch": by_pixel if source == "pixels" else by_row,
        **factors,
    }
    zeros = problem.group_in * request.dtype.itemsize if source == "list" else 0
    tables, addresses = _tables(problem.padding_mode, (depth, high, width), way, source, taps, zeros)
    packs, pack_sizes, pack_tasks = None, {}, 0
    if packing is not None:
        pack_shape = pack.Shape(is_.element, STORED[request.dtype], is_.native, lanes, packing.pairs, not is_.places)
        packs = cpu.compile(pack.text(pack_shape), target)
        pack_sizes = {
            "groups": problem.groups,
            "outputs": problem.group_out,
            "vectors": packing.vectors,
            "u_count": packing.u_count,
            "v_count": packing.v_count,
            "w_group": w_group,
            "w_output": w_output,
            "w_u": packing.u_stride,
            "w_far": packing.far,
            "alone": packing.u_count - 1 if problem.group_in % 2 else -1,
            "r_u": packing.r_u,
            "r_v": packing.r_v,
            "width": columns,
        }
        pack_tasks = problem.groups * packing.vectors
    ready = Prepared(
        cpu.compile(dense.text(shape), target),
        torch.tensor([*addresses, *(sizes[name] for name in dense.SIZES)]),
        tables,
        way.shares,
        packs,
        tuple(pack_sizes[name] for name in pack.SIZES) if packs else (),
        pack_tasks,
        _padded(packing.bytes, ALIGNMENT) if packing else 0,
    )
    weigh(ready, tables.nbytes)
    return ready


on_forget(prepare.cache_clear)


def _ahead(problem: ConvProblem, x: Places, image: int, way: Layout, sides: tuple[Side, Side]) -> int:
    """From what a block reads to what the next task's does, in elements of the input."""
    if problem.groups > 1:
        return problem.group_in * x.channel
    if problem.batch > 1:
        return image
    high, width = sides
    return way.rows * high.stride * x.row if way.rows < high.out else way.cols * width.stride * x.col


def _tables(
    mode: str, sides: Sides, way: Layout, source: str, taps: list[tuple[int, int]], zeros: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The tables of the kernel, one behind the other, and where each begins; those that it does not read are empty."""
    depth, high, width = sides
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    counts = (
        (depth.out - 1) * depth.stride + (depth.kernel - 1) * depth.dilation + 1,
        (blocks[0] * way.rows - 1) * high.stride + (high.kernel - 1) * high.dilation + 1,
        (blocks[1] * way.cols + way.strip.length + way.lanes) * width.stride + (width.kernel - 1) * width.dilation + 1,
    )
    read = {"none": 0, "rows": 2}.get(source, 3)
    shown = [
        _shown(side, mode, 0, count if dim < read else 0)
        for dim, (side, count) in enumerate(zip(sides, counts, strict=True))
    ]
    reach = _reach(mode, depth, way.strip, len(taps))
    parts = [
        torch.tensor(way.strip.rows()).flatten(),
        torch.tensor(taps).flatten(),
        torch.tensor(reach).flatten(),
        *shown,
        torch.zeros(-(-zeros // 8), dtype=torch.int64),
    ]
    tables = torch.cat(parts)
    begins, begin = [], tables.data_ptr()
    for part in parts:
        begins.append(begin)
        begin += part.nbytes
    return tables, tuple(begins)


def _inside(mode: str, depth: Side) -> list[tuple[int, int]]:
    """For each depth of the output, the first tap along it that is not in the padding, and how many there are."""
    shown = _shown(depth, mode, 0, (depth.out - 1) * depth.stride + (depth.kernel - 1) * depth.dilation + 1)
    each = (
        [k for k in range(depth.kernel) if shown[z * depth.stride + k * depth.dilation] >= 0] for z in range(depth.out)
    )
    return [(real[0], real[-1] + 1 - real[0]) if real else (0, 1) for real in each]


def _reach(mode: str, depth: Side, strip: Strip, taps: int) -> list[list[int]]:
    """For each depth of the output, which taps and rows of the strip are not wholly in the padding."""
    each, reach = taps // depth.kernel, []
    for first, count in _inside(mode, depth):
        shown = [0 <= z - first * depth.dilation < count * depth.dilation for z, *_ in strip.runs]
        begin = sum(run[-1] for run in strip.runs[: shown.index(True)])
        reach.append([first * each, count * each, begin, sum(run[-1] for run in compress(strip.runs, shown))])
    return reach


def _share(is_: Kind, way: Layout, source: str, by_row: int, by_pixel: int) -> tuple[int, int]:
    """Bytes of a strip, and of all scratch memory of a thread: the strip and the list of what to copy."""
    if source == "none":
        return 0, 0
    rows, length = way.strip.slots, way.strip.length
    if source == "list":
        return 0, _padded(8 * rows * length, ALIGNMENT)
    pixels = source == "pixels"
    strip = _padded((rows * length * by_pixel if pixels else is_.channels * by_row) * is_.size, ALIGNMENT)
    copies = rows * (length if pixels else -(-length // way.lanes))
    return strip, strip + _padded(8 * copies * gather.MOST_FIELDS, ALIGNMENT)


@lru_cache(4096)
def workspace_bytes(request: Request) -> int:
    """Scratch memory for tensors that lie in any way."""
    is_ = kind(request)
    ways = {way(request, merge) for merge in (True, False) for way in (natural, partial(layout, reads=Reads.STRIP))}
    most = 0
    for way in ways:
        pitches = _pitches(is_, way.strip, way.lanes)
        sources = {Reads.STRIP: ("rows", "pixels"), Reads.INPUT: ("none",), Reads.LIST: ("list",)}[way.reads]
        share = max(_share(is_, way, source, *pitches)[1] for source in sources)
        packing = _packing(request, way, True, False)
        most = max(most, way.shares * share + (_padded(packing.bytes, ALIGNMENT) if packing else 0))
    return most


def why_not(request: Request) -> str | None:
    """The sentence for what no kernel of this kind does."""
    if request.direction is Direction.GRAD_WEIGHT:
        return "its kernels make the output and the gradient for the input; grad_weight is not written yet"
    if request.direction is Direction.GRAD_INPUT and set(request.problem.stride) != {1}:
        return f"the gradient for the input is not written yet for a stride of {request.problem.stride}"
    if request.direction is Direction.GRAD_INPUT and request.problem.padding_mode != "zeros":
        return f"the gradient for the input is not written yet for padding_mode={request.problem.padding_mode!r}"
    if request.device != "cpu":
        return "its kernels are machine code of the CPU, and the tensors are on another device"
    if request.dtype not in STORED:
        return f"its kernels compute in floating-point numbers, not {str(request.dtype).removeprefix('torch.')}"
    if request.problem.dims > 3:
        return "its loops are for at most three dimensions"
    return cpu.why_not()


def error(request: Request) -> float:
    """One sum in a fixed order."""
    return summation_error(request.problem.terms(request.direction))


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the call."""
    request, turned = seen(request)
    problem, way = request.problem, natural(request)
    packing = _packing(request, way, turned, False)
    moved = request.dtype.itemsize * sum(math.prod(problem.shape_of(role)) for role in ("x", "w", "y"))
    work = way.cycles * _real(problem)
    if packing:
        work += 2 * packing.bytes / (FAR_BYTES if packing.bytes > FAR_WEIGHT else NEAR_BYTES) / max(request.threads, 1)
    seconds = max(work / CYCLES_PER_SECOND, moved / (CACHED if moved < CACHE else BYTES_PER_SECOND)) + LAUNCH_S
    return Cost(problem.multiplies, moved, workspace_bytes(request), seconds + THREADS_S * (way.shares > 1))


def _real(problem: ConvProblem) -> float:
    """The share of a kernel's depth that is not in the padding."""
    depth = folded(problem)[0]
    return sum(count for _, count in _inside(problem.padding_mode, depth)) / max(depth.kernel * depth.out, 1)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    request, turned = seen(request)
    x, w, bias, _ = tensors
    is_ = kind(request)
    channels_inside = not (is_.places or turned or w.is_contiguous()) and w.movedim(1, -1).is_contiguous()
    copies_w = (is_.pairs or not is_.places) and not channels_inside and not w.is_contiguous()
    copies_bias = bias is not None and not bias.is_contiguous()
    w_strides = w.contiguous().stride() if copies_w else w.stride()
    ready = prepare(request, turned, x.stride(), w_strides, channels_inside)
    settled, threads, places = ready.settled.data_ptr(), request.threads, is_.places

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if copies_w:
            w = w.contiguous()
        if copies_bias and bias is not None:
            bias = bias.contiguous()
        scratch, weight = workspace.data_ptr(), w.data_ptr()
        if ready.packs is not None:
            launch(ready.packs, (weight, scratch, *ready.pack_sizes), ready.pack_tasks, threads)
            weight, scratch = scratch, scratch + ready.packed_bytes
        pixels = x.data_ptr()
        pointers = (
            pixels,
            weight,
            weight if places else pixels,
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            scratch,
            settled,
        )
        launch(ready.kernel, pointers, ready.shares, threads)

    return call
