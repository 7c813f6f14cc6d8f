"""Winograd in three steps: what `winograd` is on a GPU, where float32 is to be multiplied as it is.

    V[t, a, c]  =  patch t of x, transformed                   U[a, o, c]  =  the weight, transformed
    M[t, a, o]  =  sum over c  of  V[t, a, c] * U[a, o, c]
    y           =  M[t], transformed back                      36 numbers a for 16 outputs of 3x3 taps

The first and the last step move numbers (plainconv/gpu/kernels/winograd.py).  The one between them is a convolution
whose places are tiles, with a group for each a, and is made by implicit.py, or by split.py for the gradient for the
weight, which is brought back from that for U, out of V and of tiles of y.  Tiles are of rows and width: the taps of the
depth, with their stride, dilation and border, are those of this convolution.

V and M are 2.25 times as large as x and y, and are made for some tiles at a time: few enough that there is room for
them, many enough that a launch is long beside its beginning and its end.  TF32 is refused: the transforms would
multiply what it rounds.

Cost: n * o * c/g * (m + k - 1)^2 multiplies for each m^2 outputs, and each tap of the depth, sizes rounded up to those
of the product's tiles.  The workspace is U, V and M.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import transforms
from plainconv.cpu.transforms import Along
from plainconv.gpu import winograd as gpu
from plainconv.gpu.launch import VECTOR, Launch, three, tiles
from plainconv.gpu.matrices import SHALLOWEST
from plainconv.gpu.winograd import Between, Grouped, Part, Rows
from plainconv.menu import engine, implicit, split
from plainconv.menu.base import (
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    kept_tensor,
    laid,
    machine,
    moved_bytes,
    sum_for_bias,
    workspace_bytes,
)
from plainconv.menu.engine import folded, padded
from plainconv.problem import ConvProblem, Direction, Request

MOST_TAPS = 3  # along rows or width
OUTPUTS = 4  # of a tile along a dimension, ...
FEW_OUTPUTS = 2  # ... and where no digit is to be lost
MOST_BYTES = 256 << 20  # of V and M that are there at a time, ...
LEAST_TILES = 64  # ... for a multiple of so many tiles
START = 32  # channels, in whose time a program of the product begins and ends


class Cut(NamedTuple):
    """How a request is cut.

    along  the transforms along rows and width
    tiles  of a plane, along both, and total: of all images
    chunk  of those, at a time
    """

    along: tuple[Along, Along]
    tiles: tuple[int, ...]
    total: int
    chunk: int

    @property
    def counts(self) -> list[int]:
        """How many are made at a time."""
        return [min(self.chunk, self.total - first) for first in range(0, self.total, self.chunk)]


def why_not(request: Request) -> str | None:
    """The sentence for what the kernels do not do."""
    if request.tf32:
        return "float32 may be rounded to TF32 here, and its transforms would multiply what that rounds"
    if sentence := implicit.why_not(request):
        return sentence
    _, *sides = folded(request.problem, False)
    if any(side.stride > 1 or side.dilation > 1 for side in sides):
        return "on a GPU it is for rows and width without stride and dilation"
    if not 1 < max(side.kernel for side in sides) <= MOST_TAPS:
        taps = "x".join(map(str, request.problem.kernel))
        return f"on a GPU it is for 2 to {MOST_TAPS} taps along rows or width, and the kernel is {taps}"
    return None


@lru_cache(4096)
def along_of(request: Request) -> tuple[Along, Along]:
    """The transforms along rows and width, by the kernel's size alone."""

    def along(taps: int) -> Along:
        outputs = 1 if taps == 1 else FEW_OUTPUTS if request.precision == "highest" else OUTPUTS
        if request.direction is Direction.GRAD_INPUT:
            return transforms.turned(outputs, taps, 1, 0)
        if request.direction is Direction.GRAD_WEIGHT:  # taps are made, of so many places of y
            return transforms.ahead(taps, outputs, 1)
        return transforms.ahead(outputs, taps, 1)

    _, high, wide = three(request.problem.kernel, 1)
    return along(high), along(wide)


@lru_cache(4096)
def cut_of(request: Request) -> Cut:
    """By the sizes, and the memory that is allowed."""
    along, problem, size = along_of(request), _problem(request, 1), request.dtype.itemsize
    of_plane = tuple(map(tiles, _made(request), _step(request)))
    count = request.problem.batch * math.prod(of_plane)
    tile, weights = (size * sum(math.prod(problem.shape_of(role)) for role in roles) for roles in ("xy", "ww"))
    most = max(min(MOST_BYTES, request.max_workspace - weights) // max(tile, 1) // LEAST_TILES, 1) * LEAST_TILES
    chunk = padded(tiles(count, max(tiles(count, most), 1)), LEAST_TILES)
    return Cut(along, of_plane, count, max(chunk, LEAST_TILES))


def terms(request: Request) -> int:
    """How many numbers are added for each result."""
    patch = sum(one.products for one in along_of(request))
    return _problem(request, max(cut_of(request).total, 1)).terms(request.direction) + patch


def cost(request: Request) -> Cost:
    """The products, what the transforms move, and all launches."""
    cut, speeds, rooms = cut_of(request), machine(request), _rooms(request)
    price, launches = implicit.cost, 2 * len(cut.counts) + (not request.packed)
    if request.direction is Direction.GRAD_WEIGHT:
        price, launches = split.cost, launches + (len(cut.counts) > 1) + request.makes_bias
    each = {count: price(_product(request, count)) for count in {*cut.counts, cut.chunk}}
    multiplies = sum(each[count].multiplies for count in cut.counts)
    begins = multiplies * START / max(_problem(request, cut.chunk).terms(request.direction), SHALLOWEST)
    between = workspace_bytes(rooms[:2]) * cut.total // cut.chunk + workspace_bytes(rooms[2:])
    moved = moved_bytes(request) + between
    seconds = begins / implicit.speed(request) + moved / speeds.bytes + max(launches, 1) * speeds.call
    seconds += sum(each[count].seconds for count in cut.counts)
    workspace = workspace_bytes(rooms) + max(cost.workspace for cost in each.values())
    return Cost(multiplies, moved + between, workspace, seconds)


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: of a weight that stays."""
    if request.direction is Direction.GRAD_WEIGHT:
        return _bind_weight(request, tensors)
    rooms, (reads, _), makes = _rooms(request), request.direction.given, request.direction.makes
    steps = [
        (
            _forth(request, reads, tensors.first, part),
            _multiply(request, part.length),
            _back(request, makes, part),
        )
        for part in _parts(request)
    ]
    weigh, stays = _forth(request, "w", tensors.second, _part_of_weight(request)), None
    if made is not None:

        def transformed() -> Tensor:
            room = tensors.second.new_empty(_weight(request).shape)
            weigh(tensors.second, room)
            return room

        stays = kept_tensor(made, ("transformed", request.dtype, along_of(request)), transformed)

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        read, w, bias, residual = tensors
        patches, sums, *room = carve(workspace, rooms)
        bias, rest = implicit.in_order(bias), workspace[workspace_bytes(rooms) :]
        if stays is None:
            weigh(w, room[0])
        for forth, multiply, back in steps:
            forth(read, patches)
            multiply(patches, room[0] if stays is None else stays, sums, rest)
            back(sums, bias, residual, out)

    return run


def _bind_weight(request: Request, tensors: Tensors) -> Bound:
    rooms = _rooms(request)
    steps = [
        (
            _forth(request, "x", tensors.first, part),
            _forth(request, "y", tensors.second, part),
            _multiply(request, part.length),
        )
        for part in _parts(request)
    ]
    back = _back(request, "w", _part_of_weight(request))

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, y, bias, _ = tensors
        of_x, of_y, sums, *total = carve(workspace, rooms)
        rest = workspace[workspace_bytes(rooms) :]
        for (forth_x, forth_y, multiply), own in zip(steps, sums, strict=True):
            forth_x(x, of_x)
            forth_y(y, of_y)
            multiply(of_x, of_y, own, rest)
        back(torch.sum(sums, 0, out=total[0]) if total else sums, None, None, out)
        if bias is not None:
            sum_for_bias(y, bias)

    return run if steps else engine.zeros


# -- how it is cut ---------------------------------------------------------------------------------------------------


def _problem(request: Request, count: int) -> ConvProblem:
    """The convolution of so many tiles, which are along its width; the depth, if there is one, is as it was."""
    problem, matrices = request.problem, math.prod(along.products for along in along_of(request))
    depth, *_ = folded(problem, False)
    return ConvProblem(
        batch=1,
        in_channels=problem.in_channels * matrices,
        out_channels=problem.out_channels * matrices,
        spatial=(depth.size, count),
        kernel=(depth.kernel, 1),
        stride=(depth.stride, 1),
        padding=(depth.padding, (0, 0)),
        dilation=(depth.dilation, 1),
        groups=problem.groups * matrices,
        padding_mode=problem.padding_mode if problem.dims > 2 else "zeros",
    )


@lru_cache(4096)
def _product(request: Request, count: int) -> Request:
    """That of so many tiles, asked for."""
    return dataclasses.replace(
        request,
        problem=_problem(request, count),
        channels_last=True,
        has_bias=False,
        has_residual=False,
        activation=None,
        packed=request.direction is not Direction.GRAD_WEIGHT,  # the weight lies as it should
        max_workspace=max(request.max_workspace - workspace_bytes(_rooms(request)), 0),
    )


def _rooms(request: Request) -> list[Buffer]:
    """V and M of a chunk; and U, unless it stays, or the gradients for it of all chunks, and of several their sum."""
    cut, weight = cut_of(request), _weight(request)
    problem, roles = _problem(request, cut.chunk), "yx" if request.direction is Direction.GRAD_INPUT else "xy"
    rooms = [Buffer((math.prod(problem.shape_of(role)),), request.dtype) for role in roles]
    if request.direction is Direction.GRAD_WEIGHT:
        chunks = len(cut.counts)
        return [*rooms, weight._replace(shape=(chunks, *weight.shape)), *[weight] * (chunks > 1)]
    return [*rooms, *[weight] * (not request.packed)]


def _weight(request: Request) -> Buffer:
    """U, or the gradient for it; whatever follows begins at a multiple of 16 bytes, as kernels are compiled for."""
    return Buffer((padded(math.prod(_problem(request, 1).weight_shape), VECTOR),), request.dtype)


def _parts(request: Request) -> list[Part]:
    """The tiles of x and y that are made at a time."""
    cut = cut_of(request)
    return [Part(count, number * cut.chunk, cut.tiles) for number, count in enumerate(cut.counts)]


def _part_of_weight(request: Request) -> Part:
    """A weight's: each output channel of a group is an image of one tile."""
    return Part(request.problem.group_out, 0, (1, 1))


def _made(request: Request) -> tuple[int, ...]:
    """Rows and width of what is cut into tiles: the result, or y in GRAD_WEIGHT."""
    problem = request.problem
    return three(problem.spatial if request.direction is Direction.GRAD_INPUT else problem.out, 1)[1:]


def _step(request: Request) -> tuple[int, ...]:
    """Rows and width of a tile."""
    kernel = three(request.problem.kernel, 1)[1:]
    return tuple(along.places - taps + 1 for along, taps in zip(along_of(request), kernel, strict=True))


def _between(request: Request, role: str, count: int) -> Between:
    """How V and M lie, [plane, tile, group, matrix, channel], or U: [group, matrix, output, plane, channel]."""
    problem, matrices = request.problem, math.prod(along.products for along in along_of(request))
    if role == "w":
        depth = three(problem.kernel, 1)[0]
        row = depth * problem.group_in
        matrix = problem.group_out * row
        return Between(matrices * matrix, matrix, problem.group_in, row)
    channels = problem.group_in if role == "x" else problem.group_out
    tile = problem.groups * matrices * channels
    return Between(matrices * channels, channels, count * tile, tile)


def _numbers(high: transforms.Matrix, wide: transforms.Matrix) -> tuple[gpu.Matrix, gpu.Matrix]:
    """As the kernels are told."""
    first, second = (tuple(tuple(map(float, row)) for row in matrix) for matrix in (high, wide))
    return first, second


# -- the steps -------------------------------------------------------------------------------------------------------


def _forth(request: Request, role: str, read: Tensor, part: Part) -> Launch:
    """What is made of x, y or the weight before the product."""
    along, factor = along_of(request), role == request.direction.given[1]
    return gpu.forth(
        request,
        _numbers(*(one.weights if factor else one.forth for one in along)),
        _rows(request, role),
        _planes(request, role),
        part,
        read,
        _grouped(request, role, read.stride()),
        _between(request, role, part.length),
    )


def _back(request: Request, role: str, part: Part) -> Launch:
    """What is made of the product."""
    lies = implicit.strides(request)
    return gpu.back(
        request,
        _numbers(*(one.back for one in along_of(request))),
        _planes(request, role),
        part,
        _between(request, role, part.length),
        request.problem.shape_of(role),
        lies,
        _grouped(request, role, lies),
    )


def _multiply(request: Request, count: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """The product for so many tiles: of both factors, what is made, and workspace."""
    product = _product(request, count)
    shapes = [product.problem.shape_of(role) for role in (*product.direction.given, product.direction.makes)]
    given = (
        laid(torch.empty(math.prod(shape), dtype=request.dtype, device="meta"), shape, True) for shape in shapes[:2]
    )
    call = (split if product.direction is Direction.GRAD_WEIGHT else implicit).bind(product, Tensors(*given))

    def multiply(first: Tensor, second: Tensor, out: Tensor, workspace: Tensor) -> None:
        a, b, c = (laid(flat, shape, True) for flat, shape in zip((first, second, out), shapes, strict=True))
        call(Tensors(a, b), c, workspace)

    return multiply


def _planes(request: Request, role: str) -> int:
    """Of the depth."""
    return three(request.problem.shape_of(role)[2:], 1)[0]


def _grouped(request: Request, role: str, strides: tuple[int, ...]) -> Grouped:
    """The channels of a tensor; of a weight the input's, since its output's are images."""
    problem = request.problem
    channels = problem.group_out if role == "y" else problem.group_in
    return Grouped(problem.groups, channels, problem.group_out * strides[0] if role == "w" else channels * strides[1])


def _rows(request: Request, role: str) -> Rows:
    """What is read along rows and width: patches; or of the second tensor that is given tiles, or taps, as they are."""
    problem, step = request.problem, _step(request)
    kernel, size = three(problem.kernel, 1)[1:], three(problem.shape_of(role)[2:], 1)[1:]
    if role == request.direction.given[1]:
        return Rows(step, (0, 0), size, size)
    low, high = (three((pair[side] for pair in problem.padding), 0)[1:] for side in (0, 1))
    reach = tuple(made + taps - 1 for made, taps in zip(_made(request), kernel, strict=True))
    if role == "y":  # GRAD_INPUT, whose taps are in the opposite order
        return Rows(step, tuple(taps - 1 - lo for taps, lo in zip(kernel, low, strict=True)), size, reach)
    end = tuple(places + min(hi, 0) for places, hi in zip(size, high, strict=True))
    return Rows(step, low, end, reach, problem.padding_mode)
