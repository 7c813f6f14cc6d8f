"""Narrow: few channels, so the lanes of a vector are neighbours along the width.

    y[o, h, w .. w + lanes]  +=  weight[o, c, k] * x[c, h + k, w + k .. w + k + lanes]

Where channels are few, a vector of channels is mostly idle, and packing them costs more than the convolution.  Along
the width there is always enough.  A tile is `outputs` channels of `rows` rows: what is loaded of a row serves all the
output channels of the tile, and each weight, broadcast to all lanes, serves all rows.  With 3 x 7 sums in registers, 3
taps along the rows cost 9 loads and 9 weights for 63 multiplications.

In channels_last the lanes are neighbouring output channels instead, of one group or of several, and a loaded input
channel serves all the outputs of a tile of rows and pixels that it lies under: plainconv/cpu/channels.py.  On a GPU
lanes are places or channels, and rows stay in registers: plainconv/menu/rolling.py.

Cost: n * o * c/g * taps * out multiplies, the width rounded up to lanes, the rows up to those of a tile.  The workspace
is room for a weight that is not contiguous, for the sums of GRAD_WEIGHT, or for the gradient of a border (see fold.py).
"""

from __future__ import annotations

from torch import Tensor

from plainconv.cpu.compile import Target
from plainconv.menu import channels, lanes, rolling, taps
from plainconv.menu.base import Algorithm, Bound, Cost, Tensors, sum_error
from plainconv.menu.fold import folding
from plainconv.menu.trim import trimming
from plainconv.problem import Direction, Request

MOST_OUTPUTS = 6  # of a tile


def _tile(request: Request, target: Target, sides: lanes.Sides) -> lanes.Tile:
    return lanes.best_tile(request, target, sides, MOST_OUTPUTS)


def _why_not(request: Request) -> str | None:
    if request.device == "cuda":
        sentence = rolling.why_not(request)
    else:
        sentence = channels.why_not_groups(request) if request.channels_last else lanes.why_not(request)
    problem = request.problem
    if sentence is None and problem.groups > 1 and problem.group_in == problem.group_out == 1:
        return "with one channel a group its kernel is the one of depthwise; use algorithm='depthwise'"
    return sentence


def _cost(request: Request) -> Cost:
    if request.device == "cuda":
        return rolling.cost(request)
    if request.direction is Direction.GRAD_WEIGHT:
        return taps.cost(request)
    return channels.cost(request) if request.channels_last else lanes.cost(request, _tile)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    _bind(request, tensors)(tensors, out, workspace)


def _bind(request: Request, tensors: Tensors) -> Bound:
    if request.device == "cuda":
        return rolling.bind(request, tensors)
    if request.direction is Direction.GRAD_WEIGHT:
        return taps.bind(request, tensors)
    if request.channels_last:
        return channels.bind(request, tensors)
    return lanes.bind(request, tensors, _tile)


ALGORITHM = folding(trimming(Algorithm("narrow", _why_not, _cost, sum_error, _run, version=5, fuses=True, bind=_bind)))
