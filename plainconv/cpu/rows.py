"""The kernel of `narrow` and `depthwise`: lanes are neighbours along the width, in and out.

    y[o, h, w]  =  bias[o]  +  sum over c, k  of  weight[o, c, k] * x[c, h * stride + k * dilation - lo]

All of it is three-dimensional (depth, rows, width); what has fewer dimensions has sizes of 1 in front.  A tile is

    outputs x rows x vectors        output channels, rows, and vectors side by side: one register each

and the loops are, from the outside in,

    task        an image, a group, a depth and `rows` rows of the output
      fill      the addresses of the input rows that the task reads, for every tap outside the tile
      column    vectors along the width
        outputs tiles of output channels
          c, step   input channels; taps along the depth, and along the rows in chunks of `inner`
            kx        taps along the width, a group at a time
              weights of the group: broadcast, and kept in registers
              each input row of the tile: loaded once, multiplied by all weights and added to all sums that it meets

so that an input row is loaded once for all taps of a chunk and all output rows: 7 rows of a 3x3 kernel load 9 rows, not
21.  With a stride, the taps of a group share what they load, too: whole vectors are loaded, and each tap picks lanes.

Memory may hold half types: they become float when they are loaded, and are rounded once, when they are stored.  The
epilogue (residual, activation) is applied to the sums before that.

A row of the border is a row of zeros, named by a table (-1), and multiplied as any other; a plane of the border is
left out, but for the zeros that its weights would give.  Along the width most
columns lie inside, where loads need no care.  The columns at the edges (and those that do not fill a tile) load under
masks: lanes in the border are zeros and nothing outside is read; for the other padding modes they are gathered through
a table.  A stride of more than 4 gathers, and so does an input whose rows are not contiguous (`spread`).

Sizes are arguments: `Shape` has all that the text depends on.  Of the tile, it is the caller who knows which sizes have
one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from plainconv.cpu.emit import HALVES, SCALARS, Emit, Value
from plainconv.cpu.epilogue import finish
from plainconv.cpu.weight import Weight

PICKED_STRIDE = 4  # up to this stride, lanes are picked out of whole vectors; beyond, they are gathered
UNROLLED = 200  # products in a row, at most, where taps along the width are unrolled

AHEAD = 8  # vectors between what a tile reads and writes and what is asked for meanwhile; 4 to 16 differ little

POINTERS = ("x", "w", "bias", "residual", "y", "depth_table", "row_table", "width_table", "masks", "zeros")
SIZES = (
    "x_image",  # bytes from an image to the next, and so on
    "x_channel",
    "x_depth",
    "x_row",
    "x_pixel",  # elements
    "y_channel",  # elements, of the residual too
    "y_depth",
    "y_row",
    "groups",
    "group_in",
    "group_out",
    "lo",  # padding before a row; negative: elements cropped
    "in_width",
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

    element is the type of the sums, stored that of memory, native what `Emit` may leave to the processor.  weight:
    where its taps are; apart: from one place of a row of the result to the next, in elements.  kernel, and
    stride and dilation of rows and width; `thick`: whether there are taps or a border along the depth; `sides`: whether
    the width has a "mask" border or reads a "table"; `spread`: whether the pixels of an input row lie apart; `wide`:
    whether rows are so long that what lies AHEAD is asked for.  The tile: outputs (`one_tile`: there are no more), rest
    (a last tile of fewer, or 0), rows, vectors, and `inner`: how many taps of the rows are unrolled, so that output
    rows share the input rows they load.  registers: how many the processor has.
    """

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    weight: Weight
    apart: int
    kernel: tuple[int, int, int]
    thick: bool
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: str
    spread: bool
    wide: bool
    one_channel: bool
    has_bias: bool
    has_residual: bool
    activation: str | None
    outputs: int
    rest: int
    one_tile: bool
    rows: int
    vectors: int
    inner: int
    registers: int

    @property
    def places(self) -> tuple[int, ...]:
        """The input rows of a tile, counted from where its first tap begins."""
        steps = (r * self.stride[0] + k * self.dilation[0] for r in range(self.rows) for k in range(self.inner))
        return tuple(sorted(set(steps)))

    @property
    def chunks(self) -> int:
        """How many times a tile takes up new rows, for each input channel and tap along the depth."""
        return -(-self.kernel[1] // self.inner)

    @property
    def gathers(self) -> bool:
        """Whether each lane is loaded by itself."""
        return self.spread or self.stride[1] > PICKED_STRIDE

    @property
    def unrolled(self) -> bool:
        """Whether the taps along the width are unrolled, and not a loop."""
        return self.kernel[2] * self.inner * self.outputs * self.rows * self.vectors <= UNROLLED

    @property
    def groups(self) -> list[list[int]]:
        """The taps along the width, in groups whose weights are kept in registers and share loads."""
        if not self.unrolled:
            return [[0]]
        picked = self.stride[1] > 1 and not self.gathers
        spare = self.registers - self.outputs * self.rows * self.vectors - (4 if picked else 2)
        size = max(spare // (self.outputs * self.inner), 1)
        if picked:
            size = min(size, self.lanes // self.dilation[1] + 1)
        taps = list(range(self.kernel[2]))
        return [taps[i : i + size] for i in range(0, len(taps), size)]

    @property
    def pitch(self) -> int:
        """Masks that belong to a column at the edge: of its store, and of vectors from each place behind its first."""
        return 1 + (self.kernel[2] - 1) * self.dilation[1] + self.stride[1] * self.lanes + 1

    @property
    def in_place(self) -> bool:
        """Whether all that a stride picks can be picked inside each 128 bits of a vector: see `halves`."""
        return not self.gathers and self.stride[1] in (2, 4) and 16 // SCALARS[self.element] >= self.stride[1]

    @property
    def order(self) -> list[int]:
        """Which of its outputs each lane of a vector holds, where a stride picks lanes."""
        if not self.in_place:
            return list(range(self.lanes))
        parts = [list(range(i * self.lanes, (i + 1) * self.lanes)) for i in range(self.stride[1])]
        while len(parts) > 1:
            parts = [[(a + b)[i] for i in halves(self, 0)] for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return [element // self.stride[1] for element in parts[0]]


def halves(shape: Shape, phase: int) -> list[int]:
    """Every second lane of two vectors, picked inside each 128 bits.

    So they come in an unusual order. But shuffles inside of 128 bits cost nothing beside multiplications, and those
    across cost as much as one (measured on Zen 4).
    """
    size = 16 // SCALARS[shape.element]
    return [
        of * shape.lanes + group + i
        for group in range(0, shape.lanes, size)
        for of in (0, 1)
        for i in range(phase, size, 2)
    ]


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS and SIZES are its arguments, tasks count image, group, depth, block."""
    return _Rows(shape).kernel()


class _Rows:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element, shape.native)
        given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
        self.given = dict(zip((*POINTERS, *SIZES), given, strict=True))
        if shape.one_channel:
            self.given["group_in"] = e.number(1)
        # Where each input row begins in the first channel and depth; whether it lies elsewhere in others (all bits set;
        # no bit for a row of the border); and how far its pixels lie apart, if they do.
        count = shape.chunks * len(shape.places)
        self.starts = e.opaque(e.stack("ptr", count))
        self.moves = e.opaque(e.stack("i64", count)) if shape.thick or not shape.one_channel else None
        self.pixels = e.opaque(e.stack("i64", count)) if shape.spread else None

    @property
    def weight_steps(self) -> tuple[Value, Value]:
        """From an output channel to the next in the weight, and from an input channel to the next."""
        of, weight = self.given, self.shape.weight
        inner, outer = (
            self.e.number(weight.all_taps),
            of["group_out" if weight.turned else "group_in"] * weight.all_taps,
        )
        return (inner, outer) if weight.turned else (outer, inner)

    def kernel(self) -> str:
        e, of = self.e, self.given
        blocks, depth, groups = of["blocks"], of["out_depth"], of["groups"]
        rest, image = e.begin // blocks, e.begin // (blocks * depth * groups)
        plane = rest // depth

        def task(_: Value, state: list[Value]) -> Sequence[Value]:
            block, d, group, image = state
            row = e.least(block * self.shape.rows, of["out_rows"] - self.shape.rows)  # the last block may overlap
            self.fill(image, group, d, block)
            self.columns(image, group, d, row)
            # The next task: count as a clock does, without division.
            block = block + 1
            over = e.compare("sge", block, blocks)
            block, d = e.select(over, e.number(0), block), e.select(over, d + 1, d)
            over = e.compare("sge", d, depth)
            d, group = e.select(over, e.number(0), d), e.select(over, group + 1, group)
            over = e.compare("sge", group, groups)
            return [block, d, e.select(over, e.number(0), group), e.select(over, image + 1, image)]

        e.loop(e.end - e.begin, [e.begin % blocks, rest % depth, plane % groups, image], task)
        return e.module()

    def fill(self, image: Value, group: Value, d: Value, block: Value) -> None:
        """Write down where the input rows of a task begin; a row of the border is the row of zeros."""
        e, of, shape = self.e, self.given, self.shape
        count = len(shape.places)
        x = e.address(of["x"]) + image * of["x_image"] + group * of["group_in"] * of["x_channel"]
        if not shape.thick:
            x = x + e.scalar(of["depth_table"], d, "i64") * of["x_depth"]
        zeros = e.address(of["zeros"])

        def each_chunk(chunk: Value, _: list[Value]) -> Sequence[Value]:
            for i in range(count):
                row = e.scalar(of["row_table"], (block * shape.chunks + chunk) * count + i, "i64")
                real, slot = row >= 0, chunk * count + i
                e.put(e.select(real, x + row * of["x_row"], zeros), self.starts, slot)
                if self.moves is not None:
                    e.put(e.select(real, e.number(-1), e.number(0)), self.moves, slot)
                if self.pixels is not None:
                    e.put(e.select(real, of["x_pixel"], e.number(0)), self.pixels, slot)
            return []

        e.loop(shape.chunks, [], each_chunk)

    def columns(self, image: Value, group: Value, d: Value, row: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        out_channel = of["y_channel"]
        begin = (image * of["groups"] + group) * of["group_out"] * out_channel + d * of["y_depth"] + row * of["y_row"]

        def tile(vector: Value, edge: Value | None) -> None:
            """All output channels of one column of vectors; edge: its masks, if it lies at an edge."""

            def outputs(first: Value, count: int) -> None:
                column = vector * shape.lanes
                vectors = 1 if edge else shape.vectors
                if shape.wide and edge is None:
                    self.ask_for_output(begin + first * out_channel + column * shape.apart, count, out_channel)
                acc = self.sums(group, first, count, d, column, vectors, edge)
                mask = e.load_mask(edge, 0) if edge else None
                if shape.order != sorted(shape.order) and not (edge and shape.sides == "table"):
                    back = [shape.order.index(lane) for lane in range(shape.lanes)]
                    acc = [e.pick(vector, vector, back) for vector in acc]
                for o in range(count):
                    at = begin + (first + o) * out_channel + column * shape.apart
                    out = e.opaque(e.at(of["y"], at, shape.stored))
                    other = e.opaque(e.at(of["residual"], at, shape.stored)) if shape.has_residual else None
                    for r in range(shape.rows):
                        for v in range(vectors):
                            at = of["y_row"] * r + v * shape.lanes * shape.apart
                            self.put(acc[(o * shape.rows + r) * vectors + v], out, other, at, mask)

            def whole(i: Value, _: list[Value]) -> Sequence[Value]:
                outputs(i * shape.outputs, shape.outputs)
                return []

            e.loop(1 if shape.one_tile else of["tiles"], [], whole)
            if shape.rest:
                outputs(of["tiles"] * shape.outputs, shape.rest)

        def inside(i: Value, _: list[Value]) -> Sequence[Value]:
            tile(of["head"] + i * shape.vectors, None)
            return []

        def edge(i: Value, _: list[Value]) -> Sequence[Value]:
            behind = i + of["inside"] * shape.vectors
            vector = e.select(i < of["head"], i, behind)
            tile(vector, e.at(of["masks"], i * shape.pitch, "i16"))
            return []

        e.loop(of["inside"], [], inside)
        e.loop(of["single"], [], edge)

    def put(self, total: Value, out: Value, other: Value | None, at: Value, mask: Value | None) -> None:
        """Finish and write a vector of the result, and nothing between places that lie apart."""
        e, shape = self.e, self.shape
        if shape.apart == 1:
            added = e.load(other, at, mask, shape.stored) if other else None
            e.store(finish(e, total, added, shape.activation), out, at, mask, shape.stored)
            return
        added = None
        if other:
            held = "i16" if shape.stored in HALVES else shape.stored
            added = e.widen(e.gather(other, e.places(at, shape.apart), mask, held), shape.stored)
        total = finish(e, total, added, shape.activation)
        for part in range(shape.apart):
            spread, real = e.spread(total, shape.apart, part, mask)
            e.store(spread, out, at + part * shape.lanes, real, shape.stored)

    def sums(
        self, group: Value, first: Value, outputs: int, d: Value, column: Value, vectors: int, edge: Value | None
    ) -> list[Value]:
        """The accumulators [outputs, rows, vectors] of one tile."""
        e, of, shape = self.e, self.given, self.shape
        depth, high, width = shape.kernel
        if shape.has_bias:
            channel = group * of["group_out"] + first
            biases = [e.broadcast(e.scalar(of["bias"], channel + o, shape.stored)) for o in range(outputs)]
        else:
            biases = [e.zero] * outputs
        acc = [biases[o] for o in range(outputs) for _ in range(shape.rows * vectors)]
        w_output, w_channel = self.weight_steps
        w = group * of["group_in"] * of["group_out"] * shape.weight.all_taps + first * w_output + shape.weight.first
        w_first, (w_depth, w_row, w_col) = e.at(of["w"], w, shape.stored), shape.weight.steps
        left = column * shape.stride[1]  # the place in the padded row where the first tap begins

        def each_channel(c: Value, acc: list[Value]) -> Sequence[Value]:
            w = e.at(w_first, c * w_channel, shape.stored)

            def chunk(kd: Value, moved: Value, number: Value | int, inner: int, acc: list[Value]) -> list[Value]:
                rows = {}
                wanted = {r * shape.stride[0] + k * shape.dilation[0] for r in range(shape.rows) for k in range(inner)}
                for i, place in enumerate(shape.places):
                    if place in wanted:
                        slot = e.number(number) * len(shape.places) + i
                        start = e.scalar(self.starts, slot, "ptr")
                        if self.moves is not None:
                            start = e.at(start, e.integer("and", moved, e.scalar(self.moves, slot, "i64")), "i8")
                        pixel = None if self.pixels is None else e.scalar(self.pixels, slot, "i64")
                        rows[place] = _Row(start, pixel)
                if shape.wide and edge is None and not shape.gathers:
                    self.ask_for_input(rows, left, inner, vectors)
                w_chunk = e.at(w, kd * w_depth + e.number(number) * (shape.inner * w_row), shape.stored)
                tile = _Tile(outputs, vectors, inner, rows, edge)
                if shape.unrolled:
                    for taps in shape.groups:
                        acc = self.group(acc, tile, w_chunk, left, 0, taps)
                    return acc

                def each_tap(kx: Value, acc: list[Value]) -> Sequence[Value]:
                    w_tap = e.at(w_chunk, kx * w_col, shape.stored)
                    return self.group(acc, tile, w_tap, left, kx * shape.dilation[1], [0])

                return e.loop(width, acc, each_tap)

            def plane(kd: Value, moved: Value, acc: list[Value]) -> list[Value]:
                whole, rest = divmod(high, shape.inner)
                acc = e.loop(whole, acc, lambda number, acc: chunk(kd, moved, number, shape.inner, acc))
                return chunk(kd, moved, whole, rest, acc) if rest else acc

            moved = c * of["x_channel"]
            if not shape.thick:
                return plane(e.number(0), moved, acc)
            shown = e.at(of["depth_table"], d * (2 + depth), "i64")
            first, count = e.scalar(shown, 0, "i64"), e.scalar(shown, 1, "i64")

            def each_plane(i: Value, acc: list[Value]) -> Sequence[Value]:
                kd = first + i
                return plane(kd, moved + e.scalar(shown, kd + 2, "i64") * of["x_depth"], acc)

            def nothing(i: Value, acc: list[Value]) -> Sequence[Value]:
                """A plane of the border: each weight times zero, which is NaN if it is not finite, and else nothing."""
                taps = e.at(w, e.select(i < first, i, i + count) * w_depth, shape.stored)

                def each_tap(k: Value, total: list[Value]) -> Sequence[Value]:
                    at = [w_output * o + k for o in range(outputs)]
                    weights = [e.broadcast(e.scalar(taps, o, shape.stored)) for o in at]
                    return [e.fma(weight, e.zero, old) for weight, old in zip(weights, total, strict=True)]

                total = e.loop(high * width, [e.zero] * outputs, each_tap)
                each = shape.rows * vectors
                return [e.add(old, total[i // each]) for i, old in enumerate(acc)]

            acc = e.loop(count, acc, each_plane)
            # The border of a gradient is not there, not even as zeros.
            return acc if shape.weight.turned else e.loop(depth - count, acc, nothing)

        return e.loop(1 if shape.one_channel else of["group_in"], acc, each_channel)

    # Many rows are read and written at once, more than processors foresee: so their next columns are asked for.

    def ask_for_input(self, rows: dict[int, _Row], left: Value, inner: int, vectors: int) -> None:
        """Those lines of the cache that a chunk of taps will read AHEAD vectors later."""
        e, shape = self.e, self.shape
        ahead = left - self.given["lo"] + AHEAD * shape.lanes * shape.stride[1]
        step = 64 // SCALARS[shape.stored]
        for row in rows.values():
            for line in range(-(-vectors * shape.lanes * shape.stride[1] // step)):
                e.prefetch(e.at(row.start, ahead + line * step, shape.stored))

    def ask_for_output(self, at: Value, outputs: int, out_channel: Value) -> None:
        """And those that a tile will write then."""
        e, of, shape = self.e, self.given, self.shape
        for o in range(outputs):
            out = e.opaque(e.at(of["y"], at + out_channel * o + AHEAD * shape.lanes, shape.stored))
            for r in range(shape.rows):
                e.prefetch(e.at(out, of["out_width"] * r, shape.stored), "write")

    def group(
        self, acc: list[Value], tile: _Tile, w: Value, left: Value, begin: Value | int, taps: list[int]
    ) -> list[Value]:
        """Add what these taps along the width give; the first of all begins `begin` places behind `left`."""
        e, shape = self.e, self.shape
        acc, w_output, (_, w_row, w_col) = list(acc), self.weight_steps[0], shape.weight.steps
        weights = {
            (o, k, kx): e.broadcast(e.scalar(w, w_output * o + (k * w_row + kx * w_col), shape.stored))
            for k in range(tile.inner)
            for o in range(tile.outputs)
            for kx in taps
        }
        load = self.loader(left, begin, taps, tile.edge)
        for place, row in tile.rows.items():
            meets = [
                (r, k)
                for r in range(shape.rows)
                for k in range(tile.inner)
                if r * shape.stride[0] + k * shape.dilation[0] == place
            ]
            for v in range(tile.vectors):
                for kx, x in zip(taps, load(row, v), strict=True):
                    for r, k in meets:
                        for o in range(tile.outputs):
                            i = (o * shape.rows + r) * tile.vectors + v
                            acc[i] = e.fma(x, weights[o, k, kx], acc[i])
        return acc

    def loader(
        self, left: Value, begin: Value | int, taps: list[int], edge: Value | None
    ) -> Callable[[_Row, int], list[Value]]:
        """A function: from an input row, and the number of a vector in the tile, to what each tap sees of it."""
        e, of, shape = self.e, self.given, self.shape
        stride, lanes = shape.stride[1], shape.lanes
        begin = e.number(begin)
        offsets = [kx * shape.dilation[1] for kx in taps]

        def gather(row: _Row, places: Value, real: Value | None) -> Value:
            if row.pixel is not None:
                places = e.scale_places(places, row.pixel)
            held = "i16" if shape.stored in HALVES else shape.stored  # few processors know vectors of half types
            return e.widen(e.gather(row.start, places, real, held), shape.stored)

        if edge and shape.sides == "table":
            shown = []
            for offset in offsets:
                place = left + begin + offset
                if stride == 1:
                    shown.append(e.load_places(of["width_table"], place))
                else:
                    shown.append(e.gather(of["width_table"], e.places(place, stride), None, "i64"))
            real = [e.compare_lanes("sge", places, 0) for places in shown]
            return lambda row, v: [gather(row, *where) for where in zip(shown, real, strict=True)]
        first = left - of["lo"] + begin
        if shape.gathers:

            def gathered(row: _Row, v: int) -> list[Value]:
                each = []
                for offset in offsets:
                    places = e.places(first + (offset + v * lanes * stride), stride)
                    real = e.compare_lanes("ult", places, of["in_width"]) if edge else None
                    each.append(gather(row, places, real))
                return each

            return gathered
        masks: dict[int, Value] = {}

        def vector(row: _Row, offset: int, least: int = lanes) -> Value:
            if edge is None:
                return e.load_first(row.start, first + offset, least, shape.stored)
            if offset not in masks:
                masks[offset] = e.load_mask(edge, begin + (offset + 1))
            return e.load(row.start, first + offset, masks[offset], shape.stored)

        def loaded(row: _Row, v: int) -> list[Value]:
            start = v * lanes * stride
            if stride == 1:
                return [vector(row, start + offset) for offset in offsets]
            reach = offsets[-1] - offsets[0] + stride * (lanes - 1)
            parts = [vector(row, start + offsets[0] + i * lanes) for i in range(stride)]
            if reach >= stride * lanes:
                parts.append(vector(row, start + offsets[0] + stride * lanes, reach - stride * lanes + 1))
            return self.picked(parts, [offset - offsets[0] for offset in offsets])

        return loaded

    def picked(self, parts: list[Value], offsets: list[int]) -> list[Value]:
        """Out of vectors that lie side by side: for each offset, every `stride`-th element from there, in `order`."""
        e, stride, lanes, order = self.e, self.shape.stride[1], self.shape.lanes, self.shape.order
        phases = self.apart(parts[:stride], stride)
        result = []
        for offset in offsets:
            shift, phase = divmod(offset, stride)
            vector = phases[phase]
            # What the shift brings in lies in the next part, which is not yet taken apart.
            if shift:
                wanted = [o + shift for o in order]
                picks = [order.index(o) if o < lanes else lanes + phase + stride * (o - lanes) for o in wanted]
                vector = e.pick(vector, parts[stride], picks)
            result.append(vector)
        return result

    def apart(self, parts: list[Value], stride: int) -> list[Value]:
        """`stride` vectors that lie side by side, dealt out: every `stride`-th element, from each of the first ones."""
        e, lanes = self.e, self.shape.lanes
        if stride == 1:
            return parts
        if self.shape.in_place:
            pairs = list(zip(parts[::2], parts[1::2], strict=True))
            even, odd = ([e.pick(a, b, halves(self.shape, phase)) for a, b in pairs] for phase in (0, 1))
            dealt = zip(self.apart(even, stride // 2), self.apart(odd, stride // 2), strict=True)
            return [vector for both in dealt for vector in both]
        vectors = []
        for phase in range(stride):
            wanted = [divmod(phase + stride * lane, lanes) for lane in range(lanes)]
            vector = parts[0]
            for number in range(1, stride):  # the lanes of this part come in, the others stay
                stay = range(lanes) if number > 1 else [at for _, at in wanted]
                picks = [lanes + at if part == number else old for old, (part, at) in zip(stay, wanted, strict=True)]
                vector = e.pick(vector, parts[number], picks)
            vectors.append(vector)
        return vectors


class _Row(NamedTuple):
    """Where an input row begins, and the elements from pixel to pixel, if that is not 1."""

    start: Value
    pixel: Value | None


@dataclass(frozen=True)
class _Tile:
    """What is being summed: output channels, vectors, taps along the rows, where input rows begin, masks at an edge."""

    outputs: int
    vectors: int
    inner: int
    rows: dict[int, _Row]
    edge: Value | None
