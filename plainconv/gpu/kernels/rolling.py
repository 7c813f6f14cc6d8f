"""Few channels: products without matrix units, on rows that roll through the registers.

    made[m, n]  =  sum over t, k  of  read[place(m) meets tap t, k] * weight[n, t, k]

m counts places of all images, n channels that are made, k those of a group that are summed over.  There is little to
multiply for each number that is read, so what matters is to read it once.  A tile has several rows of places, GAP rows
apart, and GAP is such that after some taps along the rows, every row of the tile sees what the next one saw before:

    row u, tap t reads row u*A + t*B,   so   (u + GAP)*A + t*B  =  u*A + (t + TURN)*B   with   GAP*A = TURN*B

So for each channel and column of the kernel, the rows in registers move up by one from tap to tap, and one is loaded.
FORWARD has A the stride and B the dilation.  GRAD_INPUT goes phase by phase of the stride (see implicit.py), whose
taps lie the other way round, so it begins with the last; A is 1 there.

Lanes are places, one behind the other through the rows of all images, or in channels_last neighbouring channels: of one
group, which share what is read, or (EACH) of several, each of which reads channels of its own.
"""

import triton
import triton.language as tl

from plainconv.gpu.kernels.activation import activated
from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, phase_of, place_of, repeated


@triton.jit
def _loaded(pointers, inside, h, low, end, stride, MODE: tl.constexpr, ADJOINT: tl.constexpr, M: tl.constexpr):
    """Of a row h for each place, what it shows."""
    if not ADJOINT:
        h = shown(h, low, end, MODE)
    pointers += tl.expand_dims(h.to(tl.int64) * stride, 1 - M)
    return tl.load(pointers, mask=inside & tl.expand_dims((h >= 0) & (h < end), 1 - M), other=0.0)


@triton.jit
def _added(total, window, factor):
    """Each row's sums, with what it sees."""
    made = ()
    for j in tl.static_range(len(total)):
        made = made + (total[j] + window[j] * factor,)
    return made


@kernel
def rolling(
    read,  # x or y
    weight,
    bias,  # [channels made], or None
    residual,  # lies as what is made, or None
    made,  # y or x
    images: tl.int32,
    outer: tl.int32,  # channels that tiles are of, a group's or (EACH) all, in MADE_UNITs
    groups: tl.int32,  # that have tiles of their own
    low_d: tl.int32,  # padding before: depth, rows, width
    low_h: tl.int32,
    low_w: tl.int32,
    end_d: tl.int32,  # behind the last element that is left, of what is read
    end_h: tl.int32,
    end_w: tl.int32,
    size_d: tl.int32,  # of what is made
    size_h: tl.int32,
    size_w: tl.int32,
    read_channel: tl.int64,  # strides of what is read; but for the channel's, in READ_UNITs
    read_i: tl.int64,
    read_d: tl.int64,
    read_h: tl.int64,
    read_w: tl.int64,
    made_channel: tl.int64,  # of what is made, in MADE_UNITs
    made_i: tl.int64,
    made_d: tl.int64,
    made_h: tl.int64,
    made_w: tl.int64,
    weight_o: tl.int64,  # of the weight
    weight_c: tl.int64,
    weight_d: tl.int64,
    weight_h: tl.int64,
    weight_w: tl.int64,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PERIOD: tl.constexpr,  # from one tap of a phase to the next
    MODE: tl.constexpr,
    ADJOINT: tl.constexpr,  # GRAD_INPUT
    READ_LAST: tl.constexpr,  # whether the channels of what is read are neighbours
    MADE_LAST: tl.constexpr,
    READ_UNIT: tl.constexpr,  # channels that are moved at once
    MADE_UNIT: tl.constexpr,
    INNER: tl.constexpr,  # channels of a group that are summed over
    EACH: tl.constexpr,  # channels of a group that are made, where a tile has several groups; else 0
    ACTIVATION: tl.constexpr,
    PLACES: tl.constexpr,  # of each row of a tile
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    GAP: tl.constexpr,
    TURN: tl.constexpr,
):
    """A tile of the result for each program."""
    M: tl.constexpr = 0 if MADE_LAST else 1  # the axis of a tile that places are along
    OWN: tl.constexpr = OUTPUTS if EACH else 1  # channels of a tile that read channels of their own
    SUM: tl.constexpr = tl.float64 if made.dtype.element_ty == tl.float64 else tl.float32
    outer *= MADE_UNIT
    if READ_LAST:
        read_channel = 1
    if MADE_LAST:
        made_channel = 1

    # -- which phase, group and tile ---------------------------------------------------------------------------------
    places_d, places_h, places_w = size_d, size_h, size_w  # of a phase; none has more than the first
    if ADJOINT:
        phases_h, phases_w = tl.minimum(size_h, STRIDE[1]), tl.minimum(size_w, STRIDE[2])
        places_d = tl.cdiv(size_d, STRIDE[0])
        places_h = tl.cdiv(size_h, STRIDE[1])
        places_w = tl.cdiv(size_w, STRIDE[2])
    starts = tl.cdiv(places_h, GAP * ROWS) * GAP  # first rows of tiles
    columns = tl.cdiv(outer, OUTPUTS)
    tiles = tl.cdiv(images * places_d * starts * places_w, PLACES)
    program = tl.program_id(0)
    m = program % tiles * PLACES + tl.arange(0, PLACES)
    program = program // tiles
    n = program % columns * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // columns
    group = program % groups

    r_d, r_h, r_w, first_d, first_h, first_w = 0, 0, 0, 0, 0, 0
    taps_d, taps_h, taps_w = KERNEL[0], KERNEL[1], KERNEL[2]
    from_d, from_h, from_w = -low_d, -low_h, -low_w
    if ADJOINT:
        which = program // groups
        r_d, r_h, r_w = which // phases_w // phases_h, which // phases_w % phases_h, which % phases_w
        first_d, taps_d, from_d, places_d = phase_of(r_d, low_d, size_d, KERNEL[0], STRIDE[0], DILATION[0], PERIOD[0])
        first_h, taps_h, from_h, places_h = phase_of(r_h, low_h, size_h, KERNEL[1], STRIDE[1], DILATION[1], PERIOD[1])
        first_w, taps_w, from_w, places_w = phase_of(r_w, low_w, size_w, KERNEL[2], STRIDE[2], DILATION[2], PERIOD[2])
        starts = tl.cdiv(places_h, GAP * ROWS) * GAP

    # -- its places and channels -------------------------------------------------------------------------------------
    i, d, h, w = place_of(m, places_d, starts, places_w)
    h = h // GAP * (GAP * ROWS) + h % GAP
    is_place, is_made = i < images, n < outer
    if EACH:
        own, others = n % EACH, n // EACH * INNER  # in its group; the first of those that are summed over
    else:
        own, others = n, group * INNER
        n = group * outer + n
    if ADJOINT:
        of_weight = own.to(tl.int64) * weight_c + others.to(tl.int64) * weight_o
        weight_k = weight_o
    else:
        of_weight = n.to(tl.int64) * weight_o
        weight_k = weight_c
    channel = others.to(tl.int64) * read_channel
    if EACH:
        channel = tl.expand_dims(channel, M)

    # -- the sums ----------------------------------------------------------------------------------------------------
    zeros = tl.zeros((PLACES, OUTPUTS) if MADE_LAST else (OUTPUTS, PLACES), SUM)
    total = repeated(zeros, ROWS)
    for step in range(INNER * taps_d * taps_w * TURN):
        turn, t_w, rest = step % TURN, step // TURN % taps_w, step // TURN // taps_w
        t_d, k = rest % taps_d, rest // taps_d if INNER > 1 else 0
        if ADJOINT:
            at_d = d + from_d - t_d * (DILATION[0] * PERIOD[0] // STRIDE[0])
            at_w = w + from_w - t_w * (DILATION[2] * PERIOD[2] // STRIDE[2])
            at_h = h + from_h - (taps_h - 1) * GAP
            t_h, next_h, turns = first_h + (taps_h - 1) * PERIOD[1], -PERIOD[1], taps_h
            between: tl.constexpr = GAP
        else:
            at_d = shown(d * STRIDE[0] + from_d + t_d * DILATION[0], low_d, end_d, MODE)
            at_w = shown(w * STRIDE[2] + from_w + t_w * DILATION[2], low_w, end_w, MODE)
            at_h = h * STRIDE[1] + from_h + turn * DILATION[1]
            t_h, next_h, turns = turn, TURN, tl.cdiv(taps_h - turn, TURN)
            between: tl.constexpr = GAP * STRIDE[1]
        inside = is_place & (at_d >= 0) & (at_d < end_d) & (at_w >= 0) & (at_w < end_w)
        inside = tl.expand_dims(inside, 1 - M)
        if EACH:
            inside = inside & tl.expand_dims(is_made, M)
        at = (i.to(tl.int64) * read_i + at_d.to(tl.int64) * read_d + at_w.to(tl.int64) * read_w) * READ_UNIT
        row = read + tl.expand_dims(at, 1 - M) + channel + k * read_channel
        t_d, t_w = first_d + t_d * PERIOD[0], first_w + t_w * PERIOD[2]
        tap = weight + of_weight + (k * weight_k + t_d * weight_d + t_w * weight_w + t_h * weight_h)
        window = (tl.zeros((PLACES, OWN) if MADE_LAST else (OWN, PLACES), SUM),)
        for j in tl.static_range(ROWS - 1):
            new = _loaded(row, inside, at_h + j * between, low_h, end_h, read_h * READ_UNIT, MODE, ADJOINT, M)
            window = window + (new.to(SUM),)
        at_h += (ROWS - 1) * between
        for _ in tl.range(turns, loop_unroll_factor=ROWS):
            new = _loaded(row, inside, at_h, low_h, end_h, read_h * READ_UNIT, MODE, ADJOINT, M)
            window = window[1:] + (new.to(SUM),)
            factor = tl.expand_dims(tl.load(tap, mask=is_made, other=0.0).to(SUM), M)
            total = _added(total, window, factor)
            tap += next_h * weight_h
            at_h += between

    # -- what comes behind -------------------------------------------------------------------------------------------
    added = tl.zeros((OUTPUTS,), SUM)
    if bias is not None:
        added += tl.load(bias + n, mask=is_made, other=0.0).to(SUM)
    if ADJOINT:
        d, w = d * STRIDE[0] + r_d, w * STRIDE[2] + r_w
    for j in tl.static_range(ROWS):
        u = h + j * GAP
        mask = tl.expand_dims(is_place & (u < places_h), 1 - M) & tl.expand_dims(is_made, M)
        if ADJOINT:
            u = u * STRIDE[1] + r_h
        at = tl.expand_dims(offset_of(i, d, u, w, (made_i, made_d, made_h, made_w), MADE_UNIT), 1 - M)
        at += tl.expand_dims(n.to(tl.int64) * made_channel, M)
        v = total[j] + tl.expand_dims(added, M)
        if residual is not None:
            v += tl.load(residual + at, mask=mask, other=0.0).to(SUM)
        tl.store(made + at, activated(v, ACTIVATION).to(made.dtype.element_ty), mask=mask)
