"""How `fft` runs on the CPU engine: discrete Fourier transforms of short rows, in registers.

A tile reads F places along a dimension, a power of two, and makes F - k + 1 outputs; where the kernel is longer than
that allows, its taps are cut into blocks of F/2, for tiles of as many outputs (see plainconv/cpu/fourier.py).  Each
tile costs 3F/2 - 1 products along each dimension, and the transforms some more for each channel.  All the rest, how the
tiles are cut into blocks, dealt to threads and multiplied, is Winograd's.

Cost: n * o * c/g * product(3F/2 - 1) multiplies for each tile, and log F for each channel and number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import lru_cache

from plainconv.cpu import fourier
from plainconv.menu import engine, winograd
from plainconv.menu.axes import work
from plainconv.menu.base import Bound, Cost, Made, Tensors, summation_error
from plainconv.menu.engine import Side, folded
from plainconv.menu.winograd import Form, Way, cut_by, sides_of
from plainconv.problem import Request

SQUARE = (8, 16)  # lengths, where the kernel moves along rows and width
LINE = (8, 16, 32, 64)  # and where along one of them
MOST_BLOCKS = 64
LONG = {1: 512, 2: 64}  # places along each of so many dimensions: what is longer has one form for all sizes ...
LONGER = 1 << 20  # ... that of what is longer by so much

# Cycles of the transforms for each vector of each number, and for each halving of a row.
EACH = 2.4
WEIGHT = 4.0
FAR = 25.0  # more, for each vector of each number of squares that lie too far apart for a core's own cache
NEAR_BYTES = 3 << 20


def why_not(request: Request) -> str | None:
    """The sentence for what these kernels do not serve."""
    problem = request.problem
    if sentence := engine.why_not_transformed(request):
        return sentence
    if any(side.stride > 1 for side in folded(problem, False)) or set(problem.dilation) != {1}:
        return "it is for stride 1 and no dilation"
    if problem.taps == 1:
        return "a kernel of one tap has nothing to transform"
    if (problem.group_in, problem.group_out) == (1, 1):
        return "lanes are channels, and a group of one leaves all others idle"
    if not _forms(sides_of(work(request))):
        return "the kernel is too large for rows so short, or moves along the depth"
    return None


@lru_cache(4096)
def _forms(sides: tuple[Side, Side, Side]) -> tuple[Form, ...]:
    depth, high, width = sides
    if depth.kernel > 1:
        return ()
    lengths = LINE if min(high.kernel, width.kernel) == 1 else SQUARE
    found = []
    for (rows, m, one), (cols, n, blocks) in itertools.product(_rows(high, lengths), _rows(width, lengths)):
        if one == 1 and (blocks == 1 or high.kernel == 1):
            numbers = 1, fourier.numbers(rows), fourier.numbers(cols)
            found.append(Form((1, m, n), (1, rows, cols), numbers, True, blocks))
    return tuple(found)


def _rows(side: Side, lengths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Lengths, outputs of a tile, and blocks of the kernel, along a dimension."""
    if side.kernel == 1:
        return [(1, 1, 1)]
    whole = [(length, length - side.kernel + 1, 1) for length in lengths if length > side.kernel]
    cut = [(length, length // 2, -(-side.kernel // (length // 2))) for length in lengths if 2 * side.kernel > length]
    return whole + [(length, m, blocks) for length, m, blocks in cut if 1 < blocks <= MOST_BLOCKS]


@lru_cache(4096)
def way(request: Request) -> Way:
    """The form of least estimated time, and how to cut it."""
    problem, sides = request.problem, sides_of(work(request))
    forms, moved = _forms(sides), [side for side in sides if side.kernel > 1]
    if min(side.out for side in moved) > LONG[len(moved)]:
        sizes = zip(problem.spatial, problem.kernel, strict=True)
        longer = dataclasses.replace(problem, spatial=tuple(size + LONGER * (k > 1) for size, k in sizes), batch=1)
        forms = (_quickest(dataclasses.replace(request, problem=longer), forms).form,)
    return _quickest(request, forms)


def _quickest(request: Request, forms: tuple[Form, ...]) -> Way:
    cuts = (cut_by(request, form, whole) for form in forms for whole in {False, request.packed})
    return min(cuts, key=lambda cut: _cost(request, cut).seconds)


def cost(request: Request) -> Cost:
    """Of a request that `why_not` lets through."""
    return _cost(request, way(request))


def _cost(request: Request, cut: Way) -> Cost:
    halvings = sum(math.log2(length) for length in cut.form.patch)
    far = min(cut.form.patch[1:]) > 1 and winograd.block_bytes(request, cut) > NEAR_BYTES
    each = EACH * halvings + FAR * far
    return winograd.cost(request, cut, each, each, WEIGHT * halvings)


def error(request: Request) -> float:
    """Of the sums over channels and blocks, of numbers as large as a tile's largest, and of the transforms."""
    form = way(request).form
    taps = [side.kernel for side in sides_of(work(request))]
    grown = math.prod(length / k for length, k in zip(form.patch, taps, strict=True) if length > 1)
    return 3 * math.sqrt(max(grown, 1.0)) * summation_error(work(request).group_in * form.blocks + sum(form.patch))


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: see Algorithm.pack."""
    # What comes behind the convolution is left to the caller: in tensor operations `fft` does not do it either.
    bare = dataclasses.replace(request, has_residual=False, activation=None)
    return winograd.bind_cut(bare, way(request), Tensors(tensors.first, tensors.second, tensors.bias), made)
