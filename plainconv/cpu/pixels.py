"""The kernel of the gradient for a depthwise weight in channels_last: lanes are neighbouring channels.

    dw[c, k]  =  sum over n, h, w  of  gy[n, h, w, c] * x[n, h * stride + k * dilation - lo, c]

    share            a chunk of the rows of all planes
      row, vector    a row of gy, and some neighbouring channels of it
        tile         `high` x `wide` taps, one register of sums each
          places     gy is loaded, and multiplied by what each tap sees: a pixel, or zeros for the border
                     the sums are added to those of the chunk, in memory

so a sum is one over a row, and then one over the rows.  Inside of a row some places are taken together, for which each
pixel is loaded once, for all taps that see it; at its edges a place comes alone, and a table knows what it sees.  For
the gradient of a bias, gy itself is summed on the way: a tap that sees ones.  What adds the chunks is that of
plainconv/cpu/weights.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from plainconv.cpu.emit import SCALARS, Emit, Value

POINTERS = ("x", "y", "sums", "settled")  # what changes with every call
TABLES = ("depth_table", "row_table", "width_table", "zeros")  # bytes to what is read, or -1; and then SIZES
SIZES = (
    "channels",
    "vectors",
    "rows",  # of all planes
    "chunks",
    "chunk",  # sums from a chunk to the next
    "out_depth",
    "out_rows",
    "out_width",
    "x_image",  # elements
    "x_channel",
    "y_image",
    "y_channel",
    "y_depth",
    "y_row",
    "y_col",
    "x_col",
    "lo",  # padding before a row
    "head",  # places at the left edge
    "inside",  # times `places` after them
)


@dataclass(frozen=True)
class Shape:
    """All that the text of the kernel depends on: types, kernel, the stride and dilation of a tile's taps.

    spread    whether the channels of x, and of gy, lie apart
    high x wide: the tile; both divide the kernel
    places    that are taken together
    bias      whether gy itself is summed, too
    """

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    spread: tuple[bool, bool]
    high: int
    wide: int
    places: int
    bias: bool


@lru_cache(256)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS are its arguments, tasks are shares."""
    e = Emit(shape.lanes, shape.element, shape.native)
    given = e.arguments(*("ptr",) * len(POINTERS))
    settled = e.arguments(*("ptr",) * len(TABLES), *("i64",) * len(SIZES), within=given[-1])
    of = dict(zip((*POINTERS, *TABLES, *SIZES), (*given, *settled), strict=True))
    depth, high, wide = shape.kernel
    under: dict[int, list[tuple[int, int]]] = {}  # for each pixel, the places it serves, and by which tap
    for p in range(shape.places):
        for tap in range(shape.wide):
            under.setdefault(p * shape.stride[1] + tap * shape.dilation[1], []).append((p, tap))
    under = dict(sorted(under.items()))
    carrier = "i16" if SCALARS[shape.stored] == 2 else shape.stored  # few processors know vectors of half types

    def load(start: Value, apart: Value | None, mask: Value) -> Value:
        if apart is None:
            return e.load(start, 0, mask, shape.stored)
        return e.widen(e.gather(start, e.places(e.number(0), apart), mask, carrier), shape.stored)

    x_apart, y_apart = (
        of[name] if far else None for name, far in zip(("x_channel", "y_channel"), shape.spread, strict=True)
    )

    def keep(value: Value, to: Value, first: Value) -> None:
        """Put the sum of the first row where the others are added."""
        e.when(first, lambda: e.store(value, to), lambda: e.store(e.add(e.load(to), value), to))

    def share(i: Value, _: list[Value]) -> Sequence[Value]:
        number = e.begin + i
        first = number * of["rows"] // of["chunks"]
        sums = e.at(of["sums"], number * of["chunk"])

        def row(j: Value, _: list[Value]) -> Sequence[Value]:
            at = first + j
            plane, h = at // of["out_rows"], at % of["out_rows"]
            image, d = plane // of["out_depth"], plane % of["out_depth"]
            y_row = e.at(of["y"], image * of["y_image"] + d * of["y_depth"] + h * of["y_row"], shape.stored)
            x_image = e.at(of["x"], image * of["x_image"], shape.stored)

            def vector(v: Value, _: list[Value]) -> Sequence[Value]:
                channel = v * shape.lanes
                bits = e.bits_within(0, of["channels"] - channel)
                mask = e.mask(bits)
                y = e.at(y_row, channel * of["y_channel"], shape.stored)
                x = e.at(x_image, channel * of["x_channel"], shape.stored)

                def tile(kd: Value, ky: Value, kx: Value) -> None:
                    by_depth = e.scalar(of["depth_table"], d * depth + kd, "i64")
                    begin = h * shape.stride[0] + ky * shape.dilation[0]
                    rows = [e.scalar(of["row_table"], begin + k * shape.dilation[0], "i64") for k in range(shape.high)]
                    real = [e.least(by_depth, by_row) for by_row in rows]
                    starts = [e.at(x, by_depth + by_row, "i8") for by_row in rows]

                    def alone(n: Value, acc: list[Value]) -> Sequence[Value]:
                        w = e.select(n < of["head"], n, of["inside"] * shape.places + n)
                        given = load(e.at(y, w * of["y_col"], shape.stored), y_apart, mask)
                        result = list(acc)
                        left = w * shape.stride[1] + kx * shape.dilation[1]
                        for tap in range(shape.wide):
                            by_col = e.scalar(of["width_table"], left + tap * shape.dilation[1], "i64")
                            for k in range(shape.high):
                                seen, pixel = (
                                    e.compare("sge", e.least(real[k], by_col), 0),
                                    e.at(starts[k], by_col, "i8"),
                                )
                                i = k * shape.wide + tap
                                if x_apart is None:
                                    value = load(e.select(seen, pixel, of["zeros"]), None, mask)
                                else:
                                    value = load(pixel, x_apart, e.mask(e.select(seen, bits, e.number(0))))
                                result[i] = e.fma(value, given, result[i])
                        if shape.bias:
                            result[-1] = e.add(result[-1], given)
                        return result

                    def together(n: Value, acc: list[Value]) -> Sequence[Value]:
                        w = of["head"] + n * shape.places
                        given = [
                            load(e.at(y, (w + p) * of["y_col"], shape.stored), y_apart, mask)
                            for p in range(shape.places)
                        ]
                        result = list(acc)
                        left = w * shape.stride[1] + kx * shape.dilation[1] - of["lo"]
                        for k in range(shape.high):
                            inside = real[k] >= 0
                            # A row of the border is one pixel of zeros, over and over; or nothing is gathered there.
                            start, step, row_mask = starts[k], of["x_col"] * SCALARS[shape.stored], mask
                            if x_apart is None:
                                start = e.select(inside, start, of["zeros"])
                                step = e.select(inside, step, e.number(0))
                            else:
                                row_mask = e.mask(e.select(inside, bits, e.number(0)))
                            pixel, before = e.at(start, left * step, "i8"), 0
                            for place, meets in under.items():
                                pixel, before = e.at(pixel, step * (place - before), "i8"), place
                                value = load(pixel, x_apart, row_mask)
                                for p, tap in meets:
                                    i = k * shape.wide + tap
                                    result[i] = e.fma(value, given[p], result[i])
                        if shape.bias:
                            result[-1] = reduce(e.add, given, result[-1])
                        return result

                    taps = shape.high * shape.wide
                    acc = e.loop(of["inside"], [e.zero] * (taps + shape.bias), together)
                    acc = e.loop(of["out_width"] - of["inside"] * shape.places, acc, alone)
                    each, first_tap = depth * high * wide, (kd * high + ky) * wide + kx
                    total, is_first = e.at(sums, v * ((each + shape.bias) * shape.lanes)), e.compare("eq", j, 0)
                    for i, value in enumerate(acc[:taps]):
                        k, tap = divmod(i, shape.wide)
                        keep(value, e.at(total, (first_tap + (k * wide + tap)) * shape.lanes), is_first)
                    if shape.bias:  # one tile's will do
                        to = e.at(total, each * shape.lanes)
                        e.when(e.compare("eq", first_tap, 0), lambda: keep(acc[-1], to, is_first))

                def each_depth(kd: Value, _: list[Value]) -> Sequence[Value]:
                    def each_high(a: Value, _: list[Value]) -> Sequence[Value]:
                        def each_wide(b: Value, _: list[Value]) -> Sequence[Value]:
                            tile(kd, a * shape.high, b * shape.wide)
                            return []

                        e.loop(wide // shape.wide, [], each_wide)
                        return []

                    e.loop(high // shape.high, [], each_high)
                    return []

                e.loop(depth, [], each_depth)
                return []

            e.loop(of["vectors"], [], vector)
            return []

        e.loop((number + 1) * of["rows"] // of["chunks"] - first, [], row)
        return []

    e.loop(e.end - e.begin, [], share)
    return e.module()
