"""Which of the dense kernels serves a direction on a device, for `direct` and `pointwise` alike.

On a CPU, a kernel as large as the image meets it in one place, and the convolution is a plain product of matrices:
images take the role of places, and the taps of a channel that of channels.  So a weight that no cache keeps is read
once for all.

    y[n, o]  =  sum over (c, t)  of  w[o, (c, t)] * x[n, (c, t)]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial

from torch import Tensor

from plainconv.menu import dense, engine, implicit, split, weights
from plainconv.menu.base import Bound, Cost, Made, Tensors
from plainconv.problem import ConvProblem, Direction, Request

WORTH = 1 << 16  # numbers of a weight, from which views of all tensors cost little beside the product


def why_not(request: Request) -> str | None:
    """The sentence for what the device's kernels do not serve."""
    return implicit.why_not(request) if request.device == "cuda" else engine.why_not(request)


def cost(request: Request) -> Cost:
    """That of the direction's kernel."""
    if request.device == "cuda":
        return split.cost(request) if request.direction is Direction.GRAD_WEIGHT else implicit.cost(request)
    request = _product(request) or request
    return weights.cost(request) if request.direction is Direction.GRAD_WEIGHT else dense.cost(request)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    if request.device == "cuda":
        weight = request.direction is Direction.GRAD_WEIGHT
        return split.bind(request, tensors) if weight else implicit.bind(request, tensors)
    if product := _product(request):
        return _bind_product(request, product, tensors, bind)
    if request.direction is Direction.GRAD_WEIGHT:
        return weights.bind(request, tensors)
    return dense.bind(request, tensors)


def pack(request: Request, tensors: Tensors, made: Made) -> Bound:
    """The same for a weight that stays."""
    if request.device == "cuda":
        return implicit.bind(request, tensors, made)
    if product := _product(request):
        order = "taps, channels" if request.channels_last else "channels, taps"  # of the weight's columns
        own = {key[1]: kept for key, kept in tuple(made.items()) if key[0] == order}
        bound = _bind_product(request, product, tensors, partial(pack, made=own))
        made.update({(order, key): kept for key, kept in own.items()})
        return bound
    return dense.bind(request, tensors, made)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


@lru_cache(4096)
def _product(request: Request) -> Request | None:
    """A request whose kernel is as large as the image, as one for a 1x1 kernel that moves along the images."""
    problem = request.problem
    one_place = problem.kernel == problem.spatial and all(pad == (0, 0) for pad in problem.padding)
    one_place &= all(size == 1 or step == 1 for size, step in zip(problem.kernel, problem.dilation, strict=True))
    small = problem.taps == 1 or math.prod(problem.weight_shape) < WORTH
    # A bias of the gradient for the input is the same for all taps of a channel.
    biased = request.direction is Direction.GRAD_INPUT and request.has_bias
    if not one_place or small or biased or problem.groups > 1 or problem.batch < 2:
        return None
    product = ConvProblem(
        batch=1,
        in_channels=problem.in_channels * problem.taps,
        out_channels=problem.out_channels,
        spatial=(1, problem.batch),
        kernel=(1, 1),
        stride=(1, 1),
        padding=((0, 0), (0, 0)),
        dilation=(1, 1),
    )
    return dataclasses.replace(request, problem=product, channels_last=True)


def _bind_product(
    request: Request, product: Request, tensors: Tensors, bind: Callable[[Request, Tensors], Bound]
) -> Bound:
    def seen(tensor: Tensor, role: str) -> Tensor:
        rows = (tensor.movedim(1, -1) if request.channels_last else tensor).flatten(1)
        return rows[:, :, None, None] if role == "w" else rows.T[None, :, None]

    first_role, second_role = request.direction.given
    made = request.direction.makes

    def views(tensors: Tensors) -> Tensors:
        first, second, bias, residual = tensors
        residual = None if residual is None else seen(residual, made)
        return Tensors(seen(first, first_role), seen(second, second_role), bias, residual)

    bound = bind(product, views(tensors))
    return lambda tensors, out, workspace: bound(views(tensors), seen(out, made), workspace)
