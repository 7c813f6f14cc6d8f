"""The menu: every algorithm, in the order in which a teacher would tell them."""

from __future__ import annotations

from plainconv.menu import (
    builtin,
    depthwise,
    direct,
    fft,
    im2col,
    loops,
    narrow,
    pointwise,
    reference,
    separable,
    shift,
    winograd,
)
from plainconv.menu.base import Algorithm

ALGORITHMS: tuple[Algorithm, ...] = (
    loops.ALGORITHM,  # the definition, in nothing but Python
    shift.ALGORITHM,  # one product over channels for each tap, added into a shifted view
    im2col.ALGORITHM,  # every window a column, one matrix product
    fft.ALGORITHM,  # sliding becomes multiplying, frequency by frequency
    narrow.ALGORITHM,  # few channels: lanes along the width, machine code
    depthwise.ALGORITHM,  # one input channel a group: rows share what they load
    separable.ALGORITHM,  # a kernel that is a product of lines: a pass for each; only where it is named
    direct.ALGORITHM,  # a matrix product for each block of the output, on strips gathered first
    pointwise.ALGORITHM,  # one tap: a matrix product on the input as it lies
    winograd.ALGORITHM,  # two or three taps: sums and differences before, and fewer products
    builtin.ALGORITHM,  # torch's own, where it is allowed
    reference.ALGORITHM,  # the definition in tensor operations; it cannot refuse
)
