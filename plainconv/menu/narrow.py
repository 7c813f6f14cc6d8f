"""Narrow: few channels, so the lanes of a vector are neighbours along the width.

    y[o, h, w .. w + lanes]  +=  weight[o, c, k] * x[c, h + k, w + k .. w + k + lanes]

Where channels are few, a vector of channels is mostly idle, and packing them costs more than the convolution.  Along
the width there is always enough.  A tile is `outputs` channels of `rows` rows: what is loaded of a row serves all the
output channels of the tile, and each weight, broadcast to all lanes, serves all rows.  With 6 x 4 sums in registers a
tap costs 4 loads and 6 weights for 24 multiplications.

Cost: n * o * c/g * taps * out multiplies, the width rounded up to lanes, the rows up to those of a tile.  No workspace.
"""

from __future__ import annotations

from torch import Tensor

from plainconv.cpu.compile import Target
from plainconv.menu import lanes
from plainconv.menu.base import Algorithm, Bound, Cost, Tensors, sum_error
from plainconv.problem import Request

ROWS = 4


def _tile(request: Request, target: Target) -> lanes.Tile:
    problem = request.problem
    _, high, width = lanes.folded(problem)
    loaded = width.stride if width.stride <= 4 else 1  # vectors that are loaded to pick one
    most = ROWS if target.registers > 16 and loaded <= 2 else ROWS // 2
    spare = target.registers - 2 - most * loaded
    outputs = max(spare // most, 1)
    tiles = -(-problem.group_out // outputs)
    even = -(-problem.group_out // tiles)  # 7 outputs are 4 and 3, not 6 and 1
    return lanes.Tile(even, 1, most, False) if high.out == 1 else lanes.Tile(even, most, 1, False)


def _cost(request: Request) -> Cost:
    return lanes.cost(request, _tile)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    _bind(request, tensors)(tensors, out, workspace)


def _bind(request: Request, tensors: Tensors) -> Bound:
    return lanes.bind(request, tensors, _tile)


ALGORITHM = Algorithm("narrow", lanes.why_not, _cost, sum_error, _run, bind=_bind)
