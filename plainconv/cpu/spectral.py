"""The kernel of `fft` for single channels in channels_last: lanes are channels, so a transform is whole vectors.

A tile is F_h x F_w places of one image, in a vector of channels.  Its spectrum is multiplied with the kernel's,

    y[p, q]  =  sum over i, j of  x[p + i, q + j] w[i, j]        Y(f, g)  =  X(f, g) conj(W(f, g))

and transformed back.  A transform of N = A B places has two passes, over B and over A butterflies in registers: with
n = B a + b and k = k_a + A k_b, and r the N-th root of unity,

    X[k_a + A k_b]  =  sum over b of  r^(A b k_b)  ( r^(b k_a)  sum over a of  r^(B a k_a) x[B a + b] )

and backwards it is the same for numbers whose real and imaginary parts have changed places.

All is real, so two rows are transformed as one, z = x1 + i x2.  Spectra of real rows are symmetric, x(-k) = conj(x(k)):

    2 X1(k)  =  Z(k) + conj(Z(-k))        2i X2(k)  =  Z(k) - conj(Z(-k))        Z(k) = Y1(k) + i Y2(k)

are taken apart, and put together again, by the first and the last butterfly of a column, for which rows n and n + B
are the pair; and of the columns only those from 0 to F_w / 2 are transformed.  The steps of a tile are

    rows        pairs: read from memory, transformed, to scratch memory [pair, F_w]
    columns     0 .. F_w / 2: transformed, multiplied, transformed back to where they were
    rows back   pairs: transformed back, to memory

where rows that show nothing, or are not wanted, are left out.  Which element of memory a place shows, and which element
of the result a place is, is told by tables.  The kernel's spectrum is made in the same way, without the way back.

J. Cooley and J. Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965; I. Good, "The
interaction algorithm and practical Fourier analysis", 1958, for butterflies of 6 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from plainconv.cpu.emit import Emit, Value

POINTERS = (
    "source",  # what is transformed: the input, or the weight
    "spectra",  # of the weight: [vector of channels, column, rows of the spectrum, 2, lanes]
    "scratch",  # [share, pair, places + 1, 2, lanes], and for the weight behind it [tap, lanes]
    "bias",
    "result",
    "row_shown",  # [tile, place]: the element that each place shows, or -1
    "width_shown",
    "row_made",  # the element of the result, or -1
    "width_made",
    "row_roots",  # [b, k_a, 2]
    "width_roots",
    "zeros",  # a vector
)
SIZES = (
    "image",  # elements of the source from one image to the next, and so on
    "row",
    "pixel",
    "channel",
    "made_image",
    "made_row",
    "made_pixel",
    "channels",
    "images",
    "high_tiles",
    "wide_tiles",
    "taps",
    "tasks",
    "shares",  # that have scratch memory of their own, ...
    "room",  # ... so many elements
)

# A and B of each length.
FACTORS = {16: (4, 4), 24: (4, 6), 32: (4, 8), 36: (4, 9), 48: (8, 6), 64: (8, 8), 72: (8, 9), 96: (8, 12)}

Complex = tuple[Value, Value]


@dataclass(frozen=True)
class Shape:
    """All that the text of a kernel depends on.

    lengths  F_h and F_w
    weight   whether it makes the spectrum of the weight
    spread   whether the channels of the source lie apart
    mask     whether there are fewer channels than lanes
    """

    element: str
    lanes: int
    lengths: tuple[int, int]
    weight: bool
    spread: bool
    mask: bool
    has_bias: bool


def columns(length: int) -> int:
    """Columns that are transformed of a tile so wide."""
    return length // 2 + 1


@lru_cache(256)
def text(shape: Shape) -> str:
    """The kernel of this shape: POINTERS and SIZES are its arguments, tasks count vector of channels, image, tile."""
    return _Spectral(shape).kernel()


# -- butterflies -----------------------------------------------------------------------------------------------------


class Butterflies:
    """Transforms of a few complex numbers in registers: out[k] = sum over n of exp(-2 pi i n k / N) in[n]."""

    def __init__(self, e: Emit) -> None:
        self.e = e

    def transform(self, points: Sequence[Complex]) -> list[Complex]:
        """Of 2, 3, 4, 6, 8, 9 or 12 numbers."""
        match len(points):
            case 2:
                return [self.add(*points), self.subtract(*points)]
            case 3:
                return self.three(*points)
            case 4:
                return self.four(*points)
            case 8:
                return self.eight(points)
            case 9:
                return self.nine(points)
            case count:  # 6 and 12
                return self.good(points, 3, count // 3)

    def add(self, a: Complex, b: Complex) -> Complex:
        return self.e.add(a[0], b[0]), self.e.add(a[1], b[1])

    def subtract(self, a: Complex, b: Complex) -> Complex:
        return self.e.subtract(a[0], b[0]), self.e.subtract(a[1], b[1])

    def add_scaled(self, a: Complex, b: Complex, scale: float) -> Complex:
        """a + scale * b."""
        factor = self.e.constant(scale)
        return self.e.fma(b[0], factor, a[0]), self.e.fma(b[1], factor, a[1])

    def times(self, a: Complex, root: Complex) -> Complex:
        e, (x, y), (cos, sin) = self.e, a, root
        return (
            e.subtract(e.multiply(x, cos), e.multiply(y, sin)),
            e.fma(x, sin, e.multiply(y, cos)),
        )

    def turn(self, a: Complex, k: int, n: int) -> Complex:
        """a * exp(-2 pi i k / n)."""
        angle = -2 * math.pi * k / n
        return self.times(a, (self.e.constant(math.cos(angle)), self.e.constant(math.sin(angle))))

    def quarter(self, a: Complex, b: Complex) -> tuple[Complex, Complex]:
        """a - i b and a + i b."""
        e = self.e
        return (e.add(a[0], b[1]), e.subtract(a[1], b[0])), (e.subtract(a[0], b[1]), e.add(a[1], b[0]))

    def three(self, a: Complex, b: Complex, c: Complex) -> list[Complex]:
        both, apart = self.add(b, c), self.subtract(b, c)
        middle, (x, y), sin = self.add_scaled(a, both, -0.5), apart, math.sqrt(0.75)
        e = self.e
        plus, minus = e.constant(sin), e.constant(-sin)
        return [
            self.add(a, both),
            (e.fma(y, plus, middle[0]), e.fma(x, minus, middle[1])),
            (e.fma(y, minus, middle[0]), e.fma(x, plus, middle[1])),
        ]

    def four(self, a: Complex, b: Complex, c: Complex, d: Complex) -> list[Complex]:
        even, odd = self.add(a, c), self.add(b, d)
        first, third = self.quarter(self.subtract(a, c), self.subtract(b, d))
        return [self.add(even, odd), first, self.subtract(even, odd), third]

    def eight(self, points: Sequence[Complex]) -> list[Complex]:
        e, half = self.e, math.sqrt(0.5)
        even, odd = self.four(*points[::2]), self.four(*points[1::2])
        # 1/sqrt(2) is multiplied in the last addition.
        (a, b), (c, d) = odd[1], odd[3]
        one, three = (e.add(a, b), e.subtract(b, a)), (e.subtract(d, c), e.subtract(e.zero, e.add(c, d)))
        second, sixth = self.quarter(even[2], odd[2])
        return [
            self.add(even[0], odd[0]),
            self.add_scaled(even[1], one, half),
            second,
            self.add_scaled(even[3], three, half),
            self.subtract(even[0], odd[0]),
            self.add_scaled(even[1], one, -half),
            sixth,
            self.add_scaled(even[3], three, -half),
        ]

    def nine(self, points: Sequence[Complex]) -> list[Complex]:
        inner = [self.three(*points[n::3]) for n in range(3)]
        turned = [[self.turn(inner[n][k], n * k, 9) if n * k else inner[n][k] for n in range(3)] for k in range(3)]
        found = [self.three(*row) for row in turned]
        return [found[k % 3][k // 3] for k in range(9)]

    def good(self, points: Sequence[Complex], p: int, q: int) -> list[Complex]:
        """Of p * q numbers, p and q without a common factor: no turns between the two."""
        count = p * q
        inner = [self.transform([points[(q * a + p * b) % count] for a in range(p)]) for b in range(q)]
        found = [self.transform([inner[b][k] for b in range(q)]) for k in range(p)]
        return [found[k % p][k % q] for k in range(count)]


def swapped(a: Complex) -> Complex:
    """Of such numbers the transform is the one backwards."""
    return a[1], a[0]


# -- the kernel ------------------------------------------------------------------------------------------------------


class _Spectral:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.e = e = Emit(shape.lanes, shape.element)
        given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
        self.given = dict(zip((*POINTERS, *SIZES), given, strict=True))
        self.small = Butterflies(e)
        self.between = e.stack(shape.element, max(shape.lengths) * 2 * shape.lanes)  # the passes: [b, k_a]
        self.dump = e.stack(shape.element, shape.lanes)  # for what is not wanted
        self.mask = e.tail(self.given["channels"]) if shape.mask else None
        self.pitch = shape.lengths[1] + 1  # pairs do not meet in few sets of the cache
        self.pairs = shape.lengths[0] // 2

    def kernel(self) -> str:
        e, of = self.e, self.given

        def share(s: Value, _: list[Value]) -> Sequence[Value]:
            own = e.begin + s
            first = own * of["tasks"] // of["shares"]
            self.scratch = e.at(of["scratch"], own * of["room"])

            def task(i: Value, _: list[Value]) -> Sequence[Value]:
                number = first + i
                wide, number = number % of["wide_tiles"], number // of["wide_tiles"]
                high, number = number % of["high_tiles"], number // of["high_tiles"]
                self.tile(number // of["images"], number % of["images"], high, wide)
                return []

            e.loop((own + 1) * of["tasks"] // of["shares"] - first, [], task)
            return []

        e.loop(e.end - e.begin, [], share)
        return e.module()

    def tile(self, block: Value, image: Value, high: Value, wide: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        # The last vector begins so early that it ends with the channels.
        channel = block * shape.lanes
        if not shape.mask:
            channel = e.least(channel, of["channels"] - shape.lanes)
        source = e.at(of["source"], image * of["image"] + channel * of["channel"])
        if shape.weight:
            source = self.in_order(source, of["channels"] - channel)
        rows, cols = high * shape.lengths[0], wide * shape.lengths[1]
        shown = e.at(of["row_shown"], rows, "i64"), e.at(of["width_shown"], cols, "i64")
        spectrum = e.at(of["spectra"], block * (columns(shape.lengths[1]) * shape.lengths[0] * 2 * shape.lanes))

        def forth(pair: Value, _: list[Value]) -> Sequence[Value]:
            self.pair_forth(pair, source, channel, *shown)
            return []

        def column(k: Value, _: list[Value]) -> Sequence[Value]:
            self.column(k, e.at(spectrum, k * (shape.lengths[0] * 2 * shape.lanes)))
            return []

        e.loop(self.pairs, [], forth)
        e.loop(columns(shape.lengths[1]), [], column)
        if shape.weight:
            return
        made = e.at(of["row_made"], rows, "i64"), e.at(of["width_made"], cols, "i64")
        result = e.at(of["result"], image * of["made_image"] + channel)
        bias = e.load(of["bias"], channel, self.mask) if shape.has_bias else None

        def back(pair: Value, _: list[Value]) -> Sequence[Value]:
            self.pair_back(pair, result, bias, *made)
            return []

        e.loop(self.pairs, [], back)

    def in_order(self, source: Value, channels: Value) -> Value:
        """A copy of the taps of a vector of channels, channels side by side: squares are transposed in registers."""
        e, of, lanes = self.e, self.given, self.shape.lanes
        to = e.at(self.scratch, self.pairs * self.pitch * 2 * lanes)
        begins = [e.at(source, e.least(lane, channels - 1) * of["taps"]) for lane in range(lanes)]

        def square(i: Value, _: list[Value]) -> Sequence[Value]:
            tap = i * lanes
            some = e.tail(of["taps"] - tap)
            for t, value in enumerate(e.transpose([e.load(begin, tap, some) for begin in begins])):
                e.store(value, to, (tap + t) * lanes)
            return []

        e.loop((of["taps"] + (lanes - 1)) // lanes, [], square)
        return to

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows_of(self, pair: Value) -> tuple[Value, Value]:
        """The two places: n and n + B."""
        by = FACTORS[self.shape.lengths[0]][1]
        first = pair + pair // by * by
        return first, first + by

    def room(self, pair: Value) -> Value:
        return self.e.at(self.scratch, pair * (self.pitch * 2 * self.shape.lanes))

    def pair_forth(self, pair: Value, source: Value, channel: Value, row_shown: Value, width_shown: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        a_places, b_places = FACTORS[shape.lengths[1]]
        shown = [e.scalar(row_shown, place, "i64") for place in self.rows_of(pair)]
        to, lanes = self.room(pair), shape.lanes

        def transform() -> None:
            if shape.spread:
                across = e.scale_places(e.places(e.number(0), 1), of["channel"])
            nowhere = of["zeros"]
            begins = [e.select(row >= 0, e.at(source, row * of["row"]), nowhere) for row in shown]
            steps = [e.select(row >= 0, of["pixel"], e.number(0)) for row in shown]
            following = [e.scalar(row_shown, place, "i64") for place in self.rows_of(e.least(pair + 1, self.pairs - 1))]
            ahead = [e.at(source, row * of["row"]) for row in following]

            def read(place: Value) -> Complex:
                column = e.scalar(width_shown, place, "i64")
                real = column >= 0
                if not (shape.weight or shape.spread):
                    for begin in ahead:
                        e.prefetch(e.at(begin, column * of["pixel"]))
                if shape.spread:
                    found = []
                    for row in shown:
                        here = e.select(e.most(0 - row, 0 - column) < 1, e.number(lanes), e.number(0))
                        at = e.select(here > 0, row * of["row"] + column * of["pixel"], e.number(0))
                        mask = e.tail(e.least(here, of["channels"]))
                        found.append(e.gather(e.at(source, at), across, mask))
                    return found[0], found[1]
                first, second = (
                    e.load(e.select(real, e.at(begin, column * step), nowhere), 0, self.mask)
                    for begin, step in zip(begins, steps, strict=True)
                )
                return first, second

            self.first_pass(shape.lengths[1], "width_roots", lambda b, a: read(b + a * b_places))

            def put(k_a: Value, k_b: int, value: Complex) -> None:
                self.store(value, to, k_a + k_b * a_places)

            self.second_pass(shape.lengths[1], put)

        def nothing() -> None:
            def each(k: Value, _: list[Value]) -> Sequence[Value]:
                self.store((e.zero, e.zero), to, k)
                return []

            e.loop(shape.lengths[1], [], each)

        e.when(e.most(*shown) >= 0, transform, nothing)

    def pair_back(self, pair: Value, result: Value, bias: Value | None, row_made: Value, width_made: Value) -> None:
        e, of, shape = self.e, self.given, self.shape
        a_places, b_places = FACTORS[shape.lengths[1]]
        made = [e.scalar(row_made, place, "i64") for place in self.rows_of(pair)]
        room = self.room(pair)

        def transform() -> None:
            begins = [e.select(row >= 0, e.at(result, row * of["made_row"]), self.dump) for row in made]
            steps = [e.select(row >= 0, of["made_pixel"], e.number(0)) for row in made]
            following = [e.scalar(row_made, place, "i64") for place in self.rows_of(e.least(pair + 1, self.pairs - 1))]
            ahead = [e.at(result, row * of["made_row"]) for row in following]

            def first(k_a: Value, _: list[Value]) -> Sequence[Value]:
                points = [swapped(self.load(room, k_a + k_b * a_places)) for k_b in range(b_places)]
                self.keep_turned(k_a, self.small.transform(points), shape.lengths[1], "width_roots")
                return []

            def second(b: Value, _: list[Value]) -> Sequence[Value]:
                points = [self.load(self.between, b * a_places + k_a) for k_a in range(a_places)]
                for a, value in enumerate(self.small.transform(points)):
                    column = e.scalar(width_made, b + a * b_places, "i64")
                    for begin in ahead:
                        e.prefetch(e.at(begin, column * of["made_pixel"]), "write")
                    for begin, step, number in zip(begins, steps, swapped(value), strict=True):
                        to = e.select(column >= 0, e.at(begin, column * step), self.dump)
                        e.store(number if bias is None else e.add(number, bias), to, 0, self.mask)
                return []

            e.loop(a_places, [], first)
            e.loop(b_places, [], second)

        e.when(e.most(*made) >= 0, transform)

    # -- columns -----------------------------------------------------------------------------------------------------

    def column(self, k: Value, spectrum: Value) -> None:
        """Column k with its mirror: pairs are taken apart, transformed, multiplied, and put together again."""
        e, shape = self.e, self.shape
        a_places, b_places = FACTORS[shape.lengths[0]]
        pair_step = self.pitch * 2 * shape.lanes
        mirror = e.select(k > 0, shape.lengths[1] - k, e.number(0))
        here, there = (e.at(self.scratch, at * (2 * shape.lanes)) for at in (k, mirror))

        def apart(b: Value, _: list[Value]) -> Sequence[Value]:
            points: list[Complex] = []
            for j in range(a_places // 2):
                at = (b + j * b_places) * pair_step
                (p, q), (r, s) = self.load(e.at(here, at), 0), self.load(e.at(there, at), 0)
                points.append((e.add(p, r), e.subtract(q, s)))
                points.append((e.add(q, s), e.subtract(r, p)))
            self.keep_first(b, self.small.transform(points), shape.lengths[0], "row_roots")
            return []

        def product(k_a: Value, _: list[Value]) -> Sequence[Value]:
            points = [self.load(self.between, k_a + b * a_places) for b in range(b_places)]
            found, at = self.small.transform(points), k_a * b_places
            if shape.weight:
                scale = e.constant(1 / (4 * math.prod(shape.lengths)))
                for k_b, (x, y) in enumerate(found):
                    self.store((e.multiply(x, scale), e.multiply(y, scale)), spectrum, at + k_b)
                return []
            products = []
            for k_b, (x, y) in enumerate(found):
                c, d = self.load(spectrum, at + k_b)
                imaginary = e.subtract(e.multiply(y, c), e.multiply(x, d))
                products.append((imaginary, e.fma(x, c, e.multiply(y, d))))  # swapped
            self.keep_turned(k_a, self.small.transform(products), shape.lengths[0], "row_roots")
            return []

        def together(b: Value, _: list[Value]) -> Sequence[Value]:
            points = [self.load(self.between, b * a_places + k_a) for k_a in range(a_places)]
            found = [swapped(value) for value in self.small.transform(points)]
            for j in range(a_places // 2):
                at = (b + j * b_places) * pair_step
                (p, q), (r, s) = found[2 * j], found[2 * j + 1]
                self.store((e.subtract(p, s), e.add(q, r)), e.at(here, at), 0)
                self.store((e.add(p, s), e.subtract(r, q)), e.at(there, at), 0)
            return []

        e.loop(b_places, [], apart)
        e.loop(a_places, [], product)
        if not shape.weight:
            e.loop(b_places, [], together)

    # -- passes ------------------------------------------------------------------------------------------------------

    def load(self, pointer: Value, at: Value | int) -> Complex:
        """The complex number `at` numbers behind a pointer."""
        lanes, number = self.shape.lanes, self.e.number(at)
        return self.e.load(pointer, number * (2 * lanes)), self.e.load(pointer, number * (2 * lanes) + lanes)

    def store(self, value: Complex, pointer: Value, at: Value | int) -> None:
        lanes, number = self.shape.lanes, self.e.number(at)
        self.e.store(value[0], pointer, number * (2 * lanes))
        self.e.store(value[1], pointer, number * (2 * lanes) + lanes)

    def root(self, roots: str, at: Value) -> Complex:
        e = self.e
        cos, sin = (e.broadcast(e.scalar(self.given[roots], at * 2 + part)) for part in range(2))
        return cos, sin

    def first_pass(self, length: int, roots: str, read: Callable[[Value, int], Complex]) -> None:
        """Over b: what `read` gives for a = 0, 1, ... is transformed along a, turned, and kept."""
        a_places, b_places = FACTORS[length]

        def each(b: Value, _: list[Value]) -> Sequence[Value]:
            self.keep_first(b, self.small.transform([read(b, a) for a in range(a_places)]), length, roots)
            return []

        self.e.loop(b_places, [], each)

    def keep_first(self, b: Value, found: Sequence[Complex], length: int, roots: str) -> None:
        a_places, _ = FACTORS[length]
        for k_a, value in enumerate(found):
            at = b * a_places + k_a
            self.store(self.small.times(value, self.root(roots, at)) if k_a else value, self.between, at)

    def second_pass(self, length: int, put: Callable[[Value, int, Complex], None]) -> None:
        """Over k_a: what was kept is transformed along b."""
        a_places, b_places = FACTORS[length]

        def each(k_a: Value, _: list[Value]) -> Sequence[Value]:
            points = [self.load(self.between, k_a + b * a_places) for b in range(b_places)]
            for k_b, value in enumerate(self.small.transform(points)):
                put(k_a, k_b, value)
            return []

        self.e.loop(a_places, [], each)

    def keep_turned(self, k_a: Value, found: Sequence[Complex], length: int, roots: str) -> None:
        """What was transformed along k_b, for b = 0, 1, ...: turned, and kept."""
        a_places, _ = FACTORS[length]
        for b, value in enumerate(found):
            at = k_a + b * a_places
            self.store(self.small.times(value, self.root(roots, at)) if b else value, self.between, at)
