"""Few channels: products without matrix units, on rows that roll through the registers.

    made[m, n]  =  sum over t, k  of  read[place(m) meets tap t, k] * weight[n, t, k]

m counts places of all images, n channels that are made, k those of a group that are summed over.  There is little to
multiply for each number that is read, so what matters is to read it once, and to compute little besides.  FORWARD and
GRAD_INPUT are alike: along each dimension, place u meets tap t at

    u*A + t*B + from          FORWARD: A the stride, B the dilation
                              GRAD_INPUT: A = 1; phase by phase of the stride (see implicit.py), from the last tap on

A thread has ROWS x COLUMNS places, GAP apart, and GAP is such that after some taps each of them sees what its
neighbour saw before:

    (u + GAP)*A + t*B  =  u*A + (t + TURN)*B        with   GAP*A = TURN*B

So for each channel, the rows in registers move up by one from tap to tap, and one is loaded: of its columns as many as
the COLUMNS places see through ACROSS taps.

Lanes are places, one behind the other through the rows of all images, and each thread makes OUTPUTS channels.  Or in
channels_last, lanes are neighbouring channels: of one group, which share what is read, or (EACH) of several, each of
which reads channels of its own.
"""

import triton
import triton.language as tl

from plainconv.gpu.kernels.activation import activated
from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, phase_of, quotient, repeated, within

NOWHERE = tl.constexpr(-(1 << 31))  # so far before every image that the places behind it are outside, too


@triton.jit
def _first(q, GAP: tl.constexpr, TIMES: tl.constexpr):
    """Of the places of a thread, TIMES of them, GAP apart."""
    return q // GAP * (GAP * TIMES) + q % GAP


@triton.jit
def _turned(r, low, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, PERIOD: tl.constexpr):
    """A phase of GRAD_INPUT from its last tap on: that tap, how many there are, where it reads for u = 0, places."""
    if STRIDE == 1:
        return KERNEL - 1, KERNEL, low - (KERNEL - 1) * DILATION, size
    else:
        first, taps, at, places = phase_of(r, low, size, KERNEL, STRIDE, DILATION, PERIOD)
        return first + (taps - 1) * PERIOD, taps, at - (taps - 1) * (DILATION * PERIOD // STRIDE), places


@triton.jit
def _row(pointers, h, places, offsets, low, end, limit, stride, MODE: tl.constexpr, SUM: tl.constexpr):
    """What a row shows at its columns; places: which they are, below the limit if they are inside."""
    if MODE != "zeros":
        h = shown(h, low, end, MODE)
        pointers += h.to(tl.int64) * stride
    limit = tl.where(within(h, end), limit, 0)
    row = ()
    for e in tl.static_range(len(places)):
        row = row + (tl.load(pointers + offsets[e], mask=within(places[e], limit), other=0.0).to(SUM),)
    return row


@triton.jit
def _added(total, window, factors, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURN: tl.constexpr):
    """The sums of each channel, row and column, with what they see through a row of taps."""
    WIDE: tl.constexpr = len(window) // ROWS
    TAPS: tl.constexpr = WIDE - (COLUMNS - 1) * TURN
    made = ()
    for n in tl.static_range(len(total) // (ROWS * COLUMNS)):
        for j in tl.static_range(ROWS):
            for c in tl.static_range(COLUMNS):
                v = total[(n * ROWS + j) * COLUMNS + c]
                for t in tl.static_range(TAPS):
                    v = tl.fma(window[j * WIDE + c * TURN + t], factors[n * TAPS + t], v)
                made = made + (v,)
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
    tiles: tl.int32,  # of the places of a phase, and what `quotient` is told of that number
    tiles_by: tl.int64,
    starts_d: tl.int32,  # places where threads begin: depth, rows, width
    starts_d_by: tl.int64,
    starts_h: tl.int32,
    starts_h_by: tl.int64,
    starts_w: tl.int32,
    starts_w_by: tl.int64,
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
    DIMS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PERIOD: tl.constexpr,  # from one tap of a phase to the next
    MODE: tl.constexpr,
    ADJOINT: tl.constexpr,  # GRAD_INPUT, of padding with zeros
    READ_LAST: tl.constexpr,  # whether the channels of what is read are neighbours
    MADE_LAST: tl.constexpr,
    READ_ALONG: tl.constexpr,  # whether places along the width are
    MADE_ALONG: tl.constexpr,
    TAPS_ALONG: tl.constexpr,  # whether taps lie one behind the other
    READ_UNIT: tl.constexpr,  # channels that are moved at once
    MADE_UNIT: tl.constexpr,
    INNER: tl.constexpr,  # channels of a group that are summed over
    EACH: tl.constexpr,  # channels of a group that are made, where a tile has several groups; else 0
    WHOLE: tl.constexpr,  # whether a tile has no more channels than there are
    ACTIVATION: tl.constexpr,
    PLACES: tl.constexpr,  # first ones of threads, in a tile
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GAP: tl.constexpr,  # of rows and of columns
    TURN: tl.constexpr,
    ACROSS: tl.constexpr,  # blocks of taps along the width that a row is loaded for: how many taps, how often
    UNROLLED: tl.constexpr,  # taps along the rows that are written out
):
    """A tile of the result for each program."""
    MANY: tl.constexpr = 1 if MADE_LAST else OUTPUTS  # channels that each thread makes, one behind the other
    SUM: tl.constexpr = tl.float64 if made.dtype.element_ty == tl.float64 else tl.float32
    BORDER: tl.constexpr = "zeros" if ADJOINT else MODE
    A_D: tl.constexpr = 1 if ADJOINT else STRIDE[0]
    A_H: tl.constexpr = 1 if ADJOINT else STRIDE[1]
    A_W: tl.constexpr = 1 if ADJOINT else STRIDE[2]
    B_D: tl.constexpr = DILATION[0] * PERIOD[0] // STRIDE[0] if ADJOINT else DILATION[0]
    B_H: tl.constexpr = DILATION[1] * PERIOD[1] // STRIDE[1] if ADJOINT else DILATION[1]
    B_W: tl.constexpr = DILATION[2] * PERIOD[2] // STRIDE[2] if ADJOINT else DILATION[2]
    STEP_D: tl.constexpr = -PERIOD[0] if ADJOINT else 1  # of the weight, from one tap to the next
    STEP_H: tl.constexpr = -PERIOD[1] if ADJOINT else 1
    STEP_W: tl.constexpr = -PERIOD[2] if ADJOINT else 1
    outer *= MADE_UNIT
    if READ_LAST:
        read_channel = 1
    if MADE_LAST:
        made_channel = 1
    if READ_ALONG:
        read_w = 1
    if MADE_ALONG:
        made_w = 1
    if TAPS_ALONG:
        weight_d, weight_h, weight_w = KERNEL[1] * KERNEL[2], KERNEL[2], 1

    # -- which phase, tile and group ---------------------------------------------------------------------------------
    program = tl.program_id(0)
    r_d, r_h, r_w, tap_d, tap_h, tap_w = 0, 0, 0, 0, 0, 0
    taps_d, taps_h, taps_w = KERNEL[0], KERNEL[1], KERNEL[2]
    from_d, from_h, from_w = -low_d, -low_h, -low_w
    places_d, places_h, places_w = size_d, size_h, size_w
    if ADJOINT:
        if STRIDE[0] * STRIDE[1] * STRIDE[2] > 1:
            phases_h, phases_w = tl.minimum(size_h, STRIDE[1]), tl.minimum(size_w, STRIDE[2])
            phases = tl.minimum(size_d, STRIDE[0]) * phases_h * phases_w
            which = program % phases  # those of the same places follow each other: they write to the same lines
            program = program // phases
            r_d, r_h, r_w = which // phases_w // phases_h, which // phases_w % phases_h, which % phases_w
        tap_d, taps_d, from_d, places_d = _turned(r_d, low_d, size_d, KERNEL[0], STRIDE[0], DILATION[0], PERIOD[0])
        tap_h, taps_h, from_h, places_h = _turned(r_h, low_h, size_h, KERNEL[1], STRIDE[1], DILATION[1], PERIOD[1])
        tap_w, taps_w, from_w, places_w = _turned(r_w, low_w, size_w, KERNEL[2], STRIDE[2], DILATION[2], PERIOD[2])
    tile = program
    program = quotient(program, tiles_by)
    tile -= program * tiles
    n = 0
    if not WHOLE:
        tiles_n = tl.cdiv(outer, OUTPUTS)
        n = program % tiles_n * OUTPUTS
        program = program // tiles_n

    # -- its places and channels -------------------------------------------------------------------------------------
    m = tl.arange(0, PLACES)
    if MADE_LAST:
        m = tl.expand_dims(m, 1)
    d, h = tl.zeros_like(m), tl.zeros_like(m)
    if DIMS == 1:  # a tile is of one line
        i = quotient(tile, starts_w_by)
        w = (tile - i * starts_w) * PLACES + m
    else:
        m += tile * PLACES
        h = quotient(m, starts_w_by)
        w = m - h * starts_w
        i = quotient(h, starts_h_by)
        h = _first(h - i * starts_h, GAP[0], ROWS)
    if DIMS == 3:
        d, i = i, quotient(i, starts_d_by)
        d -= i * starts_d
    w = _first(w, GAP[1], COLUMNS)
    is_place = i < images
    if DIMS == 3:
        is_place = is_place & (d < places_d)
    if MADE_LAST:
        n = tl.expand_dims(n + tl.arange(0, OUTPUTS), 0)
    limit = end_w
    if EACH:
        limit = tl.where(n < outer, end_w, 0)  # other lanes see nothing
        channel = (n // EACH * INNER).to(tl.int64) * read_channel
    else:
        channel = (program * INNER).to(tl.int64) * read_channel
    first = ()  # of the weight, for each channel that is made
    for j in tl.static_range(MANY):
        o = n + j
        if not WHOLE:
            o = tl.minimum(o, outer - 1)
        if EACH:
            c, others = o % EACH, o // EACH * INNER
        else:
            c, others = o, program * INNER
            o += program * outer
        if ADJOINT:
            first = first + (weight + (others.to(tl.int64) * weight_o + c.to(tl.int64) * weight_c),)
        else:
            first = first + (weight + o.to(tl.int64) * weight_o,)
    weight_k = weight_o if ADJOINT else weight_c

    # -- the sums ----------------------------------------------------------------------------------------------------
    at_d, at_h, at_w = d * A_D + from_d, h * A_H + from_h, w * A_W + from_w
    at = i.to(tl.int64) * read_i
    if BORDER == "zeros":
        at += at_h.to(tl.int64) * read_h + at_w.to(tl.int64) * read_w
        if DIMS == 3:
            at += at_d.to(tl.int64) * read_d
    begin = read + at * READ_UNIT + channel
    total = repeated(tl.zeros((PLACES, OUTPUTS) if MADE_LAST else (PLACES,), SUM), MANY * ROWS * COLUMNS)
    SHARED: tl.constexpr = ADJOINT or TURN[0] < KERNEL[1]  # whether rows see the same
    TURNS: tl.constexpr = TURN[0] if SHARED else 1
    BEFORE: tl.constexpr = (COLUMNS - 1) * TURN[1]  # columns before the first that the last place sees
    alone = 1 if SHARED else KERNEL[1]  # taps that begin anew
    for part in tl.static_range(len(ACROSS) // 2):
        blocks = ACROSS[2 * part + 1]
        if ADJOINT and STRIDE[2] > 1:
            blocks = taps_w
        for step in range(INNER * taps_d * blocks * alone):
            t_h, rest = step % alone, step // alone
            t_w = rest % blocks * ACROSS[2 * part]
            if part > 0:
                t_w += ACROSS[0] * ACROSS[1]
            k, t_d = rest // blocks // taps_d, rest // blocks % taps_d
            inside, pointers = is_place, begin + k * read_channel
            if DIMS == 3:
                q = at_d + t_d * B_D
                if BORDER == "zeros":
                    pointers += t_d * B_D * read_d * READ_UNIT
                else:
                    q = shown(q, low_d, end_d, BORDER)
                    pointers += q.to(tl.int64) * (read_d * READ_UNIT)
                inside = inside & within(q, end_d)
            places, offsets = (), ()
            for e in tl.static_range(BEFORE + ACROSS[2 * part]):
                if BORDER == "zeros":
                    q = tl.where(inside, at_w + t_w * B_W, NOWHERE) + e * B_W
                    offsets = offsets + ((t_w + e) * B_W * read_w * READ_UNIT,)
                else:
                    q = shown(at_w + (t_w + e) * B_W, low_w, end_w, BORDER)
                    offsets = offsets + (q.to(tl.int64) * (read_w * READ_UNIT),)
                    q = tl.where(inside, q, NOWHERE)
                places = places + (q,)
            of_taps = k * weight_k + (tap_d + t_d * STEP_D) * weight_d + (tap_w + t_w * STEP_W) * weight_w
            for turn in tl.static_range(TURNS):
                q = at_h + (t_h + turn) * B_H
                of_tap = of_taps + (tap_h + (t_h + turn) * STEP_H) * weight_h
                rows = pointers
                if BORDER == "zeros":
                    rows += (t_h + turn) * B_H * read_h * READ_UNIT
                window = ()
                for _ in tl.static_range(ROWS - 1):
                    window = window + _row(
                        rows, q, places, offsets, low_h, end_h, limit, read_h * READ_UNIT, BORDER, SUM
                    )
                    q += GAP[0] * A_H
                    if BORDER == "zeros":
                        rows += GAP[0] * A_H * read_h * READ_UNIT
                turns = taps_h if ADJOINT else (KERNEL[1] - turn + TURN[0] - 1) // TURN[0] if SHARED else 1
                for _ in tl.range(turns, loop_unroll_factor=UNROLLED):
                    window = window + _row(
                        rows, q, places, offsets, low_h, end_h, limit, read_h * READ_UNIT, BORDER, SUM
                    )
                    factors = ()
                    for j in tl.static_range(MANY):
                        for t in tl.static_range(len(places) - BEFORE):
                            factors = factors + (tl.load(first[j] + of_tap + t * STEP_W * weight_w).to(SUM),)
                    total = _added(total, window, factors, ROWS, COLUMNS, TURN[1])
                    window = window[len(places) :]
                    q += GAP[0] * A_H
                    of_tap += TURN[0] * STEP_H * weight_h
                    if BORDER == "zeros":
                        rows += GAP[0] * A_H * read_h * READ_UNIT

    # -- what comes behind -------------------------------------------------------------------------------------------
    at_d, at_h, at_w = d, h, w
    if ADJOINT:
        at_d, at_h, at_w = d * STRIDE[0] + r_d, h * STRIDE[1] + r_h, w * STRIDE[2] + r_w
    at = offset_of(i, at_d, at_h, at_w, (made_i, made_d, made_h, made_w), MADE_UNIT)
    ends = outer if EACH else (program + 1) * outer  # of its channels
    apart_h, apart_w = made_h * (GAP[0] * MADE_UNIT), made_w * (GAP[1] * MADE_UNIT)  # places of a thread
    if ADJOINT:
        apart_h, apart_w = apart_h * STRIDE[1], apart_w * STRIDE[2]
    rows_left = tl.where(is_place & (w < places_w), places_h - h, 0)
    columns_left = places_w - w
    for j in tl.static_range(MANY):
        o = n + j
        left = rows_left
        if not WHOLE:
            left = tl.where(o < outer, rows_left, 0)
        if not EACH:
            o += program * outer
        added = 0.0
        if bias is not None:
            added = tl.load(bias + (o if WHOLE else tl.minimum(o, ends - 1))).to(SUM)
        of_row = at + o.to(tl.int64) * made_channel
        for u in tl.static_range(ROWS):
            for c in tl.static_range(COLUMNS):
                to, mask = of_row + (u * apart_h + c * apart_w), u * GAP[0] < left
                if c > 0:
                    mask = mask & (c * GAP[1] < columns_left)
                v = total[(j * ROWS + u) * COLUMNS + c]
                v += added
                if residual is not None:
                    v += tl.load(residual + to, mask=mask, other=0.0).to(SUM)
                tl.store(made + to, activated(v, ACTIVATION).to(made.dtype.element_ty), mask=mask)
