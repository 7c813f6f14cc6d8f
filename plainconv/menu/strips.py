"""The walk that `shift` and `im2col` share: strips of the input in, one or many matrix products, the output out.

The work is cut into slabs (some images, or a block of one image's output) small enough for the cache.  For a slab,
each *strip* holds the places  offset + stride * j  of the padded input, channels first and images side by side,
X [g, strips, c, m*S]; the output has the same pitch, Y [g, o, m*S].  What to multiply is the algorithm's own idea;
what is loaded before and stored behind it depends on the direction alone:

    FORWARD      load X, set Y to the bias, multiply, store Y
    GRAD_INPUT   load Y, set X to zero,     multiply, add X into the input
    GRAD_WEIGHT  load X, load Y,            multiply; the weight is stored once, at the end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import Tensor

from plainconv.border import Run, gather, inner, runs, scatter_add
from plainconv.menu.base import Buffer, Tensors, carve, compute_dtype, workspace_bytes
from plainconv.problem import ConvProblem, Direction, Request

SLAB_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}  # CPU: half of an L2 cache, measured best between 0.25 and 4 MiB
LEAST_COLUMNS = 256  # a matrix product with fewer columns does not reach its speed

# request, lengths of a strip, X [g, strips, c, m*S], W [g, taps, o, c], Y [g, o, m*S]
Multiply = Callable[[Request, tuple[int, ...], Tensor, Tensor, Tensor], None]


class Strips(NamedTuple):
    """offsets: where each strip begins in the padded input; reach: how far a strip is longer than the output."""

    offsets: tuple[tuple[int, ...], ...]
    reach: tuple[int, ...]


class Layout(NamedTuple):
    """How a request is cut: images of a slab, and places of their output along each dimension; the workspace."""

    images: int
    block: tuple[int, ...]
    buffers: tuple[Buffer, ...]

    @property
    def workspace(self) -> int:
        return workspace_bytes(self.buffers)

    def slabs(self, problem: ConvProblem) -> int:
        cuts = zip((problem.batch, *problem.out), (self.images, *self.block), strict=True)
        return math.prod(-(-size // cut) for size, cut in cuts)


def pitch(strips: Strips, block: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of a strip along each dimension, for a slab of so many output places."""
    return tuple(length + reach for length, reach in zip(block, strips.reach, strict=True))


def keeps_sums(request: Request) -> bool:
    """Whether the gradient for the input must be summed in a wider type than its own, and rounded once."""
    return request.direction is Direction.GRAD_INPUT and compute_dtype(request.dtype) != request.dtype


@lru_cache(4096)
def layout(request: Request, strips: Strips) -> Layout:
    """Cut the request into slabs that fit the cache, or at least the workspace, and list the scratch memory of one."""
    problem, dtype = request.problem, compute_dtype(request.dtype)
    count = len(strips.offsets)
    channels = count * problem.in_channels + problem.out_channels
    budget = request.max_workspace // 2
    target = min(SLAB_BYTES.get(request.device, SLAB_BYTES["cuda"]), budget)
    block = list(problem.out)

    def slab_bytes() -> int:
        return channels * math.prod(pitch(strips, tuple(block))) * dtype.itemsize

    def shorten(dim: int, most_bytes: int, least: int) -> None:
        if slab_bytes() > most_bytes:
            a_place = slab_bytes() // (block[dim] + strips.reach[dim])
            block[dim] = min(max(most_bytes // max(a_place, 1) - strips.reach[dim], least), block[dim])

    shorten(0, target, max(-(-LEAST_COLUMNS // max(math.prod(problem.out[1:]), 1)), 4 * strips.reach[0], 1))
    for dim in range(problem.dims):
        shorten(dim, budget, 1)
    an_image = math.prod(problem.input_shape[1:]) * dtype.itemsize if keeps_sums(request) else 0
    images = max(1, min(problem.batch, target // max(1, slab_bytes()), budget // max(1, 4 * an_image)))
    if tuple(block) != problem.out:
        images = 1
    size = images * math.prod(pitch(strips, tuple(block)))
    buffers = [
        Buffer((problem.groups * count * problem.group_in * size,), dtype),
        Buffer((problem.groups * problem.group_out * size,), dtype),
        Buffer((problem.groups, problem.taps, problem.group_out, problem.group_in), dtype),
    ]
    if keeps_sums(request):
        buffers.append(Buffer((images, problem.in_channels, *problem.spatial), dtype))
    return Layout(images, tuple(block), tuple(buffers))


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor, strips: Strips, multiply: Multiply) -> None:
    """Walk over the slabs of a request: load, multiply, store."""
    problem, direction = request.problem, request.direction
    plan = layout(request, strips)
    x_flat, y_flat, w_taps, *sums = carve(workspace, plan.buffers)
    x, w, y, bias = _by_role(direction, tensors, out)
    w_seen = w.reshape(problem.groups, problem.group_out, problem.group_in, problem.taps).permute(0, 3, 1, 2)
    if direction is Direction.GRAD_WEIGHT:
        w_taps.zero_()
    else:
        w_taps.copy_(w_seen)  # [g, taps, o, c]

    for images in _cuts(problem.batch, plan.images):
        x_part, y_part = x[images], y[images]
        if direction is Direction.GRAD_INPUT:
            total = sums[0][: len(x_part)] if sums else x_part
            total.zero_() if bias is None else total.copy_(_along(bias, problem.dims).expand_as(total))
        for block in product(*map(_cuts, problem.out, plan.block)):
            m, lengths = len(x_part), pitch(strips, tuple(side.stop - side.start for side in block))
            size = m * math.prod(lengths)
            strip_shape = (problem.groups, len(strips.offsets), problem.group_in, size)
            xs = x_flat[: math.prod(strip_shape)].view(strip_shape)
            ys = y_flat[: problem.out_channels * size].view(problem.groups, problem.group_out, size)
            xs_seen = xs.view(*strip_shape[:3], m, *lengths)
            ys_seen = ys.view(*ys.shape[:2], m, *lengths)[inner(slice(0, side.stop - side.start) for side in block)]
            y_block = _channels_first(y_part[inner(block)], problem.groups)
            places = [_places(problem, offset, block, lengths) for offset in strips.offsets]

            if direction is Direction.FORWARD:
                ys.zero_() if bias is None else ys.copy_(bias.view(*ys.shape[:2], 1).expand_as(ys))
            else:
                if ys.numel() != y_block.numel():
                    ys.zero_()
                ys_seen.copy_(y_block)
            if direction is Direction.GRAD_INPUT:
                xs.zero_()
            else:
                for i, axes in enumerate(places):
                    gather(_channels_first(x_part, problem.groups), axes, xs_seen[:, i])

            multiply(request, lengths, xs, w_taps, ys)

            if direction is Direction.FORWARD:
                y_block.copy_(ys_seen)
            elif direction is Direction.GRAD_INPUT:
                for i, axes in enumerate(places):
                    scatter_add(xs_seen[:, i], axes, _channels_first(total, problem.groups))
        if direction is Direction.GRAD_INPUT and sums:
            x_part.copy_(total)
    if direction is Direction.GRAD_WEIGHT:
        w_seen.copy_(w_taps)


def _by_role(direction: Direction, tensors: Tensors, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    role = {direction.given[0]: tensors.first, direction.given[1]: tensors.second, direction.makes: out}
    return role["x"], role["w"], role["y"], tensors.bias


def _cuts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _along(bias: Tensor, dims: int) -> Tensor:
    return bias.view(-1, *(1,) * dims)


def _channels_first(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(1, (groups, -1)).permute(1, 2, 0, *range(3, tensor.dim() + 1))  # [g, c, n, *spatial]


def _places(
    problem: ConvProblem, offset: tuple[int, ...], block: tuple[slice, ...], lengths: tuple[int, ...]
) -> list[tuple[Run, ...]]:
    """What a strip shows of the input, dimension by dimension."""
    return [
        runs(size, pair, problem.padding_mode, at + step * side.start, count, step)
        for size, pair, at, side, count, step in zip(
            problem.spatial, problem.padding, offset, block, lengths, problem.stride, strict=True
        )
    ]


def taps(problem: ConvProblem) -> Iterator[tuple[int, ...]]:
    """Places of the kernel's taps in the padded input, relative to where an output begins, in the weight's order."""
    reaches = zip(problem.kernel, problem.dilation, strict=True)
    return product(*(range(0, k * d, d) for k, d in reaches))
