"""Which image and place a number stands for, and where that lies in memory."""

import triton
import triton.language as tl


@triton.jit
def place_of(m, depth, rows, width):
    """Image, depth, row and column of the m-th place of all images, each of so many."""
    return m // (width * rows * depth), m // (width * rows) % depth, m // width % rows, m % width


@triton.jit
def offset_of(i, d, h, w, strides, UNIT: tl.constexpr):
    """Of a place in memory, in 64 bits; strides of image, depth, rows and width, in units."""
    i, d, h, w = i.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (i * strides[0] + d * strides[1] + h * strides[2] + w * strides[3]) * UNIT
