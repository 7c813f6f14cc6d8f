"""Winograd: sums and differences before and behind fewer multiplications, tile by tile.

    forth    made[t, a, c]  =  sum over places p of tile t  of  F[a, p] * read[p, c]
    back     made[i, n]     =  sum over a  of  B[i, a] * read[t, a, n]            i: the outputs of tile t

Tiles are of rows and width; F and B are products of a matrix for each of both, known when the kernel is compiled.  The
tiles of all images are counted through, and again in each plane of the depth.  A tile's numbers are in registers, and
lanes are channels, or tiles where the channels lie apart.  What lies between forth and back has its channels innermost,
for a product of matrices for each a.

What is brought forth is an input, whose patches overlap, or a gradient, or a weight, the taps of whose output channels
are a patch each; what is brought back is an output, or a weight.
"""

import triton
import triton.language as tl

from plainconv.gpu.kernels.activation import activated
from plainconv.gpu.kernels.border import shown
from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import offset_of, place_of


@triton.jit
def _own(channels, groups, TILES: tl.constexpr, CHANNELS: tl.constexpr, M: tl.constexpr):
    """Of this program: its channels, their group, and the first of its tiles; M: the axis that tiles are along."""
    columns = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    n = tl.expand_dims(program % columns * CHANNELS + tl.arange(0, CHANNELS), M)
    return n, (program // columns % groups).to(tl.int64), program // columns // groups * TILES


@kernel
def forth(
    read,  # x, y or w
    made,
    count: tl.int32,  # tiles of a plane that are made, ...
    first: tl.int32,  # ... from this one on, of all images
    planes: tl.int32,
    tiles_h: tl.int32,  # of a plane of an image: rows, width
    tiles_w: tl.int32,
    channels: tl.int32,  # of a group, in UNITs
    groups: tl.int32,
    low_h: tl.int32,  # padding before
    low_w: tl.int32,
    end_h: tl.int32,  # behind the last element that is left, of what is read
    end_w: tl.int32,
    padded_h: tl.int32,  # places of the padded row
    padded_w: tl.int32,
    read_group: tl.int64,  # strides of what is read; but for the channel's, where LAST in UNITs
    read_channel: tl.int64,
    read_i: tl.int64,
    read_d: tl.int64,
    read_h: tl.int64,
    read_w: tl.int64,
    made_group: tl.int64,  # of what is made, in UNITs
    made_a: tl.int64,
    made_plane: tl.int64,
    made_tile: tl.int64,
    HIGH: tl.constexpr,  # along the rows, a matrix [a, places of a patch]
    WIDE: tl.constexpr,  # along the width
    STEP: tl.constexpr,  # places from a tile to the next
    MODE: tl.constexpr,
    LAST: tl.constexpr,  # whether the channels of what is read are neighbours
    UNIT: tl.constexpr,  # channels that are moved at once
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some tiles of some channels for each program."""
    READ_UNIT: tl.constexpr = UNIT if LAST else 1
    M: tl.constexpr = 0 if LAST else 1  # the axis that tiles are along
    channels *= UNIT
    if LAST:
        read_channel = 1
    n, group, row = _own(channels, groups, TILES, CHANNELS, M)
    m = tl.expand_dims(row + tl.arange(0, TILES), 1 - M)
    d, t = m // count, m % count
    i, _, h, w = place_of(first + t, 1, tiles_h, tiles_w, 2)
    mask = (d < planes) & (n < channels)

    at_h, is_h = _places(h * STEP[0], low_h, end_h, padded_h, read_h * READ_UNIT, len(HIGH[0]), MODE)
    at_w, is_w = _places(w * STEP[1], low_w, end_w, padded_w, read_w * READ_UNIT, len(WIDE[0]), MODE)
    read += group * read_group * READ_UNIT + n.to(tl.int64) * read_channel
    read += i.to(tl.int64) * (read_i * READ_UNIT) + d.to(tl.int64) * (read_d * READ_UNIT)
    patch = ()
    for j in tl.static_range(len(HIGH[0])):
        for k in tl.static_range(len(WIDE[0])):
            patch = patch + (tl.load(read + (at_h[j] + at_w[k]), mask=mask & is_h[j] & is_w[k], other=0.0),)
    patch = _transformed(patch, HIGH, WIDE)
    made += group * made_group * UNIT + n
    made += d.to(tl.int64) * (made_plane * UNIT) + t.to(tl.int64) * (made_tile * UNIT)
    for a in tl.static_range(len(HIGH) * len(WIDE)):
        tl.store(made, patch[a], mask=mask)
        made += made_a * UNIT


@kernel
def back(
    read,
    bias,  # [channels made], or None
    residual,  # lies as what is made, or None
    made,  # y, x or w
    count: tl.int32,  # tiles of a plane that are read, ...
    first: tl.int32,  # ... from this one on, of all images
    planes: tl.int32,
    tiles_h: tl.int32,  # of a plane of an image: rows, width
    tiles_w: tl.int32,
    channels: tl.int32,  # of a group, in UNITs
    groups: tl.int32,
    size_h: tl.int32,  # of what is made
    size_w: tl.int32,
    read_group: tl.int64,  # strides of what is read, in UNITs
    read_a: tl.int64,
    read_plane: tl.int64,
    read_tile: tl.int64,
    made_group: tl.int64,  # of what is made; but for the channel's, where LAST in UNITs
    made_channel: tl.int64,
    made_i: tl.int64,
    made_d: tl.int64,
    made_h: tl.int64,
    made_w: tl.int64,
    HIGH: tl.constexpr,  # along the rows, a matrix [outputs of a tile, a]
    WIDE: tl.constexpr,  # along the width
    LAST: tl.constexpr,  # whether the channels of what is made are neighbours
    UNIT: tl.constexpr,  # channels that are moved at once
    BESIDE: tl.constexpr,  # outputs of a tile's row that are stored at once
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some tiles of some channels for each program."""
    MADE_UNIT: tl.constexpr = UNIT if LAST else 1
    M: tl.constexpr = 0 if LAST else 1  # the axis that tiles are along
    channels *= UNIT
    if LAST:
        made_channel = 1
    n, group, row = _own(channels, groups, TILES, CHANNELS, M)
    is_channel = n < channels

    m = tl.expand_dims(row + tl.arange(0, TILES), 1 - M)
    d, t = m // count, m % count
    mask = (d < planes) & is_channel
    read += group * read_group * UNIT + n
    read += d.to(tl.int64) * (read_plane * UNIT) + t.to(tl.int64) * (read_tile * UNIT)
    tile = ()
    for _ in tl.static_range(len(HIGH[0]) * len(WIDE[0])):
        tile = tile + (tl.load(read, mask=mask, other=0.0),)
        read += read_a * UNIT
    tile = _transformed(tile, HIGH, WIDE)

    m = tl.expand_dims(row * BESIDE + tl.arange(0, TILES * BESIDE), 1 - M)
    d, t = m // BESIDE // count, m // BESIDE % count
    i, _, h, w = place_of(first + t, 1, tiles_h, tiles_w, 2)
    mask = (d < planes) & is_channel
    added = 0.0
    if bias is not None:
        added = tl.load(bias + group * channels + n, mask=is_channel, other=0.0)
    channel = group * made_group * MADE_UNIT + n.to(tl.int64) * made_channel
    for j in tl.static_range(len(HIGH)):
        for k in tl.static_range(0, len(WIDE), BESIDE):
            at_h, at_w = h * len(HIGH) + j, w * len(WIDE) + k + m % BESIDE
            at = offset_of(i, d, at_h, at_w, (made_i, made_d, made_h, made_w), MADE_UNIT) + channel
            is_made = mask & (at_h < size_h) & (at_w < size_w)
            v = _beside(tile, j * len(WIDE) + k, BESIDE) + added
            if residual is not None:
                v += tl.load(residual + at, mask=is_made, other=0.0)
            tl.store(made + at, activated(v, ACTIVATION), mask=is_made)


@triton.jit
def _places(begin, low, end, padded, stride, COUNT: tl.constexpr, MODE: tl.constexpr):
    """Where the places of patches along a dimension lie, and whether anything is there."""
    at, inside = (), ()
    for p in tl.static_range(COUNT):
        place = begin + p
        q = shown(place - low, low, end, MODE)
        at = at + (q.to(tl.int64) * stride,)
        inside = inside + ((place < padded) & (q >= 0) & (q < end),)
    return at, inside


@triton.jit
def _transformed(v, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """HIGH @ v @ WIDE^T of v [rows, columns], row after row."""
    rows = ()
    for j in tl.static_range(len(HIGH[0])):
        for b in tl.static_range(len(WIDE)):
            rows = rows + (_product(WIDE, b, v, j * len(WIDE[0]), 1),)
    made = ()
    for a in tl.static_range(len(HIGH)):
        for b in tl.static_range(len(WIDE)):
            made = made + (_product(HIGH, a, rows, b, len(WIDE)),)
    return made


@triton.jit
def _product(MATRIX: tl.constexpr, ROW: tl.constexpr, v, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The sum of a row's numbers times every STEP-th of v; zeros are left out."""
    total = None
    for j in tl.static_range(len(MATRIX[ROW])):
        if MATRIX[ROW][j] != 0:
            if total is None:
                total = v[FIRST + j * STEP] * MATRIX[ROW][j]
            else:
                total += v[FIRST + j * STEP] * MATRIX[ROW][j]
    return total


@triton.jit
def _beside(v, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """So many of v in turn along the last axis."""
    if COUNT == 4:
        v = tl.interleave(tl.interleave(v[FIRST], v[FIRST + 2]), tl.interleave(v[FIRST + 1], v[FIRST + 3]))
    elif COUNT == 2:
        v = tl.interleave(v[FIRST], v[FIRST + 1])
    else:
        v = v[FIRST]
    return v
