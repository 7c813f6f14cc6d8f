"""Which of the dense kernels serves a direction, for `direct` and `pointwise` alike."""

from __future__ import annotations

from torch import Tensor

from plainconv.menu import dense, weights
from plainconv.menu.base import Bound, Cost, Tensors
from plainconv.problem import Direction, Request


def cost(request: Request) -> Cost:
    """That of the direction's kernel."""
    return weights.cost(request) if request.direction is Direction.GRAD_WEIGHT else dense.cost(request)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    if request.direction is Direction.GRAD_WEIGHT:
        return weights.bind(request, tensors)
    return dense.bind(request, tensors)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)
