"""Launches: which tile a kernel works on, how many programs it needs, and what it is told of sizes and strides.

Triton compiles a kernel for the constants and types that it is given, and keeps it on disk.  Constants are what no
image size changes: the kernel's size, stride and dilation, the padding mode, the format, how many channels are moved at
once, the activation.  Sizes and strides are ordinary numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainconv.problem import Direction, Request

OLDEST = (3, 6)
VECTOR = 16  # bytes that a thread moves at once, at most
SHALLOWEST = 16  # channels of a step, at least: what matrix units take
SHARE = 8  # tiles of places that run beside each other, so that they find the weight in the cache


class Blocks(NamedTuple):
    """How many outputs a tile of the result has, and how the work on it is spread."""

    outputs: int
    warps: int
    stages: int


# The first that holds a group's channels, or the last.
IMPLICIT = (Blocks(16, 4, 3), Blocks(32, 4, 3), Blocks(64, 4, 3), Blocks(128, 8, 3))
# By the bytes of a number.  Products without matrix units have both factors of a step in registers.
PLACES = {2: 128, 4: 64, 8: 32}  # of a tile
DEPTH = {2: 64, 4: 16, 8: 16}  # channels of a step, at most


def blocks_of(outputs: int) -> Blocks:
    """The row of the table for so many channels of a group."""
    return next((row for row in IMPLICIT if outputs <= row.outputs), IMPLICIT[-1])


def tile_of(request: Request) -> tuple[int, int]:
    """Places of a tile and the depth of a step; where numbers lie apart, each needs registers for its address."""
    places, depth = PLACES[request.dtype.itemsize], DEPTH[request.dtype.itemsize]
    return (places, depth) if request.channels_last else (min(places, 64), min(depth, 32))


@lru_cache(1)
def why_not() -> str | None:
    """The sentence, if there is no Triton to compile kernels with; nothing is imported."""
    told = f"its kernels are compiled by Triton {'.'.join(map(str, OLDEST))} or newer"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return f'{told}, which is not installed (pip install "plainconv[gpu]")'
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"{told}, and {version} is installed"
    return None


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as it is, or rounded to TF32 where torch's switch for convolutions says so."""
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    rounds = dtype is torch.float32 and switch.fp32_precision == "tf32"
    return "tf32" if rounds else "ieee"


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is told besides the tensors; call it with those."""

    kernel: Any
    programs: int
    numbers: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        with torch.cuda.device_of(first):  # kernels go to the current device, and its current stream
            launched = self.kernel[(self.programs,)]
            launched(first, *others, *self.numbers, **self.constants, PRECISION=precision(first.dtype))


def implicit(request: Request, read: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) as an implicit matrix product.

    read: x or y, lying as in the calls; made: the strides of the result.  Call it with what is read, the weight as
    [o, taps, c/g] (contiguous), bias and residual or None, and the result.
    """
    from plainconv.gpu.kernels.implicit import implicit as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer = problem.group_in, problem.group_out
    end = tuple(size + min(hi, 0) for size, (_, hi) in zip(problem.spatial, problem.padding, strict=True))
    size = places = problem.out
    period, phases = (1,) * problem.dims, 1
    if adjoint:
        inner, outer, end, size = outer, inner, problem.out, problem.spatial
        period = tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
        phases = math.prod(map(min, size, problem.stride))
        places = tuple(map(tiles, size, problem.stride))  # of the first phase, which has the most
    blocks, (rows, most), depth, widest = blocks_of(outer), tile_of(request), SHALLOWEST, VECTOR // read.dtype.itemsize
    while depth < min(most, inner):
        depth *= 2
    programs = tiles(problem.batch * math.prod(places), rows) * tiles(outer, blocks.outputs)

    made_last = request.channels_last
    # A single channel or place is everyone's neighbour: the format decides, as images of all sizes share kernels.
    read_last = read.stride(1) == 1 and (made_last or read.stride(-1) != 1)
    reads = _strides(read.shape, read.stride())
    makes = _strides(problem.shape_of(request.direction.makes), made)
    inner_unit = math.gcd(widest, inner, *(reads if read_last else ()))
    outer_unit = math.gcd(widest, outer, *(makes if made_last else ()))
    return Launch(
        kernel,
        programs * problem.groups * phases,
        (
            problem.batch,
            inner // inner_unit,
            outer // outer_unit,
            problem.groups,
            three((lo for lo, _ in problem.padding), 0),
            three(end, 1),
            three(size, 1),
            read.stride(1),
            tuple(stride // inner_unit for stride in reads) if read_last else reads,
            made[1],
            tuple(stride // outer_unit for stride in makes) if made_last else makes,
        ),
        {
            "KERNEL": three(problem.kernel, 1),
            "STRIDE": three(problem.stride, 1),
            "DILATION": three(problem.dilation, 1),
            "PERIOD": three(period, 1),
            "MODE": problem.padding_mode,
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "INNER_UNIT": inner_unit,
            "OUTER_UNIT": outer_unit,
            "ACTIVATION": request.activation,
            "PLACES": rows,
            "OUTPUTS": blocks.outputs,
            "DEPTH": depth,
            "SHARE": SHARE,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        },
    )


def tiles(size: int, tile: int) -> int:
    """How many hold all."""
    return -(-size // tile)


def three(sides: Iterable[int], plain: int) -> tuple[int, ...]:
    """Depth, rows and width, of as many dimensions as there are."""
    given = tuple(sides)
    return (plain,) * (3 - len(given)) + given


def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of image, depth, rows and width; 0 where there is only one."""
    image, _, *sides = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return (image, *three(sides, 0))
