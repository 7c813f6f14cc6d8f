"""Reading a strip of the padded input without ever padding the input.

Every padding mode, negative padding (cropping) and every stride is one question for each dimension: which element of
the input does place p of the padded row show?  With lo places before it, and M elements left after cropping, let
q = p - max(lo, 0) count from the first element that is left:

    zeros      q                    inside 0 <= q < M, else nothing (a zero)
    reflect    |q|                  and 2 (M - 1) - q behind the end
    replicate  min(max(q, 0), M-1)
    circular   q mod M

On each side of the borders the answer is an arithmetic progression, so a strip of places start, start + step, ... is
at most five `Run`s, whatever its length.  `gather` copies a strip, `scatter_add` is its adjoint: what falls into the
border is added where the mode would have read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from types import EllipsisType
from typing import NamedTuple

from torch import Tensor

from plainconv.problem import Pair

Index = tuple[EllipsisType | slice | int, ...]


class Run(NamedTuple):
    """Strip places at .. at + length - 1 show input elements source, source + step, ...; source -1: zeros."""

    at: int
    length: int
    source: int
    step: int


def runs(size: int, padding: Pair, mode: str, start: int, count: int, step: int = 1) -> tuple[Run, ...]:
    """The runs of the strip  start + step * i,  i < count,  along a dimension of `size` elements.

    Places outside the padded row are zeros in every mode.
    """
    lo, hi = max(padding[0], 0), max(padding[1], 0)
    first = -min(padding[0], 0)  # the first element that cropping leaves
    inside = size - first + min(padding[1], 0)

    def until(q: int) -> int:
        """How many places of the strip lie before q."""
        return min(max(-(-(q + lo - start) // step), 0), count)

    def show(i: int) -> int:
        return start + step * i - lo

    before, begin, end, after = until(-lo), until(0), until(inside), until(inside + hi)
    if mode == "reflect":
        low, high, border_step = -show(before), 2 * (inside - 1) - show(end), -step
    elif mode == "replicate":
        low, high, border_step = 0, inside - 1, 0
    elif mode == "circular":
        low, high, border_step = show(before) + inside, show(end) - inside, step
    else:
        low, high, border_step = -1 - first, -1 - first, 0
    pieces = (
        Run(0, before, -1, 0),
        Run(before, begin - before, low + first, border_step),
        Run(begin, end - begin, show(begin) + first, step),
        Run(end, after - end, high + first, border_step),
        Run(after, count - after, -1, 0),
    )
    return tuple(run for run in pieces if run.length)


def inner(sides: Iterable[slice | int]) -> Index:
    """An index that takes these of the last dimensions, and all of those before."""
    return (..., *sides)


def _part(axes: Sequence[Run]) -> Index:
    return inner(slice(run.at, run.at + run.length) for run in axes)


def _window(tensor: Tensor, axes: Sequence[Run]) -> tuple[Tensor, list[int], list[int]]:
    """The elements that the runs show, as a view, and which dimensions to flip or to repeat to see them in order."""
    view: list[slice] = []
    flips, repeats = [], []
    for dim, run in enumerate(axes, start=-len(axes)):
        last = run.source + run.step * (run.length - 1)
        if run.step > 0:
            view.append(slice(run.source, last + 1, run.step))
        elif run.step < 0:
            view.append(slice(last, run.source + 1, -run.step))
            flips.append(dim)
        else:
            view.append(slice(run.source, run.source + 1))
            repeats.append(dim)
    return tensor[inner(view)], flips, repeats


def _shown(axes: Sequence[Sequence[Run]]) -> list[tuple[Run, ...]]:
    return list(product(*([run for run in axis if run.source >= 0] for axis in axes)))


def gather(source: Tensor, axes: Sequence[Sequence[Run]], out: Tensor) -> None:
    """Fill out[..., i, j], as long as the strips, with source[..., the element that the runs of each axis show]."""
    if any(run.source < 0 for axis in axes for run in axis):
        out.zero_()
    for piece in _shown(axes):
        window, flips, _ = _window(source, piece)
        if flips:
            window = window.to(out.dtype).flip(flips)  # first the type: complex32 cannot be flipped on a CPU
        out[_part(piece)].copy_(window)  # a repeated element broadcasts


def scatter_add(strip: Tensor, axes: Sequence[Sequence[Run]], into: Tensor) -> None:
    """The adjoint of `gather`: into[..., element shown at i, j] += strip[..., i, j], in a fixed order."""
    for piece in _shown(axes):
        window, flips, repeats = _window(into, piece)
        part = strip[_part(piece)]
        if repeats:
            part = part.sum(repeats, keepdim=True, dtype=strip.dtype)
        window.add_(part.flip(flips) if flips else part)
