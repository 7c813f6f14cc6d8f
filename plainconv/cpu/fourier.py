"""The kernels of `fft` on the engine: Winograd's, at the roots of unity, and with a long kernel cut into blocks.

Multiplication of polynomials may be done at any points (see plainconv.cpu.transforms).  At the F roots of unity the
matrices are discrete Fourier transforms of length F, which cost F log F, need no number larger than 1, and so lose no
digits however large F is.  Numbers are complex there, in pairs for what is real, and a complex product is three real
ones:

    (a + ib)(c + id)  =  (p - r) + i(p + q)        p = (a + b) c,   q = a (d - c),   r = b (c + d)

so a row of F places becomes 3F/2 - 1 numbers to multiply, and all that follows is Winograd's: dimension by dimension,
a matrix product over channels for each of the numbers, and back.  As the sum is a correlation, the kernel's transform
is conjugated: c - id.

Along the width a kernel may be longer than a row.  Its taps are then cut into blocks of F/2, as many as a tile has
outputs.  What block b reads for tile t is what the first one reads for tile t + b: the patches are made once, for as
many tiles more, and blocks are summed over like channels.

T. Stockham, "High-speed convolution and correlation", 1966; H. Sorensen et al., "Real-valued fast Fourier transform
algorithms", 1987.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.transforms import Three
from plainconv.cpu.winograd import Block, Shape, Winograd

AHEAD = 1  # channels of the weight that are asked for before they are needed


# -- transforms ------------------------------------------------------------------------------------------------------


class Fourier:
    """Transforms of rows of `length` vectors of real numbers; a length of 1 leaves them alone."""

    def __init__(self, e: Emit, length: int) -> None:
        self.e, self.length = e, length

    @property
    def numbers(self) -> int:
        """To multiply."""
        return numbers(self.length)

    def forth(self, row: Sequence[Value]) -> list[Value]:
        """The input's numbers: first, last, and a + b, a, b of all between."""
        if self.length == 1:
            return list(row)
        e = self.e
        first, *between, last = self.spectrum([*row, *[e.zero] * (self.length - len(row))])
        return [first[0], last[0], *(number for a, b in between for number in (e.add(a, b), a, b))]

    def weigh(self, taps: Sequence[Value]) -> list[Value]:
        """The kernel's numbers, conjugated and divided by the length: first, last, and c, d - c, c + d."""
        if self.length == 1:
            return list(taps)
        e = self.e
        scale = e.constant(1 / self.length)
        scaled = [e.multiply(tap, scale) for tap in taps]
        first, *between, last = self.spectrum([*scaled, *[e.zero] * (self.length - len(taps))])
        # d is minus what the transform gives.
        mixed = (number for c, d in between for number in (c, e.subtract(e.zero, e.add(c, d)), e.subtract(c, d)))
        return [first[0], last[0], *mixed]

    def back(self, products: Sequence[Value], count: int) -> list[Value]:
        """The first `count` outputs."""
        if self.length == 1:
            return list(products)
        e = self.e
        first, last, *rest = products
        between = [(e.subtract(p, r), e.add(p, q)) for p, q, r in zip(*[iter(rest)] * 3, strict=True)]
        return self.row([(first, first), *between, (last, last)])[:count]

    def spectrum(self, row: list[Value]) -> list[tuple[Value, Value]]:
        """Of n real numbers the first n/2 + 1 frequencies; the imaginary parts of the first and the last are nothing.

        X(k) = E(k) + u^k O(k) and X(n/2 - k) = conj(E(k) - u^k O(k)), of the even and the odd places, u^n = 1.
        """
        e, n = self.e, len(row)
        if n == 1:
            return [(row[0], e.zero)]
        if self._empty(row):
            return [(e.zero, e.zero)] * (n // 2 + 1)
        even, odd = self.spectrum(row[::2]), self.spectrum(row[1::2])
        found = [(e.zero, e.zero)] * (n // 2 + 1)
        found[0] = self._add(even[0][0], odd[0][0]), e.zero
        found[n // 2] = self._subtract(even[0][0], odd[0][0]), e.zero
        if n % 4 == 0:
            found[n // 4] = even[n // 4][0], self._subtract(e.zero, odd[n // 4][0])
        for k in range(1, -(-n // 4)):
            (a, b), (c, d) = even[k], self._turn(odd[k], -k, n)
            found[k] = self._add(a, c), self._add(b, d)
            found[n // 2 - k] = self._subtract(a, c), self._subtract(d, b)
        return found

    def row(self, spectrum: list[tuple[Value, Value]]) -> list[Value]:
        """The other way, n times as large."""
        e, half = self.e, len(spectrum) - 1
        if half == 0:
            return [spectrum[0][0]]
        n = 2 * half
        first, last = spectrum[0][0], spectrum[half][0]
        even, odd = [(e.add(first, last), e.zero)], [(e.subtract(first, last), e.zero)]
        for k in range(1, -(-n // 4)):
            (a, b), (c, d) = spectrum[k], spectrum[half - k]
            even.append((e.add(a, c), e.subtract(b, d)))
            odd.append(self._turn((e.subtract(a, c), e.add(b, d)), k, n))
        if n % 4 == 0:
            a, b = spectrum[n // 4]
            even.append((e.add(a, a), e.zero))
            odd.append((e.multiply(b, e.constant(-2.0)), e.zero))
        return [place for pair in zip(self.row(even), self.row(odd), strict=True) for place in pair]

    def _turn(self, value: tuple[Value, Value], k: int, n: int) -> tuple[Value, Value]:
        """value * exp(2 pi i k / n), with 0 < |k| < n/4."""
        e, (a, b) = self.e, value
        if self._empty(value):
            return value
        cos, sin = e.constant(math.cos(2 * math.pi * k / n)), math.sin(2 * math.pi * k / n)
        if 8 * abs(k) == n:
            both = e.add(a, b), e.subtract(a, b)
            plus, minus = (e.multiply(number, cos) for number in both)
            return (minus, plus) if k > 0 else (plus, e.subtract(e.zero, minus))
        return (
            e.fma(b, e.constant(-sin), e.multiply(a, cos)),
            e.fma(a, e.constant(sin), e.multiply(b, cos)),
        )

    # Zeros that are known cost nothing: a kernel is shorter than its row.

    def _empty(self, values: Sequence[Value]) -> bool:
        return all(value.text == self.e.zero.text for value in values)

    def _add(self, a: Value, b: Value) -> Value:
        if self._empty([b]):
            return a
        return b if self._empty([a]) else self.e.add(a, b)

    def _subtract(self, a: Value, b: Value) -> Value:
        return a if self._empty([b]) else self.e.subtract(a, b)


def numbers(length: int) -> int:
    """Real products of a row of a length that is 1 or a power of two."""
    return max(3 * length // 2 - 1, 1)


# -- the convolution -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows(Shape):
    """Beside Winograd's: the lengths of the transforms, along depth, rows and width, and blocks along the width.

    taps are those of a block; the last one may have fewer: the kernel has `kernel` along the width.
    """

    lengths: Three = (1, 1, 1)
    blocks: int = 1
    kernel: int = 1

    @property
    def patch(self) -> Three:
        """Places of the input that a tile reads."""
        return self.lengths

    @property
    def step(self) -> Three:
        """Places from a tile to the next."""
        return self.tile


@lru_cache(256)
def text(shape: Rows) -> str:
    """The kernel of this shape: plainconv.cpu.winograd.POINTERS are its arguments, tasks are shares."""
    return _Fourier(shape).kernel()


class _Fourier(Winograd):
    shape: Rows

    def prepare(self) -> None:
        e, shape = self.e, self.shape
        self.high, self.wide = (Fourier(e, length) for length in shape.lengths[1:])
        self.matrices = self.high.numbers * self.wide.numbers
        lanes = shape.lanes
        if shape.does in ("weight", "back"):
            self.squares = -(-shape.taps[1] * shape.taps[2] // lanes)
            self.across = e.stack(shape.element, self.squares * lanes * lanes)  # [tap] vectors of outputs
            self.planes = e.stack(shape.element, shape.taps[1] * self.wide.numbers * lanes)
        if shape.does in ("all", "back"):
            self.half = e.stack(shape.element, shape.tile[1] * self.wide.numbers * lanes)

    def line(self, cols: Value) -> Value:
        return cols + (self.shape.blocks - 1)

    def patches(self, rows: Value, cols: Value) -> Value:
        return rows * self.line(cols) - (self.shape.blocks - 1)

    @property
    def slabs(self) -> Value:
        return self.given["in_vectors"] * self.shape.blocks

    def slab(self, number: Value) -> tuple[Value, Value]:
        of, lanes = self.given, self.shape.lanes
        vector, block = number // self.shape.blocks, number % self.shape.blocks
        return vector * (self.matrices * lanes) + block * of["patch"], of["group_in"] - vector * lanes

    def bring(self, block: Block, group: Value, row: Value, vector: Value, scratch: Value, patches: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        lanes, length, wide = shape.lanes, of["length"], self.wide.numbers
        strip, columns = e.at(scratch, of["strip_at"]), e.at(scratch, of["columns_at"])
        self.gather(block, group, block.row + row, vector, strip)
        tiles = self.line(block.cols)
        if self.high.length > 1:

            def each_column(i: Value, _: list[Value]) -> Sequence[Value]:
                loaded = [e.load(strip, length * (h * lanes) + i * lanes) for h in range(self.high.length)]
                for h, value in enumerate(self.high.forth(loaded)):
                    e.store(value, columns, length * (h * lanes) + i * lanes)
                return []

            e.loop((tiles - 1) * shape.tile[2] + shape.lengths[2], [], each_column)
        lines = columns if self.high.length > 1 else strip
        first = row * tiles

        def each_tile(t: Value, _: list[Value]) -> Sequence[Value]:
            to = e.at(patches, (first + t) * of["patch"] + vector * (self.matrices * lanes))

            def each_line(h: Value, _: list[Value]) -> Sequence[Value]:
                here = e.at(lines, (length * h + t * shape.tile[2]) * lanes)
                loaded = [e.load(here, w * lanes) for w in range(self.wide.length)]
                for w, value in enumerate(self.wide.forth(loaded)):
                    e.store(value, to, h * (wide * lanes) + w * lanes)
                return []

            e.loop(self.high.numbers, [], each_line)
            return []

        e.loop(tiles, [], each_tile)

    def turn_back(self, cols: Value, group: Value, first: Value, sums: Value, made: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        lanes, wide, matrix = shape.lanes, self.wide.numbers, of["sum_matrix"]
        bias = None
        if shape.has_bias:
            bias = e.load(of["bias"], group * of["group_out"] + first, e.tail(of["group_out"] - first))

        def each_tile(t: Value, _: list[Value]) -> Sequence[Value]:
            here = e.at(sums, t * self.width)

            def each_column(w: Value, _: list[Value]) -> Sequence[Value]:
                loaded = [e.load(here, matrix * (w + h * wide)) for h in range(self.high.numbers)]
                for h, value in enumerate(self.high.back(loaded, shape.tile[1])):
                    e.store(value, self.half, (w + h * wide) * lanes)
                return []

            if self.high.length > 1:
                e.loop(wide, [], each_column)

            def each_row(h: Value, _: list[Value]) -> Sequence[Value]:
                if self.high.length > 1:
                    loaded = [e.load(self.half, (h * wide + w) * lanes) for w in range(wide)]
                else:
                    loaded = [e.load(here, matrix * w) for w in range(wide)]
                to = e.at(made, (h * of["made_length"] + t * shape.tile[2]) * lanes)
                for w, value in enumerate(self.wide.back(loaded, shape.tile[2])):
                    e.store(value if bias is None else e.add(value, bias), to, w * lanes)
                return []

            e.loop(shape.tile[1], [], each_row)
            return []

        e.loop(cols, [], each_tile)

    def weigh(self, group: Value, vector: Value, first: Value, count: Value, to: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        lanes, taps = shape.lanes, shape.taps[1] * shape.taps[2]
        outputs = [e.least(vector * lanes + k, of["group_out"] - 1) * of["w_output"] for k in range(lanes)]
        w = e.at(of["w"], group * of["w_group"])

        def each_slab(j: Value, _: list[Value]) -> Sequence[Value]:
            number = first + j
            channel, block = number // shape.blocks * lanes, number % shape.blocks
            begin = block * shape.taps[2]
            if shape.turned:
                begin = (shape.kernel - shape.taps[2]) - begin
            slab = e.at(to, j * shape.slab)

            def each(c: Value, _: list[Value]) -> Sequence[Value]:
                source = e.at(w, (channel + c) * of["w_channel"])

                def square(n: Value, _: list[Value]) -> Sequence[Value]:
                    at = begin + n * lanes
                    # A block may reach beyond the kernel, and a square beyond the block.
                    for output in outputs:
                        e.prefetch(e.at(source, output + of["w_channel"] * AHEAD + at))
                    inside = e.within(at, e.least(begin + taps, shape.taps[1] * shape.kernel))
                    rows = [e.load(source, output + at, inside) for output in outputs]
                    for i, value in enumerate(e.transpose(rows)):
                        e.store(value, self.across, (n * lanes + i) * lanes)
                    return []

                e.loop(self.squares, [], square)
                self.spread(self.across, e.at(slab, c * self.width))
                return []

            e.loop(e.least(of["group_in"] - channel, lanes), [], each)
            return []

        e.loop(count, [], each_slab)

    def spread(self, source: Value, to: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        lanes, (_, high, wide) = shape.lanes, shape.taps
        numbers, matrix = self.wide.numbers, of["weight_matrix"]

        def order(count: int) -> range:
            return range(count - 1, -1, -1) if shape.turned else range(count)

        def each_row(h: Value, _: list[Value]) -> Sequence[Value]:
            loaded = [e.load(source, (h * wide + w) * lanes) for w in order(wide)]
            for w, value in enumerate(self.wide.weigh(loaded)):
                if self.high.length > 1:
                    e.store(value, self.planes, (h * numbers + w) * lanes)
                else:
                    e.store(value, to, matrix * w)
            return []

        def each_column(w: Value, _: list[Value]) -> Sequence[Value]:
            loaded = [e.load(self.planes, (w + h * numbers) * lanes) for h in order(high)]
            for h, value in enumerate(self.high.weigh(loaded)):
                e.store(value, to, matrix * (w + h * numbers))
            return []

        e.loop(high, [], each_row)
        if self.high.length > 1:
            e.loop(numbers, [], each_column)
