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
from enum import Enum
from functools import lru_cache, partial

from torch import Tensor

from plainconv.menu import dense, engine, implicit, split, weights
from plainconv.menu.axes import work
from plainconv.menu.base import Bound, Buffer, Cost, Made, Tensors, carve, kept_apart, workspace_bytes
from plainconv.menu.engine import step_of
from plainconv.problem import ConvProblem, Direction, Request

WORTH = 1 << 16  # numbers of a weight, from which views of all tensors cost little beside the product


def why_not(request: Request) -> str | None:
    """The sentence for what the device's kernels do not serve."""
    return implicit.why_not(request) if request.device == "cuda" else engine.why_not(request)


def cost(request: Request) -> Cost:
    """That of the direction's kernel."""
    if request.device == "cuda":
        return split.cost(request) if request.direction is Direction.GRAD_WEIGHT else implicit.cost(request)
    weighs = request.direction is Direction.GRAD_WEIGHT
    product = _product(request)
    if product is None:
        return weights.cost(request) if weighs else dense.cost(request)
    found = weights.cost(product) if weighs else dense.cost(product)
    # Nobody knows here whether the weight lies in one of the orders; if not, it is not seen as a matrix.
    plain = 0 if weighs else dense.workspace_bytes(work(request))
    return found._replace(workspace=max(found.workspace + workspace_bytes(_images(request)), plain))


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    if request.device == "cuda":
        weight = request.direction is Direction.GRAD_WEIGHT
        return split.bind(request, tensors) if weight else implicit.bind(request, tensors)
    if (product := _product(request)) and (order := _order(request, tensors)):
        return _bind_product(request, product, order, tensors, bind)
    if request.direction is Direction.GRAD_WEIGHT:
        return weights.bind(request, tensors)
    return dense.bind(request, tensors)


def pack(request: Request, tensors: Tensors, made: Made) -> Bound:
    """The same for a weight that stays."""
    if request.device == "cuda":
        return implicit.bind(request, tensors, made)
    if (product := _product(request)) and (order := _order(request, tensors)):
        with kept_apart(made, order) as own:
            return _bind_product(request, product, order, tensors, partial(pack, made=own))
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


class Order(Enum):
    """Of the columns of the weight, as it lies in memory; those of the images are put in the same one."""

    CHANNELS_TAPS = False
    TAPS_CHANNELS = True

    def of(self, tensor: Tensor) -> Tensor:
        """Its dimensions in this order."""
        return tensor.movedim(1, -1) if self.value else tensor

    def rows(self, tensor: Tensor) -> Tensor | None:
        """[n, columns], or None if these do not lie at one distance."""
        seen = self.of(tensor)
        return None if step_of(seen.shape[1:], seen.stride()[1:]) is None else seen.flatten(1)


def _order(request: Request, tensors: Tensors) -> Order | None:
    """None if the weight lies in neither order."""
    if request.direction is Direction.GRAD_WEIGHT:
        return Order(request.channels_last)
    return next((order for order in Order if order.rows(tensors.second) is not None), None)


def _images(request: Request) -> list[Buffer]:
    """Room for images in the order of the weight's columns, and for the residual of such."""
    problem = request.problem
    made = request.direction.makes == "x" and request.has_residual
    return [Buffer((problem.batch, problem.in_channels * problem.taps), request.dtype)] * (1 + made)


def _bind_product(
    request: Request, product: Request, order: Order, tensors: Tensors, bind: Callable[[Request, Tensors], Bound]
) -> Bound:
    first_role, second_role = request.direction.given
    made = request.direction.makes
    buffers = _images(request)
    begin = workspace_bytes(buffers)

    def seen(tensor: Tensor, role: str, room: Tensor) -> Tensor:
        """As the product has it; images whose columns lie otherwise are copied."""
        rows = order.rows(tensor)
        if rows is None:
            images = order.of(tensor)
            room.view(images.shape).copy_(images)
            rows = room
        return shaped(rows, role)

    def shaped(rows: Tensor, role: str) -> Tensor:
        return rows[:, :, None, None] if role == "w" else rows.T[None, :, None]

    def views(tensors: Tensors, rooms: list[Tensor]) -> Tensors:
        first, second, bias, residual = tensors
        residual = None if residual is None else seen(residual, made, rooms[-1])
        return Tensors(seen(first, first_role, rooms[0]), seen(second, second_role, rooms[0]), bias, residual)

    bound = bind(product, views(tensors, [tensors.first.new_empty(buffer.shape) for buffer in buffers]))

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        rooms = carve(workspace, buffers)
        found = order.rows(out)
        bound(views(tensors, rooms), shaped(rooms[0] if found is None else found, made), workspace[begin:])
        if found is None:
            images = order.of(out)
            images.copy_(rooms[0].view(images.shape))

    return call
