"""Direct: the definition as one matrix product for each block of the output, on strips that lie ready in the cache.

    y[o, f]  =  sum over c, t  of  w[o, c, t] * s[c, f + shift(t)]

A block is some rows of the output, a strip what its taps read, gathered once with borders, strides and dilation taken
care of; the product behind it runs at the speed of the registers.  If the output is contiguous, a vector holds
neighbouring places and the weight is read as it lies: nothing is packed, so one image with small maps costs no more
than its arithmetic.  If it is channels_last, a vector holds output channels, and the weight is packed on the way.

Cost: n * o * c/g * taps * out multiplies, places (or output channels) rounded up to lanes, a strip for each thread.
"""

from __future__ import annotations

import dataclasses

from plainconv.menu import products
from plainconv.menu.base import Algorithm, matrix_error
from plainconv.menu.fold import folding
from plainconv.menu.trim import trimming
from plainconv.problem import Request


def _why_not(request: Request) -> str | None:
    if request.problem.taps == 1:
        return "with a kernel of one tap it is what pointwise is"
    return _DENSE.why_not(request)


_DENSE = trimming(
    Algorithm(
        "direct",
        products.why_not,
        products.cost,
        matrix_error,
        products.run,
        version=4,
        fuses=True,
        bind=products.bind,
        pack=products.pack,
    )
)
ALGORITHM = folding(dataclasses.replace(_DENSE, why_not=_why_not))
