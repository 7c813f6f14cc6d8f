"""What `direct` and `pointwise` share: how a convolution is cut into blocks, and what its kernel is told.

The problem is folded to three dimensions, (depth, rows, width).  A block is some whole rows of the output, or a part of
one row; its strip holds what all taps of the block read.  Which of the two, and how large, is the cheapest by a count
of cycles: gathering, products with the lanes that stay idle, and the weight read again for each block.  Where the
channels of a pixel lie side by side there may be no strip, but a list of where each tap of each place is.  The kernel
itself is in plainconv/cpu/dense.py.
"""

from __future__ import annotations

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
from plainconv.menu.axes import Axes, Axis, Work, inside, shown, work
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors, summation_error
from plainconv.menu.lanes import _shown, folded, too_far
from plainconv.problem import Request
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
SLOT = 3.0  # a row of a channel in the strip
RUN = 20.0  # a piece of a channel, in or out, behind which memory goes on elsewhere
BLOCK = 100.0  # a block's beginning and end
FAR = 1.08  # a strip that the core's own cache does not keep
NEAR_BYTES = 8.0  # a cycle, of a weight that some cache holds
FAR_BYTES = 2.7  # and of a larger one
FAR_WEIGHT = 4 << 20
SCATTER = 2.0  # a number of the result that lies apart from its neighbours
HALF_REGISTER = 1.1  # narrower vectors do a little less than their share
BYTES_PER_SECOND = 25e9  # of memory
CACHED = 100e9  # of the cache that cores share
CACHE = 16 << 20
LAUNCH_S = 6e-6
THREADS_S = 4e-6


# -- strips ----------------------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """Rows of the padded input that the places of a block read.

    runs    (tap of the depth, row, column, count): so many rows, `step` apart, the first so far from the block's corner
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
        """(tap of the depth, row, column) where each begins."""
        return [(z, y + i * self.step, x) for z, y, x, count in self.runs for i in range(count)]


def strip_of(axes: Axes, rows: int, cols: int, whole: bool) -> Strip:
    """The strip of a block of `rows` x `cols` places: `whole` rows of the output, or a part of one."""
    depth, high, width = axes
    taps = [(z, y.place, x.place) for z, y, x in product(range(len(depth.taps)), high.taps, width.taps)]
    if whole:
        # A copy of the rows for each place along the width; taps of the rows share the copy of their stride's phase.
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
    length = cols + width.reach // width.stride
    shifts = [keys[z, y, x % width.stride] * length + x // width.stride for z, y, x in taps]
    return Strip(tuple((*key, 1) for key in keys), 1, length, tuple(shifts))


def list_of(axes: Axes, rows: int, cols: int) -> Strip:
    """The same where nothing is gathered: for each tap, where it is for every place of a block."""
    depth, high, width = axes
    runs = tuple((z, y.place, x.place, 1) for z, y, x in product(range(len(depth.taps)), high.taps, width.taps))
    return Strip(runs, 1, rows * cols, tuple(range(0, len(runs) * rows * cols, rows * cols)))


def _reach_of(axis: Axis, count: int) -> int:
    """How many places of the input so many of the output read along a side."""
    return min((count - 1) * axis.stride + axis.reach + 1, axis.size)


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


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to


@lru_cache(4096)
def kind(work: Work) -> Kind:
    """Roles and types of a request."""
    native, request = natives(cpu.Target.host()), work.request
    places, channels = not request.channels_last, work.group_in
    pairs = request.dtype is torch.bfloat16 and "pairs" in native and (channels % 2 == 0 or (places and channels > 1))
    element = "double" if request.dtype is torch.float64 else "float"
    channels = -(-channels // 2) if pairs else channels
    return Kind(places, pairs, element, 8 if element == "double" else 4, channels, native)


def _lanes(work: Work, target: cpu.Target) -> int:
    """Lanes of the widest register, or of half of it where that leaves many fewer of them idle."""
    is_ = kind(work)
    lanes = target.bits // 8 // is_.size
    along = math.prod(axis.out for axis in work.axes()) if is_.places else work.group_out
    while lanes > 16 // is_.size and HALF_REGISTER * _padded(along, lanes // 2) < _padded(along, lanes):
        lanes //= 2
    return lanes


def _tiles(scalars: int, vectors: int, spare: int) -> Iterator[Tile]:
    """Tiles that fit the registers to spare; even ones: 10 scalars are 5 and 5, not 8 and 2."""
    for wide in sorted({min(wide, vectors) for wide in (1, 2, 3, 4, 6, 8)}):
        most = min((spare - wide) // wide, MOST_SCALARS)
        if most >= 1:
            yield Tile(-(-scalars // -(-scalars // most)), wide)


def _tile_cycles(scalars: int, vectors: int, tile: Tile, steps: float, load: float, listed: float) -> float:
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


def _blocks(axes: Axes, lanes: int) -> Iterator[tuple[int, int, bool]]:
    """Rows, columns, and whether rows are whole, of the blocks to choose from."""
    _, high, width = axes
    for count in sorted({max(1, round(width.out / places)) for places in PLACES}):
        yield 1, min(_padded(-(-width.out // count), lanes), width.out), False
    if high.out > 1:
        for count in sorted({min(max(1, round(high.out * width.out / places)), high.out) for places in PLACES}):
            yield -(-high.out // count), width.out, True


@lru_cache(4096)
def layout(work: Work, merge: bool, reads: Reads) -> Layout:
    """The cheapest way whose strips fit the workspace; the one of the smallest strip, if none does."""
    found = ways(work, merge, reads)
    limit = min(work.request.max_workspace // (2 * max(work.request.threads, 1)), MOST_STRIP_BYTES)
    fit = [one for strip_bytes, one in found if strip_bytes <= limit]
    return min(fit, key=lambda one: one.cycles) if fit else min(found, key=lambda pair: pair[0])[1]


def ways(work: Work, merge: bool, reads: Reads) -> list[tuple[int, Layout]]:
    """All ways to cut a request that are worth a thought, with the bytes of their strips."""
    request, target, is_ = work.request, cpu.Target.host(), kind(work)
    axes = depth, high, width = work.axes(merge)
    lanes = _lanes(work, target)
    register = lanes * is_.size * 8
    vector = 1.0 if register > 256 else 0.5 * (HALF_REGISTER if register < target.bits else 1.0)  # cycles
    spare = target.registers - (2 if target.fma else 3)
    phases = _phases(axes)
    weight = work.group_out * is_.channels * work.taps * is_.size
    taps = math.prod(len(axis.taps) for axis in axes) / (depth.step * len(phases))  # of a phase
    steps = is_.channels * taps
    aligned = reads is not Reads.INPUT or not is_.places or math.prod(work.spatial) % lanes == 0
    load = LOAD if aligned else LOAD + UNALIGNED
    found: list[tuple[int, Layout]] = []
    listed = reads is Reads.LIST
    for rows, cols, whole in _blocks(axes, lanes):
        strip = list_of(axes, rows, cols) if listed else strip_of(axes, rows, cols, whole)
        by_row, by_pixel = _pitches(is_, strip, lanes)
        if listed:
            # Pixels; groups meet in the same lines of the cache, so those of all groups have to stay there.
            read = _reach_of(high, rows) * _reach_of(width, cols) * min(len(depth.taps), depth.size)
            strip_bytes = read * work.in_channels * request.dtype.itemsize
        else:
            strip_bytes = max(is_.channels * by_row, strip.slots * strip.length * by_pixel) * is_.size
        planes = work.batch * work.groups
        blocks = planes * depth.made * -(-high.out // rows) * -(-width.out // cols)
        entries = strip.slots * (-(-strip.length // lanes) if is_.places else strip.length)
        if reads is not Reads.STRIP:
            copies = 0.0
        elif is_.places:
            copies = is_.channels * entries * COPY * min(width.stride, 8)
        else:
            copies = entries * (-(-is_.channels // lanes) * COPY + PIXEL)
        # Rows follow each other in memory; so do the channels of whole planes.
        pieces = is_.channels * len(depth.taps) * (1 if whole else len(high.taps)) + work.group_out
        pieces *= rows < high.out or cols < width.out
        # Places of a block, and of the last one of a row (or of an image), which may be smaller.
        count = -(-high.out // rows) if whole else -(-width.out // cols)
        most, last = rows * cols, ((high.out - (count - 1) * rows) * cols if whole else width.out - (count - 1) * cols)
        for tile in _tiles(*_factors(is_, work, most, lanes), spare):
            full, less = (
                _tile_cycles(*_factors(is_, work, places, lanes), tile, steps, load, taps * listed)
                for places in (most, last)
            )
            cycles = (full * (count - 1) + less) / count * vector * len(phases)
            scalars, vectors = _factors(is_, work, most, lanes)
            if _apart(axes) and is_.places:
                cycles += SCATTER * lanes * scalars * vectors * len(phases)
            cycles *= FAR if strip_bytes > STRIP_BYTES else 1.0
            if listed and strip_bytes > STRIP_BYTES:
                cycles += read * max(work.group_in * request.dtype.itemsize, ALIGNMENT) / NEAR_BYTES
            # The weight arrives while the first of a block's tiles along the other factor is at work.
            first = tile.vectors / vectors if is_.places else tile.scalars / scalars
            cycles += max(0.0, weight / (FAR_BYTES if weight > FAR_WEIGHT else NEAR_BYTES) - cycles * min(first, 1.0))
            cycles += BLOCK + (SLOT * is_.channels * strip.slots + RUN * pieces if is_.places else 0.0)
            cycles += copies * vector
            cycles += {Reads.STRIP: ENTRY, Reads.LIST: LISTED, Reads.INPUT: 0.0}[reads] * entries / max(planes, 1)
            outputs = -(-scalars // tile.scalars) if is_.places else -(-vectors // tile.vectors)
            parts = min(outputs, PARTS)
            shares = max(min(request.threads, blocks * parts), 1)
            most_of = -(-blocks * parts // shares) / max(blocks * parts, 1)  # the share of one thread
            one = Layout(rows, cols, strip, tile, lanes, reads, parts, shares, blocks * cycles * most_of)
            found.append((strip_bytes if reads is Reads.STRIP else 0, one))
    return found


def _factors(is_: Kind, work: Work, places: int, lanes: int) -> tuple[int, int]:
    """How many scalars and vectors the product of a block has."""
    outputs = max(work.group_out, 1)  # a tensor may have no channels
    return (outputs, -(-places // lanes)) if is_.places else (places, -(-outputs // lanes))


def _apart(axes: Axes) -> bool:
    """Whether places that are computed together lie apart in the result."""
    return any(axis.step > 1 for axis in axes[1:])


def _phases(axes: Axes) -> list[tuple[int, int]]:
    """The phases of rows and width, each with its part of the taps; the depth has one at a time."""
    rows, cols = (range(min(axis.step, max(axis.made, 1))) for axis in axes[1:])
    return [(row, col) for row in rows for col in cols]


def _pitches(is_: Kind, strip: Strip, lanes: int) -> tuple[int, int]:
    """Elements from a channel of the strip to the next, and from a place to the next if channels lie side by side.

    Both are an odd number of cache lines, so that neighbours do not meet in the same places of a cache; a channel ends
    with a vector to spare.
    """
    line = ALIGNMENT // is_.size
    by_row, by_pixel = _padded(strip.slots * strip.length + lanes, line), _padded(is_.channels, line)
    return by_row | line, by_pixel | line


@lru_cache(4096)
def natural(work: Work, merge: bool = True) -> Layout:
    """The way to cut a request whose input lies in memory as its output will."""
    is_, axes = kind(work), work.axes(merge)
    stored = STORED[work.request.dtype]
    ways = [layout(work, merge, Reads.STRIP)]
    converted = stored != is_.element and not is_.pairs
    # Whether each place of the output, or of a phase of it, reads the one place of the input that has its number.
    plain = all(axis.plain for axis in axes) and axes[0].step == 1
    if merge and plain:
        if not (is_.places and stored != is_.element):
            ways.append(layout(work, True, Reads.INPUT))
    elif not (is_.places or converted):
        ways.append(layout(work, merge, Reads.LIST))
    return min(ways, key=lambda way: way.cycles)


# -- what a call needs -----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """How the input lies in memory: whether its places follow each other at one distance, and the distances."""

    merge: bool
    channel: int
    depth: int
    row: int
    col: int


def _places_of(work: Work, x_strides: tuple[int, ...]) -> Places:
    sizes, strides = work.spatial, x_strides[2:]
    step = next((stride for size, stride in zip(sizes[::-1], strides[::-1], strict=True) if size > 1), 1)
    merge, expected = True, step
    for size, stride in zip(sizes[::-1], strides[::-1], strict=True):
        merge &= size == 1 or stride == expected
        expected *= size
    channel = x_strides[1] if work.in_channels > 1 else 1
    if merge:
        _, high, width = work.axes()
        return Places(True, channel, step * width.size * high.size, step * width.size, step)
    depth, row, col = (0,) * (3 - len(strides)) + tuple(strides)
    return Places(False, channel, depth, row, col if sizes[-1] > 1 else 1)


def _source(work: Work, x: Places) -> tuple[str, Layout]:
    """How the kernel reads the input (see `dense.Shape`), and how the request is cut then."""
    is_ = kind(work)
    way = natural(work, x.merge)
    side_by_side = x.col == 1 if is_.places else x.channel == 1 or (way.reads is Reads.INPUT and not is_.pairs)
    if way.reads is not Reads.STRIP and side_by_side:
        return "none" if way.reads is Reads.INPUT else "list", way
    if way.reads is not Reads.STRIP:
        way = layout(work, x.merge, Reads.STRIP)
    if x.channel == 1 and not is_.places:
        return "pixels", way
    _, _, width = work.axes(x.merge)
    bordered = work.mode != "zeros" and max(width.padding) > 0
    return "rows" if x.col == 1 and width.stride <= gather.PICKED_STRIDE and not bordered else "table", way


class Packing(NamedTuple):
    """A weight seen as w[o, u, v], v side by side (see plainconv/cpu/pack.py), and bytes of it packed.

    pairs   where the other number of a pair is: "near", "far" or nowhere
    across  whether output channels are side by side, packed
    vectors of output channels (or output channels, if they are not) of a group, made up to whole tiles
    """

    pairs: str | None
    u_count: int
    v_count: int
    u_stride: int
    far: int
    r_u: int
    r_v: int
    across: bool
    vectors: int
    bytes: int


def _packing(work: Work, way: Layout, channels_inside: bool) -> Packing | None:
    """None if the weight is used as it lies: its outputs are no lanes, and its pairs are side by side."""
    is_, turned, apart = kind(work), work.turned, _apart(work.axes())
    if is_.places and not (apart or (is_.pairs and (work.taps > 1 or work.group_in % 2 or turned))):
        return None
    across = apart or not is_.places  # outputs side by side
    vectors, rows = work.group_out, work.group_out
    if across:
        vectors = -(-work.group_out // way.lanes)
        vectors = vectors | 1 if is_.places else _padded(vectors, way.tile.vectors)
        rows = vectors * way.lanes
    size = work.groups * rows * is_.channels * work.taps * is_.size
    near, taps, channels = "near" if is_.pairs else None, work.taps, is_.channels
    if not (turned or is_.places) and (channels_inside or taps == 1):
        return Packing(near, taps, channels, work.group_in, 0, channels, 1, across, vectors, size)
    each = work.group_out * taps if turned else taps  # from a channel to the next
    r_u, r_v = (1, channels) if across else (taps, 1)
    pairs, step = ("far", 2) if is_.pairs else (None, 1)
    return Packing(pairs, channels, taps, step * each, each, r_u, r_v, across, vectors, size)


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


def _taps_of_weight(work: Work, w_strides: Sequence[int]) -> list[int]:
    places = product(*map(range, work.kernel))
    return [sum(k * stride for k, stride in zip(place, w_strides[2:], strict=True)) for place in places]


@lru_cache(1024)
def prepare(work: Work, x_strides: tuple[int, ...], w_strides: tuple[int, ...], channels_inside: bool) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory.

    channels_inside: whether the channels of the weight are innermost, for a weight that is packed.
    """
    request, target, is_, turned = work.request, cpu.Target.host(), kind(work), work.turned
    x = _places_of(work, x_strides)
    axes = depth, high, width = work.axes(x.merge)
    source, way = _source(work, x)
    strip, tile, lanes = way.strip, way.tile, way.lanes
    by_row, by_pixel = _pitches(is_, strip, lanes)
    packing = _packing(work, way, channels_inside)
    apart = _apart(axes)
    shape = dense.Shape(
        element=is_.element,
        stored=STORED[request.dtype],
        native=is_.native,
        pairs=is_.pairs,
        lanes=lanes,
        over="places" if is_.places else "outputs",
        source=source,
        stride=width.stride if source == "rows" else 1,
        one_tap=len(strip.taps) == work.taps == 1 and not apart,
        apart=apart,
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
        scalars=tile.scalars,
        vectors=tile.vectors,
    )
    per = 2 if is_.pairs else 1
    # Of the strip: from a place to the next, and from a channel (or a pair) to the next.
    place, channel = {"none": (x.col // per, x.channel), "pixels": (by_pixel, 1)}.get(source, (1, by_row))
    terms, columns = is_.channels * work.taps, tile.vectors * lanes
    w_output, w_channel = (w_strides[1], w_strides[0]) if turned else w_strides[:2]
    w_group = w_strides[0] * (work.group_in if turned else work.group_out)
    wide = packing.vectors * lanes if packing is not None and is_.places else columns  # outputs that are side by side
    factors: dict[str, int]
    if packing is None:
        w_taps = _taps_of_weight(work, w_strides)
        factors = {"b_scalar": w_output // per, "b_channel": 1 if is_.pairs else w_channel, "b_group": w_group // per}
    elif not packing.across:
        w_taps = list(range(work.taps))
        factors = {"b_scalar": terms, "b_channel": work.taps, "b_group": work.group_out * terms}
    elif is_.places:
        w_taps = [tap * is_.channels * wide for tap in range(work.taps)]
        factors = {"b_scalar": 1, "b_channel": wide, "b_group": terms * wide}
    else:
        w_taps = [tap * is_.channels * columns for tap in range(work.taps)]
        tiles = -(-work.group_out // columns)
        factors = {"a_channel": columns, "a_tile": terms * columns, "a_group": tiles * terms * columns}
    # The weight's taps in the order of the strip's.
    _, rows, cols = (axis.taps for axis in axes)
    sizes_of = [side.kernel for side in folded(request.problem, x.merge)]
    numbers = [
        (z.number * sizes_of[1] + r.number) * sizes_of[2] + c.number for z, r, c in product(depth.taps, rows, cols)
    ]
    if is_.places:
        factors |= {"a_channel": channel, "a_tile": columns}
        taps = [(shift * place, w_taps[number]) for shift, number in zip(strip.taps, numbers, strict=True)]
    else:
        factors |= {"b_scalar": place, "b_channel": channel}
        taps = [(w_taps[number], shift * place) for shift, number in zip(strip.taps, numbers, strict=True)]
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    strip_bytes, share_bytes = _share(is_, way, source, by_row, by_pixel)
    made = depth.made * high.made * width.made
    y_place = 1 if is_.places else work.out_channels
    sizes = {
        **dict.fromkeys(dense.SIZES, 0),
        "tasks": work.batch * work.groups * depth.made * math.prod(blocks) * way.parts,
        "shares": way.shares,
        "share": share_bytes // is_.size,
        "entries": strip_bytes // is_.size,
        "planes": work.batch * work.groups,
        "groups": work.groups,
        "group_in": work.group_in,
        "group_out": work.group_out,
        "x_image": x_strides[0],
        "x_channel": x.channel,
        "x_depth": x.depth,
        "x_row": x.row,
        "x_col": x.col,
        "ahead": _ahead(work, x, x_strides[0], way, (high, width)),
        "in_width": width.size,
        "y_image": work.out_channels * made,
        "y_channel": made if is_.places else 1,
        "y_place": y_place,
        "y_depth": high.made * width.made * y_place,
        "y_row": high.step * width.made * y_place,
        "y_col": width.step * y_place,
        "out_rows": high.out,
        "out_width": width.out,
        "stride_depth": len(depth.taps),
        "stride_rows": high.stride,
        "stride_cols": width.stride,
        "lo": width.padding[0],
        "block_rows": way.rows,
        "block_cols": way.cols,
        "row_blocks": blocks[0],
        "col_blocks": blocks[1],
        "parts": way.parts,
        "phase_count": len(_phases(axes)),
        "slot_count": strip.slots,
        "slot_length": strip.length,
        "pitch": by_pixel if source == "pixels" else by_row,
        **factors,
    }
    zeros = work.group_in * request.dtype.itemsize if source == "list" else 0
    tables, addresses = _tables(work.mode, axes, way, source, taps, zeros, y_place)
    packs, pack_sizes, pack_tasks = None, {}, 0
    if packing is not None:
        pack_shape = pack.Shape(is_.element, STORED[request.dtype], is_.native, lanes, packing.pairs, packing.across)
        packs = cpu.compile(pack.text(pack_shape), target)
        pack_sizes = {
            "groups": work.groups,
            "outputs": work.group_out,
            "vectors": packing.vectors,
            "u_count": packing.u_count,
            "v_count": packing.v_count,
            "w_group": w_group,
            "w_output": w_output,
            "w_u": packing.u_stride,
            "w_far": packing.far,
            "alone": packing.u_count - 1 if work.group_in % 2 else -1,
            "r_u": packing.r_u,
            "r_v": packing.r_v,
            "width": wide,
        }
        pack_tasks = work.groups * packing.vectors
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


def _ahead(work: Work, x: Places, image: int, way: Layout, sides: tuple[Axis, Axis]) -> int:
    """From what a block reads to what the next task's does, in elements of the input."""
    if work.groups > 1:
        return work.group_in * x.channel
    if work.batch > 1:
        return image
    high, width = sides
    return way.rows * high.stride * x.row if way.rows < high.out else way.cols * width.stride * x.col


def _tables(
    mode: str, axes: Axes, way: Layout, source: str, taps: list[tuple[int, int]], zeros: int, y_place: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The tables of the kernel, one behind the other, and where each begins; those that it does not read are empty."""
    depth, high, width = axes
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    rows = (blocks[0] * way.rows - 1) * high.stride + high.reach + 1
    cols = (blocks[1] * way.cols + way.strip.length + way.lanes) * width.stride + width.reach + 1
    read = {"none": 0, "rows": 2}.get(source, 3)
    phases: list[tuple[int, ...]] = []
    places = torch.zeros(0, dtype=torch.int64)
    apart = _apart(axes)
    if apart:
        taps, phases, places = _scattered(axes, way, taps, y_place)
    numbers = [
        *(way.strip.rows(), taps, _reach(mode, depth, way.strip, 1 if apart else len(taps) // max(len(depth.taps), 1))),
        *(phases, shown(depth, mode) if read else []),
    ]
    parts = [
        *(torch.tensor(table, dtype=torch.int64).flatten() for table in numbers),
        _shown(high, mode, 0, rows if read else 0),
        _shown(width, mode, 0, cols if read == 3 else 0),
        places,
        torch.zeros(-(-zeros // 8), dtype=torch.int64),
    ]
    tables = torch.cat(parts)
    begins, begin = [], tables.data_ptr()
    for part in parts:
        begins.append(begin)
        begin += part.nbytes
    return tables, tuple(begins)


def _scattered(
    axes: Axes, way: Layout, taps: list[tuple[int, int]], y_place: int
) -> tuple[list[tuple[int, int]], list[tuple[int, ...]], Tensor]:
    """Taps phase by phase, the phases (see `dense.PHASE`), and where the places of a block are from its corner on.

    A phase may have a column less than the first one, and then nothing for the last place of a whole row.
    """
    depth, high, width = axes
    of_all = list(product(depth.taps, high.taps, width.taps))
    by_phase: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for tap, (_, r, c) in zip(taps, of_all, strict=True):
        by_phase.setdefault((r.phase, c.phase), []).append(tap)
    found: list[tuple[int, int]] = []
    phases: list[tuple[int, ...]] = []
    whole = way.cols == width.out
    lengths = (width.out, width.out - 1) if whole else (width.out,)
    for row, col in _phases(axes):
        begin = len(found)
        found += by_phase.get((row, col), [])
        each = (len(found) - begin) // max(len(depth.taps), 1)
        count = width.places(col)
        table = lengths.index(count) * way.rows * way.cols if whole else 0
        first = (row * width.made + col) * y_place
        phases.append((begin, each, first, high.places(row), width.out if whole else count, table))
    place = torch.arange(way.rows).view(-1, 1) * (high.step * width.made) + torch.arange(way.cols) * width.step
    place *= y_place
    there = [place.where(torch.arange(way.cols) < length, -1).flatten() for length in lengths]
    return found, phases, torch.cat([*there, torch.full((way.lanes,), -1)])


def _reach(mode: str, depth: Axis, strip: Strip, each: int) -> list[list[int]]:
    """For each depth of the output, which taps and rows of the strip are not wholly in the padding.

    each: taps of rows and width, in what is counted
    """
    reach = []
    for first, count in inside(depth, mode):
        shows = [first <= z < first + count for z, *_ in strip.runs]
        begin = sum(run[-1] for run in strip.runs[: shows.index(True)]) if True in shows else 0
        reach.append([first * each, count * each, begin, sum(run[-1] for run in compress(strip.runs, shows))])
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
def workspace_bytes(work: Work) -> int:
    """Scratch memory for tensors that lie in any way."""
    is_ = kind(work)
    ways = {way(work, merge) for merge in (True, False) for way in (natural, partial(layout, reads=Reads.STRIP))}
    most = 0
    for way in ways:
        pitches = _pitches(is_, way.strip, way.lanes)
        sources = {Reads.STRIP: ("rows", "pixels"), Reads.INPUT: ("none",), Reads.LIST: ("list",)}[way.reads]
        share = max(_share(is_, way, source, *pitches)[1] for source in sources)
        packing = _packing(work, way, False)
        most = max(most, way.shares * share + (_padded(packing.bytes, ALIGNMENT) if packing else 0))
    return most


def why_not(request: Request) -> str | None:
    """The sentence for what no kernel of this kind does."""
    if request.device != "cpu":
        return "its kernels are machine code of the CPU, and the tensors are on another device"
    if request.dtype not in STORED:
        return f"its kernels compute in floating-point numbers, not {str(request.dtype).removeprefix('torch.')}"
    if request.problem.dims > 3:
        return "its loops are for at most three dimensions"
    return too_far(request.problem) or cpu.why_not()


def error(request: Request) -> float:
    """One sum in a fixed order."""
    return summation_error(request.problem.terms(request.direction))


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the call."""
    seen, problem = work(request), request.problem
    way = natural(seen)
    packing = _packing(seen, way, False)
    moved = request.dtype.itemsize * sum(math.prod(problem.shape_of(role)) for role in ("x", "w", "y"))
    cycles = way.cycles * _real(seen)
    if packing:
        cycles += (
            2 * packing.bytes / (FAR_BYTES if packing.bytes > FAR_WEIGHT else NEAR_BYTES) / max(request.threads, 1)
        )
    seconds = max(cycles / CYCLES_PER_SECOND, moved / (CACHED if moved < CACHE else BYTES_PER_SECOND)) + LAUNCH_S
    return Cost(problem.multiplies, moved, workspace_bytes(seen), seconds + THREADS_S * (way.shares > 1))


def _real(work: Work) -> float:
    """The share of a kernel's depth that is not in the padding."""
    depth = work.axes()[0]
    return sum(count for _, count in inside(depth, work.mode)) * depth.step / max(len(depth.taps) * depth.made, 1)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    seen = work(request)
    x, w, bias, _ = tensors
    is_ = kind(seen)
    channels_inside = not (is_.places or seen.turned or w.is_contiguous()) and w.movedim(1, -1).is_contiguous()
    packs = is_.pairs or not is_.places or _apart(seen.axes())
    copies_w = packs and not channels_inside and not w.is_contiguous()
    copies_bias = bias is not None and not bias.is_contiguous()
    w_strides = w.contiguous().stride() if copies_w else w.stride()
    ready = prepare(seen, x.stride(), w_strides, channels_inside)
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
