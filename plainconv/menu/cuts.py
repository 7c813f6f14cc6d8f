"""How `direct` and `pointwise` cut a convolution into blocks, and what each way to cut costs.

A block is some whole rows of the output, or a part of one row; its strip holds what all taps of the block read.  Which
of the two, and how large, is the cheapest by a count of cycles: gathering, products with the lanes that stay idle, and
the weight read again for each block.  Where the channels of a pixel lie side by side there may be no strip, but a list
of where each tap of each place is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

import torch

from plainconv.cpu import compile as cpu
from plainconv.cpu.emit import natives
from plainconv.menu import engine
from plainconv.menu.axes import Axes, Axis, Work
from plainconv.menu.base import ALIGNMENT
from plainconv.menu.engine import STORED, padded

STRIP_BYTES = 768 << 10  # what a core's own cache keeps beside the weight
WIDE_STRIP_BYTES = 9 << 18  # more than this waits for the cache that cores share
MOST_STRIP_BYTES = 16 << 20
MOST_IMAGES_BYTES = 64 << 20
FEW_PRODUCTS = 128  # of a number that is read: with more, gathering takes hardly any time
FEW_CHANNELS = 32
FEW_IN_LINES = 8  # channels
PARTS = 16  # of the output channels, at most, so that threads get equal shares
MOST_SCALARS = 8  # of a tile; each has its own address, and integer registers are few
MOST_PAIRS = 14  # the same of pairs of few places: fewer of these are made twice, at the price of SPILLED
PLACES = (8192, 4096, 2048, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)  # of a block
FEW_PLACES = 256  # of a plane, as lanes: more of them have the same tile, so that a new size needs no new kernel

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
PIXEL = 25.0  # a pixel gathered
LISTED = 4.0  # an entry in the list of where taps are
TAP = 6.0  # a tap of a tile, if taps are listed
ADDRESS = 1.5  # and of each of its scalars
SPILLED = 6.0  # a tap, listed or not, for each scalar of a tile beyond MOST_SCALARS
SLOT = 3.0  # a row of a channel in the strip
RUN = 20.0  # a piece of a channel, in or out, behind which memory goes on elsewhere
BLOCK = 100.0  # a block's beginning and end
FAR = 1.08  # a strip that the core's own cache does not keep
FAR_PIXELS = 1.25  # and one of gathered pixels
FAR_STEP = 28.0  # a step of a tile that reads a wide strip, at least
NEAR_BYTES = 8.0  # a cycle, of a weight that some cache holds
FAR_BYTES = 2.7  # and of a larger one
FAR_WEIGHT = 4 << 20
FAR_LINE = 150.0  # a line of such a weight, if it is turned, ...
SEEN = 192.0  # ... unless a channel has fewer products: then the processor asks for those of the next ones, too
SCATTER = 2.0  # a number of the result that lies apart from its neighbours
WEAVE = 6.0  # a vector of the result, of which each phase has a part
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


def in_place(work: Work) -> bool:
    """Whether a row is better read where it lies than gathered, if neighbours along the width lie side by side.

    Gathering is a large part of few products; many channels, though, lie in more pages than a core has addresses of.
    """
    is_, width = kind(work), work.axes()[2]
    plain = is_.places and STORED[work.request.dtype] == is_.element and width.stride == 1 and not apart(work.axes())
    few = work.group_in <= FEW_CHANNELS and work.group_out * work.taps <= FEW_PRODUCTS
    return plain and few and work.kernel[-1] == work.taps > 1


def list_of(axes: Axes, rows: int, cols: int) -> Strip:
    """The same where nothing is gathered: for each tap, where it is for every place of a block."""
    depth, high, width = axes
    runs = tuple((z, y.place, x.place, 1) for z, y, x in product(range(len(depth.taps)), high.taps, width.taps))
    return Strip(runs, 1, rows * cols, tuple(range(0, len(runs) * rows * cols, rows * cols)))


def in_lines(work: Work, axes: Axes) -> bool:
    """Whether a row of the kernel can be one run of numbers of a line, and channels are so few that this helps."""
    width = axes[2]
    near = all(tap.place == tap.number for tap in width.taps) and (work.mode == "zeros" or max(width.padding) <= 0)
    few = work.groups == 1 and 0 < work.group_in <= FEW_IN_LINES and len(width.taps) > 1
    return few and near and work.request.channels_last and not work.turned


def lines_of(axes: Axes, rows: int, cols: int, channels: int) -> Strip:
    """The strip of lines: lengths and shifts count numbers, and the shifts are those of the kernel's rows."""
    depth, high, width = axes
    length = ((cols - 1) * width.stride + width.reach + 1) * channels
    count = (rows - 1) * high.stride + high.reach + 1
    shifts = [(z * count + y.place) * length for z, y in product(range(len(depth.taps)), high.taps)]
    return Strip(tuple((z, 0, 0, count) for z in range(len(depth.taps))), 1, length, tuple(shifts))


def _reach_of(axis: Axis, count: int) -> int:
    """How many places of the input so many of the output read along a side."""
    return min((count - 1) * axis.stride + axis.reach + 1, axis.size)


# -- how to cut ------------------------------------------------------------------------------------------------------


class Reads(Enum):
    """What a product reads: a strip gathered before, the input as it lies, or the input through a list of its taps.

    LINES: a strip of lines, where the few channels of a pixel lie side by side.
    IMAGES: through a list, too, of an input that is packed: scalars are one place of several images.
    """

    STRIP = "strip"
    INPUT = "input"
    LIST = "list"
    LINES = "lines"
    IMAGES = "images"


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
    channels: int  # of a group, or pairs of them; in lines: numbers of a row of the kernel, or pairs of them
    taps: int  # for each of these
    native: frozenset[str]


@lru_cache(4096)
def kind(work: Work, lines: bool = False) -> Kind:
    """Roles and types of a request; lines: if it reads such."""
    native, request = natives(cpu.Target.host()), work.request
    places, channels, taps = not request.channels_last, work.group_in, work.taps
    alone = lines or (places and channels > 1)  # whether one may be, of an odd number
    if lines:
        channels, taps = channels * work.kernel[-1], taps // work.kernel[-1]
    pairs = request.dtype is torch.bfloat16 and "pairs" in native and (channels % 2 == 0 or alone)
    element = "double" if request.dtype is torch.float64 else "float"
    channels = -(-channels // 2) if pairs else channels
    return Kind(places, pairs, element, 8 if element == "double" else 4, channels, taps, native)


def _lanes(work: Work, target: cpu.Target) -> int:
    """Lanes of the widest register, or of half of it where that leaves many fewer of them idle."""
    is_ = kind(work)
    along = math.prod(axis.out for axis in work.axes()) if is_.places else work.group_out
    return engine.fewer_idle(along, is_.size, target)


def _tiles(scalars: int, vectors: int, spare: int, most_scalars: int = MOST_SCALARS) -> Iterator[Tile]:
    """Tiles that fit the registers to spare; even ones: 10 scalars are 5 and 5, not 8 and 2."""
    for wide in sorted({min(wide, vectors) for wide in (1, 2, 3, 4, 6, 8)}):
        most = min((spare - wide) // wide, most_scalars)
        if most >= 1:
            yield Tile(-(-scalars // -(-scalars // most)), wide)


def _settled_tiles(outputs: int, spare: int, steps: float, load: float, row: bool) -> list[Tile]:
    """The tiles of many places, whose number does not matter: the best where no lanes are idle, and its half.

    Whole rows of a picture may fill one or the other better; a part of a single row can be as long as fills the best.
    """
    vectors = math.lcm(1, 2, 3, 4, 6, 8)
    tiles = list(_tiles(outputs, vectors, spare))
    best = min(tiles, key=lambda tile: _tile_cycles(outputs, vectors, tile, steps, load, 0.0))
    wide = {best.vectors} if row else {best.vectors, -(-best.vectors // 2)}
    return [tile for tile in tiles if tile.vectors in wide]


def _tile_cycles(
    scalars: int, vectors: int, tile: Tile, steps: float, load: float, listed: float, taps: float = 0.0
) -> float:
    """Of the product of `scalars` x `vectors`, each a sum over `steps` of `taps`, `listed` of which are looked up."""
    whole, single = divmod(vectors, tile.vectors)

    def step(wide: int) -> float:
        sums = max(tile.scalars * wide, 8)  # fewer wait for each other
        return max(PRODUCT * sums, BROADCAST * tile.scalars) + STEP + load * wide

    sums = tile.scalars * (whole * tile.vectors + single)
    spilled = taps * max(tile.scalars - MOST_SCALARS, 0) * SPILLED
    return -(-scalars // tile.scalars) * (
        steps * (whole * step(tile.vectors) + single * step(1))
        + FIRST * sums
        + (TILE + listed * (TAP + tile.scalars * ADDRESS) + spilled) * (whole + single)
    )


def _blocks(axes: Axes, step: int) -> Iterator[tuple[int, int, bool]]:
    """Rows, columns, and whether rows are whole, of the blocks to choose from; parts of a row: multiples of `step`."""
    _, high, width = axes
    for count in sorted({max(1, round(width.out / places)) for places in PLACES}):
        yield 1, min(padded(-(-width.out // count), step), width.out), False
    if high.out > 1:
        for count in sorted({min(max(1, round(high.out * width.out / places)), high.out) for places in PLACES}):
            yield -(-high.out // count), width.out, True


@lru_cache(4096)
def layout(work: Work, merge: bool, reads: Reads) -> Layout:
    """The cheapest way whose strips fit the workspace; the one of the smallest strip, if none does."""
    found = ways_by_images(work, merge) if reads is Reads.IMAGES else ways(work, merge, reads)
    limit = min(work.request.max_workspace // (2 * max(work.request.threads, 1)), MOST_STRIP_BYTES)
    fit = [one for strip_bytes, one in found if strip_bytes <= limit]
    return min(fit, key=lambda one: one.cycles) if fit else min(found, key=lambda pair: pair[0])[1]


def ways(work: Work, merge: bool, reads: Reads) -> list[tuple[int, Layout]]:
    """All ways to cut a request that are worth a thought, with the bytes of their strips."""
    lined = reads is Reads.LINES
    request, target, is_ = work.request, cpu.Target.host(), kind(work, lined)
    axes = depth, high, width = work.axes(merge)
    lanes = _lanes(work, target)
    register = lanes * is_.size * 8
    vector = engine.vector_cycles(register, target)  # cycles
    spare = target.registers - (2 if target.fma else 3)
    all_phases = phases(axes)
    weight = work.group_out * is_.channels * is_.taps * is_.size
    moves = axes[:2] if lined else axes  # along which the kernel has taps
    taps = math.prod(len(axis.taps) for axis in moves) / (depth.step * len(all_phases))  # of a phase
    steps = is_.channels * taps
    anywhere = reads is Reads.INPUT and is_.places
    load = LOAD + UNALIGNED if anywhere and math.prod(work.spatial) % lanes else LOAD
    found: list[tuple[int, Layout]] = []
    listed = reads is Reads.LIST
    settled, step = [], lanes
    if is_.places and high.out * width.out > FEW_PLACES:
        most_load = LOAD + UNALIGNED * anywhere
        settled = _settled_tiles(max(work.group_out, 1), spare, steps, most_load, high.out == 1)
        step *= settled[0].vectors if high.out == 1 else 1
    for rows, cols, whole in _blocks(axes, step):
        if lined:
            strip = lines_of(axes, rows, cols, work.group_in)
        else:
            strip = list_of(axes, rows, cols) if listed else strip_of(axes, rows, cols, whole)
        by_row, by_pixel = pitches(strip, lanes, is_.size, is_.channels)
        if listed:
            # Pixels; groups meet in the same lines of the cache, so those of all groups have to stay there.
            read = _reach_of(high, rows) * _reach_of(width, cols) * min(len(depth.taps), depth.size)
            strip_bytes = read * work.in_channels * request.dtype.itemsize
        elif lined:
            strip_bytes = lines_bytes(is_, strip, lanes)
        else:
            strip_bytes = max(is_.channels * by_row, strip.slots * strip.length * by_pixel) * is_.size
        lies = reads is Reads.STRIP and strip.slots == 1 and in_place(work)
        planes = work.batch * work.groups
        blocks = planes * depth.made * -(-high.out // rows) * -(-width.out // cols)
        entries = strip.slots * (-(-strip.length // lanes) if is_.places or lined else strip.length)
        if lined:
            copies = entries * COPY
        elif reads is not Reads.STRIP or lies:
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
        often = (1, 1)  # that there are so many, in a block and in the last one
        if lined and whole:
            often, most, last = (rows, high.out - (count - 1) * rows), cols, cols
        few = is_.pairs and not (is_.places or lined) and most <= FEW_PLACES
        most_scalars = MOST_PAIRS if few else MOST_SCALARS
        for tile in settled or _tiles(*_factors(is_, work, most, lanes), spare, most_scalars):
            full, less = (
                _tile_cycles(*_factors(is_, work, places, lanes), tile, steps, load, taps * listed, taps)
                for places in (most, last)
            )
            cycles = (full * often[0] * (count - 1) + less * often[1]) / count * vector * len(all_phases)
            scalars, vectors = _factors(is_, work, most, lanes)
            if apart(axes) and is_.places:
                each = WEAVE if woven(axes) else SCATTER * lanes
                cycles += each * scalars * vectors * len(all_phases)
            # Beside what lies in memory, the cache has what is asked for ahead.
            if strip_bytes * (1 + lies) > STRIP_BYTES:
                cycles *= FAR if listed or is_.places else FAR_PIXELS
            if strip_bytes > WIDE_STRIP_BYTES and is_.places:
                # A step reads another row of it, mostly in another page; all tiles of outputs read it again, from the
                # cache that cores share, or from memory.
                passes, tiles = -(-scalars // tile.scalars), sum(divmod(vectors, tile.vectors))
                cycles = max(cycles, passes * tiles * steps * len(all_phases) * FAR_STEP)
                if strip_bytes * request.threads > CACHE // 2:
                    cycles = max(cycles, passes * strip_bytes / FAR_BYTES)
            if work.turned and is_.places and work.taps > 1 and weight > FAR_WEIGHT and not (apart(axes) or is_.pairs):
                # What a tile reads of each channel of a turned weight lies in a page of its own.
                passes, lines = -(-scalars // tile.scalars), tile.scalars * work.taps * is_.size / ALIGNMENT
                seen = min(tile.scalars * vectors * work.taps / SEEN, 1.0)
                cycles += passes * is_.channels * lines * FAR_LINE * seen * seen
            if listed and strip_bytes > STRIP_BYTES:
                cycles += read * max(work.group_in * request.dtype.itemsize, ALIGNMENT) / NEAR_BYTES
            # The weight arrives while the first of a block's tiles along the other factor is at work.
            first = tile.vectors / vectors if is_.places else tile.scalars / scalars
            cycles += max(0.0, weight / (FAR_BYTES if weight > FAR_WEIGHT else NEAR_BYTES) - cycles * min(first, 1.0))
            cycles += BLOCK + (SLOT * is_.channels * strip.slots + RUN * pieces if is_.places else 0.0)
            cycles += copies * vector
            entry = {Reads.STRIP: ENTRY, Reads.LINES: ENTRY, Reads.LIST: LISTED, Reads.INPUT: 0.0}[reads]
            cycles += entry * entries / max(planes, 1)
            outputs = -(-scalars // tile.scalars) if is_.places else -(-vectors // tile.vectors)
            parts = min(outputs, PARTS)
            shares = max(min(request.threads, blocks * parts), 1)
            most_of = -(-blocks * parts // shares) / max(blocks * parts, 1)  # the share of one thread
            one = Layout(rows, cols, strip, tile, lanes, reads, parts, shares, blocks * cycles * most_of)
            found.append((strip_bytes if reads in (Reads.STRIP, Reads.LINES) else 0, one))
    return found


def ways_by_images(work: Work, merge: bool) -> list[tuple[int, Layout]]:
    """The same for the gradient for the input, if several images are read at once: a block has all of them."""
    request, target, is_ = work.request, cpu.Target.host(), kind(work)
    axes = depth, high, width = work.axes(merge)
    lanes = _lanes(work, target)
    register = lanes * is_.size * 8
    vector = engine.vector_cycles(register, target)
    spare = target.registers - (2 if target.fma else 3)
    _, vectors = _factors(is_, work, 1, lanes)
    # Taps of a place of the result that do not look into the border, on average.
    taps = math.prod(axis.met / max(axis.made, 1) for axis in axes)
    weight = work.group_out * is_.channels * work.taps * is_.size
    packed = images_bytes(work, lanes)
    copies = 2 * packed / (FAR_BYTES if packed > FAR_WEIGHT else NEAR_BYTES) / max(request.threads, 1)
    found: list[tuple[int, Layout]] = []
    for rows, cols, _ in _blocks(axes, lanes):
        blocks = work.groups * depth.made * -(-high.out // rows) * -(-width.out // cols)
        strip = list_of(axes, rows, cols)
        places = high.made * width.made / (-(-high.out // rows) * -(-width.out // cols))
        pixels = _reach_of(high, rows) * _reach_of(width, cols) * min(len(depth.taps), depth.size)
        read = packed / max(math.prod(work.spatial), 1) * pixels
        for tile in _tiles(work.batch, vectors, spare, spare):
            listed = taps + work.taps / len(phases(axes))
            cycles = places * vector * _tile_cycles(work.batch, vectors, tile, is_.channels * taps, LOAD, listed)
            # Of a phase and a tile of outputs, again for each place and each tile of images.
            part = tile.vectors * lanes * is_.channels * work.taps * is_.size / len(phases(axes))
            passes = places / len(phases(axes)) * -(-work.batch // tile.scalars)
            if part > STRIP_BYTES:
                cycles = max(cycles, passes * weight / NEAR_BYTES)
            cycles += max(0.0, weight / (FAR_BYTES if weight > FAR_WEIGHT else NEAR_BYTES) - cycles / max(passes, 1))
            cycles += BLOCK + LISTED * strip.slots * strip.length
            outputs = -(-vectors // tile.vectors)
            if read > STRIP_BYTES:
                cycles += outputs * read / NEAR_BYTES
            parts = min(outputs, PARTS)
            shares = max(min(request.threads, blocks * parts), 1)
            most_of = -(-blocks * parts // shares) / max(blocks * parts, 1)
            cycles = cycles * blocks * most_of + copies
            found.append((0, Layout(rows, cols, strip, tile, lanes, Reads.IMAGES, parts, shares, cycles)))
    return found


def images_bytes(work: Work, lanes: int) -> int:
    """Bytes of an input that is packed with its images side by side."""
    is_ = kind(work)
    return work.groups * math.prod(work.spatial) * is_.channels * padded(work.batch, lanes) * is_.size


def _factors(is_: Kind, work: Work, places: int, lanes: int) -> tuple[int, int]:
    """How many scalars and vectors the product of a block has."""
    outputs = max(work.group_out, 1)  # a tensor may have no channels
    return (outputs, -(-places // lanes)) if is_.places else (places, -(-outputs // lanes))


def apart(axes: Axes) -> bool:
    """Whether places that are computed together lie apart in the result."""
    return any(axis.step > 1 for axis in axes[1:])


def woven(axes: Axes) -> int:
    """How many phases of a result of one row are written as one, lanes being places; 0 if they are not."""
    _, high, width = axes
    return width.step if high.made == 1 and width.step in (2, 4, 8) and width.made >= width.step else 0


def phases(axes: Axes) -> list[tuple[int, int]]:
    """The phases of rows and width, each with its part of the taps; the depth has one at a time."""
    rows, cols = (range(min(axis.step, max(axis.made, 1))) for axis in axes[1:])
    return [(row, col) for row in rows for col in cols]


def pitches(strip: Strip, lanes: int, size: int, channels: int) -> tuple[int, int]:
    """Elements from a channel of the strip to the next, and from a place to the next if channels lie side by side.

    Both are an odd number of cache lines, so that neighbours do not meet in the same places of a cache; a channel ends
    with a vector to spare.
    """
    line = ALIGNMENT // size
    by_row, by_pixel = padded(strip.slots * strip.length + lanes, line), padded(channels, line)
    return by_row | line, by_pixel | line


def lines_bytes(is_: Kind, strip: Strip, lanes: int) -> int:
    """Of a strip of lines, which ends with a vector to spare."""
    return padded((strip.slots * strip.length + lanes) * (2 if is_.pairs else is_.size), ALIGNMENT)


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
    if in_lines(work, axes):
        ways.append(layout(work, merge, Reads.LINES))
    if merge and work.turned and work.batch > 1 and not is_.places:
        way = layout(work, True, Reads.IMAGES)
        if images_bytes(work, way.lanes) <= min(work.request.max_workspace // 2, MOST_IMAGES_BYTES):
            ways.append(way)
    return min(ways, key=lambda way: way.cycles)
