"""The gradient for a weight: a matrix product that sums over all places of all images, in parts.

    weight[o, t, c]  =  sum over m  of  y[m, o] * x[place(m) meets tap t, c]

A weight is a small result of a long sum, and its tiles alone would leave most of a GPU idle.  So the places are cut
into parts, each part has tiles of its own, and writes its sums where no other does; whoever adds them does so in order.
"""

import triton.language as tl

from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, place_of


@kernel
def weights(
    x,
    y,
    made,  # [parts, o, taps, c/g], in the type of the sums
    images: tl.int32,
    inputs: tl.int32,  # channels of a group, in X_UNITs
    outputs: tl.int32,  # the same, in Y_UNITs
    groups: tl.int32,
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
    x_channel: tl.int64,  # strides; but for the channel's, where X_LAST in X_UNITs
    x_i: tl.int64,
    x_d: tl.int64,
    x_h: tl.int64,
    x_w: tl.int64,
    y_channel: tl.int64,  # where Y_LAST in Y_UNITs
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
    X_LAST: tl.constexpr,  # whether the channels are neighbours
    Y_LAST: tl.constexpr,
    X_UNIT: tl.constexpr,  # channels that are moved at once
    Y_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of a tile
    INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,  # places of a step
):
    """A tile of one tap, in one part, for each program."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    M: tl.constexpr = 1 if X_LAST else 0  # x's tile is loaded as it lies: [m, c], else [c, m]
    SUM: tl.constexpr = made.dtype.element_ty
    inputs *= X_UNIT
    outputs *= Y_UNIT
    if X_LAST:
        x_channel = 1
    if Y_LAST:
        y_channel = 1

    # -- which part, group, tap and tile -----------------------------------------------------------------------------
    columns, rows = tl.cdiv(inputs, INPUTS), tl.cdiv(outputs, OUTPUTS)
    program = tl.program_id(0)
    c = program % columns * INPUTS + tl.arange(0, INPUTS)
    program = program // columns
    t = program % TAPS
    program = program // TAPS
    o = program % rows * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // rows
    group = (program % groups).to(tl.int64)
    p = program // groups
    is_input, is_output = c < inputs, o < outputs

    # -- the product -------------------------------------------------------------------------------------------------
    t_d, t_h, t_w = t // KERNEL[2] // KERNEL[1], t // KERNEL[2] % KERNEL[1], t % KERNEL[2]
    from_d, from_h, from_w = t_d * DILATION[0] - low_d, t_h * DILATION[1] - low_h, t_w * DILATION[2] - low_w
    x += group * inputs * x_channel + tl.expand_dims(c.to(tl.int64) * x_channel, 1 - M)
    y += group * outputs * y_channel + tl.expand_dims(o.to(tl.int64) * y_channel, 1)
    total = tl.zeros((OUTPUTS, INPUTS), SUM)
    for step in range(part):
        m = (p * part + step) * DEPTH + tl.arange(0, DEPTH)
        i, d, h, w = place_of(m, size_d, size_h, size_w)
        at_d = shown(d * STRIDE[0] + from_d, low_d, end_d, MODE)
        at_h = shown(h * STRIDE[1] + from_h, low_h, end_h, MODE)
        at_w = shown(w * STRIDE[2] + from_w, low_w, end_w, MODE)
        inside = (at_d >= 0) & (at_d < end_d) & (at_h >= 0) & (at_h < end_h) & (at_w >= 0) & (at_w < end_w)
        is_place = i < images
        of_x = offset_of(i, at_d, at_h, at_w, (x_i, x_d, x_h, x_w), X_UNIT if X_LAST else 1)
        of_y = offset_of(i, d, h, w, (y_i, y_d, y_h, y_w), Y_UNIT if Y_LAST else 1)
        left = tl.load(
            y + tl.expand_dims(of_y, 0),
            mask=tl.expand_dims(is_output, 1) & tl.expand_dims(is_place, 0),
            other=0.0,
        )
        right = tl.load(
            x + tl.expand_dims(of_x, M),
            mask=tl.expand_dims(is_place & inside, M) & tl.expand_dims(is_input, 1 - M),
            other=0.0,
        )
        total = tl.dot(left, right if X_LAST else tl.trans(right), total, input_precision=PRECISION, out_dtype=SUM)

    at = p.to(tl.int64) * made_part + t * made_tap
    at += tl.expand_dims(group * outputs + o, 1) * made_o + tl.expand_dims(c.to(tl.int64) * made_c, 0)
    tl.store(made + at, total, mask=tl.expand_dims(is_output, 1) & tl.expand_dims(is_input, 0))
