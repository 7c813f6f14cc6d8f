"""Turning: a tensor whose channels lie apart, written again with channels as neighbours.

    made[m, c]  =  read[place m, c]

m counts the places of all images.  Half types cannot be copied past the registers number by number, which a product
would have to do again for each tap and each tile of outputs.  A tile is loaded along its places and stored along its
channels, 16 bytes at once; it changes hands in shared memory.
"""

import triton.language as tl

from plainconv.gpu.kernels.numbers import kernel
from plainconv.gpu.kernels.places import divided, offset_of, place_of


@kernel
def turned(
    read,
    made,  # [places of all images, channels], contiguous
    images: tl.int32,
    channels: tl.int32,  # in UNITs
    size_d: tl.int32,
    size_h: tl.int32,
    size_w: tl.int32,
    read_channel: tl.int64,  # strides
    read_i: tl.int64,
    read_d: tl.int64,
    read_h: tl.int64,
    read_w: tl.int64,
    DIMS: tl.constexpr,  # those before the last so many have one place
    UNIT: tl.constexpr,  # channels that are moved at once
    PLACES: tl.constexpr,  # of a tile
    CHANNELS: tl.constexpr,
):
    """A tile for each program; those that fill the same lines run beside each other."""
    channels *= UNIT
    count = images * size_d * size_h * size_w
    row, column = divided(tl.program_id(0), tl.cdiv(channels, CHANNELS))
    m = row * PLACES + tl.arange(0, PLACES)
    c = column * CHANNELS + tl.arange(0, CHANNELS)
    i, d, h, w = place_of(tl.minimum(m, count - 1), size_d, size_h, size_w, DIMS)
    at = offset_of(i, d, h, w, (read_i, read_d, read_h, read_w), 1)[None, :] + c.to(tl.int64)[:, None] * read_channel
    mask = (m < count)[None, :] & (c < channels)[:, None]
    v = tl.load(read + at, mask=mask, other=0.0)
    tl.store(made + m.to(tl.int64)[None, :] * channels + c[:, None], v, mask=mask)
