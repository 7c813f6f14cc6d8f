"""Pointwise: a 1x1 kernel is a matrix product of the weight and the channels of each place.

    y[o, p]  =  sum over c  of  w[o, c] * x[c, stride * p]

Without a stride there is nothing to gather: the input is one factor as it lies, unless its channels lie so awkwardly
that a copy of a block pays.  With one, the places that are read are gathered first.

Cost: n * o * c/g * out multiplies, places (or output channels) rounded up to lanes.
"""

from __future__ import annotations

from plainconv.menu import products
from plainconv.menu.base import Algorithm, matrix_error
from plainconv.menu.fold import folding
from plainconv.problem import Request


def _why_not(request: Request) -> str | None:
    if request.problem.taps != 1:
        return f"it is for kernels of one tap, and this one has {request.problem.taps}"
    return products.why_not(request)


ALGORITHM = folding(
    Algorithm(
        "pointwise",
        _why_not,
        products.cost,
        matrix_error,
        products.run,
        version=3,
        fuses=True,
        bind=products.bind,
        pack=products.pack,
    )
)
