"""The gradient for the weight of few channels: a sum for each tap, in registers.

    weight[n, k, t]  =  sum over m  of  y[m, n] * x[place(m) meets tap t, k]

m counts the places of all images, n output channels, k the input channels of a group.  A tile of y is loaded once for
LINES x COLUMNS taps, each of which has a tile of sums; places are added only at the end.  As in weights.py the places
are cut into parts, whose sums lie side by side.  In channels_last the lanes are channels: of one group, which share x,
or (EACH) of several.
"""

import triton.language as tl

from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, place_of, repeated


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
    X_LAST: tl.constexpr,  # whether the channels of x are neighbours
    CHANNELS: tl.constexpr,  # whether the lanes are channels
    Y_LAST: tl.constexpr,  # whether those of y are neighbours
    X_UNIT: tl.constexpr,  # channels that are moved at once
    Y_UNIT: tl.constexpr,
    INNER: tl.constexpr,  # input channels of a group
    EACH: tl.constexpr,  # output channels of a group, where a tile has several groups; else 0
    PLACES: tl.constexpr,  # of a tile
    OUTPUTS: tl.constexpr,
    LINES: tl.constexpr,  # of taps
    COLUMNS: tl.constexpr,
):
    """A block of taps of a tile of channels, in one part, for each program."""
    M: tl.constexpr = 0 if CHANNELS else 1  # the axis of a tile that places are along
    DOWN: tl.constexpr = (KERNEL[1] + LINES - 1) // LINES  # blocks of taps
    ACROSS: tl.constexpr = (KERNEL[2] + COLUMNS - 1) // COLUMNS
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

    # -- the sums ----------------------------------------------------------------------------------------------------
    total = repeated(tl.zeros((PLACES, OUTPUTS) if CHANNELS else (OUTPUTS, PLACES), SUM), LINES * COLUMNS)
    for step in range(part):
        i, d, h, w = place_of((p * part + step) * PLACES + tl.arange(0, PLACES), size_d, size_h, size_w)
        is_place = i < images
        of_y = tl.expand_dims(offset_of(i, d, h, w, (y_i, y_d, y_h, y_w), Y_UNIT), 1 - M)
        left = tl.load(y + of_y, mask=tl.expand_dims(is_place, 1 - M) & tl.expand_dims(is_made, M), other=0.0).to(SUM)
        at_d = shown(d * STRIDE[0] + t_d * DILATION[0] - low_d, low_d, end_d, MODE)
        inside_d = is_place & (at_d >= 0) & (at_d < end_d)
        grown = ()
        for line in tl.static_range(LINES):
            at_h = shown(h * STRIDE[1] + (t_h + line) * DILATION[1] - low_h, low_h, end_h, MODE)
            inside_h = inside_d & (at_h >= 0) & (at_h < end_h)
            for column in tl.static_range(COLUMNS):
                at_w = shown(w * STRIDE[2] + (t_w + column) * DILATION[2] - low_w, low_w, end_w, MODE)
                inside = tl.expand_dims(inside_h & (at_w >= 0) & (at_w < end_w), 1 - M)
                if EACH:
                    inside = inside & tl.expand_dims(is_made, M)
                of_x = tl.expand_dims(offset_of(i, at_d, at_h, at_w, (x_i, x_d, x_h, x_w), X_UNIT), 1 - M)
                right = tl.load(x + of_x, mask=inside, other=0.0).to(SUM)
                grown = grown + (total[line * COLUMNS + column] + left * right,)
        total = grown

    at = p.to(tl.int64) * made_part + n.to(tl.int64) * made_o + k * made_c
    for of_line in tl.static_range(LINES):
        for of_column in tl.static_range(COLUMNS):
            tap = (t_d * KERNEL[1] + t_h + of_line) * KERNEL[2] + t_w + of_column
            if (t_h + of_line < KERNEL[1]) & (t_w + of_column < KERNEL[2]):
                sums = tl.sum(total[of_line * COLUMNS + of_column], M)
                tl.store(made + at + tap * made_tap, sums, mask=is_made)
