"""The kernel of `depthwise` for channels_last: lanes are neighbouring channels, in and out.

    y[r, p, c .. c + lanes]  =  bias[c ..]  +  sum over i, k  of
        weight[i, k, c ..] * x[r * stride + i * dilation - lo, p * stride + k * dilation - lo, c ..]

All of it is three-dimensional (depth, rows, width); what has fewer dimensions has sizes of 1 in front.  A tile is

    rows x pixels        of a vector of channels: one register each

and the loops are, from the outside in,

    group           blocks of channels, a vector each: their weight is packed, to [block, taps, lanes]
      task          an image, a span of tiles along the width, a strip of `rows` rows, a depth
        fill        the addresses of the input rows that the strip reads, for each depth of the kernel
        tile        pixels
          block     of the group
            step    a depth of the kernel, and `inner` of its rows
              load weights
              each input row: load x, a pixel that serves all the outputs it lies under; acc[r][p] += weight * x

(where a group has more channels than one, what is read and multiplied in a step is told by plainconv/cpu/groups.py)

so that a pixel is loaded once for all that it meets: with 3x3 taps, two rows of 7 pixels load 4 rows of 9 for 126
products.  Depths follow each other, since they read nearly the same.

Of an input larger than the caches, each step asks for a part of what the next task reads.  A result that would not stay
in the caches is written past them, where vectors are whole lines: else each line would be read before it is written.

In memory the channels of a pixel lie side by side; image, depth, row and pixel have any strides.  Where the channels
of the input lie apart (`spread`), a group is one block, strips follow each other, and a task first copies the rows that
it reads, and the last one did not, to scratch memory of its thread: squares of pixels and channels, transposed in
registers.  The last block begins so early that it ends with the channels, and computes some of them again; only fewer
channels than lanes need a mask.

Depth and rows may change places (`turned`): then neighbours along the depth are the `rows` that share what they load.

Borders are tables: which element of the input a place shows, or -1.  What lies in the border is left out, for it adds
zeros; unless a weight of the group is infinite or NaN, whose product with zero is NaN.  Tiles inside step from pixel to
pixel; those at the edges, and the narrower ones that end the row, look each pixel up.

Sizes are arguments: `Shape` has all that the text depends on.  Of the tile, it is the caller who knows which sizes have
one of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from plainconv.cpu.emit import HALVES, SCALARS, Emit, Value
from plainconv.cpu.epilogue import finish
from plainconv.cpu.weight import Weight

POINTERS = (
    "x",
    "w",
    "packed",
    "bias",
    "residual",
    "y",
    "depth_table",
    "row_table",
    "width_table",
    "zeros",
    "span_table",
)
SIZES = (
    "x_image",  # elements from one image to the next, and so on
    "x_depth",
    "x_row",
    "x_pixel",
    "x_channel",
    "y_image",  # the residual's too
    "y_depth",
    "y_row",
    "y_pixel",
    "channels",  # of the output
    "group_in",
    "group_out",
    "blocks",  # of channels
    "groups",  # that blocks are dealt to
    "tasks",  # of a group
    "spans",  # that the tiles of a row are dealt to
    "strips",
    "out_depth",
    "out_rows",
    "out_width",
    "lo",  # padding before a row
    "head",  # tiles at the left edge
    "inside",  # tiles after them
    "tiles",  # all of them
    "ends",  # narrower tiles, for what does not fill a tile
    "fresh",  # input rows, of the last of a task, ...
    "ahead",  # ... that are asked for so many elements further on: the next task reads them
    "room",  # bytes of the packed weights, behind which rows are copied, ...
    "room_share",  # ... bytes of a share
    "room_row",  # elements of a row
    "streams",  # 1 if the result is written past the caches
    "shares",  # that all tasks are dealt to: each packs weights for itself
)
LINE = 64  # bytes that come together from memory
CHECKED = 4  # vectors of the weight at a time, when it is looked at


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    element, stored  types of the sums and of memory
    kernel           of depth, rows and width; stride and dilation are those of rows and width: tables know the depth's
    weight           where its taps are
    turned           whether depth and rows have changed places: the weight still has its taps in the old order
    spread           whether the channels of a pixel of the input lie apart
    mask             whether there are fewer channels than lanes
    seen, made       input and output channels of each group in a vector; one that fills it makes as many as lanes
    rows, pixels     of a tile; `ends`: pixels of the narrower tiles, 0 if there are none
    inner, taps      along the rows and the width, that are unrolled together
    holds            whether all their weights stay in registers, or only those that an input row meets
    """

    element: str
    stored: str
    lanes: int
    native: frozenset[str]
    kernel: tuple[int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    turned: bool
    weight: Weight
    spread: bool
    mask: bool
    seen: int
    made: int
    rows: int
    pixels: int
    ends: int
    inner: int
    taps: int
    holds: bool
    has_bias: bool
    has_residual: bool
    activation: str | None

    @property
    def fills_lines(self) -> bool:
        """Whether a vector in memory is a line, so that it can be written without being read."""
        return self.made == 1 and not self.mask and self.lanes * SCALARS[self.stored] == LINE

    @property
    def ring(self) -> int:
        """Rows from the first to the last of a task, if most are read: so many are kept for the next one. Else 0."""
        reach = (self.rows - 1) * self.stride[0] + (self.kernel[1] - 1) * self.dilation[0] + 1
        return reach if reach <= self.chunks * len(self.meets) else 0

    @property
    def copied_rows(self) -> int:
        """Of all depths of the kernel, that there is room for."""
        return self.kernel[0] * (self.ring or self.chunks * len(self.meets))

    @property
    def tap_steps(self) -> tuple[int, int]:
        """How many taps further, in the weight, those of the next depth and of the next row are."""
        depth, rows, _ = self.weight.steps
        return (rows, depth) if self.turned else (depth, rows)

    @property
    def chunks(self) -> int:
        """Steps for each depth of the kernel."""
        return self.kernel[1] // self.inner

    @property
    def meets(self) -> dict[int, list[tuple[int, int]]]:
        """For each input row of a step, counted from the first: the rows of the tile it serves, and by which tap."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row in range(self.rows):
            for k in range(self.inner):
                found.setdefault(row * self.stride[0] + k * self.dilation[0], []).append((row, k))
        return dict(sorted(found.items()))


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS and SIZES are its arguments, and it runs shares of the tasks, which count
    group, image, span, strip, depth.

    packed has room for [shares, blocks, input channels of a group, taps, lanes] accumulators.
    """
    return Channels(shape).kernel()


@dataclass(frozen=True)
class Group:
    """Blocks of channels: the first, how many, where their weight is packed, and whether it has infinities or NaN."""

    first: Value
    count: Value
    packed: Value
    bad: Value


class Channels:
    """The kernel of groups of one channel."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native)
        given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
        self.given = dict(zip((*POINTERS, *SIZES), given, strict=True))
        if shape.made == 1:
            self.given |= {"group_in": e.number(1), "group_out": e.number(1)}
        steps = shape.kernel[0] * shape.chunks
        self.starts = e.stack("ptr", steps * len(shape.meets))  # where input rows begin: nowhere, if left out
        self.pixels = e.stack("i64", steps * len(shape.meets))  # how far apart their pixels are
        self.weights = e.stack("i64", steps)  # and for each step, where its weights are
        self.asked = e.stack("i64", steps + 1)  # and the first of the input rows that it asks for
        self.mask = e.tail(self.given["channels"]) if shape.mask else None
        self.room = self.given["packed"]
        # Where each is copied to, or -1; and for each room, which row it holds, or 0.
        self.rooms = e.stack("i64", steps * len(shape.meets)) if shape.spread else None
        self.held = e.stack("i64", shape.copied_rows) if shape.spread else None

    def kernel(self) -> str:
        e, of, shape = self.e, self.given, self.shape
        each, total = of["tasks"], of["tasks"] * of["groups"]
        size = of["blocks"] * of["group_in"] * (shape.weight.all_taps * shape.lanes)

        def share(i: Value, _: list[Value]) -> Sequence[Value]:
            """It packs for itself, however many threads there are: where depends on its number alone."""
            number = e.begin + i
            packed = e.at(of["packed"], number * size)
            if shape.spread:
                self.room = e.at(of["packed"], of["room"] + number * of["room_share"], "i8")
            begin, end = number * total // of["shares"], (number + 1) * total // of["shares"]
            first = begin // each
            spanned = (end + (each - 1)) // each - first
            e.loop(e.least(spanned, end - begin), [], lambda i, _: group(first + i, begin, end, packed))
            return []

        def group(number: Value, begin: Value, end: Value, packed: Value) -> Sequence[Value]:
            behind = number * each
            begin, end = e.most(begin, behind), e.least(end, behind + each)
            first_block, count = self.share(number, "blocks", "groups")
            blocks = Group(first_block, count, packed, self.pack(first_block, count, packed))

            self.forget_rows()

            def task(i: Value, _: list[Value]) -> Sequence[Value]:
                self.task(blocks, begin - behind + i)
                return []

            e.loop(end - begin, [], task)
            return []

        e.loop(e.end - e.begin, [], share)
        if shape.fills_lines:
            e.fence()
        return e.module()

    def share(self, number: Value, total: str, among: str) -> tuple[Value, Value]:
        """The first, and how many, of the numbered share."""
        of = self.given
        first = number * of[total] // of[among]
        return first, (number + 1) * of[total] // of[among] - first

    def channel(self, block: Value) -> Value:
        """The first of a block."""
        first = block * self.shape.lanes
        return first if self.shape.mask else self.e.least(first, self.given["channels"] - self.shape.lanes)

    # -- the weight --------------------------------------------------------------------------------------------------

    def pack(self, first: Value, count: Value, packed: Value) -> Value:
        """Write the weight of these blocks to [block, c, taps, lanes]; whether any of it times zero is not zero."""
        e, of, shape = self.e, self.given, self.shape
        taps, lanes, each = shape.weight.all_taps, shape.lanes, of["group_in"]
        by_output, by_input = (e.number(taps), of["group_out"] * taps) if shape.weight.turned else (each * taps, taps)
        by_group = each * of["group_out"] * taps
        steps = [by_group * (lane // shape.made) + by_output * (lane % shape.made) for lane in range(lanes)]

        def each_block(i: Value, _: list[Value]) -> Sequence[Value]:
            output = self.channel(first + i)
            begin = output // of["group_out"] * by_group + output % of["group_out"] * by_output
            e.loop(each, [], lambda c, _: each_input(begin + c * by_input, (i * each + c) * (taps * lanes)))
            return []

        def each_input(begin: Value, behind: Value) -> Sequence[Value]:
            w, to = e.at(of["w"], begin, shape.stored), e.at(packed, behind)

            def square(i: Value, _: list[Value]) -> Sequence[Value]:
                """As many taps as lanes, or all; the last ones may have been packed before."""
                tap = e.least(i * lanes, max(taps - lanes, 0))
                some = e.tail(taps) if taps < lanes else None
                across = e.transpose([e.load(w, tap + step, some, shape.stored) for step in steps])
                for t, vector in enumerate(across[:taps]):
                    e.store(vector, to, (tap + t) * lanes)
                return []

            def each_tap(tap: Value, _: list[Value]) -> Sequence[Value]:
                def each_channel(c: Value, _: list[Value]) -> Sequence[Value]:
                    number = e.widen(e.scalar(w, c * taps + tap, shape.stored), shape.stored)
                    e.put(number, to, tap * lanes + c)
                    return []

                e.store(e.zero, to, tap * lanes)
                e.loop(of["channels"], [], each_channel)
                return []

            if shape.mask:
                e.loop(taps, [], each_tap)
            else:
                e.loop(-(-taps // lanes), [], square)
            return []

        e.loop(count, [], each_block)
        if shape.weight.turned:
            return e.compare("ne", 0, 0)  # the border of a gradient is not there, not even as zeros
        begin = self.channel(first)
        end = e.least((first + count) * lanes, of["channels"])
        w, numbers = e.at(of["w"], begin * each * taps, shape.stored), (end - begin) * each * taps

        def times_zero(at: Value, total: Value, mask: Value | None = None) -> Value:
            return e.fma(e.load(w, at, mask, shape.stored), e.zero, total)

        def some(i: Value, totals: list[Value]) -> Sequence[Value]:
            at = i * (CHECKED * lanes)
            return [times_zero(at + v * lanes, total) for v, total in enumerate(totals)]

        def last(i: Value, totals: list[Value]) -> Sequence[Value]:
            at = numbers // (CHECKED * lanes) * (CHECKED * lanes) + i * lanes
            return [times_zero(at, totals[0], e.tail(numbers - at)), *totals[1:]]

        totals = e.loop(numbers // (CHECKED * lanes), [e.zero] * CHECKED, some)
        totals = e.loop((numbers % (CHECKED * lanes) + (lanes - 1)) // lanes, totals, last)
        for other in totals[1:]:
            totals[0] = e.add(totals[0], other)
        return e.any(e.is_nan(totals[0]))

    # -- a strip -----------------------------------------------------------------------------------------------------

    def task(self, group: Group, place: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        if shape.spread:
            strip, place = place % of["strips"], place // of["strips"]
            d, place = place % of["out_depth"], place // of["out_depth"]
            e.when(strip < 1, self.forget_rows)
        else:
            d, place = place % of["out_depth"], place // of["out_depth"]
            strip, place = place % of["strips"], place // of["strips"]
        span, image = place % of["spans"], place // of["spans"]
        row = e.least(strip * shape.rows, of["out_rows"] - shape.rows)  # the last strip may overlap
        steps = self.fill(group, image, d, strip, span, row * shape.stride[0])
        to = image * of["y_image"] + d * of["y_depth"] + row * of["y_row"]

        def tile(first: Value, pixels: int, inside: Value | bool) -> None:
            def each_block(i: Value, _: list[Value]) -> Sequence[Value]:
                self.tile(group, i, steps, to, first, pixels, inside)
                return []

            e.loop(group.count, [], each_block)

        def each_tile(i: Value, _: list[Value]) -> Sequence[Value]:
            number = first + i

            def edge() -> None:
                tile(number * shape.pixels, shape.pixels, False)

            def end() -> None:
                # The last one begins so early that it ends with the row: it may compute a pixel again.
                begin = of["tiles"] * shape.pixels + (number - of["tiles"]) * shape.ends
                tile(e.least(begin, of["out_width"] - shape.ends), shape.ends, False)

            def not_inside() -> None:
                if shape.ends:
                    e.when(number < of["tiles"], edge, end)
                else:
                    edge()

            within = e.compare("ult", number - of["head"], of["inside"])
            if shape.made > 1:  # what differs is only how it is copied
                whole = partial(tile, number * shape.pixels, shape.pixels, within)
                if shape.ends:
                    e.when(number < of["tiles"], whole, end)
                else:
                    whole()
                return []
            e.when(within, lambda: tile(number * shape.pixels, shape.pixels, True), not_inside)
            return []

        total = of["tiles"] + of["ends"]
        first = span * total // of["spans"]
        e.loop((span + 1) * total // of["spans"] - first, [], each_tile)

    def fill(self, group: Group, image: Value, d: Value, strip: Value, span: Value, first: Value) -> Value:
        """Write down the input rows that a strip reads, `first` of the padded ones on; how many steps there are."""
        e, of, shape = self.e, self.given, self.shape
        count, (by_kd, by_kh) = len(shape.meets), shape.tap_steps
        bad, x = group.bad, e.at(of["x"], image * of["x_image"], shape.stored)
        nowhere = e.select(bad, e.address(of["zeros"]), e.number(0))  # for a row of the border

        def each_depth(kd: Value, state: list[Value]) -> Sequence[Value]:
            (kept,) = state
            by_depth = e.scalar(of["depth_table"], d * shape.kernel[0] + kd, "i64")
            plane = e.address(e.at(x, by_depth * of["x_depth"], shape.stored))
            least = e.select(by_depth >= 0, e.number(0), e.number((1 << 63) - 1))  # outside: no row is real

            def each_chunk(chunk: Value, _: list[Value]) -> Sequence[Value]:
                for i, place in enumerate(shape.meets):
                    by_row = e.scalar(of["row_table"], (strip * shape.chunks + chunk) * count + i, "i64")
                    real, slot = by_row >= least, (kept * shape.chunks + chunk) * count + i
                    start = plane + by_row * of["x_row"] * SCALARS[shape.stored]
                    e.put(e.select(real, start, nowhere), self.starts, slot)
                    e.put(e.select(real, of["x_pixel"], e.number(0)), self.pixels, slot)
                    if self.rooms is not None:
                        padded = first + chunk * (shape.inner * shape.dilation[0]) + place
                        room = (
                            kd * shape.ring + padded % shape.ring
                            if shape.ring
                            else (kd * shape.chunks + chunk) * count + i
                        )
                        e.put(e.select(real, room, e.number(-1)), self.rooms, slot)
                at = (kd * by_kd + chunk * (shape.inner * by_kh) + shape.weight.first) * shape.lanes
                e.put(at, self.weights, kept * shape.chunks + chunk)
                return []

            e.loop(shape.chunks, [], each_chunk)
            return [kept + e.select(by_depth >= e.select(bad, e.number(-1), e.number(0)), e.number(1), e.number(0))]

        (kept,) = e.loop(shape.kernel[0], [e.number(0)], each_depth)
        steps = kept * shape.chunks
        if shape.spread:
            e.loop(steps * count, [], lambda slot, _: self.copy_row(group, slot, span))
        fresh = e.least(of["fresh"], steps * count)

        def each_step(step: Value, _: list[Value]) -> Sequence[Value]:
            e.put(steps * count - fresh + step * fresh // e.most(steps, 1), self.asked, step)
            return []

        e.loop(steps + 1, [], each_step)
        return steps

    # -- channels that lie apart -------------------------------------------------------------------------------------

    def inputs(self, group: Group) -> tuple[Value, Value, Value]:
        """Of a group that is one block: the first input channel, how many, and lanes of a pixel that hold them."""
        lanes = self.shape.lanes
        return self.channel(group.first), self.e.least(self.given["channels"], lanes), self.e.number(lanes)

    def forget_rows(self) -> None:
        """What was copied belongs to another image, span or block."""
        held = self.held
        if held is None:
            return

        def each(i: Value, _: list[Value]) -> Sequence[Value]:
            self.e.put(self.e.number(0), held, i)
            return []

        self.e.loop(self.shape.copied_rows, [], each)

    def copy_row(self, group: Group, slot: Value, span: Value) -> Sequence[Value]:
        """Copy an input row, if it is one and not there, channels side by side; it begins there from now on."""
        e, of, shape, lanes, rooms, held = self.e, self.given, self.shape, self.shape.lanes, self.rooms, self.held
        assert rooms is not None
        assert held is not None
        channel, count, pixel = self.inputs(group)
        first, places = (e.scalar(of["span_table"], span * 2 + i, "i64") for i in range(2))
        room = e.scalar(rooms, slot, "i64")
        to = e.at(self.room, room * of["room_row"], shape.stored)
        start = e.scalar(self.starts, slot, "ptr")
        row = e.at(start, first * of["x_pixel"] + channel * of["x_channel"], shape.stored)

        def vector(v: Value, _: list[Value]) -> Sequence[Value]:
            left, into = count - v * lanes, e.at(to, v * lanes, shape.stored)
            source = e.at(row, v * lanes * of["x_channel"], shape.stored)

            def square(i: Value, _: list[Value]) -> Sequence[Value]:
                """As many pixels as lanes; there is room for those that do not exist."""
                at, some = i * lanes, e.tail(places - i * lanes)
                channels = [e.least(left - 1, k) * of["x_channel"] for k in range(lanes)]
                rows = [e.load(source, channel + at, some, shape.stored) for channel in channels]
                for p, value in enumerate(e.transpose(rows)):
                    e.store(value, into, (at + p) * pixel, None, shape.stored)
                return []

            def one(place: Value, _: list[Value]) -> Sequence[Value]:
                channels, held = (
                    e.places(place * of["x_pixel"], of["x_channel"]),
                    "i16" if shape.stored in HALVES else shape.stored,
                )
                value = e.widen(e.gather(source, channels, e.tail(left), held), shape.stored)
                e.store(value, into, place * pixel, None, shape.stored)
                return []

            def squares() -> None:
                e.loop((places + (lanes - 1)) // lanes, [], square)

            def singly() -> None:
                e.loop(places, [], one)

            e.when(e.compare("eq", of["x_pixel"], 1), squares, singly)
            return []

        def copy() -> None:
            e.loop(pixel // lanes, [], vector)
            e.put(start, held, room)

        def real() -> None:
            e.when(e.compare("ne", e.scalar(held, room, "i64"), e.address(start)), copy)
            behind = (first * pixel + channel) * SCALARS[shape.stored]
            e.put(e.address(to) - behind, self.starts, slot)
            e.put(pixel, self.pixels, slot)

        e.when(room >= 0, real)
        return []

    # -- a tile ------------------------------------------------------------------------------------------------------

    def tile(
        self, group: Group, block: Value, steps: Value, to: Value, first: Value, pixels: int, inside: Value | bool
    ) -> None:
        """Pixels first, first + 1, ... of the rows of a strip, in the channels of one block of the group."""
        e, of, shape = self.e, self.given, self.shape
        width, taps = shape.kernel[2], shape.taps
        channel = self.channel(group.first + block)
        bias = e.load(of["bias"], channel, self.mask, shape.stored) if shape.has_bias else e.zero
        packed = e.at(group.packed, block * of["group_in"] * (shape.weight.all_taps * shape.lanes))
        place = first * shape.stride[1]  # in the padded row, where the first tap begins

        def each_step(step: Value, acc: list[Value]) -> Sequence[Value]:
            weights = e.at(packed, e.scalar(self.weights, step, "i64"))
            self.ask(group, block, step, place, pixels, inside)

            def some(chunk: Value, acc: list[Value], count: int = taps) -> Sequence[Value]:
                w = e.at(weights, chunk * (taps * shape.weight.steps[2] * shape.lanes))
                left = place + chunk * (taps * shape.dilation[1])
                return self.taps(group, block, acc, step, w, left, pixels, count, inside)

            acc = e.loop(width // taps, acc, some)
            return some(e.number(width // taps), acc, width % taps) if width % taps else acc

        acc = e.loop(steps, [bias] * (shape.rows * pixels), each_step)
        begins = [to + r * of["y_row"] + first * of["y_pixel"] + channel for r in range(shape.rows)]
        results = []
        for r, at in enumerate(begins):
            for p in range(pixels):
                residual = e.load(of["residual"], at, self.mask, shape.stored) if shape.has_residual else None
                results.append(finish(e, acc[r * pixels + p], residual, shape.activation))
                at = at + of["y_pixel"]

        def write(streams: bool) -> None:
            for r, at in enumerate(begins):
                for result in results[r * pixels : (r + 1) * pixels]:
                    if streams:
                        e.stream(result, of["y"], at, shape.stored)
                    else:
                        e.store(result, of["y"], at, self.mask, shape.stored)
                    at = at + of["y_pixel"]

        if shape.fills_lines:
            e.when(of["streams"] > 0, partial(write, True), partial(write, False))
        else:
            write(False)

    def ask(self, group: Group, block: Value, step: Value, place: Value, pixels: int, inside: Value | bool) -> None:
        """Of an input larger than the caches, ask for a part of what the next task reads."""
        e, of, shape, size = self.e, self.given, self.shape, SCALARS[self.shape.stored]
        if not inside:
            return
        lines = (of["x_pixel"] * (pixels * shape.stride[1] * size) // LINE + group.count) // group.count
        behind = ((place - of["lo"]) * of["x_pixel"] + of["ahead"]) * size + block * lines * LINE
        begin = e.scalar(self.asked, step, "i64")

        def row(i: Value, _: list[Value]) -> Sequence[Value]:
            start = e.at(e.scalar(self.starts, begin + i, "ptr"), behind, "i8")

            def line(i: Value, _: list[Value]) -> Sequence[Value]:
                e.prefetch(e.at(start, i * LINE, "i8"))
                return []

            e.loop(lines, [], line)
            return []

        e.loop(e.scalar(self.asked, step + 1, "i64") - begin, [], row)

    def taps(
        self,
        group: Group,
        block: Value,
        acc: list[Value],
        step: Value,
        weights: Value,
        left: Value,
        pixels: int,
        count: int,
        inside: Value | bool,
    ) -> list[Value]:
        """Add what the input rows of a step give to `count` neighbouring taps, the first of them at place `left`."""
        e, of, shape = self.e, self.given, self.shape
        channel = self.channel(group.first + block)
        under: dict[int, list[tuple[int, int]]] = {}  # for each place, the pixels it serves, and by which tap
        for p in range(pixels):
            for k in range(count):
                under.setdefault(p * shape.stride[1] + k * shape.dilation[1], []).append((p, k))
        least = e.select(group.bad, e.number(-1), e.number(0))

        def load_weights(rows: Iterable[int]) -> dict[tuple[int, int], Value]:
            across = [(i, k) for i in sorted(set(rows)) for k in range(count)]
            return {
                (i, k): e.load(weights, (i * shape.tap_steps[1] + k * shape.weight.steps[2]) * shape.lanes)
                for i, k in across
            }

        held = load_weights(range(shape.inner)) if shape.holds else None

        def row(slot: Value, meets: list[tuple[int, int]], acc: dict[tuple[int, int], Value]) -> None:
            w = held or load_weights(i for _, i in meets)
            start = e.at(e.scalar(self.starts, slot, "ptr"), channel, shape.stored)
            pixel = e.scalar(self.pixels, slot, "i64")
            at, before = e.at(start, (left - of["lo"]) * pixel, shape.stored) if inside else start, 0

            def add(at: Value, place: int) -> None:
                x = e.load(at, 0, self.mask, shape.stored)
                for r, i in meets:
                    for p, k in under[place]:
                        acc[r, p] = e.fma(x, w[i, k], acc[r, p])

            for place in sorted(under):
                if inside:
                    at, before = e.at(at, pixel * (place - before), shape.stored), place
                    add(at, place)
                    continue
                shown = e.scalar(of["width_table"], left + place, "i64")

                def look(shown: Value = shown, place: int = place) -> None:
                    at = e.select(shown >= 0, e.at(start, shown * pixel, shape.stored), of["zeros"])
                    add(at, place)

                e.only_if(shown >= least, acc, [(r, p) for r, _ in meets for p, _ in under[place]], look)

        sums = {(r, p): acc[r * pixels + p] for r in range(shape.rows) for p in range(pixels)}
        for number, meets in enumerate(shape.meets.values()):
            slot = step * len(shape.meets) + number
            real = e.compare("ne", e.scalar(self.starts, slot, "i64"), 0)
            rows = {r for r, _ in meets}
            e.only_if(real, sums, [(r, p) for r, p in sums if r in rows], partial(row, slot, meets, sums))
        return list(sums.values())
