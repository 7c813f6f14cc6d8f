"""What the algorithms of the CPU engine share.

Names of types in the kernels' text, a problem folded to three dimensions, (depth, rows, width), the tables of what each
place of a padded input shows, and what none of them serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from plainconv.border import runs
from plainconv.cpu import compile as cpu
from plainconv.menu.base import Tensors, compute_dtype, sum_for_bias
from plainconv.problem import ConvProblem, Direction, Pair, Request

STORED = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "half"}
LAUNCHES_S = 8e-6  # from Python to two kernels and back
THREADS_S = 4e-6  # waking torch's threads
HALF_REGISTER = 1.1  # narrower vectors do a little less than their share
SMALL = 64 << 10  # bytes that one thread moves while others wake
MOST_PLACES = 1 << 20  # skipped at once along a dimension


def summed(request: Request) -> tuple[str, int]:
    """The type of the sums, and its bytes."""
    dtype = compute_dtype(request.dtype)
    return STORED[dtype], dtype.itemsize


def padded(count: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-count // to) * to


def fewer_idle(along: int, size: int, target: cpu.Target) -> int:
    """Lanes of the registers that hold `along` numbers in the fewest cycles; of two that are equal, the narrower."""
    widest = target.bits // 8 // size
    choices = (lanes for lanes in (16 // size, 32 // size, 64 // size) if lanes <= widest)
    return min(choices, key=lambda lanes: -(-along // lanes) * vector_cycles(lanes * size * 8, target))


def lanes_of_outputs(outputs: int, size: int, target: cpu.Target) -> int:
    """Of the widest register that outputs fill by more than half."""
    lanes = target.bits // 8 // size
    while lanes > 16 // size and lanes // 2 >= outputs:
        lanes //= 2
    return lanes


def vectors_of_outputs(vectors: int, spare: int, step: float) -> int:
    """Of a tile of a product, which has `spare` registers for sums and what is multiplied; step: cycles of its loop.

    Narrow tiles load more for each product; wide ones may have vectors without outputs.
    """
    most = min((4, 3, 2, 1), key=lambda v: padded(vectors, v) * (1 + step / v))
    while most > 1 and spare // most < 3:
        most -= 1
    return most


def vector_cycles(bits: int, target: cpu.Target) -> float:
    """Of a product of vectors so wide; processors with 512 bits do two narrower ones at once."""
    return 1.0 if bits > 256 else 0.5 * (HALF_REGISTER if bits < target.bits else 1.0)


def step_of(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one distance from place to place, if places follow each other so; sizes of 1 have any stride."""
    along = [(size, stride) for size, stride in zip(sizes[::-1], strides[::-1], strict=True) if size > 1]
    step = expected = along[0][1] if along else 1
    for size, stride in along:
        if stride != expected:
            return None
        expected *= size
    return step


def joined(parts: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Tables one behind the other, and the address where each begins."""
    tables = torch.cat(list(parts))
    sizes = (part.nbytes for part in parts[:-1])
    return tables, tuple(accumulate(sizes, initial=tables.data_ptr()))


def launches_s(shares: int) -> float:
    """Of a kernel with so many shares, and of one that adds what they made."""
    return LAUNCHES_S + THREADS_S * (shares > 1)


def movers(size: int, threads: int) -> int:
    """How many threads are worth waking to move so many bytes."""
    return threads if size > SMALL else 1


def zeros(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """The call that fills the gradient for a weight that met no products, and a bias' beside it."""
    out.zero_()
    if tensors.bias is not None:
        sum_for_bias(tensors.second, tensors.bias)


def why_not(request: Request) -> str | None:
    """The sentence for what none of the engine's kernels does."""
    if request.device != "cpu":
        return "its kernels are machine code of the CPU, and the tensors are on another device"
    return unlike(request) or too_far(request.problem) or cpu.why_not()


def why_not_transformed(request: Request) -> str | None:
    """The sentence for what neither of its Fourier transforms does, fourier.py and spectral.py."""
    if request.direction is Direction.GRAD_WEIGHT:
        return "it makes outputs and gradients for the input, and not those for the weight"
    if request.direction is Direction.GRAD_INPUT and request.problem.padding_mode != "zeros":
        return "the gradient for the input knows no border but zeros"
    if request.dtype not in (torch.float32, torch.float64):
        return "it computes in float32 and float64"
    return why_not(request)


def unlike(request: Request) -> str | None:
    """The sentence for what no engine's kernels do, on any device."""
    if request.dtype not in STORED:
        return f"its kernels compute in floating-point numbers, not {str(request.dtype).removeprefix('torch.')}"
    if request.problem.dims > 3:
        return "its loops are for at most three dimensions"
    return None


class Side(NamedTuple):
    """One dimension of a folded problem."""

    size: int
    kernel: int
    stride: int
    padding: Pair
    dilation: int
    out: int

    @property
    def plain(self) -> bool:
        """Whether the kernel does not move along it."""
        return self.kernel == 1 and self.stride == 1 and self.padding == (0, 0) and self.out == self.size


@lru_cache(4096)
def folded(problem: ConvProblem, merge: bool = True) -> tuple[Side, Side, Side]:
    """Depth, rows and width of a problem of at most three dimensions; merge: plain neighbours become one dimension."""
    parts = (problem.spatial, problem.kernel, problem.stride, problem.padding, problem.dilation, problem.out)
    sides: list[Side] = []
    for part in zip(*parts, strict=True):
        side = Side(*part)
        if side.out == 1:  # no second place to stride to
            side = side._replace(stride=1)
        if merge and sides and sides[-1].plain and side.plain:
            size = sides.pop().size * side.size
            side = side._replace(size=size, out=size)
        sides.append(side)
    one = Side(1, 1, 1, (0, 0), 1, 1)
    depth, high, width = (one,) * (3 - len(sides)) + tuple(sides)
    return depth, high, width


def too_far(problem: ConvProblem) -> str | None:
    """The sentence for what tables of every place cannot be made of: places far outside, or far apart."""
    for side in folded(problem, False):
        if max(*map(abs, side.padding), (side.kernel - 1) * side.dilation, side.stride) > MOST_PLACES:
            return f"its tables list every place, and padding, dilation or stride skip more than {MOST_PLACES} of them"
    return None


class Row(Protocol):
    """Elements in a row, and what they are padded with."""

    @property
    def size(self) -> int: ...
    @property
    def padding(self) -> Pair: ...


def shown(side: Row, mode: str, start: int, count: int, step: int = 1) -> Tensor:
    """For places start, start + step, ... of the padded input, the element that each shows, or -1."""
    elements = torch.full((count,), -1, dtype=torch.int64)
    for run in runs(side.size, side.padding, mode, start, count, step):
        if run.source >= 0:
            elements[run.at : run.at + run.length] = run.source + run.step * torch.arange(run.length)
    return elements
