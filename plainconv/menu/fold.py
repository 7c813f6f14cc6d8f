"""The gradient for the input of a padding mode, by algorithms that know only zeros.

A mode shows elements again in the border; its adjoint adds what falls there to the elements that were shown.  So the
gradient that ignores the border is made first, straight into the result, and then a frame: the gradient of the border
alone, in slabs, two for each dimension.  A slab is a problem of its own, of few places and of those outputs that reach
them, and is added, piece by piece in a fixed order, to the elements that it shows.  No padded tensor is made.

Half types are summed in float32, and must be rounded once.  There the bands that the border shows (with reflect, as
many places as the padding has, and the first) are made again, border and band side by side, and overwrite the result.
They are few: so are the places of y that are widened for them, and the sums.

Where a frame is most of the picture, or the weight so large that to read it for each slab takes longer, the gradient of
the padded input is made whole: one slab that has all places.

Cost: some rows and columns more than without the border; a workspace of the largest slab's size, and of half types also
a weight in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.border import Run, runs, scatter_add
from plainconv.menu.base import (
    Algorithm,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    compute_dtype,
    finish,
    finish_seconds,
    kept_tensor,
    laid,
    machine,
    workspace_bytes,
)
from plainconv.problem import Direction, Request
from plainconv.remember import on_forget

Part = tuple[slice, ...]  # an index of a tensor


class Slab(NamedTuple):
    """A box of the padded input: the gradient for it alone, the part of y that reaches it, what its places show."""

    request: Request
    reached: Part
    shows: tuple[tuple[Run, ...], ...]


class Frame(NamedTuple):
    """Slabs that are summed together, in a tensor of this shape, whose parts then are parts of the result."""

    shape: tuple[int, ...]
    slabs: tuple[Slab, ...]
    parts: tuple[tuple[Part, Part], ...]


class Way(NamedTuple):
    """What is made: the gradient without the border, unless a frame is the whole; and frames."""

    inside: Request | None
    frames: tuple[Frame, ...]

    @property
    def requests(self) -> list[Request]:
        """All that the algorithm is asked for."""
        slabs = [slab.request for frame in self.frames for slab in frame.slabs]
        return slabs if self.inside is None else [self.inside, *slabs]


def folding(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, which has `bind`, and also serves the gradient for the input of every padding mode."""
    bind, pack = algorithm.bind, algorithm.pack
    if bind is None:
        raise ValueError(f"{algorithm.name} has no bind")

    def refusal(way: Way, dtype: torch.dtype) -> str | None:
        # Asked of the tensors' own type, though slabs are summed in a wider one.
        asked = (dataclasses.replace(request, dtype=dtype) for request in way.requests)
        return next((sentence for each in asked if (sentence := algorithm.why_not(each))), None)

    def why_not(request: Request) -> str | None:
        if not _folds(request):
            return algorithm.why_not(request)
        sentences = [refusal(way, request.dtype) for way in _ways(request)]
        return None if None in sentences else sentences[-1]

    def cost(request: Request) -> Cost:
        return chosen(request)[1] if _folds(request) else algorithm.cost(request)

    @lru_cache(4096)
    def chosen(request: Request) -> tuple[Way, Cost]:
        """The way that is quicker, of those whose memory is allowed."""
        able = [way for way in _ways(request) if refusal(way, request.dtype) is None]
        stays = request.packed and pack is not None
        costs = [(way, _cost(request, way, [algorithm.cost(asked) for asked in way.requests], stays)) for way in able]
        return min(costs, key=lambda each: (max(each[1].workspace, request.max_workspace), each[1].seconds))

    def error(request: Request) -> float:
        requests = chosen(request)[0].requests if _folds(request) else [request]
        return max(map(algorithm.error, requests), default=0.0)

    def bound(request: Request, tensors: Tensors) -> Bound:
        return _bind(request, chosen(request)[0], tensors, bind) if _folds(request) else bind(request, tensors)

    def packed(request: Request, tensors: Tensors, made: Made) -> Bound:
        """Where it folds, the weight is widened once, too."""
        assert pack is not None
        if not _folds(request):
            return pack(request, tensors, made)
        wide, way = tensors.second, chosen(request)[0]
        if _widens(request):
            dtype = compute_dtype(request.dtype)
            wide = kept_tensor(made, ("wide", dtype), lambda: tensors.second.to(dtype))
        return _bind(request, way, tensors, lambda asked, given: pack(asked, given, made), wide)

    def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        bound(request, tensors)(tensors, out, workspace)

    on_forget(chosen.cache_clear)
    held = packed if pack else None
    return dataclasses.replace(algorithm, why_not=why_not, cost=cost, error=error, run=run, bind=bound, pack=held)


def _folds(request: Request) -> bool:
    return request.direction is Direction.GRAD_INPUT and request.problem.padding_mode != "zeros"


# -- what is made ----------------------------------------------------------------------------------------------------


@lru_cache(4096)
def _ways(request: Request) -> tuple[Way, ...]:
    """By a frame, and as a whole."""
    problem, everything = request.problem, (slice(None),)
    whole = _slab(request, problem.spatial, [(0, size) for size in problem.padded])
    made_whole = Way(None, (Frame(problem.input_shape, tuple(whole), ((everything, everything),)),))
    inside = dataclasses.replace(request, problem=dataclasses.replace(problem, padding_mode="zeros"))
    if _widens(request):
        frames = [_bands(request, dim) for dim in range(problem.dims)]
        if None in frames:
            return (made_whole,)
        return Way(inside, tuple(frame for frame in frames if frame and frame.slabs)), made_whole
    border = Frame(problem.input_shape, tuple(_border(request)), ((everything, everything),))
    return Way(dataclasses.replace(inside, activation=None), (border,)), made_whole


def _widens(request: Request) -> bool:
    """Whether sums are kept in another type than the result."""
    return compute_dtype(request.dtype) != request.dtype


def _border(request: Request) -> Iterator[Slab]:
    """Each place of the border once: before and behind one dimension after the other."""
    problem = request.problem
    box = [(0, size) for size in problem.padded]
    for dim, (lo, inside, hi) in enumerate(map(_lengths, problem.spatial, problem.padding)):
        for begin, count in ((0, lo), (lo + inside, hi)):
            box[dim] = begin, count
            yield from _slab(request, problem.spatial, box)
        box[dim] = lo, inside


def _lengths(size: int, padding: tuple[int, int]) -> tuple[int, int, int]:
    """Of a padded dimension: places before, elements inside (less those that are cropped), places behind."""
    lo, hi = padding
    return max(lo, 0), size + min(lo, 0) + min(hi, 0), max(hi, 0)


def _bands(request: Request, dim: int) -> Frame | None:
    """The border along a dimension, side by side with what it shows; None if that is all there is."""
    problem = request.problem
    lo, inside, hi = _lengths(problem.spatial[dim], problem.padding[dim])
    first = max(-problem.padding[dim][0], 0)  # the first element that cropping leaves
    low, high = {
        "reflect": (lo and lo + 1, hi and hi + 1),
        "replicate": (min(lo, 1), min(hi, 1)),
        "circular": (hi, lo),
    }[problem.padding_mode]
    if low + high >= inside > 0:
        return None
    # A row of the two bands alone shows in its border what the whole row does.
    sizes = [*problem.spatial]
    sizes[dim] = low + high
    padding = tuple((lo, hi) if d == dim else pair for d, pair in enumerate(problem.padding))
    box, starts = [(0, size) for size in problem.padded], [0] * problem.dims
    slabs: list[Slab] = []
    for begin, count, start in ((0, lo + low, 0), (lo + inside - high, high + hi, lo + low)):
        box[dim], starts[dim] = (begin, count), start
        slabs += _slab(request, tuple(sizes), box, padding, starts)
    front = (slice(None),) * (2 + dim)
    parts = (
        ((*front, slice(0, low)), (*front, slice(first, first + low))),
        ((*front, slice(low, low + high)), (*front, slice(first + inside - high, first + inside))),
    )
    return Frame((problem.batch, problem.in_channels, *sizes), tuple(slabs), parts)


def _slab(
    request: Request,
    sizes: tuple[int, ...],
    box: Sequence[tuple[int, int]],
    padding: Sequence[tuple[int, int]] | None = None,
    starts: Sequence[int] | None = None,
) -> list[Slab]:
    """The slab of a box, (first place, count) along each dimension, if it has places, and outputs that reach them.

    sizes, padding, starts: of the row that says what is shown, and where in it the places are, if not as the request's
    """
    problem = request.problem
    reached, pairs = [], []
    for (at, count), kernel, stride, dilation, out in zip(
        box, problem.kernel, problem.stride, problem.dilation, problem.out, strict=True
    ):
        extent = (kernel - 1) * dilation + 1
        first = max(-((extent - 1 - at) // stride), 0)
        last = min((at + count - 1) // stride, out - 1)
        if count < 1 or last < first:
            return []
        before = at - first * stride
        behind = (last - first) * stride + extent - count - before  # at least; a stride leaves some choice
        reached.append(slice(first, last + 1))
        pairs.append((before, min(max(behind, 0), behind + stride - 1)))
    own = dataclasses.replace(
        problem, spatial=tuple(count for _, count in box), padding=tuple(pairs), padding_mode="zeros"
    )
    asked = dataclasses.replace(
        request,
        problem=own,
        dtype=compute_dtype(request.dtype),
        has_bias=False,
        has_residual=False,
        activation=None,
    )
    rows = zip(sizes, padding or problem.padding, starts or [at for at, _ in box], own.spatial, strict=True)
    shows = tuple(runs(size, pair, problem.padding_mode, start, count) for size, pair, start, count in rows)
    return [Slab(asked, (slice(None), slice(None), *reached), shows)]


# -- what it takes ---------------------------------------------------------------------------------------------------


def _buffers(request: Request, way: Way, stays: bool) -> list[Buffer]:
    """The largest slab; and of half types the sums of a frame, the outputs that reach a slab, and the weight, wider.

    stays: whether the weight is made wider elsewhere
    """
    problems = [slab.request.problem for frame in way.frames for slab in frame.slabs]
    sizes = [max((math.prod(problem.input_shape) for problem in problems), default=0)]
    if _widens(request):
        sizes.append(max((math.prod(frame.shape) for frame in way.frames), default=0))
        sizes.append(max((math.prod(problem.output_shape) for problem in problems), default=0))
        sizes.append(math.prod(request.problem.weight_shape) if way.frames and not stays else 0)
    return [Buffer((size,), compute_dtype(request.dtype)) for size in sizes]


def _cost(request: Request, way: Way, inner: Sequence[Cost], stays: bool) -> Cost:
    """inner: of each of the way's requests."""
    buffers, slabs = _buffers(request, way, stays), [slab for frame in way.frames for slab in frame.slabs]
    own = workspace_bytes(buffers)
    moved = 4 * sum(math.prod(slab.request.problem.input_shape) for slab in slabs)
    calls = sum(math.prod(map(len, slab.shows)) for slab in slabs)
    behind = finish_seconds(dataclasses.replace(request, has_residual=request.has_residual and way.inside is None))
    if way.inside is None:
        moved += math.prod(request.problem.input_shape)
    if _widens(request):
        moved += 2 * sum(math.prod(slab.request.problem.output_shape) for slab in slabs)
        moved += 3 * sum(math.prod(frame.shape) for frame in way.frames) + buffers[-1].shape[0]
        calls += 2 * len(slabs)
    moved *= buffers[0].dtype.itemsize
    slab_inner = inner[1:] if way.inside else inner
    workspace = own + max((cost.workspace for cost in slab_inner), default=0)
    return Cost(
        sum(cost.multiplies for cost in inner),
        sum(cost.bytes for cost in inner) + moved,
        max(workspace, inner[0].workspace if inner else 0),
        sum(cost.seconds for cost in inner)
        + moved / machine(request).bytes
        + 2 * (calls + len(way.frames)) * machine(request).call
        + behind,
    )


# -- the call --------------------------------------------------------------------------------------------------------


def _bind(
    request: Request,
    way: Way,
    tensors: Tensors,
    bind: Callable[[Request, Tensors], Bound],
    stays: Tensor | None = None,
) -> Bound:
    """stays: the weight in the type of the sums, if it is not to be made in each call."""
    problem, buffers, widens = request.problem, _buffers(request, way, stays is not None), _widens(request)
    used, kept = workspace_bytes(buffers), compute_dtype(request.dtype)

    def given(slab: Slab) -> Tensors:
        w = tensors.second if stays is None else stays
        if not widens:
            return Tensors(tensors.first[slab.reached], w)
        shape = slab.request.problem.output_shape
        y = laid(torch.empty(math.prod(shape), dtype=kept, device="meta"), shape, request.channels_last)
        w = torch.empty(problem.weight_shape, dtype=kept, device="meta") if stays is None else w
        return Tensors(y, w)

    inside = None if way.inside is None else bind(way.inside, tensors)
    frames = [(frame, [(slab, bind(slab.request, given(slab))) for slab in frame.slabs]) for frame in way.frames]

    def fold(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        first, w, bias, residual = tensors
        if inside is not None:
            inside(tensors, out, workspace)
            if not widens:  # they are in the result, and all that is left is an activation
                bias = residual = None
        elif not widens:
            out.zero_()
        room, *wide = carve(workspace, buffers)
        if widens and frames and stays is None:
            w = wide[2].view(problem.weight_shape).copy_(w)
        w = w if stays is None else stays
        for frame, slabs in frames:
            sums = laid(wide[0], frame.shape, request.channels_last).zero_() if widens else out
            for slab, call in slabs:
                y = first[slab.reached]
                if widens:
                    y = laid(wide[1], slab.request.problem.output_shape, request.channels_last).copy_(y)
                strip = laid(room, slab.request.problem.input_shape, request.channels_last)
                call(Tensors(y, w), strip, workspace[used:])
                scatter_add(strip, slab.shows, sums)
            if bias is not None:
                sums += bias.view(-1, *(1,) * problem.dims)
            for own, whole in frame.parts:
                part = sums[own]
                finish(request, Tensors(first, w, None, None if residual is None else residual[whole]), part)
                if widens:
                    out[whole].copy_(part)

    return fold
