"""The kernels of `winograd`: what is multiplied is moved to where a convolution is a product for each element.

    Y  =  A^T [ sum over c of  (G w_c) * (B^T d_c) ]        along each dimension; * is element by element

d is a patch of the input of m + k - 1 places, Y a tile of m outputs, if the stride is 1.  In two dimensions there are
(m + k - 1)^2 products for m^2 outputs, instead of k^2 for each.  The matrices are in plainconv/cpu/transforms.py.

All of it is three-dimensional (depth, rows, width); a dimension along which the kernel has one tap has m = 1, and
matrices of one number.  A block is some rows of tiles, `matrices` counts the products of a tile:

    weight       G w, before
    task         a block of tiles, a group, some of the output channels
      row        of tiles, and a vector of input channels
        gather   the strip that the row reads, [depth, row, column] vectors of channels: borders and layouts end here
        forth    B^T along each dimension; to patches[tile][vector][matrix][channel]
      tile       `vectors` of output channels
        product  for each matrix: sums[tile][output]  =  patches[tile][channel] @ weight[channel][output]
        back     A^T along each dimension, and the bias, to a strip of the output
        store    the strip, residual and activation included

Where all tiles are few, they are brought forth first, and then threads share the output channels: each makes the weight
of a tile of them as it needs it, for some input channels at a time, so that it never leaves the thread's own cache.

Lanes are channels throughout, of the input and then of the output.  Where neighbours along the width lie side by side
in memory instead, squares of lanes x lanes are transposed in registers on the way into a strip and out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.epilogue import finish
from plainconv.cpu.patches import Strips
from plainconv.cpu.transforms import Along, Three, three, transform, transform_square

POINTERS = ("x", "w", "weight", "bias", "residual", "y", "patches", "scratch", "settled")
# Addresses, and then SIZES: in "settled".
TABLES = ("depth_table", "row_table", "col_table")  # which element of the input a place shows, or -1
SIZES = (
    "tasks",
    "shares",  # how many threads the tasks are dealt to, each with its own scratch
    "share",  # elements of scratch of each
    "strip_at",  # where in it the strip of the input is, and so on
    "columns_at",
    "sums_at",
    "made_at",
    "patches_share",  # from the patches of one share to the next, and of one group
    "patches_group",
    "groups",
    "blocks",
    "col_blocks",
    "parts",  # of the output channels
    "block_rows",  # rows of tiles of a block, and tiles of a row
    "block_cols",
    "rows",  # rows of tiles, of all images and depths
    "cols",
    "depth_tiles",
    "high_tiles",
    "group_in",
    "group_out",
    "in_vectors",
    "out_tiles",
    "x_image",
    "x_channel",
    "x_depth",
    "x_row",
    "x_col",
    "in_width",
    "lo",  # padding before a row
    "y_image",
    "y_channel",
    "y_depth",
    "y_row",
    "y_col",
    "out_depth",
    "out_rows",
    "out_width",
    "length",  # columns of a strip, of the input and of the output
    "made_length",
    "patch",  # from the patches of a tile to those of the next
    "w_group",
    "w_output",
    "w_channel",
    "w_tap",
    "weight_at",  # the weight in the scratch, if it is made there
    "weight_group",
    "weight_tile",
    "weight_matrix",
    "sum_matrix",
)
PREFETCH = 1  # channels
SMALL = 2  # tiles at a time, of those that are left behind whole ones


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    tile      outputs of a tile, along depth, rows and width
    taps      of the kernel
    along     the transforms
    source    how channels come together: from "rows" (neighbours along the width lie side by side), from "pixels"
              (neighbouring channels do), or from any memory through a "table"
    last      whether neighbouring channels of the result lie side by side
    scalars   x vectors: tiles (of the output) and vectors of output channels whose sums are in registers
    turned    whether channels have changed places in the weight
    inside    whether its second dimension is innermost in it, and not its taps
    does      "weight": G w, a task for each vector of output channels; then "all" the rest, block by block.  Or
              "forth", a task for each row of tiles and vector of channels, and then "back", a task for each tile of
              output channels, which makes its weight itself, `held` vectors of input channels at a time
    """

    element: str
    lanes: int
    tile: Three
    taps: Three
    along: tuple[Along, ...]
    source: str
    last: bool
    scalars: int
    vectors: int
    turned: bool
    inside: bool
    does: str
    held: int
    has_bias: bool
    has_residual: bool
    activation: str | None

    @property
    def patch(self) -> Three:
        """Places of the input that a tile reads."""
        return three(along.places for along in self.along)

    @property
    def step(self) -> Three:
        """Places from a tile to the next."""
        return three(along.step for along in self.along)

    @property
    def slab(self) -> int:
        """Elements of the weight of a vector of input channels and a matrix; an odd number of vectors."""
        return (self.lanes * self.vectors | 1) * self.lanes


@lru_cache(256)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS are its arguments, tasks are shares."""
    return Winograd(shape).kernel()


@dataclass(frozen=True)
class Block:
    """Rows of tiles from `row` on, so many, and of each the tiles from `col` on."""

    row: Value
    rows: Value
    col: Value
    cols: Value


class Winograd:
    """Emits the kernel of a shape.  What transforms are is said in `prepare`, `bring`, `turn_back` and `weigh`."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element)
        given = e.arguments(*("ptr",) * len(POINTERS))
        settled = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(SIZES), within=given[-1])
        self.given = dict(zip((*POINTERS, *TABLES, *SIZES), (*given, *settled), strict=True))
        self.width = shape.vectors * shape.lanes
        self.prepare()

    def prepare(self) -> None:
        """The transforms, and room on the stack for them."""
        e, shape = self.e, self.shape
        self.back, self.weights, self.forth = zip(*(along[:3] for along in shape.along), strict=True)
        self.numbers = three(along.products for along in shape.along)
        self.matrices = prod(self.numbers)
        if shape.does in ("weight", "back"):
            taps, deep = prod(shape.taps), self.numbers[0]
            self.across = e.stack(shape.element, taps * shape.lanes * shape.lanes)  # [channel, tap] vectors of outputs
            self.planes = e.stack(shape.element, deep * taps // shape.taps[0] * shape.lanes)

    def kernel(self) -> str:
        e, of = self.e, self.given

        def share(i: Value, _: list[Value]) -> Sequence[Value]:
            number = e.begin + i
            first = number * of["tasks"] // of["shares"]
            last = (number + 1) * of["tasks"] // of["shares"]
            scratch = e.at(of["scratch"], number * of["share"])
            patches = e.at(of["patches"], number * of["patches_share"])
            tasks = {"all": self.task, "weight": self.weight_task, "forth": self.forth_task, "back": self.back_task}
            does = tasks[self.shape.does]
            e.loop(last - first, [e.number(-1)], lambda i, carried: [does(first + i, carried[0], scratch, patches)])
            return []

        e.loop(e.end - e.begin, [], share)
        return e.module()

    def task(self, number: Value, before: Value, scratch: Value, patches: Value) -> Value:
        """A block of tiles and a part of the outputs; `before` is the block of the task before."""
        e, of = self.e, self.given
        part, unit = number % of["parts"], number // of["parts"]
        where, group = unit % of["blocks"], unit // of["blocks"]
        row, col = where // of["col_blocks"] * of["block_rows"], where % of["col_blocks"] * of["block_cols"]
        rows, cols = e.least(of["block_rows"], of["rows"] - row), e.least(of["block_cols"], of["cols"] - col)
        block = Block(row, rows, col, cols)

        def each_row(i: Value, _: list[Value]) -> Sequence[Value]:
            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                self.bring(block, group, i, v, scratch, patches)
                return []

            e.loop(of["in_vectors"], [], each_vector)
            return []

        def bring() -> None:
            e.loop(rows, [], each_row)

        e.when(e.compare("ne", unit, before), bring)
        begin, end = part * of["out_tiles"] // of["parts"], (part + 1) * of["out_tiles"] // of["parts"]

        def each_tile(i: Value, _: list[Value]) -> Sequence[Value]:
            tile = begin + i
            weight = e.at(of["weight"], group * of["weight_group"] + tile * of["weight_tile"])
            sums = e.at(scratch, of["sums_at"])
            self.products(self.patches(rows, cols), patches, weight, e.number(0), self.slabs, sums, False)
            self.make(block, group, tile, scratch)
            return []

        e.loop(end - begin, [], each_tile)
        return unit

    def weight_task(self, number: Value, before: Value, scratch: Value, patches: Value) -> Value:
        """A vector of output channels, and all input channels."""
        e, of, shape = self.e, self.given, self.shape
        vectors = (of["group_out"] + (shape.lanes - 1)) // shape.lanes
        vector, group = number % vectors, number // vectors
        tile, lane = vector // shape.vectors, vector % shape.vectors
        weight = e.at(of["weight"], group * of["weight_group"] + tile * of["weight_tile"])
        self.weigh(group, vector, e.number(0), self.slabs, e.at(weight, lane * shape.lanes))
        return before

    def forth_task(self, number: Value, before: Value, scratch: Value, patches: Value) -> Value:
        """A row of tiles and a vector of channels."""
        of = self.given
        vector, number = number % of["in_vectors"], number // of["in_vectors"]
        row, group = number % of["rows"], number // of["rows"]
        self.bring(self.everything, group, row, vector, scratch, self.e.at(patches, group * of["patches_group"]))
        return before

    def back_task(self, number: Value, before: Value, scratch: Value, patches: Value) -> Value:
        """A tile of output channels, and all tiles of the output."""
        e, of, shape = self.e, self.given, self.shape
        tile, group = number % of["out_tiles"], number // of["out_tiles"]
        patches = e.at(patches, group * of["patches_group"])
        weight, sums, block = e.at(scratch, of["weight_at"]), e.at(scratch, of["sums_at"]), self.everything
        vectors = (of["group_out"] + (shape.lanes - 1)) // shape.lanes
        vectors = e.least(vectors - tile * shape.vectors, shape.vectors)

        def some(i: Value, _: list[Value]) -> Sequence[Value]:
            first = i * shape.held
            held = e.least(self.slabs - first, shape.held)

            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                self.weigh(group, tile * shape.vectors + v, first, held, e.at(weight, v * shape.lanes))
                return []

            e.loop(vectors, [], each_vector)
            self.products(self.patches(block.rows, block.cols), patches, weight, first, held, sums, True)
            return []

        e.loop((self.slabs + (shape.held - 1)) // shape.held, [], some)
        self.make(block, group, tile, scratch)
        return before

    @property
    def everything(self) -> Block:
        zero = self.e.number(0)
        return Block(zero, self.given["rows"], zero, self.given["cols"])

    def line(self, cols: Value) -> Value:
        """Patches of a row of so many tiles."""
        return cols

    def patches(self, rows: Value, cols: Value) -> Value:
        """From the first tile of a block to its last, how many patches begin."""
        return rows * self.line(cols)

    @property
    def slabs(self) -> Value:
        """What the sums of a group are over, a vector of input channels each."""
        return self.given["in_vectors"]

    def slab(self, number: Value) -> tuple[Value, Value]:
        """Where it is in the patches of a tile, and how many channels are left from there on."""
        lanes = self.shape.lanes
        return number * (self.matrices * lanes), self.given["group_in"] - number * lanes

    def place(self, row: Value) -> tuple[Value, Value, Value]:
        """Image, depth and row of tiles, of a row of tiles."""
        of = self.given
        row, high = row // of["high_tiles"], row % of["high_tiles"]
        return row // of["depth_tiles"], row % of["depth_tiles"], high

    # -- the input ---------------------------------------------------------------------------------------------------

    @property
    def strips(self) -> Strips:
        """How the strips of the input are gathered."""
        of, shape = self.given, self.shape
        return Strips(
            shape.source,
            shape.patch,
            shape.step,
            (of["depth_table"], of["row_table"], of["col_table"]),
            (of["x_depth"], of["x_row"], of["x_col"]),
            of["x_channel"],
            of["group_in"],
            of["in_width"],
            of["lo"],
            of["length"],
        )

    def bring(self, block: Block, group: Value, row: Value, vector: Value, scratch: Value, patches: Value) -> None:
        """The patches of a row of tiles of a block, and of a vector of channels."""
        e, of, lanes = self.e, self.given, self.shape.lanes
        strip, columns = e.at(scratch, of["strip_at"]), e.at(scratch, of["columns_at"])
        self.gather(block, group, block.row + row, vector, strip)
        _, high, wide = self.numbers
        first = row * self.line(block.cols)

        def patch(d: Value, t: Value) -> Value:
            at = vector * (self.matrices * lanes) + d * (high * wide * lanes)
            return e.at(patches, (first + t) * of["patch"] + at)

        self.strips.bring(e, self.forth, strip, columns, block.cols, patch, lanes)

    def gather(self, block: Block, group: Value, row: Value, vector: Value, strip: Value) -> None:
        """The strip of a row of tiles and a vector of channels."""
        e, of, strips = self.e, self.given, self.strips
        image, deep, high = self.place(row)
        x = e.at(of["x"], image * of["x_image"] + group * of["group_in"] * of["x_channel"])
        columns = strips.columns(self.line(block.cols))
        strips.gather(e, x, vector * self.shape.lanes, (deep, high, block.col), columns, strip)

    # -- the product -------------------------------------------------------------------------------------------------

    def products(
        self,
        count: Value,
        patches: Value,
        weight: Value,
        first_slab: Value,
        slabs: Value,
        sums: Value,
        adds: bool,
    ) -> None:
        """For each matrix, the sums [tile, output] of `count` tiles over so many vectors of channels.

        adds: to the sums that are there, if there were slabs before.
        """
        e, of, shape = self.e, self.given, self.shape
        lanes = shape.lanes
        more = e.tail(first_slab * lanes) if adds else None

        def each_matrix(i: Value, _: list[Value]) -> Sequence[Value]:
            left, right = e.at(patches, i * lanes), e.at(weight, i * of["weight_matrix"])
            to = e.at(sums, i * of["sum_matrix"])

            def some(first: Value, scalars: int) -> Sequence[Value]:
                rows = [e.at(left, (first + s) * of["patch"]) for s in range(scalars)]

                def each_vector(v: Value, acc: list[Value]) -> Sequence[Value]:
                    weights = e.at(right, v * shape.slab)
                    place, channels = self.slab(first_slab + v)
                    here = [e.at(row, place) for row in rows]

                    def step(c: Value, acc: list[Value]) -> Sequence[Value]:
                        loaded = [e.load(weights, c * self.width + n * lanes) for n in range(shape.vectors)]
                        ones = [e.broadcast(e.scalar(row, c)) for row in here]
                        pairs = [(one, weight) for one in ones for weight in loaded]
                        return [e.fma(one, weight, total) for (one, weight), total in zip(pairs, acc, strict=True)]

                    return e.loop(e.least(channels, lanes), acc, step)

                begins = [e.zero] * (scalars * shape.vectors)
                if more is not None:
                    begins = [e.load(to, first * self.width + n * lanes, more) for n in range(len(begins))]
                for n, total in enumerate(e.loop(slabs, begins, each_vector)):
                    e.store(total, to, first * self.width + n * lanes)
                return []

            whole = count // shape.scalars
            e.loop(whole, [], lambda i, _: some(i * shape.scalars, shape.scalars))
            behind = whole * shape.scalars
            if shape.scalars > 1:
                e.loop((count - behind + (SMALL - 1)) // SMALL, [], lambda i, _: some(behind + i * SMALL, SMALL))
            return []

        e.loop(self.matrices, [], each_matrix)

    # -- the output --------------------------------------------------------------------------------------------------

    def make(self, block: Block, group: Value, tile: Value, scratch: Value) -> None:
        """What a tile of output channels has in a block, from its sums."""
        e, of, shape = self.e, self.given, self.shape
        sums, made = e.at(scratch, of["sums_at"]), e.at(scratch, of["made_at"])

        def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
            first = (tile * shape.vectors + v) * shape.lanes

            def each_row(i: Value, _: list[Value]) -> Sequence[Value]:
                here = e.at(sums, i * self.line(block.cols) * self.width + v * shape.lanes)
                self.turn_back(block.cols, group, first, here, made)
                self.store(block, group, block.row + i, first, made)
                return []

            e.loop(block.rows, [], each_row)
            return []

        # Vectors behind the last output do not exist.
        vectors = (of["group_out"] + (shape.lanes - 1)) // shape.lanes - tile * shape.vectors
        e.loop(e.least(vectors, shape.vectors), [], each_vector)

    def turn_back(self, cols: Value, group: Value, first: Value, sums: Value, made: Value) -> None:
        """A row of tiles, from sums to outputs: [depth, row, column] vectors of channels from the first on."""
        e, of, shape = self.e, self.given, self.shape
        by_depth, by_row, by_col = self.back
        deep, high, wide = self.numbers
        plane = of["sum_matrix"] * (high * wide)
        bias = None
        if shape.has_bias:
            bias = e.load(of["bias"], group * of["group_out"] + first, e.tail(of["group_out"] - first))

        def each_tile(t: Value, _: list[Value]) -> Sequence[Value]:
            here = e.at(sums, t * self.width)
            if deep > 1:

                def each_place(i: Value, _: list[Value]) -> Sequence[Value]:
                    at = e.at(here, of["sum_matrix"] * i)
                    for d, value in enumerate(transform(e, by_depth, [e.load(at, plane * d) for d in range(deep)])):
                        e.store(value, at, plane * d)
                    return []

                e.loop(high * wide, [], each_place)

            def each_depth(d: Value, _: list[Value]) -> Sequence[Value]:
                at = e.at(here, plane * d)
                loaded = [e.load(at, of["sum_matrix"] * i) for i in range(high * wide)]
                results = transform_square(e, by_row, by_col, loaded)
                to = e.at(made, (d * shape.tile[1] * of["made_length"] + t * shape.tile[2]) * shape.lanes)
                for i, value in enumerate(results):
                    row, col = divmod(i, shape.tile[2])
                    at_row = of["made_length"] * (row * shape.lanes) + col * shape.lanes
                    e.store(value if bias is None else e.add(value, bias), to, at_row)
                return []

            e.loop(shape.tile[0], [], each_depth)
            return []

        e.loop(cols, [], each_tile)

    def store(self, block: Block, group: Value, row: Value, first: Value, made: Value) -> None:
        """What there is of a row of tiles, to the result."""
        e, of, shape = self.e, self.given, self.shape
        lanes = shape.lanes
        image, deep, high = self.place(row)
        start = block.col * shape.tile[2]
        columns = e.least(block.cols * shape.tile[2], of["out_width"] - start)
        left = of["group_out"] - first
        begin = image * of["y_image"] + (group * of["group_out"] + first) * of["y_channel"] + start * of["y_col"]

        def put(value: Value, at: Value, mask: Value) -> None:
            residual = e.load(of["residual"], at, mask) if shape.has_residual else None
            e.store(finish(e, value, residual, shape.activation), of["y"], at, mask)

        def each_line(i: Value, _: list[Value]) -> Sequence[Value]:
            y_depth, y_row = deep * shape.tile[0] + i // shape.tile[1], high * shape.tile[1] + i % shape.tile[1]
            line, at = e.at(made, i * of["made_length"] * lanes), begin + y_depth * of["y_depth"] + y_row * of["y_row"]

            def pixel(j: Value, _: list[Value]) -> Sequence[Value]:
                put(e.load(line, j * lanes), at + j * of["y_col"], e.tail(left))
                return []

            def square(j: Value, _: list[Value]) -> Sequence[Value]:
                loaded = [e.load(line, j * (lanes * lanes) + k * lanes) for k in range(lanes)]
                for k, value in enumerate(e.transpose(loaded)):
                    mask = e.tail(e.select(left > k, columns - j * lanes, e.number(0)))
                    put(value, at + of["y_channel"] * k + j * lanes, mask)
                return []

            def whole() -> None:
                if shape.last:
                    e.loop(columns, [], pixel)
                else:
                    e.loop((columns + (lanes - 1)) // lanes, [], square)

            inside = e.least(of["out_depth"] - y_depth, of["out_rows"] - y_row)
            e.when(inside > 0, whole)
            return []

        e.loop(shape.tile[0] * shape.tile[1], [], each_line)

    # -- the weight --------------------------------------------------------------------------------------------------

    def weigh(self, group: Value, vector: Value, first: Value, count: Value, to: Value) -> None:
        """G w of a vector of output channels and `count` vectors of input channels: [matrix][vector][channel][output].

        Outputs that do not exist have the numbers of the last one.
        """
        e, of, shape = self.e, self.given, self.shape
        lanes, taps = shape.lanes, prod(shape.taps)
        begin, left = vector * lanes, of["group_out"] - vector * lanes
        outputs = [e.least(begin + k, of["group_out"] - 1) * of["w_output"] for k in range(lanes)]
        w = e.at(of["w"], group * of["w_group"])
        # Taps lie side by side; so do channels, unless they have changed places.
        chunk = 1 if shape.turned else lanes

        def each_vector(j: Value, _: list[Value]) -> Sequence[Value]:
            channel = (first + j) * lanes
            channels = e.least(of["group_in"] - channel, lanes)
            slabs = e.at(to, j * shape.slab)

            def some(k: Value, _: list[Value]) -> Sequence[Value]:
                source = e.at(w, (channel + k * chunk) * of["w_channel"])
                here = e.least(channels - k * chunk, chunk)

                def square(n: Value, _: list[Value]) -> Sequence[Value]:
                    """Of all outputs: a vector of the taps of channels, or of the channels of a tap."""
                    at, mask = n * lanes, e.tail(here * taps - n * lanes)
                    if shape.inside:
                        at, mask = n * of["w_tap"], e.tail(here)
                    rows = [e.load(source, output + at, mask) for output in outputs]
                    if shape.inside:
                        for output in outputs:
                            e.prefetch(e.at(source, output + at + lanes))
                    for i, value in enumerate(e.transpose(rows)):
                        place = n + i * taps if shape.inside else n * lanes + i
                        e.store(value, self.across, place * lanes)
                    return []

                def line(n: Value, _: list[Value]) -> Sequence[Value]:
                    """A tap of a channel, whose outputs lie side by side."""
                    e.store(e.load(source, begin + n * of["w_tap"], e.tail(left)), self.across, n * lanes)
                    return []

                def each(c: Value, _: list[Value]) -> Sequence[Value]:
                    self.spread(e.at(self.across, c * (taps * lanes)), e.at(slabs, (k * chunk + c) * self.width))
                    return []

                if shape.inside:
                    e.loop(e.number(taps), [], line if shape.turned else square)
                else:
                    e.loop(-(-chunk * taps // lanes), [], square)
                e.loop(here, [], each)
                return []

            e.loop((channels + (chunk - 1)) // chunk, [], some)
            return []

        e.loop(count, [], each_vector)

    def spread(self, source: Value, to: Value) -> None:
        """The taps of a channel, to its numbers in all matrices."""
        e, of, shape = self.e, self.given, self.shape
        lanes, taps, deep = shape.lanes, prod(shape.taps), self.numbers[0]
        by_depth, by_row, by_col = self.weights
        plane = taps // shape.taps[0]

        def square(values: list[Value], to: Value) -> None:
            for i in range(len(by_row) * len(by_col)):
                e.prefetch(e.at(to, of["weight_matrix"] * i + PREFETCH * self.width), "write")
            for i, value in enumerate(transform_square(e, by_row, by_col, values)):
                e.store(value, to, of["weight_matrix"] * i)

        if deep == 1:
            square([e.load(source, tap * lanes) for tap in range(taps)], to)
            return
        for p in range(plane):
            loaded = [e.load(source, (d * plane + p) * lanes) for d in range(shape.taps[0])]
            for d, value in enumerate(transform(e, by_depth, loaded)):
                e.store(value, self.planes, (d * plane + p) * lanes)

        def each_depth(d: Value, _: list[Value]) -> Sequence[Value]:
            here = e.at(self.planes, d * (plane * lanes))
            values = [e.load(here, p * lanes) for p in range(plane)]
            square(values, e.at(to, d * (len(by_row) * len(by_col)) * of["weight_matrix"]))
            return []

        e.loop(deep, [], each_depth)
