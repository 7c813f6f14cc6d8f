"""Which image and place a number stands for, what a phase of a stride has, where things lie in memory."""

import triton
import triton.language as tl


@triton.jit
def divided(a, b):
    """Quotient and remainder of numbers that are not negative: one division, which without a sign costs less."""
    quotient = (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def place_of(m, depth, rows, width, DIMS: tl.constexpr):
    """Image, depth, row and column of the m-th place of all images, of whose sides the last DIMS may be above 1."""
    d, h, w = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    if DIMS > 0:
        m, w = divided(m, width)
    if DIMS > 1:
        m, h = divided(m, rows)
    if DIMS > 2:
        m, d = divided(m, depth)
    return m, d, h, w


@triton.jit
def quotient(m, by):
    """m // d for 0 <= m < 2^31 by a multiplication; by: what `divisor` of plainconv/gpu/rows.py makes of d."""
    return (tl.umulhi((m * 2).to(tl.uint32), (by >> 5).to(tl.uint32)) >> (by & 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def offset_of(i, d, h, w, strides, UNIT: tl.constexpr):
    """Of a place in memory, in 64 bits; strides of image, depth, rows and width, in units."""
    i, d, h, w = i.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (i * strides[0] + d * strides[1] + h * strides[2] + w * strides[3]) * UNIT


@triton.jit
def within(q, end):
    """Whether 0 <= q < end, in one comparison: what is negative is large without a sign."""
    return q.to(tl.uint32) < end.to(tl.uint32)


@triton.jit
def carried(digit, add, base):
    """A digit of a number that is counted on, 1 higher where `add` says so, and whether it began anew."""
    digit += add.to(tl.int32)
    full = digit == base
    return tl.where(full, 0, digit), full


@triton.jit
def phase_of(r, low, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, PERIOD: tl.constexpr):
    """Of GRAD_INPUT, along a dimension: the first tap, how many there are, where that reads for u = 0, and places."""
    first = KERNEL
    for t in range(min(PERIOD, KERNEL)):
        first = tl.where((r + low - t * DILATION) % STRIDE == 0, t, first)
    return first, tl.cdiv(KERNEL - first, PERIOD), (r + low - first * DILATION) // STRIDE, tl.cdiv(size - r, STRIDE)


@triton.jit
def repeated(v, TIMES: tl.constexpr):
    """A tuple of so many."""
    many = ()
    for _ in tl.static_range(TIMES):
        many = many + (v,)
    return many
