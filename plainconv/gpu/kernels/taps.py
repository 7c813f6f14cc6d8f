"""The gradient for the weight of few channels: a sum for each tap, in registers.

    weight[n, k, t]  =  sum over m  of  y[m, n] * x[place(m) meets tap t, k]

m counts the places of all images, n output channels, k the input channels of a group.  A step goes over ROWS rows of y,
one below the other, for LINES x COLUMNS taps, each of which has a tile of sums; places are added only at the end.  Row
j of y meets row j*stride + line*dilation of x by a tap of that line, so each row of x that several meet is loaded once.
As in weights.py the places are cut into parts, whose sums lie side by side.  In channels_last the lanes are channels:
of one group, which share x, or (EACH) of several.
"""

import triton
import triton.language as tl

from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import repeated, within
from plainconv.gpu.kernels.walk import further, lying, turns_of


@triton.jit
def _added(
    total,
    factors,
    are_rows,
    seen,
    MET: tl.constexpr,
    COLUMN: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of all taps, with what the rows that meet this row of x see of it."""
    grown = ()
    for t in tl.static_range(len(total)):
        sums = total[t]
        for j in tl.static_range(len(factors)):
            if t % COLUMNS == COLUMN and j * STRIDE + t // COLUMNS * DILATION == MET:
                sums = tl.where(are_rows[j], sums + factors[j] * seen, sums)  # x may be infinite there
        grown = grown + (sums,)
    return grown


@kernel
def taps(
    x,
    y,
    made,  # [parts, o, taps, c/g], in the type of the sums
    images: tl.int32,
    outer: tl.int32,  # channels that tiles are of, a group's or (EACH) all, in Y_UNITs
    groups: tl.int32,  # that have tiles of their own
    part: tl.int32,  # steps of each
    low_d: tl.int32,  # padding before: depth, rows, width
    low_h: tl.int32,
    low_w: tl.int32,
    end_d: tl.int32,  # behind the last element of x that is left
    end_h: tl.int32,
    end_w: tl.int32,
    size_d: tl.int32,  # of y
    size_h: tl.int32,
    size_w: tl.int32,
    x_channel: tl.int64,  # strides; but for the channel's, in X_UNITs
    x_i: tl.int64,
    x_d: tl.int64,
    x_h: tl.int64,
    x_w: tl.int64,
    y_channel: tl.int64,  # in Y_UNITs
    y_i: tl.int64,
    y_d: tl.int64,
    y_h: tl.int64,
    y_w: tl.int64,
    made_part: tl.int64,
    made_o: tl.int64,
    made_tap: tl.int64,
    made_c: tl.int64,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    MODE: tl.constexpr,
    DIMS: tl.constexpr,  # of places
    X_LAST: tl.constexpr,  # whether the channels of x are neighbours
    CHANNELS: tl.constexpr,  # whether the lanes are channels
    Y_LAST: tl.constexpr,  # whether those of y are neighbours
    X_UNIT: tl.constexpr,  # channels that are moved at once
    Y_UNIT: tl.constexpr,
    INNER: tl.constexpr,  # input channels of a group
    EACH: tl.constexpr,  # output channels of a group, where a tile has several groups; else 0
    PLACES: tl.constexpr,  # of a row of a tile
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,  # of taps
    COLUMNS: tl.constexpr,
    MET: tl.constexpr,  # rows of x
):
    """A block of taps of a tile of channels, in one part, for each program."""
    M: tl.constexpr = 0 if CHANNELS else 1  # the axis of a tile that places are along
    DOWN: tl.constexpr = (KERNEL[1] + LINES - 1) // LINES  # blocks of taps
    ACROSS: tl.constexpr = (KERNEL[2] + COLUMNS - 1) // COLUMNS
    REGULAR: tl.constexpr = MODE == "zeros"  # whether a tap moves all places alike
    SUM: tl.constexpr = made.dtype.element_ty
    outer *= Y_UNIT
    if X_LAST:
        x_channel = 1
    if Y_LAST:
        y_channel = 1

    # -- which part, group, channels and taps ------------------------------------------------------------------------
    columns = tl.cdiv(outer, OUTPUTS)
    program = tl.program_id(0)
    n = program % columns * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // columns
    t_w = program % ACROSS * COLUMNS
    program = program // ACROSS
    t_h = program % DOWN * LINES
    program = program // DOWN
    t_d = program % KERNEL[0]
    program = program // KERNEL[0]
    k = program % INNER if INNER > 1 else 0
    program = program // INNER
    group = program % groups
    p = program // groups
    is_made = n < outer
    if EACH:
        channel = tl.expand_dims((n // EACH * INNER + k).to(tl.int64) * x_channel, M)
    else:
        channel = (group * INNER + k).to(tl.int64) * x_channel
        n = group * outer + n
    x += channel
    y += tl.expand_dims(n.to(tl.int64) * y_channel, M)

    # -- where its places lie ----------------------------------------------------------------------------------------
    starts = tl.cdiv(size_h, ROWS)
    lane, many = tl.arange(0, PLACES), tl.full((), PLACES, tl.int32)
    m = p * part * PLACES
    left = images * (size_d * starts * size_w) - m
    sizes = (size_d, starts, size_w)
    y_strides = (y_i, y_d, y_h * ROWS, y_w)
    y_step, y_turns = lying(many, sizes, y_strides, DIMS), turns_of(sizes, y_strides, DIMS)
    y_place = lying(m + lane, sizes, y_strides, DIMS)

    from_d, from_h, from_w = t_d * DILATION[0] - low_d, t_h * DILATION[1] - low_h, t_w * DILATION[2] - low_w
    if REGULAR:
        x += (from_d * x_d + from_h * x_h + from_w * x_w) * X_UNIT
        strides = (x_i, x_d * STRIDE[0], x_h * (STRIDE[1] * ROWS), x_w * STRIDE[2])
    else:
        strides = (x_i, 0, 0, 0)
    step, turns = lying(many, sizes, strides, DIMS), turns_of(sizes, strides, DIMS)
    place = lying(m + lane, sizes, strides, DIMS)

    # -- the sums ----------------------------------------------------------------------------------------------------
    total = repeated(tl.zeros((PLACES, OUTPUTS) if CHANNELS else (OUTPUTS, PLACES), SUM), LINES * COLUMNS)
    for _ in range(part):
        at, d, h, w = place
        is_place = lane < left
        factors, are_rows = (), ()
        for j in tl.static_range(ROWS):
            is_row = tl.expand_dims(is_place & (h * ROWS + j < size_h) if DIMS > 1 else is_place, 1 - M)
            of_y = tl.expand_dims((y_place[0] + j * y_h) * Y_UNIT, 1 - M)
            factor = tl.load(y + of_y, mask=is_row & tl.expand_dims(is_made, M), other=0.0)
            factors, are_rows = factors + (factor.to(SUM),), are_rows + (is_row,)
        if DIMS > 2:
            at_d = shown(d * STRIDE[0] + from_d, low_d, end_d, MODE)
            is_place = is_place & within(at_d, end_d)
            if not REGULAR:
                at += at_d * x_d
        elif not REGULAR:
            at += shown(from_d, low_d, end_d, MODE) * x_d
        for column in tl.static_range(COLUMNS):
            at_w = shown(w * STRIDE[2] + (from_w + column * DILATION[2]), low_w, end_w, MODE)
            inside = is_place & within(at_w, end_w)
            along = at + (column * DILATION[2] * x_w if REGULAR else at_w * x_w)
            for met in tl.static_range(len(MET)):
                at_h = shown(h * (STRIDE[1] * ROWS) + (from_h + MET[met]), low_h, end_h, MODE)
                of_x = along + (MET[met] * x_h if REGULAR else at_h * x_h)
                mask = tl.expand_dims(inside & within(at_h, end_h) if DIMS > 1 else inside, 1 - M)
                if EACH:
                    mask = mask & tl.expand_dims(is_made, M)
                seen = tl.load(x + tl.expand_dims(of_x * X_UNIT, 1 - M), mask=mask, other=0.0).to(SUM)
                total = _added(total, factors, are_rows, seen, MET[met], column, STRIDE[1], DILATION[1], COLUMNS)
        place = further(place, step, sizes, turns, DIMS)
        y_place = further(y_place, y_step, sizes, y_turns, DIMS)
        left -= PLACES

    at = p.to(tl.int64) * made_part + n.to(tl.int64) * made_o + k * made_c
    for of_line in tl.static_range(LINES):
        for of_column in tl.static_range(COLUMNS):
            tap = (t_d * KERNEL[1] + t_h + of_line) * KERNEL[2] + t_w + of_column
            if (t_h + of_line < KERNEL[1]) & (t_w + of_column < KERNEL[2]):
                sums = tl.sum(total[of_line * COLUMNS + of_column], M)
                tl.store(made + at + tap * made_tap, sums, mask=is_made)
