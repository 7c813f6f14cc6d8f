"""The kernel of the gradient for a weight of few channels: lanes are neighbours along the width, and each tap is a sum.

    dw[o, c, k]  =  sum over n, h, w  of  gy[n, o, h, w] * x[n, c, h * stride + k * dilation - lo]

All of it is three-dimensional (depth, rows, width).  A tile is `outputs` channels x `high` x `wide` taps, one register
of sums each, and the loops are, from the outside in,

    share          some groups, and a chunk of all items
      item         some planes (images, and depths of the output), some of their rows and some of their columns
        tile       output channels, an input channel, a tap along the depth, taps of the rows and of the width
          plane, column
            rows   `rows` rows of gy are loaded; each input row is loaded once for each tap of the width, and
                   multiplied by all rows that it meets
        sums       lanes are added, and what is left is added to the sums of the chunk, in memory

so no sum is longer than an item, and `total` adds the chunks, in their order.  The last tile of a dimension overlaps
the one before it: what both have is summed twice, and used once.  For the gradient of a bias, gy itself is summed, too:
one more register for each output of a tile, a tap that sees ones.

An input row of the border is a row of zeros.  Columns at the edges load under masks; inside, loads need no care.  What
has no contiguous rows, a larger stride or borders that are no zeros is gathered through a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from plainconv.cpu.emit import SCALARS, Emit, Value

PICKED_STRIDE = 4  # up to this stride, lanes are picked out of whole vectors; beyond, they are gathered
AHEAD = 8  # vectors between what a column of a long row reads and what is asked for meanwhile

POINTERS = ("x", "y", "sums", "settled")  # what changes with every call
TABLES = ("depth_table", "row_table", "width_table", "zeros")  # addresses, and then SIZES: in "settled"
SIZES = (
    "parts",  # shares are parts of the groups x chunks of the items
    "chunks",
    "groups",
    "group_in",
    "group_out",
    "out_depth",
    "out_rows",
    "out_width",
    "in_width",
    "lo",  # padding before a row
    "planes",
    "block_planes",  # of an item
    "block_rows",
    "row_blocks",
    "block_columns",
    "column_blocks",
    "items",
    "output_tiles",
    "high_tiles",
    "wide_tiles",
    "unit",  # sums of a group
    "chunk",  # sums of a chunk
    "x_image",  # elements; what depths and rows are apart is in the tables, in bytes
    "x_channel",
    "x_col",
    "y_image",
    "y_channel",
    "y_depth",
    "y_row",
    "y_col",
    "head",  # columns at the left edge
    "columns",
    "inside",  # of them, those behind the left edge and before the right one
)


@dataclass(frozen=True)
class Shape:
    """All that the text of the kernel depends on.

    element   of the sums; stored: of the tensors
    kernel, stride and dilation: those of rows and width
    table     whether the input is gathered through a table, each lane by itself
    spread    whether the places of a row of gy lie apart
    long      whether what lies AHEAD along a row is asked for: of many rows at once, processors foresee little
    outputs x high x wide: the tile; rows: of gy, that share what is loaded of the input
    bias      whether gy itself is summed, too
    """

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    table: bool
    spread: bool
    long: bool
    outputs: int
    high: int
    wide: int
    rows: int
    bias: bool

    @property
    def sums(self) -> int:
        """Of a tile: [outputs, high, wide], then those of the bias."""
        return self.outputs * (self.high * self.wide + self.bias)

    @property
    def padded(self) -> int:
        """The same, made up to whole vectors."""
        return -(-self.sums // self.lanes) * self.lanes

    @property
    def offsets(self) -> list[int]:
        """Of the taps of a tile along the width, from its first."""
        return [tap * self.dilation[1] for tap in range(self.wide)]

    @property
    def dealt(self) -> bool:
        """Whether a stride of 2 is taken apart inside each 128 bits of a vector: see `_Taps.dealt`."""
        return self.stride[1] == 2 and not self.table and 16 // SCALARS[self.element] >= 2

    @property
    def halves(self) -> tuple[list[int], list[int]]:
        """Every second lane of two vectors, from the first and from the second on, picked inside each 128 bits."""
        size = 16 // SCALARS[self.element]
        even, odd = (
            [of * self.lanes + at + i for at in range(0, self.lanes, size) for of in (0, 1) for i in range(p, size, 2)]
            for p in (0, 1)
        )
        return even, odd


def reach(lanes: int, stride: int, last: int) -> int:
    """Elements of an input row that a column reads at most, if its last tap is `last` behind its first."""
    if stride == 2:
        return 2 * lanes + (_power(last - 1) if last > 1 else 0)
    return last // stride * stride + stride * lanes


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()


@lru_cache(256)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS are its arguments, tasks are shares."""
    return _Taps(shape).kernel()


class _Taps:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native)
        given = e.arguments(*("ptr",) * len(POINTERS))
        settled = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(SIZES), within=given[-1])
        self.given = dict(zip((*POINTERS, *TABLES, *SIZES), (*given, *settled), strict=True))

    def kernel(self) -> str:
        e, of = self.e, self.given

        def share(i: Value, _: list[Value]) -> Sequence[Value]:
            number = e.begin + i
            part, chunk = number // of["chunks"], number % of["chunks"]
            first = part * of["groups"] // of["parts"]
            begin, end = chunk * of["items"] // of["chunks"], (chunk + 1) * of["items"] // of["chunks"]

            def group(j: Value, _: list[Value]) -> Sequence[Value]:
                at = chunk * of["chunk"] + (first + j) * of["unit"]

                def item(k: Value, _: list[Value]) -> Sequence[Value]:
                    self.tiles(first + j, begin + k, e.at(of["sums"], at), e.compare("eq", k, 0))
                    return []

                e.loop(end - begin, [], item)
                return []

            e.loop((part + 1) * of["groups"] // of["parts"] - first, [], group)
            return []

        e.loop(e.end - e.begin, [], share)
        return e.module()

    def tiles(self, group: Value, item: Value, sums: Value, first: Value) -> None:
        """All tiles of a group over an item, added to its sums (or put there, if they are the first)."""
        e, of, shape = self.e, self.given, self.shape
        depth, high, wide = shape.kernel
        item, column = item // of["column_blocks"], item % of["column_blocks"] * of["block_columns"]
        plane, row = item // of["row_blocks"] * of["block_planes"], item % of["row_blocks"] * of["block_rows"]
        columns = column, e.least(column + of["block_columns"], of["columns"])
        planes = e.least(of["block_planes"], of["planes"] - plane)
        rows = e.least(of["block_rows"], of["out_rows"] - row)

        def outputs(i: Value, at: list[Value]) -> Sequence[Value]:
            output = group * of["group_out"] + e.least(i * shape.outputs, of["group_out"] - shape.outputs)
            y = e.at(of["y"], output * of["y_channel"], shape.stored)

            def channel(c: Value, at: list[Value]) -> Sequence[Value]:
                x = e.at(of["x"], (group * of["group_in"] + c) * of["x_channel"], shape.stored)

                def taps(kd: Value, ky: Value, kx: Value, at: list[Value]) -> Sequence[Value]:
                    def tile(bias: bool) -> None:
                        acc = self.planes(x, y, kd, ky, kx, (plane, planes), (row, rows), columns, bias)
                        for i in range(0, len(acc), shape.lanes):
                            total, to = e.sums_of(acc[i : i + shape.lanes]), e.at(at[0], i)

                            def put(total: Value = total, to: Value = to) -> None:
                                e.store(total, to)

                            def add(total: Value = total, to: Value = to) -> None:
                                e.store(e.add(e.load(to), total), to)

                            e.when(first, put, add)

                    if shape.bias and shape.kernel != (1, shape.high, shape.wide):  # the first tile's will do
                        e.when(e.compare("eq", c + kd + ky + kx, 0), lambda: tile(True), lambda: tile(False))
                    else:
                        tile(shape.bias)
                    return [e.at(at[0], shape.padded)]

                def each_depth(kd: Value, at: list[Value]) -> Sequence[Value]:
                    def each_high(j: Value, at: list[Value]) -> Sequence[Value]:
                        ky = e.least(j * shape.high, high - shape.high)
                        return e.loop(
                            of["wide_tiles"] if wide > shape.wide else 1,
                            at,
                            lambda k, at: taps(kd, ky, e.least(k * shape.wide, wide - shape.wide), at),
                        )

                    return e.loop(of["high_tiles"] if high > shape.high else 1, at, each_high)

                return e.loop(depth, at, each_depth)

            return e.loop(of["group_in"], at, channel)

        e.loop(of["output_tiles"], [sums], outputs)

    def planes(
        self,
        x: Value,
        y: Value,
        kd: Value,
        ky: Value,
        kx: Value,
        planes: tuple[Value, Value],
        rows: tuple[Value, Value],
        columns: tuple[Value, Value],
        bias: bool,
    ) -> list[Value]:
        """The sums [outputs, high, wide] of a tile over an item, lane by lane, and with a bias those of gy [outputs].

        ky, kx: its first taps.
        """
        e, of, shape = self.e, self.given, self.shape
        taps = shape.outputs * shape.high * shape.wide
        inside = [e.most(e.least(of["head"] + i, columns[1]), columns[0]) for i in (e.number(0), of["inside"])]

        def plane(i: Value, acc: list[Value]) -> Sequence[Value]:
            image, depth = (planes[0] + i) // of["out_depth"], (planes[0] + i) % of["out_depth"]
            behind = e.scalar(of["depth_table"], depth * shape.kernel[0] + kd, "i64")
            source = e.at(e.at(x, image * of["x_image"], shape.stored), behind, "i8")
            at = image * of["y_image"] + depth * of["y_depth"] + rows[0] * of["y_row"]
            given = e.at(y, at, shape.stored)
            first = rows[0] * shape.stride[0] + ky * shape.dilation[0]

            def column(number: Value, edge: bool, acc: list[Value]) -> Sequence[Value]:
                load_x, load_y = self.loads(number, kx, edge)

                def some(count: int, row: Value, acc: list[Value]) -> Sequence[Value]:
                    """`count` rows of gy from this one of the item on."""
                    place = first + row * shape.stride[0]
                    loaded = {
                        (o, r): load_y(e.at(given, of["y_channel"] * o + (row + r) * of["y_row"], shape.stored))
                        for r in range(count)
                        for o in range(shape.outputs)
                    }
                    if shape.long and not edge:
                        for r in range(count):
                            for o in range(shape.outputs):
                                self.ask_for(given, of["y_channel"] * o + (row + r) * of["y_row"], number, 1)
                    result = list(acc)
                    for o, total in enumerate(acc[taps:]):
                        result[taps + o] = e.add(total, reduce(e.add, [loaded[o, r] for r in range(count)]))
                    meets: dict[int, list[tuple[int, int]]] = {}
                    for r in range(count):
                        for k in range(shape.high):
                            meets.setdefault(r * shape.stride[0] + k * shape.dilation[0], []).append((r, k))
                    for behind_first, pairs in sorted(meets.items()):
                        move = e.scalar(of["row_table"], place + behind_first, "i64")
                        real = e.compare("sge", e.least(move, behind), 0)
                        start = e.at(source, move, "i8")
                        if not shape.table:
                            start = e.select(real, start, of["zeros"])
                        if shape.long and not edge:
                            self.ask_for(start, e.number(0), number, shape.stride[1])
                        for tap, value in enumerate(load_x(start, real)):
                            for r, k in pairs:
                                for o in range(shape.outputs):
                                    i = (o * shape.high + k) * shape.wide + tap
                                    result[i] = e.fma(value, loaded[o, r], result[i])
                    return result

                whole = rows[1] // shape.rows
                acc = e.loop(whole, acc, lambda i, acc: some(shape.rows, i * shape.rows, acc))
                if shape.rows > 1:
                    left = rows[1] % shape.rows
                    acc = e.loop(left, acc, lambda i, acc: some(1, whole * shape.rows + i, acc))
                return acc

            acc = e.loop(inside[1] - inside[0], acc, lambda i, acc: column(inside[0] + i, False, acc))
            before = inside[0] - columns[0]
            return e.loop(
                before + (columns[1] - inside[1]),
                acc,
                lambda i, acc: column(e.select(i < before, columns[0] + i, inside[1] - before + i), True, acc),
            )

        return e.loop(planes[1], [e.zero] * (taps + bias * shape.outputs), plane)

    def ask_for(self, start: Value, offset: Value, column: Value, step: int) -> None:
        """The lines of the cache that a column AHEAD of this one reads of a row."""
        e, shape = self.e, self.shape
        first = offset + (column + AHEAD) * (shape.lanes * step)
        for line in range(-(-shape.lanes * step * SCALARS[shape.stored] // 64)):
            e.prefetch(e.at(start, first + line * (64 // SCALARS[shape.stored]), shape.stored))

    def loads(
        self, column: Value, kx: Value, edge: bool
    ) -> tuple[Callable[[Value, Value], list[Value]], Callable[[Value], Value]]:
        """Functions: from an input row (and whether it is real) to what each tap sees in a column; from a row of gy."""
        e, of, shape = self.e, self.given, self.shape
        lanes, step = shape.lanes, shape.stride[1]
        begin = column * lanes
        left = of["out_width"] - begin
        tail = e.tail(left) if edge else None
        order = [place // 2 for place in shape.halves[0]]  # of the lanes, if they are dealt
        carrier = "i16" if SCALARS[shape.stored] == 2 else shape.stored  # few processors know vectors of half types

        def y_row(start: Value) -> Value:
            if shape.spread:
                places = e.places(begin * of["y_col"], of["y_col"])
                value = e.widen(e.gather(start, places, tail, carrier), shape.stored)
            else:
                value = e.load(start, begin, tail, shape.stored)
            return e.pick(value, value, order) if shape.dealt else value

        place = begin * step + kx * shape.dilation[1]  # in the padded row, of the first lane and tap
        if shape.table:
            each = []
            for offset in shape.offsets:
                shown = e.gather(of["width_table"], e.places(place + offset, step), tail, "i64")
                each.append(e.either(tail, shown, e.number(-1)) if tail else shown)
            scaled = [e.scale_places(shown, of["x_col"]) for shown in each]

            def gathered(start: Value, real: Value) -> list[Value]:
                least = e.select(real, e.number(0), e.number((1 << 63) - 1))  # of a row in the border nothing is real
                return [
                    e.widen(e.gather(start, places, e.compare_lanes("sge", shown, least), carrier), shape.stored)
                    for shown, places in zip(each, scaled, strict=True)
                ]

            return gathered, y_row
        first = place - of["lo"]
        if step == 1:
            # No lane behind the last place of the output may bring in what is infinite: zero times that is NaN.
            masks = [
                e.within(first + offset, e.least(of["in_width"], first + offset + left)) if edge else None
                for offset in shape.offsets
            ]
            return lambda start, _: [
                e.load(start, first + offset, mask, shape.stored)
                for offset, mask in zip(shape.offsets, masks, strict=True)
            ], y_row
        if shape.dealt:
            return self.dealt(first, left if edge else None, order), y_row
        wanted = sorted({offset // step * step + i * lanes for offset in shape.offsets for i in range(step)})
        within = {at: e.within(first + at, of["in_width"]) if edge else None for at in wanted}

        def picked(start: Value, _: Value) -> list[Value]:
            parts = {at: e.load(start, first + at, mask, shape.stored) for at, mask in within.items()}
            values = []
            for offset in shape.offsets:
                at, phase = offset // step * step, offset % step
                value = e.every(step, phase, [parts[at + i * lanes] for i in range(step)])
                values.append(e.either(tail, value, e.zero) if tail else value)
            return values

        return picked, y_row

    def dealt(self, first: Value, left: Value | None, order: list[int]) -> Callable[[Value, Value], list[Value]]:
        """With a stride of 2: lanes picked inside each 128 bits, which costs nothing beside multiplications.

        So they come in an unusual order, in which gy is brought, too. What a later tap lacks is the next vector's.
        """
        e, of, shape = self.e, self.given, self.shape
        lanes, last = shape.lanes, shape.offsets[-1]
        starts = [0, lanes, 2 * lanes] if last > 1 else [0, lanes]
        masks: list[Value | None] = [None] * len(starts)
        tail = None
        if left is not None:
            masks = [e.within(first + at, of["in_width"]) for at in starts]
            numbers = e.places(e.number(0), 1)
            tail = e.compare_lanes("slt", e.pick(numbers, numbers, order), left)

        def load(start: Value, _: Value) -> list[Value]:
            parts = []
            for at, mask in zip(starts, masks, strict=True):
                if mask is None and at == 2 * lanes:
                    parts.append(e.load_first(start, first + at, last - 1, shape.stored))
                else:
                    parts.append(e.load(start, first + at, mask, shape.stored))
            phases = [e.pick(parts[0], parts[1], picks) for picks in shape.halves]
            values = []
            for offset in shape.offsets:
                shift, phase = divmod(offset, 2)
                value = phases[phase]
                if shift:
                    wanted = [number + shift for number in order]
                    picks = [order.index(n) if n < lanes else lanes + phase + 2 * (n - lanes) for n in wanted]
                    value = e.pick(value, parts[2], picks)
                values.append(e.either(tail, value, e.zero) if tail else value)
            return values

        return load


# -- the chunks, added -----------------------------------------------------------------------------------------------

TOTAL_ARGUMENTS = ("sums", "w", "bias", "places")
TOTAL_SIZES = ("chunks", "chunk", "unit", "weights", "outputs")  # of a group


@lru_cache(64)
def total(shape: Shape) -> str:
    """The kernel that adds the chunks and writes weight and bias, contiguous; `places` are those of a group's sums."""
    e = Emit(shape.lanes, shape.element, shape.native)
    given = e.arguments(*("ptr",) * len(TOTAL_ARGUMENTS), *("i64",) * len(TOTAL_SIZES))
    of = dict(zip((*TOTAL_ARGUMENTS, *TOTAL_SIZES), given, strict=True))

    def task(i: Value, _: list[Value]) -> Sequence[Value]:
        group = e.begin + i
        sums = e.at(of["sums"], group * of["unit"])

        def write(to: Value, count: Value, before: Value) -> Value:
            """`count` numbers of each group, whose places are in the table behind so many vectors; returns how many."""
            to = e.at(to, group * count, shape.stored)

            def vector(v: Value, _: list[Value]) -> Sequence[Value]:
                places = e.load_places(of["places"], (before + v) * shape.lanes)

                def chunk(k: Value, acc: list[Value]) -> Sequence[Value]:
                    return [e.add(acc[0], e.gather(e.at(sums, (k + 1) * of["chunk"]), places, None))]

                (value,) = e.loop(of["chunks"] - 1, [e.gather(sums, places, None)], chunk)
                e.store(value, to, v * shape.lanes, e.tail(count - v * shape.lanes), shape.stored)
                return []

            vectors = (count + (shape.lanes - 1)) // shape.lanes
            e.loop(vectors, [], vector)
            return vectors

        vectors = write(of["w"], of["weights"], e.number(0))
        if shape.bias:
            write(of["bias"], of["outputs"], vectors)
        return []

    e.loop(e.end - e.begin, [], task)
    return e.module()
