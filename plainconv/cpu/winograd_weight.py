"""The kernels of `winograd` for the gradient of the weight: a few taps are what is made, and tiles are what is summed.

    dw  =  A^T [ sum over tiles of  (G gy) * (B^T x) ]        along each dimension; * is element by element

Along one dimension a tile is m places of the output's gradient, and the patch of m + k - 1 places of the input that its
k taps meet: F(k, m), of which the taps are the outputs.  The matrices are those of plainconv/cpu/transforms.py.  Both
factors are brought forth for a chunk of all tiles, into panels; for each element they are a product of matrices, the
sum over tiles, and what is left of a block is turned back to taps and added to the sums of the chunks before:

    forth      for each factor: a piece of a row of tiles, and a vector of channels
      gather   the strip that the piece reads, [depth, row, column] vectors of channels: borders and layouts end here
      forth    B^T, or G, along each dimension; to panel[block][matrix][tile][channel of the block]
    multiply   a block of input channels, a tile of output channels, and a part of the chunk
      product  for each matrix: sums[c][matrix][o]  =  sum over tiles of  x[tile][c] * gy[tile][o]
      back     A^T along each dimension; added to the taps
      write    the weight, if there is one chunk

Lanes are channels throughout: of the input, and of the output.  The taps lie as in plainconv/cpu/weights.py, which
has what writes the weight.  Who adds what depends on the sizes and the number of threads alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.patches import Strips
from plainconv.cpu.transforms import Matrix, Three, forms, three, transform, transform_square
from plainconv.cpu.weights import TOTAL_SIZES, write
from plainconv.cpu.weights import Shape as Weight

TABLES = ("depth_table", "row_table", "col_table")  # which element a place shows, or -1
FORTH_POINTERS = ("tensor", "panel", "biases", "scratch")
FORTH_CHUNK = ("first", "pieces", "shares")  # the first piece of a chunk, how many it has, and threads
# Addresses, and then FORTH_SIZES: in "settled".
FORTH_SIZES = (
    "share",  # elements of scratch of each share
    "columns_at",  # where in it the columns are; the strip is first
    "image",  # elements of the tensor from one to the next
    "channel",
    "depth",
    "row",
    "col",
    "width",  # elements of a row
    "lo",  # padding before it
    "groups",
    "channels",  # of a group, and vectors of them
    "vectors",
    "depth_tiles",
    "high_tiles",
    "row_pieces",  # pieces of a row of tiles, and tiles of one
    "cols",
    "length",  # columns of a strip
    "group_panel",  # elements of the panel of a group, of a block, of a matrix and of a tile
    "block_panel",
    "matrix_panel",
    "tile_panel",
    "piece_bias",  # sums of a piece, and of a group
    "group_bias",
)
POINTERS = ("x", "y", "biases", "sums", "w", "bias", "scratch")
CHUNK = ("later", "pieces", "shares")  # whether chunks came before, pieces of this one, and threads
# SIZES, and then weights.TOTAL_SIZES: in "settled".
SIZES = (
    "share",
    "taps_at",  # where in it the taps of a block are, if
    "alone",  # there is one chunk of one slice, whose taps are written right away
    "cols",
    "slices",  # tasks are slices of the pieces x units
    "units",
    "inside",  # whether channels lie side by side in the weight
    "x_block",  # elements of the panels
    "x_matrix",
    "x_tile",
    "y_block",
    "y_matrix",
    "piece_bias",
    "group_bias",
)


def _dealt(
    e: Emit,
    of: dict[str, Value],
    tasks: Callable[[], Value],
    task: Callable[[Value, Value], Sequence[Value]],
) -> str:
    """A kernel whose tasks are dealt to shares, each of which has scratch of its own."""

    def share(i: Value, _: list[Value]) -> Sequence[Value]:
        number, count = e.begin + i, tasks()
        begin, end = number * count // of["shares"], (number + 1) * count // of["shares"]
        scratch = e.at(of["scratch"], number * of["share"])
        e.loop(end - begin, [], lambda j, _: task(begin + j, scratch))
        return []

    e.loop(e.end - e.begin, [], share)
    return e.module()


@dataclass(frozen=True)
class Forth:
    """All that the text of a kernel that brings a factor forth depends on.

    tile    places of the output in a tile, along depth, rows and width; taps: of the kernel
    role    "x", the patches of the input, or "y", the tiles of the output's gradient
    source  see plainconv.cpu.patches.Strips
    bias    whether the places of each piece are summed, too
    """

    element: str
    lanes: int
    tile: Three
    taps: Three
    role: str
    source: str
    bias: bool

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What a tile is multiplied by along depth, rows and width: columns for places that it reads."""
        which = 2 if self.role == "x" else 1
        return tuple(forms(k, m)[which] for m, k in zip(self.tile, self.taps, strict=True))


@lru_cache(64)
def forth(shape: Forth) -> str:
    """The kernel of this shape; tasks are shares."""
    return _Forth(shape).kernel()


class _Forth:
    def __init__(self, shape: Forth) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element)
        *given, settled = e.arguments(*("ptr",) * len(FORTH_POINTERS), *("i64",) * len(FORTH_CHUNK), "ptr")
        sizes = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(FORTH_SIZES), within=settled)
        names = (*FORTH_POINTERS, *FORTH_CHUNK, *TABLES, *FORTH_SIZES)
        self.given = dict(zip(names, (*given, *sizes), strict=True))
        self.matrices = shape.matrices
        self.reads = three(len(matrix[0]) for matrix in self.matrices)

    def kernel(self) -> str:
        of = self.given
        return _dealt(self.e, of, lambda: of["groups"] * of["vectors"] * of["pieces"], self.task)

    def task(self, number: Value, scratch: Value) -> Sequence[Value]:
        """A piece and a vector of channels, from the tensor to the panel."""
        e, of, shape = self.e, self.given, self.shape
        lanes, strips = shape.lanes, self.strips
        piece, vector = number % of["pieces"], number // of["pieces"]
        group, vector = vector // of["vectors"], vector % of["vectors"]
        strip, columns = scratch, e.at(scratch, of["columns_at"])
        self.gather(of["first"] + piece, group, vector, strip)
        if shape.bias:
            total = self.total(strip)
            e.store(total, of["biases"], piece * of["piece_bias"] + group * of["group_bias"] + vector * lanes)
        _, high, wide = (len(matrix) for matrix in self.matrices)
        block = vector * lanes // of["tile_panel"]
        at = group * of["group_panel"] + block * of["block_panel"] + (vector * lanes - block * of["tile_panel"])
        panel = e.at(of["panel"], at + piece * of["cols"] * of["tile_panel"])

        def patch(d: Value, t: Value) -> Value:
            return e.at(panel, d * of["matrix_panel"] * (high * wide) + t * of["tile_panel"])

        strips.bring(e, self.matrices, strip, columns, of["cols"], patch, of["matrix_panel"])
        return []

    @property
    def strips(self) -> Strips:
        """How the strips of the tensor are gathered."""
        of = self.given
        return Strips(
            self.shape.source,
            self.reads,
            self.shape.tile,
            (of["depth_table"], of["row_table"], of["col_table"]),
            (of["depth"], of["row"], of["col"]),
            of["channel"],
            of["channels"],
            of["width"],
            of["lo"],
            of["length"],
        )

    def gather(self, piece: Value, group: Value, vector: Value, strip: Value) -> None:
        """The strip of a piece and a vector of channels."""
        e, of, strips = self.e, self.given, self.strips
        col, row = piece % of["row_pieces"] * of["cols"], piece // of["row_pieces"]
        high, row = row % of["high_tiles"], row // of["high_tiles"]
        deep, image = row % of["depth_tiles"], row // of["depth_tiles"]
        tensor = e.at(of["tensor"], image * of["image"] + group * of["channels"] * of["channel"])
        strips.gather(e, tensor, vector * self.shape.lanes, (deep, high, col), strips.columns(of["cols"]), strip)

    def total(self, strip: Value) -> Value:
        """The sum of the strip of an output's gradient, whose tiles do not overlap."""
        e, of, lanes = self.e, self.given, self.shape.lanes
        deep, high, _ = self.reads

        def column(j: Value, acc: list[Value]) -> Sequence[Value]:
            lines = [e.load(strip, of["length"] * (i * lanes) + j * lanes) for i in range(deep * high)]
            return [e.add(total, line) for total, line in zip(acc, lines, strict=True)]

        return reduce(e.add, e.loop(self.strips.columns(of["cols"]), [e.zero] * (deep * high), column))


@dataclass(frozen=True)
class Shape:
    """All that the text of the kernel that multiplies depends on.

    scalars   x vectors: input channels and vectors of output channels whose sums are in registers
    bias      whether the sums of pieces are added, too
    """

    element: str
    lanes: int
    tile: Three
    taps: Three
    scalars: int
    vectors: int
    bias: bool

    @property
    def width(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes

    @property
    def weight(self) -> Weight:
        """How the weight is written."""
        return Weight(self.element, self.element, frozenset(), self.lanes, "", 1, "", 1, self.vectors, self.bias)

    @property
    def sums(self) -> int:
        """Elements of the sums of an input channel in all matrices; an odd number of vectors."""
        return (prod(m + k - 1 for m, k in zip(self.tile, self.taps, strict=True)) * self.vectors | 1) * self.lanes


@lru_cache(64)
def multiply(shape: Shape) -> str:
    """The kernel of this shape; tasks are shares."""
    return _Multiply(shape).kernel()


class _Multiply:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element)
        *given, settled = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(CHUNK), "ptr")
        sizes = e.arguments(*("i64",) * len(SIZES + TOTAL_SIZES), within=settled)
        self.given = dict(zip((*POINTERS, *CHUNK, *SIZES, *TOTAL_SIZES), (*given, *sizes), strict=True))
        self.back = tuple(forms(k, m)[0] for m, k in zip(shape.tile, shape.taps, strict=True))
        self.patch = tuple(len(matrix[0]) for matrix in self.back)

    def kernel(self) -> str:
        of = self.given
        return _dealt(self.e, of, lambda: of["slices"] * of["units"], self.task)

    def task(self, number: Value, scratch: Value) -> Sequence[Value]:
        """A slice of the pieces, a block of input channels and a tile of output channels."""
        e, of, shape = self.e, self.given, self.shape
        piece, unit = number // of["units"], number % of["units"]
        pieces = piece * of["pieces"] // of["slices"], (piece + 1) * of["pieces"] // of["slices"]
        which, tile = unit // of["tiles"], unit % of["tiles"]
        group, block = which // of["channel_blocks"], which % of["channel_blocks"]
        channels = e.least(of["block_channels"], of["group_in"] - block * of["block_channels"])
        first, count = pieces[0] * of["cols"], (pieces[1] - pieces[0]) * of["cols"]
        x = e.at(of["x"], which * of["x_block"] + first * of["x_tile"])
        y = e.at(of["y"], (group * of["tiles"] + tile) * of["y_block"] + first * shape.width)
        alone = e.compare("ne", of["alone"], 0)
        into = e.at(of["sums"], piece * of["chunk"] + unit * of["unit"])
        into = e.select(alone, e.at(scratch, of["taps_at"]), into)
        later = e.tail(of["later"] * shape.lanes)  # no lanes in the first chunk: nothing was summed before

        def each_matrix(i: Value, _: list[Value]) -> Sequence[Value]:
            left, right = e.at(x, i * of["x_matrix"]), e.at(y, i * of["y_matrix"])
            to = e.at(scratch, i * shape.width)

            def some(j: Value, _: list[Value]) -> Sequence[Value]:
                total = self.sums(e.at(left, j * shape.scalars), right, count)
                for k, value in enumerate(total):
                    channel = j * shape.scalars + k // shape.vectors
                    e.store(value, to, channel * shape.sums + k % shape.vectors * shape.lanes)
                return []

            # Channels behind the last one of a block are what lies there, and their sums are not read.
            e.loop((channels + (shape.scalars - 1)) // shape.scalars, [], some)
            return []

        e.loop(prod(self.patch), [], each_matrix)
        by_channel = e.select(inside := e.compare("ne", of["inside"], 0), e.number(1), e.number(prod(shape.taps)))
        by_tap = e.select(inside, channels, e.number(1))

        def each_channel(c: Value, _: list[Value]) -> Sequence[Value]:
            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                here = e.at(scratch, c * shape.sums + v * shape.lanes)
                taps = e.at(into, c * by_channel * shape.width + v * shape.lanes)
                self.turn_back(here, taps, by_tap * shape.width, later)
                return []

            e.loop(shape.vectors, [], each_vector)
            return []

        e.loop(channels, [], each_channel)
        if shape.bias:
            e.when(e.compare("eq", block, 0), lambda: self.add_bias(pieces, group, tile, into, later))
        one = {"chunks": e.number(1), "chunk": e.number(0)}
        e.when(alone, lambda: write(e, {**of, **one}, shape.weight, unit, into))
        return []

    def sums(self, x: Value, y: Value, count: Value) -> list[Value]:
        """The sums [scalars, vectors] of a matrix over so many tiles."""
        e, of, shape = self.e, self.given, self.shape

        def step(t: Value, acc: list[Value]) -> Sequence[Value]:
            at = t * of["x_tile"]
            vectors = [e.load(y, t * shape.width + v * shape.lanes) for v in range(shape.vectors)]
            result = []
            for s in range(shape.scalars):
                one = e.broadcast(e.scalar(x, at + s))
                result += [e.fma(one, vector, acc[s * shape.vectors + v]) for v, vector in enumerate(vectors)]
            return result

        return e.loop(count, [e.zero] * (shape.scalars * shape.vectors), step)

    def turn_back(self, sums: Value, taps: Value, step: Value, later: Value) -> None:
        """The taps of an input channel and a vector of output channels, `step` apart, from their sums."""
        e, width = self.e, self.shape.width
        by_depth, by_row, by_col = self.back
        deep, high, wide = self.patch
        plane = width * high * wide
        if deep > 1:

            def each_place(i: Value, _: list[Value]) -> Sequence[Value]:
                at = e.at(sums, i * width)
                for d, value in enumerate(transform(e, by_depth, [e.load(at, plane * d) for d in range(deep)])):
                    e.store(value, at, plane * d)
                return []

            e.loop(high * wide, [], each_place)

        def each_depth(d: Value, _: list[Value]) -> Sequence[Value]:
            at = e.at(sums, d * plane)
            loaded = [e.load(at, width * i) for i in range(high * wide)]
            results = transform_square(e, by_row, by_col, loaded)
            for i, value in enumerate(results):
                to = (d * len(results) + i) * step
                e.store(e.add(value, e.load(taps, to, later)), taps, to)
            return []

        e.loop(len(by_depth), [], each_depth)

    def add_bias(self, pieces: tuple[Value, Value], group: Value, tile: Value, into: Value, later: Value) -> None:
        """The sums of the output's gradient, behind the taps."""
        e, of, shape = self.e, self.given, self.shape
        biases = e.at(of["biases"], group * of["group_bias"] + tile * shape.width)
        to = e.at(into, of["unit"] - shape.width)

        def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
            def each_piece(i: Value, acc: list[Value]) -> Sequence[Value]:
                return [e.add(acc[0], e.load(biases, (pieces[0] + i) * of["piece_bias"] + v * shape.lanes))]

            (total,) = e.loop(pieces[1] - pieces[0], [e.load(to, v * shape.lanes, later)], each_piece)
            e.store(total, to, v * shape.lanes)
            return []

        e.loop(shape.vectors, [], each_vector)
