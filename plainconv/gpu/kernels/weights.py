"""The gradient for a weight: a matrix product that sums over all places of all images, in parts.

    weight[o, t, c]  =  sum over m  of  y[m, o] * x[place(m) meets tap t, c]

A weight is a small result of a long sum, and its tiles alone would leave most of a GPU idle.  So the places are cut
into parts, each part has tiles of its own, and writes its sums where no other does; whoever adds them does so in order.
A tile has taps beside each other, n = (t, c), where there are few channels for each: they share what is loaded of y.
"""

import triton.language as tl

from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import within
from plainconv.gpu.kernels.walk import further, lying, turns_of


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
    size_d: tl.int32,  # of y; places are counted in its order
    size_h: tl.int32,
    size_w: tl.int32,
    x_channel: tl.int64,  # strides; but for the channel's, where X_LAST in X_UNITs
    x_i: tl.int64,
    x_d: tl.int64,
    x_h: tl.int64,
    x_w: tl.int64,
    y_channel: tl.int64,  # where Y_LAST in Y_UNITs; along what simply goes on, of the last (of Y_DIMS 0: of images)
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
    DIMS: tl.constexpr,  # of places, along which x does not simply go on
    Y_DIMS: tl.constexpr,  # the same of y
    X_LAST: tl.constexpr,  # whether the channels are neighbours
    Y_LAST: tl.constexpr,
    X_UNIT: tl.constexpr,  # channels that are moved at once
    Y_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of a tile
    INPUTS: tl.constexpr,
    BESIDE: tl.constexpr,  # taps of a tile
    DEPTH: tl.constexpr,  # places of a step
):
    """A tile of a few taps, in one part, for each program."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    BLOCKS: tl.constexpr = (TAPS + BESIDE - 1) // BESIDE
    M: tl.constexpr = 1 if X_LAST else 0  # x's tile is loaded as it lies: [m, n], else [n, m]
    X_BY: tl.constexpr = X_UNIT if X_LAST else 1
    Y_BY: tl.constexpr = Y_UNIT if Y_LAST else 1
    REGULAR: tl.constexpr = MODE == "zeros"  # whether a tap moves all places alike
    SUM: tl.constexpr = made.dtype.element_ty
    inputs *= X_UNIT
    outputs *= Y_UNIT
    if X_LAST:
        x_channel = 1
    if Y_LAST:
        y_channel = 1

    # -- which part, group, taps and tile ----------------------------------------------------------------------------
    columns, rows = tl.cdiv(inputs, INPUTS), tl.cdiv(outputs, OUTPUTS)
    n = tl.arange(0, BESIDE * INPUTS)
    program = tl.program_id(0)
    c = program % columns * INPUTS + n % INPUTS
    program = program // columns
    t = program % BLOCKS * BESIDE + (n // INPUTS if BESIDE > 1 else tl.zeros_like(n))
    program = program // BLOCKS
    o = program % rows * OUTPUTS + tl.arange(0, OUTPUTS)
    program = program // rows
    group = (program % groups).to(tl.int64)
    p = program // groups
    is_input, is_output = (c < inputs) & (t < TAPS), o < outputs

    # -- where its places lie ----------------------------------------------------------------------------------------
    lane, deep = tl.arange(0, DEPTH), tl.full((), DEPTH, tl.int32)
    m = p * part * DEPTH
    left = images * (size_d * size_h * size_w) - m
    y_sizes = (size_d, size_h, size_w)
    if Y_DIMS == 1:
        y_sizes = (1, 1, size_d * size_h * size_w)
    y_strides = (y_i, y_d, y_h, y_w)
    y_step, y_turns = lying(deep, y_sizes, y_strides, Y_DIMS), turns_of(y_sizes, y_strides, Y_DIMS)
    y_place = lying(m + lane, y_sizes, y_strides, Y_DIMS)
    y += tl.expand_dims((group * outputs + o) * y_channel, 1)

    from_d = tl.expand_dims(t // KERNEL[2] // KERNEL[1] * DILATION[0] - low_d, 1 - M)
    from_h = tl.expand_dims(t // KERNEL[2] % KERNEL[1] * DILATION[1] - low_h, 1 - M)
    from_w = tl.expand_dims(t % KERNEL[2] * DILATION[2] - low_w, 1 - M)
    behind = tl.expand_dims(tl.where(is_input, end_w, 0), 1 - M)  # nothing is inside, where there is no input
    sizes = (size_d, size_h, size_w)
    x += tl.expand_dims((group * inputs + c) * x_channel, 1 - M)
    if REGULAR:
        x += (from_d * x_d + from_h * x_h + from_w * x_w) * X_BY
        strides = (x_i, x_d * STRIDE[0], x_h * STRIDE[1], x_w * STRIDE[2])
    else:
        strides = (x_i, 0, 0, 0)
    step, turns = lying(deep, sizes, strides, DIMS), turns_of(sizes, strides, DIMS)
    place = lying(m + lane, sizes, strides, DIMS)

    # -- the product -------------------------------------------------------------------------------------------------
    total = tl.zeros((OUTPUTS, BESIDE * INPUTS), SUM)
    for _ in range(part):
        at, d, h, w = place
        at_d = shown(tl.expand_dims(d * STRIDE[0], M) + from_d, low_d, end_d, MODE)
        at_h = shown(tl.expand_dims(h * STRIDE[1], M) + from_h, low_h, end_h, MODE)
        at_w = shown(tl.expand_dims(w * STRIDE[2], M) + from_w, low_w, end_w, MODE)
        inside = tl.expand_dims(lane < left, M) & within(at_w, behind)
        if DIMS > 1:
            inside = inside & within(at_h, end_h)
        if DIMS > 2:
            inside = inside & within(at_d, end_d)
        source = x + tl.expand_dims(at * X_BY, M)
        if not REGULAR:
            source += (at_d * x_d + at_h * x_h + at_w * x_w) * X_BY
        a = tl.load(
            y + tl.expand_dims(y_place[0] * Y_BY, 0),
            mask=tl.expand_dims(lane, 0) < tl.expand_dims(tl.where(is_output, left, 0), 1),
            other=0.0,
        )
        b = tl.load(source, mask=inside, other=0.0)
        total = tl.dot(a, b if X_LAST else tl.trans(b), total, input_precision=PRECISION, out_dtype=SUM)
        place = further(place, step, sizes, turns, DIMS)
        y_place = further(y_place, y_step, y_sizes, y_turns, Y_DIMS)
        left -= DEPTH

    at = p.to(tl.int64) * made_part
    at += tl.expand_dims((group * outputs + o) * made_o, 1) + tl.expand_dims(c * made_c + t * made_tap, 0)
    tl.store(made + at, total, mask=tl.expand_dims(is_output, 1) & tl.expand_dims(is_input, 0))
