"""Winograd's matrices, in fractions, and the sums and differences that multiply by them."""

from fractions import Fraction

import pytest

from plainconv.cpu import transforms
from plainconv.cpu.emit import Emit, Value

FORMS = [(1, 1), (2, 3), (4, 3), (5, 3), (3, 4), (3, 5), (4, 2), (2, 2)]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize(("outputs", "taps"), FORMS)
def test_the_forms_are_convolutions(outputs, taps):
    """Exactly: both sides are linear in the input and in the kernel, so it is enough to try what they are made of."""
    back, weights, forth = transforms.forms(outputs, taps)
    size = outputs + taps - 1
    assert [len(back), len(weights), len(forth)] == [outputs, size, size]
    for at in range(size):
        for tap in range(taps):
            inputs, kernel = [int(i == at) for i in range(size)], [int(k == tap) for k in range(taps)]
            products = [a * b for a, b in zip(times(weights, kernel), times(forth, inputs), strict=True)]
            assert times(back, products) == [int(i + tap == at) for i in range(outputs)]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_a_stride_splits_places_and_taps(outputs, taps, stride):
    form = transforms.ahead(outputs, taps, stride)
    assert [form.outputs, form.step, form.first] == [outputs, outputs * stride, 0]
    assert form.products == form.places == (outputs - 1) * stride + taps
    for at in range(form.places):
        for tap in range(taps):
            assert met(form, at, tap, taps) == [int(i * stride + tap == at) for i in range(outputs)]


@pytest.mark.parametrize(("stride", "shift"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_a_stride_splits_the_results_of_the_gradient(outputs, taps, stride, shift):
    form = transforms.turned(outputs, taps, stride, shift)
    assert [form.outputs, form.step] == [stride * outputs, outputs]
    assert form.products == stride * outputs + taps - stride
    for at in range(form.places):
        for tap in range(taps):
            right = [int(i + shift - tap == (at + form.first) * stride) for i in range(form.outputs)]
            assert met(form, at, tap, taps) == right


def met(form, at, tap, taps):
    """What a tile is if one place of the input, and one tap, are 1."""
    inputs, kernel = [int(i == at) for i in range(form.places)], [int(k == tap) for k in range(taps)]
    products = [a * b for a, b in zip(times(form.weights, kernel), times(form.forth, inputs), strict=True)]
    return times(form.back, products)


@pytest.mark.parametrize("count", range(len(transforms.POINTS)))
def test_the_points_are_different_and_mostly_pairs(count):
    found = transforms.points(count)
    assert len(set(found)) == len(found) == count
    assert sum(-point in found for point in found) >= count - 1


class Numbers(Emit):
    """Computes what it is told to, with one fraction for a vector, and counts."""

    def __init__(self):
        super().__init__(4)
        self.operations = 0

    def _number(self, result):
        self.operations += 1
        return Value(self, str(result), self.vector)

    def add(self, a, b):
        return self._number(Fraction(a.text) + Fraction(b.text))

    def subtract(self, a, b):
        return self._number(Fraction(a.text) - Fraction(b.text))

    def multiply(self, a, b):
        return self._number(Fraction(a.text) * Fraction(b.text))

    def fma(self, a, b, c):
        return self._number(Fraction(a.text) * Fraction(b.text) + Fraction(c.text))

    def constant(self, number):
        exact = Fraction(number).limit_denominator(1_000_000)
        return Value(self, str(exact), self.vector)


@pytest.mark.parametrize(("outputs", "taps"), FORMS)
def test_sums_are_shared_and_right(outputs, taps):
    for matrix in transforms.forms(outputs, taps):
        numbers = Numbers()
        given = [Fraction(7 * i * i - 3 * i + 1, i + 2) for i in range(len(matrix[0]))]
        values = [Value(numbers, str(number), numbers.vector) for number in given]
        found = transforms.transform(numbers, matrix, values)
        assert [Fraction(value.text) for value in found] == times(matrix, given)
        plain = sum(max(sum(map(bool, row)) - 1, 0) + (row[0] not in (0, 1)) for row in matrix)
        assert numbers.operations <= plain + len(matrix)


def test_fewer_operations_where_signs_differ():
    """B^T of F(4,3): two pairs of rows share their halves."""
    numbers = Numbers()
    forth = transforms.forms(4, 3)[2]
    transforms.transform(numbers, forth, [Value(numbers, "1", numbers.vector)] * 6)
    assert numbers.operations < sum(sum(map(bool, row)) for row in forth) - 4
