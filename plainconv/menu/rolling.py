"""Rolling rows: what `narrow` and `depthwise` are on a GPU, where few channels leave matrix units nothing to do.

    y[o, p]  =  sum over t, c  of  x[c, p meets t] * w[o, c, t]

The kernel reads all tensors as they lie, takes care of borders and strides itself, and keeps rows in registers while
taps pass over them: plainconv/gpu/kernels/rolling.py.  The gradient for the input is the same, in phases of the stride.
That for the weight has a sum for each tap in registers (kernels/taps.py), and is made in parts, as split.py says.

Cost: n * o * c/g * taps * out multiplies, outputs rounded up to those of a tile, and each tensor moved once.  Besides
memory it is instructions that take time, of which a GPU issues as many as it has multiplications of float32.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from plainconv.gpu import rows, taps
from plainconv.menu import implicit, split
from plainconv.menu.base import Bound, Cost, Tensors, machine, moved_bytes
from plainconv.menu.engine import padded
from plainconv.problem import Direction, Request

MOST_CHANNELS = 8  # of a group, read or made: with more of both, matrix units win
# Instructions for each output and each product, counted in the machine code for sm_90: 3x3 depthwise 32 in float32, 37
# in bfloat16 (channels_last 27, 33), 5x5 55 and 64, 7x7 111 and 129 (87, 109); 3 to 3 channels 3x3 57.
OUTPUT, PRODUCT = 14, 2
MOST_PROGRAMS = (1 << 31) - 1  # of a launch
SPEED = 2.0  # of the gradient for the weight: products without them, beside those of float32 in matrices


def why_not(request: Request) -> str | None:
    """The sentence for what the kernels do not do, or should not."""
    if sentence := implicit.why_not(request):
        return sentence
    fewest = min(request.problem.group_in, request.problem.group_out)
    if fewest > MOST_CHANNELS:
        return f"on a GPU it is for at most {MOST_CHANNELS} input or output channels a group, and here are {fewest}"
    if request.direction is not Direction.GRAD_WEIGHT and rows.cut_of(request).programs > MOST_PROGRAMS:
        return f"on a GPU it is for at most {MOST_PROGRAMS} tiles of places and channels, and a line has one or more"
    return None


def cost(request: Request) -> Cost:
    """Outputs rounded up to those of a tile."""
    problem = request.problem
    inner, outer, places = problem.group_in, problem.group_out, problem.out
    if request.direction is Direction.GRAD_INPUT:
        inner, outer = outer, inner
    made = problem.groups * outer
    if not request.channels_last:
        made = problem.groups * padded(outer, rows.tile_of(request).outputs)
    multiplies = problem.batch * math.prod(places) * made * inner * problem.taps
    speeds, moved = machine(request), moved_bytes(request)
    speed = speeds.multiplies / max(request.dtype.itemsize // 4, 1)
    if request.direction is Direction.GRAD_WEIGHT:
        parts = taps.taps_of(request, split.most_parts(request)).parts
        return split.priced(request, parts, multiplies, speed * SPEED)
    outputs = math.prod(problem.shape_of(request.direction.makes))
    seconds = max((outputs * OUTPUT + multiplies * PRODUCT) / speed, moved / speeds.bytes)
    return Cost(multiplies, moved, 0, speeds.call + seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    if request.direction is Direction.GRAD_WEIGHT:
        cut = taps.taps_of(request, split.most_parts(request))
        return split.added(request, cut.parts, partial(taps.taps, request, cut, tensors.first, tensors.second))
    fill = rows.rolling(request, tensors.first, tensors.second, implicit.strides(request))

    def run(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        read, w, bias, residual = tensors
        fill(read, w, implicit.in_order(bias), residual, out)

    return run
