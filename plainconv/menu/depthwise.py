"""Depthwise: each output channel sees one input channel, so the rows of a tile share what they load.

    y[o, h, w .. w + lanes]  +=  weight[o, k] * x[o // m, h + k, w + k .. w + k + lanes]

There are no other channels for which a loaded vector could be used again.  But neighbouring output rows read the same
input rows: 4 output rows of a 3x3 kernel read 6 rows, not 12.  So the taps of the rows are unrolled, and each input row
is loaded once for each kx and added wherever it is needed.

Cost: n * o * taps * out multiplies, the width rounded up to lanes, the rows up to those of a tile.  No workspace.
"""

from __future__ import annotations

from torch import Tensor

from plainconv.cpu.compile import Target
from plainconv.menu import lanes
from plainconv.menu.base import Algorithm, Bound, Cost, Tensors, sum_error
from plainconv.problem import Request

MOST_UNROLLED = 100  # products in the code of one tile, for each kx


def _tile(request: Request, target: Target) -> lanes.Tile:
    problem = request.problem
    _, high, width = lanes.folded(problem)
    loaded = width.stride if width.stride <= 4 else 1
    if high.out == 1:
        vectors = 8 if target.registers > 16 else 4
        vectors = max(vectors // loaded, 1)
        return lanes.Tile(1, 1, vectors, False)
    for rows in (7, 4, 2):  # 7: the maps of most networks are 7 * 2^n high
        places = {r * high.stride + k * high.dilation for r in range(rows) for k in range(high.kernel)}
        registers = rows + len(places) * loaded + 2
        if registers <= target.registers and rows * high.kernel <= MOST_UNROLLED:
            return lanes.Tile(1, rows, 1, True)
    return lanes.Tile(1, max(4 // loaded, 1), 1, False)


def _why_not(request: Request) -> str | None:
    if request.problem.group_in != 1:
        return f"it is for one input channel a group, and here are {request.problem.group_in}"
    return lanes.why_not(request)


def _cost(request: Request) -> Cost:
    return lanes.cost(request, _tile)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    _bind(request, tensors)(tensors, out, workspace)


def _bind(request: Request, tensors: Tensors) -> Bound:
    return lanes.bind(request, tensors, _tile)


ALGORITHM = Algorithm("depthwise", _why_not, _cost, sum_error, _run, bind=_bind)
