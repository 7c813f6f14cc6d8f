"""The kernel of `narrow` and `depthwise`: lanes are neighbours along the width, in and out.

    y[o, h, w]  =  bias[o]  +  sum over c, k  of  weight[o, c, k] * x[c, h * stride + k * dilation - lo]

All of it is three-dimensional (depth, rows, width); what has fewer dimensions has sizes of 1 in front.  A tile is

    outputs x rows x vectors        output channels, rows, and vectors side by side: one register each

and the loops are, from the outside in,

    task        an image, a group, a depth and `rows` rows of the output
      fill      the addresses of the input rows that the task reads, for every tap outside the tile
      column    vectors along the width
        outputs tiles of output channels
          c, kd, kh, kx  input channels and taps
            load x; broadcast weight; acc[o][r][v] += weight * x

where kh is unrolled if rows share their loads, and kx if a stride lets taps share theirs.

A row of the border is a row of zeros, named by a table (-1), and multiplied as any other.  Along the width most
columns lie inside, where loads need no care.  The columns at the edges (and those that do not fill a tile) load under
masks: lanes in the border are zeros and nothing outside is read; for the other padding modes they are gathered through
a table.  A stride of 2 to 4 loads so many vectors and picks lanes; a larger one gathers.

Sizes are arguments, so that a new image size compiles nothing: `Shape` has all that the text depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from plainconv.cpu.emit import Emit, Value

PICKED_STRIDE = 4  # up to this stride, lanes are picked out of whole vectors; beyond, they are gathered
UNROLLED = 100  # products in a row, at most, where taps along the width share what they load

POINTERS = ("x", "w", "bias", "y", "depth_table", "row_table", "width_table", "zeros")
SIZES = (
    "groups",
    "group_in",
    "group_out",
    "in_channel",  # elements of an input channel
    "in_width",
    "lo",  # padding before a row; negative: elements cropped
    "out_depth",
    "out_rows",
    "out_width",
    "blocks",  # of `rows` output rows
    "head",  # vectors at the left edge
    "inside",  # tiles of `vectors` vectors after them
    "single",  # vectors at both edges, and inside what does not fill a tile
    "tiles",  # of `outputs` channels, of which the last is made of `rest` if that is not 0
)


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    kernel, and stride and dilation of rows and width; `sides`: whether the width has a "mask" border or reads a
    "table".  The tile: outputs, rest (a last tile of fewer outputs, or 0), rows, vectors, and whether the taps of the
    rows are unrolled, so that output rows share the input rows they load.
    """

    element: str
    lanes: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: str
    one_channel: bool
    has_bias: bool
    outputs: int
    rest: int
    rows: int
    vectors: int
    shared_rows: bool

    @property
    def inner(self) -> int:
        """Taps of the rows that are unrolled in the tile."""
        return self.kernel[1] if self.shared_rows else 1

    @property
    def places(self) -> tuple[int, ...]:
        """The input rows of a tile, counted from where its first tap begins."""
        steps = (r * self.stride[0] + k * self.dilation[0] for r in range(self.rows) for k in range(self.inner))
        return tuple(sorted(set(steps)))

    @property
    def slots(self) -> int:
        """Places, made up to whole vectors."""
        return -(-len(self.places) // self.lanes) * self.lanes

    @property
    def steps(self) -> int:
        """How many times a tile takes up new rows, for each input channel."""
        return self.kernel[0] * self.kernel[1] // self.inner


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS and SIZES are its arguments, tasks count image, group, depth, block."""
    return _Rows(shape).kernel()


class _Rows:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element)
        given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
        self.given = dict(zip((*POINTERS, *SIZES), given, strict=True))
        if shape.one_channel:
            self.given["group_in"] = e.number(1)
        count = shape.steps * shape.slots
        self.starts = e.stack("ptr", count)  # where each input row of the first channel begins
        self.jumps = None if shape.one_channel else e.stack("i64", count)  # from there to the next channel

    def kernel(self) -> str:
        e, of = self.e, self.given
        blocks, depth = of["blocks"], of["out_depth"]
        block, rest = e.begin % blocks, e.begin // blocks

        def task(_: Value, state: list[Value]) -> Sequence[Value]:
            block, d, plane, group = state
            self.fill(plane, d, block)
            self.columns(plane, group, d, block)
            # The next task: count as a clock does, without division.
            block, d, plane, group = block + 1, d, plane, group
            over = e.compare("sge", block, blocks)
            block, d = e.select(over, e.number(0), block), e.select(over, d + 1, d)
            over = e.compare("sge", d, depth)
            d, plane = e.select(over, e.number(0), d), e.select(over, plane + 1, plane)
            group = e.select(over, group + 1, group)
            group = e.select(e.compare("sge", group, of["groups"]), e.number(0), group)
            return [block, d, plane, group]

        plane = rest // depth
        e.loop(e.end - e.begin, [block, rest % depth, plane, plane % of["groups"]], task)
        return e.module()

    def fill(self, plane: Value, d: Value, block: Value) -> None:
        """Write down where the input rows of a task begin; a row of the border is the row of zeros."""
        e, of, shape = self.e, self.given, self.shape
        depth, steps = shape.kernel[0], shape.kernel[1] // shape.inner
        x = e.address(e.at(of["x"], plane * of["group_in"] * of["in_channel"]))
        zeros = e.address(of["zeros"])

        def each_depth(kd: Value, _: list[Value]) -> Sequence[Value]:
            by_depth = e.scalar(of["depth_table"], d * depth + kd, "i64")
            least = e.select(by_depth >= 0, e.number(0), e.number((1 << 63) - 1))  # outside: no row is real

            def each_step(step: Value, _: list[Value]) -> Sequence[Value]:
                for part in range(0, shape.slots, shape.lanes):
                    by_row = e.load_places(of["row_table"], (block * steps + step) * shape.slots + part)
                    real = e.compare_lanes("sge", by_row, least)
                    slot = (kd * steps + step) * shape.slots + part
                    e.put_places(e.either(real, e.move_places(by_row, x + by_depth), zeros), self.starts, slot)
                    if self.jumps is not None:
                        e.put_places(e.either(real, of["in_channel"], e.number(0)), self.jumps, slot)
                return []

            e.loop(steps, [], each_step)
            return []

        e.loop(depth, [], each_depth)

    def columns(self, plane: Value, group: Value, d: Value, block: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        first_row = block * shape.rows
        left = of["out_rows"] - first_row
        out_channel = of["out_depth"] * of["out_rows"] * of["out_width"]
        y = e.at(of["y"], plane * of["group_out"] * out_channel)
        y = e.at(y, (d * of["out_rows"] + first_row) * of["out_width"])

        def tile(vector: Value, inside: bool) -> None:
            """All output channels of one column of vectors."""

            def outputs(first: Value, count: int) -> None:
                channel = group * of["group_out"] + first
                out = e.at(y, first * out_channel)
                column = vector * shape.lanes
                vectors = shape.vectors if inside else 1
                acc = self.sums(channel, count, column, vectors, inside)
                mask = None if inside else e.tail(of["out_width"] - column)

                # Rows that the output does not have are written over its last one, which is then written itself: from
                # the bottom up, and no branch, behind which LLVM would move the sums.
                for r in reversed(range(shape.rows)):
                    row = e.least(left - 1, r) * of["out_width"]
                    for o in range(count):
                        for v in range(vectors):
                            at = out_channel * o + (row + column + v * shape.lanes)
                            e.store(acc[(o * shape.rows + r) * vectors + v], out, at, mask)

            def whole(i: Value, _: list[Value]) -> Sequence[Value]:
                outputs(i * shape.outputs, shape.outputs)
                return []

            if shape.rest:
                e.loop(of["tiles"], [], whole)
                outputs(of["tiles"] * shape.outputs, shape.rest)
            else:
                e.loop(of["tiles"], [], whole)

        def inside(i: Value, _: list[Value]) -> Sequence[Value]:
            tile(of["head"] + i * shape.vectors, True)
            return []

        def edge(i: Value, _: list[Value]) -> Sequence[Value]:
            behind = i + of["inside"] * shape.vectors
            tile(e.select(i < of["head"], i, behind), False)
            return []

        e.loop(of["inside"], [], inside)
        e.loop(of["single"], [], edge)

    def sums(self, channel: Value, outputs: int, column: Value, vectors: int, inside: bool) -> list[Value]:
        """The accumulators [outputs, rows, vectors] of one tile."""
        e, of, shape = self.e, self.given, self.shape
        rows, width = shape.kernel[1], shape.kernel[2]
        taps = shape.kernel[0] * rows * width
        if shape.has_bias:
            biases = [e.broadcast(e.scalar(of["bias"], channel + o)) for o in range(outputs)]
        else:
            biases = [e.zero] * outputs
        acc = [biases[o] for o in range(outputs) for _ in range(shape.rows * vectors)]
        w = e.at(of["w"], channel * of["group_in"] * taps)
        left = column * shape.stride[1]  # the place in the padded row where the first tap begins
        # With a stride, neighbouring taps pick their lanes out of the same loads. Without, unrolling gains nothing,
        # takes longer to compile, and LLVM would load so early that sums are spilled.
        products = width * shape.inner * outputs * shape.rows * shape.vectors
        unrolled = 1 < shape.stride[1] <= PICKED_STRIDE and products <= UNROLLED

        def each_channel(c: Value, acc: list[Value]) -> Sequence[Value]:
            w_channel = e.at(w, c * taps)

            def each_step(step: Value, acc: list[Value]) -> Sequence[Value]:
                starts = []
                for i in range(len(shape.places)):
                    slot = step * shape.slots + i
                    start = e.scalar(self.starts, slot, "ptr")
                    starts.append(start if self.jumps is None else e.at(start, c * e.scalar(self.jumps, slot, "i64")))
                w_step = e.at(w_channel, step * (shape.inner * width))
                if unrolled:
                    for kx in range(width):
                        acc = self.tap(acc, starts, w_step, left, kx, outputs, vectors, inside)
                    return acc

                def each_tap(kx: Value, acc: list[Value]) -> Sequence[Value]:
                    begin = left + kx * shape.dilation[1]
                    return self.tap(acc, starts, e.at(w_step, kx), begin, 0, outputs, vectors, inside)

                return e.loop(width, acc, each_tap)

            return e.loop(shape.steps, acc, each_step)

        return e.loop(1 if shape.one_channel else of["group_in"], acc, each_channel)

    def tap(
        self,
        acc: list[Value],
        starts: list[Value],
        w: Value,
        left: Value,
        kx: int,
        outputs: int,
        vectors: int,
        inside: bool,
    ) -> list[Value]:
        """Add what tap kx along the width gives (all taps of the rows, if they are unrolled)."""
        e, of, shape = self.e, self.given, self.shape
        acc = list(acc)
        x = {}
        for v in range(vectors):
            place = left + shape.stride[1] * shape.lanes * v
            load = self.loader(place, kx * shape.dilation[1], inside)
            for place_of_row, start in zip(shape.places, starts, strict=True):
                x[place_of_row, v] = load(start)
        taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2]
        for kh in range(shape.inner):
            for o in range(outputs):
                weight = e.broadcast(e.scalar(w, of["group_in"] * (taps * o) + kh * shape.kernel[2] + kx))
                for r in range(shape.rows):
                    row = r * shape.stride[0] + kh * shape.dilation[0]
                    for v in range(vectors):
                        i = (o * shape.rows + r) * vectors + v
                        acc[i] = e.fma(x[row, v], weight, acc[i])
        return acc

    def loader(self, left: Value, tap: int, inside: bool) -> Callable[[Value], Value]:
        """A function from an input row to its vector at places left + tap, + stride, ... of the padded row."""
        e, of, shape = self.e, self.given, self.shape
        stride, lanes = shape.stride[1], shape.lanes
        real: Value | None
        if not inside and shape.sides == "table":
            if stride == 1:
                shown = e.load_places(of["width_table"], left + tap)
            else:
                shown = e.gather(of["width_table"], e.places(left + tap, stride), None, "i64")
            real = e.compare_lanes("sge", shown, 0)
            return lambda row: e.gather(row, shown, real)
        first = left - of["lo"]
        if stride > PICKED_STRIDE:
            places = e.places(first + tap, stride)
            real = None if inside else e.compare_lanes("ult", places, of["in_width"])
            return lambda row: e.gather(row, places, real)
        whole, phase = divmod(tap, stride)
        begins = [first + (whole * stride + part * lanes) for part in range(stride)]
        masks = [None if inside else e.within(begin, of["in_width"]) for begin in begins]
        return lambda row: e.every(
            stride, phase, [e.load(row, begin, mask) for begin, mask in zip(begins, masks, strict=True)]
        )
