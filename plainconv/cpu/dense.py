"""The kernel of `direct` and `pointwise`: one matrix product for each block of the output, its strip gathered first.

    y[o, f]  =  bias[o]  +  sum over c, t  of  w[o, c, t] * s[c, f + shift(t)]

f counts the output places of a block, row after row without a gap.  s is a strip of the padded input, gathered into
scratch memory that stays in the cache, so that tap t of every place of the block is one and the same shift away: it
holds a copy of the rows for each tap along the width (or, if the block lies within one row, for each phase of the
stride).  Borders, strides, dilation, half types and odd strides of memory end here: the product knows nothing of them.

    task         a block of the output, an image, a group, and some of the output channels
      list       what to copy, if the block is another than before
      gather     the strip, channel by channel
      tile       `scalars` x `vectors` registers of sums
        c, t     load vectors; broadcast scalars; acc[i][v] += scalar[i] * vector[v]

The two factors are alike, and either may be the vectors.  If the output is contiguous its places are: `a` is the strip
and `b` the weight as it lies, nothing is packed.  If it is channels_last, the output channels are: `a` is the weight,
packed before, and `b` the strip.  Sizes, kernel, stride and dilation are arguments, so a few kernels serve all.

Where gathering would take long beside few products, a row is read where it lies: only tiles that reach into the border
read a strip, of which no more is gathered than they need.  Tiles ask ahead then for what the next block reads.

Where the few channels of a pixel lie side by side, the taps of a row of the kernel and their channels are one run of
numbers. The strip is lines of the input then, as they lie but for their padding, and a tap is any number of the kernel:
each place of a row reads it equally far from where it begins. Rows of a block are made one by one.

Where the channels of a pixel lie side by side, nothing needs to be gathered: it is listed where each tap of each place
begins in the input, or in a row of zeros, and the scalars of a tile are read from there.

For the gradient for the input of several images, the scalars of a tile may be one place of each of them: the input is
packed so that these lie side by side.  Then a large weight is read once for all images, one entry of the list serves a
tile, and a tap that looks into the border is left out.

With the dot product of AVX512-BF16 a step takes two channels: strip and weight hold pairs of bfloat, one pair where
otherwise a float is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from plainconv.cpu.emit import SCALARS, Emit, Value
from plainconv.cpu.epilogue import finish
from plainconv.cpu.gather import Gather

POINTERS = ("x", "a", "b", "bias", "residual", "y", "scratch", "settled")  # what changes with every call
# Addresses, and then SIZES: in "settled".
TABLES = ("slots", "taps", "reach", "phases", "depth_table", "row_table", "col_table", "places", "zeros")
# What "phases" has of each phase of a result whose places lie apart: its first tap, its taps for each of the depth's
# (which "reach" counts then), where its first place is, its rows and columns, and the first of its places in "places",
# which has, for the places of a block, how far each is from the block's corner, or -1.
PHASE = 6
SIZES = (
    "tasks",
    "shares",  # how many threads the tasks are dealt to, each with its own scratch
    "share",  # elements of scratch of each
    "entries",  # where in a share the list of what to copy begins
    "planes",  # images (if they are no scalars) x groups
    "images",
    "groups",
    "group_in",
    "group_out",
    "x_image",
    "x_channel",
    "x_depth",
    "x_row",
    "x_col",
    "ahead",  # from what a block reads to what the next one does
    "in_width",
    "lies_to",  # as many elements of a row, or 0, may be read where they lie
    "y_image",
    "y_channel",
    "y_place",
    "y_depth",
    "y_row",  # from one row of a block to the next, and one column, if places lie apart
    "y_col",
    "out_rows",
    "out_width",
    "made_width",  # of the result, if places lie apart
    "stride_depth",  # in depth_table, which has an entry for each depth of the result and each tap
    "stride_rows",
    "stride_cols",
    "lo",  # padding before a row
    "block_rows",  # rows and columns of a block
    "block_cols",
    "row_blocks",
    "col_blocks",
    "parts",  # of the output channels
    "phase_count",
    "slot_count",  # rows of the strip
    "slot_length",  # their length
    "pitch",  # from a channel of the strip to the next (from a place to the next, if channels lie side by side)
    "a_group",
    "a_channel",
    "a_tile",  # from one tile of vectors to the next
    "b_group",
    "b_scalar",  # from a scalar of the tile to the next
    "b_channel",
    "line_row",  # from the line where a row of a block begins to the next row's
    "line_taps",  # for each depth, and, with pairs, ...
    "line_alone",  # ... of numbers that have no other: behind all others
)


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    element   of the sums
    lanes     of a vector
    over      what the lanes are: "places" of the output or "outputs"
    source    the strip is gathered from "rows" (neighbours along the width side by side), from "pixels" (neighbouring
              channels side by side), from any memory through a "table"; "lines": it is rows as they lie, with few
              channels side by side; "none": the input is used as it lies; "list":
              it is read where a list says that the taps of places are; "images": so, but packed
              with the images of a place side by side, which are the scalars
    stride    along the width, of "rows"
    asks      if a row is read where it lies: how many vectors of each channel a tile asks for ahead; else 0
    one_tap   a 1x1 kernel
    apart     whether places lie apart in the result: a stride turned round, which is made phase by phase
    woven     how many phases of a row are made tile by tile, to be written as one: 2, 4 or 8, or 0
    scalars   x vectors: the tile
    pairs     whether a step multiplies two channels of bfloat
    stored    type of the tensors; bias, activation and residual as in Request
    """

    element: str
    stored: str
    native: frozenset[str]
    pairs: bool
    lanes: int
    over: str
    source: str
    stride: int
    asks: int
    one_tap: bool
    apart: bool
    woven: int
    has_bias: bool
    has_residual: bool
    activation: str | None
    scalars: int
    vectors: int

    @property
    def steps(self) -> int:
        """Channels that one step multiplies."""
        return 2 if self.pairs else 1


@dataclass(frozen=True)
class Row:
    """What a block reads of a row: where its first place reads, and from which lane to which tiles find all there."""

    there: Value
    begin: Value
    end: Value


@dataclass(frozen=True)
class Phase:
    """What products are summed of in a block: its places, where the first is, the first tap and how many there are.

    table: where the places are from the first one on, if they lie apart; b: where scalars begin; alone: first and count
    of the taps whose numbers have no other, in lines of pairs
    """

    places: Value
    y: Value
    first: Value
    count: Value
    table: Value
    b: Value
    alone: tuple[Value, Value] | None = None


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS are its arguments, tasks are shares."""
    return _Dense(shape).kernel()


class _Dense:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native | {"flush"} if shape.pairs else shape.native)
        # What the scalars are read from: the strip holds accumulators (or pairs), the tensors hold what is stored.
        as_it_lies = shape.over == "places" or shape.source in ("none", "list")
        packed = shape.pairs or (shape.over == "places" and shape.apart)
        lines = shape.source == "lines" and shape.pairs
        self.b_type = shape.stored if (as_it_lies and not packed) or lines else shape.element
        given = e.arguments(*("ptr",) * len(POINTERS))
        settled = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(SIZES), within=given[-1])
        self.given = of = dict(zip((*POINTERS, *TABLES, *SIZES), (*given, *settled), strict=True))
        self.channels = (of["group_in"] + (shape.steps - 1)) // shape.steps
        if shape.apart and shape.over == "places":
            # Where the sums of a tile become results, and what is added to them.
            room = shape.scalars * shape.vectors * shape.lanes * max(shape.woven, 1)
            self.stack, self.added = (e.stack(type_, room) for type_ in (shape.element, shape.stored))
        self.gather = Gather(e, of, shape.source, shape.stored, shape.stride, shape.pairs)

    def kernel(self) -> str:
        e, of = self.e, self.given

        def share(i: Value, _: list[Value]) -> Sequence[Value]:
            number = e.begin + i
            first = number * of["tasks"] // of["shares"]
            last = (number + 1) * of["tasks"] // of["shares"]
            scratch = e.at(of["scratch"], number * of["share"])

            def task(i: Value, carried: list[Value]) -> Sequence[Value]:
                block, part = (first + i) // of["parts"], (first + i) % of["parts"]
                plane, where = block % of["planes"], block // of["planes"]
                place, row = self.place(where), None
                image, group = plane // of["groups"], plane % of["groups"]
                x = image * of["x_image"] + group * of["group_in"] * of["x_channel"]
                if self.shape.source in ("list", "images"):
                    e.when(e.compare("ne", where, carried[1]), lambda: self.find(scratch, *place))
                elif self.shape.source != "none":
                    e.when(e.compare("ne", where, carried[1]), lambda: self.gather.describe(scratch, *place))
                    source = e.at(of["x"], x, self.shape.stored)
                    fill = partial(self.gather.fill, scratch, source, place[0], of["group_in"])
                    if self.shape.asks:
                        row = self.row(x, *place)
                        fill = partial(self.fill_ends, fill, row, place[0], place[2])
                    e.when(e.compare("ne", block, carried[0]), fill)
                self.products(scratch, part, x, row, image, group, *place)
                return [block, where]

            e.loop(last - first, [e.number(-1), e.number(-1)], task)
            return []

        e.loop(e.end - e.begin, [], share)
        return e.module()

    def place(self, where: Value) -> tuple[Value, Value, Value]:
        """Depth, first row and first column of a block."""
        of = self.given
        where, col = where // of["col_blocks"], where % of["col_blocks"]
        depth, row = where // of["row_blocks"], where % of["row_blocks"]
        return depth, row * of["block_rows"], col * of["block_cols"]

    # -- reading without gathering -----------------------------------------------------------------------------------

    def row(self, x: Value, depth: Value, row: Value, col: Value) -> Row:
        """What a block reads of its row, if its strip has but one. Vectors are read as a whole, so none at the end."""
        e, of, lanes = self.e, self.given, self.shape.lanes
        by_depth, by_row, by_col = (e.scalar(of["slots"], i, "i64") for i in range(3))
        d = e.scalar(of["depth_table"], depth * of["stride_depth"] + by_depth, "i64")
        r = e.scalar(of["row_table"], row * of["stride_rows"] + by_row, "i64")
        first = col + by_col - of["lo"]
        begin = (e.most(e.number(0) - first, 0) + (lanes - 1)) // lanes
        end = e.least(e.most(of["lies_to"] - self.further() - first, 0) // lanes, self.vectors_from(col))
        end = e.select(e.compare("sge", e.least(d, r), 0), end, e.number(0))
        there = x + d * of["x_depth"] + r * of["x_row"] + first
        return Row(e.at(of["x"], there, self.shape.stored), begin * lanes, end * lanes)

    def further(self) -> Value:
        """How much further the last tap reads than the first."""
        return self.given["slot_length"] - self.given["block_cols"]

    def vectors_from(self, col: Value) -> Value:
        """Vectors of places in a block that begins there."""
        of, lanes = self.given, self.shape.lanes
        return (self.e.least(of["block_cols"], of["out_width"] - col) + (lanes - 1)) // lanes

    def fill_ends(self, fill: Callable[..., None], row: Row, depth: Value, col: Value) -> None:
        """Gather what the tiles read that do not find all in the row; one of them may begin well within it."""
        e, shape, zero = self.e, self.shape, self.e.number(0)
        all_ = self.gather.reach(depth, 3) * self.gather.vectors
        begin, end = row.begin // shape.lanes, row.end // shape.lanes
        behind = (self.further() + (shape.lanes - 1)) // shape.lanes + (shape.vectors - 1)
        head = e.select(begin > 0, e.least(begin + behind, all_), zero)
        tail = e.select(end < self.vectors_from(col), e.most(end - (shape.vectors - 1), head), all_)
        fill(part=(zero, head))
        fill(part=(tail, all_ - tail))

    def find(self, scratch: Value, depth: Value, row: Value, col: Value) -> None:
        """List where each tap of each place of a block is in the input, -1 in the border: [tap, place]."""
        e, of = self.e, self.given
        rows = e.least(of["block_rows"], of["out_rows"] - row)
        cols = e.least(of["block_cols"], of["out_width"] - col)

        def each_tap(j: Value, _: list[Value]) -> Sequence[Value]:
            by_depth, by_row, by_col = (e.scalar(of["slots"], j * 3 + i, "i64") for i in range(3))
            d = e.scalar(of["depth_table"], depth * of["stride_depth"] + by_depth, "i64")

            def each_row(i: Value, _: list[Value]) -> Sequence[Value]:
                r = e.scalar(of["row_table"], (row + i) * of["stride_rows"] + by_row, "i64")
                start, shown = d * of["x_depth"] + r * of["x_row"], e.least(d, r)
                to = e.at(scratch, j * of["slot_length"] + i * cols, "i64")

                def each_place(f: Value, _: list[Value]) -> Sequence[Value]:
                    place = e.scalar(of["col_table"], (col + f) * of["stride_cols"] + by_col, "i64")
                    real = e.compare("sge", e.least(place, shown), 0)
                    e.put(e.select(real, start + place * of["x_col"], e.number(-1)), to, f)
                    return []

                e.loop(cols, [], each_place)
                return []

            e.loop(rows, [], each_row)
            return []

        e.loop(of["slot_count"], [], each_tap)

    # -- the product -------------------------------------------------------------------------------------------------

    def products(
        self,
        scratch: Value,
        part: Value,
        x: Value,
        in_row: Row | None,
        image: Value,
        group: Value,
        depth: Value,
        row: Value,
        col: Value,
    ) -> None:
        """All tiles of a task: output channels outside, places inside."""
        e, of, shape = self.e, self.given, self.shape
        first = (depth * of["out_rows"] + row) * of["out_width"] + col
        strip = scratch
        if shape.source == "none":
            strip = e.at(of["x"], x + first * of["x_col"], shape.stored)
        channel = group * of["group_out"]
        y = image * of["y_image"] + channel * of["y_channel"]
        y += depth * of["y_depth"] + row * of["y_row"] + col * of["y_col"] if shape.apart else first * of["y_place"]
        if shape.over == "places":
            a, b = strip, e.at(of["b"], group * of["b_group"], self.b_type)
        else:
            a, b = e.at(of["a"], group * of["a_group"]), strip
        width = shape.vectors * shape.lanes

        def phase_at(i: Value) -> Phase:
            begin, each, start, rows, cols, table = (e.scalar(of["phases"], i * PHASE + j, "i64") for j in range(PHASE))
            rows = e.most(e.least(of["block_rows"], rows - row), 0)
            cols = e.most(e.least(of["block_cols"], cols - col), 0)
            taps = begin + self.gather.reach(depth, 0) * each, self.gather.reach(depth, 1) * each
            return Phase(rows * cols, y + start, *taps, e.at(of["places"], table, "i64"), b)

        def each_line(body: Callable[[Phase], None]) -> None:
            rows = e.least(of["block_rows"], of["out_rows"] - row)
            cols = e.least(of["block_cols"], of["out_width"] - col)
            from_, count = self.gather.reach(depth, 0), self.gather.reach(depth, 1)
            taps = from_ * of["line_taps"], count * of["line_taps"]
            behind = of["stride_depth"] * of["line_taps"]
            alone = (behind + from_ * of["line_alone"], count * of["line_alone"]) if shape.pairs else None

            def line(r: Value, _: list[Value]) -> Sequence[Value]:
                begin = e.at(b, r * of["line_row"], self.b_type)
                body(Phase(cols, y + r * of["out_width"] * of["y_place"], *taps, of["places"], begin, alone))
                return []

            e.loop(rows, [], line)

        def each_phase(body: Callable[[Phase], None]) -> None:
            if shape.source == "lines":
                each_line(body)
                return
            if not shape.apart:
                rows = e.least(of["block_rows"], of["out_rows"] - row)
                cols = e.least(of["block_cols"], of["out_width"] - col)
                body(Phase(rows * cols, y, self.gather.reach(depth, 0), self.gather.reach(depth, 1), of["places"], b))
                return

            def phase(i: Value, _: list[Value]) -> Sequence[Value]:
                body(phase_at(i))
                return []

            e.loop(of["phase_count"], [], phase)

        def tile(
            phase: Phase, vectors: int, at: Value, a_at: Value, i: Value, count: int, place: Value | None = None
        ) -> None:
            """`count` scalars from i on, and vectors from lane `at` on; the last vector may be a part of one.

            If scalars are images, they are at one place of the phase.
            """
            lanes_count = phase.places if shape.over == "places" else of["group_out"]
            masks = [None] * (vectors - 1) + [e.tail(lanes_count - at - (vectors - 1) * shape.lanes)]
            offsets = []
            if shape.over == "places":
                scalars = [phase.y + (i + s) * of["y_channel"] for s in range(count)]
            elif place is not None:
                there = e.scalar(phase.table, place, "i64") if shape.apart else place * of["y_place"]
                scalars = [phase.y + there + (i + s) * of["y_image"] for s in range(count)]
            elif shape.apart:
                offsets = [e.scalar(phase.table, i + s, "i64") for s in range(count)]
                scalars = [phase.y + offset for offset in offsets]
            else:
                scalars = [phase.y + (i + s) * of["y_place"] for s in range(count)]
            for start in scalars if shape.over == "outputs" or not shape.apart else ():
                for v in range(vectors):
                    e.prefetch(e.at(of["y"], start + (at + v * shape.lanes), shape.stored), "write")
            begin, first_x = e.at(phase.b, i * of["b_scalar"], self.b_type), x
            if shape.source == "list":
                begin = e.at(b, i, "i64")
            elif place is not None:
                begin, first_x = e.at(b, place, "i64"), x + i
            first_a, a_channel, asked = e.at(a, a_at), of["a_channel"], None
            if in_row is not None:
                lies = e.compare("sge", e.least(at - in_row.begin, in_row.end - (at + vectors * shape.lanes)), 0)
                first_a = e.select(lies, e.at(in_row.there, at), first_a)
                a_channel = e.select(lies, of["x_channel"], a_channel)
                line = i // shape.scalars * shape.asks % shape.vectors
                asked = e.at(in_row.there, of["ahead"] + at + line * shape.lanes)
            acc = self.sums(first_a, a_channel, begin, first_x, phase, channel, at, i, count, masks, asked)
            if shape.apart and shape.over == "places":
                left = e.least(lanes_count - at, vectors * shape.lanes)
                self.put_apart(acc, scalars, e.at(phase.table, at, "i64"), left)
                return

            def put(s: int) -> None:
                for v, mask in enumerate(masks):
                    self.put(acc[s * vectors + v], scalars[s] + (at + v * shape.lanes), mask)

            for s in range(count):
                if offsets:
                    e.when(e.compare("sge", offsets[s], 0), partial(put, s))
                else:
                    put(s)

        def over_lanes(tiles: Value, begin: Value, end: Value, body: Callable[[int, Value, Value], None]) -> None:
            """Whole tiles, then vector by vector; begin and end count both."""
            whole = e.most(e.least(end, tiles) - begin, 0)

            def a_tile(i: Value, _: list[Value]) -> Sequence[Value]:
                body(shape.vectors, (begin + i) * width, (begin + i) * of["a_tile"])
                return []

            def a_vector(i: Value, _: list[Value]) -> Sequence[Value]:
                behind = (begin + whole - tiles + i) * shape.lanes
                body(1, tiles * width + behind, tiles * of["a_tile"] + behind)
                return []

            e.loop(whole, [], a_tile)
            e.loop(end - begin - whole, [], a_vector)

        def over_scalars(count: Value, begin: Value, end: Value, body: Callable[[int, Value], None]) -> None:
            """Tiles of scalars; the last overlaps the one before it, and computes the same there."""

            def whole(i: Value, _: list[Value]) -> Sequence[Value]:
                body(shape.scalars, e.least((begin + i) * shape.scalars, count - shape.scalars))
                return []

            e.loop(end - begin, [], whole)

        def tiles_of(lanes_count: Value) -> tuple[Value, Value]:
            """Whole tiles, and all of them with the single vectors behind."""
            vectors = (lanes_count + (shape.lanes - 1)) // shape.lanes
            return vectors // shape.vectors, vectors // shape.vectors + vectors % shape.vectors

        def part_of(count: Value) -> tuple[Value, Value]:
            return part * count // of["parts"], (part + 1) * count // of["parts"]

        if shape.over == "places":
            scalar_tiles = (of["group_out"] + (shape.scalars - 1)) // shape.scalars

            def woven(count: int, i: Value) -> None:
                """All phases of a row of the result for one tile of places after the other."""

                def row_of_phases(number: Value, _: list[Value]) -> Sequence[Value]:
                    first = phase_at(number * shape.woven)
                    made = e.least(first.places * shape.woven, of["made_width"] - col * shape.woven)
                    tiles, every = tiles_of(first.places)

                    def weave(vectors: int, at: Value, a_at: Value) -> None:
                        masks = [None] * (vectors - 1) + [e.tail(first.places - at - (vectors - 1) * shape.lanes)]
                        size = count * vectors * shape.lanes

                        def one(p: Value, _: list[Value]) -> Sequence[Value]:
                            phase = phase_at(number * shape.woven + p)
                            begin = e.at(b, i * of["b_scalar"], self.b_type)
                            first_a = e.at(a, a_at)
                            acc = self.sums(first_a, of["a_channel"], begin, x, phase, channel, at, i, count, masks)
                            for n, total in enumerate(acc):
                                e.store(total, self.stack, p * size + n * shape.lanes)
                            return []

                        e.loop(e.number(shape.woven), [], one)
                        start = first.y + i * of["y_channel"]
                        self.put_woven(vectors, size, count, start, at * shape.woven, made)

                    over_lanes(tiles, e.number(0), every, weave)
                    return []

                e.loop(of["phase_count"] // shape.woven, [], row_of_phases)

            def outputs(count: int, i: Value) -> None:
                def places(phase: Phase) -> None:
                    tiles, every = tiles_of(phase.places)
                    over_lanes(
                        tiles, e.number(0), every, lambda vectors, at, a_at: tile(phase, vectors, at, a_at, i, count)
                    )

                each_phase(places)

            over_scalars(of["group_out"], *part_of(scalar_tiles), woven if shape.woven else outputs)
            return
        tiles, every = tiles_of(of["group_out"])

        def outputs_of(vectors: int, at: Value, a_at: Value) -> None:
            def all_scalars(phase: Phase, number: Value, place: Value | None = None) -> None:
                few = number < shape.scalars

                def one_by_one(i: Value, _: list[Value]) -> Sequence[Value]:
                    tile(phase, vectors, at, a_at, i, 1, place)
                    return []

                if shape.scalars > 1:
                    e.loop(e.select(few, number, e.number(0)), [], one_by_one)
                scalar_tiles = (number + (shape.scalars - 1)) // shape.scalars
                whole = e.select(few, e.number(0), scalar_tiles)
                over_scalars(
                    number, e.number(0), whole, lambda count, i: tile(phase, vectors, at, a_at, i, count, place)
                )

            def all_images(phase: Phase) -> None:
                def each(place: Value, _: list[Value]) -> Sequence[Value]:
                    def images() -> None:
                        all_scalars(phase, of["images"], place)

                    if shape.apart:
                        e.when(e.compare("sge", e.scalar(phase.table, place, "i64"), 0), images)
                    else:
                        images()
                    return []

                e.loop(phase.places, [], each)

            each_phase(all_images if shape.source == "images" else lambda phase: all_scalars(phase, phase.places))

        over_lanes(tiles, *part_of(every), outputs_of)

    def put(self, total: Value, offset: Value, mask: Value | None) -> None:
        """Finish and write a vector."""
        e, of, shape, residual = self.e, self.given, self.shape, None
        if shape.has_residual:
            residual = e.load(of["residual"], offset, mask, shape.stored)
        e.store(finish(e, total, residual, shape.activation), of["y"], offset, mask, shape.stored)

    def put_apart(self, acc: Sequence[Value], starts: Sequence[Value], table: Value, count: Value) -> None:
        """Finish the sums [scalars, vectors] of a tile, and write the first `count` places of each scalar.

        They go by way of the stack, place by place: no slower than a scatter, of which LLVM makes a branch for every
        lane of a half type. One scalar after another, as channels that are a power of two apart share lines of a cache.
        """
        e, of, shape = self.e, self.given, self.shape
        width = len(acc) // len(starts) * shape.lanes
        carrier = "i16" if SCALARS[shape.stored] == 2 else shape.stored

        def each_place(move: Callable[[Value, Value], None]) -> None:
            """move(offset of a place in the result, and of its number on the stack), for each scalar."""

            def of_scalar(s: Value, carried: list[Value]) -> Sequence[Value]:
                start, behind = carried

                def each(i: Value, _: list[Value]) -> Sequence[Value]:
                    place = e.scalar(table, i, "i64")
                    e.when(e.compare("sge", place, 0), lambda: move(start + place, behind + i))
                    return []

                e.loop(count, [], each)
                return [start + of["y_channel"], behind + width]

            e.loop(len(starts), [starts[0], e.number(0)], of_scalar)

        def finished(n: Value, _: list[Value]) -> Sequence[Value]:
            # In place: a result is no wider than its sum, so it lies on none that is to come.
            at = n * shape.lanes
            residual = e.load(self.added, at, None, shape.stored) if shape.has_residual else None
            total = finish(e, e.load(self.stack, at), residual, shape.activation)
            e.store(total, self.stack, at, None, shape.stored)
            return []

        for n, total in enumerate(acc):
            e.store(total, self.stack, n * shape.lanes)
        if shape.has_residual:
            each_place(lambda at, i: e.put(e.scalar(of["residual"], at, carrier), self.added, i))
        e.loop(len(acc), [], finished)
        each_place(lambda at, i: e.put(e.scalar(self.stack, i, carrier), of["y"], at))

    def put_woven(self, vectors: int, size: int, scalars: int, start: Value, first: Value, made: Value) -> None:
        """Finish the sums [phase, scalars, vectors] on the stack, `size` a phase, and write the phases interleaved.

        They begin at `first` of the `made` numbers of a row; `start` is where the row of the first scalar is.
        """
        e, of, shape = self.e, self.given, self.shape

        def each_scalar(s: Value, _: list[Value]) -> Sequence[Value]:
            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                at = (s * vectors + v) * shape.lanes
                parts = [e.load(self.stack, at + p * size) for p in range(shape.woven)]
                for k, total in enumerate(e.interleave(parts)):
                    behind = first + v * (shape.lanes * shape.woven) + k * shape.lanes
                    self.put(total, start + s * of["y_channel"] + behind, e.tail(made - behind))
                return []

            e.loop(e.number(vectors), [], each_vector)
            return []

        e.loop(e.number(scalars), [], each_scalar)

    def sums(
        self,
        a: Value,
        a_channel: Value,
        b: Value,
        x: Value,
        phase: Phase,
        channel: Value,
        lane: Value,
        scalar: Value,
        scalars: int,
        masks: Sequence[Value | None],
        asked: Value | None = None,
    ) -> list[Value]:
        """The sums [scalars, vectors] of one tile; `masks` of its vectors. What is listed begins at x.

        a_channel: from a channel of the vectors to the next; asked: what to ask for of the first channel.
        """
        e, of, shape = self.e, self.given, self.shape
        vectors = len(masks)
        acc = [e.zero] * (scalars * vectors)
        if shape.has_bias and shape.over == "places":
            each = [e.broadcast(e.scalar(of["bias"], channel + scalar + s, shape.stored)) for s in range(scalars)]
            acc = [value for value in each for _ in range(vectors)]
        elif shape.has_bias:
            places = [channel + lane + v * shape.lanes for v in range(vectors)]
            each = [e.load(of["bias"], p, mask, shape.stored) for p, mask in zip(places, masks, strict=True)]
            acc = each * scalars

        taps = e.at(of["taps"], phase.first * 2, "i64")

        def multiply(acc: Value, a: Value, b: Value) -> Value:
            return e.dot_pairs(acc, a, b) if shape.pairs else e.fma(a, b, acc)

        def step(a: Value, scalars: Sequence[Value], acc: list[Value], alone: bool = False) -> list[Value]:
            # Strips and packed weights go on behind the last lane; the input as it lies may not.
            masked = shape.source == "none" and shape.over == "places"
            loaded = [e.load(a, v * shape.lanes, mask if masked else None) for v, mask in enumerate(masks)]
            result = []
            for s, place in enumerate(scalars):
                if alone:
                    one = e.broadcast_alone(place)
                else:
                    one = e.broadcast_pair(place) if shape.pairs else e.broadcast(e.scalar(place, 0, self.b_type))
                result += [multiply(acc[s * vectors + v], loaded[v], one) for v in range(vectors)]
            return result

        def spaced(b: Value) -> list[Value]:
            return [e.at(b, of["b_scalar"] * s, self.b_type) for s in range(scalars)]

        def one_step(a: Value, b: Value, acc: list[Value]) -> list[Value]:
            return step(a, spaced(b), acc)

        def each_channel(a: Value, b: Value, acc: list[Value], then: Callable[..., list[Value]]) -> list[Value]:
            def each(c: Value, acc: list[Value]) -> list[Value]:
                if asked is not None:
                    for vector in range(shape.asks):
                        e.prefetch(e.at(asked, c * of["x_channel"] + vector * shape.lanes))
                return then(e.at(a, c * a_channel), e.at(b, c * of["b_channel"], self.b_type), acc)

            return e.loop(self.channels, acc, each)

        def each_tap(
            a: Value,
            b: Value,
            acc: list[Value],
            then: Callable[..., list[Value]],
            taps: Value = taps,
            count: Value = phase.count,
        ) -> list[Value]:
            def tap(t: Value, acc: list[Value]) -> list[Value]:
                a_shift, b_shift = e.scalar(taps, t * 2, "i64"), e.scalar(taps, t * 2 + 1, "i64")
                return then(e.at(a, a_shift), e.at(b, b_shift, self.b_type), acc)

            return e.loop(count, acc, tap)

        def only_step(c: Value, acc: list[Value]) -> list[Value]:
            here = e.at(b, c * of["b_channel"], self.b_type)
            if shape.source == "none" and shape.over == "outputs" and scalars > 1:
                # Nobody has touched these pixels before: the next ones are asked for, spread over the channels.
                e.prefetch(e.at(here, of["b_scalar"] * scalars + c * (scalars - 1), self.b_type))
            return step(e.at(a, c * a_channel), spaced(here), acc)

        def listed_tap(t: Value, acc: list[Value]) -> list[Value]:
            shift, at = e.scalar(taps, t * 2, "i64"), e.scalar(taps, t * 2 + 1, "i64")
            begin = e.at(of["x"], x, shape.stored)
            found = [e.scalar(b, at + s, "i64") for s in range(scalars)]
            # The border is a row of zeros.
            places = [e.select(f < 0, of["zeros"], e.at(begin, f, shape.stored)) for f in found]

            def each(c: Value, acc: list[Value]) -> list[Value]:
                return step(e.at(a, shift + c * a_channel), [e.at(p, c, self.b_type) for p in places], acc)

            return e.loop(self.channels, acc, each)

        def tap_of_images(t: Value, acc: list[Value]) -> list[Value]:
            shift, at = e.scalar(taps, t * 2, "i64"), e.scalar(taps, t * 2 + 1, "i64")
            found = e.scalar(b, at, "i64")
            begin = e.at(of["x"], x + found, self.b_type)

            def each(c: Value, acc: list[Value]) -> list[Value]:
                here = e.at(begin, c * of["b_channel"], self.b_type)
                images = [e.at(here, s, self.b_type) for s in range(scalars)]
                return step(e.at(a, shift + c * a_channel), images, acc)

            return e.loop(e.select(found < 0, e.number(0), self.channels), acc, each)

        if shape.source == "lines":
            acc = each_tap(a, b, acc, one_step)
            if phase.alone is not None:
                taps, count = e.at(of["taps"], phase.alone[0] * 2, "i64"), phase.alone[1]
                acc = each_tap(a, b, acc, lambda a, b, acc: step(a, spaced(b), acc, alone=True), taps, count)
            return acc
        if shape.source in ("list", "images"):
            return e.loop(phase.count, acc, listed_tap if shape.source == "list" else tap_of_images)
        # The inner loop is along what lies side by side: the taps of a weight, or the channels of a pixel (or all of
        # them, packed so for a phase's few taps).
        if shape.one_tap:
            return e.loop(self.channels, acc, only_step)
        if shape.over == "places" and not shape.apart:
            return each_channel(a, b, acc, lambda a, b, acc: each_tap(a, b, acc, one_step))
        return each_tap(a, b, acc, lambda a, b, acc: each_channel(a, b, acc, one_step))
