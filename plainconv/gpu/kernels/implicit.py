"""Implicit GEMM: a convolution as one matrix product whose large factor is never written down.

    made[m, n]  =  sum over t, k  of  read[place(m) meets tap t, k] * weight[n, t, k]

m counts the places of all images, n the channels of a group that are made, k those that are summed over.  The rows of
the large factor are windows of what is read, so each step of the product loads its tile from where the tap lies.
Channels are the inner steps: a tap's rows serve all of them.

FORWARD makes y and reads x.  GRAD_INPUT makes x and reads y: an element i of x met tap d*t of stride s only where
s divides i + lo - d*t, so elements with one remainder r = i mod s (a phase) share their taps, every p-th one with
p = s / gcd(s, d), and in a phase no product is wasted:

                 made at      reads at                                    taps
    FORWARD      u            u*s - lo + t*d                              t             t < kernel
    GRAD_INPUT   u*s + r      u + (r + lo - first*d)/s - t*d*p/s          first + t*p   first + t*p < kernel

The tile lies as the result does, so that neighbouring threads store neighbours: [m, n] if channels are innermost, else
[n, m].  Programs are numbered so that those that run together share tiles of both factors in the second-level cache.
"""

import triton.language as tl

from plainconv.gpu.kernels.activation import activated
from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, phase_of, place_of


@kernel
def implicit(
    read,  # x or y
    weight,  # [o, taps, c/g], contiguous
    bias,  # [channels made], or None
    residual,  # lies as what is made, or None
    made,  # y or x
    images: tl.int32,
    inner: tl.int32,  # channels of a group that are summed over, in INNER_UNITs
    outer: tl.int32,  # channels of a group that are made, in OUTER_UNITs
    groups: tl.int32,
    low_d: tl.int32,  # padding before: depth, rows, width
    low_h: tl.int32,
    low_w: tl.int32,
    end_d: tl.int32,  # behind the last element that is left, of what is read
    end_h: tl.int32,
    end_w: tl.int32,
    size_d: tl.int32,  # of what is made
    size_h: tl.int32,
    size_w: tl.int32,
    read_channel: tl.int64,  # strides of what is read; but for the channel's, where READ_LAST in INNER_UNITs
    read_i: tl.int64,
    read_d: tl.int64,
    read_h: tl.int64,
    read_w: tl.int64,
    made_channel: tl.int64,  # of what is made; where MADE_LAST in OUTER_UNITs
    made_i: tl.int64,
    made_d: tl.int64,
    made_h: tl.int64,
    made_w: tl.int64,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PERIOD: tl.constexpr,  # from one tap of a phase to the next
    MODE: tl.constexpr,
    ADJOINT: tl.constexpr,  # GRAD_INPUT
    READ_LAST: tl.constexpr,  # whether the channels of what is read are neighbours
    MADE_LAST: tl.constexpr,
    INNER_UNIT: tl.constexpr,  # channels that are moved at once
    OUTER_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PLACES: tl.constexpr,  # of a tile
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARE: tl.constexpr,  # tiles of places that run beside each other
):
    """A tile of the result for each program."""
    READ_UNIT: tl.constexpr = INNER_UNIT if READ_LAST else 1
    MADE_UNIT: tl.constexpr = OUTER_UNIT if MADE_LAST else 1
    M: tl.constexpr = 0 if MADE_LAST else 1  # the axis of a tile that places are along
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    SUM: tl.constexpr = tl.float64 if made.dtype.element_ty == tl.float64 else tl.float32
    inner *= INNER_UNIT
    outer *= OUTER_UNIT
    if READ_LAST:
        read_channel = 1
    if MADE_LAST:
        made_channel = 1

    # -- which phase, group and tile ---------------------------------------------------------------------------------
    places_d, places_h, places_w = size_d, size_h, size_w  # of a phase; none has more than the first
    if ADJOINT:
        phases_h, phases_w = tl.minimum(size_h, STRIDE[1]), tl.minimum(size_w, STRIDE[2])
        places_d, places_h, places_w = (
            tl.cdiv(size_d, STRIDE[0]),
            tl.cdiv(size_h, STRIDE[1]),
            tl.cdiv(size_w, STRIDE[2]),
        )
    rows = tl.cdiv(images * places_d * places_h * places_w, PLACES)  # of tiles
    columns = tl.cdiv(outer, OUTPUTS)
    program = tl.program_id(0)
    which = program // (rows * columns)
    program -= which * rows * columns
    group = (which % groups).to(tl.int64)
    row = program // (SHARE * columns) * SHARE
    program -= row * columns
    share = tl.minimum(rows - row, SHARE)
    row += program % share
    column = program // share

    r_d, r_h, r_w, first_d, first_h, first_w = 0, 0, 0, 0, 0, 0
    taps_d, taps_h, taps_w = KERNEL[0], KERNEL[1], KERNEL[2]
    from_d, from_h, from_w = -low_d, -low_h, -low_w
    if ADJOINT:
        phase = which // groups
        r_d, r_h, r_w = phase // phases_w // phases_h, phase // phases_w % phases_h, phase % phases_w
        first_d, taps_d, from_d, places_d = phase_of(r_d, low_d, size_d, KERNEL[0], STRIDE[0], DILATION[0], PERIOD[0])
        first_h, taps_h, from_h, places_h = phase_of(r_h, low_h, size_h, KERNEL[1], STRIDE[1], DILATION[1], PERIOD[1])
        first_w, taps_w, from_w, places_w = phase_of(r_w, low_w, size_w, KERNEL[2], STRIDE[2], DILATION[2], PERIOD[2])

    # -- its places and channels -------------------------------------------------------------------------------------
    m = row * PLACES + tl.arange(0, PLACES)
    n = column * OUTPUTS + tl.arange(0, OUTPUTS)
    i, d, h, w = place_of(m, places_d, places_h, places_w)
    is_place, is_made = i < images, n < outer

    # -- the product -------------------------------------------------------------------------------------------------
    read += group * inner * read_channel
    weight += group * inner * outer * TAPS
    steps = tl.cdiv(inner, DEPTH)
    total = tl.zeros((PLACES, OUTPUTS) if MADE_LAST else (OUTPUTS, PLACES), SUM)
    for step in range(taps_d * taps_h * taps_w * steps):
        tap = step // steps
        k = (step - tap * steps) * DEPTH + tl.arange(0, DEPTH)
        t_d, t_h, t_w = tap // taps_w // taps_h, tap // taps_w % taps_h, tap % taps_w
        if ADJOINT:
            at_d = d + from_d - t_d * (DILATION[0] * PERIOD[0] // STRIDE[0])
            at_h = h + from_h - t_h * (DILATION[1] * PERIOD[1] // STRIDE[1])
            at_w = w + from_w - t_w * (DILATION[2] * PERIOD[2] // STRIDE[2])
        else:
            at_d = shown(d * STRIDE[0] + from_d + t_d * DILATION[0], low_d, end_d, MODE)
            at_h = shown(h * STRIDE[1] + from_h + t_h * DILATION[1], low_h, end_h, MODE)
            at_w = shown(w * STRIDE[2] + from_w + t_w * DILATION[2], low_w, end_w, MODE)
        inside = (at_d >= 0) & (at_d < end_d) & (at_h >= 0) & (at_h < end_h) & (at_w >= 0) & (at_w < end_w)
        at = offset_of(i, at_d, at_h, at_w, (read_i, read_d, read_h, read_w), READ_UNIT)
        channel = k.to(tl.int64) * read_channel
        is_read = k < inner
        factor = tl.load(
            read + tl.expand_dims(at, 1 - M) + tl.expand_dims(channel, M),
            mask=tl.expand_dims(is_place & inside, 1 - M) & tl.expand_dims(is_read, M),
            other=0.0,
        )
        t_d, t_h, t_w = first_d + t_d * PERIOD[0], first_h + t_h * PERIOD[1], first_w + t_w * PERIOD[2]
        t = (t_d * KERNEL[1] + t_h) * KERNEL[2] + t_w
        if ADJOINT:  # weight [k, taps, n]
            along_k, along_n, of_tap = k.to(tl.int64) * (TAPS * outer), n, t * outer
        else:  # [n, taps, k]
            along_k, along_n, of_tap = k, n.to(tl.int64) * (TAPS * inner), t * inner
        other = tl.load(
            weight + of_tap + tl.expand_dims(along_k, 1 - M) + tl.expand_dims(along_n, M),
            mask=tl.expand_dims(is_read, 1 - M) & tl.expand_dims(is_made, M),
            other=0.0,
        )
        a, b = (factor, other) if MADE_LAST else (other, factor)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)

    # -- what comes behind -------------------------------------------------------------------------------------------
    n = group * outer + n
    if bias is not None:
        total += tl.expand_dims(tl.load(bias + n, mask=is_made, other=0.0).to(SUM), M)
    if ADJOINT:
        d, h, w = d * STRIDE[0] + r_d, h * STRIDE[1] + r_h, w * STRIDE[2] + r_w
    at = tl.expand_dims(offset_of(i, d, h, w, (made_i, made_d, made_h, made_w), MADE_UNIT), 1 - M)
    at += tl.expand_dims(n * made_channel, M)
    mask = tl.expand_dims(is_place, 1 - M) & tl.expand_dims(is_made, M)
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0.0).to(SUM)
    tl.store(made + at, activated(total, ACTIVATION).to(made.dtype.element_ty), mask=mask)
