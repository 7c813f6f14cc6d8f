"""The kernel of `depthwise` for channels_last: lanes are neighbouring channels, in and out.

    y[p, c .. c + lanes]  =  bias[c ..]  +  sum over k  of  weight[k, c ..] * x[p * stride + k * dilation - lo, c ..]

All of it is three-dimensional (depth, rows, width); what has fewer dimensions has sizes of 1 in front.  The weight is
packed first, to [block, taps, channels of a block].  A tile is

    pixels x vectors        neighbours along the width, and vectors of channels side by side: one register each

and the loops are, from the outside in,

    task          an image, a depth, some rows of the output and some blocks of channels
      fill        the addresses of the input rows that each row reads, for each depth and row of the kernel
      column      pixels of a tile
        block     vectors of channels
          row     so that the rows of the kernel find in the nearest cache what the row above has read
            step  an input row
              load weights; load x, a pixel that serves all the outputs it lies under; acc[p][v] += weight * x

In memory the channels of a pixel lie side by side; image, depth, row and pixel have any strides.

Borders are tables: which element of the input a place shows, or -1.  A row of the border is left out, for it adds
zeros; unless a weight is infinite or NaN, whose product with zero is NaN.  Tiles inside step from pixel to pixel; those
at the edges, and the narrower ones that end the row, look each pixel up, and read zeros for what lies outside.

Sizes are arguments, so that a new image size compiles nothing: `Shape` has all that the text depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.epilogue import finish

POINTERS = ("x", "w", "bad", "bias", "residual", "y", "depth_table", "row_table", "width_table", "zeros")
SIZES = (
    "x_image",  # elements from one image to the next, and so on
    "x_depth",
    "x_row",
    "x_pixel",
    "y_image",  # the residual's too
    "y_depth",
    "y_row",
    "y_pixel",
    "channels",
    "whole",  # blocks of `vectors` vectors; those after them have one
    "blocks",  # all of them
    "groups",  # that blocks are dealt to
    "parts",  # that rows are dealt to
    "out_depth",
    "out_rows",
    "out_width",
    "lo",  # padding before a row
    "head",  # tiles at the left edge
    "inside",  # tiles after them
    "edges",  # tiles at both edges
    "ends",  # narrower tiles, for what does not fill a tile
)
PACK_POINTERS = ("w", "packed", "bad")
PACK_SIZES = ("channels", "whole")
ROWS = 4  # of a task, at most: rows share what they read, but tall tasks read memory in too many places
UNROLLED = 32  # taps of a weight, packed in a row


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    element, stored  types of the sums and of memory
    kernel           of depth, rows and width; stride and dilation are the width's: tables know the others
    vectors          of a whole block of channels (`whole`: there are some)
    rest             "" or what follows the whole blocks: blocks of one "full" vector, or that end under a "mask"
    pixels, ends     of a tile, and of the narrower tiles
    taps             along the width that are unrolled together: their weights stay in registers
    """

    element: str
    stored: str
    lanes: int
    native: frozenset[str]
    kernel: tuple[int, int, int]
    stride: int
    dilation: int
    vectors: int
    whole: bool
    rest: str
    pixels: int
    ends: int
    taps: int
    has_bias: bool
    has_residual: bool
    activation: str | None

    @property
    def all_taps(self) -> int:
        """Of the whole kernel."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS and SIZES are its arguments, tasks count image, depth, part, group."""
    return _Channels(shape).kernel()


@lru_cache(512)
def pack_text(shape: Shape) -> str:
    """The kernel that packs the weight: PACK_POINTERS and PACK_SIZES are its arguments, tasks count blocks.

    packed is [block, taps, channels of a block], of accumulators, zeros behind the last channel; bad[block] becomes 1
    if a weight times zero is not zero.
    """
    return _Pack(shape).kernel()


@dataclass(frozen=True)
class _Block:
    """Channels that are computed together: the first, how many vectors, and the mask of the last vector."""

    first: Value
    count: Value
    vectors: int
    mask: Value | None

    def masked(self, vector: int) -> Value | None:
        return self.mask if vector == self.vectors - 1 else None


class _Blocks:
    """What both kernels know: their arguments, and where a block of channels begins."""

    def __init__(self, shape: Shape, pointers: Sequence[str], sizes: Sequence[str]) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native)
        given = e.arguments(*("ptr",) * len(pointers), *("i64",) * len(sizes))
        self.given = dict(zip((*pointers, *sizes), given, strict=True))

    def choose(self, block: Value, serve: Callable[[_Block], None]) -> None:
        """Call serve for a whole block, or for one of those after them."""
        e, of, shape = self.e, self.given, self.shape
        width = shape.vectors * shape.lanes

        def whole() -> None:
            serve(_Block(block * width, e.number(width), shape.vectors, None))

        def rest() -> None:
            first = of["whole"] * width + (block - of["whole"]) * shape.lanes
            left = e.least(of["channels"] - first, shape.lanes)
            serve(_Block(first, left, 1, e.tail(left) if shape.rest == "mask" else None))

        if shape.whole and shape.rest:
            e.when(block < of["whole"], whole, rest)
        else:
            (whole if shape.whole else rest)()


class _Pack(_Blocks):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, PACK_POINTERS, PACK_SIZES)

    def kernel(self) -> str:
        e = self.e

        def task(i: Value, _: list[Value]) -> Sequence[Value]:
            self.choose(e.begin + i, lambda block: self.pack(e.begin + i, block))
            return []

        e.loop(e.end - e.begin, [], task)
        return e.module()

    def pack(self, number: Value, block: _Block) -> None:
        e, of, shape = self.e, self.given, self.shape
        taps, width = shape.all_taps, block.vectors * shape.lanes
        w = e.at(of["w"], block.first * taps, shape.stored)
        packed = e.at(of["packed"], block.first * taps)

        def clear(i: Value, _: list[Value]) -> Sequence[Value]:
            e.store(e.zero, packed, i * shape.lanes)
            return []

        def each_channel(c: Value, _: list[Value]) -> Sequence[Value]:
            def move(tap: Value | int) -> None:
                one = e.widen(e.scalar(w, c * taps + tap, shape.stored), shape.stored)
                e.put(one, packed, c + tap * width)

            def each_tap(tap: Value, _: list[Value]) -> Sequence[Value]:
                move(tap)
                return []

            if taps > UNROLLED:
                e.loop(taps, [], each_tap)
            else:
                for tap in range(taps):
                    move(tap)
            return []

        def times_zero(i: Value, sums: list[Value]) -> Sequence[Value]:
            return [e.fma(e.load(packed, i * shape.lanes), e.zero, sums[0])]

        if block.mask:
            e.loop(taps * block.vectors, [], clear)
        e.loop(block.count, [], each_channel)
        (total,) = e.loop(taps * block.vectors, [e.zero], times_zero)
        e.put(e.select(e.any(e.is_nan(total)), e.number(1), e.number(0)), of["bad"], number)


class _Channels(_Blocks):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, POINTERS, SIZES)
        e, self.steps = self.e, shape.kernel[0] * shape.kernel[1]
        self.starts = e.stack("ptr", ROWS * self.steps)  # for each row of the output, where input rows begin,
        self.pixels = e.stack("i64", ROWS * self.steps)  # how far apart their pixels are,
        self.weights = e.stack("i64", ROWS * self.steps)  # where the weights are that they are multiplied by;
        self.counts = e.stack("i64", ROWS)  # and how many there are

    def kernel(self) -> str:
        e, of = self.e, self.given

        def task(i: Value, _: list[Value]) -> Sequence[Value]:
            place = e.begin + i
            group, place = place % of["groups"], place // of["groups"]
            part, place = place % of["parts"], place // of["parts"]
            self.task(place // of["out_depth"], place % of["out_depth"], part, group)
            return []

        e.loop(e.end - e.begin, [], task)
        return e.module()

    def task(self, image: Value, d: Value, part: Value, group: Value) -> None:
        e, of, shape = self.e, self.given, self.shape

        def share(number: Value, total: str, among: str) -> tuple[Value, Value]:
            """The first, and how many, of the numbered share."""
            first = number * of[total] // of[among]
            return first, (number + 1) * of[total] // of[among] - first

        row, rows = share(part, "out_rows", "parts")
        first_block, blocks = share(group, "blocks", "groups")
        self.fill(image, d, row, rows, first_block, blocks)
        to = image * of["y_image"] + d * of["y_depth"] + row * of["y_row"]

        def tile(first: Value, pixels: int, inside: bool) -> None:
            def each_block(i: Value, _: list[Value]) -> Sequence[Value]:
                self.choose(first_block + i, lambda block: self.tile(block, rows, to, first, pixels, inside))
                return []

            e.loop(blocks, [], each_block)

        def inside(i: Value, _: list[Value]) -> Sequence[Value]:
            tile((of["head"] + i) * shape.pixels, shape.pixels, True)
            return []

        def edge(i: Value, _: list[Value]) -> Sequence[Value]:
            tile(e.select(i < of["head"], i, i + of["inside"]) * shape.pixels, shape.pixels, False)
            return []

        def end(i: Value, _: list[Value]) -> Sequence[Value]:
            # The last one begins so early that it ends with the row: it may compute a pixel again.
            first = (of["inside"] + of["edges"]) * shape.pixels + i * shape.ends
            tile(e.least(first, of["out_width"] - shape.ends), shape.ends, False)
            return []

        e.loop(of["inside"], [], inside)
        e.loop(of["edges"], [], edge)
        if shape.ends:
            e.loop(of["ends"], [], end)

    def fill(self, image: Value, d: Value, first: Value, rows: Value, first_block: Value, blocks: Value) -> None:
        """Write down the input rows that each row of the task reads."""
        e, of, shape = self.e, self.given, self.shape
        depth, high, width = shape.kernel
        x = e.at(of["x"], image * of["x_image"], shape.stored)

        def add(i: Value, sums: list[Value]) -> Sequence[Value]:
            return [sums[0] + e.scalar(of["bad"], first_block + i, "i64")]

        (bad,) = e.loop(blocks, [e.number(0)], add)
        kept = e.select(bad > 0, e.number(1), e.number(0))  # for a row of the border

        def each_row(r: Value, _: list[Value]) -> Sequence[Value]:
            def each_depth(kd: Value, state: list[Value]) -> Sequence[Value]:
                by_depth = e.scalar(of["depth_table"], d * depth + kd, "i64")
                plane = e.at(x, by_depth * of["x_depth"], shape.stored)
                least = e.select(by_depth >= 0, e.number(0), e.number((1 << 63) - 1))  # outside: no row is real

                def each_tap(kh: Value, state: list[Value]) -> Sequence[Value]:
                    (count,) = state
                    by_row = e.scalar(of["row_table"], (first + r) * high + kh, "i64")
                    real, slot = by_row >= least, r * self.steps + count
                    start = e.select(real, e.at(plane, by_row * of["x_row"], shape.stored), of["zeros"])
                    e.put(start, self.starts, slot)
                    e.put(e.select(real, of["x_pixel"], e.number(0)), self.pixels, slot)
                    e.put((kd * high + kh) * width, self.weights, slot)
                    return [count + e.select(real, e.number(1), kept)]

                return e.loop(high, state, each_tap)

            (count,) = e.loop(depth, [e.number(0)], each_depth)
            e.put(count, self.counts, r)
            return []

        e.loop(rows, [], each_row)

    def tile(self, block: _Block, rows: Value, to: Value, first: Value, pixels: int, inside: bool) -> None:
        """Pixels first, first + 1, ... of all rows of the task, in the channels of one block."""
        e, of, shape = self.e, self.given, self.shape
        width, taps = shape.kernel[2], min(shape.taps, shape.kernel[2])
        vectors, across = range(block.vectors), block.vectors * shape.lanes
        begin = [e.zero for _ in vectors]
        if shape.has_bias:
            begin = [e.load(of["bias"], block.first + v * shape.lanes, block.masked(v), shape.stored) for v in vectors]
        packed = e.at(of["w"], block.first * shape.all_taps)
        place = first * shape.stride  # in the padded row, where the first tap begins

        def each_row(r: Value, _: list[Value]) -> Sequence[Value]:
            def each_step(step: Value, acc: list[Value]) -> Sequence[Value]:
                slot = r * self.steps + step
                start = e.at(e.scalar(self.starts, slot, "ptr"), block.first, shape.stored)
                pixel = e.scalar(self.pixels, slot, "i64")
                weights = e.at(packed, e.scalar(self.weights, slot, "i64") * across)

                def some(group: Value, acc: list[Value], count: int = taps) -> Sequence[Value]:
                    w = e.at(weights, group * (taps * across))
                    left = place + group * (taps * shape.dilation)
                    return self.taps(block, acc, start, pixel, w, left, pixels, count, inside)

                acc = e.loop(width // taps, acc, some)
                return some(e.number(width // taps), acc, width % taps) if width % taps else acc

            acc = e.loop(e.scalar(self.counts, r, "i64"), begin * pixels, each_step)
            for p in range(pixels):
                at = to + r * of["y_row"] + (first + p) * of["y_pixel"] + block.first
                for v in vectors:
                    place_of, mask = at + v * shape.lanes, block.masked(v)
                    residual = e.load(of["residual"], place_of, mask, shape.stored) if shape.has_residual else None
                    result = finish(e, acc[p * block.vectors + v], residual, shape.activation)
                    e.store(result, of["y"], place_of, mask, shape.stored)
            return []

        e.loop(rows, [], each_row)

    def taps(
        self,
        block: _Block,
        acc: Sequence[Value],
        start: Value,
        pixel: Value,
        weights: Value,
        left: Value,
        pixels: int,
        count: int,
        inside: bool,
    ) -> list[Value]:
        """Add what `count` neighbouring taps of one input row give, the first of them at place `left`."""
        e, of, shape = self.e, self.given, self.shape
        acc, vectors = list(acc), block.vectors
        w = [[e.load(weights, (k * vectors + v) * shape.lanes) for v in range(vectors)] for k in range(count)]
        under: dict[int, list[tuple[int, int]]] = {}  # for each place, the pixels it serves, and by which tap
        for p in range(pixels):
            for k in range(count):
                under.setdefault(p * shape.stride + k * shape.dilation, []).append((p, k))
        at, before = e.at(start, (left - of["lo"]) * pixel, shape.stored) if inside else start, 0
        for place in sorted(under):
            if inside:
                at, before = e.at(at, pixel * (place - before), shape.stored), place
            else:
                shown = e.scalar(of["width_table"], left + place, "i64")
                at = e.select(shown >= 0, e.at(start, shown * pixel, shape.stored), of["zeros"])
            for v in range(vectors):
                x = e.load(at, v * shape.lanes, block.masked(v), shape.stored)
                for p, k in under[place]:
                    acc[p * vectors + v] = e.fma(x, w[k][v], acc[p * vectors + v])
        return acc
