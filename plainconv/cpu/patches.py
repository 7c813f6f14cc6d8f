"""Strips of a tensor and the patches of their tiles, as the kernels of `winograd` and `fft` read them.

A strip is what a row of tiles reads of a vector of channels: [depth, row, column] vectors.  It is gathered with borders
and memory formats at an end; if its tiles are multiplied by matrices, that is done along the depth in place, along the
rows to columns, and along the width to where the patches of each tile are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.transforms import Matrix, Three, transform


@dataclass(frozen=True)
class Strips:
    """How strips are gathered.

    source    how channels come together: from "rows" (neighbours along the width lie side by side), from "pixels"
              (neighbouring channels do), or from any memory through a "table"
    reads     places that a tile reads, along depth, rows and width, and step: places from a tile to the next
    tables    which element of the tensor a place shows, or -1, along depth, rows and width
    places    elements from one to the next along depth, rows and width, and channel: from one channel to the next
    channels  of a group
    width     elements of a row, and lo: padding before it
    length    columns of a strip in memory
    """

    source: str
    reads: Three
    step: Three
    tables: tuple[Value, Value, Value]
    places: tuple[Value, Value, Value]
    channel: Value
    channels: Value
    width: Value
    lo: Value
    length: Value

    def columns(self, tiles: Value) -> Value:
        """That so many tiles read."""
        return (tiles - 1) * self.step[2] + self.reads[2]

    def gather(
        self, e: Emit, tensor: Value, first: Value, tile: tuple[Value, Value, Value], columns: Value, strip: Value
    ) -> None:
        """The strip of a vector of channels from the first on, of those of a group that begin at `tensor`.

        tile: the first one's numbers along depth, rows and width.  Zero in the border.
        """
        lanes, (depth_table, row_table, col_table) = e.lanes, self.tables
        by_depth, by_row, by_col = self.places
        # Channels that do not exist show the last one: nobody reads what becomes of them.
        channels = [e.least(first + i, self.channels - 1) * self.channel for i in range(lanes)]
        begin, tail = tile[2] * self.step[2], self.channels - first

        def each_line(i: Value, _: list[Value]) -> Sequence[Value]:
            depth = e.scalar(depth_table, tile[0] * self.step[0] + i // self.reads[1], "i64")
            row = e.scalar(row_table, tile[1] * self.step[1] + i % self.reads[1], "i64")
            real = e.compare("sge", e.least(depth, row), 0)
            source = e.at(tensor, depth * by_depth + row * by_row)
            to = e.at(strip, i * self.length * lanes)

            def pixel(j: Value, _: list[Value]) -> Sequence[Value]:
                place = e.scalar(col_table, begin + j, "i64")
                count = e.select(real, e.select(place >= 0, tail, e.number(0)), e.number(0))
                e.store(e.load(source, place * by_col + first, e.tail(count)), to, j * lanes)
                return []

            def square(j: Value, _: list[Value]) -> Sequence[Value]:
                if self.source == "rows":
                    place = begin + j * lanes - self.lo
                    bits = e.select(real, e.bits_within(place, self.width), e.number(0))
                    rows = [e.load(source, channel + place, e.mask(bits)) for channel in channels]
                else:
                    places = e.load_places(col_table, begin + j * lanes)
                    least = e.select(real, e.number(0), e.number((1 << 63) - 1))
                    mask = e.compare_lanes("sge", places, least)
                    scaled = e.scale_places(places, by_col)
                    rows = [e.gather(e.at(source, channel), scaled, mask) for channel in channels]
                for k, value in enumerate(e.transpose(rows)):
                    e.store(value, to, j * (lanes * lanes) + k * lanes)
                return []

            if self.source == "pixels":
                e.loop(columns, [], pixel)
            else:
                e.loop(self.length // lanes, [], square)
            return []

        e.loop(self.reads[0] * self.reads[1], [], each_line)

    def bring(
        self,
        e: Emit,
        matrices: Sequence[Matrix],
        strip: Value,
        columns: Value,
        tiles: Value,
        patch: Callable[[Value, Value], Value],
        apart: Value | int,
    ) -> None:
        """The patches of so many tiles of a strip, multiplied along depth, rows and width.

        columns: room for those of a depth.  patch: of a depth and a tile, where its numbers go, so far `apart`.
        """
        lanes, length, (_, high, wide) = e.lanes, self.length, self.reads
        along_depth, along_rows, along_width = matrices

        def along(matrix: Matrix, source: Value, step: Value, to: Value) -> None:
            loaded = [e.load(source, step * i) for i in range(len(matrix[0]))]
            for i, value in enumerate(transform(e, matrix, loaded)):
                e.store(value, to, step * i)

        if len(along_depth) > 1:
            plane = length * (high * lanes)

            def each_place(i: Value, _: list[Value]) -> Sequence[Value]:
                here = e.at(strip, i * lanes)
                along(along_depth, here, plane, here)
                return []

            e.loop(length * high, [], each_place)

        def each_depth(d: Value, _: list[Value]) -> Sequence[Value]:
            source = e.at(strip, d * (length * (high * lanes)))
            if len(along_rows) > 1:

                def each_column(i: Value, _: list[Value]) -> Sequence[Value]:
                    along(along_rows, e.at(source, i * lanes), length * lanes, e.at(columns, i * lanes))
                    return []

                e.loop(self.columns(tiles), [], each_column)
            lines = columns if len(along_rows) > 1 else source

            def each_tile(t: Value, _: list[Value]) -> Sequence[Value]:
                here, to = e.at(lines, t * (self.step[2] * lanes)), patch(d, t)
                for h in range(len(along_rows)):
                    loaded = [e.load(here, length * (h * lanes) + w * lanes) for w in range(wide)]
                    for w, value in enumerate(transform(e, along_width, loaded)):
                        e.store(value, to, apart * (h * len(along_width) + w))
                return []

            e.loop(tiles, [], each_tile)
            return []

        e.loop(len(along_depth), [], each_depth)
