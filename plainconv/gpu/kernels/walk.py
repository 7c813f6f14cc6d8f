"""Places in order, so many at a time: where they lie is carried on, with no division.

A walk is told the sizes of depth, rows and width, and the strides of image, depth, rows and width.  Of a place it knows
the offset and the last DIMS of depth, row and column: its digits.  A step is written alike; the turns are what the
offset gains where a digit turns over and the one before it moves on.
"""

import triton
import triton.language as tl

from plainconv.gpu.kernels.places import offset_of, place_of


@triton.jit
def lying(m, sizes, strides, DIMS: tl.constexpr):
    """Of the m-th place of all images: its offset, depth, row and column."""
    i, d, h, w = place_of(m, sizes[0], sizes[1], sizes[2], DIMS)
    return offset_of(i, d, h, w, strides, 1), d, h, w


@triton.jit
def turns_of(sizes, strides, DIMS: tl.constexpr):
    """What the offset gains where depth, rows and width turn over."""
    of_d = strides[1] if DIMS > 2 else strides[0]
    of_h = strides[2] if DIMS > 1 else strides[0]
    return strides[0] - sizes[0] * strides[1], of_d - sizes[1] * strides[2], of_h - sizes[2] * strides[3]


@triton.jit
def further(place, step, sizes, turns, DIMS: tl.constexpr):
    """The place that is one step further on."""
    offset, d, h, w = place
    offset += step[0]
    if DIMS > 0:
        w, offset, over = _carried(w, offset, step[3], sizes[2], turns[2])
    if DIMS > 1:
        h, offset, over = _carried(h + over, offset, step[2], sizes[1], turns[1])
    if DIMS > 2:
        d, offset, over = _carried(d + over, offset, step[1], sizes[0], turns[0])
    return offset, d, h, w


@triton.jit
def _carried(digit, offset, step, size, turn):
    """A digit that is moved on, by at most its size, and the offset; whether the digit before it moves on, too."""
    over = digit >= size - step
    return digit + tl.where(over, step - size, step), offset + tl.where(over, turn, 0), over.to(tl.int32)
