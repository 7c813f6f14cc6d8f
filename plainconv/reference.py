"""The definition of convolution in tensor operations: for any type, any device, and as short as can be.

With p = y * stride + k * dilation a place of the padded input, all three directions are sums of the same products,

    FORWARD      y[n, g, o, y]  = sum over c, k     of  pad(x)[n, g, c, p] * w[g, o, c, k]
    GRAD_INPUT   x              = pad^T of the sum  over o, k, y of  y[n, g, o, y] * w[g, o, c, k]  at place p
    GRAD_WEIGHT  w[g, o, c, k]  = sum over n, y     of  pad(x)[n, g, c, p] * y[n, g, o, y]

written here as one pass over the image for every (tap k, input channel c).  It multiplies element by element, so
that integers wrap and no matrix library has a say.  Cost: taps * c/g passes over the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from torch import Tensor

from plainconv.border import Run, gather, inner, runs, scatter_add
from plainconv.problem import ConvProblem


def forward(problem: ConvProblem, x: Tensor, w: Tensor) -> Tensor:
    """y [n, o, *out] from x [n, c, *spatial] and w [o, c/g, *kernel], of x's type."""
    w = _split(w, 0, problem.groups)
    y = x.new_zeros(problem.batch, problem.groups, problem.group_out, *problem.out)
    for tap, seen in _taps(problem):
        window = _window(problem, x, seen)
        for c in range(problem.group_in):
            y += window[:, :, c, None] * _per_channel(w[inner((c, *tap))], problem.dims)
    return y.flatten(1, 2)


def grad_input(problem: ConvProblem, y: Tensor, w: Tensor) -> Tensor:
    """x [n, c, *spatial] from y [n, o, *out] and w [o, c/g, *kernel], of y's type."""
    y, w = _split(y, 1, problem.groups), _split(w, 0, problem.groups)
    x = y.new_zeros(problem.input_shape)
    window = y.new_empty(problem.batch, problem.groups, problem.group_in, *problem.out)
    for tap, seen in _taps(problem):
        for c in range(problem.group_in):
            window[:, :, c] = (y * _per_channel(w[inner((c, *tap))], problem.dims)).sum(2, dtype=y.dtype)
        scatter_add(window.flatten(1, 2), seen, x)
    return x


def grad_weight(problem: ConvProblem, x: Tensor, y: Tensor) -> Tensor:
    """w [o, c/g, *kernel] from x [n, c, *spatial] and y [n, o, *out], of x's type."""
    y = _split(y, 1, problem.groups)
    w = x.new_zeros(problem.groups, problem.group_out, problem.group_in, *problem.kernel)
    space = [0, *range(3, 3 + problem.dims)]
    for tap, seen in _taps(problem):
        window = _window(problem, x, seen)
        for c in range(problem.group_in):
            w[inner((c, *tap))] = (window[:, :, c, None] * y).sum(space, dtype=y.dtype)
    return w.flatten(0, 1)


def _taps(problem: ConvProblem) -> Iterator[tuple[tuple[int, ...], list[tuple[Run, ...]]]]:
    """Every tap of the kernel, and what the outputs see of the padded input through it, dimension by dimension."""
    for tap in product(*map(range, problem.kernel)):
        sides = zip(problem.spatial, problem.padding, tap, problem.dilation, problem.out, problem.stride, strict=True)
        yield tap, [runs(size, pair, problem.padding_mode, k * d, out, s) for size, pair, k, d, out, s in sides]


def _window(problem: ConvProblem, x: Tensor, seen: list[tuple[Run, ...]]) -> Tensor:
    window = x.new_empty(problem.batch, problem.in_channels, *problem.out)
    gather(x, seen, window)
    return _split(window, 1, problem.groups)


def _split(tensor: Tensor, dim: int, groups: int) -> Tensor:
    return tensor.unflatten(dim, (groups, tensor.shape[dim] // groups))


def _per_channel(w: Tensor, dims: int) -> Tensor:
    return w.reshape(w.shape + (1,) * dims)  # [g, o] -> [g, o, 1, ...]
