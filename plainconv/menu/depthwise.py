"""Depthwise: each output channel sees one input channel, so the rows of a tile share what they load.

    y[o, h, w .. w + lanes]  +=  weight[o, k] * x[o // m, h + k, w + k .. w + k + lanes]

There are no other channels for which a loaded vector could be used again.  But neighbouring output rows read the same
input rows: 14 output rows of a 3x3 kernel read 16 rows, not 42.  So the taps of the rows are unrolled (of a long kernel
9 at a time), and each input row is loaded once for each kx and added wherever it is needed.

In channels_last the lanes are neighbouring channels instead, and a loaded pixel serves all the outputs of a tile of
rows and pixels that it lies under: plainconv/cpu/channels.py.  On a GPU rows are shared,
too: plainconv/menu/rolling.py.

Cost: n * o * taps * out multiplies, the width rounded up to lanes, the rows up to those of a tile.  The workspace is
room for a weight that is not contiguous; in channels_last, for a packed one of each thread.
"""

from __future__ import annotations

from torch import Tensor

from plainconv.cpu.compile import Target
from plainconv.menu import channels, lanes, pixels, rolling, taps
from plainconv.menu.base import Algorithm, Bound, Cost, Tensors, sum_error
from plainconv.menu.fold import folding
from plainconv.menu.trim import trimming
from plainconv.problem import Direction, Request


def _tile(request: Request, target: Target, sides: lanes.Sides) -> lanes.Tile:
    return lanes.best_tile(request, target, sides, 1)


def _why_not(request: Request) -> str | None:
    problem = request.problem
    summed, word = problem.group_in, "input"
    if request.direction is Direction.GRAD_INPUT:
        summed, word = problem.group_out, "output"
    if summed != 1:
        return f"it is for one {word} channel a group, and here are {summed}"
    if request.device == "cuda":
        return rolling.why_not(request)
    return channels.why_not(request) if request.channels_last else lanes.why_not(request)


def _cost(request: Request) -> Cost:
    if request.device == "cuda":
        return rolling.cost(request)
    if request.direction is Direction.GRAD_WEIGHT:
        return pixels.cost(request) if request.channels_last else taps.cost(request)
    return channels.cost(request) if request.channels_last else lanes.cost(request, _tile)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    _bind(request, tensors)(tensors, out, workspace)


def _bind(request: Request, tensors: Tensors) -> Bound:
    if request.device == "cuda":
        return rolling.bind(request, tensors)
    if request.direction is Direction.GRAD_WEIGHT:
        return pixels.bind(request, tensors) if request.channels_last else taps.bind(request, tensors)
    return channels.bind(request, tensors) if request.channels_last else lanes.bind(request, tensors, _tile)


ALGORITHM = folding(
    trimming(Algorithm("depthwise", _why_not, _cost, sum_error, _run, version=5, fuses=True, bind=_bind))
)
