"""The matrices of `winograd`: sums and differences before and behind fewer multiplications.

    Y  =  A^T [ (G w) * (B^T d) ]        along one dimension, m outputs of k taps; * is element by element

They come from Toom and Cook's way to multiply polynomials: evaluate both at m + k - 2 points and at infinity, multiply
there, interpolate; turned round, as S. Winograd showed, it is a convolution.  `forms` makes them from the points, in
fractions.

A stride s splits both into s parts, of stride 1: output i is the sum over parts p of what taps p, p + s, ... make of
places p, p + s, ...; so the matrices of parts stand side by side (`ahead`).  In the gradient for the input it is the
outputs that are split, and each has a part of the taps (`turned`).

S. Winograd, "Arithmetic complexity of computations", 1980.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import NamedTuple

from plainconv.cpu.emit import Emit, Value

Matrix = tuple[tuple[Fraction, ...], ...]
Three = tuple[int, int, int]


# By their number: those that make the numbers behind them little larger than the result (`growth` of
# plainconv.menu.winograd), of pairs of fractions from 1/4 to 3 with small denominators, and the least error measured.
POINTS = ("", "0", "0 1", "0 1 -1", "3/8 -3/8 5/4 -5/4", "0 2/3 -2/3 3/2 -3/2", "1/4 -1/4 7/8 -7/8 7/4 -7/4")


def points(count: int) -> tuple[Fraction, ...]:
    """Of both signs, so that sums are shared; with few digits, so that few are lost."""
    return tuple(map(Fraction, POINTS[count].split()))


@lru_cache(64)
def forms(outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """A^T [outputs, n], G [n, taps] and B^T [n, n] with n = outputs + taps - 1."""
    if taps == 1:  # nothing to share
        one = tuple(tuple(Fraction(i == j) for j in range(outputs)) for i in range(outputs))
        return one, ((Fraction(1),),) * outputs, one
    at = points(outputs + taps - 2)
    others = [[q for q in at if q != p] for p in at]
    back = [[p**i for p in at] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    scale = [prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(at, others, strict=True)]
    weights = [[p**k / by for k in range(taps)] for p, by in zip(at, scale, strict=True)]
    weights.append([Fraction(k == taps - 1) for k in range(taps)])
    forth = [[*_polynomial(rest), Fraction(0)] for rest in others] + [_polynomial(at)]
    a, g, b = (tuple(tuple(row) for row in matrix) for matrix in (back, weights, forth))
    return a, g, b


class Along(NamedTuple):
    """One dimension: A^T [outputs, products], G [products, taps], B^T [products, places] and how tiles follow.

    step   places from a tile to the next
    first  the place where the first patch begins, if there is no padding
    """

    back: Matrix
    weights: Matrix
    forth: Matrix
    step: int
    first: int

    @property
    def outputs(self) -> int:
        return len(self.back)

    @property
    def products(self) -> int:
        return len(self.forth)

    @property
    def places(self) -> int:
        return len(self.forth[0])


@lru_cache(64)
def ahead(outputs: int, taps: int, stride: int) -> Along:
    """A convolution: each part of places and taps adds its products to all outputs."""
    places = (outputs - 1) * stride + taps
    back: list[list[Fraction]] = [[] for _ in range(outputs)]
    weights: list[tuple[Fraction, ...]] = []
    forth: list[tuple[Fraction, ...]] = []
    for part in range(min(stride, taps)):
        a, g, b = forms(outputs, len(range(part, taps, stride)))
        for row, more in zip(back, a, strict=True):
            row += more
        weights += [_spread(row, taps, part, stride) for row in g]
        forth += [_spread(row, places, part, stride) for row in b]
    return Along(tuple(map(tuple, back)), tuple(weights), tuple(forth), outputs * stride, 0)


@lru_cache(64)
def turned(outputs: int, taps: int, stride: int, shift: int) -> Along:
    """The gradient for the input: each of `stride` parts of the results has `outputs` of them, and a part of the taps.

    Result i is  sum over k of  w[k] y[(i + shift - k) / stride],  0 <= shift < stride, where that is whole.
    """
    parts, first = _parts(taps, stride, shift), turned_first(taps, stride, shift)
    places = max(near for _, near, _ in parts) + outputs - first
    rows: list[tuple[Fraction, ...]] = [()] * (stride * outputs)
    weights: list[tuple[Fraction, ...]] = []
    forth: list[tuple[Fraction, ...]] = []
    total = sum(outputs + count - 1 for *_, count in parts)
    for part, near, count in parts:
        a, g, b = forms(outputs, count)
        for i, row in enumerate(a):
            rows[i * stride + (part - shift) % stride] = _spread(row, total, len(weights), 1)
        weights += [_spread(row[::-1], taps, part, stride) for row in g]
        forth += [_spread(row, places, near - count + 1 - first, 1) for row in b]
    return Along(tuple(rows), tuple(weights), tuple(forth), outputs, first)


def turned_first(taps: int, stride: int, shift: int) -> int:
    """`Along.first` of `turned`, however many taps there are."""
    return min(near - count + 1 for _, near, count in _parts(taps, stride, shift))


def _parts(taps: int, stride: int, shift: int) -> list[tuple[int, int, int]]:
    """Of the results: the number, the place that the first reads with its first tap, and how many taps.

    That place is y[0], or y[1] if i + shift went round.
    """
    return [(part, int(part < shift), len(range(part, taps, stride))) for part in range(stride)]


def _spread(row: Sequence[Fraction], size: int, first: int, step: int) -> tuple[Fraction, ...]:
    """The numbers of a row at first, first + step, ..., and zeros."""
    wide = [Fraction(0)] * size
    for i, number in enumerate(row):
        wide[first + i * step] = number
    return tuple(wide)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of (x - root) (x - root) ..., the constant first."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        result = [high - root * low for high, low in zip(shifted, [*result, Fraction(0)], strict=True)]
    return result


def transform(e: Emit, matrix: Matrix, values: Sequence[Value]) -> list[Value]:
    """matrix @ values.  Columns, and rows, that differ in signs only share a sum and a difference."""
    columns, given = [list(column) for column in zip(*matrix, strict=True)], list(values)
    for i, j, same, other in _pairs(columns):
        columns[i], columns[j] = same, other
        given[i], given[j] = e.add(given[i], given[j]), e.subtract(given[i], given[j])
    rows = [list(row) for row in zip(*columns, strict=True)]
    pairs = _pairs(rows)
    for i, j, same, other in pairs:
        rows[i], rows[j] = same, other
    factors = []
    for _, j, *_ in pairs:  # so that a number of the second half is 1, and costs nothing
        sizes = [abs(number) for number in rows[j] if number]
        factors.append(Fraction(1) if 1 in sizes else sizes[-1])
        rows[j] = [number / factors[-1] for number in rows[j]]
    results = [_sum(e, row, given) for row in rows]
    for (i, j, *_), factor in zip(pairs, factors, strict=True):
        both, half = results[i], results[j]
        if factor == 1:
            results[i], results[j] = e.add(both, half), e.subtract(both, half)
        else:
            results[i], results[j] = (e.fma(half, e.constant(float(by)), both) for by in (factor, -factor))
    return results


def _pairs(rows: list[list[Fraction]]) -> list[tuple[int, int, list[Fraction], list[Fraction]]]:
    """Rows i and j with i = same + other and j = same - other, where neither part is empty."""
    found, taken = [], set[int]()
    for j in range(len(rows)):
        for i in range(j):
            alike = all(abs(a) == abs(b) for a, b in zip(rows[i], rows[j], strict=True))
            same = [a if a == b else Fraction(0) for a, b in zip(rows[i], rows[j], strict=True)]
            other = [a if a != b else Fraction(0) for a, b in zip(rows[i], rows[j], strict=True)]
            if alike and any(same) and any(other) and not {i, j} & taken:
                taken |= {i, j}
                found.append((i, j, same, other))
    return found


def _sum(e: Emit, row: Sequence[Fraction], values: Sequence[Value]) -> Value:
    terms = sorted(((number, value) for number, value in zip(row, values, strict=True) if number), key=_last_of_all)
    (number, total), *rest = terms
    if number != 1:
        total = e.multiply(total, e.constant(float(number)))
    for number, value in rest:
        if number == 1:
            total = e.add(total, value)
        elif number == -1:
            total = e.subtract(total, value)
        else:
            total = e.fma(value, e.constant(float(number)), total)
    return total


def _last_of_all(term: tuple[Fraction, Value]) -> bool:
    return term[0] != 1


def transform_square(e: Emit, high: Matrix, width: Matrix, values: Sequence[Value]) -> list[Value]:
    """high @ values @ width^T, of values [rows, columns], row after row."""
    count = len(width[0])
    rows = [transform(e, width, values[i : i + count]) for i in range(0, len(values), count)]
    columns = [transform(e, high, column) for column in zip(*rows, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in row]


def three(numbers: Iterable[int]) -> Three:
    """Of depth, rows and width."""
    depth, high, width = numbers
    return depth, high, width
