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

from plainconv.problem import ConvProblem, Direction, Request

OLDEST = (3, 6)
VECTOR = 16  # bytes that a thread moves at once, at most
SHALLOWEST = 16  # channels of a step, at least: what matrix units take
REGISTERS = 255  # of a thread, at most; left to choose, the assembler may spill, so that more threads run at once
SHARE = 8  # tiles of places that run beside each other, so that they find the weight in the cache


class Blocks(NamedTuple):
    """How many outputs a tile of the result has, and how the work on it is spread."""

    outputs: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """In Triton's words."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": REGISTERS}


# The first that holds a group's channels, or the last.
IMPLICIT = (Blocks(16, 4, 3), Blocks(32, 4, 3), Blocks(64, 4, 3), Blocks(128, 8, 3))
# By the bytes of a number.  Products without matrix units have both factors of a step in registers.
PLACES = {2: 128, 4: 64, 8: 32}  # of a tile, ...
EXACT = 32  # ... and of float32 that is not rounded to TF32
DEPTH = {2: 64, 4: 16, 8: 16}  # channels (of a gradient for a weight: places) of a step, at most
BUSY = 512  # programs that keep a GPU busy


def blocks_of(outputs: int) -> Blocks:
    """The row of the table for so many channels of a group."""
    return next((row for row in IMPLICIT if outputs <= row.outputs), IMPLICIT[-1])


def tile_of(request: Request) -> tuple[int, int]:
    """Places (or channels) along a tile, depth of a step; numbers that lie apart take registers for their addresses."""
    places, depth = PLACES[request.dtype.itemsize], DEPTH[request.dtype.itemsize]
    if request.dtype is torch.float32 and not request.tf32:
        places = EXACT
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


def precision(request: Request) -> str:
    """How float32 is multiplied, in Triton's words."""
    return "tf32" if request.tf32 else "ieee"


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is told besides the tensors; call it with those."""

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]

    def __call__(self, *tensors: Tensor | None) -> None:
        self._run(tensors, warmup=False)

    def compiled(self, *tensors: Tensor | None) -> Any:
        """What a call with such tensors would launch."""
        return self._run(tensors, warmup=True)

    def _run(self, tensors: tuple[Tensor | None, ...], warmup: bool) -> Any:
        with torch.cuda.device_of(tensors[0]):  # kernels go to the current device, and its current stream
            return self.kernel.run(*tensors, *self.numbers, grid=(self.programs,), warmup=warmup, **self.constants)


def implicit(request: Request, read: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) as an implicit matrix product.

    read: x or y, lying as in the calls; made: the strides of the result.  Call it with what is read, the weight as
    [o, taps, c/g] (contiguous), bias and residual or None, and the result.
    """
    from plainconv.gpu.kernels.implicit import implicit as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer, end, size, period, places, phases = _map(request)
    blocks, (rows, most), widest = blocks_of(outer), tile_of(request), VECTOR // read.dtype.itemsize
    depth = enough(inner, most)
    programs = tiles(problem.batch * math.prod(places), rows) * tiles(outer, blocks.outputs)

    read_last, made_last = _channels_last(read, request), request.channels_last
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
            *three((lo for lo, _ in problem.padding), 0),
            *three(end, 1),
            *three(size, 1),
            read.stride(1),
            *(tuple(stride // inner_unit for stride in reads) if read_last else reads),
            made[1],
            *(tuple(stride // outer_unit for stride in makes) if made_last else makes),
        ),
        {
            **_kernel(problem),
            "PERIOD": three(period, 1),
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "INNER_UNIT": inner_unit,
            "OUTER_UNIT": outer_unit,
            "ACTIVATION": request.activation,
            "PRECISION": precision(request),
            "PLACES": rows,
            "OUTPUTS": blocks.outputs,
            "DEPTH": depth,
            "SHARE": SHARE,
            **blocks.options,
        },
    )


class Rolling(NamedTuple):
    """How many outputs and places a row of a tile has."""

    outputs: int
    places: int


# The first that holds the channels, or the last: those that lie apart from each other, and neighbours.
APART = (Rolling(1, 256), Rolling(4, 128), Rolling(16, 32))
BESIDE = (Rolling(4, 128), Rolling(16, 32), Rolling(64, 8))
ROWS = 4  # of a tile, where there are rows
MOST_TAPS = 16  # that a tile has sums for
ROLLING = Blocks(0, 4, 3)


def rolling_of(request: Request, outputs: int) -> Rolling:
    """The tile for so many outputs."""
    table = BESIDE if request.channels_last else APART
    row = next((row for row in table if outputs <= row.outputs), table[-1])
    return row._replace(places=max(row.places * 4 // max(request.dtype.itemsize, 4), 1))


def rolling(request: Request, read: Tensor, weight: Tensor, made: tuple[int, ...]) -> Launch:
    """FORWARD or GRAD_INPUT (of padding with zeros) without matrix units, in rows that share what they load.

    read, weight: lying as in the calls; made: the strides of the result.  Call it with what is read, the weight, bias
    and residual or None, and the result.
    """
    from plainconv.gpu.kernels.rolling import rolling as kernel

    problem, adjoint = request.problem, request.direction is Direction.GRAD_INPUT
    inner, outer, end, size, period, _, phases = _map(request)
    widest = VECTOR // read.dtype.itemsize
    read_last, made_last = _channels_last(read, request), request.channels_last
    each = outer if made_last and problem.groups > 1 else 0
    groups = 1 if each else problem.groups
    tiled = outer * problem.groups // groups
    reads = _strides(read.shape, read.stride())
    makes = _strides(problem.shape_of(request.direction.makes), made)
    read_unit = math.gcd(widest, *reads) if read_last and each == inner == 1 else 1
    made_unit = math.gcd(widest, tiled, *makes) if made_last else 1

    gap, turn = _gaps(request)
    tile = rolling_of(request, tiled)
    programs = tiles(starts_of(request), tile.places)
    weighs = weight.stride()
    return Launch(
        kernel,
        programs * tiles(tiled, tile.outputs) * groups * phases,
        (
            problem.batch,
            tiled // made_unit,
            groups,
            *three((lo for lo, _ in problem.padding), 0),
            *three(end, 1),
            *three(size, 1),
            read.stride(1),
            *(stride // read_unit for stride in reads),
            made[1],
            *(stride // made_unit for stride in makes),
            weighs[0],
            weighs[1],
            *three(weighs[2:], 0),
        ),
        {
            **_kernel(problem),
            "PERIOD": three(period, 1),
            "ADJOINT": adjoint,
            "READ_LAST": read_last,
            "MADE_LAST": made_last,
            "READ_UNIT": read_unit,
            "MADE_UNIT": made_unit,
            "INNER": inner,
            "EACH": each,
            "ACTIVATION": request.activation,
            "PLACES": tile.places,
            "OUTPUTS": tile.outputs,
            "ROWS": _rows(problem),
            "GAP": gap,
            "TURN": turn,
            **ROLLING.options,
        },
    )


def _rows(problem: ConvProblem) -> int:
    return ROWS if problem.dims > 1 else 1


def _gaps(request: Request) -> tuple[int, int]:
    """Rows from one of a tile to the next, and taps until it sees what that one saw: see kernels/rolling.py."""
    taps, stride, dilation, period = (
        three(sides, 1)[1]
        for sides in (request.problem.kernel, request.problem.stride, request.problem.dilation, _map(request).period)
    )
    if taps == 1:
        return 1, 1
    adjoint = request.direction is Direction.GRAD_INPUT
    along, between = (1, dilation * period // stride) if adjoint else (stride, dilation)
    shared = math.gcd(along, between)
    return between // shared, along // shared


def starts_of(request: Request) -> int:
    """Places where tiles of rows begin, of all images (and of one phase)."""
    deep, high, wide = three(_map(request).places, 1)
    gap, _ = _gaps(request)
    return request.problem.batch * deep * tiles(high, gap * _rows(request.problem)) * gap * wide


class Split(NamedTuple):
    """How the gradient for a weight is cut: its tiles, and the long sum into parts of so many steps."""

    outputs: int
    inputs: int
    depth: int
    tiles: int
    parts: int
    part: int


def split_of(request: Request, most_parts: int) -> Split:
    """By the sizes alone: as many parts as keep a GPU busy, none of them empty."""
    problem, (most, depth) = request.problem, tile_of(request)
    outputs, inputs = blocks_of(problem.group_out).outputs, enough(problem.group_in, most)
    count = problem.groups * problem.taps * tiles(problem.group_out, outputs) * tiles(problem.group_in, inputs)
    return Split(outputs, inputs, depth, count, *_parts(problem, count, depth, most_parts))


def _parts(problem: ConvProblem, count: int, depth: int, most: int) -> tuple[int, int]:
    """Into how many parts the places are cut for so many tiles of a weight, and how many steps each of them has."""
    steps = max(tiles(problem.batch * math.prod(problem.out), depth), 1)
    part = tiles(steps, min(max(BUSY // max(count, 1), 1), steps, most))
    return tiles(steps, part), part


Made = tuple[int, int, int, int]  # strides of the sums of parts: part, output channel, tap, input channel


def weights(request: Request, split: Split, x: Tensor, y: Tensor, made: Made) -> Launch:
    """GRAD_WEIGHT in the parts of `split_of`.

    x, y: lying as in the calls.  Call it with both, and the sums of the parts to fill, in the type of the sums.
    """
    from plainconv.gpu.kernels.weights import weights as kernel

    problem, widest = request.problem, VECTOR // x.dtype.itemsize
    blocks = blocks_of(problem.group_out)
    x_last, y_last = _channels_last(x, request), _channels_last(y, request)
    of_x, of_y = _strides(x.shape, x.stride()), _strides(y.shape, y.stride())
    x_unit = math.gcd(widest, problem.group_in, *of_x) if x_last else 1
    y_unit = math.gcd(widest, problem.group_out, *of_y) if y_last else 1
    return Launch(
        kernel,
        split.tiles * split.parts,
        (
            problem.batch,
            problem.group_in // x_unit,
            problem.group_out // y_unit,
            problem.groups,
            split.part,
            *_meeting(problem, x.stride(1), of_x, x_unit, y.stride(1), of_y, y_unit),
            *made,
        ),
        {
            **_kernel(problem),
            "X_LAST": x_last,
            "Y_LAST": y_last,
            "X_UNIT": x_unit,
            "Y_UNIT": y_unit,
            "PRECISION": precision(request),
            "OUTPUTS": split.outputs,
            "INPUTS": split.inputs,
            "DEPTH": split.depth,
            **blocks.options,
        },
    )


class Taps(NamedTuple):
    """The same where channels are few: a tile, the taps that it has sums for, and the parts."""

    tile: Rolling
    lines: int
    columns: int
    tiles: int
    parts: int
    part: int


def taps_of(request: Request, most_parts: int) -> Taps:
    """By the sizes alone, as `split_of`."""
    problem = request.problem
    deep, high, wide = three(problem.kernel, 1)
    columns = min(wide, MOST_TAPS)
    lines = min(high, MOST_TAPS // columns)
    several = request.channels_last and problem.groups > 1
    tiled = problem.out_channels if several else problem.group_out
    tile = rolling_of(request, tiled)
    count = (1 if several else problem.groups) * tiles(tiled, tile.outputs) * problem.group_in
    count *= deep * tiles(high, lines) * tiles(wide, columns)
    return Taps(tile, lines, columns, count, *_parts(problem, count, tile.places, most_parts))


def taps(request: Request, split: Taps, x: Tensor, y: Tensor, made: Made) -> Launch:
    """GRAD_WEIGHT without matrix units, in the parts of `taps_of`; called as `weights`."""
    from plainconv.gpu.kernels.taps import taps as kernel

    problem, widest = request.problem, VECTOR // x.dtype.itemsize
    x_last, y_last = _channels_last(x, request), _channels_last(y, request)
    each = problem.group_out if request.channels_last and problem.groups > 1 else 0
    groups = 1 if each else problem.groups
    of_x, of_y = _strides(x.shape, x.stride()), _strides(y.shape, y.stride())
    x_unit = math.gcd(widest, *of_x) if x_last and each == problem.group_in == 1 else 1
    y_unit = math.gcd(widest, problem.out_channels // groups, *of_y) if y_last else 1
    return Launch(
        kernel,
        split.tiles * split.parts,
        (
            problem.batch,
            problem.out_channels // groups // y_unit,
            groups,
            split.part,
            *_meeting(problem, x.stride(1), of_x, x_unit, y.stride(1), of_y, y_unit),
            *made,
        ),
        {
            **_kernel(problem),
            "X_LAST": x_last,
            "Y_LAST": y_last,
            "CHANNELS": request.channels_last,
            "X_UNIT": x_unit,
            "Y_UNIT": y_unit,
            "INNER": problem.group_in,
            "EACH": each,
            "PLACES": split.tile.places,
            "OUTPUTS": split.tile.outputs,
            "LINES": split.lines,
            "COLUMNS": split.columns,
            **ROLLING.options,
        },
    )


def enough(size: int, most: int) -> int:
    """The power of two that holds so many, or the most; what matrix units take at least."""
    power = SHALLOWEST
    while power < min(size, most):
        power *= 2
    return power


def tiles(size: int, tile: int) -> int:
    """How many hold all."""
    return -(-size // tile)


def three(sides: Iterable[int], plain: int) -> tuple[int, ...]:
    """Depth, rows and width, of as many dimensions as there are."""
    given = tuple(sides)
    return (plain,) * (3 - len(given)) + given


class Map(NamedTuple):
    """What FORWARD and GRAD_INPUT have alike."""

    inner: int  # channels of a group that are summed over
    outer: int  # those that are made
    end: tuple[int, ...]  # behind the last elements that are left, of what is read
    size: tuple[int, ...]  # of what is made
    period: tuple[int, ...]  # from one tap of a phase to the next
    places: tuple[int, ...]  # of the first phase, which has the most
    phases: int


def _map(request: Request) -> Map:
    problem = request.problem
    if request.direction is Direction.FORWARD:
        ones = (1,) * problem.dims
        return Map(problem.group_in, problem.group_out, _ends(problem), problem.out, ones, problem.out, 1)
    period = tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
    places = tuple(map(tiles, problem.spatial, problem.stride))
    phases = math.prod(map(min, problem.spatial, problem.stride))
    return Map(problem.group_out, problem.group_in, problem.out, problem.spatial, period, places, phases)


def _kernel(problem: ConvProblem) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "KERNEL": three(problem.kernel, 1),
        "STRIDE": three(problem.stride, 1),
        "DILATION": three(problem.dilation, 1),
        "MODE": problem.padding_mode,
    }


def _meeting(
    problem: ConvProblem,
    x_channel: int,
    of_x: tuple[int, ...],
    x_unit: int,
    y_channel: int,
    of_y: tuple[int, ...],
    y_unit: int,
) -> tuple[int, ...]:
    """Where the places of y meet those of x, as both kernels of GRAD_WEIGHT are told."""
    return (
        *three((lo for lo, _ in problem.padding), 0),
        *three(_ends(problem), 1),
        *three(problem.out, 1),
        x_channel,
        *(stride // x_unit for stride in of_x),
        y_channel,
        *(stride // y_unit for stride in of_y),
    )


def _ends(problem: ConvProblem) -> tuple[int, ...]:
    """Behind the last elements of the input that negative padding leaves."""
    return tuple(size + min(hi, 0) for size, (_, hi) in zip(problem.spatial, problem.padding, strict=True))


def _channels_last(tensor: Tensor, request: Request) -> bool:
    """Whether channels are neighbours; where a single channel or place is everyone's, the format of the result decides.

    Images of all sizes are to share kernels.
    """
    return tensor.stride(1) == 1 and (request.channels_last or tensor.stride(-1) != 1)


def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of image, depth, rows and width; 0 where there is only one."""
    image, _, *sides = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return (image, *three(sides, 0))
