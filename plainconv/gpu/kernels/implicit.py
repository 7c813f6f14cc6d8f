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
from plainconv.gpu.kernels.places import carried, divided, offset_of, phase_of, place_of, within


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
    DIMS: tl.constexpr,  # those before the last so many have one place
    WHOLE: tl.constexpr,  # whether the channels fill all steps
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
    REGULAR: tl.constexpr = ADJOINT or MODE == "zeros"  # whether a tap moves all places alike
    SUM: tl.constexpr = tl.float64 if made.dtype.element_ty == tl.float64 else tl.float32
    inner *= INNER_UNIT
    outer *= OUTER_UNIT
    if DIMS < 3:
        low_d, end_d, size_d = 0, 1, 1
    if DIMS < 2:
        low_h, end_h, size_h = 0, 1, 1
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
    which, program = divided(tl.program_id(0), rows * columns)
    phase, group = divided(which, groups)
    row, program = divided(program, SHARE * columns)
    row *= SHARE
    column, beside = divided(program, tl.minimum(rows - row, SHARE))
    row += beside

    r_d, r_h, r_w, first_d, first_h, first_w = 0, 0, 0, 0, 0, 0
    taps_d, taps_h, taps_w = KERNEL[0], KERNEL[1], KERNEL[2]
    from_d, from_h, from_w = -low_d, -low_h, -low_w
    if ADJOINT:
        phase, r_w = divided(phase, phases_w)
        r_d, r_h = divided(phase, phases_h)
        first_d, taps_d, from_d, places_d = phase_of(r_d, low_d, size_d, KERNEL[0], STRIDE[0], DILATION[0], PERIOD[0])
        first_h, taps_h, from_h, places_h = phase_of(r_h, low_h, size_h, KERNEL[1], STRIDE[1], DILATION[1], PERIOD[1])
        first_w, taps_w, from_w, places_w = phase_of(r_w, low_w, size_w, KERNEL[2], STRIDE[2], DILATION[2], PERIOD[2])

    # -- its places and channels -------------------------------------------------------------------------------------
    # Of a place or channel beyond the last one another is loaded in its place, and nothing is stored.
    m = row * PLACES + tl.arange(0, PLACES)
    n = column * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    count = images * places_d * places_h * places_w
    is_made = n < outer
    i, d, h, w = place_of(tl.minimum(m, count - 1), places_d, places_h, places_w, DIMS)
    if ADJOINT:  # where the first tap lies, and how far each moves it
        at_d, at_h, at_w = d + from_d, h + from_h, w + from_w
        hop_d: tl.constexpr = -(DILATION[0] * PERIOD[0] // STRIDE[0])
        hop_h: tl.constexpr = -(DILATION[1] * PERIOD[1] // STRIDE[1])
        hop_w: tl.constexpr = -(DILATION[2] * PERIOD[2] // STRIDE[2])
    else:
        at_d, at_h, at_w = d * STRIDE[0] + from_d, h * STRIDE[1] + from_h, w * STRIDE[2] + from_w
        hop_d: tl.constexpr = DILATION[0]
        hop_h: tl.constexpr = DILATION[1]
        hop_w: tl.constexpr = DILATION[2]

    # -- the product -------------------------------------------------------------------------------------------------
    # Pointers are made before, and a step moves all of them alike; taps and channels are counted on without division.
    group = group.to(tl.int64)
    read += group * inner * read_channel + tl.expand_dims(k.to(tl.int64) * read_channel, M)
    if REGULAR:
        read += tl.expand_dims(offset_of(i, at_d, at_h, at_w, (read_i, read_d, read_h, read_w), READ_UNIT), 1 - M)
    weight += group * inner * outer * TAPS
    of_weight = tl.where(is_made, n, n % OUTER_UNIT).to(tl.int64)
    if ADJOINT:  # weight [k, taps, n]
        next_k, next_tap = TAPS * outer.to(tl.int64), outer
    else:  # [n, taps, k]
        next_k, next_tap = 1, inner
        of_weight *= TAPS * inner.to(tl.int64)
    weight += tl.expand_dims(k * next_k, 1 - M) + tl.expand_dims(of_weight, M)
    first, t_d, t_h, t_w = 0, 0, 0, 0
    total = tl.zeros((PLACES, OUTPUTS) if MADE_LAST else (OUTPUTS, PLACES), SUM)
    for _ in range(taps_d * taps_h * taps_w * tl.cdiv(inner, DEPTH)):
        u_d, u_h, u_w = at_d + t_d * hop_d, at_h + t_h * hop_h, at_w + t_w * hop_w
        if REGULAR:
            moved = ((t_d * hop_d) * read_d + (t_h * hop_h) * read_h + (t_w * hop_w) * read_w) * READ_UNIT
            source = read + (moved + first * read_channel)
        else:
            u_d = shown(u_d, low_d, end_d, MODE)
            u_h = shown(u_h, low_h, end_h, MODE)
            u_w = shown(u_w, low_w, end_w, MODE)
            source = read + tl.expand_dims(
                offset_of(i, u_d, u_h, u_w, (read_i, read_d, read_h, read_w), READ_UNIT), 1 - M
            )
            source += first * read_channel
        inside = within(u_w, end_w)
        if DIMS > 1:
            inside &= within(u_h, end_h)
        if DIMS > 2:
            inside &= within(u_d, end_d)
        inside = tl.expand_dims(inside, 1 - M)
        t = (
            ((first_d + t_d * PERIOD[0]) * KERNEL[1] + first_h + t_h * PERIOD[1]) * KERNEL[2]
            + first_w
            + t_w * PERIOD[2]
        )
        of_step = weight + (t * next_tap + first * next_k)
        if WHOLE:
            factor, other = tl.load(source, mask=inside, other=0.0), tl.load(of_step)
        else:
            is_read = k < inner - first
            factor = tl.load(source, mask=inside & tl.expand_dims(is_read, M), other=0.0)
            other = tl.load(of_step, mask=tl.expand_dims(is_read, 1 - M), other=0.0)
        a, b = (factor, other) if MADE_LAST else (other, factor)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
        first += DEPTH
        turn = first >= inner
        first = tl.where(turn, 0, first)
        if KERNEL[2] > 1:
            t_w, turn = carried(t_w, turn, taps_w)
        if KERNEL[1] > 1:
            t_h, turn = carried(t_h, turn, taps_h)
        if KERNEL[0] > 1:
            t_d, turn = carried(t_d, turn, taps_d)

    # -- what comes behind -------------------------------------------------------------------------------------------
    i, d, h, w = place_of(m, places_d, places_h, places_w, DIMS)  # anew, not to be kept through the product
    is_place = m < count
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
