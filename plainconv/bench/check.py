"""Whether a result is right: points of it computed by definition, in float64.

An element of any direction is a sum of products of two tensors; the places where they lie follow from the problem:

    FORWARD      y[n, o, i] = sum over c, k of  x[n, c, i*s + k*d - lo] * w[o, c, k]
    GRAD_INPUT   x[n, c, i] = sum over o, k of  y[n, o, (i + lo - k*d) / s] * w[o, c, k]   where s divides
    GRAD_WEIGHT  w[o, c, k] = sum over n, i of  x[n, c, i*s + k*d - lo] * y[n, o, i]

A large result is looked at in 2,000 points: half of them anywhere, half at the ends of some dimensions, where borders
and the tails of vectors are.  A point may be off by

    (error / sqrt(terms) + 2) * eps(type of the sums) * sum of |products|,   but at most  error * eps * that sum,

and half an eps of the narrower type for the last rounding.  `error` is what the algorithm claims of itself, and the sum
is the largest of the points looked at.  The claim is for any numbers; those of a benchmark are random with both signs,
so a partial sum of k products is no larger than about sqrt(k) of them, and so are its roundings: without the root,
a gradient over a million places could lack a thousand of them and pass.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plainconv.border import inner
from plainconv.menu.base import compute_dtype
from plainconv.problem import ConvProblem, Direction

POINTS = 2000
PRODUCTS = 300_000_000  # in all points together; a sum of very many terms is looked at in fewer points
_CHUNK = 8_000_000  # products gathered at once


@dataclass(frozen=True)
class Exact:
    """Some points of a result: where they are [points, rank], their values, and the largest sum of |products|.

    terms: products in a sum, at most

    All of it is where the tensors are that it was made of.
    """

    points: Tensor
    values: Tensor
    largest: float
    terms: int


@dataclass(frozen=True)
class Verdict:
    """How far a result is off.

    Attributes:
        error: the largest distance from float64 in the points looked at.
        units: the same in units of eps(type of the sums) * the largest sum of |products|.
        allowed: the units that the algorithm's claim comes to, and what the last rounding adds.
        points: how many were looked at.
        right: whether every point is within its bound.
    """

    error: float
    units: float
    allowed: float
    points: int
    right: bool


def exact(problem: ConvProblem, direction: Direction, first: Tensor, second: Tensor, seed: int = 0) -> Exact:
    """Points of the tensor that `direction` makes, computed in float64 from the two tensors given to it."""
    if problem.padding_mode != "zeros":
        raise ValueError(f"only padding with zeros can be checked point by point, not {problem}")
    shape, terms = problem.shape_of(direction.makes), problem.terms(direction)
    points = sample(shape, min(POINTS, max(PRODUCTS // terms, 1)), seed).to(first.device)
    if direction is Direction.GRAD_WEIGHT:
        pairs = [_weight_point(problem, first, second, point.tolist()) for point in points]
        columns = zip(*pairs, strict=True)
        values, sums = (torch.tensor(column, dtype=torch.float64, device=first.device) for column in columns)
    else:
        chunks = points.split(max(1, _CHUNK // terms))
        both = [_map_points(problem, direction, first, second, chunk) for chunk in chunks]
        values, sums = (torch.cat(column) for column in zip(*both, strict=True))
    return Exact(points, values, float(sums.max()), terms)


def judge(result: Tensor, expected: Exact, claim: float) -> Verdict:
    """Hold a result to its points; `claim` is Algorithm.error of the algorithm that made it."""
    kept = torch.finfo(compute_dtype(result.dtype))
    found = result[tuple(expected.points.unbind(1))].double()
    error = (found - expected.values).abs()
    allowed = min(claim, claim / math.sqrt(max(expected.terms, 1)) + 2)
    bound = torch.full_like(error, allowed * kept.eps * expected.largest)
    narrow = torch.finfo(result.dtype)
    if narrow.eps != kept.eps:
        last = narrow.eps / 2 * (expected.values.abs() + bound)
        bound = bound + last.clamp_min(narrow.tiny * narrow.eps / 2)
    unit = kept.eps * expected.largest or 1.0
    worst = float(error.nan_to_num(math.inf).max())
    right = bool((error <= bound).all())  # a NaN is wrong
    return Verdict(worst, worst / unit, float(bound.max()) / unit, len(error), right)


def sample(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    """At most `count` places of a tensor of this shape, [places, rank]: all if there are no more."""
    if math.prod(shape) <= count:
        return torch.tensor(list(itertools.product(*map(range, shape))))
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randint(size, (count,), generator=generator) for size in shape], 1)
    ends = torch.tensor(shape) - 1
    chance = torch.rand(places.shape, generator=generator)
    chance[: count // 2] = 1.0
    places = torch.where(chance < 0.25, 0, torch.where(chance < 0.5, ends, places))
    places[0], places[1 % count] = 0, ends
    return places


def _map_points(
    problem: ConvProblem, direction: Direction, first: Tensor, w: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Points [n, channel, *place] of y or x: every tap's place in the other tensor, and the weight that it meets."""
    forward = direction is Direction.FORWARD
    n, channel = points[:, 0], points[:, 1]
    at = points.new_zeros(len(points), 1)  # [points, taps so far], flat in first's space
    inside = torch.ones_like(at, dtype=torch.bool)
    sides = zip(problem.kernel, problem.stride, problem.padding, problem.dilation, first.shape[2:], strict=True)
    for dim, (kernel, stride, (lo, _), dilation, size) in enumerate(sides, start=2):
        tap, i = torch.arange(kernel, device=points.device) * dilation, points[:, dim, None]
        place = i * stride + tap - lo if forward else i + lo - tap
        there = torch.ones_like(place, dtype=torch.bool)
        if not forward:
            there, place = place % stride == 0, place.div(stride, rounding_mode="floor")
        there &= (place >= 0) & (place < size)
        at = (at[:, :, None] * size + place[:, None].clamp(0, size - 1)).flatten(1)
        inside = (inside[:, :, None] & there[:, None]).flatten(1)
    own, other = (problem.group_out, problem.group_in) if forward else (problem.group_in, problem.group_out)
    channels = (channel // own)[:, None] * other + torch.arange(other, device=points.device)  # [points, other]
    taken = first.flatten(2)[n[:, None, None], channels[:, :, None], at[:, None]].double()
    taps = w.flatten(2)
    weights = (taps[channel] if forward else taps[channels, (channel % own)[:, None]]).double()  # [points, other, taps]
    products = torch.where(inside[:, None], taken * weights, 0.0)
    return products.sum((1, 2)), products.abs().sum((1, 2))


def _weight_point(problem: ConvProblem, x: Tensor, y: Tensor, point: list[int]) -> tuple[float, float]:
    """One weight, [o, c, *tap]: a strided window of x times y."""
    o, c, *tap = point
    windows: list[slice | int] = []
    outs: list[slice | int] = []
    for size, out, k, stride, (lo, _), dilation in zip(
        problem.spatial, problem.out, tap, problem.stride, problem.padding, problem.dilation, strict=True
    ):
        start = k * dilation - lo
        begin = max(-(start // stride), 0)  # the first output place whose tap is inside
        end = min((size - 1 - start) // stride + 1, out)
        outs.append(slice(begin, max(end, begin)))
        windows.append(slice(begin * stride + start, max((end - 1) * stride + start + 1, 0), stride))
        if end <= begin:
            return 0.0, 0.0
    channel = o // problem.group_out * problem.group_in + c
    products = x[:, channel][inner(windows)].double() * y[:, o][inner(outs)].double()
    return float(products.sum()), float(products.abs().sum())
