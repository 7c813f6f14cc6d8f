"""The kernel of the gradient for a dense weight: places of the output are what is summed over.

    dw[o, c, t]  =  sum over n, f  of  gy[n, o, f] * s[n, c, f + shift(t)]

f counts the places of a block of the output, row after row without a gap, s is the strip of the input that the block
reads (plainconv/cpu/gather.py), and gy the same block of the output's gradient, turned so that output channels lie side
by side.  Both stay in the cache.

    share        some units (a group, some input channels, a tile of output channels) and a chunk of all blocks
      block      some images, a depth, some rows or a part of one: the strip is gathered
        unit     the output's gradient is gathered, and for the gradient of a bias summed
          tile   `scalars` (input channel, tap) x `vectors` of output channels, in registers
            n, f load vectors; broadcast scalars; acc[i][v] += scalar[i] * vector[v]
                 added to the sums of the chunk, in memory
          write  the weight, if there is one chunk and this is its last block

So a sum is one over a block, and then one over the blocks of a chunk; of several chunks, `total` adds them, in their
order, and writes the weight.  Of a single block, the sums of a unit are kept no longer than until they are written.
Who computes what depends on the number of shares alone, so the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from plainconv.cpu.emit import SCALARS, Emit, Value
from plainconv.cpu.gather import Gather

POINTERS = ("x", "y", "w", "bias", "sums", "scratch", "settled")  # what changes with every call
# Addresses, and then SIZES and TOTAL_SIZES: in "settled".
TABLES = ("slots", "factors", "reach", "depth_table", "row_table", "col_table")
SIZES = (
    "share",  # elements of scratch of each share
    "entries",  # where in it the list of what to copy begins
    "turned",  # and the output's gradient
    "parts",  # shares are parts of the units x chunks of the blocks
    "units",
    "part",  # from the sums of a part to those of the next, ...
    "next",  # ... and of a unit: 0 if they are written before the next unit's are made
    "blocks",
    "image_blocks",
    "block_images",
    "batch",
    "taps",
    "last_factors",  # where in "factors" those of the last block of channels begin
    "x_image",
    "x_channel",
    "x_depth",
    "x_row",
    "x_col",
    "ahead",
    "in_width",
    "y_image",
    "y_channel",
    "y_depth",
    "y_row",
    "y_col",
    "y_merge",  # whether the rows of a block are one long row
    "out_rows",
    "out_width",
    "stride_depth",
    "stride_rows",
    "stride_cols",
    "lo",
    "block_rows",
    "block_cols",
    "row_blocks",
    "col_blocks",
    "slot_count",
    "slot_length",
    "pitch",
    "strip",  # elements of the strip of an image
    "block",  # elements of the output's gradient of an image
    "place",  # from a place of the strip to the next
)


@dataclass(frozen=True)
class Shape:
    """All that the text of the kernel depends on.

    element   of the sums; stored: of the tensors
    lanes     of a vector of output channels
    source    how the strip is gathered, and stride: see `Gather`
    turns     what lies side by side in the output's gradient: "rows" of places, "pixels" of channels, or nothing: "any"
    scalars   x vectors: the tile
    bias      whether the output's gradient itself is summed, too
    """

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    source: str
    stride: int
    turns: str
    scalars: int
    vectors: int
    bias: bool

    @property
    def width(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes


@lru_cache(256)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS are its arguments, tasks are shares."""
    return _Weights(shape).kernel()


class _Weights:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native)
        given = e.arguments(*("ptr",) * len(POINTERS))
        names = (*TABLES, *SIZES, *TOTAL_SIZES)
        settled = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(SIZES + TOTAL_SIZES), within=given[-1])
        self.given = dict(zip((*POINTERS, *names), (*given, *settled), strict=True))
        self.gather = Gather(e, self.given, shape.source, shape.stored, shape.stride)

    def kernel(self) -> str:
        e, of = self.e, self.given

        def share(i: Value, _: list[Value]) -> Sequence[Value]:
            number = e.begin + i
            part, chunk = number // of["chunks"], number % of["chunks"]
            scratch = e.at(of["scratch"], number * of["share"])
            sums = e.at(of["sums"], chunk * of["chunk"] + part * of["part"])
            units = part * of["units"] // of["parts"], (part + 1) * of["units"] // of["parts"]
            blocks = chunk * of["blocks"] // of["chunks"], (chunk + 1) * of["blocks"] // of["chunks"]
            # What the units of a part share is gathered once: its first to its last (group, block of channels).
            first, last = units[0] // of["tiles"], (units[1] + (of["tiles"] - 1)) // of["tiles"]

            def channels(j: Value, _: list[Value]) -> Sequence[Value]:
                which = first + j
                begin = e.most(units[0] - which * of["tiles"], 0)
                end = e.least(units[1] - which * of["tiles"], of["tiles"])
                self.channels(scratch, sums, which, (begin, end), blocks)
                return []

            e.loop(e.select(units[0] < units[1], last - first, e.number(0)), [], channels)
            return []

        e.loop(e.end - e.begin, [], share)
        return e.module()

    def channels(
        self, scratch: Value, sums: Value, which: Value, tiles: tuple[Value, Value], blocks: tuple[Value, Value]
    ) -> None:
        """The sums of a group and a block of its input channels, for some tiles of output channels."""
        e, of, shape = self.e, self.given, self.shape
        group, channel = which // of["channel_blocks"], which % of["channel_blocks"] * of["block_channels"]
        count = e.least(of["block_channels"], of["group_in"] - channel)
        short = e.compare("slt", count, of["block_channels"])
        factors = e.at(of["factors"], e.select(short, of["last_factors"], e.number(0)), "i64")
        products = (count * of["taps"] + (shape.scalars - 1)) // shape.scalars
        turned, alone = e.at(scratch, of["turned"]), e.compare("eq", of["chunks"], 1)

        def block(i: Value, carried: list[Value]) -> Sequence[Value]:
            number = blocks[0] + i
            where, images = number // of["image_blocks"], number % of["image_blocks"] * of["block_images"]
            depth, row, col = self.place(where)
            e.when(e.compare("ne", where, carried[0]), lambda: self.gather.describe(scratch, depth, row, col))
            some = e.least(of["block_images"], of["batch"] - images)
            rows = e.least(of["block_rows"], of["out_rows"] - row)
            cols = e.least(of["block_cols"], of["out_width"] - col)

            def strip(n: Value, _: list[Value]) -> Sequence[Value]:
                x = (images + n) * of["x_image"] + (group * of["group_in"] + channel) * of["x_channel"]
                self.gather.fill(scratch, e.at(of["x"], x, shape.stored), depth, count, n * of["strip"])
                return []

            def unit(j: Value, _: list[Value]) -> Sequence[Value]:
                tile = tiles[0] + j
                at = images * of["y_image"] + (group * of["group_out"] + tile * shape.width) * of["y_channel"]
                at = at + depth * of["y_depth"] + row * of["y_row"] + col * of["y_col"]
                y = e.at(of["y"], at, shape.stored)
                left = of["group_out"] - tile * shape.width
                merged = e.compare("ne", of["y_merge"], 0)
                long = e.select(merged, rows * cols, cols)
                turn = self.pixels if shape.turns == "pixels" else self.rows

                def image(n: Value, acc: list[Value]) -> Sequence[Value]:
                    from_, to = e.at(y, n * of["y_image"], shape.stored), e.at(turned, n * of["block"])

                    def each_row(r: Value, acc: list[Value]) -> Sequence[Value]:
                        row, place = e.at(from_, r * of["y_row"], shape.stored), e.at(to, r * long * shape.width)
                        return turn(row, place, long, left, acc)

                    return e.loop(e.select(merged, e.number(1), rows), acc, each_row)

                bias = e.loop(some, [e.zero] * (shape.vectors * shape.bias), image)
                into, first = e.at(sums, (number := which * of["tiles"] + tile) * of["next"]), e.compare("eq", i, 0)
                if shape.bias:
                    self.add(bias, e.at(into, of["unit"] - shape.width), first)

                def each_tile(k: Value, _: list[Value]) -> Sequence[Value]:
                    total = self.sums(scratch, turned, e.at(factors, k * shape.scalars, "i64"), some, rows * cols)
                    self.add(total, e.at(into, k * (shape.scalars * shape.width)), first)
                    return []

                e.loop(products, [], each_tile)
                done = e.compare("eq", e.select(alone, i + 1, e.number(0)), blocks[1] - blocks[0])
                e.when(done, lambda: write(e, of, shape, number, into))
                return []

            e.loop(some, [], strip)
            e.loop(tiles[1] - tiles[0], [], unit)
            return [where]

        e.loop(blocks[1] - blocks[0], [e.number(-1)], block)

    def place(self, where: Value) -> tuple[Value, Value, Value]:
        """Depth, first row and first column of a block."""
        of = self.given
        where, col = where // of["col_blocks"], where % of["col_blocks"]
        depth, row = where // of["row_blocks"], where % of["row_blocks"]
        return depth, row * of["block_rows"], col * of["block_cols"]

    # -- the output's gradient, turned -------------------------------------------------------------------------------

    def rows(self, y: Value, to: Value, length: Value, left: Value, acc: list[Value]) -> list[Value]:
        """A row of places, in squares that are transposed in registers; `left` output channels exist from here on.

        For a bias, `acc` are the sums so far, a vector for each of the tile's, and returned are those with the row's.
        """
        e, of, shape = self.e, self.given, self.shape
        carrier = "i16" if SCALARS[shape.stored] == 2 else shape.stored  # few processors know vectors of half types

        def square(i: Value, acc: list[Value]) -> Sequence[Value]:
            first, result = i * shape.lanes, list(acc)
            for v in range(shape.vectors):
                loaded = []
                for lane in range(v * shape.lanes, (v + 1) * shape.lanes):
                    mask = e.tail(e.select(left > lane, length - first, e.number(0)))
                    channel = e.at(y, of["y_channel"] * lane, shape.stored)
                    if shape.turns == "rows":
                        loaded.append(e.load(channel, first, mask, shape.stored))
                    else:
                        places = e.places(first * of["y_col"], of["y_col"])
                        loaded.append(e.widen(e.gather(channel, places, mask, carrier), shape.stored))
                turned = e.transpose(loaded)
                # Places behind the end are overwritten by the next row, or lie in room to spare.
                for place, value in enumerate(turned):
                    e.store(value, to, (first + place) * shape.width + v * shape.lanes)
                if shape.bias:
                    result[v] = e.add(result[v], reduce(e.add, turned))
            return result

        return e.loop((length + (shape.lanes - 1)) // shape.lanes, acc, square)

    def pixels(self, y: Value, to: Value, length: Value, left: Value, acc: list[Value]) -> list[Value]:
        """The same where channels lie side by side already."""
        e, of, shape = self.e, self.given, self.shape
        masks = [e.tail(left - v * shape.lanes) for v in range(shape.vectors)]

        def pixel(i: Value, acc: list[Value]) -> Sequence[Value]:
            values = [e.load(y, i * of["y_col"] + v * shape.lanes, mask, shape.stored) for v, mask in enumerate(masks)]
            for v, value in enumerate(values):
                e.store(value, to, i * shape.width + v * shape.lanes)
            return [e.add(total, value) for total, value in zip(acc, values, strict=True)] if shape.bias else []

        return e.loop(length, acc, pixel)

    # -- the product -------------------------------------------------------------------------------------------------

    def sums(self, strip: Value, turned: Value, factors: Value, images: Value, places: Value) -> list[Value]:
        """The sums [scalars, vectors] of one tile over a block."""
        e, of, shape = self.e, self.given, self.shape
        step: Value | int = 1 if shape.source != "pixels" else of["place"]
        starts = [e.opaque(e.at(strip, e.scalar(factors, s, "i64"))) for s in range(shape.scalars)]

        def image(n: Value, acc: list[Value]) -> Sequence[Value]:
            scalars = [e.at(start, n * of["strip"]) for start in starts]
            vectors = e.at(turned, n * of["block"])

            def place(f: Value, acc: list[Value]) -> Sequence[Value]:
                loaded = [e.load(vectors, f * shape.width + v * shape.lanes) for v in range(shape.vectors)]
                result = []
                for s, start in enumerate(scalars):
                    one = e.broadcast(e.scalar(start, f * step))
                    result += [e.fma(loaded[v], one, acc[s * shape.vectors + v]) for v in range(shape.vectors)]
                return result

            return e.loop(places, acc, place)

        return e.loop(images, [e.zero] * (shape.scalars * shape.vectors), image)

    def add(self, total: list[Value], into: Value, first: Value) -> None:
        """Put the sums of the first block where the others are added."""
        e, lanes = self.e, self.shape.lanes

        def put() -> None:
            for i, value in enumerate(total):
                e.store(value, into, i * lanes)

        def add() -> None:
            for i, value in enumerate(total):
                e.store(e.add(e.load(into, i * lanes), value), into, i * lanes)

        e.when(first, put, add)


# -- the chunks, added -----------------------------------------------------------------------------------------------

TOTAL_POINTERS = ("sums", "w", "bias")
TOTAL_SIZES = (
    "chunks",
    "chunk",  # sums of a chunk
    "unit",  # and of a unit; the last ones are the bias', if there is one
    "channel_blocks",
    "tiles",  # of output channels
    "group_in",
    "group_out",
    "block_channels",
    "w_group",
    "w_output",
    "w_block",  # from a block of input channels to the next
    "u_count",  # the sums of a unit are [u, v]: v side by side in the weight, too
    "w_u",
    "v_each",  # v for each input channel
)


@lru_cache(64)
def total(shape: Shape) -> str:
    """The kernel that adds the chunks and writes weight, contiguous or channels_last, and bias; tasks are units."""
    e = Emit(shape.lanes, shape.element, shape.native)
    given = e.arguments(*("ptr",) * len(TOTAL_POINTERS), *("i64",) * len(TOTAL_SIZES))
    of = dict(zip((*TOTAL_POINTERS, *TOTAL_SIZES), given, strict=True))

    def task(i: Value, _: list[Value]) -> Sequence[Value]:
        number = e.begin + i
        write(e, of, shape, number, e.at(of["sums"], number * of["unit"]))
        return []

    e.loop(e.end - e.begin, [], task)
    return e.module()


def write(e: Emit, of: Mapping[str, Value], shape: Shape, number: Value, sums: Value) -> None:
    """A unit's part of the weight, and of the bias, from its sums; `of` has TOTAL_SIZES, "w" and "bias"."""
    lanes = shape.lanes

    def added(sums: Value, places: list[Value]) -> list[Value]:
        """The sums of all chunks, in these places."""

        def chunk(k: Value, acc: list[Value]) -> Sequence[Value]:
            behind = e.at(sums, (k + 1) * of["chunk"])
            return [e.add(total, e.load(behind, place)) for total, place in zip(acc, places, strict=True)]

        return e.loop(of["chunks"] - 1, [e.load(sums, place) for place in places], chunk)

    which, tile = number // of["tiles"], number % of["tiles"]
    group, block = which // of["channel_blocks"], which % of["channel_blocks"]
    channels = e.least(of["block_channels"], of["group_in"] - block * of["block_channels"])
    count = channels * of["v_each"]
    output = tile * shape.width
    w = e.at(of["w"], group * of["w_group"] + output * of["w_output"] + block * of["w_block"], shape.stored)

    def each_u(u: Value, _: list[Value]) -> Sequence[Value]:
        def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
            first = v * lanes

            def part(p: Value, _: list[Value]) -> Sequence[Value]:
                at = [(u * count + e.least(first + r, count - 1)) * shape.width + p * lanes for r in range(lanes)]
                for lane, value in enumerate(e.transpose(added(sums, at))):
                    place = p * lanes + lane
                    here = e.select(output + place < of["group_out"], count - first, e.number(0))
                    to = place * of["w_output"] + u * of["w_u"] + first
                    e.store(value, w, to, e.tail(here), shape.stored)
                return []

            e.loop(shape.vectors, [], part)
            return []

        e.loop((count + (lanes - 1)) // lanes, [], each_vector)
        return []

    e.loop(of["u_count"], [], each_u)

    def put_bias() -> None:
        places = [of["unit"] - shape.width + p * lanes for p in range(shape.vectors)]
        to = e.at(of["bias"], group * of["group_out"] + output, shape.stored)
        for p, value in enumerate(added(sums, places)):
            e.store(value, to, p * lanes, e.tail(of["group_out"] - output - p * lanes), shape.stored)

    if shape.bias:
        e.when(e.compare("eq", block, 0), put_bias)
