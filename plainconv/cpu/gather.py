"""Gathering: a strip of the padded input, copied to where it stays in the cache.

A strip is rows of the input (slots), or what a stride leaves of them, and holds what all taps of a block of the output
read.  What to copy, and which lanes of it are real, is written down once for a block (`describe`); each image, group
and channel is then copied as the list says (`fill`).  Borders, strides, dilation, half types and odd strides of memory
end here: who reads the strip knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plainconv.cpu.emit import SCALARS, Emit, Value

PICKED_STRIDE = 4  # up to this stride along the width, lanes are picked out of whole vectors; beyond, gathered
AT_ONCE = 4  # channels (or vectors of them) that are copied side by side
MOST_FIELDS = 2 + PICKED_STRIDE  # of an entry of the list

# What "reach" has of each depth of the output: the first tap that is not wholly in the padding, how many there are, and
# the same of the rows of the strip, which are in the same order.
REACH = 4


class Gather:
    """The gathering part of a kernel, whose arguments are `given` by name.

    source    "rows" (neighbours along the width lie side by side), "pixels" (neighbouring channels do), "lines" (both
              do: along the width, numbers of all channels are counted), or any memory through a "table"
    stored    type of the tensor; the strip holds accumulators
    stride    along the width, of "rows"
    pairs     the strip holds pairs of bfloat channels; "lines": bfloat numbers as they are
    """

    def __init__(
        self, e: Emit, given: Mapping[str, Value], source: str, stored: str, stride: int = 1, pairs: bool = False
    ) -> None:
        self.e, self.given = e, given
        self.source, self.stored, self.stride, self.pairs = source, stored, stride, pairs
        self.steps = 2 if pairs else 1
        # Numbers that describe one copy: from where, to where, and which lanes are real.
        self.fields = 2 + (stride if source == "rows" else 1)

    @property
    def vectors(self) -> Value:
        """Copies that fill a row of the strip: vectors, or pixels."""
        length, lanes = self.given["slot_length"], self.e.lanes
        return length if self.source == "pixels" else (length + (lanes - 1)) // lanes

    def describe(self, scratch: Value, depth: Value, row: Value, col: Value) -> None:
        """Write down what is to be copied for a block: it is the same for all images, groups and channels."""
        e, of, lanes = self.e, self.given, self.e.lanes
        entries, vectors, pixels = e.at(scratch, of["entries"]), self.vectors, self.source == "pixels"
        size = self.fields

        def each_slot(j: Value, _: list[Value]) -> Sequence[Value]:
            by_depth, by_row, by_col = (e.scalar(of["slots"], j * 3 + i, "i64") for i in range(3))
            d = e.scalar(of["depth_table"], depth * of["stride_depth"] + by_depth, "i64")
            r = e.scalar(of["row_table"], row * of["stride_rows"] + by_row, "i64")
            start = d * of["x_depth"] + r * of["x_row"]
            real = e.compare("sge", e.least(d, r), 0)

            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                at = (j * vectors + v) * size
                step = 1 if pixels else lanes
                if self.source == "lines":
                    first = col * of["stride_cols"] + v * step
                else:
                    first = (col + v * step) * of["stride_cols"] + by_col  # in the padded row
                if pixels:
                    place = e.scalar(of["col_table"], first, "i64")
                    here = e.select(e.compare("sge", place, 0), e.number(-1), e.number(0))
                    values = [start + place * of["x_col"], here]
                elif self.source == "table":
                    values = [start, first]
                else:
                    begin = first - of["lo"]
                    masks = [e.bits_within(begin + p * lanes, of["in_width"]) for p in range(self.stride)]
                    values = [start + begin, *masks]
                to = (j * of["slot_length"] + v * step) * (of["pitch"] if pixels else 1)
                if self.source != "table":
                    values[1:] = [e.select(real, bits, e.number(0)) for bits in values[1:]]
                else:
                    values[1] = e.select(real, values[1], e.number(-1))
                for i, value in enumerate((to, *values)):
                    e.put(value, entries, at + i)
                return []

            e.loop(vectors, [], each_vector)
            return []

        e.loop(of["slot_count"], [], each_slot)

    def reach(self, depth: Value, place: int) -> Value:
        """One of the numbers that `reach` has of a depth."""
        return self.e.scalar(self.given["reach"], depth * REACH + place, "i64")

    def fill(
        self,
        scratch: Value,
        x: Value,
        depth: Value,
        channels: Value,
        at: Value | int = 0,
        part: tuple[Value, Value] | None = None,
    ) -> None:
        """Fill the strip `at` a place of the scratch memory with so many channels (or pixels of them), as listed.

        part: of the copies that fill a channel, the first one and how many, if not all.
        """
        e, of = self.e, self.given
        size, strip = self.fields, e.at(scratch, at)
        first, count = part or (e.number(0), self.reach(depth, 3) * self.vectors)
        entries = e.at(e.at(scratch, of["entries"]), (self.reach(depth, 2) * self.vectors + first) * size, "i64")
        if self.source == "lines":
            e.loop(count, [], lambda i, _: self.copy_line(e.at(entries, i * size, "i64"), x, strip))
            return
        if self.source == "pixels":
            held = (channels + (self.steps - 1)) // self.steps
            e.loop(count, [], lambda i, _: self.copy_pixel(e.at(entries, i * size, "i64"), x, strip, held))
            return
        copy = self.copy_row if self.source == "rows" else self.copy_table
        # What an entry says is read once for some channels.
        most = AT_ONCE if self.source == "rows" else 1

        def copies(count_at_once: int, first: Value, alone: bool = False) -> list[Value]:
            """Some channels (or pairs) from the first on; the last of an odd number is alone in its pair."""
            to = e.at(strip, first * of["pitch"])
            begin = e.at(x, first * self.steps * of["x_channel"], self.stored)
            each = [
                e.at(begin, of["x_channel"] * i, self.stored) for i in range(1 if alone else count_at_once * self.steps)
            ]
            e.loop(count, [], lambda i, _: copy(e.at(entries, i * size, "i64"), each, to))
            return []

        full = channels // self.steps
        e.loop(full // most, [], lambda i, _: copies(most, i * most))
        if most > 1:
            e.loop(full % most, [], lambda i, _: copies(1, full // most * most + i))
        if self.pairs:
            e.loop(channels % 2, [], lambda *_: copies(1, full, alone=True))

    def copy_row(self, entry: Value, channels: Sequence[Value], to: Value) -> Sequence[Value]:
        e, lanes = self.e, self.e.lanes
        at, start, *bits = (e.scalar(entry, i, "i64") for i in range(2 + self.stride))
        masks = [e.mask(real) for real in bits]
        rows = []
        for x in channels:
            parts = [e.load(x, start + p * lanes, mask, self.stored) for p, mask in enumerate(masks)]
            rows.append(e.every(self.stride, 0, parts))
            e.prefetch(e.at(x, self.given["ahead"] + start, self.stored))
        for i, first in enumerate(range(0, len(rows), self.steps)):
            e.store(self.together(rows[first : first + self.steps]), to, self.given["pitch"] * i + at)
        return []

    def copy_line(self, entry: Value, x: Value, to: Value) -> Sequence[Value]:
        e = self.e
        at, start, bits = (e.scalar(entry, i, "i64") for i in range(3))
        mask = e.mask(bits)
        e.prefetch(e.at(x, self.given["ahead"] + start, self.stored))
        if self.pairs:
            e.carry(e.at(x, start, self.stored), e.at(to, at, self.stored), mask, self.stored)
        else:
            e.store(e.load(x, start, mask, self.stored), to, at)
        return []

    def copy_table(self, entry: Value, channels: Sequence[Value], to: Value) -> Sequence[Value]:
        e, of = self.e, self.given
        at, start, first = (e.scalar(entry, i, "i64") for i in range(3))
        # Outside along another dimension: look anywhere, take nothing.
        places = e.places(e.most(first, 0), of["stride_cols"])
        shown = e.gather(of["col_table"], places, None, "i64")
        real = e.compare_lanes("sge", shown, e.select(first < 0, e.number((1 << 63) - 1), e.number(0)))
        there = e.move_places(e.scale_places(shown, of["x_col"]), start)
        carrier = "i16" if SCALARS[self.stored] == 2 else self.stored  # not every target has vectors of half types
        rows = [e.widen(e.gather(x, there, real, carrier), self.stored) for x in channels]
        e.store(self.together(rows), to, at)
        return []

    def copy_pixel(self, entry: Value, x: Value, to: Value, channels: Value) -> Sequence[Value]:
        e, lanes = self.e, self.e.lanes
        at, start, bits = (e.scalar(entry, i, "i64") for i in range(3))

        def copy(v: Value, bits: Value) -> None:
            if self.pairs:
                value = e.load_pairs(x, start + v * (2 * lanes), e.mask(bits))
            else:
                value = e.load(x, start + v * lanes, e.mask(bits), self.stored)
            e.store(value, to, at + v * lanes)

        def some(i: Value, _: list[Value]) -> Sequence[Value]:
            for v in range(AT_ONCE):
                copy(i * AT_ONCE + v, bits)
            return []

        def rest(i: Value, _: list[Value]) -> Sequence[Value]:
            v = channels // (AT_ONCE * lanes) * AT_ONCE + i
            copy(v, e.integer("and", bits, e.bits_within(0, channels - v * lanes)))
            return []

        e.loop(channels // (AT_ONCE * lanes), [], some)
        e.loop((channels % (AT_ONCE * lanes) + (lanes - 1)) // lanes, [], rest)
        return []

    def together(self, rows: Sequence[Value]) -> Value:
        """What the strip holds of these channels."""
        if not self.pairs:
            return rows[0]
        return self.e.pairs_of(rows[0], rows[1] if len(rows) > 1 else self.e.zero)
