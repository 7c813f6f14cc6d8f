"""Winograd: the launches of kernels/winograd.py, and their tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from plainconv.gpu.launch import VECTOR, Blocks, Launch, activation_of, channels_last, strides, three, tiles
from plainconv.problem import Request

Matrix = tuple[tuple[float, ...], ...]
Two = tuple[int, ...]  # of rows and width

BLOCKS = Blocks(0, 4, 1)
# Tiles and channels of a program, of four bytes each: where channels are neighbours, and where they lie apart.
BESIDE = (8, 32)
APART = (16, 16)


class Part(NamedTuple):
    """Tiles of a plane that are brought forth or back: how many, the first of all images', and those of an image."""

    length: int
    first: int
    tiles: Two


class Grouped(NamedTuple):
    """Channels: groups, those of each, and the stride from one group to the next."""

    groups: int
    channels: int
    stride: int


class Between(NamedTuple):
    """Strides of what lies between forth and back, whose channels are neighbours."""

    group: int
    matrix: int
    plane: int
    tile: int


class Rows(NamedTuple):
    """What is read along rows and width: padding before, behind the last element, places of the padded row; the mode.

    step: places from a tile to the next
    """

    step: Two
    low: Two
    end: Two
    padded: Two
    mode: str = "zeros"


def forth(
    request: Request,
    matrices: tuple[Matrix, Matrix],
    rows: Rows,
    planes: int,
    part: Part,
    read: Tensor,
    grouped: Grouped,
    made: Between,
) -> Launch:
    """Patches, transformed.  Call it with what is read, which lies as in the calls, and what is made."""
    from plainconv.gpu.kernels.winograd import forth as kernel

    last, reads = channels_last(read, request), strides(read.shape, read.stride())
    groups, channels, of_group = grouped
    unit = math.gcd(VECTOR // read.dtype.itemsize, channels, *((of_group, *reads) if last else ()))
    read_unit, (along, across) = unit if last else 1, _block(read.dtype.itemsize, last)
    return Launch(
        kernel,
        tiles(part.length * planes, along) * groups * tiles(channels, across),
        (
            part.length,
            part.first,
            planes,
            *part.tiles,
            channels // unit,
            groups,
            *rows.low,
            *rows.end,
            *rows.padded,
            of_group // read_unit,
            read.stride(1),
            *(stride // read_unit for stride in reads),
            *(stride // unit for stride in made),
        ),
        {
            "HIGH": matrices[0],
            "WIDE": matrices[1],
            "STEP": rows.step,
            "MODE": rows.mode,
            "LAST": last,
            "UNIT": unit,
            "TILES": along,
            "CHANNELS": across,
            **BLOCKS.options,
        },
    )


def back(
    request: Request,
    matrices: tuple[Matrix, Matrix],
    planes: int,
    part: Part,
    read: Between,
    shape: tuple[int, ...],
    made: tuple[int, ...],
    grouped: Grouped,
) -> Launch:
    """Results of tiles.  Call it with what is read, bias and residual or None, and what is made.

    shape, made: of what is made, and its strides.
    """
    from plainconv.gpu.kernels.winograd import back as kernel

    last, makes = request.channels_last, strides(shape, made)
    groups, channels, of_group = grouped
    unit = math.gcd(VECTOR // request.dtype.itemsize, channels, *((of_group, *makes) if last else ()))
    made_unit, (along, across) = unit if last else 1, _block(request.dtype.itemsize, last)
    outputs = len(matrices[1])
    return Launch(
        kernel,
        tiles(part.length * planes, along) * groups * tiles(channels, across),
        (
            part.length,
            part.first,
            planes,
            *part.tiles,
            channels // unit,
            groups,
            *three(shape[2:], 1)[1:],
            *(stride // unit for stride in read),
            of_group // made_unit,
            made[1],
            *(stride // made_unit for stride in makes),
        ),
        {
            "HIGH": matrices[0],
            "WIDE": matrices[1],
            "LAST": last,
            "UNIT": unit,
            "BESIDE": outputs if not last and outputs in (2, 4) else 1,
            "ACTIVATION": activation_of(request),
            "TILES": along,
            "CHANNELS": across,
            **BLOCKS.options,
        },
    )


def _block(size: int, last: bool) -> tuple[int, int]:
    """Tiles and channels of a program; numbers of eight bytes take two registers."""
    along, across = BESIDE if last else APART
    return along * 4 // size, across
